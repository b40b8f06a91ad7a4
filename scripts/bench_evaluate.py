#!/usr/bin/env python3
"""Times multiple choice by `olmoe evaluate` and by lm-evaluation-harness with transformers, on the same requests.

    bench_evaluate.py [--runs N] [--json FILE] DATA

The model is that of bench_generate.py: configs/small.json with a vocabulary of 50304 and random weights, in FP32, with
DATA/tokenizer/tokenizer.json. The requests are the first documents of files of DATA/eval: short questions, and answers
of a letter after five examples. The harness has sdpa, grouped_mm for the experts (bench_transformers.py finds it the
fastest), malloc that keeps its memory, and the best of a few batch sizes; its time is that of its call alone: requests,
tokens, scores. Ours is that of the whole program, which also loads the model. Runs alternate; the best counts.

Both have to give the same log-probabilities, and the same predictions but where two choices are as good as equal. The
bar: twice the documents a second. Needs build/venv (make venv); run by bench.py.
"""
import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / "build/venv/bin/python"
FILES = {"arc_easy_rc_0shot.jsonl.gz": 120, "arc_challenge_mc_5shot.jsonl.gz": 40}     # documents of each
BATCHES = (1, 4, 16)
BAR = 2
CLOSE = 1e-4                # of log-probabilities that two programs give, relative: roundings of 40 matmuls in fp32
THREADS = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def read_documents(path, limit=None):
    """The documents of a request file, in the order of their first lines, without the unconditional ones: dictionaries
    of doc_id, label, contexts and continuations (one of each a choice)."""
    documents = {}
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            if line["doc_id"] < 1_000_000:
                document = documents.setdefault(line["doc_id"], {"label": line["label"], "choices": {}})
                document["choices"][line["idx"]] = line["request"]
    result = []
    for doc_id, document in list(documents.items())[:limit]:
        requests = [document["choices"][i] for i in range(len(document["choices"]))]
        result.append({"doc_id": doc_id, "label": document["label"],
                       "contexts": [request["context"] for request in requests],
                       "continuations": [request["continuation"] for request in requests]})
    return result


# ------------------------------------------------------------------------------------------------
# lm-evaluation-harness. Where a document's contexts differ, its choices are in the contexts, and the harness's lengths
# are theirs: its acc_norm is then something else.

def harness_task(name, documents):
    """A multiple-choice task of the documents, whose continuations all begin with a space: the harness's delimiter."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    by_context = any(len(set(document["contexts"])) > 1 for document in documents)
    rows = [{**document, "bare": [text.removeprefix(" ") for text in document["continuations"]]}
            for document in documents]
    assert all(text.startswith(" ") for row in rows for text in row["continuations"])
    assert not by_context or all(len(set(row["bare"])) == 1 for row in rows)
    how = {"doc_to_text": lambda row: row["label"], "doc_to_choice": lambda row: row["contexts"],
           "doc_to_target": lambda row: row["bare"][0]} if by_context else {
           "doc_to_text": lambda row: row["contexts"][0], "doc_to_choice": lambda row: row["bare"],
           "doc_to_target": lambda row: row["label"]}
    return ConfigurableTask(config={
        "task": name, "output_type": "multiple_choice", "test_split": "test", "num_fewshot": 0, **how,
        "target_delimiter": " ", "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                        for metric in ("acc", "acc_norm", "acc_bytes")]})


def harness_model(model, tokenizer, batch):
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")


def harness_scores(lm, task):
    """(the harness's table of a task, and of each document its log-probabilities and scores)."""
    from lm_eval import evaluator
    done = evaluator.evaluate(lm, {task.config.task: task}, bootstrap_iters=0)
    samples = [{"logprobs": [response[0] for response in sample["filtered_resps"]],
                **{metric: sample[metric] for metric in sample["metrics"]}}
               for sample in sorted(done["samples"][task.config.task], key=lambda sample: sample["doc_id"])]
    table = {key.split(",")[0]: value for key, value in done["results"][task.config.task].items()}
    return table, samples


def load(folder, threads=THREADS):
    """transformers' model, and its tokenizer."""
    import torch
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = transformers.OlmoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm",
        local_files_only=True).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder, "tokenizer.json")), eos_token="<|endoftext|>", pad_token="<|padding|>")
    return model, tokenizer


def serve(folder):
    """The harness in a process of its own: reads a line {path, limit, batch}, runs it, prints {seconds, samples}."""
    import logging
    logging.disable(logging.WARNING)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                           # what the harness prints
    model, tokenizer = load(folder)
    for line in sys.stdin:
        asked = json.loads(line)
        documents = read_documents(asked["path"], asked["limit"])
        lm = harness_model(model, tokenizer, asked["batch"])
        start = time.perf_counter()
        _, samples = harness_scores(lm, harness_task("bench", documents))
        print(json.dumps({"seconds": time.perf_counter() - start, "samples": samples}), file=out, flush=True)


class Harness:
    def __init__(self, folder, log):
        environment = {**os.environ, **KEEP, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1",
                       "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        self.log = log
        self.process = subprocess.Popen([PYTHON, __file__, "--serve", str(folder)], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def __call__(self, path, limit, batch):
        print(json.dumps({"path": str(path), "limit": limit, "batch": batch}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"bench_evaluate.py: the harness failed: {self.log.read().strip().splitlines()[-1:]}")
        return json.loads(line)


def ours(program, folder, path, limit, out):
    """(seconds of a call, its samples)."""
    start = time.perf_counter()
    done = subprocess.run([program, "evaluate", "--model", folder, "--tasks", path, "--limit", str(limit), "--samples",
                           out], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(THREADS)})
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"bench_evaluate.py: olmoe evaluate failed: {(done.stderr or done.stdout).strip()}")
    return seconds, [json.loads(line) for line in Path(out).read_text().splitlines()]


def compare(our_samples, their_samples):
    """The largest relative difference of a log-probability. Ends the program where a prediction differs that no two
    near values explain."""
    largest = 0.0
    for a, b in zip(our_samples, their_samples, strict=True):
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True):
            largest = max(largest, abs(x - y) / abs(y))
        for metric, lengths in (("acc", [1] * len(b["logprobs"])), ("acc_norm", a["characters"])):
            values = sorted((x / n for x, n in zip(b["logprobs"], lengths)), reverse=True)
            sure = len(values) < 2 or values[0] - values[1] > CLOSE * abs(values[1])
            if sure and a[metric] != b[metric]:
                sys.exit(f"bench_evaluate.py: document {a['doc_id']}: {metric} is {a[metric]}, the harness has "
                         f"{b[metric]}: {a} {b}")
    if not largest < CLOSE:
        sys.exit(f"bench_evaluate.py: log-probabilities differ by {largest:.1e}")
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", nargs="?")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.serve:
        return serve(o.serve)
    if not o.data or not Path(o.data, "tokenizer", "tokenizer.json").exists() or not Path(o.data, "eval").is_dir():
        sys.exit("bench_evaluate.py: DATA has to hold tokenizer/tokenizer.json and eval/")
    if not PYTHON.exists():
        sys.exit("bench_evaluate.py: no build/venv; make venv")
    import bench_generate
    folder = bench_generate.make_model(Path(o.data, "tokenizer", "tokenizer.json"))
    bench_generate.run("make", "DEVICE=cpu", "PRECISION=FP32", "olmoe")
    program, out = ROOT / "build/cpu-fp32/olmoe", {}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory() as scratch:
        samples, harness = os.path.join(scratch, "samples.jsonl"), Harness(folder, log)
        print(f"\nmultiple choice, small with a vocabulary of {bench_generate.VOCABULARY}, FP32, {THREADS} threads, "
              f"documents/s   ours  harness  ratio")
        for name, limit in FILES.items():
            path = Path(o.data, "eval", name)
            harness(path, 4, 4)             # warms up
            first = {batch: harness(path, limit, batch) for batch in BATCHES}
            batch = min(BATCHES, key=lambda batch: first[batch]["seconds"])
            mine, theirs = [], [first[batch]["seconds"]]
            for run in range(o.runs):
                seconds, found = ours(program, folder, path, limit, samples)
                mine.append(seconds)
                if run:
                    theirs.append(harness(path, limit, batch)["seconds"])
            difference = compare(found, first[batch]["samples"])
            we, they = limit / min(mine), limit / min(theirs)
            missed = f"   below the bar of {BAR}" if we < BAR * they else ""
            label = f"{name.split('.')[0]}, {limit} documents (harness: batches of {batch})"
            print(f"  {label:78} {we:6.2f} {they:8.2f} {we / they:6.2f}{missed}; log-probabilities differ by "
                  f"{difference:.0e}", flush=True)
            short = name.split("_rc_")[0].split("_mc_")[0]
            out[f"evaluate_{short}_documents_per_s"] = we
            out[f"harness_{short}_documents_per_s"] = they
            out[f"evaluate_{short}_over_harness"] = we / they
        harness.process.stdin.close()
        harness.process.wait()
    if o.json:
        o.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
