#!/usr/bin/env python3
"""Does all of it work on this machine's GPU, and if not, what went wrong? One text file to send back.

    test_gpu.py [--minutes 10] [--report build/test-gpu.txt]

`make test-gpu` runs it. It needs Python's standard library, the files of the repository, and either nvcc, g++ and make,
or programs that `make DEVICE=cuda SM=90 test-gpu-build` has built elsewhere. In this order:

  - the build, where nvcc is here;
  - every test of test_olmoe, FP32 and BF16;
  - `olmoe verify` of all models of tests/fixtures, in both precisions;
  - 20 steps of configs/tiny.json, twice: equal logs, but for times, and equal checkpoints;
  - the same with --recompute 1 and 2;
  - fine-tunings of tests/fixtures/finetune, and `olmoe evaluate` on tests/fixtures/evaluate, against what PyTorch
    computed in float64: all that they log or write in FP32, in BF16 what has a limit there;
  - compute-sanitizer's memcheck, racecheck and initcheck on the kernels and the model, where it is installed;
  - with two GPUs or more and NCCL: test_olmoe --ranks, and --ep 1|2 x --zero 0|1 against one rank;
  - OLMoE-1B-7B with random weights, 10 steps of the largest plan that fits the free memory, with fewer layers where not
    even the smallest does: tokens/s, MFU, and the share of each kernel in the time, from the program's own trace.

A failed step is counted and named, with the last lines that it printed, and the next one begins. All of it, build
included, ends after --minutes; what did not begin or end by then is left out, by name. A step that hangs is ended after
a limit of its own, and has failed. The last line is `N passed, M failed[, K left out]`; the exit code is 1 where
something failed or nothing passed.

With --runner WORDS, words that come before each program, and --programs, it tests an emulator's programs; --small takes
shapes for it.
"""
import argparse
import array
import datetime
import glob
import hashlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("FP32", "BF16")
PROGRAMS = ("olmoe", "test_olmoe")
TIMES = ("ms", "tokens_per_s", "mfu")           # of a line of log.jsonl: what differs from run to run
FIRST_UNTRACED = 4                              # step: those before it may be traced, which costs time
LAST_LINES = 15                                 # of what a failed command printed, for the report

# Seconds after which a command hangs. No step comes near them on a GPU of the last ten years.
PATIENCE = {"build": 1800, "test_olmoe": 150, "verify": 30, "info": 30, "train": 60, "evaluate": 30, "OLMoE": 300}
# The share of all time after which no sanitizer runs, so that the steps after them have their turn
SANITIZERS_END = 0.65

# In a BF16 build a model whose files are fp32 is another model: where two experts are nearly equal, a token goes to the
# other one, and takes a part of these experts' gradients along. The limit of the gradients is then this, and that of
# logits and losses the second.
OTHER_EXPERTS, OTHER_LOGITS = 0.5, 0.05

# The cases of fine-tuning and evaluation that are run, and their limits in FP32, which are those of
# tests/test_objectives.py and tests/test_evaluate.py: of a value; of a norm, which is a root of a sum over all
# gradients; of the log-probabilities, for what is a difference of them; and of what is exact but for its nine digits.
FINE_TUNED, EVALUATED = ("sft-assistant", "dpo-words", "kto-words"), ("bytes", "words")
RELATIVE, RELATIVE_NORM, OF_DIFFERENCES, NINE_DIGITS = 1e-5, 1e-4, 1e-6, 5e-9
DIFFERENCES = ("reward_margin", "kl", "chosen_reward", "rejected_reward")
LOG_PROBABILITIES = ("ce_loss", "chosen_logp", "rejected_logp")


class Failed(Exception):
    """What failed, in a line, and what the command printed last."""
    def __init__(self, why, ending=()):
        super().__init__(why)
        self.ending = list(ending)


class LeftOut(Failed):
    """Why a step did not run, or not to its end. `done`: what its command had printed until then."""
    done = None


class Done:
    """What a command left: exit code, or None where it was ended on purpose, and its two outputs."""
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def why(self, otherwise=""):
        """The exit code, and the program's own line about it, or else this text."""
        lines = [line for line in self.err.splitlines() if line.startswith("olmoe: ")]
        reason = lines[-1] if lines else otherwise
        return f"exit code {self.code}" + (f", {reason}" if reason else "")

    def ending(self):
        return [*self.out.splitlines()[-LAST_LINES:], *self.err.splitlines()[-LAST_LINES:]]


def descendants(pid):
    """The processes that a process has started, and those that these have: mpirun's ranks have groups of their own."""
    children = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as f:
                text = f.read()
        except OSError:                         # it has ended
            continue
        child, parent = int(text.split(" ", 1)[0]), int(text.rsplit(")", 1)[1].split()[1])
        children.setdefault(parent, []).append(child)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def end(processes, ask=False):
    """Ends these processes and what they have started. Only make is asked first, which then removes what is half
    built; `olmoe train` would save."""
    for process in processes:
        if process.poll() is not None:
            continue
        started = descendants(process.pid)
        if ask:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                pass
        for pid in started:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:                     # it has ended
                pass
    for process in processes:
        process.wait()


def output_of(*words):
    """What a command prints, or "" where there is none or it fails."""
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                              timeout=30, cwd=str(ROOT))
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


# ------------------------------------------------------------------------------------------------
# The machine

def find_nvcc():
    for name in (os.environ.get("NVCC"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if name and shutil.which(name):
            return name
    return None


def find_sanitizer(nvcc):
    """compute-sanitizer, on PATH or where CUDA has it; None where it is not installed."""
    cuda = [Path("/usr/local/cuda")] + ([Path(os.path.realpath(shutil.which(nvcc))).parent.parent] if nvcc else [])
    places = [str(folder / name) for folder in cuda for name in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES names, else one number for each GPU that nvidia-smi lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [word.strip() for word in chosen.split(",") if word.strip()]
    return [str(i) for i, line in enumerate(output_of("nvidia-smi", "-L").splitlines()) if line.startswith("GPU ")]


def free_memory(gpu):
    """Bytes of a GPU that nothing uses, or None where nvidia-smi does not report them."""
    text = output_of("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", gpu)
    return int(text) << 20 if text.isdigit() else None


def built_with(word):
    """What the Makefile has noted: does the build have this flag of MPI or NCCL? True where nothing is noted."""
    path = ROOT / "build" / "ranks.flags"
    return not path.exists() or word in path.read_text().split()


def built_from():
    """What `make test-gpu-build` has noted: commit, SM, release of nvcc."""
    path = ROOT / "build" / "test-gpu-built.txt"
    return path.read_text().splitlines() if path.exists() else []


def described(session):
    """(name, text) of what a reader of the report has to know."""
    o = session.options
    commit = output_of("git", "describe", "--always", "--dirty", "--abbrev=12")
    now = datetime.datetime.now(datetime.timezone.utc)
    rows = [("date", now.strftime("%Y-%m-%d %H:%M UTC")),
            ("commit", commit or "not known: no checkout of git's"),
            ("built", "; ".join(built_from()) or "not by test-gpu-build"),
            ("nvcc", output_of(session.nvcc, "--version").replace("\n", "; ") if session.nvcc else "none here"),
            ("host", f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")]
    query = "name,driver_version,memory.total,memory.free,compute_cap,mig.mode.current"
    cards = output_of("nvidia-smi", "--query-gpu=" + query, "--format=csv,noheader")
    rows += [("GPU", f"{line}  ({query})") for line in cards.splitlines()]
    return rows + [("called", " ".join(map(shlex.quote, sys.argv)))]


# ------------------------------------------------------------------------------------------------
# Steps, one after another

class Session:
    def __init__(self, options):
        self.options = options
        self.started = time.monotonic()
        self.deadline = self.started + 60 * options.minutes
        self.nvcc = None if options.runner else find_nvcc()
        self.gpus = [str(i) for i in range(options.gpus)] if options.gpus is not None else visible_gpus()
        self.counts = {"passed": 0, "FAILED": 0, "left out": 0}
        self.not_passed = []                    # (outcome, name, why)
        self.commands = []                      # of the step
        self.limit = self.deadline              # of the step
        self.kept = {}                          # what a step leaves for later ones, by name
        self.folder = self.report = None

    def say(self, *lines):
        """Into the report at once: a machine that dies leaves what was found until then."""
        for line in lines:
            self.report.write(line + "\n")
        self.report.flush()
        os.fsync(self.report.fileno())

    def words(self, precision, program, *args):
        """The command of a program."""
        path = self.options.programs.replace("PRECISION", precision.lower()) + "/" + program
        if not os.access(ROOT / path, os.X_OK):
            raise LeftOut(f"{path} is not there: it was not built")
        return [*shlex.split(self.options.runner), path, *map(str, args)]

    def run(self, words, patience, ranks=0, until=None, ask=False):
        """Runs a command, or one for each of several ranks, in the repository's folder. Fails after `patience`
        seconds, and is left out when the step's time is over. Where until() is true it is ended on purpose. Returns
        what it did, of ranks the first that failed, else rank 0."""
        of_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
        environment = {key: value for key, value in os.environ.items() if key not in of_make}
        self.commands.append((f"RANK=0..{ranks - 1} WORLD_SIZE={ranks} " if ranks else "")
                             + " ".join(map(shlex.quote, words)))
        processes, files, begun = [], [], time.monotonic()
        try:
            for rank in range(ranks or 1):
                if ranks:
                    environment.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
                files.append([tempfile.TemporaryFile(dir=str(self.folder)) for _ in range(2)])
                processes.append(subprocess.Popen(words, cwd=str(ROOT), env=environment, stdin=subprocess.DEVNULL,
                                                  stdout=files[rank][0], stderr=files[rank][1]))
            on_purpose, why = self.wait(processes, begun, patience, until)
        except OSError as error:
            raise Failed(f"{words[0]} cannot be run: {error.strerror}")
        finally:
            end(processes, ask)
            texts = [[self.text(f) for f in pair] for pair in files]
        worst = next((i for i, p in enumerate(processes) if p.returncode > 0), 0)       # an error before a signal
        shown = 0 if on_purpose or why else worst
        done = Done(None if on_purpose else processes[shown].returncode, *texts[shown])
        if why:
            why.done, why.ending = done, done.ending()
            raise why
        return done

    def wait(self, processes, begun, patience, until):
        """Waits for all of them, or, where one fails, a little for the others. Returns whether `until` ended them, and
        what else did: an exception or None."""
        pause, failed = 0.002, None
        while any(p.poll() is None for p in processes):
            now = time.monotonic()
            if any(p.poll() not in (None, 0) for p in processes):
                failed = failed or now
                if now > failed + 3:
                    break
            if until and until():
                return True, None
            if now > begun + patience:
                return False, Failed(f"it hangs: ended after {now - begun:.0f} s")
            if now > self.limit:
                return False, LeftOut(f"not at its end after {now - begun:.0f} s, when its time was over")
            time.sleep(pause)
            pause = min(0.1, pause * 1.5)
        return False, None

    @staticmethod
    def text(file):
        """The last 4 MB of what was written."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (4 << 20)))
        text = file.read().decode(errors="replace")
        file.close()
        return text

    def ok(self, words, patience, **more):
        """Runs a command that has to end with 0."""
        done = self.run(words, patience, **more)
        if done.code not in (0, None):
            raise Failed(done.why(), done.ending())
        return done

    def step(self, name, body, *args, limit=None):
        """Runs body(session, *args), whose lines are details for the report, and counts it."""
        begun = time.monotonic()
        self.commands, self.limit = [], min(self.deadline, limit or self.deadline)
        outcome, why, lines, ending = "passed", "", [], []
        try:
            if begun >= self.limit:
                raise LeftOut("no time was left")
            lines = body(self, *args) or []
        except Failed as failure:
            outcome = "left out" if isinstance(failure, LeftOut) else "FAILED"
            why, ending = str(failure), failure.ending
        except Exception as error:              # of this script, or an answer that it does not understand
            outcome, why = "FAILED", f"{type(error).__name__}: {error}"
        self.counts[outcome] += 1
        if outcome != "passed":
            self.not_passed.append((outcome, name, why))
        head = f"{outcome:8}  {time.monotonic() - begun:6.1f} s  {name}" + (f": {why}" if why else "")
        print(head, flush=True)
        for line in lines:
            print(" " * 20 + line, flush=True)
        self.say("", head, *("    $ " + c for c in self.commands), *("    " + l for l in lines),
                 *("    | " + l for l in ending))


# ------------------------------------------------------------------------------------------------
# What the steps do

def build(session):
    make = shutil.which("make")
    if not make:
        raise Failed("there is no make")
    jobs = min(4, os.cpu_count() or 1)
    session.ok([make, "-k", f"-j{jobs}", "DEVICE=cuda", "test-gpu-build"], PATIENCE["build"], ask=True)
    return built_from()


def last_of(done):
    lines = done.out.strip().splitlines()
    return lines[-1] if lines else ""


def tally_of(done):
    """Of test_olmoe: its own tally has to report that something passed and nothing failed."""
    failures = [line for line in done.out.splitlines() if line.endswith("FAILED")][:20]
    last = last_of(done)
    if done.code != 0 or not re.fullmatch(r"[1-9]\d* passed, 0 failed", last):
        what = last if re.fullmatch(r"\d+ passed, \d+ failed", last) else "no tally at its end"
        raise Failed(done.why(what), failures + done.ending())
    return [last] + [line for line in done.out.splitlines() if line.startswith("checksum ")]


def test_olmoe(session, precision):
    return tally_of(session.run(session.words(precision, "test_olmoe", *session.chosen_tests), PATIENCE["test_olmoe"]))


def fixtures(session):
    """The folders that hold a model and its reference"""
    folder = Path(session.options.fixtures)
    return sorted(folder / path.parent.name for path in (ROOT / folder).glob("*/reference.safetensors"))


def verify(session, precision, model):
    words = session.words(precision, "olmoe", "verify", "--model", model,
                          "--reference", model / "reference.safetensors")
    config = json.loads((ROOT / model / "config.json").read_text())
    other_model = precision == "BF16" and config.get("torch_dtype", config.get("dtype")) != "bfloat16"
    done = session.run(words + (["--rtol", str(OTHER_EXPERTS)] if other_model else []), PATIENCE["verify"])
    rows = done.out.splitlines()
    if done.code != 0 or not last_of(done).endswith("they agree"):
        failures = [row for row in rows if "FAILED" in row][:20]
        raise Failed(done.why(last_of(done) or "nothing printed"), failures + done.ending())
    errors = {m[1]: float(m[2]) for m in (re.match(r"(\S+)(?: \(.*?\))? +(\S+) +\S+ %  ", row) for row in rows) if m}
    worst = max(errors, key=errors.get) if errors else None
    if other_model:
        wrong = [name for name, e in errors.items() if re.match("logits|.*loss", name) and not e <= OTHER_LOGITS]
        if wrong:
            raise Failed(f"{', '.join(wrong)}: more than {OTHER_LOGITS} off", done.ending())
    return [last_of(done)] + ([f"worst: {worst} {errors[worst]:g}"] if worst else [])


def text_tokens(count):
    """`count` bytes as tokens: words of a small vocabulary, in which there is something to learn. Always the same."""
    rng = random.Random(1)
    words = [[rng.randrange(97, 123) for _ in range(rng.randrange(2, 8))] + [32] for _ in range(50)]
    tokens = array.array("H")
    while len(tokens) < count:
        tokens.extend(words[rng.randrange(50)])
    return tokens[:count]


def log_lines(out):
    """What a run logged of its steps."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    return [line for line in (json.loads(text) for text in lines if text.endswith("\n")) if "step" in line]


def train(session, precision, name, *more, batch=None, ranks=0):
    """A run of the tiny model in a folder `name` of its own. Returns its folder."""
    data, out = session.folder / "tiny.npy", session.folder / name
    if not data.exists():
        with open(data, "wb") as f:
            text_tokens(1 << 17).tofile(f)
    shutil.rmtree(out, ignore_errors=True)
    words = session.words(precision, "olmoe", "train", "--config", "configs/tiny.json", "--data", data, "--out", out,
                          "--steps", session.steps, "--batch", batch or session.batch, "--seq", session.seq,
                          "--warmup", 2, "--lr", "1e-3", "--peak-tflops", 1, *more)
    done = session.ok(words, PATIENCE["train"], ranks=ranks)
    steps = [line["step"] for line in log_lines(out)]
    if steps != list(range(1, session.steps + 1)):
        raise Failed(f"log.jsonl has the steps {steps}", done.ending())
    return out


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def same_bits(session, ours, theirs):
    """Logs without times, and the files of the last checkpoint, are equal; else Failed with the first difference."""
    for a, b in zip(log_lines(ours), log_lines(theirs)):
        for key in sorted((set(a) | set(b)) - set(TIMES)):
            if a.get(key) != b.get(key):
                raise Failed(f"step {a['step']}, {key}: {a.get(key)} and {b.get(key)}")
    step = f"step-{session.steps:08}"
    a, b = digests(ours / step), digests(theirs / step)
    different = sorted(name for name in set(a) | set(b) if a.get(name) != b.get(name))
    if different:
        raise Failed("equal logs, but checkpoints differ: " + ", ".join(different))


def train_twice(session, precision):
    first = train(session, precision, precision + "-0")
    session.kept[precision] = first
    second = train(session, precision, precision + "-again")
    same_bits(session, first, second)
    shutil.rmtree(second)
    losses = [line["loss"] for line in log_lines(first)]
    if session.steps >= 20 and not losses[-1] < losses[0] - 0.2:
        raise Failed(f"nothing is learned: loss {losses[0]} at the first step, {losses[-1]} at the last")
    return [f"loss {losses[0]} at the first step, {losses[-1]} at the last; equal logs and checkpoints"]


def recompute(session, precision, level):
    if precision not in session.kept:
        raise LeftOut("there is no run without it to compare with")
    out = train(session, precision, f"{precision}-{level}", "--recompute", level)
    same_bits(session, out, session.kept[precision])
    shutil.rmtree(out)
    return ["equal log and checkpoint"]


def sanitize(session, sanitizer, tool, precision, turns):
    """`turns` sanitizers share what is left of their time."""
    session.limit = min(session.limit, time.monotonic() + (session.limit - time.monotonic()) / turns)
    program = session.words(precision, "test_olmoe", "--only", "kernel", "--only", "model")

    def reports(done):
        return [line for line in done.out.splitlines() + done.err.splitlines()
                if line.startswith("=========") and "COMPUTE-SANITIZER" not in line]
    try:
        done = session.run([sanitizer, "--tool", tool, "--error-exitcode", "9", *program], 3600)
    except LeftOut as reason:                   # what it has reported counts, also where it was not at its end
        if reason.done and reports(reason.done):
            raise Failed(f"it has reported something, and was {reason}", reports(reason.done)[:40])
        raise
    found = reports(done)
    if done.code != 0:
        raise Failed(f"exit code {done.code}, {found[-1] if found else last_of(done)}", found[:40] + done.ending())
    return found[-1:]


def mpirun(*words):
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    return ["mpirun", *root, "--oversubscribe", "-np", "2", *words]


def test_ranks(session, precision):
    if not shutil.which("mpirun") or not built_with("-lmpi"):
        raise LeftOut("no mpirun, or built without MPI")
    words = session.words(precision, "test_olmoe", "--ranks")
    return tally_of(session.run(mpirun(*words), PATIENCE["test_olmoe"]))


def layout(session, ep, zero):
    """Two ranks against one, in FP32: the same losses and norms but for the order of sums."""
    recipe, whole = ["--lb", "global", "--eps", "1e-5"], 2 * session.batch
    if "one rank" not in session.kept:
        session.kept["one rank"] = train(session, "FP32", "one-rank", *recipe, batch=whole)
    recipe += ["--global-batch", whole]
    name = f"ep{ep}-zero{zero}"
    meeting = session.folder / (name + ".meeting")
    out = train(session, "FP32", name, *recipe, "--ep", ep, "--zero", zero, "--rendezvous", meeting, ranks=2)
    worst = 0.0
    for a, b in zip(log_lines(out), log_lines(session.kept["one rank"])):
        for key, limit in (("loss", 1e-4), ("ce_loss", 1e-4), ("lb_loss", 1e-3), ("z_loss", 1e-3), ("grad_norm", 1e-3)):
            off = abs(a[key] - b[key]) / abs(b[key])
            worst = max(worst, off / limit)
            if not off <= limit:
                raise Failed(f"step {a['step']}, {key}: {a[key]}, on one rank {b[key]}")
    shutil.rmtree(out)
    return [f"largest difference to one rank: {100 * worst:.1f} % of the limit"]


# ------------------------------------------------------------------------------------------------
# Fine-tuning and evaluation, against expected numbers

class Comparison:
    """Values beside those expected: how many there are, which are off, and which is nearest to its limit."""
    def __init__(self):
        self.count, self.off, self.most, self.nearest = 0, [], 0.0, "none"

    def equal(self, name, got, right):
        self.count += 1
        if got != right:
            self.off.append(f"{name}: {got}, expected {right}")

    def near(self, name, got, right, limit):
        """Both are null, or numbers that are no more than `limit` apart; where that is infinite, any number will do."""
        self.count += 1
        if right is None or not isinstance(got, (int, float)) or not math.isfinite(got):
            good = right is None and got is None
        else:
            good, used = abs(got - right) <= limit, abs(got - right) / limit if limit else 0.0
            if used >= self.most:
                self.most, self.nearest = used, name
        if not good:
            self.off.append(f"{name}: {got}, expected {right}")

    def result(self, done):
        """Details for the report, or Failed with the first value that is off, and with more of them in its lines."""
        if self.off:
            why = f"{len(self.off)} of {self.count} values are off, {self.off[0]}"
            raise Failed(why, self.off[:20] + done.ending())
        return [f"{self.count} values as expected; nearest to its limit: {self.nearest}, {100 * self.most:.2g} % of it"]


def expected_of(session, kind, case):
    """(folder, what its expected.json has) of a case of tests/fixtures/KIND."""
    folder = Path(session.options.fixtures) / kind / case
    if not (ROOT / folder / "expected.json").exists():
        raise LeftOut(f"there is no {folder}/expected.json")
    return folder, json.loads((ROOT / folder / "expected.json").read_text())


def allowed(precision, e, step, field):
    """How far a logged value may be from the expected one. Infinite: it only has to be a number.

    In BF16 that is what verify allows for a model whose files are fp32, where it applies: to the first step, for later
    ones follow an update in which each small gradient counts by its sign; to means of log-probabilities, which are
    losses; and to the norm of their gradient. What is a difference of log-probabilities may be all rounding, and so may
    the gradients that it weights."""
    right, args = abs(e["steps"][step - 1][field] or 0), e["args"]
    if field == "targets":
        return 0
    if field == "lr" or field == "reward_accuracy" and precision == "FP32":
        return NINE_DIGITS * right
    if precision == "FP32":
        beta = float(args[args.index("--beta") + 1]) if "--beta" in args else 0.1
        of_difference = OF_DIFFERENCES * e["log_probability"] * (1 if field == "kl" else beta)
        limit = RELATIVE_NORM if field == "grad_norm" else RELATIVE
        return limit * right + (of_difference if field in DIFFERENCES else 0)
    if step == 1 and field in LOG_PROBABILITIES:
        return OTHER_LOGITS * right
    if step == 1 and field == "grad_norm" and args[args.index("--objective") + 1] == "sft":
        return OTHER_EXPERTS * right
    return math.inf


def fine_tuning(session, precision, case):
    """A fine-tuning by rows: each field of each step that was expected"""
    folder, e = expected_of(session, "finetune", case)
    out = session.folder / f"{case}-{precision}"
    reference = ["--reference", folder / e["reference"]] if e["reference"] else []
    words = session.words(precision, "olmoe", "train", "--model", folder / e["model"], *reference, "--data",
                          *(folder / name for name in e["data"]), "--tokenizer", e["tokenizer"], "--out", out,
                          *e["args"], "--sample-tokens", 1, "--peak-tflops", 1)
    done = session.ok(words, PATIENCE["train"])
    lines, found = log_lines(out), Comparison()
    found.equal("steps", [line["step"] for line in lines], list(range(1, len(e["steps"]) + 1)))
    for i, (line, step) in enumerate(zip(lines, e["steps"]), 1):
        for field, right in step.items():
            found.near(f"step {i}, {field}", line.get(field, "missing"), right, allowed(precision, e, i, field))
    shutil.rmtree(out)
    return found.result(done)


def compare_task(found, precision, name, samples, table, wanted):
    """A task's documents and scores, of `olmoe evaluate`. In BF16 another choice may be the best, so that scores only
    have to be numbers."""
    documents = wanted["documents"]
    found.equal(f"{name}, doc_ids", [s["doc_id"] for s in samples], [d["doc_id"] for d in documents])
    found.equal(f"{name}, n", table["n"], wanted["table"]["n"])
    for s, d in zip(samples, documents):
        at = f"{name} {d['doc_id']}"
        for key in ("label", "tokens", "characters", "bytes"):
            found.equal(f"{at}, {key}", s[key], d[key])
        found.equal(f"{at}, choices", len(s["logprobs"]), len(d["logprobs"]))
        if precision == "FP32":
            for i, (got, right) in enumerate(zip(s["logprobs"], d["logprobs"])):
                found.near(f"{at}, log p of choice {i}", got, right, RELATIVE * abs(right))
            for key, prediction in zip(("acc", "acc_norm", "acc_bytes"), d["predictions"]):
                found.equal(f"{at}, {key}", s[key], int(prediction == d["label"]))
    for key, right in wanted["table"].items():
        limit = (NINE_DIGITS if key.startswith("acc") else RELATIVE) * (right or 0)
        found.near(f"{name}, {key}", table.get(key, "missing"), right, limit if precision == "FP32" else math.inf)


def limit_of_log_probabilities(folder, e):
    """In BF16, of the root mean square of what a token's log p is off by. That is its logit less the log of a sum, and
    so it is off by twice what logits are off by at most, for which verify has a limit, relative to the logits' own root
    mean square s. A model of random weights has a loss of log V + s^2 / 2 in V words: that tells s."""
    config = json.loads((ROOT / folder / e["model"] / "config.json").read_text())
    loss = statistics.mean(wanted["loss"] for run in e["runs"] for wanted in run["perplexity"].values())
    return 2 * OTHER_LOGITS * math.sqrt(2 * (loss - math.log(config["vocab_size"])))


def evaluate_run(session, precision, folder, e, number, found, errors):
    """One call of `olmoe evaluate`. Appends to errors what each choice's log p is off by, per token. Returns what it
    did."""
    run, out = e["runs"][number], session.folder / "evaluate"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    words = session.words(precision, "olmoe", "evaluate", "--model", folder / e["model"], "--tokenizer", e["tokenizer"],
                          "--tasks", *(folder / name for name in run["task_files"]), "--perplexity",
                          *(folder / name for name in run["perplexity_files"]),
                          *(["--seq", run["seq"]] if run["seq"] else []), "--json", out / "out.json", "--samples",
                          out / "samples.jsonl")
    done = session.ok(words, PATIENCE["evaluate"])
    figures, samples = json.loads((out / "out.json").read_text()), {name: [] for name in run["tasks"]}
    for line in map(json.loads, (out / "samples.jsonl").read_text().splitlines()):
        samples.setdefault(line["task"], []).append(line)
    shutil.rmtree(out)
    names = {"tasks": sorted(figures["tasks"]), "samples": sorted(samples), "sets": sorted(figures["perplexity"])}
    right = {"tasks": sorted(run["tasks"]), "samples": sorted(run["tasks"]), "sets": sorted(run["perplexity"])}
    found.equal(f"run {number}, names", names, right)
    if names != right:
        return done
    for name, task in run["tasks"].items():
        compare_task(found, precision, f"run {number}, {name}", samples[name], figures["tasks"][name], task)
        for s, d in zip(samples[name], task["documents"]):
            errors += [(a - b) / count for a, b, count in zip(s["logprobs"], d["logprobs"], d["tokens"])]
    for name, wanted in run["perplexity"].items():
        own, name = figures["perplexity"][name], f"run {number}, {name}"
        found.equal(f"{name}, tokens", own["tokens"], wanted["tokens"])
        for key in sorted({"loss", "bits_per_byte"} & set(wanted)):
            limit = (RELATIVE if precision == "FP32" else OTHER_LOGITS) * wanted[key]
            found.near(f"{name}, {key}", own.get(key, "missing"), wanted[key], limit)
        perplexity = math.exp(own["loss"])
        found.near(f"{name}, perplexity", own["perplexity"], perplexity, NINE_DIGITS * perplexity)
    return done


def evaluate(session, precision, case):
    folder, e = expected_of(session, "evaluate", case)
    found, errors = Comparison(), []
    for number in range(len(e["runs"])):
        done = evaluate_run(session, precision, folder, e, number, found, errors)
    if precision == "BF16":
        error = math.sqrt(sum(x * x for x in errors) / len(errors)) if errors else math.nan
        found.near("error of a token's log p", error, 0.0, limit_of_log_probabilities(folder, e))
    return found.result(done)


# ------------------------------------------------------------------------------------------------
# OLMoE-1B-7B, at what fits

STATES = (("fp32", "fp32"), ("remainder", "fp32"), ("remainder", "bf16"), ("none", "bf16"))


def candidates(layers):
    """(layers, masters, moments, batch, recompute), the best first: all layers, AdamW's state as exact as fits, then
    large micro-batches, then little that is computed again."""
    count = layers
    while count >= 1:
        for masters, moments in STATES:
            for batch in (8, 4, 2, 1):
                for level in (0, 1, 2):
                    yield count, masters, moments, batch, level
        count //= 2


def choose(layers, budget, plan):
    """The first candidate whose plan(candidate), in bytes, is within the budget; None where none is. Of each number of
    layers and kind of state, the smallest plan is looked at first, so that few plans are made."""
    fits = {}
    for candidate in candidates(layers):
        count, masters, moments, _, _ = candidate
        group = (count, masters, moments)
        if group not in fits:
            fits[group] = plan((count, masters, moments, 1, 2)) <= budget
        if fits[group] and plan(candidate) <= budget:
            return candidate
    return None


def kernel_shares(path):
    """(name, share of the time of all pieces of work, ms, calls), the largest first, of a file of --trace."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    total = sum(e["dur"] for e in events)
    rows = []
    for name in sorted({e["name"] for e in events}):
        own = [e["dur"] for e in events if e["name"] == name]
        rows.append((name, sum(own) / total if total else 0.0, sum(own) / 1e3, len(own)))
    return sorted(rows, key=lambda row: -row[1])


class FullSize:
    """OLMoE-1B-7B: its plan, and its run."""
    def __init__(self, session):
        source = "configs/tiny.json" if session.options.small else "configs/olmoe-1b-7b.json"
        self.session, self.config = session, json.loads((ROOT / source).read_text())
        self.seq = min(4096, self.config["max_position_embeddings"])
        if session.options.small:
            self.seq = 32
        self.plans = {}

    def path(self, layers):
        path = self.session.folder / f"config-{layers}.json"
        path.write_text(json.dumps({**self.config, "num_hidden_layers": layers}))
        return path

    def options(self, candidate):
        layers, masters, moments, batch, level = candidate
        return ["--config", self.path(layers), "--batch", batch, "--seq", self.seq, "--recompute", level,
                "--master-weights", masters, "--moments", moments]

    def plan(self, candidate):
        """What `olmoe info` reports of a candidate"""
        if candidate not in self.plans:
            words = self.session.words("BF16", "olmoe", "info", "--json", *self.options(candidate))
            self.plans[candidate] = json.loads(self.session.ok(words, PATIENCE["info"]).out)
            self.session.commands.pop()         # a dozen of them say nothing
        return self.plans[candidate]

    def memory(self, candidate):
        return self.plan(candidate)["memory"]["sum"]

    def choose(self):
        o = self.session.options
        free = o.memory * 1e9 if o.memory else free_memory(self.session.gpus[0]) if self.session.gpus else None
        if not free:
            raise LeftOut("nvidia-smi does not report the free memory; scripts/test_gpu.py --memory GB gives it")
        budget = free - (0 if o.memory else 1.5e9 + 0.02 * free)        # CUDA's context, and gaps between blocks
        chosen = choose(self.config["num_hidden_layers"], budget, self.memory)
        if not chosen:
            raise LeftOut(f"not even one layer fits {budget / 1e9:.1f} GB")
        return chosen, free

    def run(self, chosen):
        """Trains until the log has all steps, then ends the run: at its end it would save AdamW's state, which is 83
        GB. Returns the log, and what the program printed."""
        session = self.session
        out, data, trace = (session.folder / name for name in ("large", "large.npy", "trace.json"))
        steps = 5 if session.options.small else 10
        rng, ids = random.Random(2), self.config["vocab_size"]
        with open(data, "wb") as f:
            array.array("H", [rng.randrange(ids) for _ in range(16 * chosen[3] * self.seq)]).tofile(f)
        more = ["--peak-tflops", 1] if session.options.small else []
        words = session.words("BF16", "olmoe", "train", *self.options(chosen), "--data", data, "--out", out, "--steps",
                              1000, "--warmup", 2, "--log-every", 1, "--trace", trace, *more)
        done = session.ok(words, PATIENCE["OLMoE"], until=lambda: len(log_lines(out)) >= steps)
        lines = log_lines(out)
        if len(lines) < steps:
            raise Failed(f"ended after {len(lines)} of {steps} steps", done.ending())
        return lines, done


def full_size(session):
    model = FullSize(session)
    chosen, free = model.choose()
    layers, masters, moments, batch, level = chosen
    lines, done = model.run(chosen)
    rate = statistics.median(line["tokens_per_s"] for line in lines if line["step"] >= FIRST_UNTRACED)
    plan, all_layers = model.memory(chosen) / 1e9, model.config["num_hidden_layers"]
    flops = rate * model.plan(chosen)["flops_per_token"] / 1e12
    found = [f"{layers} of {all_layers} layers, micro-batch {batch} x {model.seq}, --recompute {level}, "
             f"--master-weights {masters}, --moments {moments}: plan {plan:.2f} GB of {free / 1e9:.2f} GB free",
             f"{rate:.0f} tokens/s, {flops:.4g} TFLOP/s (median of the steps from {FIRST_UNTRACED} on)"]
    mfu = [line["mfu"] for line in lines if "mfu" in line and line["step"] >= FIRST_UNTRACED]
    shown = re.findall(r"\| *([\d.]+) ?% of peak", done.out)[FIRST_UNTRACED - 1:]
    peak = re.search(r"\| peak +\| (.*?) *\|", done.out)
    of_peak = f", of {peak[1]}" if peak else ""
    if mfu:
        found.append(f"MFU {statistics.median(mfu):.4g}{of_peak}")
    elif shown:
        found.append(f"MFU {statistics.median(map(float, shown)):.4g} %{of_peak}")
    found.append("losses " + " ".join(f"{line['loss']:.4f}" for line in lines))
    rows = kernel_shares(session.folder / "trace.json")
    if not rows:
        raise Failed("the trace is empty", done.ending())
    found.append("share of the time of all work, as traced; streams overlap:")
    return found + [f"{100 * share:6.2f} %  {ms:10.3f} ms  {calls:6} calls  {name}" for name, share, ms, calls in rows]


# ------------------------------------------------------------------------------------------------

def run_steps(session):
    o = session.options
    if not o.runner and session.nvcc:
        session.step("build with nvcc", build)
    for precision in PRECISIONS:
        session.step(f"test_olmoe {precision}", test_olmoe, precision)
    for precision in PRECISIONS:
        for model in fixtures(session):
            session.step(f"verify {model.name} {precision}", verify, precision, model)
    for precision in PRECISIONS:
        session.step(f"{session.steps} steps twice {precision}", train_twice, precision)
    for precision in PRECISIONS:
        for level in (1, 2):
            session.step(f"--recompute {level} {precision}", recompute, precision, level)
    for precision in PRECISIONS:
        for case in FINE_TUNED:
            session.step(f"fine-tuning {case} {precision}", fine_tuning, precision, case)
        for case in EVALUATED:
            session.step(f"evaluate {case} {precision}", evaluate, precision, case)

    def leave_out(session, why):
        raise LeftOut(why)
    sanitizer = None if o.runner else find_sanitizer(session.nvcc)
    if not sanitizer:
        session.step("compute-sanitizer", leave_out, "with an emulator" if o.runner else "not installed")
    runs = [(tool, precision) for precision in PRECISIONS for tool in ("memcheck", "racecheck", "initcheck")]
    for i, (tool, precision) in enumerate(runs if sanitizer else []):
        session.step(f"{tool} {precision}", sanitize, sanitizer, tool, precision, len(runs) - i,
                     limit=session.started + SANITIZERS_END * 60 * o.minutes)

    why = f"{len(session.gpus)} GPU here" if len(session.gpus) < 2 else "" if built_with("-lnccl") else "no NCCL"
    if why:
        session.step("two ranks", leave_out, why)
    else:
        for precision in PRECISIONS:
            session.step(f"test_olmoe --ranks {precision}", test_ranks, precision)
        for ep in (1, 2):
            for zero in (0, 1):
                session.step(f"two ranks, --ep {ep} --zero {zero}", layout, ep, zero)
    session.step("OLMoE-1B-7B, random weights" + (" (small)" if o.small else ""), full_size)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, metavar="X", help="wall time of all, build included")
    parser.add_argument("--report", default="build/test-gpu.txt", metavar="FILE", help="the text to send back")
    parser.add_argument("--memory", type=float, metavar="GB", help="free on the GPU, where nvidia-smi does not say")
    parser.add_argument("--gpus", type=int, metavar="N", help="in place of those that nvidia-smi lists")
    parser.add_argument("--fixtures", default="tests/fixtures", metavar="DIR", help="models with references")
    parser.add_argument("--programs", default="build/cuda-PRECISION", metavar="DIR", help="where the programs are")
    parser.add_argument("--runner", default="", metavar="WORDS", help="come before each program, and nothing is built")
    parser.add_argument("--small", action="store_true", help="shapes for an emulator")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: it has to be more than 0")
    return options


def check(session):
    """Ends with one line where there is nothing to test, before anything is written."""
    o = session.options
    if not o.runner and not session.gpus and not glob.glob("/dev/nvidia[0-9]*"):
        sys.exit("test_gpu.py: no NVIDIA device here; make DEVICE=cuda SM=90 test-gpu-build builds for one elsewhere")
    paths = [o.programs.replace("PRECISION", p.lower()) + "/" + name for p in PRECISIONS for name in PROGRAMS]
    missing = [path for path in paths if not (ROOT / path).exists()]
    if missing and not session.nvcc:
        sys.exit(f"test_gpu.py: no nvcc here and no {missing[0]}: build where nvcc is, with make DEVICE=cuda SM=90 "
                 "test-gpu-build (SM: 80 for A100, 90 for H100), and bring the folder here")
    if not fixtures(session):
        sys.exit(f"test_gpu.py: no models with references in {o.fixtures}")


def finish(session):
    """The last lines, on the screen and in the report. Returns the exit code."""
    counts = session.counts
    last = f"{counts['passed']} passed, {counts['FAILED']} failed"
    if counts["left out"]:
        last += f", {counts['left out']} left out"
    lines = ["", *(f"{outcome:8}  {name}: {why}" for outcome, name, why in session.not_passed),
             f"in {time.monotonic() - session.started:.0f} s", last]
    session.say(*lines)
    session.report.close()
    print("\n".join([*lines[:-1], "the report to send: " + session.options.report, last]), flush=True)
    return 1 if counts["FAILED"] or not counts["passed"] else 0


def main(argv=None):
    session = Session(parse(argv))
    o = session.options
    check(session)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was found until then is reported
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    session.steps, session.batch, session.seq = (3, 1, 32) if o.small else (20, 8, 256)
    session.chosen_tests = ["--without", "gradient"] if o.small else []
    path = ROOT / o.report
    path.parent.mkdir(parents=True, exist_ok=True)
    session.report = open(path, "w", encoding="utf-8")
    session.folder = Path(tempfile.mkdtemp(prefix="test-gpu-", dir=str(path.parent)))
    try:
        rows = described(session)
        for name, text in rows:
            print(f"{name:8}  {text}", flush=True)
        session.say("test-gpu of olmoe.cu", "", *(f"{name:8}  {text}" for name, text in rows), "",
                    *(output_of("nvidia-smi") or "no nvidia-smi here").splitlines())
        try:
            run_steps(session)
        except KeyboardInterrupt:
            session.counts["left out"] += 1
            session.not_passed.append(("left out", "the rest", "Ctrl-C"))
            return finish(session) or 130
        return finish(session)
    finally:
        shutil.rmtree(session.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
