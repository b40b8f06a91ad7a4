"""scripts/olmoe_anneal.sh: the recipe of OLMoE's annealing as a command, on any number of GPUs, and what is refused;
with a stand-in for the program. One test trains on a mix, with OLMOE (default ./olmoe).
"""
import json
import random
import struct
import subprocess
import sys

import pytest

from test_instruct_script import LAUNCH, PROGRAM, ROOT, Place, number


class Anneal(Place):
    script = "olmoe_anneal.sh"

    def tokens(self, name, values):
        (self.here / name).write_bytes(struct.pack(f"<{len(values)}H", *values))
        return values


@pytest.fixture
def place(tmp_path):
    place = Anneal(tmp_path)
    for name in ("a.npy", "b.npy", "odd:name 2.npy"):
        place.tokens(name, [1, 2, 3])
    return place


BASE = ("--model", "base", "--out", "out")
MIX = (*BASE, "--data", "a.npy", "b.npy:2", "odd:name 2.npy", "a.npy:0.5")


@pytest.mark.parametrize("gpus, layout, without", [
    (1, {"--master-weights": ["remainder"], "--moments": ["bf16"], "--recompute": ["2"]}, ["--zero", "--ep"]),
    (2, {"--master-weights": ["remainder"], "--recompute": ["2"], "--zero": ["1"]}, ["--moments", "--ep"]),
    (8, {"--recompute": ["1"], "--zero": ["1"]}, ["--master-weights", "--moments", "--ep"]),
    (256, {"--recompute": ["1"], "--zero": ["1"], "--ep": ["8"]}, ["--master-weights", "--moments"])],
    ids=[1, 2, 8, 256])
def test_recipe(place, gpus, layout, without):
    """Spec 5.4 and 5.5, the same step on any number of GPUs; a dry run makes nothing."""
    ((launch, found),), _ = place.commands(*MIX, "--gpus", gpus)
    assert found["--schedule"] == ["anneal"] and number(found, "--lr") == 4e-5 and found["--steps"] == ["23842"]
    assert "--warmup" not in found and "--min-lr" not in found and "--decay-steps" not in found
    assert found["--seed"] == ["42"] and found["--order"] == ["global"] and "--no-filter" not in found
    assert found["--seq"] == ["4096"] and found["--global-batch"] == ["1024"] and found["--batch"] == ["4"]
    assert 1024 % (4 * gpus) == 0
    adamw = {"--beta1": 0.9, "--beta2": 0.95, "--eps": 1e-8, "--weight-decay": 0.1, "--grad-clip": 1}
    losses = {"--lb-coef": 0.01, "--z-coef": 0.001}
    assert all(number(found, name) == value for name, value in {**adamw, **losses}.items())
    assert found["--lb"] == ["rank"] and found["--ce-divisor"] == ["all"] and found["--resume"] == []
    assert layout.items() <= found.items() and not set(without) & set(found)
    assert found["--model"] == ["base"] and found["--out"] == ["out"]
    assert found["--data"] == ["a.npy", "b.npy:2", "odd:name 2.npy", "a.npy:0.5"]
    assert launch[-1].endswith("launch_node.sh" if gpus > 1 else "train") and (f"RANKS={gpus}" in launch) == (gpus > 1)
    assert not (place.here / "out").exists() and place.calls() == []


def test_plan(place):
    """The hours of all steps, and a GPU's memory, by info of the same layout; on one GPU info says no time."""
    plan = "print('| memory: sum             | 57.66 GB                                             |')\n    "
    time = "print('| time: step (estimate)   | 10375.96 ms, 50.53 k tokens/s a GPU, 404.2 k in all |')\n    "
    program = place.folder / "olmoe"
    text = program.read_text()
    begin, end = text.index('print("| memory'), text.index("sys.exit()")
    program.write_text(text[:begin] + plan + time + text[end:])
    _, remarks = place.commands(*MIX, "--gpus", 8)
    assert remarks == ["# anneal: 23842 steps of 4,194,304 tokens; about 68.7 h, and 57.66 GB a GPU, by olmoe info"]
    info, = place.calls("info")
    assert info["--gpus"] == ["8"] and info["--zero"] == ["1"] and info["--recompute"] == ["1"]
    assert info["--model"] == ["base"] and info["--batch"] == ["4"] and info["--global-batch"] == ["1024"]
    _, remarks = place.commands(*MIX, "--gpus", 8, "--steps", 1000)
    assert remarks == ["# anneal: 1000 steps of 4,194,304 tokens; about 2.88 h, and 57.66 GB a GPU, by olmoe info"]
    program.write_text(text[:begin] + plan + text[end:])
    assert place.commands(*MIX, "--gpus", 1)[1][0].endswith("; about 57.66 GB a GPU, by olmoe info")
    program.write_text(text[:begin] + "sys.exit(1)\n    " + text[end:])
    assert place.commands(*MIX, "--gpus", 1)[1][0].endswith("; olmoe info has no plan for it")


def test_running_and_again(place):
    """The command that runs is that of --dry-run; options after -- come last. What is done is not done again."""
    words = (*MIX, "--gpus", 1, "--steps", 30, "--", "--seed", 7, "--keep-last", 1)
    planned, _ = place.commands(*words)
    assert "# anneal is done" not in place.run(*words)
    assert place.calls() == [found for _, found in planned] and planned[0][1]["--seed"] == ["7"]
    assert (place.here / "out/step-00000030").is_dir()
    assert place.run(*words).splitlines()[-1] == "# anneal is done: out/step-00000030" and place.calls() == []
    (place.folder / "stop").write_text("3")
    process = place.start(*BASE, "--data", "a.npy", "--out", "other", "--gpus", 1)
    assert process.wait(60) == 3


def test_launching(place):
    place.run(*MIX, "--gpus", 8)
    assert "-np 8 " in place.launched.read_text()
    place.launched.unlink()
    (place.here / "hosts").write_text("a slots=8\nb slots=8\n")
    place.run(*MIX, "--out", "two", "--gpus", 16, "--hosts", "hosts")
    assert place.launched.read_text().startswith("mpirun") and "--hostfile hosts " in place.launched.read_text()
    place.launched.unlink()
    place.program(place.bin / "srun", "#!/bin/sh\n[ \"$1\" != --mpi=list ] || { echo pmix; exit; }\n"
                  + LAUNCH.split("\n", 1)[1])
    place.run(*MIX, "--out", "three", SLURM_JOB_ID="7", SLURM_NTASKS="32", SLURM_JOB_NODELIST="n1")
    assert place.launched.read_text().startswith("srun")
    assert [call["--out"] for call in place.calls()] == [["out"], ["two"], ["three"]]


def log_of(out):
    """The configuration, and the steps"""
    first, *more = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return first["config"], [line for line in more if "step" in line]


def test_with_the_program(place):
    """At toy scale, on a mix: the learning rates of spec 5.4 to all digits of the log, stopped and resumed; the data
    counted as asked; the same on data that are written out."""
    shape = {"model_type": "olmoe", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2,
             "vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 256, "pad_token_id": 1}
    (place.here / "shape.json").write_text(json.dumps(shape))
    subprocess.run([sys.executable, ROOT / "scripts/make_random_model.py", "--out", "model", "--config", "shape.json"],
                   cwd=place.here, check=True, capture_output=True)
    (place.folder / "olmoe").unlink()
    (place.folder / "olmoe").symlink_to(PROGRAM)
    draw = random.Random(5)
    a, b = (place.tokens(name, [draw.randrange(300) for _ in range(n)]) for name, n in (("a.npy", 45), ("b.npy", 65)))
    place.tokens("whole.npy", a[:44] + 2 * b[:64] + b[:32])                 # 11 + 2 x 16 + 8 sequences of 4
    toy = ("--seq", 4, "--global-batch", 16, "--peak-tflops", 1, "--decay-steps", 23842, "--master-weights", "fp32",
           "--moments", "fp32")
    model, one = ("--model", "model"), ("--gpus", 1)
    mix = (*model, "--data", "a.npy", "b.npy:2.5", *one, "--out")
    assert ", and " in place.run(*model, "--data", "a.npy", "--out", "out", "--gpus", 8, "--dry-run").splitlines()[0]
    place.run(*mix, "out", "--steps", 2, "--", *toy)
    said = place.run(*mix, "out", "--steps", 5, "--", *toy)
    assert "51 sequences of 4" in said and "resumed from out/step-00000002" in said
    config, steps = log_of(place.here / "out")
    assert [step["lr"] for step in steps] == [float(f"{4e-5 * (1 - s / 23842):.9g}") for s in range(1, 6)]
    assert config["seed"] == 42 and config["order"] == "global" and config["repetition_filter"]
    assert config["adamw"] == {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1,
                               "master_weights": "fp32", "moments": "fp32"}
    assert config["losses"] == {"lb_coef": 0.01, "z_coef": 0.001, "ce_divisor": "all"}
    place.run(*model, "--data", "whole.npy", *one, "--out", "written", "--steps", 5, "--", *toy)
    assert [step["loss"] for step in log_of(place.here / "written")[1]] == [step["loss"] for step in steps]
    trainer = json.loads((place.here / "out/step-00000005/trainer_state.json").read_text())["trainer"]
    assert trainer["epoch"] == 1 and trainer["position"] == 32              # 3 steps an epoch
    # a checkpoint as the model: the trainer begins anew
    place.run("--model", "out/step-00000005", "--data", "a.npy", *one, "--out", "next", "--steps", 1, "--", *toy,
              "--global-batch", 8)
    assert [step["step"] for step in log_of(place.here / "next")[1]] == [1]


@pytest.mark.parametrize("words, line", [
    ([], "--model DIR and --out OUT are needed"), (["--model", "base", "--data", "a.npy"], "--out OUT are needed"),
    (["--model"], "--model needs a value"), (BASE, "no data: give --data FILES of tokens"),
    ([*BASE, "--data"], "no data: give --data FILES of tokens"), ([*BASE, "--sft", "x"], "'--sft' is no option"),
    ([*BASE, "--data", "none.npy"], "none.npy cannot be read"),
    ([*BASE, "--data", "none.npy:2"], "none.npy:2 cannot be read"),
    ([*MIX, "--gpus", "3"], "--gpus 3: "), ([*MIX, "--gpus", "512"], "--gpus 512: "),
    ([*MIX, "--gpus", "x"], "--gpus x: "), (MIX, "no GPU found"), ([*MIX, "--steps", "0"], "--steps 0: not a number"),
    ([*MIX, "--steps", "1e3"], "--steps 1e3: not a number"), ([*MIX, "--steps", ""], "--steps : not a number"),
    (["--model", "none", "--out", "out", "--data", "a.npy"], "none holds no model"),
    ([*MIX, "--gpus", 2, "--hosts", "no hosts"], "no hosts cannot be read")],
    ids=lambda x: None if isinstance(x, list | tuple) else x.split(":")[0][:20])
def test_refused(place, words, line):
    place.program(place.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert line in place.run(*words, code=1)
    assert place.calls() == [] and not (place.here / "out").exists()


def test_the_program_is_missing(place):
    (place.folder / "olmoe").unlink()
    assert "make PRECISION=BF16 builds it" in place.run(*MIX, code=1)


def test_help(place):
    text = place.run("--help")
    assert "--steps S" in text and "reset_optimizer_state" in text and "set -euo" not in text and "#" not in text
