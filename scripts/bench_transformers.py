#!/usr/bin/env python3
"""Trains an OLMoE shape with transformers on PyTorch, on this machine's CPU, and prints tokens per second.

  bench_transformers.py --config configs/small.json --batch 4 --seq 512 [--json FILE]

A step is what a user of transformers would run: forward with the auxiliary loss, backward, clipping at norm 1, fused
AdamW; attention by sdpa; fp32 with matmul precision "highest", and bf16 autocast over fp32 weights. It tries
transformers' expert implementations, malloc told to keep its memory or not, and torch.compile, and reports each
and the best. The time of a step is the median after one step of warm-up. What runs out of memory, time or compiler is
listed as such.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

# malloc reads its settings when a process starts, so each setting is a process of its own; so is each compiled run,
# whose compiler can take minutes. Within a process the most promising runs come first.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
PROCESSES = [
    ("keep", [("fp32", "grouped_mm", False), ("bf16", "grouped_mm", False)]),
    ("default", [("fp32", "grouped_mm", False), ("bf16", "grouped_mm", False)]),
    ("keep", [("fp32", "grouped_mm", True)]),
    ("keep", [("bf16", "grouped_mm", True)]),
    ("keep", [("fp32", "eager", False), ("bf16", "eager", False)]),
    ("keep", [("fp32", "batched_mm", False), ("bf16", "batched_mm", False)]),
]


def die(message):
    print(f"bench_transformers.py: {message}", file=sys.stderr)
    sys.exit(1)


def memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(o, precision, experts, compiled):
    """One run in this process: a dict with ms and tokens_per_s."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM, logging
    logging.set_verbosity_error()
    torch.manual_seed(1)
    torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("highest")
    config = OlmoeConfig.from_json_file(o.config)
    config.pad_token_id = None
    model = OlmoeForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="sdpa",
                                          experts_implementation=experts)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                                  fused=True)
    if o.data:
        tokens = torch.from_file(o.data, dtype=torch.uint16, size=os.path.getsize(o.data) // 2)
    run = torch.compile(model) if compiled else model

    def step(s):
        n = o.batch * o.seq
        if o.data:
            ids = tokens[s * n % (len(tokens) - n + 1):][:n].long().view(o.batch, o.seq)
        else:
            ids = torch.randint(config.vocab_size, (o.batch, o.seq))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = run(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    start = time.perf_counter()
    step(0)
    first, times = time.perf_counter() - start, []
    while len(times) < o.steps:
        start = time.perf_counter()
        loss = step(len(times) + 1)
        times.append(time.perf_counter() - start)
    if not loss == loss:
        raise ArithmeticError("the loss is not a number")
    ms = 1000 * statistics.median(times)
    return {"ms": round(ms, 2), "tokens_per_s": round(1000 * o.batch * o.seq / ms, 1), "first_step_s": round(first, 2)}


def worker(o, runs):
    """Prints a line of JSON for each run, so that the parent has what was done when the time is over."""
    for precision, experts, compiled in runs:
        try:
            result = measure(o, precision, experts, compiled)
        except Exception as error:  # the table shows any error of torch or its compiler
            message = str(error).strip()
            first_line = message.splitlines()[0][:90] if message else ""
            result = {"note": f"{type(error).__name__}: {first_line}"}
        print(json.dumps(result), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="a Hugging Face config.json")
    parser.add_argument("--batch", type=int, required=True, metavar="B")
    parser.add_argument("--seq", type=int, required=True, metavar="T")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run (default 3)")
    parser.add_argument("--data", metavar="FILE", help="uint16 tokens without a header (default: random tokens)")
    parser.add_argument("--time-limit", type=float, default=170, metavar="SECONDS",
                        help="start nothing new, and stop what runs, after this time (default 170)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--worker", metavar="RUNS", help=argparse.SUPPRESS)
    o = parser.parse_args()
    o.threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    if o.worker:
        worker(o, json.loads(o.worker))
        return

    try:
        import torch
        import transformers
        config = transformers.OlmoeConfig.from_json_file(o.config)
    except ImportError as error:
        die(f"{error}; install what scripts/requirements.txt lists, in a virtual environment")
    except (OSError, ValueError) as error:
        die(f"{o.config}: {getattr(error, 'strerror', None) or error}; --config takes a Hugging Face config.json")
    if min(o.batch, o.seq, o.steps) < 1:
        die("--batch, --seq and --steps must be at least 1")
    if o.data:
        try:
            size = os.path.getsize(o.data) // 2
            if size < o.batch * o.seq:
                die(f"{o.data} has fewer than the {o.batch * o.seq} tokens of a step; give a longer file")
            largest = int(torch.from_file(o.data, dtype=torch.uint16, size=size).long().max())
            if largest >= config.vocab_size:
                die(f"{o.data} holds token {largest}, the model's vocabulary is {config.vocab_size}; "
                    "give the file of another tokenizer")
        except OSError as error:
            die(f"{o.data}: {error.strerror}; --data takes a file of uint16 tokens")

    c, deadline, results = config, time.monotonic() + o.time_limit, []
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {o.threads} threads; "
          f"L {c.num_hidden_layers} C {c.hidden_size} H {c.num_attention_heads} E {c.num_experts} "
          f"K {c.num_experts_per_tok} F {c.intermediate_size} V {c.vocab_size}, {o.batch} x {o.seq} tokens a step")
    print(f"{'precision':10}{'experts':12}{'malloc':9}{'compile':9}{'ms/step':>10}{'tokens/s':>10}")
    # batched_mm copies a chosen expert's three matrices for each row, keeps the copies of all layers until backward,
    # and needs their gradients.
    rows = o.batch * o.seq * c.num_experts_per_tok
    copies = 4 * 3 * rows * c.hidden_size * c.intermediate_size * (c.num_hidden_layers + 1)
    for malloc, runs in PROCESSES:
        lines, note = [], None
        if runs[0][1] == "batched_mm" and copies > 0.5 * memory():
            note = f"needs {copies / 2**30:.0f} GiB"
        elif runs[0][2] and not shutil.which("g++"):
            note = "no g++"
        elif time.monotonic() >= deadline:
            note = "no time left"
        else:
            command = [sys.executable, os.path.abspath(__file__), "--config", o.config, "--batch", str(o.batch),
                       "--seq", str(o.seq), "--steps", str(o.steps), "--worker", json.dumps(runs)]
            command += ["--data", o.data] if o.data else []
            environment = {**os.environ, "OMP_NUM_THREADS": str(o.threads), **(KEEP if malloc == "keep" else {})}
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       text=True, start_new_session=True)
            try:
                lines = process.communicate(timeout=max(1, deadline - time.monotonic()))[0].splitlines()
                note = f"ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # with the compilers that it started
                lines = process.communicate()[0].splitlines()
                note = "no time left"
        for index, (precision, experts, compiled) in enumerate(runs):
            result = json.loads(lines[index]) if index < len(lines) else {"note": note}
            setting = {"precision": precision, "experts": experts, "malloc": malloc, "compile": compiled}
            results.append({**setting, **result})
            figures = f"{result['ms']:10.1f}{result['tokens_per_s']:10.0f}" if "ms" in result else f"  {result['note']}"
            print(f"{precision:10}{experts:12}{malloc:9}{'yes' if compiled else 'no':9}{figures}", flush=True)

    best = {}
    for precision in ("fp32", "bf16"):
        done = [r for r in results if r["precision"] == precision and "ms" in r]
        if not done:
            die(f"no {precision} run came to an end; the table says why (--time-limit {o.time_limit:g})")
        best[precision] = max(done, key=lambda r: r["tokens_per_s"])
        print(f"best {precision}: {best[precision]['tokens_per_s']:.0f} tokens/s with {best[precision]['experts']}, "
              f"malloc {best[precision]['malloc']}{', compiled' if best[precision]['compile'] else ''}")
    if o.json:
        with open(o.json, "w") as file:
            json.dump({"config": o.config, "batch": o.batch, "seq": o.seq, "threads": o.threads,
                       "torch": torch.__version__, "transformers": transformers.__version__,
                       "runs": results, "best": best}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
