"""test_olmoe.cu in every build of the CPU machine: each kernel and the model against float64, PyTorch's numbers and
finite differences; with threads in another order the same bits; with the address and undefined-behaviour sanitizers.

    python3 -m pytest tests/test_kernels.py
"""
import os
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The thousands of evaluations of the finite differences are for the fast machine.
SHORT = ("--without", "gradient")

BF16, STRICT, STRICT_BF16 = ("PRECISION=BF16",), ("STRICT=1",), ("PRECISION=BF16", "STRICT=1")
TWO_THREADS = {"OMP_NUM_THREADS": "2"}
WIDENED = {"DNNL_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}      # as where oneDNN has no bf16

# name: (folder under build/, options of make, arguments of the program, environment)
RUNS = {
    "fast FP32": ("cpu-fp32", (), (), {}),
    "fast BF16": ("cpu-bf16", BF16, (), {}),
    "fast FP32, 2 threads": ("cpu-fp32", (), SHORT, TWO_THREADS),
    "fast FP32, 2 threads, again": ("cpu-fp32", (), SHORT, TWO_THREADS),
    "fast FP32, 2 threads, busy": ("cpu-fp32", (), SHORT, TWO_THREADS),
    "fast BF16, 2 threads": ("cpu-bf16", BF16, (), TWO_THREADS),
    "fast BF16, 2 threads, again": ("cpu-bf16", BF16, (), TWO_THREADS),
    "fast BF16, widened": ("cpu-bf16", BF16, (), WIDENED),
    "fast BF16, widened, again": ("cpu-bf16", BF16, (), WIDENED),
    **{f"strict FP32, seed {seed}": ("cpu-fp32-strict", STRICT, SHORT, {"CUDA_SEED": str(seed)})
       for seed in range(1, 6)},
    **{f"strict BF16, seed {seed}": ("cpu-bf16-strict", STRICT_BF16, (), {"CUDA_SEED": str(seed)})
       for seed in (1, 2)},
    "address sanitizer": ("cpu-fp32-strict-address", ("SANITIZE=address",), SHORT, {}),
    "undefined-behaviour sanitizer": ("cpu-fp32-strict-undefined", ("SANITIZE=undefined",), SHORT, {}),
}
# Runs that must give the same bits
EQUAL = {
    "fast FP32": [name for name in RUNS if name.startswith("fast FP32, 2 threads")],
    "fast BF16": [name for name in RUNS if name.startswith("fast BF16, 2 threads")],
    "fast BF16, widened": [name for name in RUNS if name.startswith("fast BF16, widened")],
    "strict FP32": [name for name in RUNS if name.startswith("strict FP32")],
    "strict BF16": [name for name in RUNS if name.startswith("strict BF16")],
}

locks = {folder: threading.Lock() for folder, *_ in RUNS.values()}
# The options of a make that called this one are not meant for the builds here.
NOT_FOR_BUILDS = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CUDA_SEED")
clean = {key: value for key, value in os.environ.items() if key not in NOT_FOR_BUILDS}


def build_and_run(name):
    folder, options, arguments, environment = RUNS[name]
    with locks[folder]:
        made = subprocess.run(["make", "-s", "DEVICE=cpu", *options, f"build/{folder}/test_olmoe"], cwd=ROOT, env=clean,
                              capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    command = [f"build/{folder}/test_olmoe", *arguments]
    options = {"cwd": ROOT, "env": {**clean, "OMP_NUM_THREADS": "1", **environment}}
    others = [subprocess.Popen(command, **options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
              for _ in range(4 if name.endswith("busy") else 0)]
    try:
        return subprocess.run(command, **options, capture_output=True, text=True, timeout=600)
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.fixture(scope="module")
def runs(request):
    """What the chosen tests need, name -> future, with as many at work as there are cores."""
    needed = []
    for item in request.session.items:
        if item.fspath == request.node.fspath:
            parameters = item.callspec.params
            needed += [parameters["name"]] if "name" in parameters else EQUAL[parameters["group"]]
    needed.sort(key=lambda name: -len(RUNS[name][0]))          # the sanitizers' builds take longest
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        first = {}
        for name in needed:                                    # one of each build before the others that wait for it
            first.setdefault(RUNS[name][0], name)
        yield {name: pool.submit(build_and_run, name) for name in dict.fromkeys([*first.values(), *needed])}


def result(runs, name):
    done = runs[name].result()
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    failures = "\n".join(line for line in done.stdout.splitlines() if line.endswith("FAILED"))
    report = f"{name}: exit code {done.returncode}, {last}\n{failures}\n{done.stderr[-3000:]}"
    assert done.returncode == 0 and re.fullmatch(r"[1-9]\d* passed, 0 failed", last), report
    return done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_olmoe(runs, name):
    result(runs, name)


@pytest.mark.parametrize("group", EQUAL)
def test_same_bits(runs, group):
    sums = {name: re.search(r"^checksum ([0-9a-f]{16})$", result(runs, name), re.M).group(1) for name in EQUAL[group]}
    assert len(sums) >= 2 and len(set(sums.values())) == 1, sums
