"""`olmoe evaluate`: every score of every document, and the losses of pieces, against tests/fixtures/evaluate, which
PyTorch computed in float64, one query at a time (scripts/reference_evaluate.py).

The program is ./olmoe, or what OLMOE names.
"""
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
FIXTURES = ROOT / "tests/fixtures/evaluate"
CASES = {path.parent.name: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*/expected.json"))}
RUNS = [(case, number) for case in CASES for number in range(len(CASES[case]["runs"]))]

RELATIVE = 1e-5             # of a log-probability, a loss, and a mean of them, in FP32
COUNTS = ("n", "acc", "acc_norm", "acc_bytes", "acc_stderr")
SCORES = ("acc", "acc_norm", "acc_bytes")


def evaluate(folder, case, number, *more, limit=None):
    """(OUT.json, the lines of --samples by task, what is printed) of a run of a case."""
    c, run = CASES[case], CASES[case]["runs"][number]
    words = ["evaluate", "--model", FIXTURES / case / c["model"],
             "--tokenizer", c["tokenizer"] if c["tokenizer"] == "bytes" else ROOT / c["tokenizer"],
             "--tasks", *(FIXTURES / case / name for name in run["task_files"]),
             "--perplexity", *(FIXTURES / case / name for name in run["perplexity_files"]),
             *(["--seq", run["seq"]] if run["seq"] else []), *(["--limit", limit] if limit else []),
             "--json", folder / "out.json", "--samples", folder / "samples.jsonl", *more]
    done = subprocess.run([OLMOE, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    samples = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        samples.setdefault(sample.pop("task"), []).append(sample)
    return json.loads((folder / "out.json").read_text()), samples, done.stdout


def close(ours, wanted):
    """Also false where ours is no number."""
    return isinstance(ours, (int, float)) and abs(ours - wanted) <= RELATIVE * abs(wanted)


def same_sample(ours, wanted):
    """What differs of a document: names."""
    wrong = [name for name in ("doc_id", "label", "tokens", "characters", "bytes") if ours[name] != wanted[name]]
    if len(ours["logprobs"]) != len(wanted["logprobs"]) or not all(map(close, ours["logprobs"], wanted["logprobs"])):
        wrong.append("logprobs")
    right = [int(prediction == wanted["label"]) for prediction in wanted["predictions"]]
    return wrong + [name for name, score in zip(SCORES, right) if ours[name] != score]


def same_table(ours, wanted):
    """What differs of a task's scores: names. Means of zeros and ones are exact but for the digits of JSON."""
    wrong = [name for name in wanted.keys() ^ ours.keys()]
    for name in wanted.keys() & ours.keys():
        if wanted[name] is None or name == "n":
            right = ours[name] == wanted[name]
        elif name in COUNTS:
            right = isinstance(ours[name], (int, float)) and abs(ours[name] - wanted[name]) < 1e-8
        else:
            right = close(ours[name], wanted[name])
        if not right:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case, number", RUNS)
def test_reference(case, number, batch, tmp_path):
    wanted = CASES[case]["runs"][number]
    out, samples, said = evaluate(tmp_path, case, number, "--batch", batch)
    assert out["tasks"].keys() == wanted["tasks"].keys() == samples.keys()
    for name, task in wanted["tasks"].items():
        assert [sample["doc_id"] for sample in samples[name]] == [d["doc_id"] for d in task["documents"]]
        for ours, document in zip(samples[name], task["documents"]):
            assert not same_sample(ours, document), (name, same_sample(ours, document), ours, document)
        wrong = same_table(out["tasks"][name], task["table"])
        assert not wrong, (name, wrong, out["tasks"][name], task["table"])
        assert name in said
    assert out["perplexity"].keys() == wanted["perplexity"].keys()
    for name, right in wanted["perplexity"].items():
        ours = out["perplexity"][name]
        assert ours["tokens"] == right["tokens"] and ours.keys() >= right.keys()
        wrong = [key for key in right if not close(ours[key], right[key])]
        assert not wrong, (name, wrong, ours, right)
        assert name in said


LIMITS = [(case, number, int(limit)) for case, number in RUNS
          for limit in next(iter(CASES[case]["runs"][number]["tasks"].values()))["limits"]]


@pytest.mark.parametrize("case, number, limit", LIMITS)
def test_limit(case, number, limit, tmp_path):
    """The first documents of each task, by their first lines, and as many as there are; all pieces of token files."""
    wanted = CASES[case]["runs"][number]
    out, samples, _ = evaluate(tmp_path, case, number, limit=limit)
    for name, task in wanted["tasks"].items():
        first = task["documents"][:limit]
        assert len(samples[name]) == len(first) == out["tasks"][name]["n"]
        wrong = [same_sample(*pair) for pair in zip(samples[name], first)]
        assert not any(wrong), (name, wrong)
        wrong = same_table(out["tasks"][name], task["limits"][str(limit)])
        assert not wrong, (name, wrong, out["tasks"][name], task["limits"][str(limit)])
    for name, right in wanted["perplexity"].items():
        assert out["perplexity"][name]["tokens"] == right["tokens"]
        assert close(out["perplexity"][name]["loss"], right["loss"])


@pytest.mark.parametrize("case", CASES)
def test_fixture(case):
    """What makes the comparison tell something: choices of unequal lengths and alphabets, whose three scores differ;
    ties; contexts that are cut; one token, and as many as --seq."""
    runs = CASES[case]["runs"]
    documents = [d for run in runs for task in run["tasks"].values() for d in task["documents"]]
    assert any(len(set(d["predictions"])) > 1 for d in documents)
    assert any(d["bytes"] != d["characters"] for d in documents)
    assert any(d["logprobs"].count(max(d["logprobs"])) > 1 and d["label"] > d["predictions"][0] for d in documents)
    assert any(len(d["tokens"]) == 1 for d in documents) and any(1 in d["tokens"] for d in documents)
    assert any(run["seq"] in d["tokens"] for run in runs if run["seq"] for task in run["tasks"].values()
               for d in task["documents"])
    by_seq = {}
    for run in runs:
        for name, task in run["tasks"].items():
            for d in task["documents"]:
                by_seq.setdefault((name, d["doc_id"]), []).append(d["logprobs"])
    assert any(len(scores) > 1 and any(not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(*scores))
               for scores in by_seq.values())
