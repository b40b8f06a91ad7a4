"""`olmoe evaluate` against others, on a small random model with OLMoE's tokenizer: the first documents of the request
files that OLMo ships, and pieces of a real text.

  transformers: every query alone and whole, in float64, scored by the formulas as they are written here
  lm-evaluation-harness on transformers, in float32: its own encoding, batches with padding, and scores

Run by `make test-peers`, where OLMOE_DATA has eval/, tokenizer/ and text/. OLMOE is the FP32 program.

All predictions have to be the same, so all have to be sure: SEED is one whose documents have no two scores as near, and
no router two experts as near, as float32's rounding goes. The test sees to that, in float64.
"""
import argparse
import array
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
DATA = Path(os.environ.get("OLMOE_DATA") or "/nowhere").resolve()     # links lead there
FILES = ["arc_challenge_mc_5shot", "arc_challenge_rc_0shot", "arc_easy_rc_0shot", "copa_rc_0shot", "csqa_rc_0shot",
         "openbookqa_mc_5shot", "openbookqa_rc_0shot", "piqa_rc_0shot", "sciq_rc_0shot", "socialiqa_rc_0shot",
         "winogrande_rc_0shot"]
HARNESS = ["arc_challenge_mc_5shot", "arc_easy_rc_0shot", "piqa_rc_0shot", "winogrande_rc_0shot"]
DOCUMENTS, SEED = 100, 2
RELATIVE, OF_PERPLEXITY = 1e-5, 1e-6
SURE = 1e-5                 # of a router's logits, and of scores, relative: a hundred of float32's roundings
SCORES = ("acc", "acc_norm", "acc_bytes")

if not (DATA / "eval").is_dir() or not (DATA / "tokenizer" / "tokenizer.json").exists():
    pytest.skip("needs OLMo's request files and OLMoE's tokenizer: OLMOE_DATA=FOLDER with eval/, tokenizer/ and text/",
                allow_module_level=True)


def path_of(name):
    return DATA / "eval" / f"{name}.jsonl.gz"


@pytest.fixture(scope="module")
def peers():
    """scripts/reference.py and scripts/bench_evaluate.py."""
    sys.path.insert(0, str(ROOT / "scripts"))
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    try:
        import bench_evaluate
        import reference
    except SystemExit:
        pytest.fail("test_evaluate_peers.py needs torch and transformers: run it by `make test-peers`", pytrace=False)
    reference.quiet()
    return argparse.Namespace(reference=reference, bench=bench_evaluate)


@pytest.fixture(scope="module")
def folder(peers, tmp_path_factory):
    """A model directory."""
    import torch
    shape = dict(vocab=50304, hidden=32, heads=2, width=24, experts=8, topk=2, layers=2, seq=2048)
    options = argparse.Namespace(**{**peers.reference.DEFAULTS, **shape})
    model = peers.reference.draw_model(options, torch.Generator().manual_seed(SEED))
    model.config.eos_token_id, model.config.pad_token_id = 50279, 1
    path = tmp_path_factory.mktemp("evaluate") / "model"
    path.mkdir()
    peers.reference.write_model(path, model, torch.float32)
    (path / "tokenizer.json").symlink_to(DATA / "tokenizer" / "tokenizer.json")
    return path


def olmoe(*words):
    done = subprocess.run([OLMOE, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def ours(folder):
    """(scores by task, samples by task) of all files in one call."""
    json_path, samples_path = folder.parent / "out.json", folder.parent / "samples.jsonl"
    print(olmoe("evaluate", "--model", folder, "--tasks", *map(path_of, FILES), "--limit", DOCUMENTS, "--json",
                json_path, "--samples", samples_path))
    samples = {}
    for line in map(json.loads, samples_path.read_text().splitlines()):
        samples.setdefault(line["task"], []).append(line)
    return json.loads(json_path.read_text())["tasks"], samples


@pytest.fixture(scope="module")
def theirs(peers, folder):
    """A function from (context ids, continuation ids) to the continuation's log-probability, and the smallest margin of
    a router since it was last asked."""
    import torch
    reference = peers.reference
    model = reference.OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.config.pad_token_id = None
    with reference.Float64():
        model = reference.twin(model, torch.float64)
    K, seen = model.config.num_experts_per_tok, []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))

    def run(ids, kept):
        with torch.no_grad(), reference.Float64():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=kept).logits[0]
            return logits.log_softmax(dim=-1)

    def margin():
        z = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).sort(dim=-1, descending=True).values
        seen.clear()
        return (z[:, K - 1] - z[:, K]).min().item()
    return argparse.Namespace(run=run, margin=margin)


@pytest.fixture(scope="module")
def encode(folder):
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def ways(sums, bare):
    return [sums, [s / len(text) for s, text in zip(sums, bare)],
            [s / len(text.encode()) for s, text in zip(sums, bare)]]


def assert_sure(values, pairs, what):
    """That rounding moves no prediction. Equal requests are no doubt: the first of them is meant."""
    best = values.index(max(values))
    assert all(pairs[i] == pairs[best] or values[best] - value > SURE * abs(value)
               for i, value in enumerate(values)), f"{what}: choices are as good as equal; another SEED"


@pytest.mark.parametrize("name", FILES)
def test_transformers(peers, ours, theirs, encode, name):
    table, samples = ours[0][name], ours[1][name]
    documents = peers.bench.read_documents(path_of(name), DOCUMENTS)
    assert table["n"] == len(samples) == len(documents) == DOCUMENTS
    right, bits, per_character = [0, 0, 0], 0.0, 0.0
    for document, sample in zip(documents, samples):
        sums, rows = [], {}
        pairs = list(zip(document["contexts"], document["continuations"]))
        for context, continuation in pairs:
            before, after = encode(context), encode(continuation)
            query = (before + after[:-1])[-2048:]
            key = (tuple(query), len(after))
            if key not in rows:
                rows[key] = theirs.run(query, len(after))
            sums.append(rows[key][range(len(after)), after].sum().item())
        assert sample["doc_id"] == document["doc_id"]
        for a, b in zip(sample["logprobs"], sums, strict=True):
            assert abs(a - b) <= RELATIVE * abs(b), (document, sample, sums)
        bare, gold = [text.removeprefix(" ") for text in document["continuations"]], document["label"]
        for way, values in enumerate(ways(sums, bare)):
            assert_sure(values, pairs, f"document {document['doc_id']}")
            hit = int(values.index(max(values)) == gold)
            assert sample[SCORES[way]] == hit, (document, sample, sums)
            right[way] += hit
        bits -= sums[gold] / len(bare[gold].encode()) / math.log(2)
        per_character -= sums[gold] / len(bare[gold])
    assert theirs.margin() > SURE, "two experts are as good as equal; another SEED"
    for score, hits in zip(SCORES, right):
        assert abs(table[score] - hits / DOCUMENTS) < 1e-8
    for score, total in (("bpb", bits), ("ce_loss", per_character)):
        print(f"{name} {score} {table[score]:.9g} for {total / DOCUMENTS:.9g}")
        assert abs(table[score] - total / DOCUMENTS) <= RELATIVE * total / DOCUMENTS


def test_perplexity_of_a_text(folder, theirs, encode, tmp_path):
    """Pieces of 256 tokens; the rest is dropped."""
    T, text = 256, (DATA / "text" / "arxiv.txt").read_text(errors="replace")[:16_000]
    ids = encode(text)
    count = len(ids) // T
    assert count > 10 and len(ids) % T
    (tmp_path / "arxiv.txt.npy").write_bytes(array.array("H", ids).tobytes())
    olmoe("evaluate", "--model", folder, "--perplexity", tmp_path / "arxiv.txt.npy", "--seq", T, "--batch", 3, "--json",
          tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["perplexity"]["arxiv"]
    total = 0.0
    for at in range(0, count * T, T):
        rows = theirs.run(ids[at:at + T], 0)[:-1]
        total -= rows[range(T - 1), ids[at + 1:at + T]].sum().item()
    loss = total / (count * (T - 1))
    assert theirs.margin() > SURE, "two experts are as good as equal; another text"
    assert found["tokens"] == count * (T - 1)
    print(f"loss {found['loss']:.9g} for {loss:.9g}")
    assert abs(found["loss"] - loss) <= OF_PERPLEXITY * loss
    assert abs(found["perplexity"] - math.exp(loss)) <= 2 * loss * OF_PERPLEXITY * math.exp(loss)


@pytest.fixture(scope="module")
def harness(peers, folder):
    import logging
    logging.disable(logging.WARNING)        # what it says while it loads
    yield peers.bench.harness_model(*peers.bench.load(folder), batch=8)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", HARNESS)
def test_harness(peers, ours, harness, encode, name):
    """The harness encodes context + continuation as one text, and cuts where the context's own ids end. Documents are
    compared for which this is the same as to encode both apart: all but those where the tokenizer joins the blanks at a
    continuation's beginning to what is before. Where contexts differ, its acc_norm divides by their lengths, and only
    acc is compared."""
    table, samples = ours[0][name], ours[1][name]
    documents, left_out = [], []
    for document, sample in zip(peers.bench.read_documents(path_of(name), DOCUMENTS), samples):
        same = all(harness._encode_pair(*pair) == (encode(pair[0]), encode(pair[1]))
                   for pair in zip(document["contexts"], document["continuations"]))
        documents.append((document, sample)) if same else left_out.append(document["doc_id"])
    print(f"{name}: {len(documents)} documents, without {left_out}")
    assert len(left_out) <= 2
    by_context = any(len(set(document["contexts"])) > 1 for document, _ in documents)
    their_table, their_samples = peers.bench.harness_scores(
        harness, peers.bench.harness_task(name, [document for document, _ in documents]))
    scores = SCORES[:1] if by_context else SCORES
    for (document, ours_of), theirs_of in zip(documents, their_samples, strict=True):
        for a, b in zip(ours_of["logprobs"], theirs_of["logprobs"], strict=True):
            assert abs(a - b) <= RELATIVE * abs(b), (document, ours_of, theirs_of)
        assert [ours_of[score] for score in scores] == [theirs_of[score] for score in scores], (ours_of, theirs_of)
    if not left_out:
        for score in scores:
            assert abs(table[score] - their_table[score]) < 1e-8, (score, table, their_table)
