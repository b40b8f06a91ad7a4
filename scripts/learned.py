#!/usr/bin/env python3
"""Reports what a training run on text has learned: learned.py FOLDER RUN

FOLDER holds train.txt, val.txt and, for the default corpus, entropy.json; RUN holds log.jsonl. Compares the last
validation's bits per byte with what xz -9e spends on the validation text after the training text (the size of both
minus the size of the training text), and with the entropy of the source; and looks at the experts' load. With an
entropy.json the bars of the default run are checked: at most 0.7 x xz and 1.6 x entropy, max/mean load below 2 in every
layer, no dead expert; exit 1 where one is missed. Standard library only.
"""
import json
import lzma
import sys
from pathlib import Path


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    folder, run = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        train, val = (folder / "train.txt").read_bytes(), (folder / "val.txt").read_bytes()
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"learned.py: {error}")
    with_val = [line for line in lines if "val_bpb" in line]
    if not with_val or not val:
        sys.exit(f"learned.py: no validation in {run / 'log.jsonl'}, or an empty {folder / 'val.txt'}")
    last, steps = with_val[-1], [line for line in lines if "step" in line]
    seconds = sum(line["ms"] for line in steps) / 1000
    bpb = last["val_bpb"]

    def xz(data):
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    xz_bpb = (xz(train + val) - xz(train)) * 8 / len(val)
    entropy_path = folder / "entropy.json"
    entropy = json.loads(entropy_path.read_text())["bits_per_byte"]["all"] if entropy_path.exists() else None
    load = max(layer["max_over_mean"] for layer in last["balance"])
    dead = sum(layer["dead"] for layer in last["balance"])
    rows = [(f"{bpb / xz_bpb:.2f} x", f"of the {xz_bpb:.3f} that xz -9e spends on the same text",
             bpb <= 0.7 * xz_bpb)]
    if entropy:
        rows.append((f"{bpb / entropy:.2f} x", f"of the {entropy:.3f} of the source's own choices",
                     bpb <= 1.6 * entropy))
    rows.append((f"{load:.2f}", "largest max/mean load of an expert in any layer", load < 2))
    rows.append((f"{dead}", "dead experts", dead == 0))

    print(f"\nstep {last['step']}, {seconds:.0f} s of training: validation {bpb:.4f} bits per byte")
    for value, what, good in rows:
        print(f"  {value:>8} {what}" + ("" if entropy is None else "  ok" if good else "  MISSED"))
    if entropy is not None and not all(good for _, _, good in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
