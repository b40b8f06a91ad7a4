"""`train --routing-every`: what the experts of a run do with its validation data, step by step, and `olmoe routing` on
its checkpoints: the same figures from both, on any ranks and after a resume, while the training stays the same bit for
bit.

The program is ./olmoe, or what OLMOE names. That the figures are right is test_routing.py's.
"""
import ast
import gzip
import json
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
CONFIG = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu", "vocab_size": 320,
          "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "max_position_embeddings": 1024,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "norm_topk_prob": False, "eos_token_id": 256,
          "pad_token_id": 256, "initializer_range": 0.05, "tie_word_embeddings": False}
L, E, K, SEQ = 2, 6, 3, 48
TIMES = {"ms", "tokens_per_s", "mfu"}       # of a step: they differ between runs
MOST = 20_000               # tokens of the choices of a step


def tokens(path, ids):
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a config, and tokens to train on and to validate on: 11 pieces and a tail"""
    d, r = tmp_path_factory.mktemp("routing"), random.Random(1)
    (d / "config.json").write_text(json.dumps(CONFIG))
    of = [[r.choice([r.randrange(97, 123), 32, 256]) for _ in range(n)] for n in (4000, 11 * SEQ + 20)]
    return SimpleNamespace(folder=d, train=tokens(d / "train.npy", of[0]), val=tokens(d / "val.set.npy", of[1]))


def run(*words, ranks=1, code=0):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    threads = max(1, (os.cpu_count() or 1) // ranks)
    done = subprocess.run([*launcher, OLMOE, *map(str, words)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done


def train_words(files, out, *more, val=None):
    return ["train", "--config", files.folder / "config.json", "--tokenizer", "bytes", "--data", files.train,
            "--val", *(val or [files.val]), "--out", out, "--steps", 5, "--batch", 2, "--seq", SEQ, "--warmup", 2,
            "--lr", 0.01, "--save-every", 2, "--sample-tokens", 1, "--peak-tflops", 1, *more]


@pytest.fixture(scope="module")
def watched(files):
    """The directory of a run that writes of its routing at steps 2, 4 and 5"""
    out = files.folder / "watched"
    run(*train_words(files, out, "--routing-every", 2))
    return out


def written(out):
    return sorted(path.name for path in out.glob("routing*"))


def figures(out, step):
    return json.loads((out / f"routing-{step:08}.json").read_text())


def choices(out, step):
    """[token][layer] of the first to the last choice, of a real .npy of bytes"""
    raw = (out / figures(out, step)["choices"]).read_bytes()
    assert raw[:8] == b"\x93NUMPY\x01\x00"
    begin = 10 + struct.unpack("<H", raw[8:10])[0]
    header = ast.literal_eval(raw[10:begin].decode())
    assert header["descr"] in ("|u1", "<u1") and not header["fortran_order"] and begin % 64 == 0
    n = header["shape"][0]
    assert header["shape"] == (n, L, K) and len(raw) == begin + n * L * K
    return [[list(raw[at + l * K:at + (l + 1) * K]) for l in range(L)] for at in range(begin, len(raw), L * K)]


def saturation(before, after):
    """By the definition, from choices"""
    n = len(before)
    return {"top1": [sum(a[l][0] == b[l][0] for a, b in zip(before, after)) / n for l in range(L)],
            "topk": [sum(len(set(a[l]) & set(b[l])) for a, b in zip(before, after)) / n / K for l in range(L)]}


def close(a, b):
    """The same, but for the last digits of what is no whole number"""
    assert type(a) is type(b) and not (isinstance(a, dict) and a.keys() != b.keys()), (a, b)
    if isinstance(a, (list, dict)):
        assert len(a) == len(b), (a, b)
        for i in a if isinstance(a, dict) else range(len(a)):
            close(a[i], b[i])
    else:
        assert a == (pytest.approx(b, rel=1e-5, abs=1e-6) if isinstance(a, float) else b)


def without(figures_of, *keys):
    return {key: value for key, value in figures_of.items() if key not in keys}


def test_steps(files, watched):
    """At those that are due, and the last."""
    assert written(watched) == [f"routing-{step:08}.{kind}" for step in (2, 4, 5) for kind in ("json", "npy")]
    for step in (2, 4, 5):
        found = figures(watched, step)
        assert found["step"] == step and found["choices"] == f"routing-{step:08}.npy"
        assert found["tokens"] == 11 * SEQ and list(found["domains"]) == ["val"] and found["seq"] == SEQ
    assert figures(watched, 2)["text"] == figures(watched, 5)["text"]
    assert choices(watched, 2) != choices(watched, 4) != choices(watched, 5)


@pytest.mark.parametrize("step", [2, 4, 5])
def test_figures_are_those_of_the_checkpoint(files, watched, step, tmp_path):
    run("routing", "--model", watched / f"step-{step:08}", "--data", files.val, "--tokenizer", "bytes", "--seq", SEQ,
        "--out", tmp_path / "o.json", "--batch", 4)
    found = json.loads((tmp_path / "o.json").read_text())
    close(without(figures(watched, step), "step", "choices", "model"), without(found, "model"))


def test_choices(watched):
    """Those that are counted: in the order of their logits, each expert once."""
    for step in (2, 5):
        found, of = figures(watched, step), choices(watched, step)
        assert len(of) == found["tokens"] and all(len(set(layer)) == K for token in of for layer in token)
        for l in range(L):
            assert found["domains"]["val"]["top1"][l] == [sum(token[l][0] == e for token in of) for e in range(E)]
            assert found["domains"]["val"]["counts"][l] == [sum(e in token[l] for token in of) for e in range(E)]
            ranked = [[0] * E for _ in range(E)]
            for token in of:
                for i, j in zip(token[l], token[l][1:]):
                    ranked[i][j] += 1
                    ranked[j][i] += 1
            assert found["coactivation_ranked"][l] == ranked


@pytest.mark.parametrize("steps", [(2, 5), (4, 5), (2, 4)])
def test_saturation_without_weights(files, watched, steps, tmp_path):
    """From the files of two steps as from their checkpoints."""
    run("routing", "--model", watched / f"step-{steps[0]:08}", "--later", watched / f"step-{steps[1]:08}", "--data",
        files.val, "--tokenizer", "bytes", "--seq", SEQ, "--out", tmp_path / "o.json")
    found = json.loads((tmp_path / "o.json").read_text())["saturation"]
    close(found, saturation(*(choices(watched, step) for step in steps)))
    assert any(0 < x < 1 for x in found["topk"])


@pytest.mark.parametrize("more", [[], ["--recompute", 2, "--lb", "global"]], ids=["plain", "recompute"])
def test_nothing_of_the_training_changes(files, tmp_path, more):
    outs = [tmp_path / name for name in ("alone", "watched")]
    for out, words in zip(outs, ([], ["--routing-every", 1])):
        run(*train_words(files, out, *more, *words))
    assert written(outs[0]) == [] and len(written(outs[1])) == 10
    for step in (2, 4, 5):
        for file in (outs[0] / f"step-{step:08}").iterdir():
            assert file.read_bytes() == (outs[1] / f"step-{step:08}" / file.name).read_bytes(), file
    alone, beside = ([without(json.loads(line), *TIMES) for line in (out / "log.jsonl").read_text().splitlines()]
                     for out in outs)
    assert alone[1:] == beside[1:] and len(alone) > 5       # the first has the options


def test_resuming(files, watched, tmp_path):
    """The files of a run that was stopped and went on are those of one that never stopped. What later steps of the
    first part wrote is gone."""
    out = tmp_path / "run"
    run(*train_words(files, out, "--routing-every", 2, "--steps", 3))
    assert written(out) == [f"routing-{step:08}.{kind}" for step in (2, 3) for kind in ("json", "npy")]
    shutil.rmtree(out / "step-00000003")
    run(*train_words(files, out, "--routing-every", 2, "--resume"))
    assert written(out) == written(watched)
    for name in written(watched):
        assert (out / name).read_bytes() == (watched / name).read_bytes(), name


@pytest.mark.parametrize("ranks, more", [(2, []), (4, ["--ep", 2, "--zero", 1]), (3, [])],
                         ids=["2", "4, experts over 2", "3"])
def test_ranks(files, tmp_path, ranks, more):
    """A step that changes no weight: what ranks change in them is another test's."""
    outs = [tmp_path / name for name in ("whole", "run")]
    shape = ["--steps", 1, "--batch", 1, "--global-batch", 12, "--routing-every", 1, "--lr", 0, "--min-lr", 0]
    run(*train_words(files, outs[0], *shape))
    run(*train_words(files, outs[1], *shape, *more), ranks=ranks)
    close(*(figures(out, 1) for out in outs))
    assert choices(outs[0], 1) == choices(outs[1], 1)


def test_at_most_20000_tokens(files, tmp_path):
    """Of whole pieces, spread evenly. Each piece is a token of its own, which a list of favourites then shows."""
    T, pieces = 1000, 47
    val = tokens(tmp_path / "val.npy", [v for v in range(200, 200 + pieces) for _ in range(T)])
    run(*train_words(files, tmp_path / "run", "--seq", T, "--batch", 1, "--steps", 1, "--routing-every", 1, val=[val]))
    found = figures(tmp_path / "run", 1)
    ids = sorted({one["id"] - 200 for layer in found["vocabulary"]["input"]["top"] for top in layer for one in top})
    assert found["tokens"] == len(choices(tmp_path / "run", 1)) == MOST
    assert len(ids) == MOST // T
    steps = [b - a for a, b in zip(ids, ids[1:])]
    assert max(steps) - min(steps) <= 1 and ids[0] <= max(steps) and pieces - 1 - ids[-1] <= max(steps)


def test_domains_of_documents(files, tmp_path):
    """As in `olmoe routing`"""
    r = random.Random(3)
    ids, lines = [], []
    for number in range(12):
        begin = len(ids)
        ids += [r.randrange(97, 123) for _ in range(r.randint(20, 60))] + [256]
        lines.append(f"{begin},{len(ids)},{r.choice(['plays', 'poems'])}-{number},x.jsonl,{number + 1}\n")
    val = tokens(tmp_path / "both.npy", ids)
    (tmp_path / "both.csv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    run(*train_words(files, tmp_path / "run", "--steps", 1, "--routing-every", 1, val=[val, files.val]))
    run("routing", "--model", tmp_path / "run" / "step-00000001", "--data", val, files.val, "--tokenizer", "bytes",
        "--seq", SEQ, "--out", tmp_path / "o.json")
    found = json.loads((tmp_path / "o.json").read_text())
    assert set(found["domains"]) == {"plays", "poems", "val"}
    close(without(figures(tmp_path / "run", 1), "step", "choices", "model"), without(found, "model"))


def test_documents_are_read_once(files, tmp_path):
    """What is wrong with a list of documents is said once, and a list that is gone later changes nothing."""
    val = tokens(tmp_path / "both.npy", [97 + i % 26 for i in range(2 * SEQ)])
    (tmp_path / "both.csv.gz").write_bytes(gzip.compress(b"0,7,plays-1,x.jsonl,1\n"))
    done = run(*train_words(files, tmp_path / "run", "--routing-every", 1, val=[val]))
    assert len(written(tmp_path / "run")) == 10 and done.stderr.count("the file is one domain") == 1, done.stderr


def refused(words, part):
    done = run(*words, code=1)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("olmoe: ") and done.stdout == "", done.stderr
    assert part in done.stderr


def test_bad_input(files, tmp_path):
    """One line, before the run's directory is there."""
    out = tmp_path / "run"
    words = train_words(files, out, "--routing-every", 2)
    at = words.index("--val")
    refused(words[:at] + words[at + 2:], "--routing-every needs --val")
    refused([*words, "--routing-every", -1], "--routing-every")
    shutil.copy(files.val, tmp_path / "val.other.npy")
    refused([*words, "--val", tmp_path / "val.other.npy"], "another file is named val")     # two of them, then
    assert not out.exists()
