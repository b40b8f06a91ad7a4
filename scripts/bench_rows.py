#!/usr/bin/env python3
"""Times fine-tuning on rows: bench_rows.py [--steps N] [--json FILE] [DATA]

1. What padding costs: SFT steps of the shape of configs/tiny.json on micro-batches of a row of 10 tokens and one of
   4,000, of either alone, and of two of 4,000, which is what the first would be if it were padded. The figure is the
   median step without its update, whose time does not depend on rows; a step of an empty answer gives that.
2. Reading rows: conversations made of the texts in DATA/text, encoded with DATA/tokenizer/tokenizer.json on all cores,
   in MB of the file in a second, with either mask.

The program is ./olmoe, or what OLMOE names. Run it on an idle machine. Standard library only; bench.py runs it.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
SHORT, LONG = 10, 4000


def run(*words):
    result = subprocess.run([OLMOE, *map(str, words)], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"bench_rows.py: {' '.join(map(str, words))}: {result.stderr.strip()}")
    return result.stdout


def write(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def step_ms(folder, lengths, steps):
    """The median milliseconds of SFT steps of one micro-batch of rows of so many tokens each."""
    config = json.loads((ROOT / "configs/tiny.json").read_text())
    config["max_position_embeddings"] = LONG
    (folder / "config.json").write_text(json.dumps(config))
    # BOS, a letter, a space, the completion, EOS
    rows = write(folder / "rows.jsonl", [{"prompt": "a", "completion": "b" * (n - 4)} for n in lengths])
    out = folder / ("-".join(map(str, lengths)))
    run("train", "--objective", "sft", "--config", folder / "config.json", "--tokenizer", "bytes", "--data", rows,
        "--out", out, "--batch", len(lengths), "--steps", steps, "--log-every", 0, "--sample-tokens", 1,
        "--peak-tflops", 1)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    tokens = lines[-1]["tokens_per_s"] * lines[-1]["ms"] / 1000
    assert abs(tokens - sum(lengths)) < 0.5, (tokens, lengths)
    return statistics.median(line["ms"] for line in lines[2:])


def padding(folder, steps, out):
    empty = step_ms(folder, [5], steps)         # as good as an update alone
    ms = {name: step_ms(folder, lengths, steps) - empty for name, lengths in (
        ("short", [SHORT]), ("long", [LONG]), ("both", [SHORT, LONG]), ("padded", [LONG, LONG]))}
    print(f"a step of rows of {SHORT} and {LONG} tokens, without the update: {ms['both']:.1f} ms; of {LONG} alone "
          f"{ms['long']:.1f}, of {SHORT} alone {ms['short']:.1f}; of two of {LONG} {ms['padded']:.1f}")
    print(f"  over the rows alone, added up: {ms['both'] / (ms['short'] + ms['long']):.3f}; "
          f"over the padded: {ms['both'] / ms['padded']:.3f}")
    out["rows_over_rows_alone"] = ms["both"] / (ms["short"] + ms["long"])
    out["rows_over_padded"] = ms["both"] / ms["padded"]


def conversations(folder, megabytes=50):
    r, lines = random.Random(1), []
    for path in sorted((folder / "text").glob("*.txt")):
        lines += [line for line in path.read_text(errors="replace").split("\n") if line.strip()]
    size = 0
    while size < megabytes * 1e6:
        turns = []
        for role in ("user", "assistant") * r.choice([1, 1, 2, 3]):
            at = r.randrange(len(lines))
            turns.append({"role": role, "content": "\n".join(lines[at:at + r.randint(1, 6)])[:4000]})
        size += len(json.dumps(turns, ensure_ascii=False).encode())
        yield {"messages": turns}


def reading(folder, data, out):
    config = json.loads((ROOT / "configs/tiny.json").read_text())
    config.update(vocab_size=50304, max_position_embeddings=4096, eos_token_id=50279)
    (folder / "config.json").write_text(json.dumps(config))
    rows = write(folder / "conversations.jsonl", conversations(data))
    for mask in ("assistant", "olmoe"):
        words = ["train", "--objective", "sft", "--config", folder / "config.json", "--tokenizer",
                 data / "tokenizer/tokenizer.json", "--data", rows, "--out", folder / mask, "--label-mask", mask,
                 "--batch", 1, "--steps", 0, "--seq", 4096, "--peak-tflops", 1]
        seconds = []
        for _ in range(2):                      # the second call finds the rows
            start = time.monotonic()
            run(*words)
            seconds.append(time.monotonic() - start)
        mb = rows.stat().st_size / 1e6
        rate = mb / (seconds[0] - seconds[1])
        print(f"reading conversations, --label-mask {mask}: {mb:.0f} MB in {seconds[0] - seconds[1]:.1f} s, "
              f"{rate:.0f} MB/s on {os.cpu_count()} cores; when they are kept {seconds[1]:.1f} s in all")
        out[f"rows_{mask}_mb_per_s"] = rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", metavar="FILE")
    o = parser.parse_args()
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        padding(Path(folder), o.steps, out)
        if o.data:
            reading(Path(folder), o.data, out)
    if o.json:
        Path(o.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
