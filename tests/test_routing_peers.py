"""`olmoe routing` against others:

  transformers in float64, on shapes drawn by a seed: scripts/reference_routing.py says what it finds
  the definitions of the paper's section 5, in NumPy, on real texts with OLMoE's tokenizer, where OLMOE_DATA has text/
  and tokenizer/

Run by `make test-peers`. PEER_SEED repeats a run, PEER_SHAPES sets the number of shapes, OLMOE is the FP32 program.

All choices have to be the same, so all have to be sure: what has two router logits nearer than SURE, or two likeliest
tokens, is drawn again.
"""
import array
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
DATA = Path(os.environ.get("OLMOE_DATA") or "/nowhere").resolve()     # links lead there
SEED = int(os.environ.get("PEER_SEED") or random.SystemRandom().randrange(10**6))
SHAPES = int(os.environ.get("PEER_SHAPES", 6))
SURE = 5e-6                 # of logits: ten of float32's roundings of them, and more
TEXTS, TOKENS, PIECE = ["arxiv", "github_oss_with_stack", "wikipedia"], 2100, 256
TEXT_SEED = 1               # of a model that is sure on these texts


@pytest.fixture(scope="module", autouse=True)
def peers(request):
    """scripts/reference_routing.py as a module. The seed is printed once, and with every failure."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nPEER_SEED={SEED}: {SHAPES} shapes", flush=True)
    os.environ.update(HF_HUB_OFFLINE="1")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import reference
        import reference_routing
    except SystemExit:
        pytest.fail("test_routing_peers.py needs torch and transformers: run it by `make test-peers`", pytrace=False)
    reference.quiet()
    reference.torch.set_num_threads(1)      # small products: several threads only help where nothing else runs
    return reference_routing


def routing(folder, *words):
    words = [OLMOE, "routing", *map(str, words), "--out", str(folder / "out.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"PEER_SEED={SEED} {' '.join(words)}\n{done.stderr}{done.stdout}"
    return json.loads((folder / "out.json").read_text())


def draw(number):
    """(options of reference.py, of the run). The first shapes each hold one special case."""
    r = random.Random(f"{SEED} routing {number}")
    heads, E = r.randint(1, 4), r.randint(2, 12)
    shape = dict(layers=r.randint(1, 3), heads=heads, hidden=heads * r.choice([4, 6, 10]), vocab=r.randint(16, 300),
                 experts=E, topk=r.randint(1, E), width=r.randint(1, 30), norm_topk_prob=r.random() < 0.5,
                 rope_theta=r.choice([100.0, 10000.0]), rms_norm_eps=r.choice([1e-6, 1e-3]), eos=0)
    special = [dict(topk=1), dict(topk=E), dict(experts=64, topk=8, layers=1), dict(experts=1, topk=1)]
    shape |= special[number] if number < len(special) else {}
    return shape, dict(seq=r.randint(1, 60), batch=r.randint(1, 5), files=r.randint(1, 3), later=r.random() < 0.6,
                       most=r.choice([None, 100]))


def draw_tokens(r, V, count):
    """Few ids often, and many seldom."""
    often = [r.randrange(V) for _ in range(6)]
    return [r.choice(often) if r.random() < 0.4 else r.randrange(V) for _ in range(count)]


@pytest.mark.parametrize("number", range(SHAPES))
def test_transformers(peers, number, tmp_path):
    import torch
    shape, o = draw(number)
    print(f"PEER_SEED={SEED} {json.dumps({**shape, **o})}")
    K = shape["topk"]
    for attempt in range(20):
        r = random.Random(f"{SEED} routing {number} {attempt}")
        peers.draw_models(shape, r.randrange(10**6), tmp_path)
        paths = []
        for name in "abc"[:o["files"]]:
            ids = draw_tokens(r, shape["vocab"], r.randint(o["seq"], 250))
            paths.append(tmp_path / f"{name}.npy")
            paths[-1].write_bytes(array.array("H", ids).tobytes())
        model, later = (peers.Runner(tmp_path / which, torch.float64) for which in ("model", "later"))
        pieces = list(peers.read_pieces(list(map(str, paths)), o["seq"], None, o["most"]))
        expected = peers.analyse(peers.positions(model, later if o["later"] else None, pieces), K)
        if min(model.margin, later.margin if o["later"] else 1) > SURE:
            break
    else:
        pytest.fail("no sure model in twenty draws", pytrace=False)
    found = routing(tmp_path, "--model", tmp_path / "model", "--data", *paths, "--seq", o["seq"], "--batch", o["batch"],
                    *(["--later", tmp_path / "later"] if o["later"] else []),
                    *(["--max-tokens", o["most"]] if o["most"] else []))
    wrong = peers.disagreement(expected, found)
    assert not wrong, f"PEER_SEED={SEED}\n{wrong}"


# ------------------------------------------------------------------------------------------------
# Real texts

@pytest.fixture(scope="module")
def texts(peers, tmp_path_factory):
    """What transformers says of the beginnings of texts: a folder with them, and of each position its domain, ids, and
    of two checkpoints the experts (L, N, K)."""
    if not (DATA / "text").is_dir() or not (DATA / "tokenizer" / "tokenizer.json").exists():
        pytest.skip("needs texts and OLMoE's tokenizer: OLMOE_DATA=FOLDER with text/ and tokenizer/")
    import numpy
    import tokenizers
    import torch
    folder = tmp_path_factory.mktemp("routing")
    tokenizer = tokenizers.Tokenizer.from_file(str(DATA / "tokenizer" / "tokenizer.json"))
    shape = dict(vocab=50304, hidden=32, heads=2, width=24, experts=16, topk=3, layers=2, seq=2048, eos=50279)
    peers.draw_models(shape, TEXT_SEED, folder)
    runners = [peers.Runner(folder / which, torch.float64) for which in ("model", "later")]
    domains, ids, targets, predicted, experts = [], [], [], [], [[], []]
    for number, name in enumerate(TEXTS):
        text = (DATA / "text" / f"{name}.txt").read_bytes()[:16_000]
        (folder / f"{name}.v1.txt").write_bytes(text)
        of = tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids
        assert len(of) > TOKENS
        for begin in range(0, TOKENS // PIECE * PIECE, PIECE):
            piece = of[begin:begin + PIECE]
            for runner, into in zip(runners, experts):
                logits, routers = runner(piece)
                into.append(routers.topk(3, dim=-1).indices.numpy())
                if runner is runners[0]:
                    predicted += logits.argmax(dim=-1).tolist()
            domains += [number] * PIECE
            ids += piece
            targets += [*piece[1:], -1]
    assert min(runner.margin for runner in runners) > SURE, "two logits are as good as equal; another TEXT_SEED"
    return folder, tokenizer, [numpy.array(x) for x in (domains, ids, targets, predicted)], [
        numpy.concatenate(layers, axis=1) for layers in experts]


@pytest.fixture(scope="module")
def found(texts):
    folder = texts[0]
    return routing(folder, "--model", folder / "model", "--later", folder / "later", "--seq", PIECE, "--batch", 3,
                   "--max-tokens", TOKENS, "--tokenizer", DATA / "tokenizer" / "tokenizer.json", "--data",
                   *(folder / f"{name}.v1.txt" for name in TEXTS))


def chosen(experts, E=16):
    """(L, N, E): whether a token has an expert among its K."""
    import numpy
    return (experts[..., None] == numpy.arange(E)).any(axis=2)


def test_domain_specialisation(texts, found):
    """N(E_i, D) / N(D), equation 7, of the K experts and of the first."""
    import numpy
    _, _, (domains, *_), (experts, _) = texts
    assert list(found["domains"]) == TEXTS
    for number, name in enumerate(TEXTS):
        mine, of = domains == number, found["domains"][name]
        assert of["tokens"] == mine.sum()
        for key, has in (("counts", chosen(experts)), ("top1", chosen(experts[..., :1]))):
            numpy.testing.assert_array_equal(numpy.array(of[key]), has[:, mine].sum(axis=1))
            numpy.testing.assert_allclose(numpy.array(of[key]) / of["tokens"], has[:, mine].mean(axis=1), rtol=1e-12)


def test_coactivation(texts, found):
    """N(E_i, E_j) / N(E_i), equation 6; and the pairs of neighbours in rank order, of which the script counts each in
    both directions."""
    import numpy
    experts = texts[3][0]
    for l, has in enumerate(chosen(experts).astype(int)):
        both = numpy.array(found["coactivation"][l])
        numpy.testing.assert_array_equal(both, has.T @ has)
        numpy.testing.assert_array_equal(numpy.diag(both), sum(numpy.array(d["counts"][l])
                                                               for d in found["domains"].values()))
        ranked = numpy.zeros_like(both)
        for rank in (0, 1):
            numpy.add.at(ranked, (experts[l, :, rank], experts[l, :, rank + 1]), 1)
        numpy.testing.assert_array_equal(numpy.array(found["coactivation_ranked"][l]), ranked + ranked.T)


def test_saturation(texts, found):
    """The mean over tokens of |E(t) and E(T)| / k, equation 5, for K and for 1."""
    import numpy
    first, last = texts[3]
    both = (chosen(first) & chosen(last)).sum(axis=2)
    numpy.testing.assert_allclose(found["saturation"]["topk"], (both / 3).mean(axis=1), atol=1e-9)
    numpy.testing.assert_allclose(found["saturation"]["top1"], (first[..., 0] == last[..., 0]).mean(axis=1), atol=1e-9)


@pytest.mark.parametrize("which, kind", [(1, "input"), (2, "target"), (3, "predicted")])
def test_vocabulary_specialisation(texts, found, which, kind):
    """N(x, E_i) / N(x), equation 8, of the expert that has most of x."""
    import numpy
    V, E = 50304, 16
    ids, v = texts[2][which], found["vocabulary"][kind]
    for l, experts in enumerate(texts[3][0][..., 0]):
        table, met = numpy.zeros((V, E), int), numpy.full((V, E), len(ids))
        numpy.add.at(table, (ids[ids >= 0], experts[ids >= 0]), 1)
        numpy.minimum.at(met, (ids[ids >= 0], experts[ids >= 0]), numpy.nonzero(ids >= 0)[0])
        total, most = table.sum(axis=1), table.max(axis=1)
        owner = numpy.where(table == most[:, None], met, len(ids) + 1).argmin(axis=1)
        seen = total > 0
        share = most[seen] / total[seen]
        assert abs(v["by_layer"][l] - share.mean()) < 1e-9
        for e in range(E):
            mine = seen & (owner == e)
            if not mine.any():
                assert v["by_expert"][l][e] is None
                continue
            assert abs(v["by_expert"][l][e] - (most[mine] / total[mine]).mean()) < 1e-9
            listed = [(-most[x] / total[x], -total[x], x) for x in numpy.nonzero(mine & (total >= 10))[0]]
            top = v["top"][l][e]
            assert [(one["id"], one["count"]) for one in top] == [(x, -n) for _, n, x in sorted(listed)[:15]]
            assert all(abs(one["share"] - most[one["id"]] / total[one["id"]]) < 1e-9 for one in top)


def test_texts_of_ids(texts, found):
    """As `tokenizers` writes them, where they are whole characters."""
    tokenizer = texts[1]
    shown = [tokenizer.decode([int(i)]) for i in found["texts"]]
    assert len(shown) > 20 and sum("\ufffd" in text for text in shown) < len(shown) / 4
    assert all(text == ours for text, ours in zip(shown, found["texts"].values()) if "\ufffd" not in text)
