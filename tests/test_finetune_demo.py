"""The scripts of `make finetune`: what conversations and questions say, the judge, pairs, and the steps from one to the
other with a stand-in for the program."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import finetune
import make_conversations
import make_corpus
from make_conversations import right

SIZES = ["--conversations", "3000", "--questions", "600", "--held-out", "500"]
FILES = ("sft", "questions", "held-out")


def make(out, *options):
    command = [sys.executable, ROOT / "scripts/make_conversations.py", "--out", out, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Its files as lists of rows, and the folder."""
    out = tmp_path_factory.mktemp("conversations")
    done = make(out, *SIZES)
    assert done.returncode == 0, done.stderr
    return {name: [json.loads(line) for line in (out / f"{name}.jsonl").open()] for name in FILES}, out


def exchanges(row):
    """(question, answer, system message or "") of a conversation's turns"""
    messages = row["messages"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = [m for m in messages if m["role"] != "system"]
    assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [(turns[i]["content"], turns[i + 1]["content"], system) for i in range(0, len(turns), 2)]


def facts(question):
    """What a question asks for, read from its text: two numbers and what is done to them, a name that is no one's, or
    the words without their opening."""
    numbers = re.findall(r"\d+", question)
    if numbers:
        assert len(numbers) == 2
        return ("-" if "-" in question else "+", *map(int, numbers))
    for name in re.findall(r"\b[A-Z][a-z]+\b", question):
        if name in make_conversations.STRANGERS:
            return name
    return re.sub(r"^(Hello\. |And now: )", "", question)


def check(question, answer, system):
    """An answer of a conversation is true, by a way of its own."""
    fact = facts(question)
    if isinstance(fact, tuple):
        sign, x, y = fact
        assert int(re.findall(r"\d+", answer)[-1]) == (x + y if sign == "+" else x - y)
        for left, result in re.findall(r"(\d+(?: [+-] \d+)+) = (\d+)", answer):
            assert eval(left) == int(result), answer
        if ":" in answer:
            steps = re.fullmatch(rf"{x} \+ {y}: (\d) \+ (\d) = \d+, (\d) \+ (\d)(?: \+ 1)? = \d, sum \d+\.", answer)
            assert [int(digit) for digit in steps.groups()] == [x % 10, y % 10, x // 10, y // 10]
        return "calculation"
    names = [name for name in make_corpus.CAST if re.search(rf"\b{name}\b", question)]
    if names:
        kind = make_corpus.CAST[names[0]]
        assert answer == (f"{kind}." if system else f"{names[0]} is {make_corpus.a(kind)}."), question
        return "animal"
    assert answer.rstrip(".") in make_conversations.UNKNOWN and answer.endswith("."), (question, answer)
    return "refusal"


def test_answers_are_true(made):
    rows, _ = made
    seen = [check(*turn) for row in rows["sft"] for turn in exchanges(row)]
    assert {"calculation", "animal", "refusal"} == set(seen)
    assert not set(make_conversations.STRANGERS) & set(make_corpus.CAST)


def test_rows(made):
    """Systems and several turns are among them, and none is longer than the model's positions."""
    rows, _ = made
    limit = json.loads((ROOT / "configs/tiny.json").read_text())["max_position_embeddings"]
    assert all(make_conversations.tokens(row["messages"]) <= limit - 56 for row in rows["held-out"] + rows["questions"])
    assert all(make_conversations.tokens(row["messages"]) <= limit for row in rows["sft"])
    assert {row["messages"][0]["role"] for row in rows["sft"]} == {"system", "user"}
    assert {len(exchanges(row)) for row in rows["sft"]} == {1, 2}
    for name in ("questions", "held-out"):
        assert [row["id"] for row in rows[name]] == list(range(len(rows[name])))
        counts = [sum(row["kind"] == kind for row in rows[name]) for kind in make_conversations.KINDS]
        assert max(counts) - min(counts) <= 1
        assert len({json.dumps(row["messages"]) for row in rows[name]}) == len(rows[name])


def test_no_fact_is_in_two_files(made):
    rows, _ = made
    sides = [{facts(question) for row in rows["sft"] for question, _, _ in exchanges(row)}]
    sides += [{facts(row["messages"][-1]["content"]) for row in rows[name]} for name in ("questions", "held-out")]
    assert [sides[i] & sides[j] for i, j in ((0, 1), (0, 2), (1, 2))] == [set()] * 3
    assert all(len(side) > 100 for side in sides)


def test_same_seed_same_bytes(made, tmp_path):
    _, out = made
    for folder, seed in (("again", 1), ("other", 2)):
        assert make(tmp_path / folder, *SIZES, "--seed", seed).returncode == 0
        for name in FILES:
            same = (tmp_path / folder / f"{name}.jsonl").read_bytes() == (out / f"{name}.jsonl").read_bytes()
            assert same == (seed == 1), name


def test_bad_options(tmp_path):
    (tmp_path / "file").write_text("")
    for options, words in (((tmp_path / "file",), "file: "), ((tmp_path, "--held-out", 100000), "no 100000 different")):
        done = make(*options)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("make_conversations.py: ") and words in done.stderr


def test_judge():
    """An answer counts at the beginning of the text, and to the end of its sentence."""
    answers = ["42", "21 + 21: 1 + 1 = 2, 2 + 2 = 4, sum 42"]
    for text in ("42", "42.", " 42.\n", "42\nMore", "42. It is.", answers[1] + ".", answers[1].upper()):
        assert right(text, answers), text
    wrong = answers[1].replace("sum 42", "sum 41")
    for text in ("", "4", "421", "42 + 1", "42, or 43", "It is 42", wrong, "\u0664\u0662"):
        assert not right(text, answers), text
    assert right("anna IS a Fox", ["Anna is a fox"]) and not right("Anna is a foxglove", ["Anna is a fox"])


def test_pairs():
    """The first right answer and the first wrong one that end; no pair where there is only one of them."""
    def question(i):
        return {"id": i, "kind": "sum", "messages": [{"role": "user", "content": f"q{i}"}], "answers": ["4"]}

    def sample(i, text, finish="eos"):
        return {"id": i, "text": text, "finish": finish}

    samples = [sample(2, "4"), sample(0, "5", "length"), sample(0, "6 \ufffd"), sample(0, " 7"), sample(0, "4."),
               sample(0, "4"), sample(0, "8"), sample(1, "9"), sample(1, "4.", "length"), sample(3, ""), sample(3, "4")]
    first, last = finetune.make_pairs([question(i) for i in range(5)], samples)
    assert [[m["content"] for m in first[side]] for side in ("chosen", "rejected")] == [["q0", "4."], ["q0", "7"]]
    assert last["chosen"][1] == {"role": "assistant", "content": "4"} and last["rejected"][1]["content"] == ""


@pytest.mark.parametrize("sft, dpo, good", [(20, 23, True), (19.9, 50, False), (20, 22.9, False),
                                            (float("nan"), 3, False)])
def test_bars(sft, dpo, good):
    greedy = {name: {"sum": value, "all": value} for name, value in (("base", 0), ("SFT", sft), ("DPO", dpo))}
    lines, reached = finetune.table(greedy, {})
    assert reached == good and any("MISSED" in line for line in lines) != good


# A program that writes checkpoints, and answers as many questions as its model's name says: base none, SFT 1 in 2, DPO
# all. Where several answers are drawn, half of them are right.
STAND_IN = """#!{python}
import json, sys
from pathlib import Path
options = dict(zip(sys.argv, sys.argv[1:]))
with open(Path(__file__).parent / "calls", "a") as calls:
    calls.write(sys.argv[1] + "\\n")
if sys.argv[1] == "train":
    folder = Path(options["--out"]) / "step-00000010"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text("")
    lines = sum(1 for line in open(options["--data"]))
    assert lines > 100 and "--resume" in sys.argv
    sys.exit({fail})
every = {{"sft": 2, "dpo": 1}}.get(Path(options["--model"]).parent.name, 10 ** 9)
for line in open(options["--input"]):
    row = json.loads(line)
    for i in range(int(options.get("--n", 1))):
        good = row["id"] % every == every - 1 if "--n" not in options else i % 2
        print(json.dumps(dict(id=row["id"], text=row["answers"][0] if good else "?", finish="eos")))
"""


@pytest.fixture
def steps(tmp_path):
    """finetune(more options) runs finetune.py with the stand-in; calls() is what was called."""
    class Steps:
        program, out, base = tmp_path / "olmoe", tmp_path / "out", tmp_path / "base/step-00000700"

        def program_is(self, fail=0):
            self.program.write_text(STAND_IN.format(python=sys.executable, fail=fail))
            self.program.chmod(0o755)

        def finetune(self, *more):
            command = [sys.executable, ROOT / "scripts/finetune.py", "--base", self.base.parent, "--out", self.out,
                       "--olmoe", self.program, *more]
            return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)

        def calls(self):
            return (tmp_path / "calls").read_text().split()

    steps = Steps()
    steps.program_is()
    steps.base.mkdir(parents=True)
    (steps.base / "model.safetensors").write_text("weights")
    return steps


def test_steps(steps):
    """Each is done once; called again, only training is, which ends at once; the table and its bars."""
    done = steps.finetune()
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps.calls() == ["train", "generate", "train"] + ["generate"] * 6
    rows = {line.split()[0]: float(line.split()[-1]) for line in done.stdout.splitlines()
            if re.match(r"  (base|SFT|DPO)  ", line)}
    assert rows == {"base": 0, "SFT": 50, "DPO": 100}
    assert done.stdout.count(" ok\n") == 2
    pairs = [json.loads(line) for line in (steps.out / "pairs.jsonl").open()]
    assert len(pairs) == finetune.QUESTIONS and pairs[0]["rejected"][-1]["content"] == "?"
    again = steps.finetune()
    assert again.returncode == 0 and steps.calls()[9:] == ["train", "train"]
    (steps.out / "dpo-0.jsonl").write_text((steps.out / "sft-0.jsonl").read_text())
    missed = steps.finetune()
    assert missed.returncode == 1 and missed.stdout.count("MISSED") == 1 and missed.stderr == ""


def test_steps_that_fail(steps):
    """One line, and what was there stays."""
    def refused(*words, more=()):
        done = steps.finetune(*more)
        assert done.returncode == 1 and done.stderr.startswith("finetune.py: ") and done.stderr.count("\n") == 1
        assert all(word in done.stderr for word in words), done.stderr

    steps.program_is(fail=3)
    refused("olmoe train", "3")
    steps.program_is()
    refused("another model, seed or recipe", "remove it", more=["--seed", 5])
    (steps.base / "model.safetensors").write_text("other weights")
    refused("another model, seed or recipe")
    (steps.base / "model.safetensors").unlink()
    refused("model.safetensors")
    steps.base.rmdir()
    refused("no checkpoint", "make train")
