"""scripts/olmoe_instruct.sh: the released recipe as commands, their order, what an interruption leaves, and what is
refused; with stand-ins for the program, mpirun and Slurm. One test trains, with OLMOE (default ./olmoe).
"""
import gzip
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))

# A program that writes down its arguments. Training makes the last step's checkpoint, unless a file `stop` is beside
# it: then it ends with the code in that file. With `wait` it goes on until SIGTERM, and ends with 0. `info` plans the
# same for all.
OLMOE = """#!{python}
import json, os, signal, sys, time
here, words = os.path.dirname(os.path.abspath(__file__)), sys.argv[1:]
with open(here + "/log", "a") as f:
    f.write(json.dumps(words) + "\\n")
if words[0] == "info":
    print("| memory: sum             | 73.07 GB                                                  |")
    print("| time: step of rows      | 0.6318 s: 32 rows of 1000 tokens in the mean at 1 TFLOP/s |")
    print("| time: run               | 1h06m: 5709 steps, 3 epochs of 60917 rows                 |")
    sys.exit()
def option(name):
    return words[len(words) - 1 - words[::-1].index(name) + 1]
if os.path.exists(here + "/wait"):
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    open(here + "/waits", "w").close()
    for _ in range(6000):
        ended or time.sleep(0.01)
elif os.path.exists(here + "/stop"):
    sys.exit(int(open(here + "/stop").read()))
else:
    os.path.isdir(option("--out")) or os.mkdir(option("--out"))
    os.mkdir("%s/step-%08d" % (option("--out"), int(option("--steps"))))
"""
# mpirun and srun that run the program once
LAUNCH = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LAUNCHED"
while [ $# -gt 0 ]; do case $1 in */olmoe) exec "$@";; esac; shift; done
"""


class Place:
    """A copy of the scripts with a stand-in of the program, a model, and rows of each kind"""

    script = "olmoe_instruct.sh"

    def __init__(self, folder):
        self.folder, self.here = folder / "tree", folder / "my work"
        shutil.copytree(ROOT / "scripts", self.folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        self.here.mkdir()
        (self.here / "base").mkdir()
        (self.here / "base/config.json").write_text("{}")
        self.launched, self.bin = folder / "launched", folder / "bin"
        self.bin.mkdir()
        self.program(self.folder / "olmoe", OLMOE.replace("{python}", sys.executable))
        for name in ("mpirun", "srun"):
            self.program(self.bin / name, LAUNCH)
        self.rows("sft.jsonl", 300)
        self.rows("pairs.jsonl.gz", 70)
        self.rows("judged.jsonl", 100)

    def program(self, path, text):
        path.write_text(text)
        path.chmod(0o755)

    def rows(self, name, n, size=100):
        """So many lines of so many bytes. The stand-in does not look into them."""
        text = (b"x" * (size - 1) + b"\n") * n
        (self.here / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)

    def start(self, *words, **environment):
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM") and key != "RANKS"}
        kept.update(PATH=f"{self.bin}:{os.environ['PATH']}", LAUNCHED=str(self.launched), **environment)
        return subprocess.Popen([self.folder / "scripts" / self.script, *map(str, words)], cwd=self.here, env=kept,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *words, code=0, **environment):
        process = self.start(*words, **environment)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == code, out + errors
        assert len(errors.splitlines()) == (code != 0), errors
        return out if code == 0 else errors

    def calls(self, command="train"):
        """What the program was called with, since the last time that this was asked."""
        log = self.folder / "log"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return [options(words[1:]) for words in calls if words[0] == command]

    def commands(self, *words, **environment):
        """Those of --dry-run: (words before the options, options), and its remarks"""
        lines = self.run("--dry-run", *words, **environment).splitlines()
        split = [shlex.split(line) for line in lines if not line.startswith("#")]
        first = [next(i for i, word in enumerate(words) if word.startswith("--")) for words in split]
        return ([(words[:i], options(words[i:])) for words, i in zip(split, first)],
                [line for line in lines if line.startswith("#")])


def options(words):
    """{option: its values}; of one that is given again, the last"""
    found, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = []
        else:
            found[name].append(word)
    return found


def number(found, name):
    value, = found[name]
    return float(value)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


BASE = ("--model", "base", "--out", "out")
ALL = (*BASE, "--sft", "sft.jsonl", "--dpo", "pairs.jsonl.gz")
KTO = (*BASE, "--kto", "judged.jsonl")
SMALL = {"--master-weights": ["remainder"], "--moments": ["bf16"]}


# ------------------------------------------------------------------------------------------------
# The recipe

def test_released_schedule(place):
    """The ticks of the released runs' schedulers, 32 a step: their logs' learning rates follow from them."""
    ((_, sft), (_, dpo)), _ = place.commands(*ALL, "--gpus", 8, "--released-schedule")
    assert sft["--steps"] == ["9500"] and dpo["--steps"] == ["5712"]
    for found, ticks, share in ((sft, 303976, "0.03"), (dpo, 182751, "0.1")):
        assert Fraction(found["--decay-steps"][0]) == Fraction(ticks, 32)
        assert Fraction(found["--warmup"][0]) == Fraction(int(Fraction(share) * ticks), 32)
    # spec: the rates of the logs. Update s + 1 has the rate that was printed after step s.
    rate = number(sft, "--lr") * 1 / number(sft, "--warmup")
    assert rate == pytest.approx(7.018313e-8, rel=1e-6)
    left = (number(sft, "--decay-steps") - 9000) / (number(sft, "--decay-steps") - number(sft, "--warmup"))
    rate = number(sft, "--lr") * left
    assert rate == pytest.approx(1.0836439e-6, rel=1e-6)
    assert number(dpo, "--lr") / number(dpo, "--warmup") == pytest.approx(8.75513e-10, rel=1e-6)


@pytest.mark.parametrize("gpus, batches, layout, without", [
    (1, (1, 1, 1), {**SMALL, "--recompute": ["2"]}, ["--zero", "--ep"]),
    (4, (1, 1, 1), {**SMALL, "--recompute": ["2"], "--zero": ["1"]}, ["--ep"]),
    (8, (2, 1, 4), {"--recompute": ["1"], "--zero": ["1"]}, ["--ep", "--moments"]),
    (32, (2, 1, 1), {"--recompute": ["1"], "--zero": ["1"], "--ep": ["8"]}, ["--moments"])], ids=[1, 4, 8, 32])
def test_recipe(place, gpus, batches, layout, without):
    """The same steps on any number of GPUs, by the micro-batches of the released commands where they have room."""
    both, _ = place.commands(*ALL, "--gpus", gpus)
    alone, _ = place.commands(*KTO, "--gpus", gpus)
    sft, dpo, kto = (found for _, found in both + alone)
    for found, batch, rows in zip((sft, dpo, kto), batches, (128, 32, 32)):
        assert found["--global-batch"] == [str(rows)] and found["--batch"] == [str(batch)]
        assert rows % (batch * gpus) == 0
        assert found["--seq"] == ["4096"] and found["--schedule"] == ["hf-linear"] and found["--resume"] == []
        assert layout.items() <= found.items() and not set(without) & set(found)
    assert sft["--objective"] == ["sft"] and number(sft, "--lr") == 2e-5 and sft["--ce-divisor"] == ["64"]
    assert dpo["--objective"] == ["dpo"] and number(dpo, "--lr") == 5e-7 and number(dpo, "--beta") == 0.1
    assert kto["--objective"] == ["kto"] and number(kto, "--lr") == 5e-7 and number(kto, "--beta") == 0.1
    assert sft["--label-mask"] == dpo["--label-mask"] == ["olmoe"] and "--label-mask" not in kto    # that is trl's
    assert kto["--optimizer"] == ["rmsprop"] and "--optimizer" not in sft and "--optimizer" not in dpo
    # 300 conversations: 2 epochs of 2 steps, 70 pairs 3 of 2, 100 rows 3 of 3, whose schedule counts a 4th
    assert [found["--steps"] for found in (sft, dpo, kto)] == [["4"], ["6"], ["9"]]
    assert [number(found, "--decay-steps") for found in (sft, dpo, kto)] == [4, 6, 12]
    assert [number(found, "--warmup") for found in (sft, dpo, kto)] == pytest.approx([0.03 * 4, 0.1 * 6, 0])
    assert sft["--model"] == kto["--model"] == ["base"] and dpo["--model"] == ["out/sft/step-00000004"]
    assert sft["--data"] == ["sft.jsonl"] and dpo["--data"] == ["pairs.jsonl.gz"] and dpo["--out"] == ["out/dpo"]
    assert not (place.here / "out").exists() and place.calls() == []


def test_kto_ends_at_step_5000(place):
    place.rows("judged.jsonl", 61135 * 2, 4)
    ((_, kto),), _ = place.commands(*KTO, "--gpus", 8)
    assert kto["--steps"] == ["5000"] and number(kto, "--decay-steps") == 3 * 3821 and number(kto, "--warmup") == 0


def test_plan(place):
    """What info expects of so many rows of their mean length at four bytes a token; of a pair's side, half."""
    place.rows("sft.jsonl", 300, 4001)
    place.rows("pairs.jsonl.gz", 70, 800)
    _, remarks = place.commands(*ALL, "--gpus", 8)
    plan = "about 1h06m, and 73.07 GB a GPU, with rows of {} tokens by olmoe info"
    assert remarks == [f"# sft: 300 rows, 4 steps; {plan.format(1001)}",
                       f"# dpo: 70 rows, 6 steps; {plan.format(101)}"]
    sft, dpo = place.calls("info")
    for found, objective, length, rows, step in ((sft, "sft", "1001", "300", "128"), (dpo, "dpo", "101", "70", "32")):
        assert found["--objective"] == [objective] and found["--mean-length"] == [length] and found["--rows"] == [rows]
        assert found["--global-batch"] == [step] and found["--gpus"] == ["8"] and found["--zero"] == ["1"]
        assert found["--model"] == ["base"] and found["--seq"] == ["4096"]
    assert number(sft, "--epochs") == 2 and number(dpo, "--epochs") == 3
    place.rows("judged.jsonl", 61135 * 2, 4)
    place.commands(*KTO, "--gpus", 1)
    kto, = place.calls("info")
    assert number(kto, "--epochs") == pytest.approx(5000 / 3820, rel=1e-4) and kto["--recompute"] == ["2"]


# ------------------------------------------------------------------------------------------------
# Running it

def test_in_order_and_again(place):
    """DPO begins with what SFT made. What is done is not done again. The commands of --dry-run are those that run."""
    place.rows("more rows.jsonl", 200)
    words = (*BASE, "--sft", "sft.jsonl", "more rows.jsonl", "--dpo", "pairs.jsonl.gz", "--gpus", 1)
    planned, _ = place.commands(*words, "--", "--seed", 7, "--batch", 2)
    place.calls()
    assert "# done: out/dpo/step-00000006" in place.run(*words, "--", "--seed", 7, "--batch", 2)
    calls = place.calls()
    assert calls == [found for _, found in planned] and [found["--seed"] for found in calls] == [["7"], ["7"]]
    assert calls[0]["--data"] == ["sft.jsonl", "more rows.jsonl"] and calls[0]["--batch"] == ["2"]
    assert calls[1]["--model"] == ["out/sft/step-00000006"] and (place.here / calls[1]["--model"][0]).is_dir()
    lines = place.run(*words).splitlines()
    assert "# sft is done: out/sft/step-00000006" in lines and "# dpo is done: out/dpo/step-00000006" in lines
    assert place.calls() == []


def test_stopped_and_failed(place):
    """A run that ends before its last step is not followed by the next; its exit code is the script's."""
    (place.folder / "stop").write_text("0")
    assert "sft was stopped before step 4; the same command goes on" in place.run(*ALL, "--gpus", 1)
    assert len(place.calls()) == 1
    (place.folder / "stop").write_text("3")
    process = place.start(*ALL, "--gpus", 1)
    assert process.wait(60) == 3 and len(place.calls()) == 1
    (place.folder / "stop").unlink()
    place.run(*ALL, "--gpus", 1)
    assert [found["--objective"] for found in place.calls()] == [["sft"], ["dpo"]]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_signal_saves(place, which, gpus):
    (place.folder / "wait").touch()
    (place.bin / "mpirun").write_text(LAUNCH.replace("exec", "trap 'kill -TERM $!' USR1; ").replace(
        '"$@";;', '"$@" & wait; wait; exit 0;;'))
    process = place.start(*ALL, "--gpus", gpus)
    until = time.time() + 60
    while not (place.folder / "waits").exists():
        assert time.time() < until and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(which)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors, out + errors
    assert out.splitlines()[-1] == "# sft was stopped before step 4; the same command goes on"
    assert len(place.calls()) == 1


def test_launching(place):
    """By mpirun on one machine and on several, and by srun in a job."""
    place.run(*ALL, "--gpus", 8)
    assert [line.split()[0] for line in place.launched.read_text().splitlines()] == ["mpirun", "mpirun"]
    assert "-np 8 " in place.launched.read_text()
    place.launched.unlink()
    (place.here / "hosts").write_text("a slots=8\nb slots=8\n")
    shutil.rmtree(place.here / "out")
    place.run(*ALL, "--gpus", 16, "--hosts", "hosts")
    assert place.launched.read_text().count("--hostfile hosts ") == 2
    place.launched.unlink()
    shutil.rmtree(place.here / "out")
    place.program(place.bin / "srun", "#!/bin/sh\n[ \"$1\" != --mpi=list ] || { echo pmix; exit; }\n"
                  + LAUNCH.split("\n", 1)[1])
    place.calls()
    place.run(*ALL, SLURM_JOB_ID="7", SLURM_NTASKS="32", SLURM_JOB_NODELIST="n1")
    assert [line.split()[0] for line in place.launched.read_text().splitlines()] == ["srun", "srun"]
    sft, dpo = place.calls()
    assert sft["--ep"] == ["8"] and sft["--resume"] == dpo["--resume"] == []


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def log_of(out):
    first, *steps = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return first["config"], steps


def test_with_the_program(place):
    """All three at toy scale: each takes the one before's result, by its recipe."""
    def said(role, content):
        return {"role": role, "content": content}

    chats = [[said("user", f"{i} + 1"), said("assistant", str(i + 1))] for i in range(130)]
    write_rows(place.here / "sft.jsonl", [{"messages": chat} for chat in chats])
    wrong = [[question, said("assistant", "no")] for question, _ in chats]
    write_rows(place.here / "pairs.jsonl", [{"chosen": a, "rejected": b} for a, b in zip(chats[:40], wrong)])
    write_rows(place.here / "judged.jsonl", [{"prompt": f"<|user|>\n{i}\n<|assistant|>\n", "completion": "yes",
                                              "label": i % 3 == 0} for i in range(40)])
    shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 320,
             "max_position_embeddings": 64, "eos_token_id": 256, "pad_token_id": 1}
    (place.here / "shape.json").write_text(json.dumps(shape))
    random_model = [sys.executable, ROOT / "scripts/make_random_model.py", "--out", "model", "--config", "shape.json"]
    subprocess.run(random_model, cwd=place.here, check=True, capture_output=True)
    (place.folder / "olmoe").unlink()
    (place.folder / "olmoe").symlink_to(PROGRAM)
    _, remarks = place.commands("--model", "model", "--out", "out", "--sft", "sft.jsonl", "--dpo", "pairs.jsonl",
                                "--gpus", 8)
    assert all(re.search(r" steps; about \d\S*[hms]\S*, and [\d.]+ [kMG]?B a GPU, ", line) for line in remarks), remarks
    more = ("--gpus", 1, "--", "--tokenizer", "bytes", "--seq", 64, "--master-weights", "fp32", "--moments", "fp32",
            "--peak-tflops", 1)
    place.run("--model", "model", "--out", "out", "--sft", "sft.jsonl", "--dpo", "pairs.jsonl", *more)
    place.run("--model", "out/sft/step-00000002", "--out", "out", "--kto", "judged.jsonl", *more)

    sft, dpo, kto = (log_of(place.here / "out" / name) for name in ("sft", "dpo", "kto"))
    for (config, steps), rows, n in zip((sft, dpo, kto), (128, 32, 32), (2, 3, 3)):
        assert config["global_batch"] == rows and len(steps) == n
        assert config["adamw"]["beta2"] == 0.999 and config["adamw"]["weight_decay"] == 0
        assert config["adamw"]["grad_clip"] == 1 and config["losses"]["lb_coef"] == config["losses"]["z_coef"] == 0
    assert [config["label_mask"] for config, _ in (sft, dpo, kto)] == ["olmoe", "olmoe", "assistant"]
    # the released SFT's loss is the sum over targets / 64
    assert all(step["loss"] == pytest.approx(step["ce_loss"] * step["targets"] / 64, rel=1e-6) for step in sft[1])
    assert [step["lr"] for step in sft[1]] == pytest.approx([0, 2e-5 * (2 - 1) / (2 - 0.06)], rel=1e-6)
    assert [step["lr"] for step in dpo[1]] == pytest.approx([0, 5e-7 * 2 / 2.7, 5e-7 * 1 / 2.7], rel=1e-6)
    # 40 rows are 2 of transformers' steps, and 6 in 3 epochs
    assert [step["lr"] for step in kto[1]] == pytest.approx([5e-7, 5e-7 * 5 / 6, 5e-7 * 4 / 6], rel=1e-6)
    assert [step["loss"] for step in dpo[1][:2]] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert kto[1][0]["loss"] == pytest.approx(0.5, abs=1e-6) and kto[1][0]["kl"] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------
# Refused, with one line

@pytest.mark.parametrize("words, line", [
    ([], "--model DIR and --out OUT are needed"), (["--model", "base", "--sft", "sft.jsonl"], "--out OUT are needed"),
    (["--model"], "--model needs a value"), (BASE, "no rows: give --sft"), ([*BASE, "--sft"], "--sft needs files"),
    ([*BASE, "--sft", "none.jsonl"], "none.jsonl cannot be read"), ([*BASE, "--kt", "x"], "'--kt' is no option"),
    ([*KTO, "--dpo", "pairs.jsonl.gz"], "give one of them"), ([*ALL, "--gpus", "3"], "--gpus 3: "),
    ([*ALL, "--gpus", "64"], "--gpus 64: "), ([*ALL, "--gpus", "x"], "--gpus x: "), (ALL, "no GPU found"),
    (["--model", "none", "--out", "out", "--sft", "sft.jsonl"], "none holds no model"),
    ([*BASE, "--sft", "judged.jsonl", "--gpus", 1], "sft: 100 rows are fewer than the 128 of a step"),
    ([*BASE, "--dpo", "cut.jsonl.gz", "--gpus", 1], "cut.jsonl.gz is damaged"),
    ([*BASE, "--sft", "sft.jsonl", "--gpus", 2, "--hosts", "no hosts"], "no hosts cannot be read"),
], ids=lambda x: None if isinstance(x, list | tuple) else x.split(":")[0][:20])
def test_refused(place, words, line):
    place.program(place.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    (place.here / "cut.jsonl.gz").write_bytes((place.here / "pairs.jsonl.gz").read_bytes()[:-9])
    assert line in place.run(*words, code=1)
    assert place.calls() == [] and not (place.here / "out").exists()


def test_the_program_is_missing(place):
    (place.folder / "olmoe").unlink()
    assert "make PRECISION=BF16 builds it" in place.run(*ALL, code=1)


def test_help(place):
    """It ends where the comment does."""
    text = place.run("--help")
    assert "--released-schedule" in text and "trl 0.9.6" in text and "set -euo" not in text and "#" not in text
