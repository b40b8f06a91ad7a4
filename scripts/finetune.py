#!/usr/bin/env python3
"""Fine-tunes the default run's model, by SFT and then by DPO on pairs that the result itself made, and measures it.

    finetune.py --base build/train/run --out build/finetune/seed-1 [--seed 1] [--olmoe ./olmoe]

1. make_conversations.py makes conversations, questions to draw answers to, and 500 questions that are held out.
2. olmoe train --objective sft, from the last checkpoint of --base.
3. olmoe generate --n draws 8 answers to each question, at temperature 0.8. The source's rules judge them. Where a right
   and a wrong one were drawn, the first of each are a pair.
4. olmoe train --objective dpo on the pairs.
5. The answers to the held-out questions, of all three models: always the likeliest token (temperature 0), and drawn at
   temperature 1. The bars are for temperature 0: SFT at least 20 points above the base, DPO at least 3 above SFT.
   Exit 1 where one is missed.

All is kept in --out, and called again it goes on from there; remove --out to start over. Standard library only.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from make_conversations import KINDS, message, right

SCRIPTS = Path(__file__).resolve().parent
CONVERSATIONS, QUESTIONS, HELD_OUT, SAMPLES = 12000, 1500, 500, 8
# High rates, because the model is small: OLMoE-1B-7B had 2e-5 and 5e-7. 1500 steps of 8 are all conversations once.
SFT = "--objective sft --batch 8 --epochs 1 --lr 2e-3 --beta2 0.98 --log-every 100"
DPO = "--objective dpo --batch 16 --epochs 1 --lr 1e-4 --beta 0.1 --log-every 10"
BARS = {"SFT": 20, "DPO": 3}            # points above the model before


class Broken(Exception):
    """A step that did not end well, or files that don't fit."""


stopped = []                            # by Ctrl-C, which the program that runs gets as well: it saves, and ends


def run(*command, to=None):
    """Shows the command, and its output as it comes, or writes this to a file: complete, or not there."""
    command = [str(part) for part in command]
    print("$ " + " ".join(command) + (f" > {to}" if to else ""), flush=True)
    if to is None:
        status = subprocess.run(command).returncode
    else:
        scratch = to.with_name(to.name + ".tmp")
        with open(scratch, "w") as f:
            status = subprocess.run(command, stdout=f).returncode
    if stopped:
        raise Broken("stopped; the same command continues")
    if status != 0:
        raise Broken(f"{' '.join(command[:2])} ended with exit status {status}")
    if to is not None:
        scratch.replace(to)


def last_checkpoint(folder):
    """The newest checkpoint of a run."""
    steps = sorted(folder.glob("step-" + 8 * "[0-9]"))
    if not steps:
        raise Broken(f"{folder} has no checkpoint; make train makes one")
    return steps[-1]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    """Complete, or not there."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch.replace(path)


def answers(olmoe, model, questions, path, *options):
    """What the model answers, as generate --json prints it; kept in `path`."""
    if not path.exists():
        run(olmoe, "generate", "--model", model, "--tokenizer", "bytes", "--input", questions, "--json",
            "--max-tokens", 56, "--batch", 128, *options, to=path)
    return read(path)


def make_pairs(questions, samples):
    """Rows of DPO: of a question's samples the first that is right and the first that is wrong, both of which end by
    themselves. A text that is no UTF-8 could not be written down as it was drawn."""
    drawn = {}
    for sample in samples:
        if sample["finish"] == "eos" and "\ufffd" not in sample["text"]:
            drawn.setdefault(sample["id"], []).append(sample["text"].strip())
    rows = []
    for question in questions:
        texts = drawn.get(question["id"], [])
        good = [text for text in texts if right(text, question["answers"])]
        bad = [text for text in texts if not right(text, question["answers"])]
        if good and bad:
            sides = {"chosen": good[0], "rejected": bad[0]}
            rows.append({side: question["messages"] + [message("assistant", text)] for side, text in sides.items()})
    return rows


def accuracy(questions, samples):
    """Right answers in percent: {kind: ..., "all": ...}"""
    judged = {kind: [] for kind in KINDS}
    by_id = {question["id"]: question for question in questions}
    for sample in samples:
        question = by_id[sample["id"]]
        judged[question["kind"]].append(right(sample["text"], question["answers"]))
    judged["all"] = [one for kind in KINDS for one in judged[kind]]
    return {kind: 100 * sum(ones) / len(ones) for kind, ones in judged.items() if ones}


def table(greedy, drawn):
    """Lines of a table, and whether no bar is missed."""
    kinds = list(greedy["base"])
    lines = ["% right".ljust(22) + "".join(kind.rjust(12) for kind in kinds)]
    for model in greedy:
        lines.append(f"{model}".ljust(22) + "".join(f"{greedy[model][kind]:12.1f}" for kind in kinds))
    for model in drawn:
        lines.append(f"{model}, temperature 1".ljust(22) + "".join(f"{drawn[model][kind]:12.1f}" for kind in kinds))
    good = True
    for before, model in zip(greedy, list(greedy)[1:]):
        gain = greedy[model]["all"] - greedy[before]["all"]
        reached = gain >= BARS[model]
        good = good and reached
        lines.append(f"{gain:+6.1f} points: {model} over {before}, at least {BARS[model]}  "
                     + ("ok" if reached else "MISSED"))
    return lines, good


def check_made_from(out, base, seed):
    """What is in --out must be of this model and seed."""
    weights = os.stat(base / "model.safetensors")
    now = {"base": str(base), "bytes": weights.st_size, "written": weights.st_mtime, "seed": seed,
           "recipe": [CONVERSATIONS, QUESTIONS, HELD_OUT, SAMPLES, SFT, DPO]}
    note = out / "made-from.json"
    if note.exists() and json.loads(note.read_text()) != now:
        raise Broken(f"{out} is of another model, seed or recipe; remove it to start over")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now) + "\n")


def finetune(olmoe, base, out, seed):
    """Prints the table. True where no bar is missed."""
    began = time.time()
    base = last_checkpoint(base)
    check_made_from(out, base, seed)
    if not (out / "held-out.jsonl").exists():               # the last that is written
        run(sys.executable, SCRIPTS / "make_conversations.py", "--out", out, "--seed", seed, "--conversations",
            CONVERSATIONS, "--questions", QUESTIONS, "--held-out", HELD_OUT)
    questions, held_out = read(out / "questions.jsonl"), read(out / "held-out.jsonl")

    def train(model, name, data, options):
        run(olmoe, "train", *options.split(), "--model", model, "--tokenizer", "bytes", "--data", out / data, "--out",
            out / name, "--seed", seed, "--resume")
        return last_checkpoint(out / name)

    sft = train(base, "sft", "sft.jsonl", SFT)
    samples = answers(olmoe, sft, out / "questions.jsonl", out / "samples.jsonl", "--temperature", 0.8, "--n", SAMPLES,
                      "--seed", seed)
    if not (out / "pairs.jsonl").exists():
        write(out / "pairs.jsonl", make_pairs(questions, samples))
    print(f"{len(read(out / 'pairs.jsonl'))} pairs from {SAMPLES} answers to each of {len(questions)} questions")
    dpo = train(sft, "dpo", "pairs.jsonl", DPO)

    greedy, drawn = {}, {}
    for name, model in {"base": base, "SFT": sft, "DPO": dpo}.items():
        for to, temperature in ((greedy, 0), (drawn, 1)):
            path = out / f"{name.lower()}-{temperature}.jsonl"
            to[name] = accuracy(held_out, answers(olmoe, model, out / "held-out.jsonl", path, "--temperature",
                                                  temperature, "--seed", seed))
    lines, good = table(greedy, drawn)
    print(f"\nseed {seed}, {time.time() - began:.0f} s: {len(held_out)} held-out questions, answered at temperature 0")
    print("\n".join("  " + line for line in lines))
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", required=True, type=Path, help="directory of a training run")
    parser.add_argument("--out", required=True, type=Path, help="directory to write to")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--olmoe", default="./olmoe", help="the program")
    o = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        sys.exit(0 if finetune(o.olmoe, o.base, o.out, o.seed) else 1)
    except Broken as error:
        sys.exit(f"finetune.py: {error}")
    except (OSError, ValueError, KeyError) as error:        # files of another program, or half of one
        sys.exit(f"finetune.py: {o.out}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
