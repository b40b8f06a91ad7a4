#!/usr/bin/env python3
"""Cuts a text in two for training and validation: split_text.py TEXT DIR

Writes DIR/train.txt and DIR/val.txt: every twentieth stretch of about 18 kB, cut at line ends where there are any, is
for validation, so that both parts see all of a text that changes from beginning to end. Does nothing where they are
there and TEXT has not changed since. Standard library only.

    split_text.py --folder TEXT     prints the name of TEXT's own folder: / is +, and @ with two hexadecimal digits is a
                                    byte that is no letter, digit, dot, dash or underscore. No other path has this name
"""
import json
import os
import re
import stat
import sys

STRETCH, EVERY, LEAST = 18000, 20, 400000
LONGEST = 255 - len("train-")           # bytes of a folder's name
CONTINUED = bytes(range(0x80, 0xc0))    # bytes of a character after its first


def folder_of(path):
    """Bytes from 0x80 on are parts of letters."""
    escape = lambda match: b"+" if match[0] == b"/" else b"@%02X" % match[0][0]
    return re.sub(rb"[^A-Za-z0-9._\x80-\xff-]", escape, os.fsencode(path))


def file_of(path):
    """~ at the beginning is the home folder, unless there is such a file."""
    return path if os.path.exists(path) else os.path.expanduser(path)


def what_is_wrong(path, status):
    """Why this file is no text to train on, or None."""
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is a folder" if stat.S_ISDIR(status.st_mode) else f"{path} is no file with a size"
    if path.lower().endswith((".jsonl", ".json", ".gz", ".npy", ".zst", ".xz", ".bz2", ".zip", ".parquet")):
        return (f"{path} is not plain text; tokens are made by: "
                f"olmoe tokenize --tokenizer bytes --out FILE.npy {path}")
    if status.st_size < LEAST:
        return f"{path} has {status.st_size} bytes; to train and validate on it takes {LEAST} or more"
    with open(path, "rb") as text:
        if text.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return f"{path} is UTF-16 (its first two bytes); UTF-8 is made by: iconv -f UTF-16 -t UTF-8"
    return None


def stretches(text):
    """Pieces of the open file. One that has no line end near is cut after a whole character of UTF-8."""
    while piece := text.read(STRETCH):
        piece += text.readline(2000)
        rest = b"" if piece.endswith(b"\n") else text.peek(3)[:3]
        yield piece + text.read(len(rest) - len(rest.lstrip(CONTINUED)))


def split(path, folder):
    status = os.stat(path)
    wrong = what_is_wrong(path, status)
    if wrong:
        sys.exit(f"split_text.py: {wrong}")
    paths = [f"{folder}/train.txt", f"{folder}/val.txt"]
    source = json.dumps({"bytes": status.st_size, "modified_ns": status.st_mtime_ns})
    try:
        with open(f"{folder}/text.json") as before:
            if before.read() == source and all(map(os.path.exists, paths)):
                return
    except OSError:
        pass
    os.makedirs(folder, exist_ok=True)
    with open(path, "rb") as text, open(paths[0] + ".tmp", "wb") as train, open(paths[1] + ".tmp", "wb") as val:
        for i, piece in enumerate(stretches(text), 1):
            (val if i % EVERY == 0 else train).write(piece)
    for name in paths:
        os.replace(name + ".tmp", name)
    with open(f"{folder}/text.json", "w") as record:                # the last one: the two are whole
        record.write(source)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    try:
        if sys.argv[1] == "--folder":
            folder = folder_of(sys.argv[2])
            if len(folder) > LONGEST:
                sys.exit(f"split_text.py: {sys.argv[2]}: File name too long for a folder of its own; make a link to it")
            sys.stdout.buffer.write(folder)
        else:
            split(file_of(sys.argv[1]), sys.argv[2])
    except OSError as error:
        sys.exit(f"split_text.py: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
