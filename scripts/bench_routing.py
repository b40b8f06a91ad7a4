#!/usr/bin/env python3
"""Times `olmoe routing` against the forward pass with the head alone: `olmoe evaluate --perplexity` of the same tokens.

    bench_routing.py [--tokens N] [--runs N] [--json FILE]

The model is configs/small.json with random weights, in FP32; 200,000 random tokens of its vocabulary, in pieces of as
many as it has positions for, in both of the same micro-batches. Times are those of the whole programs, which also load
the model and read the tokens. Runs alternate; the best of each counts. A second line has a later checkpoint, which the
tokens go through as well, without the head.

The bar: 1.15 times. On an idle machine; run by bench.py. Needs numpy for the weights, else the standard library only.
"""
import argparse
import array
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER, CONFIG = ROOT / "build/bench", ROOT / "configs/small.json"
PROGRAM, BAR = ROOT / "build/cpu-fp32/olmoe", 1.15
THREADS = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def run(*args):
    """Seconds of a command that has to succeed."""
    start = time.perf_counter()
    done = subprocess.run([str(a) for a in args], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(THREADS)})
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        last_line = (done.stderr or done.stdout).strip().splitlines()[-1:]
        sys.exit(f"bench_routing.py: {' '.join(map(str, args))} failed: {last_line}")
    return seconds


def make(name, seed):
    """A model directory, made once for a config."""
    model, given = FOLDER / name, FOLDER / f"{name}.config.json"
    if not model.exists() or not given.exists() or given.read_bytes() != CONFIG.read_bytes():
        FOLDER.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(model, ignore_errors=True)
        run(sys.executable, "scripts/make_random_model.py", "--config", CONFIG, "--out", model, "--seed", seed)
        shutil.copyfile(CONFIG, given)
    return model


def write_tokens(path, count, vocabulary):
    """Random ids; a file without a header is uint16."""
    r = random.Random(1)
    ids = array.array("H", (r.randrange(vocabulary) for _ in range(count)))
    if sys.byteorder == "big":
        ids.byteswap()
    path.write_bytes(ids.tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    config = json.loads(CONFIG.read_text())
    seq = config["max_position_embeddings"]
    if o.tokens < seq or o.runs < 1:
        sys.exit(f"bench_routing.py: --tokens is at least {seq}, --runs at least 1")
    run("make", "DEVICE=cpu", "PRECISION=FP32", "olmoe")
    models, data = [make(f"routing-{seed}", seed) for seed in (1, 2)], FOLDER / "routing.npy"
    write_tokens(data, o.tokens, config["vocab_size"])
    shared = ["--model", models[0], "--seq", seq, "--batch", 4]
    routing = [PROGRAM, "routing", *shared, "--data", data, "--out", FOLDER / "routing.out.json"]
    ways = {"forward": [PROGRAM, "evaluate", *shared, "--perplexity", data], "routing": routing,
            "later": [*routing, "--later", models[1]]}
    best = {name: float("inf") for name in ways}
    for _ in range(o.runs):
        for name, words in ways.items():
            best[name] = min(best[name], run(*words))
    ratios = {name: best[name] / best["forward"] for name in ways}
    tokens = o.tokens // seq * seq
    print(f"\nrouting, small, FP32, {THREADS} threads, {tokens} tokens   seconds   tokens/s   of the forward pass")
    for name, what in (("forward", "forward pass with the head"), ("routing", "olmoe routing"),
                       ("later", "olmoe routing --later")):
        missed = f"   above the bar of {BAR}" if name == "routing" and ratios[name] > BAR else ""
        print(f"  {what:52} {best[name]:9.1f} {tokens / best[name]:10.0f} {ratios[name]:12.3f}{missed}")
    if o.json:
        o.json.write_text(json.dumps({"routing_tokens_per_s": tokens / best["routing"],
                                      "routing_over_forward": ratios["routing"],
                                      "routing_later_over_forward": ratios["later"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
