#!/usr/bin/env python3
"""Reports what a training run on text has learned: learned.py FOLDER RUN

FOLDER holds train.txt, val.txt and, for the default corpus, entropy.json and tasks/*.jsonl; RUN holds log.jsonl.
Compares the last validation's bits per byte with what xz -9e spends on the validation text after the training text (the
size of both minus the size of the training text), and with the entropy of the source; the last evaluation of each task
with that before the first step; and looks at the experts' load. With an entropy.json the bars of the default run are
checked: at most 0.7 x xz and 1.6 x entropy, each task's accuracy at least three standard errors above chance, max/mean
load below 2 in every layer, no dead expert; exit 1 where one is missed. Standard library only.
"""
import json
import lzma
import math
import sys
from collections import Counter
from pathlib import Path


class Unreadable(Exception):
    """What of the folder or of the run is not as training leaves it."""


def read(folder, run):
    """The texts, the log's steps, its last line with a validation, and the entropy of the source or None."""
    try:
        train, val = (folder / "train.txt").read_bytes(), (folder / "val.txt").read_bytes()
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        entropy = json.loads((folder / "entropy.json").read_text())["bits_per_byte"]["all"] \
            if (folder / "entropy.json").exists() else None
        steps = [line for line in lines if "step" in line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreadable(f"{folder}, {run / 'log.jsonl'}: {type(error).__name__}: {error}")
    if not val:
        raise Unreadable(f"{folder / 'val.txt'} is empty")
    if not any("val_loss" in line for line in steps):
        raise Unreadable(f"no validation in {run / 'log.jsonl'}")
    last = [line for line in steps if "val_loss" in line][-1]
    if last.get("val_bpb") is None:
        raise Unreadable(f"the last validation in {run / 'log.jsonl'} has no bits per byte: "
                         f"its text has nothing to predict, or its loss is not finite")
    return train, val, steps, last, entropy


def chance(path):
    """Expectation and standard error of a task's accuracy where every choice of a question is as likely"""
    choices = Counter(json.loads(line)["doc_id"] for line in path.read_text().splitlines())
    p = [1 / n for n in choices.values()]
    return sum(p) / len(p), math.sqrt(sum(x * (1 - x) for x in p)) / len(p)


def tasks(folder, run, steps):
    """Of each: its name, the first accuracy where that is of step 0, the last, and what it has to reach"""
    for path in sorted((folder / "tasks").glob("*.jsonl")):
        key = f"eval/downstream/{path.stem}_acc"
        found = [(line["step"], line[key]) for line in steps if key in line]
        if not found:
            raise Unreadable(f"{run / 'log.jsonl'} has no evaluation of {path}; remove {run} to start over")
        mean, error = chance(path)
        yield path.stem, found[0][1] if found[0][0] == 0 else None, found[-1][1], mean + 3 * error


def xz(data):
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def report(folder, run):
    """Prints it. True where no bar is missed."""
    train, val, steps, last, entropy = read(folder, run)
    seconds = sum(line["ms"] for line in steps if line["step"] > 0) / 1000
    bpb = last["val_bpb"]
    xz_bpb = (xz(train + val) - xz(train)) * 8 / len(val)
    load = max(layer["max_over_mean"] for layer in last["balance"])
    dead = sum(layer["dead"] for layer in last["balance"])
    rows = []
    if xz_bpb > 0:
        rows.append((f"{bpb / xz_bpb:.2f} x", f"of the {xz_bpb:.3f} that xz -9e spends on the same text",
                     bpb <= 0.7 * xz_bpb))
    else:
        rows.append(("-", "nothing to compare with: xz -9e spends no byte on this text after the training text", False))
    if entropy:
        rows.append((f"{bpb / entropy:.2f} x", f"of the {entropy:.3f} of the source's own choices",
                     bpb <= 1.6 * entropy))
    for name, before, accuracy, bar in tasks(folder, run, steps):
        since = "" if before is None else f", {before:.2f} before training"
        rows.append((f"{accuracy:.2f}", f"of {name} right{since}; three standard errors above chance are {bar:.2f}",
                     accuracy >= bar))
    rows.append((f"{load:.2f}", "largest max/mean load of an expert in any layer", load < 2))
    rows.append((f"{dead}", "dead experts", dead == 0))

    print(f"\nstep {last['step']}, {seconds:.0f} s of training: validation {bpb:.4f} bits per byte")
    for value, what, good in rows:
        print(f"  {value:>8} {what}" + ("" if entropy is None else "  ok" if good else "  MISSED"))
    return entropy is None or all(good for _, _, good in rows)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    try:
        sys.exit(0 if report(Path(sys.argv[1]), Path(sys.argv[2])) else 1)
    except (Unreadable, KeyError, TypeError, ValueError) as error:      # a log of another program
        sys.exit(f"learned.py: {error if isinstance(error, Unreadable) else repr(error)}")


if __name__ == "__main__":
    main()
