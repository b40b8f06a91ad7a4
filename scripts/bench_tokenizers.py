#!/usr/bin/env python3
"""Times encoding on one core: bench_tokenizers.py [--runs N] [--json FILE] DATA

tokenizer.h against `tokenizers`, tokie and gigatoken, with DATA/tokenizer/tokenizer.json on DATA/text/*.txt: by lines,
and by pieces of 1 MB. Each by its fastest interface that gives ids, one thread, pinned to one core. The figure is MB of
text in a second of the process's time on the core, so that other programs on the machine count little: of the first
run, in which no word is remembered, and the best of the others. (The peers also remember words: only the first run
after one is opened is such a run.) All have to give the same number of ids. Run by bench.py, in build/venv.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
try:
    import gigatoken
    import tokenizers
    import tokie
except ImportError as e:
    sys.exit(f"bench_tokenizers.py: {e}; run it by build/venv/bin/python after make venv")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.dont_write_bytecode = True
import nasty


def pieces(text, size=1 << 20):
    """Whole characters, some 1 MB of them."""
    while text:
        n = len(text[:size].decode(errors="ignore").encode())
        yield text[:n]
        text = text[n:]


def ours(path, texts, runs):
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "test_tokenizer"
    source = ROOT / "tests" / "test_tokenizer.cpp"
    subprocess.run(["g++", "-std=c++17", "-O3", "-march=native", "-o", program, source, "-lz", "-lutf8proc",
                    "-pthread"], check=True)
    nasty.write_texts(folder / "texts", texts)
    commands = f"open {path}\ntime {runs} {folder / 'texts'}\n"
    out = subprocess.run([program], input=commands, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in out.splitlines()[1:]]
    return [float(seconds) for seconds, _ in lines], int(lines[0][1])


def theirs(open_it, encode, texts, runs):
    seconds = []
    t = open_it()
    for _ in range(runs):
        start = time.process_time()
        count = encode(t, texts)
        seconds.append(time.process_time() - start)
    return seconds, count


def encode_tokenizers(t, texts):
    return sum(len(e.ids) for e in t.encode_batch_fast(texts, add_special_tokens=False))


def encode_tokie(t, texts):
    return len(t.encode_batch_flat(texts, add_special_tokens=False)[0])


def encode_gigatoken(t, texts):
    if len(texts) < 100:
        return sum(map(len, [t.encode(s) for s in texts]))
    return len(t.encode_batch(texts, parallel=False).layout.content)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    path = os.path.join(o.data, "tokenizer", "tokenizer.json")
    files = sorted(Path(o.data, "text").glob("*.txt"))
    if not os.path.exists(path) or not files:
        sys.exit(f"bench_tokenizers.py: no tokenizer/tokenizer.json or no text/*.txt in {o.data}")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    texts = [p.read_bytes() for p in files]
    size = sum(map(len, texts))

    peers = {
        "tokenizers": (lambda: tokenizers.Tokenizer.from_file(path), encode_tokenizers, 2),
        "tokie": (lambda: tokie.Tokenizer.from_json(path), encode_tokie, o.runs),
        "gigatoken": (lambda: gigatoken.Tokenizer(path), encode_gigatoken, o.runs),
    }
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    out = {}
    for name, parts in (("lines", lines), ("1 MB", [piece for text in texts for piece in pieces(text)])):
        strings = [part.decode() for part in parts]
        print(f"\n{size / 1e6:.1f} MB by {name}, {len(parts)} texts{'':14}first run      best")
        results = {"tokenizer.h": ours(path, parts, o.runs)}
        for peer, (open_it, encode, runs) in peers.items():
            results[peer] = theirs(open_it, encode, strings, runs)
        key = name.replace(" ", "").lower()
        for who, (seconds, count) in results.items():
            first, best = size / seconds[0] / 1e6, size / min(seconds) / 1e6
            ratio = "" if who == "tokenizer.h" else f"   tokenizer.h: {out[f'tokenizer_{key}_mb_per_s'] / best:.2f} x"
            version = getattr(sys.modules.get(who), "__version__", "")
            print(f"  {who:12} {version:10} {count} ids {first:10.1f} {best:9.1f} MB/s{ratio}")
            who = "tokenizer" if who == "tokenizer.h" else who
            out[f"{who}_{key}_mb_per_s"], out[f"{who}_{key}_first_mb_per_s"] = best, first
            if who != "tokenizer":
                out[f"tokenizer_{key}_over_{who}"] = out[f"tokenizer_{key}_mb_per_s"] / best
        if len({count for _, count in results.values()}) != 1:
            sys.exit("bench_tokenizers.py: they do not give the same number of ids")
    if o.json:
        o.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
