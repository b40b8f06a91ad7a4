"""scripts/render_tasks.py on Arrow files: made-up sets of the published schemas, and the published ones where
OLMOE_DATA has them.

Run by `make test-peers`: the package pyarrow is in build/venv.
"""
import gzip
import json
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from test_tasks_script import READY, SUBJECTS, TASKS, VECTORS, question, refused, script

pyarrow = pytest.importorskip("pyarrow", reason="no pyarrow; make test-peers has it, in build/venv")

pytestmark = pytest.mark.peers

HF = READY / "hf"
MMLU = "hails/mmlu_no_train"


def save(path, records, schema=None, batch=2):
    """A file as datasets writes it, a few records a batch"""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(records, schema=schema)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        for part in table.to_batches(max_chunksize=batch):
            stream.write_batch(part)
    return path


def shard(data, path, configuration, split, i=0, n=1):
    return data / path / configuration / split / f"data-{i:05}-of-{n:05}.arrow"


def render(data, out, *labels):
    done = script("render_tasks.py", "--data", data, "--out", out, *labels)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def written(path):
    """[requests in the order of idx, the right one] of each document, in order"""
    with gzip.open(path) as file:
        lines = [json.loads(line) for line in file]
    documents = {}
    for line in lines:
        if line["doc_id"] < 1000000:                # others are unconditional
            requests, _ = documents.setdefault(line["doc_id"], ({}, line["label"]))
            requests[line["idx"]] = (line["request"]["context"], line["request"]["continuation"])
    assert list(documents) == list(range(len(documents)))
    return [([requests[i] for i in range(len(requests))], right) for requests, right in documents.values()]


def mmlu(data, subjects, validation=1):
    for subject in subjects:
        for split, number in (("dev", 5), ("validation", validation), ("test", 2)):
            if not (data / MMLU / subject / f"{split}.arrow").exists():
                save(shard(data, MMLU, subject, split), [question(subject, split, n) for n in range(number)])


def test_all_tasks(tmp_path):
    """Of both layouts and of several pieces; what the form makes of each record, in order."""
    data, out, expected = tmp_path / "data", tmp_path / "out", {}
    for label, record, *_ in VECTORS:
        expected.setdefault(label, []).append(record)
    for i, (label, records) in enumerate(expected.items()):
        task = TASKS[label]
        where = task.path, task.configurations[0], "validation"
        expected[label] = records = records * 5
        if i % 2:
            for k, of in enumerate((records[:3], records[3:])):
                save(shard(data, *where, k, 2), of)
        else:
            save(data / task.path / task.configurations[0] / "validation.arrow", records)
    mmlu(data, [subject for subjects in SUBJECTS.values() for subject in subjects])

    lines = render(data, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{label}.jsonl.gz" for label in TASKS)
    assert f"{out}/sciq.jsonl.gz: 10 documents, 40 lines" in lines and len(lines) == len(TASKS)
    assert f"{out}/mmlu_stem_var.jsonl.gz: {18 * 7} documents, {18 * 7 * 4} lines" in lines
    for label, records in expected.items():
        assert written(out / f"{label}.jsonl.gz") == [TASKS[label].form(record) for record in records]
    assert len(written(out / "mmlu_other_mc_5shot.jsonl.gz")) == 14
    assert len(written(out / "mmlu_other_mc_5shot_test.jsonl.gz")) == 28
    first = (out / "piqa.jsonl.gz").read_bytes()
    render(data, out, "piqa", "piqa")
    assert (out / "piqa.jsonl.gz").read_bytes() == first


# ------------------------------------------------------------------------------------------------
# The published sets

published = pytest.mark.skipif(not HF.is_dir(), reason="needs OLMo's data sets in eval/hf of the folder OLMOE_DATA")


@published
@pytest.mark.parametrize("label, name", [("arc_easy", "arc_easy"), ("copa", "copa"), ("winogrande", "winogrande")])
def test_the_ready_requests(tmp_path, label, name):
    """Context, continuations and label, document by document"""
    render(HF, tmp_path, label)
    ready = written(READY / f"{name}_rc_0shot.jsonl.gz")
    assert len(ready) >= 100 and written(tmp_path / f"{label}.jsonl.gz") == ready


@published
@pytest.mark.parametrize("label, name, old, new", [("piqa", "piqa", "Goal: ", "Question: "),
                                                   ("openbook_qa", "openbookqa", "Question: ", "")])
def test_other_prompts(tmp_path, label, name, old, new):
    """The ready requests of these differ from the table's in a word of the prompt, and in no choice."""
    render(HF, tmp_path, label)
    ready = written(READY / f"{name}_rc_0shot.jsonl.gz")
    end = "\nAnswer:" if label == "openbook_qa" else ""

    def ours(context):
        assert context.startswith(old) and context.endswith(end)
        return new + context[len(old):len(context) - len(end)]

    assert written(tmp_path / f"{label}.jsonl.gz") == [
        ([(ours(context), continuation) for context, continuation in requests], right) for requests, right in ready]


@published
def test_the_published_astronomy(tmp_path):
    """The first of the group STEM, with made-up others after it"""
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("dev", "validation", "test"):
        of = data / MMLU / "astronomy" / f"{split}.arrow"
        of.parent.mkdir(parents=True, exist_ok=True)
        of.write_bytes((HF / MMLU / "astronomy" / of.name).read_bytes())
    mmlu(data, SUBJECTS["stem"])
    render(data, out, "mmlu_stem_var", "mmlu_stem_mc_5shot", "mmlu_stem_mc_5shot_test")
    var, letters, test = (written(out / f"mmlu_stem_{end}.jsonl.gz") for end in ("var", "mc_5shot", "mc_5shot_test"))
    assert (len(var), len(letters), len(test)) == (7 * (16 + 17), 16 + 17, 152 + 2 * 17)

    asked = "You cool a blackbody to half its original temperature. How does its spectrum change?\n"
    choices = ["Power emitted is 1/16 times as high; peak emission wavelength is 1/2 as long.",
               "Power emitted is 1/4 times as high; peak emission wavelength is 2 times longer.",
               "Power emitted is 1/4 times as high; peak emission wavelength is 1/2 as long.",
               "Power emitted is 1/16 times as high; peak emission wavelength is 2 times longer."]
    shot = ("You are pushing a truck along a road. Would it be easier to accelerate this truck on Mars? Why? (Assume "
            "there is no friction)\n")
    head = "The following are multiple choice questions (with answers) about astronomy:\n\n"
    plain = f"Question: {asked}Answer:"
    continuations = [" " + choice for choice in choices]
    assert var[0] == ([(plain, c) for c in continuations], 3)
    assert var[1] == ([(head + plain, c) for c in continuations], 3)
    one = f"{head}Question: {shot}Answer: It would be the same no matter where you are.\n\n{plain}"
    assert var[2] == ([(one, c) for c in continuations], 3)
    assert var[6][0][0][0].count("\nAnswer: ") == 5 and var[6][0][0][0].endswith("\n\n" + plain)
    context = letters[0][0][0][0]
    assert letters[0] == ([(context, " " + letter) for letter in "ABCD"], 3)
    assert context.startswith(head + shot + "A. It would be harder since the truck is heavier on Mars.\nB. ")
    assert "\nD. It would be the same no matter where you are.\nAnswer: D\n\n" in context
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices))
    assert context.endswith(f"\n\n{asked}{listed}Answer:") and context.count("\nAnswer: ") == 5


# ------------------------------------------------------------------------------------------------
# What is refused

GOOD = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


def fails(tmp_path, *words, labels=("piqa",)):
    """With one line, before anything is written"""
    data, out = tmp_path / "data", tmp_path / "out"
    refused(script("render_tasks.py", "--data", data, "--out", out, *labels), "render_tasks.py: ", *words)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("records, why", [
    ([{"goal": "g", "sol1": "a", "label": 0}], "no column sol2; it has goal, sol1, label"),
    ([{**GOOD, "label": "0"}], "the column label holds string, not number"),
    ([{**GOOD, "goal": 1}], "the column goal holds int64, not text"),
    ([{**GOOD, "goal": ["a"]}], "the column goal holds list<"),
    ([GOOD] * 4 + [{**GOOD, "sol1": None}], "row 5: nothing in sol1"),
    ([GOOD] * 2 + [{**GOOD, "label": 2}], "row 3: the answer is 2, not one of 0, 1"),
    ([GOOD, {**GOOD, "sol1": ""}], "row 2: an empty choice"),
])
def test_rows_that_are_refused(tmp_path, records, why):
    path = save(shard(tmp_path / "data", "piqa", "plain_text", "validation"), records)
    fails(tmp_path, f"{path}", why)


def test_choices_that_are_refused(tmp_path):
    path = tmp_path / "data/ai2_arc/ARC-Easy/validation.arrow"
    for choices, why in [({"label": ["A"]}, "the column choices holds struct<label: list<"),
                         (["a"], "not choices"), ({"text": [1]}, "not choices"),
                         ({"text": ["a", None]}, "row 1: nothing in choices")]:
        save(path, [{"question": "q", "choices": choices, "answerKey": "A"}])
        fails(tmp_path, why, labels=["arc_easy"])
    save(tmp_path / "data/hellaswag/none/validation.arrow", [dict.fromkeys(TASKS["hellaswag"].columns, "x")])
    fails(tmp_path, "the column endings holds string, not list of texts", labels=["hellaswag"])
    save(tmp_path / "data/boolq/none/validation.arrow", [{"passage": "p", "question": "q", "answer": 1}])
    fails(tmp_path, "the column answer holds int64, not yes or no", labels=["boolq"])


def test_files_that_are_refused(tmp_path):
    refused(script("render_tasks.py", "--data", tmp_path / "none", "--out", tmp_path / "out"), "none: there is no such")
    data = tmp_path / "data"
    folder = data / "piqa/plain_text/validation"
    folder.mkdir(parents=True)
    fails(tmp_path, f"neither {folder}/data-00000-of-00001.arrow nor {folder}.arrow")
    save(folder / "data-00001-of-00002.arrow", [GOOD])
    fails(tmp_path, "data-00001-of-00002.arrow are not the files data-00000-of-00001.arrow")
    (folder / "data-00001-of-00002.arrow").unlink()

    path = save(folder / "data-00000-of-00001.arrow", [GOOD] * 5)
    good = path.read_bytes()
    for cut in (0, 4, 100, good.index(b"\xff\xff\xff\xff", len(good) // 2), len(good) - 8, len(good) - 1):
        path.write_bytes(good[:cut])
        fails(tmp_path, f"{path}: no Arrow stream, or cut short")
    for bad in (good[-8:], b"ARROW1\0\0" + good[8:], b"\xff" * 40 + good[-8:], good[:400] + good[-8:]):
        path.write_bytes(bad)
        fails(tmp_path, f"{path}: ")
    path.write_bytes(good)
    fails(tmp_path, "mmlu_no_train", labels=["piqa", "mmlu_other_var"])     # all are looked at first

    text = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"goal": text, **{name: pyarrow.array([GOOD[name]]) for name in ("sol1", "sol2", "label")}})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    fails(tmp_path, "row 1: a text that is not UTF-8")
    save(path, [], table.schema)
    fails(tmp_path, "piqa: its set has no row")
    path.unlink()
    path.mkdir()
    fails(tmp_path, f"{path}: Is a directory")


def test_places_that_are_refused(tmp_path):
    save(tmp_path / "data/piqa/plain_text/validation.arrow", [GOOD])
    words = ["render_tasks.py", "--data", tmp_path / "data", "piqa", "--out"]
    (tmp_path / "file").write_text("")
    refused(script(*words, tmp_path / "file"), "file: File exists")
    (tmp_path / "out/piqa.jsonl.gz").mkdir(parents=True)
    refused(script(*words, tmp_path / "out"), "piqa.jsonl.gz: Is a directory")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["piqa.jsonl.gz"]
