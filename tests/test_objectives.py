"""Fine-tuning by rows: every logged field of SFT, DPO and KTO against tests/fixtures/finetune, which PyTorch computed
in float64 (scripts/reference_finetune.py); on other micro-batches and other ranks the same; the published learning
rates; resuming.

The program is ./olmoe, or what OLMOE names.
"""
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
FIXTURES = ROOT / "tests/fixtures/finetune"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))

# Of a value; of a norm, which is a root of a sum over all gradients; and of the log-probabilities, for what is a
# difference of them: 16 roundings of fp32.
RELATIVE, RELATIVE_NORM, OF_DIFFERENCES, NINE_DIGITS = 1e-5, 1e-4, 1e-6, 5e-9
DIFFERENCES = {"reward_margin", "kl", "chosen_reward", "rejected_reward"}
EXACT = {"targets"}
PRINTED = {"lr", "reward_accuracy"}         # exact but for the nine digits of log.jsonl


def expected(case):
    return json.loads((FIXTURES / case / "expected.json").read_text())


def option(args, name, default=None):
    return args[args.index(name) + 1] if name in args else default


def has_auxiliary(case):
    return any(float(option(expected(case)["args"], name, 0)) for name in ("--lb-coef", "--z-coef"))


def words(case, out, *more):
    """The command of a case. Given twice, an option's last value counts."""
    e = expected(case)
    named = ["--model", FIXTURES / case / e["model"], "--data", *(FIXTURES / case / name for name in e["data"]),
             "--tokenizer", e["tokenizer"] if e["tokenizer"] == "bytes" else ROOT / e["tokenizer"]]
    if e["reference"]:
        named += ["--reference", FIXTURES / case / e["reference"]]
    return list(map(str, ["train", *named, "--out", out, *e["args"], "--peak-tflops", 1, *more]))


def run(command, ranks=1, threads=None):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    threads = threads or max(1, (os.cpu_count() or 1) // ranks)
    done = subprocess.run([*launcher, OLMOE, *command], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def log(out):
    return list(map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()))


def steps_of(out):
    return [line for line in log(out) if "step" in line]


def tolerance(field, wanted, beta, largest):
    if field in EXACT:
        return 0
    if field in PRINTED:
        return NINE_DIGITS * wanted
    allowed = (RELATIVE_NORM if field == "grad_norm" else RELATIVE) * abs(wanted)
    if field in DIFFERENCES:
        allowed += OF_DIFFERENCES * largest * (1 if field == "kl" else beta)
    return allowed


def compare(case, out):
    """All fields of all steps; prints how much of each tolerance is used."""
    e, found = expected(case), steps_of(out)
    beta = float(option(e["args"], "--beta", 0.1))
    assert [line["step"] for line in found] == list(range(1, len(e["steps"]) + 1))
    wrong = []
    for line, wanted_line in zip(found, e["steps"]):
        for field, wanted in wanted_line.items():
            got = line.get(field, "missing")
            if wanted is None or got in (None, "missing"):
                right, used = got is None and wanted is None and field in line, 0
            else:
                allowed = tolerance(field, wanted, beta, e["log_probability"])
                right = abs(got - wanted) <= allowed
                used = abs(got - wanted) / allowed if allowed else 0
            text = f"step {line['step']} {field:16} {got!s:24} for {wanted!s:24} {100 * used:6.1f} %"
            print(text)
            if not right:
                wrong.append(text)
    assert not wrong, "\n".join([case, *wrong])


@pytest.mark.parametrize("case", CASES)
def test_reference(case, tmp_path):
    e = expected(case)
    said = run(words(case, tmp_path))
    first = log(tmp_path)[0]
    assert "step" not in first and first.get("dropped_rows") == e["dropped_rows"]
    assert f"dropped {e['dropped_rows']} rows" in said
    assert (f"left out {e['left_out']} bad rows" in said) == (e["left_out"] > 0)
    compare(case, tmp_path)


def other_layouts():
    """(case, ranks, options): what must not change a result. Auxiliary losses are means over micro-batches, and so they
    do depend on these."""
    for case in CASES:
        if has_auxiliary(case):
            continue
        G, B = (int(option(expected(case)["args"], name)) for name in ("--global-batch", "--batch"))
        for batch in (1, 3, G):
            if G % batch == 0 and batch != B:
                yield case, 1, ["--batch", batch]
        yield case, 1, ["--recompute", 1 if case.endswith("words") else 2]
        yield case, 2, ["--batch", 1, "--recompute", 1, "--zero", 1]
        if case.endswith("-words"):
            yield case, 2, ["--batch", G // 2, "--ep", 2]
        if G % 4 == 0:
            yield case, 4, ["--batch", 1, "--ep", 2, "--zero", 1]


def written(value):
    return "".join(map(str, value)) if isinstance(value, list) else str(value)


@pytest.mark.parametrize("case, ranks, more", other_layouts(), ids=written)
def test_other_layouts(case, ranks, more, tmp_path):
    if ranks > 1 and not shutil.which("mpirun"):
        pytest.skip("no mpirun; make setup installs it")
    run(words(case, tmp_path, *more), ranks)
    compare(case, tmp_path)


# ------------------------------------------------------------------------------------------------
# Learning rates

def tiny_run(tmp_path, objective, row, steps, *more):
    """The rates of `steps` steps of a row each, on the smallest model."""
    shape = {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
             "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 257,
             "max_position_embeddings": 32, "eos_token_id": 256, "pad_token_id": 1}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    if not (tmp_path / "model").exists():
        subprocess.run([sys.executable, ROOT / "scripts/make_random_model.py", "--out", tmp_path / "model", "--config",
                        tmp_path / "shape.json"], check=True, capture_output=True)
    out = tmp_path / f"{objective}-{steps}"
    run(list(map(str, ["train", "--objective", objective, "--model", tmp_path / "model", "--data",
                       tmp_path / "rows.jsonl", "--tokenizer", "bytes", "--out", out, "--batch", 1, "--global-batch", 1,
                       "--steps", steps, "--log-every", 0, "--peak-tflops", 1, *more])), threads=1)
    return {line["step"]: line["lr"] for line in steps_of(out)}


SFT_ROW = {"prompt": "a", "completion": "b"}
DPO_ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize("objective, row, lr, n, w, printed", [
    ("sft", SFT_ROW, "2e-5", 303976, 9119, {1: "7.018313e-08", 285: "1.99999322e-05", 1000: "1.844799e-05",
                                            9000: "1.0836439e-06"}),
    ("dpo", DPO_ROW, "5e-7", 182751, 18275, {1: "8.75513e-10"})])
def test_published_rates(objective, row, lr, n, w, printed, tmp_path):
    """The logs of OLMoE's fine-tuning: a scheduler of n ticks with w of warm-up, which 32 ranks advance by 32 in a
    step. A step prints its rate after the update, which had the one before."""
    rates = tiny_run(tmp_path, objective, row, max(printed) + 1, "--schedule", "hf-linear", "--lr", lr,
                     "--decay-steps", n / 32, "--warmup", w / 32)
    assert rates[1] == 0
    for step, digits in printed.items():
        places = len(digits.split("e")[0]) - 2
        assert f"{rates[step + 1]:.{places}e}" == digits, step
    assert max(rates.values()) <= float(lr)


@pytest.mark.parametrize("objective, row, lr, warmup", [
    ("sft", SFT_ROW, 2e-5, 0.03), ("dpo", DPO_ROW, 5e-7, 0.1), ("kto", {**SFT_ROW, "label": True}, 5e-7, 0)])
def test_default_rates(objective, row, lr, warmup, tmp_path):
    """A warm-up of a share of the steps, which may be a fraction, then down to the step after the last."""
    for steps in (5, 40):
        w = warmup * steps
        wanted = [lr * t / w if t < w else lr * (steps - t) / (steps - w) for t in range(steps)]
        rates = tiny_run(tmp_path, objective, row, steps)
        assert list(rates) == list(range(1, steps + 1))
        for rate, right in zip(rates.values(), wanted):
            assert abs(rate - right) <= NINE_DIGITS * right, (steps, rates)


# ------------------------------------------------------------------------------------------------
# What follows from the formulas

def test_first_losses_of_dpo(tmp_path):
    """The policy is the reference until the first update with a rate above 0, which is the second."""
    run(words("dpo-assistant", tmp_path, "--warmup", 2))
    first, second, third = [line["loss"] for line in steps_of(tmp_path)][:3]
    assert abs(first - math.log(2)) < 1e-7 and abs(second - math.log(2)) < 1e-7 and abs(third - math.log(2)) > 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case, G", [("sft-words", 4), ("dpo-olmoe", 6), ("kto-words", 4)])
def test_validation(case, G, ranks, tmp_path):
    """While the rate is 0, validation on the rows of an epoch is the mean of its steps: of SFT over targets, else over
    rows."""
    if ranks > 1 and not shutil.which("mpirun"):
        pytest.skip("no mpirun; make setup installs it")
    count = expected(case)["kept_rows"] // G
    assert count * G == expected(case)["kept_rows"]
    run(words(case, tmp_path, "--steps", count, "--order", "sequential", "--global-batch", G, "--batch", 1, "--lr", 0,
              "--lb-coef", 0, "--z-coef", 0, "--val", FIXTURES / case / "rows.jsonl"), ranks)
    found = steps_of(tmp_path)
    weights = [line["targets"] if case.startswith("sft") else 1 for line in found]
    for field, of_steps in {"sft": [("val_loss", "ce_loss")],
                            "dpo": [("val_loss", "loss"), ("val_reward_accuracy", "reward_accuracy")],
                            "kto": [("val_loss", "loss"), ("val_kl", "kl")]}[case[:3]]:
        mean = sum(line[of_steps] * weight for line, weight in zip(found, weights)) / sum(weights)
        allowed = RELATIVE * abs(mean)
        if field == "val_kl":
            allowed += OF_DIFFERENCES * expected(case)["log_probability"]
        assert abs(found[-1][field] - mean) <= allowed, (field, found[-1][field], mean)


# ------------------------------------------------------------------------------------------------
# Resuming

def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(directory).iterdir())}


def last_checkpoint(case, out):
    return digests(Path(out) / f"step-{len(expected(case)['steps']):08}")


@pytest.mark.parametrize("case", [case for case in CASES if "--steps" in expected(case)["args"]])
def test_resuming_is_exact(case, tmp_path):
    """In the middle of an epoch and of a schedule; a run that becomes longer asks the reference for more rows."""
    count = len(expected(case)["steps"])
    fixed = ["--decay-steps", option(expected(case)["args"], "--decay-steps", count)]
    run(words(case, tmp_path / "straight", *fixed))
    for first in (1, 3):
        out = tmp_path / str(first)
        run(words(case, out, *fixed, "--steps", first))
        run(words(case, out, *fixed, "--steps", count, "--resume"))
        assert last_checkpoint(case, out) == last_checkpoint(case, tmp_path / "straight"), first
        compare(case, out)


def test_killed_at_any_moment(tmp_path):
    """By SIGKILL while rows are read, the reference runs, steps are made or checkpoints written: what is there then
    resumes, and ends where an undisturbed run does."""
    case, more = "kto-olmoe", ["--steps", 40, "--save-every", 1, "--keep-last", 2, "--log-every", 0]
    start = time.monotonic()
    run(words(case, tmp_path / "straight", *more))
    whole = time.monotonic() - start
    kills = 0
    for part in (0.05, 0.1, 0.15, 0.2, 0.3, 0.3, 0.3):
        process = subprocess.Popen([OLMOE, *words(case, tmp_path / "killed", *more, "--resume")],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            said = process.communicate(timeout=part * whole)[1]
            assert process.returncode == 0, said
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    run(words(case, tmp_path / "killed", *more, "--resume"))
    assert kills >= 4
    assert digests(tmp_path / "killed/step-00000040") == digests(tmp_path / "straight/step-00000040")
    wanted = [line["loss"] for line in steps_of(tmp_path / "straight")]
    found = {line["step"]: line["loss"] for line in steps_of(tmp_path / "killed")}
    assert [found[step] for step in range(1, 41)] == wanted
