"""scripts/render_tasks.py: the requests of each task, by hand, and those of the ready requests' documents where
OLMOE_DATA has them; and scripts/gsm8k.py. tests/test_tasks_arrow.py has files of data sets.

OLMOE is the program (default ./olmoe).
"""
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
sys.dont_write_bytecode = True
import gsm8k
import render_tasks
from render_tasks import TASKS

OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
SUBJECTS = {group: names.split() for group, names in render_tasks.GROUPS.items()}


def named(choices, names="ABCDE"):
    return {"text": choices, "label": list(names[:len(choices)])}


# ------------------------------------------------------------------------------------------------
# A record's requests

# task, record, context or contexts, continuations, the right one
VECTORS = [
    ("piqa", {"goal": "How to boil  water?", "sol1": "in a pot ", "sol2": "In a hat", "label": 1},
     "Question: How to boil  water?\nAnswer:", [" in a pot ", " In a hat"], 1),
    # only the first letter of ctx_b is large; markup goes after the ends of the text do, so that its space stays
    ("hellaswag", {"activity_label": "Fixing [a] roof", "ctx_a": " A man sits. [title] He  has   tools.",
                   "ctx_b": "the Man [b]IN Paris",
                   "endings": [" [header] goes home. ", "[title] stays", "sees [x] this [step] end",
                               "one [title] Two [substeps] three [a] [b]."], "label": "2"},
     "Fixing roof: A man sits.. He has  tools. The man in paris",
     ["  goes home.", "  stays", " sees this end", " one. Two three ."], 2),
    ("hellaswag", {"activity_label": "X", "ctx_a": "Y.", "ctx_b": "", "endings": ["a", "b", "c", "d"], "label": "0"},
     "X: Y.", [" a", " b", " c", " d"], 0),
    ("winogrande", {"sentence": "Ann saw Bo because _  was _ tall. ", "option1": "Ann", "option2": "Bo ",
                    "answer": "2"},
     ["Ann saw Bo because Ann", "Ann saw Bo because Bo "], [" was _ tall."] * 2, 1),
    ("openbook_qa", {"question_stem": "The sun is ", "choices": named(["a star", "Cold", "x", "y"]), "answerKey": " B"},
     "The sun is ", [" a star", " Cold", " x", " y"], 1),
    ("boolq", {"passage": "Cats -- They purr.", "question": "do cats purr", "answer": True},
     "Cats -- They purr.\nQuestion: do cats purr?\nAnswer:", [" yes", " no"], 0),
    ("boolq", {"passage": "P", "question": "q?", "answer": False}, "P\nQuestion: q??\nAnswer:", [" yes", " no"], 1),
    ("sciq", {"question": "Who?", "distractor3": "c", "distractor1": "a", "distractor2": "b", "correct_answer": "d",
              "support": " Long ago. \n"}, "Long ago.\nQuestion: Who?\nAnswer:", [" a", " b", " c", " d"], 3),
    ("sciq", {"question": "Who?", "distractor3": "c", "distractor1": "a", "distractor2": "b", "correct_answer": "d",
              "support": ""}, "\nQuestion: Who?\nAnswer:", [" a", " b", " c", " d"], 3),
    ("arc_easy", {"question": "Which?", "choices": named(["w", "x", "y", "z"]), "answerKey": "D"},
     "Question: Which?\nAnswer:", [" w", " x", " y", " z"], 3),
    ("arc_challenge", {"question": "Which?", "choices": named(["x", "y", "z"], "123"), "answerKey": "3"},
     "Question: Which?\nAnswer:", [" x", " y", " z"], 2),
    ("commonsense_qa", {"question": "Where?", "choices": named(["v", "w", "x", "y", "z"]), "answerKey": "E"},
     "Question: Where?\nAnswer:", [" v", " w", " x", " y", " z"], 4),
    ("copa", {"premise": " It rained! ", "choice1": "The Road got wet.", "choice2": "I ran.", "question": "effect",
              "label": 0}, "It rained therefore", [" the Road got wet.", " i ran."], 0),
    ("copa", {"premise": "It rained.", "choice1": "Été.", "choice2": "I ran.", "question": "cause", "label": 1},
     "It rained because", [" été.", " i ran."], 1),
    ("social_iqa", {"context": "Al slept.", "question": "Why?", "answerA": "tired", "answerB": "b", "answerC": "c",
                    "label": "1"}, "Question: Al slept. Why?\nAnswer:", [" tired", " b", " c"], 0),
]


@pytest.mark.parametrize("label, record, contexts, continuations, right", VECTORS,
                         ids=[f"{label}{i}" for i, (label, *_) in enumerate(VECTORS)])
def test_requests(label, record, contexts, continuations, right):
    if isinstance(contexts, str):
        contexts = [contexts] * len(continuations)
    assert TASKS[label].form(record) == (list(zip(contexts, continuations)), right)
    assert set(TASKS[label].columns) <= set(record)


@pytest.mark.parametrize("label, change, why", [
    ("piqa", {"label": 2}, "the answer is 2, not one of 0, 1"), ("piqa", {"label": -1}, "the answer is -1"),
    ("hellaswag", {"label": ""}, "the answer is '', not one of 0, 1, 2, 3"),
    ("hellaswag", {"endings": ["a", "b"]}, "not one of 0, 1"), ("hellaswag", {"endings": []}, "no choices"),
    ("winogrande", {"answer": "3"}, "not one of 1, 2"), ("winogrande", {"sentence": "no gap"}, "the sentence has no _"),
    ("openbook_qa", {"answerKey": "F"}, "not one of A, B, C, D"), ("arc_challenge", {"answerKey": "4"}, "of A, B, C"),
    ("copa", {"question": "why"}, "not one of cause, effect"), ("social_iqa", {"label": "0"}, "not one of 1, 2, 3"),
])
def test_records_that_are_no_document(label, change, why):
    record = next(record for name, record, *_ in VECTORS if name == label)
    with pytest.raises(ValueError, match=why):
        TASKS[label].form({**record, **change})


def test_the_tasks_of_the_config():
    single = "piqa hellaswag winogrande openbook_qa boolq sciq arc_easy arc_challenge copa commonsense_qa social_iqa"
    groups = ("stem", "humanities", "social_sciences", "other")
    assert list(TASKS) == single.split() + [f"mmlu_{group}_{end}" for end in ("var", "mc_5shot", "mc_5shot_test")
                                            for group in groups]
    assert {label for label in TASKS if TASKS[label].split != "validation"} == {f"mmlu_{g}_mc_5shot_test"
                                                                              for g in groups}
    assert [len(SUBJECTS[group]) for group in groups] == [18, 13, 12, 14]
    assert len({subject for subjects in SUBJECTS.values() for subject in subjects}) == 57


# ------------------------------------------------------------------------------------------------
# All documents of a task, of made-up sets in memory

@pytest.fixture
def sets(monkeypatch):
    """{(path, configuration, split): records}, in the place of the files"""
    made = {}
    monkeypatch.setattr(render_tasks, "files", lambda data, *split: [split])
    monkeypatch.setattr(render_tasks, "records", lambda split, columns: (
        (f"{'/'.join(split)}, row {i}", record) for i, record in enumerate(made[split], 1)))
    return made


def rendered(label):
    lines = []
    counts = render_tasks.render(label, "data", lines.append)
    lines = [json.loads(line) for line in lines]
    assert counts == (len({line["doc_id"] for line in lines}), len(lines))
    return lines


def test_lines(sets):
    """Documents with two to four choices, one after another, with what identifies them"""
    sets["ai2_arc", "ARC-Easy", "validation"] = [
        {"id": f"q{n}", "question": f"{n} – ü?", "choices": named([f"c{i}" for i in range(n)]), "answerKey": str(n)}
        for n in (3, 2, 4)]
    assert rendered("arc_easy") == [
        {"request_type": "loglikelihood", "doc": {"id": f"q{n}"},
         "request": {"context": f"Question: {n} – ü?\nAnswer:", "continuation": f" c{i}"}, "idx": i,
         "task_name": "arc_easy", "doc_id": number, "native_id": f"q{n}", "label": n - 1}
        for number, n in enumerate((3, 2, 4)) for i in range(n)]
    sets["boolq", "none", "validation"] = [{"passage": "p", "question": str(i), "answer": i == 0} for i in range(3)]
    assert [(line["doc"], line["native_id"], line["label"], line["idx"]) for line in rendered("boolq")] == [
        ({"index": i}, i, int(i != 0), idx) for i in range(3) for idx in range(2)]


def test_an_empty_choice(sets):
    sets["piqa", "plain_text", "validation"] = [{"goal": "g", "sol1": "a", "sol2": text, "label": 0}
                                                for text in (" ", "")]
    with pytest.raises(SystemExit, match="piqa/plain_text/validation, row 2: an empty choice"):
        rendered("piqa")


def question(subject, split, n):
    return {"question": f" {subject} {split} {n}?\n", "choices": [f"{split}{n}{letter}" for letter in "wxyz"],
            "answer": n % 4}


def items(subject, split, letters):
    """A question of MMLU without its answer, and its answer, as they stand in a prompt"""
    def item(n):
        text = f"{subject} {split} {n}?\n"
        if letters:
            return text + "".join(f"{letter}. {split}{n}{end}\n" for letter, end in zip("ABCD", "wxyz")) + "Answer:"
        return f"Question: {text}Answer:"
    return item, lambda n: " " + ("ABCD" if letters else [f"{split}{n}{end}" for end in "wxyz"])[n % 4]


@pytest.fixture
def mmlu(sets):
    """More than five examples in dev, of which five count; the splits differ."""
    for subjects in SUBJECTS.values():
        for subject in subjects:
            for split, number in (("dev", 6), ("validation", 3), ("test", 2)):
                of = [question(subject, split, n) for n in range(number)]
                sets["hails/mmlu_no_train", subject, split] = of
    return sets


@pytest.mark.parametrize("group", SUBJECTS)
def test_mmlu_var(mmlu, group):
    """Each question is seven documents, one after another."""
    expected, docs = [], []
    for subject in SUBJECTS[group]:
        shown, answer = items(subject, "dev", False)
        asked, _ = items(subject, "validation", False)
        words = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {words}:\n\n"
        shots = [shown(n) + answer(n) + "\n\n" for n in range(5)]
        for n in range(3):
            for name, before in [("none", ""), ("inst", head)] + [
                    (f"inst+{k}", head + "".join(shots[:k])) for k in range(1, 6)]:
                docs.append((subject, n, name))
                expected += [(len(docs) - 1, i, before + asked(n), f" validation{n}{'wxyz'[i]}", n % 4)
                             for i in range(4)]
    lines = rendered(f"mmlu_{group}_var")
    assert [(line["doc_id"], line["idx"], line["request"]["context"], line["request"]["continuation"], line["label"])
            for line in lines] == expected
    assert [tuple(line["doc"].values()) for line in lines[::4]] == docs
    assert len({line["native_id"] for line in lines}) == len(docs)


@pytest.mark.parametrize("end, split, number", [("mc_5shot", "validation", 3), ("mc_5shot_test", "test", 2)])
def test_mmlu_with_letters(mmlu, end, split, number):
    expected = []
    for subject in SUBJECTS["other"]:
        shown, answer = items(subject, "dev", True)
        asked, _ = items(subject, split, True)
        words = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {words}:\n\n"
        before = head + "".join(shown(n) + answer(n) + "\n\n" for n in range(5))
        expected += [(before + asked(n), f" {'ABCD'[i]}", n % 4) for n in range(number) for i in range(4)]
    lines = rendered(f"mmlu_other_{end}")
    assert [(line["request"]["context"], line["request"]["continuation"], line["label"]) for line in lines] == expected
    assert [line["doc_id"] for line in lines] == [i // 4 for i in range(len(lines))]


@pytest.mark.parametrize("split, change, why", [
    ("dev", lambda of: of[:4], "data/hails/mmlu_no_train/virology: 4 examples in dev, not 5"),
    ("dev", lambda of: of[:1] + [{**of[1], "answer": 4}] + of[2:], "virology/dev, row 2: the answer is 4"),
    ("validation", lambda of: [{**of[0], "choices": ["a"] * 5}], "virology/validation, row 1: 5 choices, not 4"),
])
def test_mmlu_that_is_refused(mmlu, split, change, why):
    key = "hails/mmlu_no_train", "virology", split
    mmlu[key] = change(mmlu[key])
    for label in ("mmlu_other_var", "mmlu_other_mc_5shot"):
        with pytest.raises(SystemExit, match=why):
            rendered(label)


# ------------------------------------------------------------------------------------------------
# The ready requests that show their documents' records

READY = Path(os.environ.get("OLMOE_DATA", "")) / "eval"


@pytest.mark.skipif(not READY.is_dir(), reason="needs OLMo's ready requests in eval/ of the folder OLMOE_DATA")
@pytest.mark.parametrize("label, name", [("winogrande", "winogrande"), ("copa", "copa"), ("social_iqa", "socialiqa")])
def test_ready_requests(label, name):
    with gzip.open(READY / f"{name}_rc_0shot.jsonl.gz") as file:
        lines = [json.loads(line) for line in file]
    ready = {}
    for line in lines:
        if line["doc_id"] < 1000000:
            pair = (line["request"]["context"], line["request"]["continuation"])
            ready.setdefault(line["doc_id"], [line["doc"], line["label"], {}])[2][line["idx"]] = pair
    assert len(ready) >= 100
    for record, right, requests in ready.values():
        assert TASKS[label].form(record) == ([requests[i] for i in range(len(requests))], right)


# ------------------------------------------------------------------------------------------------
# The command

def script(name, *words, **environment):
    return subprocess.run([sys.executable, ROOT / "scripts" / name, *map(str, words)], capture_output=True, text=True,
                          timeout=100, env={**os.environ, **environment})


def refused(done, *words):
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_without_pyarrow(tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not here')\n")
    words = ["--data", tmp_path, "--out", tmp_path / "out", "piqa"]
    refused(script("render_tasks.py", *words, PYTHONPATH=str(tmp_path)), "render_tasks.py: pyarrow is missing")
    refused(script("render_tasks.py", *words, "arc_hard"), "no task is called arc_hard", "arc_easy", "mmlu_stem_var")
    assert [path.name for path in tmp_path.iterdir()] == ["pyarrow.py"]


# ------------------------------------------------------------------------------------------------
# GSM8K

@pytest.mark.parametrize("text, number", [
    pytest.param("so 70,000 dollars", "70000", id="commas"), pytest.param("10-8", "8", id="several"),
    pytest.param("4 apples.\n\nQuestion: 5 pears?\nAnswer: 6", "4", id="a question after it"),
    (" 18", "18"), ("The answer is 18.", "18"), ("It is $1,234.50.", "1234.5"), ("1,234,567, or so", "1234567"),
    ("minus -5", "-5"), ("it is -$5", "-5"), ("$-5", "-5"), ("n-3", "3"), ("(1)-3", "3"), ("10 = -4", "-4"),
    ("a list 1,2,3", "3"), ("1,0000", "0"), ("18%", "18"), (".5", "1/2"), ("0.25 of them", "1/4"), ("3/4", "4"),
    ("#### 7\n", "7"), ("no number", None), ("", None), ("² ٣", None), ("Question: 5", None), ("4\nquestion: 5", "5"),
    ("18.00", "18"), ("007", "7"),
])
def test_last_number(text, number):
    found = gsm8k.last_number(text)
    assert found == (None if number is None else gsm8k.Fraction(number))


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def problem(i, number):
    return {"question": f"Problem {i} – how many? ",
            "answer": f"It is {i}+1=<<{i}+1={i + 1}>>{i + 1}.\nSo.\n#### {number}"}


@pytest.fixture
def files(tmp_path):
    train = write(tmp_path / "train.jsonl", *[problem(i, i) for i in range(10)])
    return train, write(tmp_path / "test.jsonl", *[problem(100 + i, n) for i, n in enumerate(["18", "1,000", "-2.5"])])


def prompts(files, out, *options):
    done = script("gsm8k.py", "prompts", "--train", files[0], "--test", files[1], "--out", out, *options)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_prompts(tmp_path, files):
    def shots(numbers):
        return "".join(f"Question: Problem {i} – how many?\nAnswer: It is {i}+1={i + 1}.\nSo.\nThe answer is {i}.\n\n"
                       for i in numbers)

    asked = [f"Question: Problem {100 + i} – how many?\nAnswer:" for i in range(3)]
    out = tmp_path / "prompts.jsonl"
    assert prompts(files, out) == [{"id": i, "prompt": shots(range(8)) + asked[i], "answer": answer}
                                   for i, answer in enumerate(["18", "1,000", "-2.5"])]
    assert [line["prompt"] for line in prompts(files, out, "--shots", 0, "--limit", 2)] == asked[:2]
    drawn = prompts(files, out, "--shots", 9, "--seed", 5)
    numbers = [int(line.split()[2]) for line in drawn[0]["prompt"].splitlines() if line.startswith("Question:")][:-1]
    assert len(set(numbers)) == 9 and numbers != sorted(numbers)
    assert [line["prompt"] for line in drawn] == [shots(numbers) + question for question in asked]
    assert prompts(files, out, "--shots", 9, "--seed", 5) == drawn != prompts(files, out, "--shots", 9, "--seed", 6)


def answer(i, text, sample=0, finish="stop"):
    return {"prompt": i, "sample": sample, "id": i, "text": text, "ids": [1], "finish": finish, "prompt_tokens": 9}


def scored(path, answers):
    done = script("gsm8k.py", "score", path, write(path.parent / "answers.jsonl", *answers))
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_scores(tmp_path, files):
    out = tmp_path / "prompts.jsonl"
    prompts(files, out)
    # right 2 of 3: sqrt(2/3 * 1/3 / 2) = 1/3
    assert scored(out, [answer(2, " -2.50."), answer(0, " 19\n18"), answer(1, " 1000 $, not 1,001")]) == [
        "3 questions: accuracy 0.6667, standard error 0.3333"]
    # 1, 1/2 and 0: mean 1/2, deviation 1/2, over sqrt(3)
    samples = [answer(0, "18"), answer(0, "it is 18.0", 1), answer(1, "$1,000", 0), answer(1, "nothing", 1),
               answer(2, "2.5 Question: -2.5", 0, "length"), answer(2, "goes on with 2", 1, "length")]
    assert scored(out, samples) == ["3 questions: accuracy 0.5000, standard error 0.2887",
                                    "without a number: 1 answers",
                                    "cut off by generate's --max-tokens before they ended: 1 answers"]
    prompts(files, out, "--limit", 1)
    assert scored(out, [answer(0, "18")]) == ["1 questions: accuracy 1.0000, standard error undefined"]


@pytest.mark.parametrize("which, lines, why", [
    ("train", [problem(0, 1)] * 7, "train.jsonl: 7 problems, fewer than --shots 8"),
    ("test", [], "test.jsonl: no problem in it"), ("test", ["", "{"], "test.jsonl:2: no JSON"),
    ("test", [problem(0, 1), "[1]"], "test.jsonl:2: no JSON object with question, answer"),
    ("test", [{"question": "q", "answer": 5}], "test.jsonl:1: no JSON object with question, answer"),
    ("train", [problem(0, 1), problem(1, "x")], "train.jsonl:2: the answer does not end in #### and a number"),
    ("test", [{"question": "q", "answer": "18"}], "test.jsonl:1: the answer does not end in"),
])
def test_problems_that_are_refused(tmp_path, files, which, lines, why):
    write(tmp_path / f"{which}.jsonl", *lines)
    words = ["prompts", "--train", files[0], "--test", files[1], "--out", tmp_path / "out.jsonl"]
    refused(script("gsm8k.py", *words), f"gsm8k.py: {tmp_path}/{why}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_files_and_options_that_are_refused(tmp_path, files):
    train, test = files
    words = ["prompts", "--train", train, "--test", test, "--out", tmp_path / "out.jsonl"]
    refused(script("gsm8k.py", *words, "--shots", -1), "--shots")
    refused(script("gsm8k.py", *words, "--limit", 0), "--limit")
    refused(script("gsm8k.py", *words[:-1], tmp_path / "none/out.jsonl"), "none/out.jsonl: No such file")
    refused(script("gsm8k.py", "prompts", "--train", train, "--test", tmp_path / "x", "--out", "y"), "x: No such file")
    train.write_bytes(b"\xff\n")
    refused(script("gsm8k.py", *words), "train.jsonl: it is not UTF-8")
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_that_are_refused(tmp_path, files):
    out, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts(files, out)
    good = [answer(i, "18") for i in range(3)]
    for lines, why in [(good[:1] + good[2:], "1 of 3 prompts have no answer, the first the id 1"),
                       (good + [answer(3, "18")], "answers.jsonl:4: the id 3 is none of"),
                       (good + good[:1], "answers.jsonl:4: the id 0 was there before"), ([], "3 of 3 prompts"),
                       ([{"id": 0, "sample": 0, "ids": [1]}], "answers.jsonl:1: no JSON object with id, sample, text"),
                       (["--- prompt 0, sample 0"], "answers.jsonl:1: no JSON")]:
        refused(script("gsm8k.py", "score", out, write(answers, *lines)), why)
    write(answers, *good)
    for lines, why in [([{"id": 0, "answer": "x"}], "prompts.jsonl:1: the answer is no number"),
                       ([{"id": 0, "answer": "1"}] * 2, "prompts.jsonl:2: "), ([], "prompts.jsonl: no prompt in it"),
                       ([{"prompt": "x"}], "prompts.jsonl:1: no JSON object with id, answer")]:
        refused(script("gsm8k.py", "score", write(out, *lines), answers), why)


def test_gsm8k_with_generate(tmp_path, files):
    """A random model: what it answers does not matter, but its answers can be read."""
    out = tmp_path / "prompts.jsonl"
    prompts(files, out)
    write(tmp_path / "config.json", {
        "model_type": "olmoe", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 320,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1,
        "max_position_embeddings": 2048, "eos_token_id": 256, "pad_token_id": None})
    done = script("make_random_model.py", "--out", tmp_path / "model", "--config", tmp_path / "config.json")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([OLMOE, "generate", "--model", tmp_path / "model", "--tokenizer", "bytes", "--input", out,
                           "--json", "--max-tokens", "5", "--n", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(a["id"], a["sample"]) for a in answers] == [(i, k) for i in range(3) for k in range(2)]
    assert scored(out, answers)[0].startswith("3 questions: accuracy ")
