"""Several ranks: every layout trains the same model. Ranks are CPU processes under mpirun.

The program is ./olmoe, or what the variable OLMOE names. OLMOE_LAYOUTS=all tests all layouts (make test-parallel), else
a few.
"""
import hashlib
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cpp_source

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs/tiny.json"
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
ALL = os.environ.get("OLMOE_LAYOUTS") == "all"
pytestmark = pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun; make setup installs it")

# ranks, --ep, --zero
LAYOUTS = [(ranks, ep, zero) for ranks, ep in ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4)) for zero in (0, 1)]
FEW = [(2, 1, 1), (2, 2, 0), (4, 2, 1)]
GLOBAL = ["--lb", "global", "--eps", "1e-5"]


def command(ranks, *args):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    return [*launcher, OLMOE, *map(str, args)]


def run(ranks, *args, timeout=300, **environment):
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    return subprocess.run(command(ranks, *args), capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": threads, **environment})


def ok(ranks, *args, **environment):
    result = run(ranks, *args, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def refused(ranks, *args, words=()):
    result = run(ranks, *args)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("olmoe: ")]
    assert len(lines) == 1, result.stderr                       # one rank reports for all
    for word in words:
        assert word in lines[0], lines[0]


def read_safetensors(path):
    """Name -> list of floats (F32 only)."""
    data = Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    result = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        assert t["dtype"] == "F32"
        result[name] = memoryview(data)[8 + length + begin:8 + length + end].cast("f")
    return result


def distance(ours, reference):
    """Relative L2 error; of a zero reference the norm itself."""
    difference = sum((a - b) ** 2 for a, b in zip(ours, reference)) ** 0.5
    norm = sum(b * b for b in reference) ** 0.5
    return difference / norm if norm else difference


def files(directory):
    """Name -> digest. Of bytes that differ pytest would print the difference, which takes minutes."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).iterdir()}


def log(out):
    return [line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if "step" in line]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Token files of the default corpus: train.npy and val.npy."""
    d = tmp_path_factory.mktemp("parallel")
    sizes = ["--train-bytes", "400000", "--val-bytes", "20000"]
    subprocess.run(["python3", ROOT / "scripts/make_corpus.py", "--out", d, *sizes], check=True, capture_output=True)
    for name in ("train", "val"):
        ok(1, "tokenize", "--tokenizer", "bytes", "--out", d / f"{name}.npy", d / f"{name}.jsonl")
    return d


def train_words(data, out, *more):
    """The command of a training that does not measure the machine."""
    return ["train", "--config", TINY, "--data", data / "train.npy", "--out", out, "--peak-tflops", 1, *more]


def train(data, out, ranks, ep=1, zero=0, steps=20, batch=8, more=(), order="global", **environment):
    words = train_words(data, out, "--steps", steps, "--decay-steps", 20, "--batch", batch // ranks,
                        "--global-batch", 8, "--ep", ep, "--zero", zero, "--warmup", 2, "--lr", "1e-3",
                        "--order", order, *more)
    return ok(ranks, *words, **environment)


@pytest.fixture(scope="module")
def alone(data):
    """One rank, with the checkpoint of its first step: there m is (1 - beta1) times the gradient."""
    train(data, data / "alone", 1, more=[*GLOBAL, "--save-every", 1, "--val-every", 1])
    return data / "alone"


def agree(ours, reference, routing=True):
    first, last = "step-00000001", "step-00000020"
    a, b = (read_safetensors(out / first / "optimizer.safetensors") for out in (ours, reference))
    for name in b:
        if name.startswith("m."):
            assert distance(a[name], b[name]) <= 1e-5, f"gradient of {name[2:]}"
    ours_log, reference_log = log(ours), log(reference)
    assert [line["step"] for line in ours_log] == [line["step"] for line in reference_log]
    if routing:
        assert [l["counts"] for l in ours_log[0]["balance"]] == [l["counts"] for l in reference_log[0]["balance"]]
        for name in ("max_over_mean", "dead"):                  # of all ranks' rows
            assert ours_log[0][name] == reference_log[0][name]
    for x, y in zip(ours_log, reference_log):
        for name in ("loss", "ce_loss", "lb_loss", "z_loss"):
            assert abs(x[name] - y[name]) <= 1e-5 * abs(y[name]), (x["step"], name, x[name], y[name])
    a, b = (read_safetensors(out / last / "model.safetensors") for out in (ours, reference))
    for name in b:
        assert distance(a[name], b[name]) <= 1e-5, name


@pytest.mark.parametrize("ranks, ep, zero", LAYOUTS if ALL else FEW)
def test_layouts_agree(data, alone, tmp_path, ranks, ep, zero):
    """20 steps against one rank, and twice with the same bytes."""
    for out in ("a", "b"):
        train(data, tmp_path / out, ranks, ep, zero, more=[*GLOBAL, "--save-every", 1, "--val-every", 1])
    agree(tmp_path / "a", alone)
    for step in ("step-00000001", "step-00000020"):
        assert files(tmp_path / "a" / step) == files(tmp_path / "b" / step)


@pytest.mark.parametrize("ranks, ep, zero", LAYOUTS if ALL else [(2, 2, 1)])
def test_losses_with_the_usual_eps(data, tmp_path, ranks, ep, zero):
    """With eps 1e-8 AdamW moves a weight whose gradient is rounding alone by a whole lr, so that one rank's own losses
    differ by more than 1e-5 between one and two threads: the ranks have to agree with one of the two, in all steps."""
    train(data, tmp_path / "ranks", ranks, ep, zero, more=["--lb", "global"])
    agree_with = []
    for threads in ("1", "2"):
        train(data, tmp_path / threads, 1, more=["--lb", "global"], OMP_NUM_THREADS=threads)
        pairs = zip(log(tmp_path / "ranks"), log(tmp_path / threads), strict=True)
        agree_with.append(all(abs(x["loss"] - y["loss"]) <= 1e-5 * y["loss"] for x, y in pairs))
    assert any(agree_with)


@pytest.mark.parametrize("ranks, ep", [(2, 2), (4, 1), (4, 2)] if ALL else [(2, 2)])
def test_load_balancing_by_rank(data, tmp_path, ranks, ep):
    """The loss of each rank's rows is that of one rank whose micro-batch j holds exactly rank j's rows."""
    tokens = memoryview((data / "train.npy").read_bytes()).cast("H")
    T, G, B = 256, 8, 8 // ranks
    with open(data / f"by_rank_{ranks}.npy", "wb") as f:
        for step in range(20):
            for j in range(ranks):
                for row in range(B):                        # rank j takes positions j, j + ranks, ...
                    at = (step * G + j + ranks * row) * T
                    f.write(tokens[at:at + T].tobytes())
    more = ["--eps", "1e-5", "--save-every", 1, "--val-every", 1]
    ok(1, "train", "--config", TINY, "--data", data / f"by_rank_{ranks}.npy", "--out", tmp_path / "alone",
       "--steps", 20, "--decay-steps", 20, "--batch", B, "--global-batch", 8, "--warmup", 2, "--lr", "1e-3",
       "--peak-tflops", 1, "--order", "sequential", *more)
    train(data, tmp_path / "ranks", ranks, ep, 1, order="sequential", more=more)
    agree(tmp_path / "ranks", tmp_path / "alone")


def test_recompute(data, alone, tmp_path):
    """What is computed again is sent again, with the same result."""
    for level in (1, 2):
        train(data, tmp_path / str(level), 2, 2, 0, steps=2, more=[*GLOBAL, "--recompute", level])
        for x, y in zip(log(tmp_path / str(level)), log(alone)):
            assert abs(x["loss"] - y["loss"]) <= 1e-5 * y["loss"]


CHANGES = [((1, 1, 0), (2, 2, 1)), ((2, 2, 1), (1, 1, 0)), ((4, 2, 1), (4, 4, 0)), ((2, 1, 1), (4, 2, 0)),
           ((4, 4, 0), (2, 1, 1))]


@pytest.mark.parametrize("before, after", CHANGES if ALL else CHANGES[:2])
def test_resume_on_another_layout(data, alone, tmp_path, before, after):
    train(data, tmp_path, *before, steps=10, more=GLOBAL)
    train(data, tmp_path, *after, steps=20, more=[*GLOBAL, "--resume"])
    for x, y in zip(log(tmp_path), log(alone)):
        assert abs(x["loss"] - y["loss"]) <= 1e-5 * y["loss"], x["step"]


@pytest.mark.parametrize("ranks, ep, zero", LAYOUTS if ALL else [(2, 2, 1)])
def test_resume_on_the_same_layout(data, tmp_path, ranks, ep, zero):
    """Bit for bit, and the checkpoint does not show where it stopped."""
    train(data, tmp_path / "straight", ranks, ep, zero, steps=8)
    train(data, tmp_path / "stopped", ranks, ep, zero, steps=4)
    train(data, tmp_path / "stopped", ranks, ep, zero, steps=8, more=["--resume"])
    assert files(tmp_path / "straight" / "step-00000008") == files(tmp_path / "stopped" / "step-00000008")


def test_validation_and_samples(data, alone, tmp_path):
    """One line of each, from rank 0, and the same numbers as alone."""
    more = [*GLOBAL, "--val", data / "val.npy", "--tokenizer", "bytes", "--sample-tokens", 5]
    expected = train(data, tmp_path / "alone", 1, steps=2, more=more)
    out = train(data, tmp_path / "ranks", 2, 2, 0, steps=2, more=more)
    assert out.count("validation loss") == expected.count("validation loss") == 1
    x, y = log(tmp_path / "ranks")[-1], log(tmp_path / "alone")[-1]
    assert abs(x["val_loss"] - y["val_loss"]) <= 1e-5 * y["val_loss"]
    assert [l["counts"] for l in x["balance"]] == [l["counts"] for l in y["balance"]]
    assert out.split("sample:")[1] == expected.split("sample:")[1]


KINDS = 4 * 5 // 2          # of visits to a rank whose experts work in four pieces


def test_bytes_sent(data, tmp_path):
    """What the log counts is what the formulas of docs/scaling.md give."""
    c = json.loads(TINY.read_text())
    L, C, E = c["num_hidden_layers"], c["hidden_size"], c["num_experts"]
    K, F, V = c["num_experts_per_tok"], c["intermediate_size"], c["vocab_size"]
    dense = [V * C] + L * [C, 3 * C * C, C, C, C * C, C, E * C] + [C, V * C]
    experts = L * [E * 2 * F * C, E * C * F]
    for ranks, ep, zero in ((2, 1, 0), (2, 1, 1), (2, 2, 0), (4, 2, 1)):
        out = tmp_path / f"{ranks}-{ep}-{zero}"
        train(data, out, ranks, ep, zero, steps=1)
        sent = log(out)[0]["sent_bytes"]
        copies, share = ranks // ep, lambda n, size: -(-n // size)
        held = [n // ep for n in experts]
        of_experts = 1 if copies > 1 else 0         # experts that one rank alone holds are not sent
        if zero:
            assert sent["gradients"] == (4 * sum(share(n, ranks) * ranks for n in dense)
                                         + of_experts * 4 * sum(share(n, copies) * copies for n in held))
            assert sent["parameters"] == (4 * sum(share(n, ranks) for n in dense)
                                          + of_experts * 4 * sum(share(n, copies) for n in held))
        else:
            assert sent["gradients"] == 4 * sum(dense) + of_experts * 4 * sum(held)
            assert sent["parameters"] == 0
        assert sent["sums"] == 8 * (6 + ranks + L * E + 3 + 9 * L)
        tokens = 8 * 256 // ranks
        assert sent["counts"] == (L * (ep - 1) * (E // ep + KINDS) * 4 if ep > 1 else 0)
        # A visit brings a row, with K experts and weights, and takes one back, forward and backward; rank 0 sends and
        # answers. test_olmoe --ranks compares with the visits that the experts ask for.
        visit = 4 * C * 4 + 12 * K
        assert sent["rows"] % 4 == 0
        assert visit * tokens * L / 2 < sent["rows"] <= visit * tokens * L if ep == 2 else sent["rows"] == 0
    # Two micro-batches
    train(data, tmp_path / "more", 2, 2, 0, steps=1, batch=4, more=["--lb", "global", "--recompute", 2])
    sent = log(tmp_path / "more")[0]["sent_bytes"]
    assert sent["counts"] == 2 * L * (E // 2 + KINDS) * 4 + 2 * 4 * L * E
    assert sent["sums"] == 8 * (6 + 2 + L * E + 3 + 9 * L) + 2 * 16 * L * E


def test_planned_rows():
    """`olmoe info` expects the visits that random experts make."""
    c = json.loads(TINY.read_text())
    L, C, E, K = (c[k] for k in ("num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok"))
    for ranks, level in ((2, 0), (4, 0), (4, 2)):
        out = ok(1, "info", "--config", TINY, "--gpus", ranks, "--ep", ranks, "--recompute", level)
        visits = (ranks - 1) * (1 - math.comb(E - E // ranks, K) / math.comb(E, K))
        planned = float(re.search(r"sent: rows .* ([\d.]+) kB a token", out)[1])
        assert abs(planned - 1e-3 * L * visits * ((5 if level else 4) * C * 4 + 12 * K)) < 1e-3 * planned


PROGRAMS = [("cpu-fp32", [], 2, 1), ("cpu-fp32-strict", ["STRICT=1"], 2, 1), ("cpu-fp32-strict", ["STRICT=1"], 3, 2)]
MORE = [("cpu-bf16", ["PRECISION=BF16"], 2, 1), ("cpu-bf16-strict", ["STRICT=1", "PRECISION=BF16"], 2, 3),
        ("cpu-fp32-strict", ["STRICT=1"], 4, 3)]


@pytest.mark.parametrize("folder, options, ranks, seed", PROGRAMS + MORE if ALL else PROGRAMS)
def test_olmoe_on_ranks(folder, options, ranks, seed):
    """The exchange of rows for adversarial routings, and whole models, against the formulas: test_olmoe --ranks."""
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    build = ["make", "-s", "DEVICE=cpu", *options, f"build/{folder}/test_olmoe"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env=clean)
    words = [*command(ranks)[:-1], f"build/{folder}/test_olmoe", "--ranks"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_SEED": str(seed)})
    printed = result.stdout[-3000:] + result.stderr[-2000:]
    assert result.returncode == 0 and result.stdout.count(" passed, 0 failed") == ranks, printed


def test_bad_layouts(data, tmp_path):
    arguments = train_words(data, tmp_path / "out")
    refused(1, *arguments, "--ep", 2, words=["1 ranks", "--ep 2"])
    refused(3, *arguments, "--ep", 3, words=["16 experts", "--ep 3"])
    refused(2, *arguments, "--ep", 2, "--batch", 4, "--global-batch", 12,
            words=["--global-batch 12", "2 ranks", "--batch 4"])
    refused(2, *arguments, "--rendezvous", "127.0.0.1:12345", words=["--rendezvous"])
    refused(3, *arguments, "--bogus", words=["--bogus"])        # before the ranks have met
    refused(2, "train", "--data", "x", words=["--config"])
    assert not (tmp_path / "out").exists()


def test_the_table_shows_the_layout(data, tmp_path):
    result = run(2, *train_words(data, tmp_path, "--steps", 1, "--batch", 4, "--ep", 2, "--zero", 1))
    assert re.search(r"\| ranks +\| 2, started by mpirun; experts over 2, each held by 1; ZeRO-1 on", result.stdout)
    assert "arriving rows" in result.stdout and "micro-batches of 2 x 4" in result.stdout


def test_tensors_of_billions(tmp_path):
    """Shares of tensors with more elements than an int counts."""
    config = json.loads(TINY.read_text())
    config.update(hidden_size=16384, num_attention_heads=16, num_key_value_heads=16, vocab_size=262144)
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = ok(1, "info", "--config", tmp_path / "config.json", "--gpus", 2, "--zero", 1, "--seq", 256)
    parameters = int(re.search(r"parameters +\| (\d+)", out)[1])
    plan = {name: float(number) for name, number in re.findall(r"memory: (\w+) +\| ([\d.]+) GB", out)}
    assert parameters > 2 << 32
    assert abs(plan["parameters"] - 4e-9 * parameters) < 1 and abs(plan["optimizer"] - 4e-9 * parameters) < 1


def test_memory_that_is_not_there(data, tmp_path):
    """The error reports what was asked for, and the plan."""
    config = json.loads((ROOT / "configs/olmoe-1b-7b.json").read_text())
    config["vocab_size"] = 1 << 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(1, "train", "--config", tmp_path / "config.json", "--data", data / "train.npy", "--out", tmp_path / "out",
            "--batch", 1024, "--seq", 256, "--peak-tflops", 1,
            words=["no memory for the", "the plan: parameters 2", "optimizer 5", "sum"])


def test_buffers_grow(data, tmp_path):
    """More rows than even routing sends: none is dropped, and a note reports it."""
    result = run(4, *train_words(data, tmp_path, "--steps", 2, "--batch", 2, "--ep", 4, "--warmup", 2))
    note = r"^note: rank \d: \d+ rows arrive for the experts of layer \d, there was room for \d+; it grows$"
    assert result.returncode == 0 and re.search(note, result.stderr, re.M), result.stderr


def test_what_takes_longer_than_the_timeout(data, tmp_path):
    """A validation without any collective does not count as ranks that have stood still."""
    train(data, tmp_path / "before", 2, steps=2)
    rate, piece = log(tmp_path / "before")[-1]["tokens_per_s"], (data / "val.npy").read_bytes()
    pieces = int(7 * 3 * rate * 2 / len(piece)) + 1     # some 7 seconds: forward is a third of a step
    for times in (1, 3, 9, 27):             # how long steps take is no good guess where the ranks share a core
        with open(tmp_path / "long.npy", "wb") as f:
            for _ in range(times * pieces):
                f.write(piece)
        start = time.time()
        train(data, tmp_path / f"out{times}", 2, steps=1, more=["--val", tmp_path / "long.npy", "--timeout", 3])
        if time.time() - start > 4:
            return
    raise AssertionError("the validation was too short to tell")


def test_one_rank_cannot_write(data, tmp_path):
    """A rank whose disk is full reports it, in the only line."""
    words = command(2, *train_words(data, tmp_path / "out", "--steps", 2, "--batch", 4, "--zero", 1))
    limited = ["bash", "-c", '[ "$OMPI_COMM_WORLD_RANK" = 0 ] || ulimit -f 1000; exec "$0" "$@"']
    words[words.index(OLMOE):words.index(OLMOE)] = limited
    result = subprocess.run(words, capture_output=True, text=True, timeout=120,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in result.stderr.splitlines() if line.startswith("olmoe: ")]
    assert result.returncode != 0 and len(lines) == 1, result.stderr
    assert "rank 1" in lines[0] and "File too large" in lines[0], result.stderr
    assert not list((tmp_path / "out").glob("*step-*"))


def test_nan_is_told_once(data, tmp_path):
    """A loss that is not finite stops all ranks, with one line."""
    refused(2, *train_words(data, tmp_path, "--steps", 200, "--batch", 4, "--ep", 2, "--lr", "1e3", "--grad-clip", 0,
                            "--warmup", 0, "--schedule", "constant"), words=["not finite"])


def test_no_device_wide_synchronisation():
    """In a step the host waits for streams, never for the device: only these functions do, and of them a step calls
    reserve_rows, when buffers grow."""
    found = set()
    for path in [ROOT / "olmoe.cu", *(ROOT / "lib").glob("*.h"), *(ROOT / "commands").glob("*.h")]:
        source = path.read_text()
        lines = cpp_source.blank(source).splitlines()
        functions = {i: f.name for f in cpp_source.functions(source) for i in range(f.line, f.line + f.lines)}
        found |= {functions[i] for i, line in enumerate(lines, 1) if "cudaDeviceSynchronize" in line}
    assert found == {"device_close", "trace_begin", "trace_end", "reserve_rows", "olmoe_free", "run_save"}


def numbers(events, name, layer):
    """The places in the program's order of what a layer runs under a name."""
    return [e["args"]["number"] for e in events if e["name"] == name and e["args"]["layer"] == layer]


def test_trace(data, tmp_path):
    """The reduction of a layer's gradients is issued before the backward of the layer below, on another stream."""
    trace = tmp_path / "trace.json"
    train(data, tmp_path / "out", 2, 1, 0, steps=2, more=["--trace", trace])
    for path in (trace, Path(f"{trace}.1")):
        events = json.loads(path.read_text())["traceEvents"]
        ran = [e for e in events if e["ph"] == "X"]
        assert all(e["dur"] >= 0 for e in ran)
        streams = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
        reductions = [e for e in ran if e["name"].startswith("reduction of")]
        assert reductions and all(e["tid"] == streams["collectives"] for e in reductions)
        computed = [e for e in ran if e["name"] in ("matmul", "gather_kernel", "swiglu_backward_kernel")]
        assert all(e["tid"] != streams["collectives"] for e in computed)
        layers = 1 + max(e["args"]["layer"] for e in ran)
        for layer in range(1, layers):
            reduced = numbers(ran, "reduction of gradients", layer)
            reduced += numbers(ran, "reduction of the experts' gradients", layer)
            below = numbers(ran, "swiglu_backward_kernel", layer - 1)   # the experts' backward begins a layer's
            assert len(below) == 1 and len(reduced) == 2 and max(reduced) < below[0]


@pytest.mark.parametrize("batch, micro_batches, ends", [(8, 1, True), (4, 2, True), (2, 2, False)],
                         ids=["one", "two", "four"])
def test_trace_covers_two_micro_batches(data, tmp_path, batch, micro_batches, ends):
    """At most two, of the first of three steps; the reductions belong to a step's last one."""
    train(data, tmp_path / "out", 2, steps=3, batch=batch, more=["--trace", tmp_path / "trace.json"])
    for path in (tmp_path / "trace.json", tmp_path / "trace.json.1"):
        ran = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
        for layer in range(1 + max(e["args"]["layer"] for e in ran)):
            assert len(numbers(ran, "swiglu_backward_kernel", layer)) == micro_batches
            assert len(numbers(ran, "reduction of gradients", layer)) == ends
        assert not [e for e in ran if e["name"].startswith(("adamw", "square_sum", "sum of numbers"))]


def test_trace_of_counts(data, tmp_path):
    """The host waits for the counts of rows after it has launched the gather, and waits for no more than them."""
    train(data, tmp_path / "out", 1, steps=1, more=["--trace", tmp_path / "trace.json"])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ran = [e for e in events if e["ph"] == "X"]
    streams = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    assert {e["tid"] for e in ran if e["name"] == "counts to the host"} == {streams["copies"]}
    for layer in range(1 + max(e["args"]["layer"] for e in ran)):
        gathered = numbers(ran, "gather_kernel", layer)
        counted = numbers(ran, "counts to the host", layer)
        assert len(counted) == 1 and gathered[0] < counted[0]


# The order of a layer's exchanges in pieces, and of what is computed between them
PIECES = ["to", "to", "compute", "from", "to", "compute", "from", "to", "compute", "from", "compute", "from"]


def test_trace_with_shared_experts(data, tmp_path):
    """On all ranks a piece of the rows arrives, and another leaves, while the experts work on a third. A layer's
    reduction is issued after the exchanges of the layer below, before its attention's backward."""
    train(data, tmp_path / "out", 2, 2, 0, steps=1, more=["--trace", tmp_path / "trace.json"])
    orders = []
    for path in (tmp_path / "trace.json", tmp_path / "trace.json.1"):
        ran = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
        collectives = [e for e in ran if e["tid"] == next(r["tid"] for r in ran if r["name"] == "exchange of counts")]
        orders.append([(e["name"], e["args"]["layer"])
                       for e in sorted(collectives, key=lambda e: e["args"]["number"])])
        for layer in range(1 + max(e["args"]["layer"] for e in ran)):
            for names in (("dispatch to the experts", "swiglu_forward_kernel", "return from the experts"),
                          ("gradients to the experts", "swiglu_backward_kernel", "gradients from the experts")):
                of = dict(zip(names, ("to", "compute", "from")))
                found = [e for e in ran if e["name"] in of and e["args"]["layer"] == layer]
                assert [of[e["name"]] for e in sorted(found, key=lambda e: e["args"]["number"])] == PIECES
            counted, weights = numbers(ran, "exchange of counts", layer), numbers(ran, "dispatch of weights", layer)
            assert len(weights) == 1 and counted < weights < numbers(ran, "dispatch to the experts", layer)
        for layer in range(1, 1 + max(e["args"]["layer"] for e in ran)):
            exchanged = numbers(ran, "gradients from the experts", layer - 1)
            reduced = numbers(ran, "reduction of gradients", layer)
            attention = numbers(ran, "attention_softmax_backward_kernel", layer - 1)
            assert len(reduced) == 1 and max(exchanged) < reduced[0] < min(attention)
    assert orders[0] == orders[1]


def test_trace_that_cannot_be_written(data, tmp_path):
    arguments = train_words(data, tmp_path / "out", "--steps", 1, "--trace", tmp_path / "missing" / "trace.json")
    refused(1, *arguments, words=["trace.json", "No such file"])


def children(pid):
    """Process ids of the ranks that an mpirun started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "exe").resolve() != Path(OLMOE).resolve():
                    continue
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(v.split("=", 1) for v in variables if "=" in v)
                if environment.get("OLMOE_TEST") == str(pid):
                    found[int(environment["OMPI_COMM_WORLD_RANK"])] = int(entry.name)
            except OSError:
                continue
    return found


def wait_for_third_step(process, path):
    until = time.time() + 120
    while time.time() < until and not (path.exists() and len(path.read_text().splitlines()) > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def start(data, out, ranks, *more):
    """A training that runs until something happens to it, once its third step is logged. Returns the launcher, the
    ranks' processes and the program's arguments."""
    arguments = train_words(data, out, "--steps", 400, "--decay-steps", 400, "--batch", 4 // ranks, "--ep", 2,
                            "--zero", 1, "--warmup", 2, *more)
    words = command(ranks, *arguments)
    words[1:1] = ["--mca", "odls_base_sigkill_timeout", "10"]       # how long mpirun waits also when a rank failed
    tag = f"{os.getpid()}-{out.name}"
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "OLMOE_TEST": tag})
    wait_for_third_step(process, out / "log.jsonl")
    return process, children(tag), [str(a) for a in arguments]


def finished(process, pids, seconds):
    """The job's lines on standard error, and its exit code, within so many seconds; nothing of it is left."""
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    until = time.time() + 10
    while time.time() < until and any(Path(f"/proc/{pid}").exists() for pid in pids.values()):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    return [line for line in errors.splitlines() if line.startswith("olmoe: ")], process.returncode


FAILURES = [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 0)]


@pytest.mark.parametrize("what, who", FAILURES if ALL else FAILURES[:2])
def test_a_rank_that_is_gone(data, tmp_path, what, who):
    """Killed or stopped in the middle of training: the job ends in time, one line names the rank, and the last
    checkpoint goes on as if nothing had happened."""
    process, pids, arguments = start(data, tmp_path / "run", 2, "--timeout", 5, "--save-every", 2)
    os.kill(pids[who], what)
    lines, code = finished(process, pids, 60)
    assert code != 0 and len(lines) == 1 and f"rank {who} " in lines[0], lines
    assert ("is gone" if what == signal.SIGKILL else "has not answered for 5 s") in lines[0]
    saved = max(int(p.name[5:]) for p in (tmp_path / "run").glob("step-*"))
    steps = ["--steps", str(saved + 2)]
    arguments[arguments.index("--steps"):arguments.index("--steps") + 2] = steps
    ok(2, *arguments, "--save-every", 2, "--resume")
    arguments[arguments.index("--out") + 1] = str(tmp_path / "straight")
    ok(2, *arguments)
    name = f"step-{saved + 2:08d}"
    assert files(tmp_path / "run" / name) == files(tmp_path / "straight" / name)


@pytest.mark.parametrize("who", [0, 1])
def test_preemption(data, tmp_path, who):
    """SIGTERM to one rank: all finish the step, save, and end with 0; there may be no time for a validation."""
    process, pids, _ = start(data, tmp_path / "run", 2, "--val", data / "val.npy")
    os.kill(pids[who], signal.SIGTERM)
    lines, code = finished(process, pids, 60)
    assert code == 0 and lines == []
    last = log(tmp_path / "run")[-1]["step"]
    assert "val_loss" not in log(tmp_path / "run")[-1]
    assert last < 400 and (tmp_path / "run" / f"step-{last:08d}" / "trainer_state.json").exists()


def test_launch_script_saves(data, tmp_path):
    """SIGTERM to scripts/launch_node.sh is not the end of the ranks, as it would be to mpirun, but saves."""
    tag = f"{os.getpid()}-script"
    _, *arguments = train_words(data, tmp_path / "run", "--steps", 400, "--batch", 2, "--ep", 2)
    words = ["bash", ROOT / "scripts/launch_node.sh", *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "RANKS": "2", "OLMOE_TEST": tag})
    wait_for_third_step(process, tmp_path / "run/log.jsonl")
    pids = children(tag)
    process.send_signal(signal.SIGTERM)
    lines, code = finished(process, pids, 60)
    assert code == 0 and lines == [] and len(pids) == 2
    assert (tmp_path / "run" / f"step-{log(tmp_path / 'run')[-1]['step']:08d}" / "trainer_state.json").exists()
