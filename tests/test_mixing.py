"""Files that count more than once or in part, and batches that are skipped, in runs: each is bit for bit the run on
data that are written out so. test_data.py has the same for the loader alone.

The program is ./olmoe, or what OLMOE names.
"""
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
SHAPE = {"model_type": "olmoe", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1,
         "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1,
         "vocab_size": 320, "max_position_embeddings": 48, "eos_token_id": 256, "pad_token_id": 1}
T, G = 8, 4                             # tokens of a sequence, sequences of a batch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, a model, and token files: a of 13 sequences, b of 9, c of 10, each with a tail."""
    d = tmp_path_factory.mktemp("base")
    draw = random.Random(1)
    (d / "config.json").write_text(json.dumps(SHAPE))
    subprocess.run([sys.executable, ROOT / "scripts/make_random_model.py", "--out", d / "model", "--config",
                    d / "config.json"], check=True, capture_output=True)
    for name, n in ("a", 13), ("b", 9), ("c", 10):
        written(d / f"{name}.npy", [draw.randrange(300) for _ in range(n * T + 3)])
    return d


def written(path, values):
    path.write_bytes(struct.pack(f"<{len(values)}H", *values))
    return path


def sequences(path):
    values = struct.unpack(f"<{path.stat().st_size // 2}H", path.read_bytes())
    return [values[i:i + T] for i in range(0, len(values) - T + 1, T)]


def joined(path, instances):
    return written(path, [x for instance in instances for x in instance])


def run(words, ranks=1, code=0):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    done = subprocess.run([*launcher, OLMOE, "train", *map(str, words)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    if code == 0:
        return done.stdout
    line, = done.stderr.splitlines()
    assert line.startswith("olmoe: "), line
    return line


COMMON = ["--seq", T, "--global-batch", G, "--batch", 2, "--lr", "1e-2", "--warmup", 0, "--log-every", 0,
          "--schedule", "constant", "--peak-tflops", 1]


def train(base, out, data, steps, *more, **how):
    return run(["--config", base / "config.json", "--data", *data, "--out", out, "--steps", steps, *COMMON, *more],
               **how)


def lines(out):
    """The log's steps, without what depends on the clock, or on where a run ended"""
    log = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    left_out = ("ms", "tokens_per_s", "mfu", "balance")
    return [{key: value for key, value in line.items() if key not in left_out} for line in log if "step" in line]


def trainer(out, step):
    return json.loads((out / f"step-{step:08}/trainer_state.json").read_text())["trainer"]


def weights(out, step):
    """Digests of weights and moments"""
    return [hashlib.sha256((out / f"step-{step:08}/{name}.safetensors").read_bytes()).hexdigest()
            for name in ("model", "optimizer")]


def same(out, other, steps):
    """Logs, and the last step's weights and moments"""
    a, b = lines(out), lines(other)
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, steps + 1))
    assert a == b and weights(out, steps) == weights(other, steps)


# ------------------------------------------------------------------------------------------------
# Mixing

@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mix_is_the_files_written_out(base, tmp_path, ranks):
    """13 + 2 x 9 + 4 + 5 sequences: 10 batches an epoch, of which there are two."""
    if ranks > 1 and not shutil.which("mpirun"):
        pytest.skip("no mpirun; make setup installs it")
    a, b, c = (sequences(base / f"{name}.npy") for name in "abc")
    whole = joined(tmp_path / "whole.npy", a + b + b + b[:4] + c[:5])
    mix = [base / "a.npy", f"{base / 'b.npy'}:2.5", f"{base / 'c.npy'}:0.5"]
    said = train(base, tmp_path / "mix", mix, 13, "--val", f"{base / 'c.npy'}:0.5", ranks=ranks)
    train(base, tmp_path / "whole", [whole], 13, "--val", joined(tmp_path / "val.npy", c[:5]), ranks=ranks)
    same(tmp_path / "mix", tmp_path / "whole", 13)
    assert lines(tmp_path / "mix")[-1]["val_loss"] > 0 and "40 sequences of 8" in said
    assert trainer(tmp_path / "mix", 13)["epoch"] == 1 and trainer(tmp_path / "mix", 13)["position"] == 3 * G


def test_another_share_is_refused(base, tmp_path):
    """Resuming needs the same list of sequences, however it is written."""
    a, b, out = base / "a.npy", base / "b.npy", tmp_path / "out"
    train(base, out, [a, f"{b}:1.5"], 2)
    for data in ([a, f"{b}:2"], [a, b], [a, f"{b}:1.8"], [f"{a}:1.5", b], [f"{b}:1.5", a]):
        assert "data_fingerprint is" in train(base, out, data, 4, "--resume", code=1)
    train(base, out, [a, f"{b}:1.5"], 3, "--resume")
    train(base, out, [f"{a}:1", b, f"{b}:0.5"], 4, "--resume")
    train(base, tmp_path / "straight", [a, f"{b}:1.5"], 4)
    same(out, tmp_path / "straight", 4)


def test_validation_files_that_count_twice(base, tmp_path):
    """The mean over all of them; experts by domain are of one file, as it is or in part."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"id": f"{kind}-{i}", "text": kind * 9}) + "\n"
                                                 for i in range(9) for kind in ("count", "word")))
    val = tmp_path / "val.npy"
    subprocess.run([OLMOE, "tokenize", "--tokenizer", "bytes", "--out", val, tmp_path / "text.jsonl"], check=True,
                   capture_output=True)
    found = {}
    for share in ("", ":2", ":0.5"):
        out = tmp_path / f"out{share[1:]}"
        said = train(base, out, [base / "a.npy"], 1, "--val", f"{val}{share}", "--batch", 1)
        assert ("experts by domain" in said) == (share != ":2")
        found[share] = lines(out)[-1]["val_loss"]
    assert abs(found[":2"] - found[""]) <= 1e-6 * found[""] < abs(found[":0.5"] - found[""])


# ------------------------------------------------------------------------------------------------
# Skipping

def test_skipped_is_data_without_the_stretch(base, tmp_path):
    """In the order of the file; and shuffled, where the other run's file is the order of two epochs, without the
    stretch over the first one's end."""
    a = sequences(base / "a.npy") + sequences(base / "b.npy")           # 5 batches an epoch, and two sequences more
    whole = joined(tmp_path / "all.npy", a)
    train(base, tmp_path / "skips", [whole], 3, "--order", "sequential", "--skip-batches", "2-3")
    train(base, tmp_path / "lacks", [joined(tmp_path / "lacks.npy", a[:G] + a[3 * G:])], 3, "--order", "sequential")
    same(tmp_path / "skips", tmp_path / "lacks", 3)
    said = train(base, tmp_path / "skipped", [whole], 7, "--skip-batches", "5-6", 4, "--seed", 6198)
    assert "batches skipped" in said and trainer(tmp_path / "skipped", 7)["skip_batches"] == [[4, 6]]
    order = [i for seed in (6198, 6199) for i in SHUFFLED[seed][:5 * G]]
    left = [a[i] for i in order[:3 * G] + order[6 * G:]]
    train(base, tmp_path / "left", [joined(tmp_path / "left.npy", left)], 7, "--order", "sequential", "--seed", 6198)
    same(tmp_path / "skipped", tmp_path / "left", 7)


# numpy.random.Generator(numpy.random.PCG64(seed)).shuffle of 0 to 21, as uint32
SHUFFLED = {6198: [12, 4, 15, 3, 5, 13, 6, 16, 19, 18, 14, 10, 11, 2, 20, 0, 17, 7, 9, 8, 1, 21],
            6199: [9, 21, 8, 12, 11, 19, 4, 5, 14, 17, 6, 3, 20, 2, 15, 18, 1, 16, 10, 13, 0, 7]}


def test_resuming_keeps_and_adds(base, tmp_path):
    """A checkpoint's stretches are kept; new ones are added, also where they go on from those that it knows; what it
    has trained on is refused."""
    data, out, straight = [base / "a.npy", base / "b.npy"], tmp_path / "out", tmp_path / "straight"
    train(base, straight, data, 8, "--skip-batches", "2-3", "4-5", "8")             # batches 1, 6, 7, 9, 10, ...
    train(base, out, data, 2, "--skip-batches", "2-3")                              # 1 and 4
    for given in ("1", "4", "3-4", "1-9", "2-4"):
        said = train(base, out, data, 4, "--resume", "--skip-batches", given, code=1)
        assert f"--skip-batches {given if '-' in given else given + '-' + given}: " in said
        assert f"has trained on batch {1 if given[0] == '1' else 4};" in said
    shutil.rmtree(out)
    train(base, out, data, 1, "--skip-batches", "3", "2")
    train(base, out, data, 2, "--resume", "--skip-batches", "2-5")                  # 4 and 5 are new
    train(base, out, data, 3, "--resume")                                           # 7
    assert trainer(out, 3)["skip_batches"] == [[2, 5]]
    train(base, out, data, 5, "--resume", "--skip-batches", "8", "3-4")
    train(base, out, data, 8, "--resume", "--skip-batches", "2-5")
    assert trainer(out, 8) == trainer(straight, 8) and trainer(out, 8)["skip_batches"] == [[2, 5], [8, 8]]
    same(out, straight, 8)


ROWS = [{"prompt": f"{i} {'a' * (i % 5)}", "completion": "yes" * (1 + i % 4), "label": i % 3 == 0} for i in range(24)]


def fine_tune(base, out, rows, kind, steps, *more, **how):
    path = out.parent / f"{len(rows)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run(["--objective", kind, "--model", base / "model", "--tokenizer", "bytes", "--data", path, "--out", out,
                "--steps", steps, *COMMON, "--seq", 32, *more], **how)


@pytest.mark.parametrize("kind", ["sft", "kto"])
def test_skipped_rows(base, tmp_path, kind):
    """As with rows without them. The reference's log-probabilities of KTO's mismatched rows are those of the steps that
    there are, also where a stretch is skipped only after the run was resumed."""
    order = ["--order", "sequential"]
    fine_tune(base, tmp_path / "skips", ROWS, kind, 4, *order, "--skip-batches", "2-3")
    fine_tune(base, tmp_path / "lacks", ROWS[:G] + ROWS[3 * G:], kind, 4, *order)
    same(tmp_path / "skips", tmp_path / "lacks", 4)
    fine_tune(base, tmp_path / "straight", ROWS, kind, 7, "--skip-batches", "3", "5-6")
    fine_tune(base, tmp_path / "resumed", ROWS, kind, 7, "--skip-batches", "3", "--save-every", 2)
    for step in (4, 6, 7):
        shutil.rmtree(tmp_path / f"resumed/step-{step:08}")
    said = fine_tune(base, tmp_path / "resumed", ROWS, kind, 7, "--skip-batches", "5-6", "--resume")
    same(tmp_path / "resumed", tmp_path / "straight", 7)
    assert trainer(tmp_path / "resumed", 7) == trainer(tmp_path / "straight", 7)
    if kind == "kto":
        assert any(line["kl"] > 0 for line in lines(tmp_path / "resumed")[3:])
        assert f"reference: {7 * G} rows through the reference" in said


# ------------------------------------------------------------------------------------------------
# Refused, with one line

@pytest.mark.parametrize("data, more, words", [
    ("a.npy", ["--skip-batches"], "--skip-batches needs at least one value"),
    ("a.npy", ["--skip-batches", ""], "--skip-batches '': not FROM-TO, numbers of batches from 1 on"),
    ("a.npy", ["--skip-batches", "3-2"], "--skip-batches '3-2': not"),
    ("a.npy", ["--skip-batches", "1", "x"], "--skip-batches 'x': not"),
    ("a.npy", ["--skip-batches", "-1"], "--skip-batches '-1': not"),
    ("a.npy", ["--val", "a.npy:-1"], "a.npy:-1: a file counts more than 0 and up to 1000 times"),
    ("a.npy:0", [], "a.npy:0: a file counts more than 0"), ("a.npy:", [], "a.npy:: cannot be read"),
    ("a.npy:0.01", [], "a.npy:0.01: 0.01 of the file's 13 sequences of 8 tokens is less than one"),
    ("a.npy:0.2", [], "--global-batch 4 is more than the 2 sequences of the data"),
    ("none.npy:2", [], "none.npy: cannot be read"),
    ("rows.jsonl:2", ["--objective", "sft", "--tokenizer", "bytes"], "rows.jsonl:2: cannot be read"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else x[:20])
def test_refused(base, tmp_path, data, more, words):
    more = [f"{base}/{word}" if ".npy" in word else word for word in more]
    assert words in train(base, tmp_path / "out", [base / data], 2, *more, code=1)
