#!/usr/bin/env python3
"""Cuts a text in two for training and validation: split_text.py TEXT DIR

Writes DIR/train.txt and DIR/val.txt: every twentieth stretch of about 18 kB, cut at line ends where there are any, is
for validation, so that both parts see all of a text that changes from beginning to end. Standard library only.
"""
import os
import sys

STRETCH, EVERY = 18000, 20


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    path, folder = sys.argv[1:]
    if path.endswith((".jsonl", ".json", ".gz", ".npy")):
        sys.exit(f"split_text.py: {path} is not plain text; "
                 f"tokenize it with: olmoe tokenize --tokenizer bytes --out FILE.npy {path}")
    try:
        size = os.path.getsize(path)
        if size < 400000:
            sys.exit(f"split_text.py: {path} has {size} bytes; to train and validate on it takes 400000 or more")
        os.makedirs(folder, exist_ok=True)
        train_path, val_path = f"{folder}/train.txt", f"{folder}/val.txt"
        with open(path, "rb") as text, open(train_path, "wb") as train, open(val_path, "wb") as val:
            stretch = 0
            while piece := text.read(STRETCH):
                piece += text.readline(2000)
                stretch += 1
                (val if stretch % EVERY == 0 else train).write(piece)
    except OSError as error:
        sys.exit(f"split_text.py: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
