#!/usr/bin/env python3
"""Makes rows for `olmoe train --objective sft|dpo|kto` from Parquet files of the published sets.

    rows.py sft|dpo|kto FILE.parquet... --out FILE.jsonl[.gz]

The sets are those of OLMoE-1B-7B-Instruct (github.com/allenai/OLMoE, README.md, Adaptation):

    sft   allenai/tulu-v3.1-mix-preview-4096-OLMoE: the column `messages`, a list of {role, content}
    dpo   allenai/ultrafeedback_binarized_cleaned or argilla/ultrafeedback-binarized-preferences-cleaned: `chosen` and
          `rejected`, lists of messages; and `source`, where there is one
    kto   HuggingFaceH4/ultrafeedback_binarized, the split train_prefs: `prompt`, `chosen`, `rejected`. A pair is two
          rows of texts, the chosen answer first (github.com/Muennighoff/kto, kto.py)

Any set with these columns will do; others are not read. Files follow one another. Left out, and counted:

    sft, dpo   rows where a message has no content, or a role other than system, user and assistant; and where no
               message is the assistant's, so that nothing is a target. Rows whose targets --seq cuts off are for
               train to find, which has the tokenizer.
    dpo        pairs whose `source` is truthful_qa: TruthfulQA is among the model's evaluations. The cleaned sets have
               none of them.
    kto        empty answers, or of white space alone; the other row of such a pair stays

A file is read a thousand rows at a time, whatever its size. The result gets its name when it is whole.
Needs the package pyarrow: `make venv`, then build/venv/bin/python scripts/rows.py.
"""
import argparse
import contextlib
import gzip
import json
import os
import sys

try:
    import pyarrow
    import pyarrow.parquet as parquet
except ImportError:
    pyarrow = None

ROLES = ("system", "user", "assistant")
ROWS_AT_A_TIME = 1000
COLUMNS = {"sft": {"messages": "messages"},         # objective -> column -> what it holds
           "dpo": {"chosen": "messages", "rejected": "messages"},
           "kto": {"prompt": "text", "chosen": "messages", "rejected": "messages"}}
OPTIONAL = {"sft": {}, "dpo": {"source": "text"}, "kto": {}}


def fail(message):
    sys.exit(f"rows.py: {message}")


# ------------------------------------------------------------------------------------------------
# A record of the set, {column: value} -> its rows. Instead of a row there may be the reason why it is left out, a text.

def unusable(messages):
    """Why a list of messages is no row, or None."""
    if not messages:
        return "no messages"
    if any(m is None or m["role"] is None or m["content"] is None for m in messages):
        return "a message without a role or content"
    if any(m["role"] not in ROLES for m in messages):
        return "a role other than " + ", ".join(ROLES)
    if all(m["role"] != "assistant" for m in messages):
        return "no message of the assistant"
    return None


def plain(messages):
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def sft(record):
    messages = record["messages"]
    yield unusable(messages) or {"messages": plain(messages)}


def dpo(record):
    chosen, rejected = record["chosen"], record["rejected"]
    if record.get("source") == "truthful_qa":
        yield "from TruthfulQA"
    else:
        yield unusable(chosen) or unusable(rejected) or {"chosen": plain(chosen), "rejected": plain(rejected)}


def kto(record):
    for column, label in (("chosen", True), ("rejected", False)):
        messages = record[column] or []
        answer = messages[1]["content"] if len(messages) > 1 and messages[1] else None
        if record["prompt"] is None or answer is None:
            yield "no prompt or no second message"
        elif not answer.strip():
            yield "an empty answer"
        else:
            yield {"prompt": f"<|user|>\n{record['prompt']}\n<|assistant|>\n", "completion": answer, "label": label}


# ------------------------------------------------------------------------------------------------
# Files

def holds(kind, what):
    """Does a column of this type hold texts, or lists of messages?"""
    types = pyarrow.types
    if what == "text":
        return types.is_string(kind) or types.is_large_string(kind)
    if not (types.is_list(kind) or types.is_large_list(kind)) or not types.is_struct(kind.value_type):
        return False
    fields = {kind.value_type.field(i).name: kind.value_type.field(i).type for i in range(kind.value_type.num_fields)}
    return all(name in fields and holds(fields[name], "text") for name in ("role", "content"))


@contextlib.contextmanager
def reading(path):
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.filename else str(error).split("\n")[0]
        fail(f"{path}: {reason}")


def opened(path, objective):
    """The file, and the columns of it that the objective reads. Ends the program where it has none such."""
    with reading(path):
        open(path, "rb").close()            # says in plain words why not
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)     # else whole columns are in memory
        types = {field.name: field.type for field in file.schema_arrow}
    for name, what in COLUMNS[objective].items():
        if name not in types:
            fail(f"{path}: no column {name}, which {objective} needs; it has {', '.join(types) or 'none'}")
        if not holds(types[name], what):
            wanted = "texts" if what == "text" else "lists of messages (role, content)"
            fail(f"{path}: the column {name} holds {types[name]}, not {wanted}")
    more = [name for name, what in OPTIONAL[objective].items() if name in types and holds(types[name], what)]
    return file, [*COLUMNS[objective], *more]


def records(path, objective):
    """The records of a file; None for one with a text that is not UTF-8."""
    file, columns = opened(path, objective)
    with reading(path), file:
        for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
            for i in range(batch.num_rows):
                try:
                    yield {name: batch.column(name)[i].as_py() for name in columns}
                except UnicodeDecodeError:
                    yield None


def convert(paths, objective, write):
    """Gives the rows to `write`. Returns how many, and {reason: [how many were left out, where the first was]}."""
    for path in paths:                      # all are looked at before the first is read
        opened(path, objective)[0].close()
    rows_of = {"sft": sft, "dpo": dpo, "kto": kto}[objective]
    all_rows, left_out = 0, {}
    for path in paths:
        rows = number = 0
        for number, record in enumerate(records(path, objective), 1):
            for row in rows_of(record) if record is not None else ["a text that is not UTF-8"]:
                if isinstance(row, str):
                    left_out.setdefault(row, [0, f"{path}, row {number}"])[0] += 1
                else:
                    write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                    rows += 1
        print(f"{path}: {number:,} {'records' if objective == 'sft' else 'pairs'}, {rows:,} rows", flush=True)
        all_rows += rows
    return all_rows, left_out


@contextlib.contextmanager
def whole(path):
    """A file to write to that gets its name at the end. Nothing in it tells when it was made."""
    part = path + ".part"
    raw = open(part, "wb")
    try:
        with raw:
            if path.endswith(".gz"):
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as file:
                    yield file
            else:
                yield raw
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)                 # where it did not become `path`


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("objective", choices=COLUMNS)
    parser.add_argument("files", nargs="+", metavar="FILE.parquet", help="of a published set, in order")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl[.gz]")
    options = parser.parse_args()
    if not options.out.endswith((".jsonl", ".jsonl.gz")):
        fail(f"--out {options.out}: the name has to end in .jsonl or .jsonl.gz, by which train knows what it is")
    if pyarrow is None:
        fail("pyarrow is missing; make venv installs it, for build/venv/bin/python scripts/rows.py")
    try:
        with whole(options.out) as file:
            rows, left_out = convert(options.files, options.objective, file.write)
            for reason, (count, first) in left_out.items():
                print(f"left out, {reason}: {count:,} (the first: {first})")
            if rows == 0:
                fail("no row is left, and nothing was written")
    except OSError as error:
        fail(f"{options.out}: {error.strerror or error}")
    print(f"{options.out}: {rows:,} rows")


if __name__ == "__main__":
    main()
