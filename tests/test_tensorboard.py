"""scripts/to_tensorboard.py against TensorBoard's own reader: every number of a run's log, once and following it.

Run by `make test-peers`: the package tensorboard is in build/venv. OLMOE is the program (default ./olmoe).
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
SCRIPT = ROOT / "scripts/to_tensorboard.py"


def convert(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=100)


def read(out):
    """What TensorBoard shows of a run: tag -> [(step, number)], the texts, and tag -> times"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    times = {tag: [e.wall_time for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    return shown, texts, times


def write(out, lines, mode="w"):
    out.mkdir(exist_ok=True)
    with open(out / "log.jsonl", mode) as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def step(n, **more):
    return {"step": n, "loss": 10 / n, "ms": 500.0, **more}


def test_a_run(tmp_path):
    """All numbers of a real log, with its tags' names, those of the balance by layer, and the configuration."""
    (tmp_path / "a.txt").write_text("the cat sat on the mat and the dog ran after it. " * 60)
    tokenize = [OLMOE, "tokenize", "--tokenizer", "bytes", "--out", tmp_path / "a.npy", tmp_path / "a.txt"]
    subprocess.run(tokenize, check=True, capture_output=True)
    train = [OLMOE, "train", "--config", ROOT / "configs/tiny.json", "--data", tmp_path / "a.npy", "--val",
             tmp_path / "a.npy", "--out", tmp_path / "run", "--seq", "32", "--batch", "2", "--steps", "4",
             "--val-every", "2", "--peak-tflops", "1"]
    subprocess.run(train, check=True, capture_output=True)
    done = convert(tmp_path / "run")
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/run/tensorboard\n", done.stderr
    shown, texts, times = read(tmp_path / "run")
    config, *log = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert json.loads(texts["config"]) == config["config"]
    names = ("loss", "ce_loss", "grad_norm", "lr", "ms", "tokens_per_s", "mfu", "max_over_mean", "dead", "val_loss")
    assert set(names) <= set(shown)
    expected = {}
    for line in log:
        numbers = {name: x for name, x in line.items() if name not in ("step", "balance")}
        for l, layer in enumerate(line.get("balance", [])):
            numbers.update({f"balance/layer {l}/{name}": layer[name] for name in ("max_over_mean", "entropy", "dead")})
        for name, x in numbers.items():
            expected.setdefault(name, []).append((line["step"], pytest.approx(x, rel=1e-6)))
    assert shown == expected
    seconds = times["loss"][-1] - times["loss"][0]
    assert seconds == pytest.approx(sum(line["ms"] for line in log[1:]) / 1000, abs=1e-3)
    assert times["loss"][-1] == pytest.approx((tmp_path / "run/log.jsonl").stat().st_mtime, abs=1e-3)


def test_ranks_and_odd_numbers(tmp_path):
    write(tmp_path / "run", [{"config": {}}, step(1, sent_bytes={"rows": 12, "sums": 3}, skipped=True),
                             step(2, val_loss=None)])
    assert convert(tmp_path / "run").returncode == 0
    shown, _, _ = read(tmp_path / "run")
    assert shown["sent_bytes/rows"] == [(1, 12)] and shown["skipped"] == [(1, 1)]
    (at, x), = shown["val_loss"]
    assert at == 2 and math.isnan(x)


def test_evaluations(tmp_path):
    """Under the names of the log, also those of a step 0, which has nothing else."""
    sets, task = "eval/c4_en-validation/CrossEntropyLoss", "eval/downstream/copa_acc"
    bits = "eval/downstream_bpb/copa_bpb"
    write(tmp_path / "run", [{"config": {}}, {"step": 0, sets: 9.5, task: 0.5, bits: 2.0}, step(1),
                             step(2, **{sets: None, task: 0.75, bits: 1.5})])
    done = convert(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    shown, _, times = read(tmp_path / "run")
    assert shown[task] == [(0, 0.5), (2, 0.75)] and shown[bits] == [(0, 2), (2, 1.5)]
    first, (at, x) = shown[sets]
    assert first == (0, 9.5) and at == 2 and math.isnan(x)
    assert shown["loss"] == [(1, 10), (2, 5)] and times[task][1] - times[task][0] == pytest.approx(1, abs=1e-3)


def test_fine_tuning(tmp_path):
    """What DPO logs, and KTO's null where a step has no row of a label."""
    pair = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "cc"}]}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 4)
    model = tmp_path / "model"
    random_model = [sys.executable, ROOT / "scripts/make_random_model.py", "--out", model, "--config",
                    ROOT / "configs/tiny.json"]
    subprocess.run(random_model, check=True, capture_output=True)
    train = [OLMOE, "train", "--objective", "dpo", "--model", model, "--tokenizer", "bytes", "--data",
             tmp_path / "pairs.jsonl", "--out", tmp_path / "run", "--batch", "2", "--steps", "2", "--peak-tflops", "1"]
    subprocess.run(train, check=True, capture_output=True)
    kto = [step(1, kl=0.5, chosen_reward=None, rejected_reward=-1.5), step(2, kl=0.0, chosen_reward=2.5)]
    write(tmp_path / "kto", [{"config": {}}, *kto])
    done = convert(tmp_path / "run", tmp_path / "kto")
    assert done.returncode == 0, done.stderr
    shown, _, _ = read(tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()[1:]]
    for name in ("targets", "chosen_logp", "rejected_logp", "reward_margin", "reward_accuracy"):
        assert shown[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in log]
    shown, _, _ = read(tmp_path / "kto")
    (first, missing), second = shown["chosen_reward"]
    assert first == 1 and math.isnan(missing) and second == (2, 2.5)
    assert shown["kl"] == [(1, 0.5), (2, 0)] and shown["rejected_reward"] == [(1, -1.5)]


def test_again_and_several(tmp_path):
    """A second call takes the place of the first, and leaves what it has not written. A line that is not whole is of a
    run that still writes."""
    for name, steps in (("a", 3), ("b", 2)):
        write(tmp_path / name, [{"config": {}}, *(step(n) for n in range(1, steps + 1))])
    (tmp_path / "a/tensorboard").mkdir()
    (tmp_path / "a/tensorboard/notes").touch()
    for more in ([], [step(4)]):
        write(tmp_path / "a", more, "a")
        with open(tmp_path / "b/log.jsonl", "a") as f:
            f.write('{"step": 3, "lo')
        done = convert(tmp_path / "a", tmp_path / "b")
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
        write(tmp_path / "b", [{"config": {}}, step(1), step(2)])
    assert [n for n, _ in read(tmp_path / "a")[0]["loss"]] == [1, 2, 3, 4]
    assert [n for n, _ in read(tmp_path / "b")[0]["loss"]] == [1, 2]
    assert len(list((tmp_path / "a/tensorboard").iterdir())) == 2


@pytest.mark.parametrize("lines, words", [
    (None, "log.jsonl: No such file or directory; name the --out directory"), ("", "no training step in it yet"),
    ('{"config": {}}\n', "no training step in it yet"), ('{"step": 1}\nno\n', "log.jsonl:2: not JSON"),
    ('{"step": 1, "ms": "x"}\n', "not the log of a training run"), ("\xff\n", "log.jsonl:1: not JSON"),
], ids=["none", "empty", "no step", "not json", "another", "not text"])
def test_logs_that_are_refused(tmp_path, lines, words):
    """With one line, before anything is written for any run."""
    write(tmp_path / "good", [step(1)])
    (tmp_path / "bad").mkdir()
    if lines is not None:
        (tmp_path / "bad/log.jsonl").write_text(lines, encoding="latin-1")
    done = convert(tmp_path / "good", tmp_path / "bad")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "good/tensorboard").exists() and not (tmp_path / "bad/tensorboard").exists()


def wait_for(condition):
    until = time.time() + 60
    while not condition():
        assert time.time() < until, "nothing came"
        time.sleep(0.2)


def losses(out):
    return read(out)[0].get("loss", []) if (out / "tensorboard").exists() else []


def test_following(tmp_path):
    """From before the first line; lines as they come; and a run that resumes from an earlier step, whose log is cut off
    and longer than before when it is next looked at. Ctrl-C ends it without a word."""
    out = tmp_path / "run"
    out.mkdir()
    process = subprocess.Popen([sys.executable, SCRIPT, out, "--follow"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        write(out, [{"config": {}}, step(1), step(2)])
        wait_for(lambda: losses(out) == [(1, 10), (2, 5)])
        with open(out / "log.jsonl", "a") as f:
            line = json.dumps(step(4, lr=1.0)) + "\n"
            f.write(json.dumps(step(3)) + "\n" + line[:9])
            f.flush()
            wait_for(lambda: [n for n, _ in losses(out)] == [1, 2, 3])
            f.write(line[9:])
        wait_for(lambda: [n for n, _ in losses(out)] == [1, 2, 3, 4])
        again = [step(n, loss=7.0, ms=300.0) for n in range(2, 12)]
        write(tmp_path / "new", [{"config": {}}, step(1), *again])
        os.replace(tmp_path / "new/log.jsonl", out / "log.jsonl")
        wait_for(lambda: losses(out) == [(1, 10), *((n, 7) for n in range(2, 12))])
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (f"{out}/tensorboard\n", "") and process.returncode == 0
    finally:
        process.kill()
