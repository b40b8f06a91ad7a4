"""olmoe batch: the sequences of a step are those that it trained on, a planted document of noise is found by its loss
and by its gradient, and a replayed step is the one in the log, bit for bit.

The program is ./olmoe, or what OLMOE names.
"""
import gzip
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
FINETUNE = ROOT / "tests/fixtures/finetune"
T, G, STEPS = 64, 4, 30
ROUNDING = 1e-5             # relative: sums of fp32 in another order
CONFIG = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu", "vocab_size": 320,
          "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": T,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "norm_topk_prob": False, "eos_token_id": 256,
          "pad_token_id": 256, "initializer_range": 0.05, "tie_word_embeddings": False}


def run(*words, ranks=1, code=0, cwd=None):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    threads = max(1, (os.cpu_count() or 1) // ranks)
    done = subprocess.run([*launcher, OLMOE, *map(str, words)], capture_output=True, text=True, timeout=300, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done


def batch(out, step, *more, **how):
    return json.loads(run("batch", "--run", out, "--step", step, "--json", *more, **how).stdout)


def log(out):
    return {line["step"]: line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
            if "step" in line}


def documents(folder):
    """Texts of few words, and one of noise among them, tokenized to data.npy. Each is 3 sequences long."""
    draw = random.Random(1)
    with open(folder / "texts.jsonl", "w") as f:
        for i in range(60):
            noise = i % 10 == 1
            if noise:
                text = "".join(chr(draw.randrange(33, 127)) for _ in range(3 * T - 1))
            else:
                text = "".join(draw.choice(["the cat ", "sat on ", "a mat, "]) for _ in range(60))[:3 * T - 2] + "."
            print(json.dumps({"id": f"noise-{i}" if noise else f"cat-{i}", "text": text}), file=f)
    run("tokenize", "--tokenizer", "bytes", "--out", folder / "data.npy", folder / "texts.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with texts, and `out`, a run on them that was started there by relative names"""
    d = tmp_path_factory.mktemp("batch")
    (d / "config.json").write_text(json.dumps(CONFIG))
    documents(d)
    run("train", "--config", "config.json", "--tokenizer", "bytes", "--data", "data.npy:1.5", "--out", "out", "--steps",
        STEPS, "--batch", 2, "--global-batch", G, "--seq", T, "--lr", 0.02, "--warmup", 5, "--save-every", 10,
        "--skip-batches", "3-4", "--peak-tflops", 1, cwd=d)
    return d


def step_of_noise(out):
    """A late step one of whose sequences is noise, and the place of that"""
    for step in range(STEPS, 10, -1):
        noise = [j["place"] for j in batch(out, step)["sequences"] if "noise" in j["documents"][0]["id"]]
        if len(noise) == 1:
            return step, noise[0]
    raise AssertionError("no step has noise")


def test_sequences_are_those_that_were_trained_on(runs):
    """The weights of a checkpoint find the next step's sequences as likely as the next step did: after skipped
    batches, with a file that counts one and a half times."""
    out, lines = runs / "out", log(runs / "out")
    for step in (11, 21):
        found = batch(out, step, "--model", out / f"step-{step - 1:08}")
        assert (found["step"], found["batch"], found["epoch"]) == (step, step + 2, 0)
        loss = sum(j["loss"] for j in found["sequences"]) / G
        assert loss == pytest.approx(lines[step]["ce_loss"], rel=ROUNDING)


def test_a_document_of_noise_is_found(runs):
    out = runs / "out"
    step, place = step_of_noise(out)
    by_loss = batch(out, step, "--model", out / f"step-{STEPS:08}")["sequences"]
    replayed = batch(out, step, "--replay")
    assert max(by_loss, key=lambda j: j["loss"])["place"] == place
    assert max(replayed["sequences"], key=lambda j: j["grad_norm"])["place"] == place
    assert max(replayed["sequences"], key=lambda j: j["loss"])["place"] == place
    worst = by_loss[place]["worst"]
    assert [w["loss"] for w in worst] == sorted((w["loss"] for w in worst), reverse=True) and len(worst) == 5
    number = int(by_loss[place]["documents"][0]["id"].removeprefix("noise-"))
    text = (runs / "texts.jsonl").read_text().splitlines()[number]
    start = by_loss[place]["tokens"][0] - number * 3 * T
    for w in worst:                                             # the token that was to be predicted, at its place
        assert w["text"] == json.loads(text)["text"][start + w["token"]]
    said = run("batch", "--run", out, "--step", step, "--replay").stdout
    assert f"noise-{number} (" in said and said.count("(as logged)") == 2


def test_documents(runs):
    """Where each begins in its sequence, from the list beside the tokens, or else by the ends of texts"""
    def by_place(found):
        return [[(d["tokens"], d["text"]) for d in j["documents"]] for j in found["sequences"]]
    listed = batch(runs / "out", 7)
    for j in listed["sequences"]:
        first = j["tokens"][0] // (3 * T)
        assert j["tokens"][1] - j["tokens"][0] == T - 1 and j["documents"][0]["tokens"] == [0, T - 1]
        assert [d["id"] for d in j["documents"]] == [f"{'noise' if first % 10 == 1 else 'cat'}-{first}"]
        assert j["documents"][0]["source"] == str(runs / "texts.jsonl") and not j["masked"]
    os.rename(runs / "data.csv.gz", runs / "away")
    try:
        assert by_place(batch(runs / "out", 7)) == by_place(listed)
    finally:
        os.rename(runs / "away", runs / "data.csv.gz")


def test_several_documents_and_repetitions(runs, tmp_path):
    """Documents that end within a sequence, with a list and without one; a sequence that the filter masks"""
    texts = ["one", "two is longer", "x" * 70, "and the last one, which is cut by the sequence's end" * 2]
    with open(tmp_path / "texts.jsonl", "w") as f:
        for i, text in enumerate(texts):
            print(json.dumps({"id": f"id {i}", "text": text}), file=f)
    run("tokenize", "--tokenizer", "bytes", "--out", tmp_path / "t.npy", tmp_path / "texts.jsonl")
    words = ["batch", "--step", 1, "--config", runs / "config.json", "--tokenizer", "bytes", "--data",
             tmp_path / "t.npy", "--seq", 80, "--global-batch", 2, "--batch", 2, "--order", "sequential", "--json"]
    config = json.loads((runs / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 80}))
    words[words.index("--config") + 1] = tmp_path / "config.json"
    first, second = json.loads(run(*words).stdout)["sequences"]
    assert [d["tokens"] for d in first["documents"]] == [[0, 3], [4, 17], [18, 79]]
    assert [d["id"] for d in second["documents"]] == ["id 2", "id 3"]
    assert second["documents"][1]["text"] == texts[3][:40]
    assert first["masked"] and not second["masked"]
    os.remove(tmp_path / "t.csv.gz")
    bare = json.loads(run(*words).stdout)["sequences"]
    assert [[d["tokens"] for d in j["documents"]] for j in bare] == [
        [d["tokens"] for d in j["documents"]] for j in (first, second)]
    assert not any(j["masked"] for j in json.loads(run(*words, "--no-filter").stdout)["sequences"])


@pytest.mark.parametrize("ranks, more", [(1, []), (2, ["--ep", 2]), (2, ["--zero", 1])], ids=["1", "2, experts", "2"])
def test_a_replayed_step_is_the_one_in_the_log(runs, tmp_path, ranks, more):
    """And nothing of the run changes. The shares: of a step of one sequence without auxiliary losses, all."""
    words = ["train", "--config", runs / "config.json", "--data", runs / "data.npy", "--out", tmp_path / "out",
             "--steps", 6, "--batch", 1, "--global-batch", 2 * ranks, "--seq", T, "--warmup", 2, "--save-every", 2,
             "--keep-last", 1, "--lb-coef", 0, "--z-coef", 0, "--peak-tflops", 1, *more]
    run(*words, ranks=ranks)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    lines = log(tmp_path / "out")
    for step in (3, 6):                                         # the checkpoints before it were deleted: from the start
        found = batch(tmp_path / "out", step, "--replay", ranks=ranks)
        assert (found["loss"], found["grad_norm"]) == (lines[step]["loss"], lines[step]["grad_norm"])
        squares = sum(norm ** 2 for norm in found["tensors"].values())
        assert squares ** 0.5 == pytest.approx(found["grad_norm"], rel=1e-6)
        norms = [j["grad_norm"] for j in found["sequences"]]
        assert abs(found["grad_norm"]) < sum(norms) and len(set(norms)) == 2 * ranks
        mean = sum(j["loss"] * j["targets"] for j in found["sequences"]) / sum(j["targets"] for j in found["sequences"])
        assert mean == pytest.approx(lines[step]["ce_loss"], rel=ROUNDING)
    if ranks > 1:                   # one rank finds the same, but for what rounding has done to the weights by now
        alone = batch(tmp_path / "out", 6, "--replay", "--ep", 1, "--zero", 0)
        for a, b in zip(alone["sequences"], found["sequences"], strict=True):
            assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-3)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    run(*words[:6], tmp_path / "one", *words[7:], "--global-batch", 1, "--ep", 1, "--zero", 0)
    found = batch(tmp_path / "one", 4, "--replay")
    assert found["sequences"][0]["grad_norm"] == pytest.approx(found["grad_norm"], rel=ROUNDING)


@pytest.mark.parametrize("case", ["sft-words", "dpo-words", "kto-words"])
def test_rows(tmp_path, case):
    """File, line and text of each row, and the replayed step"""
    e = json.loads((FINETUNE / case / "expected.json").read_text())
    data = [FINETUNE / case / name for name in e["data"]]
    named = ["--model", FINETUNE / case / e["model"], "--data", *data, "--tokenizer", ROOT / e["tokenizer"]]
    named += ["--reference", FINETUNE / case / e["reference"]] if e["reference"] else []
    out = tmp_path / "out"
    run("train", *named, "--out", out, *e["args"], "--peak-tflops", 1)
    lines, at = log(out), 3
    found = batch(out, at, "--replay")
    assert (found["loss"], found["grad_norm"]) == (lines[at]["loss"], lines[at]["grad_norm"])
    for j in found["sequences"]:
        opener = gzip.open if j["file"].endswith(".gz") else open
        with opener(j["file"], "rt", encoding="utf-8") as f:
            assert json.loads(j["text"]) == json.loads(f.read().split("\n")[j["line"] - 1])
        assert j["file"] in map(str, data) and j["grad_norm"] > 0 and j["targets"] > 0
    assert sum(j["targets"] for j in found["sequences"]) == lines[at]["targets"]
    shown = batch(out, at, "--model", FINETUNE / case / e["model"])
    assert [(j["file"], j["line"]) for j in shown["sequences"]] == [(j["file"], j["line"]) for j in found["sequences"]]
    assert len({(j["file"], j["line"]) for j in found["sequences"]}) == len(found["sequences"])


def test_options_of_the_log_and_own_ones(runs, tmp_path):
    """From another folder; with the data elsewhere; the skipped batches of a resumed run, from its checkpoint."""
    out, found = runs / "out", batch(runs / "out", 9)
    assert found["batch"] == 11 and found["sequences"][0]["file"] == str(runs / "data.npy")
    assert batch(Path("..") / runs.name / "out", 9, cwd=runs)["sequences"] == found["sequences"]
    shutil.copy(runs / "data.npy", tmp_path / "moved.npy")
    moved = batch(out, 9, "--data", "moved.npy:1.5", cwd=tmp_path)
    assert [j["instance"] for j in moved["sequences"]] == [j["instance"] for j in found["sequences"]]
    assert moved["sequences"][0]["file"] == "moved.npy"
    other = batch(out, 9, "--seed", 1)
    assert [j["instance"] for j in other["sequences"]] != [j["instance"] for j in found["sequences"]]
    shutil.copytree(out, tmp_path / "out")
    run("train", "--config", "config.json", "--tokenizer", "bytes", "--data", "data.npy:1.5", "--out", tmp_path / "out",
        "--resume", tmp_path / "out" / f"step-{STEPS:08}", "--steps", STEPS + 2, "--batch", 2, "--global-batch", G,
        "--seq", T, "--lr", 0.02, "--warmup", 5, "--skip-batches", "33-40", "--peak-tflops", 1, cwd=runs)
    assert batch(tmp_path / "out", STEPS)["batch"] == STEPS + 2
    assert batch(tmp_path / "out", STEPS + 1)["batch"] == 41
    again = batch(tmp_path / "out", STEPS + 2, "--replay", "--steps", STEPS + 2)
    assert again["loss"] == log(tmp_path / "out")[STEPS + 2]["loss"]


def refused(words, reason, **how):
    done = run(*words, code=1, **how)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("olmoe: ") and reason in done.stderr, done.stderr


def test_bad_input(runs, tmp_path):
    out = runs / "out"
    of_run = ["batch", "--run", out]
    refused(of_run, "batch needs --step S")
    refused([*of_run, "--step", 0], "--step: '0' is not a number from 1")
    refused([*of_run, "--step", 3, "--replay", "--model", out / "step-00000010"], "leave out --model")
    refused(["batch", "--step", 3, "--replay"], "--replay needs --run OUT")
    refused([*of_run, "--step", STEPS + 1, "--replay"], f"--step {STEPS + 1}: the run has {STEPS}")
    refused(["batch", "--run", tmp_path, "--step", 1], "log.jsonl: cannot be read")
    (tmp_path / "log.jsonl").write_text('{"config": {}}\n')
    refused(["batch", "--run", tmp_path, "--step", 1], "does not name the run's options")
    refused(["batch", "--step", 1], "--config FILE")
    refused([*of_run, "--step", 1, "--data", tmp_path / "none.npy"], "none.npy: cannot be read")
    refused([*of_run, "--step", 1, "--colour", "red"], "unknown option '--colour'")
    refused([*of_run, "--step", 13, "--replay", "--seed", 5], "checkpoint's seed is 6198, this run's is 5")
