"""scripts/test_gpu.py without a GPU: what it counts, names, leaves out and writes, with stand-ins for the programs, for
nvcc, nvidia-smi, mpirun and compute-sanitizer. test_ptxrun.py runs it on compiled GPU code.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import test_gpu as script

# olmoe and test_olmoe. Where the command matches a pattern of the variable FAULTS, pattern -> kind, that happens. Of a
# fine-tuning or evaluation a kind is the place of a value in expected.json, "all" for each of a list, and a factor.
PROGRAM = r"""#!PYTHON -IS
import json, os, re, sys, time
words = [re.sub(r".*/build/", "build/", sys.argv[0]), *sys.argv[1:]]
line = " ".join(words)
kind = next((k for pattern, k in json.loads(os.environ["FAULTS"]).items() if re.search(pattern, line)), "")
option = lambda name, otherwise=None: words[words.index(name) + 1] if name in words else otherwise
if words[1:2] != ["info"]:
    print("called as", line)
if kind == "exit":
    print("the last word", file=sys.stderr)
    sys.exit(3)
if kind == "hang":
    child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
    open(os.environ["PIDS"], "a").write("%d %d\n" % (os.getpid(), child))
    print("it has begun", flush=True)
    time.sleep(60)
if words[0].endswith("test_olmoe"):
    print("kernel x: error 3 FAILED\n2 passed, 1 failed" if kind == "count" else "checksum 0123\n3 passed, 0 failed")
    sys.exit(kind == "count")
if words[1] == "verify":
    if os.path.getsize(option("--reference")) < 1000:
        print("olmoe: reference.safetensors: it ends too early", file=sys.stderr)
        sys.exit(1)
    print("logits   %s   9.0 %%  ok (worst 1 for 1 at 1)" % ("4.00e-01" if kind == "logits" else "2.00e-02"))
    print("grad.a   3.00e-01   9.0 %  ok (worst 1 for 1 at 1)\n2 tensors compared: they agree")
if words[1] == "info":
    config = json.load(open(option("--config")))
    state = {"fp32fp32": 16, "remainderfp32": 14, "remainderbf16": 10, "nonebf16": 8}
    weights = 0.43e9 * config["num_hidden_layers"] * state[option("--master-weights") + option("--moments")]
    rows = 1e9 * int(option("--batch")) * (8, 5, 2)[int(option("--recompute"))]
    print(json.dumps({"memory": {"sum": weights + rows}, "flops_per_token": 8000000000}))
def expected(path):
    e = json.load(open(os.path.dirname(path) + "/expected.json"))
    if " * " in kind:
        place, factor = kind.split(" * ")
        *place, last = [int(key) if key.isdigit() else key for key in place.split()]
        parts = [e]
        for key in place:
            parts = [one for part in parts for one in (part if key == "all" else [part[key]])]
        for part in parts:
            for key in range(len(part)) if last == "all" else [last]:
                part[key] = part[key] * float(factor) if factor != "none" else None
    return e
if words[1] == "train" and option("--objective"):
    os.makedirs(option("--out"))
    with open(option("--out") + "/log.jsonl", "w") as log:
        print(json.dumps({"config": {}}), file=log)
        for i, step in enumerate(expected(option("--data"))["steps"][:0 if kind == "short" else None], 1):
            print(json.dumps(dict(step, step=i)), file=log)
elif words[1] == "evaluate":
    first, e = words.index("--tasks") + 1, expected(option("--tasks"))
    files = [os.path.basename(path) for path in words[first:words.index("--perplexity")]]
    run = next(r for r in e["runs"] if r["task_files"] == files and str(r["seq"]) == option("--seq", "None"))
    with open(option("--samples"), "w") as samples:
        for name, task in run["tasks"].items():
            for d in task["documents"][kind == "short":]:
                right = [int(prediction == d["label"]) for prediction in d["predictions"]]
                print(json.dumps(dict(d, task=name, acc=right[0], acc_norm=right[1], acc_bytes=right[2])), file=samples)
    for one in run["perplexity"].values():
        one["perplexity"] = 2.718281828459045 ** one["loss"] * (2 if kind == "exp" else 1)
    tables = {("no " if kind == "name" else "") + name: task["table"] for name, task in run["tasks"].items()}
    json.dump({"tasks": tables, "perplexity": run["perplexity"]}, open(option("--json"), "w"))
elif words[1] == "train":
    steps, out = int(option("--steps")), option("--out")
    if os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    os.makedirs(out, exist_ok=True)
    if option("--trace"):                           # before the log, at whose end it is killed
        events = [{"ph": "X", "name": n, "dur": d} for n, d in (("matmul", 600), ("adamw", 100), ("matmul", 300))]
        with open(option("--trace"), "w") as trace:
            json.dump({"traceEvents": events + [{"ph": "i", "name": "matmul"}]}, trace)
    print("| peak | 989 TFLOP/s |")
    with open(out + "/log.jsonl", "w") as log:
        print(json.dumps({"config": {}}), file=log)
        for i in range(1, min(steps, 10 if not option("--trace") or kind != "short" else 4) + 1):
            one = {"step": i, "ms": time.time(), "tokens_per_s": 1000 * i, "grad_norm": 2.0, "lb_loss": 0.01,
                   "ce_loss": 5 - i / 8, "z_loss": 0.01, "loss": 5 - i / 8 + (0.1 if kind == "differ" and i > 2 else 0)}
            one.update({"mfu": 0.04 * i} if "MFU" in os.environ else {})
            print(json.dumps(one), file=log)
            print("step %d | %d% of peak |" .replace("% of", "%% of") % (i, 10 * i))
        for i in range(11, (steps if steps < 1000 else 0) + 1):
            print(json.dumps(dict(one, step=i, loss=3.0)), file=log)
    if steps == 1000 and kind != "short":
        sys.stdout.flush()
        time.sleep(60)
    step = "%s/step-%08d" % (out, steps)
    os.makedirs(step, exist_ok=True)
    open(step + "/model.safetensors", "w").write(out if kind == "bytes" else "weights")
"""
NVIDIA_SMI = """#!/bin/sh
case "$*" in
  -L) printf 'GPU 0: Card (UUID: a)\\nGPU 1: Card (UUID: b)\\n';;
  *=memory.free*) echo "${FREE:-81000}";;
  *query-gpu*) echo "Card, 999.1, 81559 MiB";;
  *) echo "the whole table";;
esac
"""
NVCC = """#!/bin/sh
echo "SM=$SM $*" >> "$LOG"
case "$*" in
  *--version*) echo "Cuda compilation tools, release 99.1"; exit;;
  *$BROKEN*) echo "no such option" >&2; exit 2;;
esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
cp "$STAND_IN" "$out"
"""
SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
case "$*" in *$BROKEN*) echo "========= Invalid __global__ write of size 4 bytes"; [ -z "$SLOW" ] || exec sleep 60
  echo "========= ERROR SUMMARY: 1 error"; exit 9;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""
MPIRUN = """#!/bin/sh
while [ "$1" != -np ]; do shift; done
shift 2
exec "$@"
"""


class Tree:
    """A folder like the repository's after test-gpu-build, and what comes first on PATH."""
    def __init__(self, folder, monkeypatch):
        self.folder, self.bin, self.report = folder / "tree", folder / "bin", folder / "tree" / "build" / "report.txt"
        self.bin.mkdir()
        (self.folder / "tests").mkdir(parents=True)
        for name in ("Makefile", "configs", "scripts", "cpu", "lib", "olmoe.cu", "test_olmoe.cu", "tests/fixtures"):
            (self.folder / name).symlink_to(ROOT / name)
        self.program(folder / "stand-in", PROGRAM.replace("PYTHON", os.path.realpath(sys.executable)))
        for precision in ("fp32", "bf16"):
            for name in script.PROGRAMS:
                path = self.folder / "build" / f"cuda-{precision}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.program(path, (folder / "stand-in").read_text())
        for name, text in {"nvidia-smi": NVIDIA_SMI, "mpirun": MPIRUN, "compute-sanitizer": SANITIZER}.items():
            self.program(self.bin / name, text)
        self.monkeypatch, self.pids, self.log = monkeypatch, folder / "pids", folder / "log"
        monkeypatch.setattr(script, "ROOT", self.folder)
        monkeypatch.setattr(script, "find_nvcc", lambda: None)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        self.set(PATH=f"{self.bin}:{os.environ['PATH']}", PIDS=self.pids, LOG=self.log, STAND_IN=folder / "stand-in",
                 BROKEN="nothing", FAULTS="{}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    @staticmethod
    def program(path, text):
        path.write_text(text)
        path.chmod(0o755)

    def set(self, **variables):
        for name, value in variables.items():
            self.monkeypatch.setenv(name, str(value))

    def without(self, *bodies):
        """These steps do nothing."""
        for body in bodies:
            self.monkeypatch.setattr(script, body, lambda *_: None)

    def run(self, *words):
        """Exit code and report."""
        code = script.main(["--report", str(self.report), *words])
        return code, self.report.read_text()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    return Tree(tmp_path, monkeypatch)


def outcomes(report):
    """(outcome, step: why) of each step"""
    return re.findall(r"^(passed|FAILED|left out) +[\d.]+ s  (.*)$", report, re.M)


def named(report, outcome):
    return [name for found, name in outcomes(report) if found == outcome]


def test_all_pass(tree, capsys):
    code, report = tree.run()
    assert code == 0 and not named(report, "FAILED") and not named(report, "left out")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == report.splitlines()[-1] == f"{len(outcomes(report))} passed, 0 failed"
    fixtures = sorted(path.parent.name for path in (ROOT / "tests/fixtures").glob("*/reference.safetensors"))
    assert len(fixtures) >= 5 and [name for _, name in outcomes(report)] == [
        "test_olmoe FP32", "test_olmoe BF16", *(f"verify {name} {p}" for p in ("FP32", "BF16") for name in fixtures),
        "20 steps twice FP32", "20 steps twice BF16",
        *(f"--recompute {level} {p}" for p in ("FP32", "BF16") for level in (1, 2)), *CASES,
        *(f"{tool} {p}" for p in ("FP32", "BF16") for tool in ("memcheck", "racecheck", "initcheck")),
        "test_olmoe --ranks FP32", "test_olmoe --ranks BF16",
        *(f"two ranks, --ep {ep} --zero {zero}" for ep in (1, 2) for zero in (0, 1)), "OLMoE-1B-7B, random weights"]
    for words in ("the whole table", "Card, 999.1", "commit ", "nvcc      none", " --rtol 0.5", "date "):
        assert words in report, words
    assert "--without" not in report
    # 81000 MiB: the state at 10 bytes a parameter is the first that fits, with micro-batches of 4, recomputed
    assert ("    16 of 16 layers, micro-batch 4 x 4096, --recompute 2, --master-weights remainder, --moments bf16: plan"
            in report)
    assert "7000 tokens/s, 56 TFLOP/s" in report and "MFU 70 %, of 989 TFLOP/s" in report
    assert re.search(r" 90.00 % +0.900 ms +2 calls  matmul\n +10.00 % +0.100 ms +1 calls  adamw", report)
    assert [path.name for path in tree.report.parent.iterdir() if path.name.startswith("test-gpu")] == []


CASES = [f"{name} {p}" for p in ("FP32", "BF16") for name in (
    "fine-tuning sft-assistant", "fine-tuning dpo-words", "fine-tuning kto-words", "evaluate bytes", "evaluate words")]
# pattern of the command: (what happens there, what is reported)
FAULTS = {
    "fp32/test_olmoe$": ("exit", "test_olmoe FP32: exit code 3, no tally at its end"),
    "bf16/test_olmoe$": ("count", "test_olmoe BF16: exit code 1, 2 passed, 1 failed"),
    "bf16/olmoe verify.*regular": ("logits", "verify regular BF16: logits: more than 0.05 off"),
    "FP32-again": ("exit", "20 steps twice FP32: exit code 3"),
    "BF16-again": ("differ", "20 steps twice BF16: step 3, loss: 4.625 and 4.725"),
    "FP32-1": ("bytes", "--recompute 1 FP32: equal logs, but checkpoints differ: model.safetensors"),
    "fp32/.* sft ": ("exit", "fine-tuning sft-assistant FP32: exit code 3"),
    "fp32/.* kto ": ("short", "fine-tuning kto-words FP32: 1 of 1 values are off, steps: [], expected [1, 2, 3, 4, 5]"),
    "fp32/.*evaluate/words": ("exit", "evaluate words FP32: exit code 3"),
    "bf16/.* dpo ": ("exit", "fine-tuning dpo-words BF16: exit code 3"),
    "bf16/.*evaluate/bytes.* --seq 64 ": ("exit", "evaluate bytes BF16: exit code 3"),
    "bf16.* --ranks": ("count", "test_olmoe --ranks BF16: exit code 1, 2 passed, 1 failed"),
    "ep1-zero1": ("differ", "two ranks, --ep 1 --zero 1: step 3, loss: 4.725, on one rank 4.625"),
    "ep2-zero1": ("exit", "two ranks, --ep 2 --zero 1: exit code 3"),
    "--trace": ("short", "OLMoE-1B-7B, random weights: ended after 4 of 10 steps")}


def test_failures_are_counted_and_named(tree, monkeypatch):
    """Programs that fail, a damaged fixture, runs that differ: the steps after them run all the same."""
    monkeypatch.setattr(script, "find_sanitizer", lambda _: None)
    (tree.folder / "tests/fixtures").unlink()
    for name in ("odd", "regular", "finetune", "evaluate"):
        folder = tree.folder / "tests/fixtures" / name
        shutil.copytree(ROOT / "tests/fixtures" / name, folder)
    os.truncate(tree.folder / "tests/fixtures/odd/reference.safetensors", 500)
    tree.set(FAULTS=json.dumps({pattern: kind for pattern, (kind, _) in FAULTS.items()}))
    code, report = tree.run()
    assert code == 1
    found = [name for name in named(report, "FAILED") if not name.startswith("verify odd")]
    assert found == [name for _, name in FAULTS.values()]
    damaged = [name for name in named(report, "FAILED") if name.startswith("verify odd")]
    assert damaged == [f"verify odd {p}: exit code 1, olmoe: reference.safetensors: it ends too early"
                       for p in ("FP32", "BF16")]
    assert named(report, "left out") == ["compute-sanitizer: not installed"]
    n = len(FAULTS) + 2
    assert report.splitlines()[-1] == f"{len(outcomes(report)) - n - 1} passed, {n} failed, 1 left out"
    assert len(re.findall(r"^FAILED    ", report[report.index("random weights"):], re.M)) == n  # named again at the end
    for line in ("    | the last word", "    | olmoe: reference.safetensors: it ends too early",
                 "    | kernel x: error 3 FAILED", "    $ RANK=0..1 WORLD_SIZE=2 build/cuda-fp32/olmoe train "):
        assert line in report, line


# (pattern of the command, what is changed there, what is reported first): a little more than what is allowed, and then
# a little less, of which nothing is reported
OFF = [
    ("fp32/.* sft ", "steps 1 loss * 1.0000101", "step 2, loss: "),
    ("fp32/.* sft ", "steps 1 loss * 0.9999901", ""),
    ("fp32/.* sft ", "steps all grad_norm * 0.99989", "step 1, grad_norm: "),
    ("fp32/.* sft ", "steps all grad_norm * 0.99991", ""),
    ("fp32/.* sft ", "steps 4 lr * 1.00000001", "step 5, lr: "),
    ("fp32/.* sft ", "steps 4 targets * 1.0125", "step 5, targets: 82.0"),
    ("fp32/.* dpo ", "steps 3 chosen_logp * 1.000011", "step 4, chosen_logp: "),
    ("fp32/.* dpo ", "steps 0 reward_margin * 1.004", "step 1, reward_margin: "),       # 189e-6 * 0.5 = 0.0029 * 0.0325
    ("fp32/.* dpo ", "steps 0 reward_margin * 1.0028", ""),
    ("fp32/.* dpo ", "steps 0 rejected_logp * none", "step 1, rejected_logp: None"),
    ("fp32/.* kto ", "steps 1 kl * 1.002", "step 2, kl: "),                             # 157e-6 = 0.0012 * 0.127
    ("fp32/.* kto ", "steps 1 kl * 1.0012", ""),
    ("bf16/.* sft ", "steps 0 ce_loss * 1.051", "step 1, ce_loss: "),
    ("bf16/.* sft ", "steps 0 grad_norm * 1.51", "step 1, grad_norm: "),
    ("bf16/.* sft ", "steps 1 loss * 2", ""),
    ("bf16/.* dpo ", "steps all rejected_logp * 0.94", "step 1, rejected_logp: "),
    ("bf16/.* dpo ", "steps all grad_norm * nan", "step 1, grad_norm: nan"),
    ("bf16/.* kto ", "steps all targets * 1.1", "step 1, targets: "),
    ("fp32/.*/words.*--seq", "runs 1 tasks mixed documents 4 logprobs 1 * 1.000011", "run 1, mixed "),
    ("fp32/.*/words.*--seq", "runs 1 tasks mixed documents all logprobs all * 1.000009", ""),
    ("fp32/.*/words.*--seq", "runs 1 tasks mixed table acc * 1.00000001", "run 1, mixed, acc: "),
    ("fp32/.*/words.*--seq", "runs 1 tasks mixed table ce_loss * 1.000011", "run 1, mixed, ce_loss: "),
    ("fp32/.*/words.*--seq", "runs 1 perplexity set bits_per_byte * 0.999989", "run 1, set, bits_per_byte: "),
    ("fp32/.*/bytes.*--seq 64", "runs 1 tasks alone documents 0 predictions 0 * 9", "run 1, alone 694, acc: 0"),
    ("fp32/.*/words.*--seq", "runs 1 tasks mixed documents all predictions 2 * 9", "run 1, mixed "),
    ("fp32/.*/bytes.*--seq 64", "runs 1 tasks mixed documents all doc_id * 2", "run 1, mixed, doc_ids: "),
    ("fp32/.*/bytes.*--seq 64", "short", "run 1, alone, doc_ids: []"),
    ("fp32/.*/bytes.*--seq 64", "name", "run 1, names: "),
    ("bf16/.*/bytes.*--seq 64", "exp", "run 1, other, perplexity: "),
    ("bf16/.*/bytes.*--seq 64", "runs 1 perplexity other loss * 1.051", "run 1, other, loss: "),
    ("bf16/.*/bytes.*--seq 64", "runs 1 perplexity other tokens * 2", "run 1, other, tokens: "),
    ("bf16/.*/bytes.*--seq 64", "runs 1 tasks mixed documents 3 bytes 0 * 2", "run 1, mixed "),
    ("bf16/.*/bytes.*--seq 64", "runs 1 tasks mixed documents all logprobs all * 1.05", "error of a token's log p: "),
    ("bf16/.*/bytes.*--seq 64", "runs 1 tasks mixed documents all logprobs all * 1.01", ""),
    ("bf16/.*/bytes.*--seq 64", "runs 1 tasks mixed table acc * none", "run 1, mixed, acc: None"),
]


def test_values_that_are_off(tree):
    """Of fine-tunings and evaluations"""
    session = script.Session(script.parse(["--report", str(tree.report)]))
    session.report, session.folder = open(tree.report, "w"), tree.folder.parent
    for pattern, kind, wrong in OFF:
        tree.set(FAULTS=json.dumps({pattern: kind}))
        body, case = (script.evaluate, re.search("bytes|words", pattern)[0]) if "/.*/" in pattern else (
            script.fine_tuning, next(c for c in script.FINE_TUNED if c[:3] in pattern))
        session.step(kind, body, pattern[:4].upper(), case)
        if not wrong:
            assert session.not_passed == [], kind
            continue
        assert len(session.not_passed) == 1, kind
        assert re.match(r"[1-9]\d* of \d+ values are off, " + re.escape(wrong), session.not_passed.pop()[2]), kind
    assert session.counts["FAILED"] + session.counts["passed"] == len(OFF)
    session.report.close()


def test_cases_that_are_not_there(tree):
    (tree.folder / "tests/fixtures").unlink()
    shutil.copytree(ROOT / "tests/fixtures/odd", tree.folder / "tests/fixtures/odd")
    tree.without("test_olmoe", "verify", "train_twice", "recompute", "sanitize", "test_ranks", "layout", "full_size")
    code, report = tree.run()
    folders = {name: name.replace("fine-tuning ", "finetune/").replace("evaluate ", "evaluate/")[:-5] for name in CASES}
    assert code == 0 and named(report, "left out") == [
        f"{name}: there is no tests/fixtures/{folder}/expected.json" for name, folder in folders.items()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def hangs(tree, body, of, pattern, name):
    """With a command that hangs, in the only body that does something, its step alone has failed; what it has started
    ends too."""
    tree.without(*{"test_olmoe", "verify", "train_twice", "recompute", "fine_tuning", "evaluate", "sanitize",
                   "test_ranks", "layout", "full_size"} - {body})
    tree.monkeypatch.setitem(script.PATIENCE, of, 0.4)
    tree.set(FAULTS=json.dumps({pattern: "hang"}))
    code, report = tree.run()
    assert code == 1 and named(report, "FAILED") == [name + ": it hangs: ended after 0 s"]
    assert "    | it has begun" in report
    assert all(gone(pid) for pid in tree.pids.read_text().split()) and len(tree.pids.read_text().split()) == 2


def test_what_hangs_is_ended(tree):
    hangs(tree, "test_olmoe", "test_olmoe", "fp32/test_olmoe$", "test_olmoe FP32")


@pytest.mark.parametrize("body, of, pattern, name", [
    ("fine_tuning", "train", "bf16/.* dpo ", "fine-tuning dpo-words BF16"),
    ("evaluate", "evaluate", "fp32/.*evaluate/words", "evaluate words FP32")])
def test_cases_that_hang(tree, body, of, pattern, name):
    hangs(tree, body, of, pattern, name)


def test_minutes_are_over(tree):
    """What hangs when the time is over is left out, and so is all after it, by name; it is no failure."""
    tree.set(FAULTS='{"olmoe verify.*odd": "hang"}')
    begun = time.monotonic()
    code, report = tree.run("--minutes", "0.015")
    assert time.monotonic() - begun < 3 and code == 0
    left = named(report, "left out")
    assert re.fullmatch(r"verify odd FP32: not at its end after \d s, when its time was over", left[0]), left
    assert set(re.sub(".*: ", "", name) for name in left[1:]) == {"no time was left"}
    assert left[-1] == "OLMoE-1B-7B, random weights: no time was left" and "memcheck FP32: no time was left" in left
    assert report.splitlines()[-1] == f"{len(outcomes(report)) - len(left)} passed, 0 failed, {len(left)} left out"
    code, report = tree.run("--minutes", "0.00001")
    assert code == 1 and report.splitlines()[-1].startswith("0 passed, 0 failed, ")


def test_interrupted(tree, monkeypatch):
    """Ctrl-C: what was found until then is in the report."""
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "verify", interrupted)
    code, report = tree.run()
    assert code == 130 and named(report, "passed") == ["test_olmoe FP32", "test_olmoe BF16"]
    assert re.search(r"^left out  the rest: Ctrl-C$", report, re.M)
    assert report.splitlines()[-1] == "2 passed, 0 failed, 1 left out"


def test_sanitizers(tree):
    tree.without("test_olmoe", "verify", "train_twice", "recompute", "fine_tuning", "evaluate", "full_size")
    tree.set(BROKEN="racecheck*bf16")
    code, report = tree.run("--gpus", "1")
    assert named(report, "FAILED") == ["racecheck BF16: exit code 9, ========= ERROR SUMMARY: 1 error"]
    assert "    | ========= Invalid __global__ write of size 4 bytes" in report
    assert named(report, "left out") == ["two ranks: 1 GPU here"]
    # One that has reported an error before its time was over has failed; the steps after it still have time.
    tree.set(SLOW="1")
    code, report = tree.run("--gpus", "1", "--minutes", "0.02")
    assert named(report, "FAILED") == ["racecheck BF16: it has reported something, and was not at its end after "
                                       "0 s, when its time was over"], report
    assert "OLMoE-1B-7B, random weights" in named(report, "passed")


def test_nothing_to_test(tree, monkeypatch):
    """One line, and no report."""
    def refused(*words):
        with pytest.raises(SystemExit) as error:
            tree.run(*words)
        assert not tree.report.exists()
        return str(error.value)
    (tree.folder / "build/cuda-bf16/olmoe").unlink()
    assert "no nvcc here and no build/cuda-bf16/olmoe" in refused()
    assert "no models with references in nowhere" in refused("--fixtures", "nowhere", "--programs", "build/cuda-fp32")
    tree.program(tree.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    monkeypatch.setattr(script.glob, "glob", lambda pattern: [])
    assert refused().startswith("test_gpu.py: no NVIDIA device here; ")


def test_free_memory_is_not_known(tree):
    tree.without("test_olmoe", "verify", "train_twice", "recompute", "fine_tuning", "evaluate", "sanitize")
    tree.set(FREE="[N/A]", CUDA_VISIBLE_DEVICES="1")
    code, report = tree.run()
    assert code == 0 and named(report, "left out") == [
        "two ranks: 1 GPU here", "OLMoE-1B-7B, random weights: nvidia-smi does not report the free memory; "
        "scripts/test_gpu.py --memory GB gives it"]
    tree.set(MFU="1")
    code, report = tree.run("--memory", "150")
    assert code == 0 and "GB of 150.00 GB free" in report and "MFU 0.28, of 989 TFLOP/s" in report


def test_choice_of_a_plan():
    def plan(candidate):                    # GB
        layers, masters, moments, batch, level = candidate
        state = {("fp32", "fp32"): 16, ("remainder", "fp32"): 14, ("remainder", "bf16"): 10, ("none", "bf16"): 8}
        return layers / 16 * 6.9 * state[masters, moments] + batch * (4, 2, 1)[level]
    for budget, expected in [(200, (16, "fp32", "fp32", 8, 0)), (130, (16, "fp32", "fp32", 8, 1)),
                             (112, (16, "fp32", "fp32", 1, 2)), (79, (16, "remainder", "bf16", 8, 2)),
                             (57, (16, "none", "bf16", 1, 2)), (40, (8, "remainder", "bf16", 4, 2)),
                             (8, (2, "none", "bf16", 1, 2)), (2, None)]:
        assert script.choose(16, budget, plan) == expected, budget


def test_build(tree, monkeypatch):
    """With nvcc, all four programs are built, once; a build that fails is counted, and what is there is tested."""
    monkeypatch.setattr(script, "find_nvcc", lambda: str(tree.bin / "nvcc"))
    tree.without("verify", "train_twice", "recompute", "fine_tuning", "evaluate", "sanitize", "test_ranks", "layout",
                 "full_size")
    tree.program(tree.bin / "nvcc", NVCC)
    tree.set(NVCC=tree.bin / "nvcc", MPICC="false", SM="90", MAKEFLAGS="-n")        # options of a make that called it
    for precision in ("fp32", "bf16"):
        for name in script.PROGRAMS:
            (tree.folder / f"build/cuda-{precision}" / name).unlink()
    code, report = tree.run()
    assert code == 0, report
    compiled = [line for line in tree.log.read_text().splitlines() if " -o " in line]
    assert len(compiled) == 4 and all("arch=compute_90,code=[compute_90,sm_90]" in line for line in compiled)
    assert sum("PRECISION_BF16" in line for line in compiled) == 2
    assert outcomes(report)[0] == ("passed", "build with nvcc") and "release 99.1" in report and "    SM 90" in report
    code, report = tree.run()               # nothing is built, and the note is about what there is
    assert code == 0 and "    SM 90" in report and tree.log.read_text().count(" -o ") == 4
    tree.set(SM="80")                       # for another GPU all is
    code, report = tree.run()
    assert code == 0 and "    SM 80" in report and tree.log.read_text().count(" -o ") == 8

    (tree.folder / "build/cuda-bf16/test_olmoe").unlink()
    tree.set(BROKEN="bf16/test_olmoe")
    code, report = tree.run()
    assert len([line for line in tree.log.read_text().splitlines() if " -o " in line]) == 9
    assert code == 1 and named(report, "FAILED") == ["build with nvcc: exit code 2"]
    assert "    | no such option" in report and "test_olmoe FP32" in named(report, "passed")
    assert named(report, "left out") == ["test_olmoe BF16: build/cuda-bf16/test_olmoe is not there: it was not built"]


def test_half_built_programs_do_not_stay(tree, monkeypatch):
    """make would take one for built, in the next call."""
    monkeypatch.setattr(script, "find_nvcc", lambda: str(tree.bin / "nvcc"))
    half_built = 'echo half > "$out"; sleep 60 & echo $! >> "$PIDS"; wait'
    tree.program(tree.bin / "nvcc", NVCC.replace('cp "$STAND_IN" "$out"', half_built))
    tree.set(NVCC=tree.bin / "nvcc", MPICC="false", SM="90")
    half = tree.folder / "build/cuda-fp32/olmoe"
    half.unlink()
    code, report = tree.run("--minutes", "0.02")
    assert code == 1 and named(report, "left out")[0].startswith("build with nvcc: not at its end after 1 s")
    assert " -o build/cuda-fp32/olmoe" in tree.log.read_text() and not half.exists()
    assert all(gone(pid) for pid in tree.pids.read_text().split())


def test_make_passes_minutes():
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for words, minutes in ([], "10"), (["MINUTES=1"], "1"):
        made = subprocess.run(["make", "-n", "DEVICE=cpu", "test-gpu", *words], cwd=ROOT, env=clean, check=True,
                              capture_output=True, text=True)
        assert made.stdout.splitlines()[-1].endswith(f"scripts/test_gpu.py --minutes {minutes}")
