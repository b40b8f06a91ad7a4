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
    at = words.index("--tokenizer")             # without one the config has EOS, and the text is numbers
    numbers = json.loads(run(*words[:at], *words[at + 2:]).stdout)["sequences"]
    assert [[d["tokens"] for d in j["documents"]] for j in numbers] == [
        [d["tokens"] for d in j["documents"]] for j in bare]
    assert numbers[0]["documents"][0]["text"] == " ".join(map(str, [*b"one", 256]))
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
        listed = batch(tmp_path / "out", 6)["sequences"]        # that takes no ranks
        assert [j["instance"] for j in listed] == [j["instance"] for j in found["sequences"]]
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
    if e["reference"]:                                          # of DPO and KTO the mean of the rows' is the step's
        mean = sum(j["loss"] for j in found["sequences"]) / len(found["sequences"])
        assert mean == pytest.approx(lines[at]["loss"], rel=ROUNDING)
        (out / "reference.safetensors").unlink()                # computed again, and kept nowhere
        assert batch(out, at, "--replay") == found and not (out / "reference.safetensors").exists()
    shown = batch(out, at, "--model", FINETUNE / case / e["model"])
    for j in shown["sequences"]:
        sides = dict(zip(["chosen", "rejected"] if "dpo" in case else [None], j["lengths"], strict=True))
        assert all(0 < w["token"] < sides[w.get("side")] for w in j["worst"])
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


def test_of_a_run_that_was_resumed(runs, tmp_path):
    """By other options, once and again: each step has those that it was trained by, and the stretches that were skipped
    by then, before there is a checkpoint that knows them. The lines of the log's steps are those of any run."""
    shutil.copy(runs / "data.npy", runs / "bytes")              # a file has the name of a tokenizer
    common = ["train", "--config", "config.json", "--data", "bytes", "--out", tmp_path / "out", "--batch", 2,
              "--global-batch", G, "--seq", T, "--peak-tflops", 1, "--save-every", 5]
    run(*common, "--steps", 5, "--lr", 0.02, cwd=runs)
    run(*common, "--steps", 10, "--lr", 0.01, "--skip-batches", "7-8", "--resume", cwd=runs)
    run(*common, "--steps", 10, "--lr", 0.01, "--skip-batches", "7-8", "--resume", cwd=runs)        # nothing to do
    run(*common[:2], runs / "config.json", "--data", Path("..") / runs.name / "bytes", *common[5:], "--steps", 14,
        "--lr", 0.003, "--batch", 1, "--resume", cwd=tmp_path)
    shutil.rmtree(tmp_path / "out/step-00000014")
    lines, first = log(tmp_path / "out"), json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])
    assert [r["step"] for r in first["resumed"]] == [5, 10] and sorted(lines) == list(range(1, 15))
    for step, number in (5, 5), (9, 11), (13, 15):
        found = batch(tmp_path / "out", step, "--replay")
        assert (found["loss"], found["grad_norm"]) == (lines[step]["loss"], lines[step]["grad_norm"])
        assert found["batch"] == number
    shutil.copytree(tmp_path / "out", tmp_path / "added")
    shutil.rmtree(tmp_path / "out/step-00000005")
    said = run("batch", "--run", tmp_path / "out", "--step", 9, "--replay").stderr
    assert said == "note: until step 5 the run had other options, and there is no checkpoint of that step\n"
    run(*common[:5], "--out", tmp_path / "added", *common[7:], "--steps", 16, "--lr", 0.003, "--batch", 1,
        "--save-every", 0, "--skip-batches", "14-15", "--resume", cwd=runs)
    shutil.rmtree(tmp_path / "added/step-00000016")
    assert [batch(tmp_path / "added", step)["batch"] for step in (10, 11, 12)] == [12, 13, 16]


def test_of_a_run_that_began_at_another_ones_checkpoint(runs, tmp_path):
    """Its log has where that is, and what had been skipped."""
    words = ["train", "--config", "config.json", "--tokenizer", "bytes", "--data", "data.npy:1.5", "--out",
             tmp_path / "out", "--steps", 14, "--batch", 2, "--global-batch", G, "--seq", T, "--peak-tflops", 1]
    words += ["--val", "data.npy:0.1", "--routing-every", 14]   # which batch has no use for
    run(*words, "--resume", "out/step-00000010", cwd=runs)
    shutil.rmtree(tmp_path / "out/step-00000014")
    found = batch(tmp_path / "out", 13, "--replay", cwd=tmp_path)
    assert found["batch"] == 15 and found["loss"] == log(tmp_path / "out")[13]["loss"]
    assert batch(tmp_path / "out", 13)["batch"] == 15
    refused(["batch", "--run", tmp_path / "out", "--step", 9, "--replay"],
            f"--step 9: the log of {tmp_path / 'out'} goes on from step 10, of {runs / 'out/step-00000010'}")


def test_data_that_changed(runs, tmp_path):
    """Token files are refused; of rows, which OUT has, the text is left out."""
    values = (runs / "data.npy").read_bytes()
    (tmp_path / "data.npy").write_bytes(values[2 * T:] + values[:2 * T])
    for more in [], ["--replay"]:
        refused(["batch", "--run", runs / "out", "--step", 3, "--data", f"{tmp_path / 'data.npy'}:1.5", *more],
                f"data.npy:1.5: not the data of {runs / 'out'}, or changed since")
    rows = [{"prompt": f"{i}?", "completion": "abc"[:i % 3] + "."} for i in range(12)]
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--objective", "sft", "--model", runs / "out/step-00000010", "--tokenizer", "bytes", "--data", path,
             "--out", out, "--batch", 2, "--global-batch", G, "--seq", T]
    run("train", *words, "--steps", 3, "--peak-tflops", 1)
    step = batch(out, 2, "--replay")
    assert [json.loads(j["text"]) for j in step["sequences"]] == [rows[j["line"] - 1] for j in step["sequences"]]
    own = json.loads(run("batch", "--step", 2, "--json", *words).stdout)
    assert [j["line"] for j in own["sequences"]] == [j["line"] for j in step["sequences"]]
    kept = step["sequences"][0]["line"] - 1                     # the others are another text now
    path.write_text("".join(json.dumps(row if i == kept else {**row, "completion": "x"}) + "\n"
                            for i, row in enumerate(rows)))
    texts = [j["text"] for j in batch(out, 2)["sequences"]]
    assert json.loads(texts[0]) == rows[kept] and texts[1:] == [None] * (G - 1)
    path.unlink()
    again = batch(out, 2, "--replay")
    assert again["loss"] == step["loss"] and [j["text"] for j in again["sequences"]] == [None] * G
    assert "the file has another row there now, or none" in run("batch", "--run", out, "--step", 2).stdout
    refused(["batch", "--run", out, "--step", 2, "--data", path, path], "the run had 1 files of rows, and 2 are given")
    refused(["batch", "--run", out, "--step", 2, "--seq", 30], "the run's rows are of another seq: 64, not 30")


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
    first = (out / "log.jsonl").read_text().splitlines()[0]
    (tmp_path / "log.jsonl").write_text(first.replace('"--seq"', '"--rendezvous","host:1","--seq"')
                                        + '\n{"step":12,"x":0}\n')
    assert run("batch", "--run", tmp_path, "--step", 12, "--skip-batches", "3-4", "--replay").stdout.count(
        "(not in the log)") == 2
    refused(["batch", "--step", 1], "--config FILE")
    refused([*of_run, "--step", 1, "--data", tmp_path / "none.npy"], "none.npy: cannot be read")
    refused([*of_run, "--step", 1, "--colour", "red"], "unknown option '--colour'")
    refused([*of_run, "--step", 13, "--replay", "--seed", 5], "checkpoint's seed is 6198, this run's is 5")
