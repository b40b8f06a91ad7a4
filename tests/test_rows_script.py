"""scripts/rows.py: what it makes of the published sets' records, and what it refuses. tests/test_rows_parquet.py has
files of them.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts/rows.py"
sys.path.insert(0, str(ROOT / "scripts"))
sys.dont_write_bytecode = True
import rows


def message(role, content):
    return {"content": content, "role": role}           # in the order of the published sets


def user(content):
    return message("user", content)


def answer(content):
    return message("assistant", content)


def chat(*messages):
    """Messages as a row has them."""
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# ------------------------------------------------------------------------------------------------
# A record's rows

@pytest.mark.parametrize("messages, why", [
    (None, "no messages"), ([], "no messages"), ([None, answer("a")], "a message without a role or content"),
    ([user(None), answer("a")], "a message without a role or content"),
    ([message(None, "q"), answer("a")], "a message without a role or content"),
    ([user("q"), message("tool", "x"), answer("a")], "a role other than system, user, assistant"),
    ([message("system", "s"), user("q")], "no message of the assistant"),
], ids=["none", "empty", "null", "no content", "no role", "role", "no answer"])
def test_messages_that_are_no_row(messages, why):
    good = [user("q"), answer("a")]
    assert list(rows.sft({"messages": messages})) == [why]
    assert list(rows.dpo({"chosen": messages, "rejected": good})) == [why]
    assert list(rows.dpo({"chosen": good, "rejected": messages})) == [why]


def test_messages_are_kept_as_they_are():
    """Neither stripped nor judged: that is train's. An empty answer leaves EOS to learn."""
    messages = [message("system", " s\n"), user(""), answer("\u2003a "), answer("")]
    assert list(rows.sft({"messages": messages})) == [{"messages": chat(*messages)}]


def test_pairs():
    chosen, rejected = [user("q"), answer("good")], [user("q"), answer("bad")]
    row = {"chosen": chat(*chosen), "rejected": chat(*rejected)}
    for source in ({}, {"source": None}, {"source": "ultrachat"}):
        assert list(rows.dpo({"chosen": chosen, "rejected": rejected, **source})) == [row]
    assert list(rows.dpo({"chosen": chosen, "rejected": rejected, "source": "truthful_qa"})) == ["from TruthfulQA"]
    assert list(rows.dpo({"chosen": chosen, "rejected": chosen})) == [{"chosen": chat(*chosen),
                                                                       "rejected": chat(*chosen)}]


def test_labels():
    """Two rows of a pair, the chosen answer first, and each alone where the other is empty."""
    def both(chosen, rejected, prompt="q "):
        return list(rows.kto({"prompt": prompt, "chosen": chosen, "rejected": rejected}))

    prompt = "<|user|>\nq \n<|assistant|>\n"
    good = {"prompt": prompt, "completion": " yes\n", "label": True}
    bad = {"prompt": prompt, "completion": "no", "label": False}
    chosen, rejected = [user("other"), answer(" yes\n"), user("more")], [user("q"), answer("no")]
    assert both(chosen, rejected) == [good, bad]
    assert both(chosen, [user("q"), answer(" \n\u3000")]) == [good, "an empty answer"]
    assert both([user("q"), answer("")], rejected) == ["an empty answer", bad]
    for missing in (None, [], [user("q")], [user("q"), None], [user("q"), answer(None)]):
        assert both(missing, rejected) == ["no prompt or no second message", bad]
    assert both(chosen, rejected, None) == ["no prompt or no second message"] * 2


# ------------------------------------------------------------------------------------------------
# The command

def script(*words, **environment):
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, timeout=100,
                          env={**os.environ, **environment})


def refused(done, *words):
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("rows.py: ") and all(word in done.stderr for word in words), done.stderr


def test_without_pyarrow(tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not here')\n")
    refused(script("sft", "a.parquet", "--out", tmp_path / "a.jsonl", PYTHONPATH=str(tmp_path)), "pyarrow is missing")
    assert [path.name for path in tmp_path.iterdir()] == ["pyarrow.py"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.xz", "jsonl"])
def test_names_that_train_does_not_know(tmp_path, name):
    refused(script("sft", "a.parquet", "--out", tmp_path / name), name, ".jsonl or .jsonl.gz")
