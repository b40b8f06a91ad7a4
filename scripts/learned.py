#!/usr/bin/env python3
"""Reports what a training run on text has learned: learned.py FOLDER RUN

FOLDER holds train.txt, val.txt and, for the default corpus, entropy.json, tasks/*.jsonl and routing.json (`olmoe
routing` of val.npy); RUN holds log.jsonl and routing-STEP.json. Compares the last validation's bits per byte with what
xz -9e spends on the validation text after the training text (the size of both minus the size of the training text), and
with the entropy of the source; the last evaluation of each task with that before the first step; the experts that were
chosen at each step with those at the last (saturation); and looks at the experts' load, and at each domain's tokens.

With an entropy.json the bars of the default run are checked: at most 0.7 x xz and 1.6 x entropy, each task's accuracy
at least three standard errors above chance, max/mean load below 2 in every layer, no dead expert; saturation, as a mean
over layers, above that of random choices and higher at the last step before the end than at the first; and for each
domain an expert, in some layer, that takes at least its uniform share of the domain's tokens and 1.5 times the share
that it takes of the others'. Exit 1 where one is missed. Standard library only.
"""
import json
import lzma
import math
import sys
from collections import Counter
from pathlib import Path

import routing_files
from routing_files import Unreadable        # what of the folder or of the run is not as training leaves it


def read(folder, run):
    """The texts, the log's steps, its last line with a validation, and the entropy of the source by domain, or None."""
    try:
        train, val = (folder / "train.txt").read_bytes(), (folder / "val.txt").read_bytes()
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        entropy = json.loads((folder / "entropy.json").read_text())["bits_per_byte"] \
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


def settling(run):
    """(value, what, is it good?) of the saturation of the run's routing, as a mean over layers"""
    files = [(str(path), routing_files.read(path)) for path in sorted(run.glob("routing-*.json"))]
    if not all("step" in data and "choices" in data for _, data in files):
        raise Unreadable(f"{run}: a routing-*.json that is not of training")
    if not files:
        return None
    newest = max(files, key=lambda file: file[1]["step"])[1]
    last, points = routing_files.run_saturation([file for file in files if file[1].get("text") == newest.get("text")])
    if len(points) < 2:
        return "-", "nothing to compare with: saturation needs the routing of three steps", False
    (first, *_), (before, *_) = points[0], points[-1]
    of_steps = [sum(topk) / len(topk) for _, _, topk in points]
    random, k = newest["k"] / newest["experts"], newest["k"]
    what = (f"of the top {k} experts at step {before} are those of step {last}; {of_steps[0]:.2f} at step {first}, "
            f"{random:.2f} at random")
    return f"{of_steps[-1]:.2f}", what, random < min(of_steps) and of_steps[0] < of_steps[-1]


def specialists(path, domains):
    """Of each domain: (value, what, is it good?) of the expert that its tokens have more often than others, by the
    largest factor of those with at least their uniform share of it. The bar is the factor from which on the figures of
    OLMoE's authors name an expert."""
    data = routing_files.read(path)
    for name in domains:
        others = [domain for other, domain in data["domains"].items() if other != name]
        if name not in data["domains"] or not others:
            raise Unreadable(f"{path} has no domain {name}, or no other")
        domain, elsewhere = data["domains"][name], sum(other["tokens"] for other in others)
        best = None
        for l in range(data["layers"]):
            for e in range(data["experts"]):
                share = domain["counts"][l][e] / domain["tokens"]
                other = sum(domain["counts"][l][e] for domain in others) / elsewhere
                enough = share >= data["k"] / data["experts"]
                rank = enough, share / other if other else math.inf, -l, -e
                if best is None or rank > best[0]:
                    best = rank, share, other
        (enough, factor, l, e), share, other = best
        what = f"of {name}'s tokens have expert {-e} of layer {-l}, of the others {other:.2f}; 1.5 times that is"
        yield f"{share:.2f}", f"{what} {1.5 * other:.2f}", enough and factor >= 1.5


def routing(folder, run, entropy):
    """The rows about routing: bars of the default run. A run on another text may be without."""
    row = settling(run)
    if entropy is None:
        return [row] if row else []
    if row is None or not (folder / "routing.json").exists():
        raise Unreadable(f"{folder / 'routing.json' if row else run / 'routing-*.json'}: no such file; remove {run} to "
                         f"start over")
    return [row, *specialists(folder / "routing.json", [name for name in entropy if name != "all"])]


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
        of_all = entropy["all"]
        rows.append((f"{bpb / of_all:.2f} x", f"of the {of_all:.3f} of the source's own choices", bpb <= 1.6 * of_all))
    for name, before, accuracy, bar in tasks(folder, run, steps):
        since = "" if before is None else f", {before:.2f} before training"
        rows.append((f"{accuracy:.2f}", f"of {name} right{since}; three standard errors above chance are {bar:.2f}",
                     accuracy >= bar))
    rows.append((f"{load:.2f}", "largest max/mean load of an expert in any layer", load < 2))
    rows.append((f"{dead}", "dead experts", dead == 0))
    rows += routing(folder, run, entropy)

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
