"""scripts/rows.py on made-up Parquet files of the published sets' schemas.

Run by `make test-peers`: the package pyarrow is in build/venv. OLMOE is the program (default ./olmoe).
"""
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from test_rows_script import ROOT, SCRIPT, answer, chat, message, refused, script, user

pyarrow = pytest.importorskip("pyarrow", reason="no pyarrow; make test-peers has it, in build/venv")
import pyarrow.parquet as parquet

pytestmark = pytest.mark.peers

OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))


def table(columns, large=False):
    """Columns of texts or of lists of messages, as datasets writes them (large: as others do)."""
    text = pyarrow.large_string() if large else pyarrow.string()
    messages = (pyarrow.large_list if large else pyarrow.list_)(pyarrow.struct([("content", text), ("role", text)]))
    arrays = {}
    for name, values in columns.items():
        lists = any(isinstance(value, list) for value in values)
        arrays[name] = pyarrow.array(values, messages if lists else text)
    return pyarrow.table(arrays)


def written(path):
    raw = path.read_bytes()
    lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def converted(*words):
    done = script(*words)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name, large", [("rows.jsonl", False), ("rows.jsonl.gz", True)])
def test_a_mix(tmp_path, name, large):
    """Two files with several row groups, in order; other columns; line breaks, quotes and other alphabets."""
    texts = ["two\nlines\r\n", 'a "quote" \\', "Привет, 日本語 😀", "\u2028\x00\x1f", "", " spaces "]
    conversations = [[user(f"{i}: {texts[i % 6]}"), answer(texts[(i + 1) % 6])] for i in range(2503)]
    conversations[1200] = [user("nobody answers")]
    conversations[2502] = [message("function", "x"), answer("y")]
    conversations[700] = [user("nor here")]
    for part, of in (("b", conversations[:1100]), ("a", conversations[1100:])):
        columns = {"dataset": ["made up"] * len(of), "id": [f"{part}{i}" for i in range(len(of))], "messages": of}
        parquet.write_table(table(columns, large), tmp_path / f"{part}.parquet", row_group_size=300)
    b, a, out = tmp_path / "b.parquet", tmp_path / "a.parquet", tmp_path / name
    lines = converted("sft", b, a, "--out", out)
    kept = [c for i, c in enumerate(conversations) if i not in (700, 1200, 2502)]
    assert written(out) == [{"messages": chat(*c)} for c in kept]
    assert lines == [
        f"{b}: 1,100 records, 1,099 rows", f"{a}: 1,403 records, 1,401 rows",
        f"left out, no message of the assistant: 2 (the first: {b}, row 701)",
        f"left out, a role other than system, user, assistant: 1 (the first: {a}, row 1403)", f"{out}: 2,500 rows"]
    assert not large or out.read_bytes()[4:8] == bytes(4)       # no time in it: the same command gives the same bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet", name]


def test_ultrafeedback(tmp_path):
    """The columns of HuggingFaceH4's set, and one with sources."""
    pairs = [("q0", "good", "bad"), ("q1", " ", "bad"), ("q2", "same", "same")]
    columns = {"prompt": [q for q, _, _ in pairs], "prompt_id": ["x"] * 3,
               "chosen": [[user(q), answer(c)] for q, c, _ in pairs],
               "rejected": [[user(q), answer(r)] for q, _, r in pairs]}
    scores = pyarrow.array([1.0, 2.0, 3.0])
    parquet.write_table(table(columns).append_column("score_chosen", scores), tmp_path / "h4.parquet")
    sources = table({**columns, "source": ["sharegpt", "truthful_qa", "false_qa"]})
    parquet.write_table(sources, tmp_path / "sources.parquet")
    dpo = [{"chosen": chat(user(q), answer(c)), "rejected": chat(user(q), answer(r))} for q, c, r in pairs]

    converted("dpo", tmp_path / "h4.parquet", "--out", tmp_path / "dpo.jsonl")
    assert written(tmp_path / "dpo.jsonl") == dpo
    lines = converted("dpo", tmp_path / "sources.parquet", "--out", tmp_path / "dpo.jsonl")
    assert written(tmp_path / "dpo.jsonl") == [dpo[0], dpo[2]]
    assert f"left out, from TruthfulQA: 1 (the first: {tmp_path}/sources.parquet, row 2)" in lines
    lines = converted("kto", tmp_path / "h4.parquet", "--out", tmp_path / "kto.jsonl")
    assert lines[0] == f"{tmp_path}/h4.parquet: 3 pairs, 5 rows"
    assert written(tmp_path / "kto.jsonl") == [
        {"prompt": f"<|user|>\n{q}\n<|assistant|>\n", "completion": text, "label": label}
        for q, *answers in pairs for text, label in zip(answers, (True, False)) if text != " "]


def test_a_text_that_is_not_utf8(tmp_path):
    good = table({"messages": [[user("q"), answer("a")]] * 5})
    text = pyarrow.array([b"q", b"a", b"q", b"\xff\xfe", b"q", b"a"], pyarrow.binary()).view(pyarrow.string())
    role = pyarrow.array(["user", "assistant"] * 3)
    structs = pyarrow.StructArray.from_arrays([text, role], ["content", "role"])
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2, 4, 6], pyarrow.int32()), structs)
    parquet.write_table(good, tmp_path / "good.parquet")
    parquet.write_table(pyarrow.table({"messages": lists}), tmp_path / "bad.parquet")
    lines = converted("sft", tmp_path / "good.parquet", tmp_path / "bad.parquet", "--out", tmp_path / "a.jsonl")
    assert written(tmp_path / "a.jsonl") == [{"messages": chat(user("q"), answer("a"))}] * 7
    assert f"left out, a text that is not UTF-8: 1 (the first: {tmp_path}/bad.parquet, row 2)" in lines


def test_train_takes_them(tmp_path):
    """Every row that is written, whatever its characters; train's table has their number, and nothing is dropped."""
    texts = ["two\nlines\r\n", 'a "quote" \\', "Привет, 日本語 😀", "\u2028\x00\x1f\x7f", " spaces ", "\ufeff\ufffe", "",
             "e\u0301"]
    pairs = [(f"q{i}", text, texts[i - 1]) for i, text in enumerate(texts)]
    columns = {"prompt": [q for q, _, _ in pairs], "chosen": [[user(q), answer(c)] for q, c, _ in pairs],
               "rejected": [[user(q), answer(r)] for q, _, r in pairs]}
    columns["messages"] = [[message("system", c), *chosen] for (_, c, _), chosen in zip(pairs, columns["chosen"])]
    parquet.write_table(table(columns), tmp_path / "all.parquet")
    words = ["--out", tmp_path / "model", "--config", ROOT / "configs/tiny.json"]
    subprocess.run([sys.executable, ROOT / "scripts/make_random_model.py", *words], check=True, capture_output=True)
    for objective, name, n in (("sft", "a.jsonl.gz", 8), ("dpo", "a.jsonl", 8), ("kto", "b.jsonl.gz", 14)):
        converted(objective, tmp_path / "all.parquet", "--out", tmp_path / name)
        assert len(written(tmp_path / name)) == n
        done = subprocess.run([OLMOE, "train", "--objective", objective, "--model", tmp_path / "model", "--tokenizer",
                               "bytes", "--data", tmp_path / name, "--out", tmp_path / objective, "--steps", "1",
                               "--global-batch", "4", "--peak-tflops", "1"], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert f": {n} rows of " in done.stdout
        first = json.loads((tmp_path / objective / "log.jsonl").read_text().split("\n")[0])
        assert first["dropped_rows"] == 0


def write_damaged(path, messages):
    """A file whose second row group has other bytes in its middle."""
    parquet.write_table(table({"messages": messages}), path, row_group_size=len(messages) // 2)
    group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    middle = group.dictionary_page_offset or group.data_page_offset
    raw[middle:middle + group.total_compressed_size] = b"\x5a" * group.total_compressed_size
    path.write_bytes(raw)


@pytest.mark.parametrize("what, words", [
    ("none", ["x.parquet: No such file"]), ("folder", ["x.parquet: Is a directory"]),
    ("text", ["x.parquet: ", "Parquet"]), ("empty", ["x.parquet: "]), ("cut", ["x.parquet: "]),
    ("damaged", ["x.parquet: "]), ("column", ["x.parquet: no column messages", "it has prompt, text"]),
    ("type", ["x.parquet: the column messages holds string, not lists of messages"]),
    ("fields", ["x.parquet: the column messages holds list<", "not lists of messages (role, content)"]),
    ("left", ["no row is left"])])
def test_files_that_are_refused(tmp_path, what, words):
    """With one line, and what an earlier call wrote stays; of several files, before anything is printed where the
    beginning of one shows it."""
    good, x, out = tmp_path / "good.parquet", tmp_path / "x.parquet", tmp_path / "a.jsonl"
    messages = [[user(f"q{i}"), answer("a")] for i in range(100)]
    parquet.write_table(table({"messages": messages}), good)
    if what == "folder":
        x.mkdir()
    elif what in ("text", "empty"):
        x.write_text('{"messages": []}\n' if what == "text" else "")
    elif what == "cut":
        x.write_bytes(good.read_bytes()[:-20])
    elif what == "damaged":
        write_damaged(x, messages)
    elif what != "none":
        columns = {"column": {"prompt": ["q"], "text": ["a"]}, "type": {"messages": ["q"]},
                   "fields": {"messages": [[]]}, "left": {"messages": [[user("q")]]}}[what]
        if what == "fields":
            columns = pyarrow.table({"messages": pyarrow.array([[{"from": "q", "value": "a"}]])})
        parquet.write_table(columns if what == "fields" else table(columns), x)
    out.write_text("before\n")
    done = script("sft", *([] if what == "left" else [good]), x, "--out", out)
    refused(done, *words)
    assert out.read_text() == "before\n" and not Path(f"{out}.part").exists()
    if what not in ("damaged", "left"):
        assert done.stdout == ""


def test_places_that_cannot_be_written(tmp_path):
    good = tmp_path / "good.parquet"
    parquet.write_table(table({"messages": [[user("q"), answer("a")]]}), good)
    refused(script("sft", good, "--out", tmp_path / "none/a.jsonl"), "none/a.jsonl: No such file")
    (tmp_path / "folder.jsonl").mkdir()
    refused(script("sft", good, "--out", tmp_path / "folder.jsonl"), "folder.jsonl: Is a directory")
    if os.path.exists("/dev/full"):
        (tmp_path / "full.jsonl.part").symlink_to("/dev/full")
        refused(script("sft", good, "--out", tmp_path / "full.jsonl"), "full.jsonl: No space left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.jsonl", "good.parquet"]


def peak(*words):
    """Bytes of memory that the script used at most: of its own, not of the process that started it."""
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])")
    done = subprocess.run([sys.executable, "-c", code, SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.parametrize("group", [1000, 40000])
def test_memory_does_not_grow_with_the_file(tmp_path, group):
    """Of texts that do not compress, 4 MB in a thousand rows: 4 MB and 120 MB, in row groups and in a single one. Read
    whole, the second adds its size to the memory; less than half of that is asked for."""
    def write(name, groups):
        texts = [os.urandom(2000).hex() for _ in range(1000)]
        columns = [table({"messages": [[user(f"{g} {t}"), answer("a")] for t in texts]}) for g in range(groups)]
        parquet.write_table(pyarrow.concat_tables(columns), tmp_path / name, row_group_size=group, compression="none",
                            use_dictionary=False)

    write("small", 1)
    write("large", 30)
    assert (tmp_path / "large").stat().st_size > 110e6
    small, large = (peak("sft", tmp_path / name, "--out", tmp_path / f"{name}.jsonl") for name in ("small", "large"))
    assert large - small < (tmp_path / "large").stat().st_size / 2
