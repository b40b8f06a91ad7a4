"""`olmoe routing`: which experts a model chooses, for which texts and words.

Against tests/fixtures/routing, what transformers and the definitions give in float64 (scripts/reference_routing.py),
and against models that are made here, whose routing is known: nothing but a token's class decides it. And what is
refused.

The program is ./olmoe, or what OLMOE names.
"""
import array
import base64
import ctypes
import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import reference_routing as reference

OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
FIXTURES = ROOT / "tests/fixtures/routing"
CASES = {path.parent.name: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*/expected.json"))}
RUNS = [(case, number) for case in CASES for number in range(len(CASES[case]["runs"]))]
KINDS = ("input", "target", "predicted")


def run(*words, ranks=1, code=0, **more):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    done = subprocess.run([*launcher, OLMOE, "routing", *map(str, words)], capture_output=True, text=True, timeout=300,
                          env=environment, **more)
    assert done.returncode == code, (done.stdout + done.stderr)[-3000:]
    return done


def routing(folder, *words, **more):
    """OUT.json"""
    run(*words, "--out", folder / "out.json", **more)
    return json.loads((folder / "out.json").read_text())


def assert_same(expected, found):
    wrong = reference.disagreement(expected, found)
    assert not wrong, wrong


# ------------------------------------------------------------------------------------------------
# Against transformers

def words_of(case, number):
    c, asked = CASES[case], CASES[case]["runs"][number]
    return ["--model", FIXTURES / case / "model", "--data", *(FIXTURES / file for file in asked["data"]),
            "--tokenizer", c["tokenizer"] if c["tokenizer"] == "bytes" else ROOT / c["tokenizer"],
            "--seq", asked["seq"], *(["--later", FIXTURES / case / "later"] if asked.get("later") else []),
            *(["--max-tokens", asked["max_tokens"]] if asked.get("max_tokens") else [])]


WAYS = [(case, number, 1, batch) for case, number in RUNS for batch in (1, 3)]
WAYS += [("three", 0, 2, 2), ("three", 0, 4, 1)]


@pytest.mark.parametrize("case, number, ranks, batch", WAYS)
def test_reference(case, number, ranks, batch, tmp_path):
    asked = CASES[case]["runs"][number]
    found = routing(tmp_path, *words_of(case, number), "--batch", batch, ranks=ranks)
    assert_same(asked["expected"], found)
    assert list(found["domains"]) == list(asked["expected"]["domains"])
    assert found.keys() - asked["expected"].keys() == {"model", "seq", "text", "texts"} | (
        {"later"} if asked.get("later") else set())
    assert found["seq"] == asked["seq"] and re.fullmatch("[0-9a-f]{16}", found["text"])


def test_fixture():
    """What makes the comparison tell something: ids whose experts are as frequent, so that the first met owns them;
    lists that are cut; experts that own nothing; K of 1 and 3, E that is odd; text in several alphabets, whole."""
    runs = [run["expected"] for c in CASES.values() for run in c["runs"]]
    assert {run["k"] for run in runs} >= {1, 3} and all(run["experts"] % 2 for run in runs)
    tops = [top for run in runs for kind in KINDS for layer in run["vocabulary"][kind]["top"] for top in layer]
    assert max(map(len, tops)) == reference.LONGEST and [] in tops
    assert any(one["share"] == 0.5 for top in tops for one in top)
    assert any(None in layer for run in runs for kind in KINDS for layer in run["vocabulary"][kind]["by_expert"])
    assert all(0 < x < 1 for run in runs if "saturation" in run for kind in ("top1", "topk")
               for x in run["saturation"][kind])
    text = (FIXTURES / "many alphabets.v1.txt").read_bytes()
    assert text != text.strip() and b"\r\n" in text and len(text) > len(text.decode())


@pytest.mark.parametrize("case, number", [(case, number) for case, number in RUNS
                                          if "on_page" in CASES[case]["runs"][number]])
def test_page(case, number, tmp_path):
    """What it says of each position: experts, their weights, the loss of the token; and where pieces begin."""
    asked = CASES[case]["runs"][number]
    wanted, of = asked["on_page"], asked["expected"]
    run(*words_of(case, number), "--out", tmp_path / "out.json", "--page", tmp_path / "page.html", "--batch", 2)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>',
                                (tmp_path / "page.html").read_text(), re.S)[1])
    assert_same({key: of[key] for key in ("layers", "experts", "k", "tokens", "router")} | {
        "of": of["tokens"], "saturation": of.get("saturation"),
        "domains": [{"name": name, **{key: domain[key] for key in ("tokens", "counts")}}
                    for name, domain in of["domains"].items()]}, data)
    assert base64.b64decode(data["choices"]) == base64.b64decode(wanted["choices"])
    weights = [base64.b64decode(page["weights"]) for page in (wanted, data)]
    assert len(weights[0]) == len(weights[1]) and all(abs(a - b) <= 1 for a, b in zip(*weights))
    losses = struct.unpack(f"<{of['tokens']}H", base64.b64decode(data["losses"]))
    assert all(abs(a - b) <= 1 for a, b in zip(losses, wanted["losses"]))
    begins = {section["begin"]: section["piece"] for section in data["sections"]}
    assert list(begins) == sorted(begins)
    T = asked["seq"]
    assert all(begins.get(begin) == begin // T for begin in range(0, of["tokens"], T))
    assert all(begins[begin] == begin // T for begin in begins)
    assert_same([[[{key: one[key] for key in ("share", "count")} for one in expert] for expert in layer]
                 for layer in of["vocabulary"]["input"]["top"]], data["top"])
    ids = struct.unpack(f"<{of['tokens']}H", base64.b64decode(data["ids"]))
    assert sorted(set(ids)) == list(range(len(data["vocab"])))


# ------------------------------------------------------------------------------------------------
# Models whose routing is known: all that attention and experts add is zero, so that a position is its token's embedding
# in all layers. Token v is of class v % C, and its embedding is 1 in that place.

EPS = 1e-5


class Designed:
    """scores[l][e][c]: of the router of layer l for expert e on class c. follows[c]: the id that is predicted."""

    def __init__(self, scores, K, follows, V=300, T=64, **more):
        self.scores, self.K, self.follows, self.V, self.T, self.more = scores, K, follows, V, T, more
        self.L, self.E, self.C = len(scores), len(scores[0]), len(scores[0][0])

    def tensors(self):
        C, F = self.C, 2
        zero, one = [0.0] * (C * C), [1.0] * C
        yield "model.embed_tokens", (self.V, C), [float(v % C == c) for v in range(self.V) for c in range(C)]
        for l, scores in enumerate(self.scores):
            layer = f"model.layers.{l}."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{layer}self_attn.{name}", (C, C), zero
            for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
                yield layer + name, (C,), one
            yield layer + "mlp.gate", (self.E, C), [x for row in scores for x in row]
            for e in range(self.E):
                for name, shape in (("gate_proj", (F, C)), ("up_proj", (F, C)), ("down_proj", (C, F))):
                    yield f"{layer}mlp.experts.{e}.{name}", shape, zero[:C * F]
        yield "model.norm", (C,), one
        yield "lm_head", (self.V, C), [float(self.follows[c] == v) for v in range(self.V) for c in range(C)]

    def write(self, folder):
        header, parts, end = {}, [], 0
        for name, shape, numbers in self.tensors():
            parts.append(array.array("f", numbers).tobytes())
            begin, end = end, end + len(parts[-1])
            header[name + ".weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        folder.mkdir()
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
        config = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu",
                  "vocab_size": self.V, "hidden_size": self.C, "intermediate_size": 2, "num_hidden_layers": self.L,
                  "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": self.E,
                  "num_experts_per_tok": self.K, "max_position_embeddings": self.T, "rms_norm_eps": EPS,
                  "rope_theta": 10000.0, "norm_topk_prob": False, "eos_token_id": self.V - 1, "pad_token_id": None,
                  "tie_word_embeddings": False, **self.more}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def logits(self, ids):
        scale = 1 / math.sqrt(1 / self.C + EPS)
        return [[[row[v % self.C] * scale for row in scores] for v in ids] for scores in self.scores]

    def expected(self, files, T, later=None):
        """What `olmoe routing` finds in (domain, ids), a piece of T at a time."""
        x = reference.Positions()
        for domain, ids in files:
            ids = ids[:len(ids) // T * T]
            x.ids += ids
            x.targets += [None if (n + 1) % T == 0 else ids[n + 1] for n in range(len(ids))]
            x.domains += [domain] * len(ids)
            x.losses += [None if n % T == 0 else 0 for n in range(len(ids))]
        x.predicted = [self.follows[v % self.C] for v in x.ids]
        x.layers = self.logits(x.ids)
        x.later = later.logits(x.ids) if later else None
        return reference.analyse(x, self.K)


def tokens(path, ids):
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    return path


def orders(*of_classes, E):
    """Scores of one layer that put experts into these orders, of each class; those that are not named follow."""
    full = [[*order, *(e for e in range(E) if e not in order)] for order in of_classes]
    return [[1 - 0.25 * order.index(e) for order in full] for e in range(E)]


def drawn(r, L=2, E=6, C=8):
    """Scores, all different in a layer."""
    def layer():
        order = [r.sample(range(E), E) for _ in range(C)]
        return orders(*order, E=E)
    return [layer() for _ in range(L)]


HAND = Designed([orders([0, 1, 2], [1, 2, 3], [2, 0, 3], [0, 3, 2], E=5)], 3, [22, 22, 11, 11], V=40)


def test_by_hand(tmp_path):
    """Tokens 0 1 2 3 in 12 pieces, with experts 0 1 2, 1 2 3, 2 0 3 and 0 3 2, a tail; 22 22 11 11 are predicted."""
    found = routing(tmp_path, "--model", HAND.write(tmp_path / "m"), "--data",
                    tokens(tmp_path / "x.npy", [0, 1, 2, 3] * 12 + [1, 1, 1]), "--seq", 4)
    assert found["tokens"] == found["domains"]["x"]["tokens"] == 48 and found["model"] == str(tmp_path / "m")
    assert (found["layers"], found["experts"], found["k"], found["seq"]) == (1, 5, 3, 4)
    assert found["domains"]["x"]["counts"] == [[36, 24, 48, 36, 0]]
    assert found["domains"]["x"]["top1"] == [[24, 12, 12, 0, 0]]
    assert found["coactivation"] == [[[36, 12, 36, 24, 0], [12, 24, 24, 12, 0], [36, 24, 48, 36, 0],
                                      [24, 12, 36, 36, 0], [0] * 5]]
    # 0-1, 1-2; 1-2, 2-3; 2-0, 0-3; 0-3, 3-2
    assert found["coactivation_ranked"] == [[[0, 12, 12, 24, 0], [12, 0, 24, 0, 0], [12, 24, 0, 24, 0],
                                             [24, 0, 24, 0, 0], [0] * 5]]
    assert found["router"]["dead"] == [1] and found["router"]["max_over_mean"] == [pytest.approx(48 / 28.8)]

    def one(token, share=1.0, count=12):
        return {"id": token, "share": share, "count": count}
    v = found["vocabulary"]
    assert v["input"] == {"by_layer": [1], "by_expert": [[1, 1, 1, None, None]],
                          "top": [[[one(0), one(3)], [one(1)], [one(2)], [], []]]}
    # 3 is followed by nothing, and nothing by 0
    assert v["target"] == {"by_layer": [1], "by_expert": [[1, 1, 1, None, None]],
                           "top": [[[one(1)], [one(2)], [one(3)], [], []]]}
    # 22 by expert 0 and then 1, 11 by 2 and then 0
    assert v["predicted"] == {"by_layer": [0.5], "by_expert": [[0.5, None, 0.5, None, None]],
                              "top": [[[one(22, 0.5, 24)], [], [one(11, 0.5, 24)], [], []]]}
    assert "saturation" not in found and found.get("texts", {}) == {}


def test_lists_of_ids(tmp_path):
    """The best share first, then the most frequent, then the lowest id; not those that occur 9 times; 15 at most. As
    inputs all have the share 1, as targets what was before them decides."""
    model = Designed([orders([0], [0], [1], [2], E=3)], 1, [9, 9, 9, 9], V=100)
    often, rest = [32, 48, 64, 80], [20, 24, 28, 36, 40, 44, 52, 56, 60, 68, 72, 76, 84]
    ids = often * 12 + rest * 10 + [8] * 9 + [4] * 11 + [2, 3] * 20
    random.Random(1).shuffle(ids)
    ids += [3] * (-len(ids) % 6)
    found = routing(tmp_path, "--model", model.write(tmp_path / "m"), "--data", tokens(tmp_path / "x.npy", ids),
                    "--seq", 6)
    top = found["vocabulary"]["input"]["top"][0]
    assert [one["id"] for one in top[0]] == often + [4] + rest[:10]
    assert [[one["id"] for one in expert] for expert in top[1:]] == [[2], [3]]
    x = model.expected([("x", ids)], 6)
    assert len({one["share"] for one in x["vocabulary"]["target"]["top"][0][0]}) > 3
    assert_same(x, found)


@pytest.mark.parametrize("batch, ranks, ep", [(1, 1, 1), (5, 1, 1), (64, 1, 1), (2, 2, 1), (1, 4, 2), (64, 2, 2)])
def test_equally_frequent_experts(batch, ranks, ep, tmp_path):
    """The one that was met first owns the id: in the order of reading, also where ranks and micro-batches meet another
    one earlier. Many ids occur as the targets of a few classes, as often of each. There are 49 pieces: of a micro-batch
    of 64 a second rank gets none."""
    r = random.Random(5)
    model = Designed(drawn(r), 2, [100, 100, 101, 101, 101, 102, 103, 100])
    ids = [[r.randrange(60) for _ in range(n)] for n in (5 * 37 + 3, 5 * 12)]
    x = model.expected([("a", ids[0]), ("b", ids[1])], 5)
    firsts, met = [reference.choose(z, 1)[0] for z in zip(*model.scores[0])], {}
    for before, target in ((of[n], of[n + 1]) for of in ids for n in range(len(of) // 5 * 5) if n % 5 < 4):
        met.setdefault(target, []).append(firsts[before % 8])
    best = [[e for e in experts if experts.count(e) == max(map(experts.count, experts))] for experts in met.values()]
    assert min(sum(of[0] > min(of) for of in best), sum(of[0] < max(of) for of in best)) > 3
    paths = [tokens(tmp_path / f"{name}.npy", of) for name, of in zip("ab", ids)]
    found = routing(tmp_path, "--model", model.write(tmp_path / "m"), "--data", *paths, "--seq", 5, "--batch", batch,
                    "--ep", ep, ranks=ranks)
    assert_same(x, found)


def test_equal_logits(tmp_path):
    """The lower number is chosen, and stands first; all is as uniform as can be, but for the counts."""
    model = Designed([[[0.0] * 4] * 6], 2, [7] * 4, V=40)
    found = routing(tmp_path, "--model", model.write(tmp_path / "m"), "--data",
                    tokens(tmp_path / "x.npy", list(range(30))), "--seq", 10)
    assert found["domains"]["x"]["counts"] == [[30, 30, 0, 0, 0, 0]]
    assert found["domains"]["x"]["top1"] == [[30, 0, 0, 0, 0, 0]]
    assert found["router"] == {"entropy": [pytest.approx(math.log(6))], "max_over_mean": [pytest.approx(3)],
                               "dead": [4], "mean_logit": [0], "max_logit": [0]}
    assert found["load_balancing_loss"] == pytest.approx(2)     # K: what is chosen does not matter where p is uniform


def test_saturation(tmp_path):
    """Of the same experts in another order, of others, and of a checkpoint against itself."""
    models = [Designed([orders(*of, E=4)], 2, [7] * 4, V=40) for of in (
        ([0, 1], [0, 1], [0, 1], [0, 1]), ([0, 1], [1, 0], [0, 2], [2, 3]))]
    folders = [model.write(tmp_path / name) for model, name in zip(models, "mn")]
    ids = [0] * 5 + [1] * 3 + [2] * 3 + [3]
    words = ["--data", tokens(tmp_path / "x.npy", ids), "--seq", 3]
    for pair, top1, topk in ((folders, 8 / 12, 9.5 / 12), (folders[::-1], 8 / 12, 9.5 / 12), (folders[:1] * 2, 1, 1)):
        found = routing(tmp_path, "--model", pair[0], "--later", pair[1], *words)
        assert found["saturation"] == {"top1": [pytest.approx(top1)], "topk": [pytest.approx(topk)]}
        assert found["later"] == str(pair[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_later_model_of_another_width(tmp_path, ranks):
    """Whose classes are other ones; in micro-batches, over two files."""
    r = random.Random(8)
    models = [Designed(drawn(r, C=C), 2, [9] * C) for C in (8, 4)]
    ids = [[r.randrange(60) for _ in range(n)] for n in (100, 45)]
    paths = [tokens(tmp_path / f"{name}.npy", of) for name, of in zip("ab", ids)]
    found = routing(tmp_path, "--model", models[0].write(tmp_path / "m"), "--later", models[1].write(tmp_path / "n"),
                    "--data", *paths, "--seq", 6, "--batch", 3, ranks=ranks)
    assert_same(models[0].expected(list(zip("ab", ids)), 6, models[1]), found)


# ------------------------------------------------------------------------------------------------
# Files

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A designed model, and its directory"""
    m = Designed(drawn(random.Random(3)), 2, [101, 32, 44, 101, 32, 10, 116, 101], V=261)
    m.folder = m.write(tmp_path_factory.mktemp("routing") / "model")
    return m


def words(model, *data, seq=16):
    return ["--model", model.folder, "--seq", seq, "--data", *data]


TEXT = "\n\t\r\n\u3000 A line\r\nthat ends as on Windows, \ttabs, \x0b\x0c caf\u00e9 \ufeff\U0001f642 " * 5
TEXT += " \n\u2003 "


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "a name.with.dots.txt", "\u6c34\u0440.v2.txt.gz",
                                  os.fsdecode(b"caf\xe9.txt")])
def test_text_is_kept_as_it_is(model, tmp_path, name):
    """All bytes of a text are its tokens, from the first to the last: white space at both ends, and ends of lines."""
    raw = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = routing(tmp_path, *words(model, tmp_path / name, seq=7), "--tokenizer", "bytes", "--batch", 3)
    domain = os.fsencode(name).split(b".")[0].decode(errors="replace")
    assert_same(model.expected([(domain, list(raw))], 7), found)
    listed = {str(one["id"]) for kind in KINDS for layer in found["vocabulary"][kind]["top"] for top in layer
              for one in top}
    assert found["texts"].keys() == listed and len(listed) > 10
    assert all(found["texts"][i] == chr(int(i)) for i in listed if int(i) < 128)


def test_hash_of_the_text(model, tmp_path):
    """The same for the same tokens, from whatever files; another one where a token differs. A tail does not count."""
    r = random.Random(2)
    ids = [r.randrange(32, 127) for _ in range(64)]
    (tmp_path / "a.txt").write_bytes(bytes(ids))
    files = {"same": [ids], "tail": [ids + [1] * 15], "in two": [ids[:32], ids[32:]], "another": [ids[:-1] + [5]],
             "in another order": [ids[32:], ids[:32]]}
    hashes = {"text": routing(tmp_path, *words(model, tmp_path / "a.txt"), "--tokenizer", "bytes")["text"]}
    for name, parts in files.items():
        paths = [tokens(tmp_path / f"{name}{i}.npy", part) for i, part in enumerate(parts)]
        hashes[name] = routing(tmp_path, *words(model, *paths), "--batch", 2)["text"]
    assert hashes["text"] == hashes["same"] == hashes["tail"] == hashes["in two"]
    assert len({hashes["same"], hashes["another"], hashes["in another order"]}) == 3


def documents(path, lengths, names):
    """A token file, and beside it the list of its documents."""
    r, ids, lines = random.Random(4), [], []
    for number, (length, name) in enumerate(zip(lengths, names)):
        begin = len(ids)
        ids += [*(r.randrange(256) for _ in range(length - 1)), 256]
        lines.append(f'{begin},{len(ids)},"{name}",x.jsonl,{number + 1}\n')
    tokens(path, ids)
    path.with_suffix(".csv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return ids


@pytest.mark.parametrize("names, domains", [
    (["plays-1", "poems-2", "plays-3-x", "poems-4"], ["plays", "poems"]), (["one-1", "one-2", "one-3", "one-4"], None),
    (["whole", "caf\u00e9 x-2", "whole-3", "whole"], ["whole", "caf\u00e9 x"])], ids=["two", "one", "without a -"])
def test_domains_of_documents(model, tmp_path, names, domains):
    """A position is of its document's domain; with one domain, or more than 64, the file is one of its own."""
    lengths = [13, 27, 5, 25]
    ids = documents(tmp_path / "x.y.npy", lengths, names)
    of = [name.split("-")[0] if domains else "x" for name, n in zip(names, lengths) for _ in range(n)]
    found = routing(tmp_path, *words(model, tmp_path / "x.y.npy"), "--batch", 3)
    assert list(found["domains"]) == (domains or ["x"])
    for name, got in found["domains"].items():
        counts = [[0] * model.E for _ in model.scores]
        for v, domain in zip(ids[:64], of[:64]):
            for l, scores in enumerate(model.scores):
                for e in reference.choose([row[v % model.C] for row in scores], model.K):
                    counts[l][e] += domain == name
        assert got["tokens"] == of[:64].count(name) and got["counts"] == counts


def test_many_domains_of_documents(model, tmp_path):
    """64 are domains, 65 are too many; a domain without a position has no loss."""
    for n in (64, 65):
        documents(tmp_path / "x.npy", [3] * n + [40] * 1, [f"d{i}-1" for i in range(n)] + ["d0-2"])
        found = routing(tmp_path, *words(model, tmp_path / "x.npy"), "--max-tokens", 3 * n + 16)
        assert list(found["domains"]) == ([f"d{i}" for i in range(64)] if n == 64 else ["x"])
    documents(tmp_path / "x.npy", [20, 20], ["a-1", "b-1"])
    found = routing(tmp_path, *words(model, tmp_path / "x.npy"), "--max-tokens", 16)
    assert [d["tokens"] for d in found["domains"].values()] in ([16], [16, 0])
    if "b" in found["domains"]:
        assert found["domains"]["b"]["load_balancing_loss"] is None
        assert found["domains"]["b"]["counts"] == [[0] * model.E] * model.L


def test_most_tokens_of_each_file(model, tmp_path):
    """Whole pieces of each file; more than there are is all. The default of --seq is the positions of the model."""
    r = random.Random(6)
    ids = {name: [r.randrange(256) for _ in range(n)] for name, n in (("a", 200), ("b", 70))}
    paths = [tokens(tmp_path / f"{name}.npy", of) for name, of in ids.items()]
    for most, seq in ((64, 16), (79, 16), (10**9, 16), (None, None)):
        found = routing(tmp_path, "--model", model.folder, "--data", *paths, *(["--seq", seq] if seq else []),
                        *(["--max-tokens", most] if most else []))
        T = seq or model.T
        assert_same(model.expected([(name, of[:(most or 10**9) // T * T]) for name, of in ids.items()], T), found)


def test_page_of_a_large_shape(tmp_path):
    """As many of the first tokens of each file as fit, which it says."""
    r = random.Random(2)
    model = Designed(drawn(r, L=40, E=24), 20, [9] * 8)
    paths = [tokens(tmp_path / f"{name}.npy", [r.randrange(300) for _ in range(4000)]) for name in "ab"]
    said = run("--model", model.write(tmp_path / "m"), "--data", *paths, "--seq", 64, "--out", tmp_path / "o.json",
               "--page", tmp_path / "o.html", "--batch", 16).stdout
    text = (tmp_path / "o.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])
    n = data["tokens"]
    assert 7_000_000 < len(text) <= 8_000_000
    assert data["of"] == 2 * 62 * 64 and f"{n} of the {data['of']} tokens" in said
    assert len(base64.b64decode(data["choices"])) == n * 40 * 20 and len(base64.b64decode(data["ids"])) == 2 * n
    halves = [section["begin"] for section in data["sections"] if section["domain"] == 1]
    assert abs(halves[0] - n / 2) <= 64


def test_pieces_of_one_token(model, tmp_path):
    """None has a target: null in the file, and a dash in the table."""
    data = tokens(tmp_path / "x.npy", range(40))
    done = run(*words(model, data, seq=1), "--out", tmp_path / "o.json")
    assert_same(model.expected([("x", list(range(40)))], 1), json.loads((tmp_path / "o.json").read_text()))
    rows = [line.split() for line in done.stdout.splitlines()[-model.L:]]
    assert [row[5] for row in rows] == ["-"] * model.L and "nan" not in done.stdout


@pytest.mark.parametrize("pieces, of_each", [((200, 3, 12), (200, 3, 12)), ((400, 3, 400), (155, 3, 155))])
def test_page_of_long_and_short_files(model, tmp_path, pieces, of_each):
    """Where files together have more than 20,000 tokens, each has as many on the page, or all that it has."""
    paths = [tokens(tmp_path / f"{name}.npy", [7] * (64 * n)) for name, n in zip("abc", pieces)]
    run(*words(model, *paths, seq=64), "--out", tmp_path / "o.json", "--page", tmp_path / "o.html", "--batch", 64)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', (tmp_path / "o.html").read_text(), re.S)[1])
    found = [sum(section["domain"] == i for section in data["sections"]) for i in range(3)]
    assert found == [*of_each] and data["tokens"] == min(20_000, 64 * sum(pieces)), found


# ------------------------------------------------------------------------------------------------
# What is refused, and what stays on the disk

def refused(tmp_path, *given, part):
    """One line, that says so; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    done = run(*given, code=1, cwd=tmp_path)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("olmoe: ") and done.stdout == "", done.stderr
    assert all(p in done.stderr for p in ([part] if isinstance(part, str) else part)), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


BYTES = ["--tokenizer", "bytes"]
NAMED = {                   # contents of a file, options, and what the line has to say
    "empty.txt": (b"", BYTES, ["empty.txt", "0"]), "short.txt": (b"x" * 15, BYTES, ["short.txt", "15", "16"]),
    "empty.npy": (b"", [], ["empty.npy"]), "short.npy": (b"\1\0" * 15, [], ["short.npy", "15", "16"]),
    "x.md": (b"text" * 20, BYTES, ["x.md", ".txt"]), "x": (b"text" * 20, BYTES, ["x:", ".txt"]),
    "x.jsonl": (b'{"text": ""}\n' * 20, BYTES, "x.jsonl"), "x.csv.gz": (gzip.compress(b"text" * 20), BYTES, "x.csv.gz"),
    "x.txt.zst": (b"text" * 20, BYTES, ["x.txt.zst"]),
    ".txt": (b"text" * 20, BYTES, "no name is left"), "x.txt": (b"text" * 20, [], ["x.txt", "--tokenizer"]),
    "packed.txt": (b"PK\3\4" + bytes(range(99)), BYTES, ["packed.txt", "zip"]),
    "array.txt": (b"\x93NUMPY" + bytes(range(99)), BYTES, ["array.txt"]),
    "binary.txt": (random.Random(1).randbytes(300), BYTES, ["binary.txt", "not text"]),
    "wide.txt": ("\ufefftext of UTF-16".encode("utf-16-le"), BYTES, ["wide.txt", "UTF-16"]),
    "wide.txt.gz": (gzip.compress("\ufefftext of UTF-16".encode("utf-16-be")), BYTES, ["wide.txt.gz", "UTF-16"]),
    "cut.txt.gz": (gzip.compress(os.urandom(400))[:200], BYTES, ["cut.txt.gz", "damaged"]),
    "text.npy": (b"The text of a file that is named as if it held tokens. " * 9, [], ["text.npy", "text"]),
    "outside.npy": (struct.pack("<40H", *range(30), 261, *range(9)), [], ["outside.npy", "261"]),
    "x.bin": (b"\1\0" * 40, [], ["x.bin"]),
}


@pytest.mark.parametrize("name", NAMED)
def test_bad_files(model, tmp_path, name):
    raw, more, part = NAMED[name]
    (tmp_path / name).write_bytes(raw)
    refused(tmp_path, *words(model, name), *more, "--out", "o.json", "--page", "o.html", part=part)


def test_a_name_that_says_gzip_or_does_not(model, tmp_path):
    """Text that is packed under the name of one that is not: read as what it is, or refused; never its packed bytes."""
    (tmp_path / "x.txt").write_bytes(gzip.compress(TEXT.encode()))
    words_of_it = [*words(model, tmp_path / "x.txt"), *BYTES, "--out", tmp_path / "o.json"]
    done = subprocess.run([OLMOE, "routing", *map(str, words_of_it)], capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        assert_same(model.expected([("x", list(TEXT.encode()))], 16), json.loads((tmp_path / "o.json").read_text()))
    else:
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "x.txt" in done.stderr


def test_bad_options(model, tmp_path):
    data = tokens(tmp_path / "x.npy", range(256))
    (tmp_path / "x.txt").write_bytes(b"text" * 20)
    (tmp_path / "folder.txt").mkdir()
    documents(tmp_path / "docs.npy", [40, 40], ["x-1", "y-1"])
    for name, more in (("layers", dict(num_hidden_layers=1)), ("experts", dict(num_experts=5)),
                       ("K", dict(num_experts_per_tok=1)), ("V", dict(vocab_size=262))):
        shutil.copytree(model.folder, tmp_path / name)
        config = json.loads((model.folder / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **more}))
    whole = [*words(model, data), "--out", "o.json"]
    for given, part in (
            (whole[2:], "routing needs --model DIR"), (whole[:-2], "routing needs --out OUT.json"),
            (["--model", model.folder, "--out", "o.json"], "routing needs --data FILES"),
            ([*whole, "--page", "o.json"], "the same file"), ([*whole, "--page", "./o.json"], "the same file"),
            ([*whole, "--max-tokens", 15], ["--max-tokens 15", "16"]), ([*whole, "--seq", 65], ["65", "64"]),
            ([*whole, "--out", "no/o.json"], "no/o.json"), ([*whole, "--page", "no/o.html"], "no/o.html"),
            ([*whole, "--out", tmp_path], "it is a directory"), ([*whole, "--page", tmp_path], "it is a directory"),
            ([*whole, "--later", "layers"], "--later layers"), ([*whole, "--later", "experts"], "--later experts"),
            ([*whole, "--later", "K"], "--later K"), ([*whole, "--later", "V"], "--later V"),
            ([*whole, "--later", "none"], "none"), ([*whole, "--model", "none"], "none"),
            ([*words(model, "x.npy", "x.txt"), *BYTES, "--out", "o.json"], "another file is named x"),
            ([*words(model, "x.npy", tmp_path / "x.npy"), "--out", "o.json"], "another file is named x"),
            ([*words(model, "docs.npy", "./docs.npy"), "--out", "o.json"], "another file is named docs"),
            ([*words(model, "x.npy", "docs.npy"), "--out", "x.npy"], "--out x.npy is a file of --data"),
            ([*whole, "--page", "./x.npy"], "--page ./x.npy is a file of --data"),
            ([*words(model, "x.npy", "docs.npy"), "--out", "o.json"], "domain"),
            ([*words(model, "docs.npy", "x.npy"), "--out", "o.json"], "domain"),
            ([*words(model, "none.txt"), *BYTES, "--out", "o.json"], "none.txt: cannot be read: No such file"),
            ([*words(model, "none.npy"), "--out", "o.json"], "none.npy: cannot be read: No such file"),
            ([*words(model, "folder.txt"), *BYTES, "--out", "o.json"], "folder.txt: not a regular file"),
            ([*whole, "--tokenizer", ROOT / reference.WORDS], "don't fit the model's vocabulary of 261"),
            ([*whole, "--batch", 0], "--batch"), ([*whole, "--ep", 2], "--ep")):
        refused(tmp_path, *given, part=part)


def test_ranks_that_see_other_files(model, tmp_path):
    """As where a disk is not shared"""
    folders = [tmp_path / name for name in "ab"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        tokens(folder / "f.npy", [*range(50), number, *range(50)])
    given = list(map(str, [OLMOE, "routing", *words(model, "f.npy", seq=20), "--out", "o.json", "--timeout", 20]))
    done = subprocess.run(["mpirun", "--allow-run-as-root", "--oversubscribe", "-wdir", folders[0], "-np", "1", *given,
                           ":", "-wdir", folders[1], "-np", "1", *given], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and done.stdout == ""
    assert "olmoe: rank 1: the files of --data are not those that rank 0 sees" in done.stderr


@pytest.mark.parametrize("which", ["--model", "--later"])
@pytest.mark.parametrize("tensor", ["lm_head", "model.layers.1.mlp.gate"])
def test_damaged_weights(model, tmp_path, which, tensor):
    """A later model's head does not matter; its routers do."""
    if which == "--later" and tensor == "lm_head":
        tensor = "model.embed_tokens"
    damaged = tmp_path / "damaged"
    shutil.copytree(model.folder, damaged)
    raw = bytearray((damaged / "model.safetensors").read_bytes())
    size = struct.unpack("<Q", raw[:8])[0]
    begin, end = json.loads(raw[8:8 + size])[tensor + ".weight"]["data_offsets"]
    raw[8 + size + begin:8 + size + end] = struct.pack("<f", math.nan) * ((end - begin) // 4)
    (damaged / "model.safetensors").write_bytes(raw)
    tokens(tmp_path / "x.npy", range(200))
    given = [*words(model, "x.npy"), which, damaged]        # the last of two counts
    refused(tmp_path, *given, "--out", "o.json", "--page", "o.html", part="not finite; are the model's weights damaged")


def test_what_cannot_be_written(model, tmp_path):
    data = tokens(tmp_path / "x.npy", range(200))
    for option in ("--out", "--page"):
        given = ["--out", tmp_path / "o.json", "--page", tmp_path / "o.html", option, "/dev/full"]
        done = run(*words(model, data), *given, code=1)
        assert done.stderr == "olmoe: cannot write /dev/full: No space left on device\n"
    (tmp_path / "o.json").write_text("before")
    run(*words(model, data), "--out", tmp_path / "o.json")
    assert json.loads((tmp_path / "o.json").read_text())["tokens"] == 192
    assert {path.name for path in tmp_path.iterdir()} <= {"x.npy", "o.json", "o.html"}


PR_SET_THP_DISABLE = 41     # of prctl


def started(model, data, out, *more):
    """On one thread: several would take longer where other programs run. Without huge pages: the stacks of threads take
    more of them by and by."""
    given = [*(words(model, data) if model else ["--data", data]), *BYTES, "--batch", 256, "--out", out, *more]
    return subprocess.Popen([OLMOE, "routing", *map(str, given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))


def most_memory(process, code=0):
    """The largest RssAnon in KB while it runs: without pages of files, which any other program may take away."""
    most = 0
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        except (FileNotFoundError, ProcessLookupError):
            found = None
        most = max(most, int(found[1]) if found else 0)
        time.sleep(0.002)
    assert process.returncode == code, process.stderr.read()
    return most


def test_memory_does_not_grow_with_the_tokens(model, tmp_path):
    """Four times the tokens, which two models read, take less than a byte more for each of them. All micro-batches are
    the same: products of new shapes take memory for themselves. What is there once is in use before half of them."""
    r, N = random.Random(9), 256 * 16
    ids = [r.randrange(256) for _ in range(N)]
    paths = [tokens(tmp_path / f"{n}.npy", ids * n) for n in (20, 80)]
    small, large = (most_memory(started(model, path, tmp_path / "o.json", "--later", model.folder)) for path in paths)
    print(f"{small} kB for {20 * N} tokens, {large} kB for {80 * N}")
    assert small > 1000 and (large - small) * 1024 < 60 * N


def test_memory_does_not_grow_with_the_text(tmp_path):
    """It becomes tokens a part at a time. Texts that are all read, because they are found to be too short then."""
    long = Designed(drawn(random.Random(1), L=1), 1, [0] * 8, V=1007, T=1 << 20).write(tmp_path / "m")
    sizes = [500_000, 5_000_000]
    for n in sizes:
        (tmp_path / f"{n}.txt").write_bytes(b" the people of this world" * (n // 25))
    processes = [started(None, tmp_path / f"{n}.txt", tmp_path / "o.json", "--model", long, "--seq", 1 << 20,
                         "--tokenizer", ROOT / reference.WORDS) for n in sizes]
    small, large = (most_memory(process, code=1) for process in processes)
    assert all("less than one piece" in process.stderr.read() for process in processes)
    print(f"{small} kB for {sizes[0]} bytes, {large} kB for {sizes[1]}")
    assert small > 1000 and (large - small) * 1024 < (sizes[1] - sizes[0]) / 5      # as many tokens, at most


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stop_leaves_nothing(model, tmp_path, number):
    """The file that was there stays; no part of a new one, and no temporary file."""
    out, text = tmp_path / "o.json", tmp_path / "x.txt"
    text.write_bytes(b"word or two\n" * 100_000)
    out.write_text("before")
    with started(model, text, out, "--later", model.folder, "--page", tmp_path / "o.html") as process:
        while int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")")[1].split()[11]) < 20:
            time.sleep(0.01)                                    # until it has computed for a fifth of a second
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == -number
    assert out.read_text() == "before" and sorted(path.name for path in tmp_path.iterdir()) == ["o.json", "x.txt"]
