#!/usr/bin/env python3
"""Times a training step, the tokenizer and generation.

    bench.py [--shapes tiny,small] [--precisions FP32,BF16] [--no-transformers]

For each shape of configs/ and each precision, on this machine's CPU:
  - tokens/s and ms of a step: the median over the steps after the third of two runs, before and after all of
    transformers', because a machine that is shared has slow minutes;
  - that step's matmuls alone: its recorded list of shapes, transposes and accumulations, in order, on the same buffers;
  - time, calls and GB/s of each kernel (bytes by the formulas below: what has to be moved, not what is);
  - peak resident memory over what `olmoe info` planned;
  - tokens/s of transformers on PyTorch, in the same run (scripts/bench_transformers.py, in build/venv).
Then what rows of different lengths cost in a micro-batch (scripts/bench_rows.py), and what `olmoe routing` costs beside
its forward pass (scripts/bench_routing.py, with build/venv). Then, where OLMOE_DATA has texts and OLMoE's tokenizer,
MB/s of reading conversations and of encoding texts, also by other tokenizers (scripts/bench_tokenizers.py), tokens/s of
`olmoe generate` and of llama.cpp (scripts/bench_generate.py), and documents/s of `olmoe evaluate` and of
lm-evaluation-harness (scripts/bench_evaluate.py).
Prints tables and writes build/bench.json. Run it on an idle machine. Standard library only.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"tiny": (8, 256, 100), "small": (4, 512, 12)}     # sequences, tokens of each, steps of a run

# Bytes that a step has to move, by kernel. x = sizeof(floatX); one dimension a letter as in olmoe.cu; P parameters;
# A = entries of attention's score blocks, N/T sequences x H heads x sum over blocks of n S; S = slabs of rows
BYTES = {
    "embedding_forward_kernel": "2*N*C*x",
    "embedding_backward_kernel": "N*C*x + 2*min(N,V)*C*x",
    "rmsnorm_forward_kernel": "2*2*N*C*x",
    "add_rmsnorm_forward_kernel": "L*4*N*C*x",
    "rmsnorm_backward_kernel": "(2*L+1)*(4*N*C*x + S*C*4)",
    "sum_slabs_kernel": "(4*L+1)*S*C*4",
    "qk_norm_rope_forward_kernel": "L*4*N*C*x",
    "qk_norm_rope_backward_kernel": "L*(3*N*C*4 + 2*N*C*x + 3*N*C*x + 2*S*C*4)",
    "attention_softmax_forward_kernel": "L*A*(4+x)",
    "attention_softmax_backward_kernel": "L*A*(8+2*x)",
    "router_forward_kernel": "L*N*E*8",
    "router_mean_kernel": "L*N*E*4",
    "router_backward_kernel": "L*N*E*(8+x)",
    "dispatch_count_kernel": "L*R*4",
    "dispatch_place_kernel": "L*R*12",
    "gather_kernel": "2*L*2*R*C*x",
    "swiglu_forward_kernel": "L*3*R*F*x",
    "swiglu_backward_kernel": "L*6*R*F*x",
    "combine_kernel": "L*(2*R*C*x + 3*N*C*x) + (L-1)*N*C*x",
    "cross_entropy_kernel": "2*N*V*x",
    "square_sum_kernel": "P*x",
    "adamw_kernel": "P*28",
}


def run(args, output="stdout"):
    result = subprocess.run([str(a) for a in args], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        last_line = (result.stderr or result.stdout).strip().splitlines()[-1:]
        sys.exit(f"bench.py: {' '.join(map(str, args))} failed: {last_line}")
    return getattr(result, output)


def dimensions(plan, batch, seq):
    """The letters of BYTES, from what `olmoe info` reports of the shape."""
    c = plan["config"]
    d = {"L": c["num_hidden_layers"], "C": c["hidden_size"], "H": c["num_attention_heads"], "E": c["num_experts"],
         "K": c["num_experts_per_tok"], "F": c["intermediate_size"], "V": c["vocab_size"], "P": plan["parameters"],
         "N": batch * seq, "T": seq, "x": 2 if plan["precision"] == "BF16" else 4, "min": min}
    d["R"] = d["N"] * d["K"]
    d["S"] = min(1024, -(-d["N"] // 16))
    d["A"] = batch * d["H"] * sum(min(128, seq - t) * min(t + 128, seq) for t in range(0, seq, 128))
    return d


def train(shape, precision):
    """Runs the steps. Returns the milliseconds of each but the first three and the profiled last, the profile, peak
    memory, and what `olmoe info` plans."""
    batch, seq, steps = SHAPES[shape]
    run(["make", "DEVICE=cpu", f"PRECISION={precision}", "olmoe"])
    program = ROOT / f"build/cpu-{precision.lower()}/olmoe"
    folder = ROOT / "build/bench"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.npy").exists():
        run([sys.executable, "scripts/make_corpus.py", "--out", folder])
        run([program, "tokenize", "--tokenizer", "bytes", "--out", folder / "train.npy", folder / "train.jsonl"])
    name = f"{shape}_{precision.lower()}"
    run_dir = folder / name
    run(["rm", "-rf", run_dir])
    info = [program, "info", "--json", "--config", f"configs/{shape}.json", "--batch", batch, "--seq", seq]
    plan = json.loads(run(info))
    time_path = folder / "rss"
    # a process of its own, so that its peak memory is known; the profile is the last line on its standard error
    code = ("import resource, subprocess, sys; r = subprocess.run(sys.argv[2:], stdout=subprocess.DEVNULL).returncode; "
            "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)); "
            "sys.exit(r)")
    words = ["--config", f"configs/{shape}.json", "--data", folder / "train.npy", "--out", run_dir, "--steps", steps,
             "--batch", batch, "--seq", seq, "--warmup", 1, "--profile"]
    profile = run([sys.executable, "-c", code, time_path, program, "train", *words], output="stderr")
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    ms = [line["ms"] for line in lines[1:] if 3 < line["step"] < steps]
    return ms, json.loads(profile.splitlines()[-1]), float(time_path.read_text()), plan


def report(shape, precision, runs, out):
    batch, seq, _ = SHAPES[shape]
    name, profile, d = f"{shape}_{precision.lower()}", runs[0][1], dimensions(runs[0][3], batch, seq)
    ms = statistics.median(x for r in runs for x in r[0])
    alone = statistics.median(r[1]["gemm_ms_alone"] for r in runs)
    gflop = sum(g["gflop"] for g in profile["gemms"])

    calls, in_step = sum(g["calls"] for g in profile["gemms"]), profile["gemm_ms_in_step"]
    print(f"\n{shape} {precision}: {batch} x {seq} tokens, {profile['threads']} threads: "
          f"{ms:.1f} ms a step, {batch * seq / ms * 1000:.0f} tokens/s")
    print(f"  {'matmuls in the step':36} {calls:6} calls {in_step:8.1f} ms {gflop / in_step * 1000:7.0f} GFLOP/s")
    print(f"  {'the same matmuls alone':36} {'':12} {alone:8.1f} ms {gflop / alone * 1000:7.0f} GFLOP/s")
    for kernel, k in sorted(profile["kernels"].items(), key=lambda item: -item[1]["ms"]):
        kernel = kernel.split("<")[0]
        rate = f"{eval(BYTES[kernel], d) / k['ms'] / 1e6:7.1f} GB/s" if kernel in BYTES else ""
        print(f"  {kernel:36} {k['calls']:6} calls {k['ms']:8.1f} ms {rate}")
    print(f"  {'copies and fills':36} {'':12} {profile['memcpy_memset_ms']:8.1f} ms")
    out[f"{name}_step_ms"] = ms
    out[f"{name}_tokens_per_s"] = batch * seq / ms * 1000
    out[f"{name}_gemm_ms"] = alone
    out[f"{name}_step_over_gemms"] = ms / alone
    out[f"{name}_rss_over_plan"] = runs[0][2] / runs[0][3]["memory"]["sum"]
    for kernel, k in profile["kernels"].items():
        kernel = kernel.split("<")[0]
        out[f"{name}_{kernel}_ms"] = k["ms"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="tiny,small")
    parser.add_argument("--precisions", default="FP32,BF16")
    parser.add_argument("--no-transformers", action="store_true")
    o = parser.parse_args()
    out = {}
    for shape in o.shapes.split(","):
        precisions = o.precisions.split(",")
        runs = {precision: [train(shape, precision)] for precision in precisions}
        python = ROOT / "build/venv/bin/python"
        theirs = {}
        if not o.no_transformers and not python.exists():
            print(f"(transformers is not compared: no {python.relative_to(ROOT)}; make venv)")
        elif not o.no_transformers:
            path = ROOT / f"build/bench/transformers_{shape}.json"
            batch, seq, _ = SHAPES[shape]
            print("\n" + run([python, "scripts/bench_transformers.py", "--config", f"configs/{shape}.json",
                              "--batch", batch, "--seq", seq, "--steps", 10 if shape == "tiny" else 3,
                              "--json", path]).rstrip())
            theirs = json.loads(path.read_text())["best"]
        for precision in precisions:
            runs[precision].append(train(shape, precision))
            report(shape, precision, runs[precision], out)
            for their_precision, best in theirs.items():
                out[f"{shape}_transformers_{their_precision}_tokens_per_s"] = best["tokens_per_s"]
                ours = out[f"{shape}_{precision.lower()}_tokens_per_s"]
                out[f"{shape}_{precision.lower()}_over_transformers_{their_precision}"] = ours / best["tokens_per_s"]

    path = ROOT / "build/bench/rows.json"
    data = os.environ.get("OLMOE_DATA")
    print("\n" + run([sys.executable, "scripts/bench_rows.py", *([data] if data else []), "--json", path]).rstrip())
    out.update(json.loads(path.read_text()))

    python = ROOT / "build/venv/bin/python"
    if python.exists():
        path = ROOT / "build/bench/routing.json"
        print("\n" + run([python, "scripts/bench_routing.py", "--json", path]).rstrip())
        out.update(json.loads(path.read_text()))
    if not data or not python.exists():
        missing = "no OLMOE_DATA=FOLDER" if python.exists() else "no build/venv; make venv"
        print(f"(the tokenizer, generation and evaluation are not timed: {missing})")
    else:
        for script in ("tokenizers", "generate", "evaluate"):
            path = ROOT / f"build/bench/{script}.json"
            print(run([python, f"scripts/bench_{script}.py", data, "--json", path]).rstrip())
            out.update(json.loads(path.read_text()))

    print(f"\n{'figure':52} value")
    for name, value in out.items():
        if "kernel" not in name:
            print(f"{name:52} {value:.4g}")
    (ROOT / "build/bench.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
