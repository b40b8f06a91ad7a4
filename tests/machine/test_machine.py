"""Tests of CUDA on the CPU: that it computes what it should, that the strict machine finds each kind of mistake it
claims to find and accepts the corrected program, and that what it does not implement does not build.

    python3 -m pytest tests/machine
"""
import json
import os
import platform
import re
import shutil
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
X86 = platform.machine() == "x86_64"
SEEDS = range(1, 11)

built = {}


def build(name, *options):
    """Path of tests/machine/NAME.cu, built with make's options."""
    key = (name,) + options
    if key not in built:
        values = dict(option.split("=") for option in options)
        folder = "cpu-" + values.get("PRECISION", "FP32").lower()
        if "STRICT" in values or "SANITIZE" in values:
            folder += "-strict"
        if "SANITIZE" in values:
            folder += "-" + values["SANITIZE"]
        target = f"build/{folder}/tests/machine/{name}"
        made = subprocess.run(["make", "-s", "DEVICE=cpu", *options, target], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        assert "warning" not in made.stderr, made.stderr
        built[key] = os.path.join(ROOT, target)
    return built[key]


def run(program, *arguments, **environment):
    environment = {name: str(value) for name, value in environment.items()}
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


# ---- both machines compute

@pytest.mark.parametrize("options", [(), ("STRICT=1",)], ids=["fast", "strict"])
@pytest.mark.parametrize("name", ["gemm", "launches", "cpu_math", "events", "tensor_core"])
def test_results(name, options):
    done = run(build(name, *options))
    assert done.returncode == 0 and done.stdout.endswith(f"{name} ok\n"), done.stdout + done.stderr


def test_tensor_cores_with_seeds():
    """The same bits in every order of warps, and as a chain of fmaf has them."""
    runs = [run(build("tensor_core", "STRICT=1"), CUDA_SEED=seed) for seed in SEEDS]
    assert all(done.returncode == 0 and done.stdout == runs[0].stdout for done in runs), runs
    products = runs[0].stdout.splitlines()[:-1]
    assert len(products) == 7 and all(", as a chain of fmaf, hash " in line for line in products), products


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["gemm", "launches", "cpu_math"])
def test_results_with_threads(name, threads):
    done = run(build(name), OMP_NUM_THREADS=threads)
    assert done.returncode == 0, done.stdout + done.stderr


def test_products_where_onednn_has_no_bf16():
    for options in ((), ("STRICT=1",)):
        done = run(build("gemm", *options), DNNL_MAX_CPU_ISA="AVX2")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not X86, reason="libmvec")
def test_functions_vectorise():
    """Calls of the vector forms are in the program: expf in a loop became one call for many elements."""
    symbols = subprocess.run(["nm", "-D", build("cpu_math")], capture_output=True, text=True, check=True).stdout
    for function in ["expf", "logf", "cosf"]:
        assert re.search(rf"_ZGV[bde]N(4|8|16)v_{function}", symbols), function


# ---- the strict machine: {case: what its report must contain; None: the result must be wrong with some seeds}

CASES = {
    "missing_syncwarp": None,
    "overwritten_too_early": None,
    "block_order": None,
    "mismatched_calls": "wait elsewhere.*in kernel divergent",
    "mismatched_masks": "wait elsewhere.*in kernel masked",
    "mask_without_caller": "lane 15 calls a warp function whose mask 00007fff leaves it out",
    "shuffle_from_returned_lane": "reads lane \\d+, which does not take part",
    "stack_overflow": "needs more than the 65536 bytes of its stack",
    "write_after_end": "invalid write: 0x\\w+ is 0 bytes after the end of device allocation 1 of 256 bytes"
                       ".*in kernel fill, .* thread \\(64, 0, 0\\)",
    "write_shortly_after_end": "overwritten: 0x\\w+ is 0 bytes after the end of device allocation 1 of 260 bytes"
                               ".*in kernel fill",
    "write_before_begin": "overwritten: 0x\\w+ is 4 bytes before device allocation 1 of 256 bytes.*in kernel fill",
    "read_after_end": "invalid read: 0x\\w+ is 0 bytes after the end of device allocation 1 of 256 bytes"
                      ".*in kernel copy",
    "uninitialised": None,
    "use_after_free": "invalid read: 0x\\w+ is byte \\d+ of freed device allocation 1 of 256 bytes.*in kernel copy",
    "double_free": "cudaFree: freed twice",
    "free_of_middle": "cudaFree: not the start of an allocation: 0x\\w+ is byte 16 of",
    "free_of_host_memory": "cudaFree: not the start of an allocation: 0x\\w+ is ordinary host memory",
    "host_reads_device": "host code touches device memory \\(read\\): "
                         "0x\\w+ is byte 12 of device allocation 1 of 256 bytes",
    "host_writes_device": "host code touches device memory \\(write\\)",
    "kernel_gets_host_pointer": "launch of copy: argument 2 must be device memory: 0x\\w+ is ordinary host memory",
    "null_pointer": "invalid write: 0x\\w+ is a null pointer or a small offset from one.*in kernel fill",
    "copy_in_wrong_direction": "cudaMemcpy: the destination must be host memory",
    "copy_too_long": "cudaMemcpy: the destination of 260 bytes is not inside of an allocation",
    "memset_too_long": "cudaMemset: the destination of 260 bytes is not inside of an allocation",
    "product_too_large": "cublasGemm 8 x 8 x 8, batch 1: C of 256 bytes is not inside of an allocation",
    "host_reads_too_early": None,
    "host_overwrites_too_early": None,
    "missing_event": None,
    "overtaking_stream": None,
    "event_recorded_too_early": None,
    "event_never_recorded": "the event was never recorded",
    "memset_beside_stream": None,
    "use_of_destroyed_stream": "the stream has been destroyed",
    "sum_too_long": "ncclAllReduce: recvbuff of 260 bytes is not inside of an allocation",
    "sum_of_host_memory": "ncclAllReduce: sendbuff must be device memory: 0x\\w+ is byte 0 of pinned host allocation 1",
    "sum_not_in_place": "ncclAllReduce: sendbuff and recvbuff overlap, but not as they do in place: "
                        "recvbuff, .*, is 32 bytes after sendbuff; in place it would be 0",
    "gather_not_in_place": "ncclAllGather: sendbuff and recvbuff overlap",
    "received_twice": "ncclRecv writes what ncclRecv of the same group reads or writes",
    "never_received": "ncclSend to the own rank, 0, without an ncclRecv in the same group",
    "sum_without_event": None,
    "use_before_sum": None,
    "overwritten_before_sum": None,
    "too_many_threads": "launch of fill: a block of \\(1025, 1, 1\\) threads",
    "no_blocks": "launch of fill: a grid of \\(0, 1, 1\\) blocks",
    "grid_too_high": "launch of fill: a grid of \\(1, 65536, 1\\) blocks",
    "too_much_shared_memory": "launch of fill: 49153 bytes of shared memory; CUDA allows 49152",
    "more_shared_memory_than_set": "launch of fill: 100001 bytes of shared memory; CUDA allows 100000",
    "shared_memory_set_for_another": "launch of fill_one_of_two<2>: 50000 bytes of shared memory; CUDA allows 49152",
    "more_shared_memory_than_there_is": "cudaFuncSetAttribute: 232449 bytes of shared memory; CUDA allows at most "
                                        "232448",
    "missing_barrier": None,
    "missing_second_barrier": None,
    "divergent_barrier": "a divergent barrier: this thread calls __syncthreads at \\S*bugs.cu:\\d+, others of its "
                         "block wait in that at \\S*bugs.cu:\\d+.*in kernel two_barriers, .* thread \\(\\d+, 0, 0\\)",
    "barrier_in_half_a_warp": "lane \\d+ calls __sync(threads|warp).*, but lanes that it (leaves behind|names) wait "
                              "elsewhere; lanes \\w+ wait in __sync(warp|threads).*in kernel barrier_or_warp",
    "barrier_after_lanes_returned": "a divergent barrier: __syncthreads takes all lanes of a warp; .*lanes \\w+ have "
                                    "returned.*in kernel early_return, .* thread \\((6[4-9]|[789]\\d), 0, 0\\)",
    "shared_uninitialised": None,
    "shared_of_another_block": "invalid read: 0x\\w+ is shared memory of a block that is over.*in kernel leave_pointer",
    "shared_after_end": "invalid write: 0x\\w+ is 0 bytes after the end of the block's 384 bytes of shared memory"
                        ".*in kernel write_shared",
    "shared_shortly_after_end": "overwritten: 0x\\w+ is 0 bytes after the end of the block's 400 bytes of shared memory"
                                ".*in kernel write_shared",
    "shared_before_begin": "overwritten: 0x\\w+ is \\d bytes before the block's 400 bytes of shared memory"
                           ".*in kernel write_shared",
    "shared_not_asked_for": "invalid write: 0x\\w+ is shared memory, of which this launch has none",
    "mma_after_lanes_returned": "mma takes all 32 lanes of a warp, and lanes ffff0000 are missing; lanes 0000ffff wait "
                                "in mma; lanes ffff0000 have returned.*in kernel ones, .* thread \\(0, 0, 0\\)",
    "mma_in_half_a_warp": "lane \\d+ calls (mma|__syncwarp).*, but lanes that it names wait elsewhere"
                          ".*in kernel ones, .* thread \\(\\d+, 0, 0\\)",
    "mma_in_small_block": "mma takes all 32 lanes of a warp, and lanes ffff0000 are missing.*in kernel ones",
    "ldmatrix_in_half_a_warp": "lane \\d+ calls ldmatrix\\w*, but lanes that it names wait elsewhere; lanes \\w+ wait "
                               "in ldmatrix.*in kernel load_matrix, .* thread \\(\\d+, 0, 0\\)",
    "ldmatrix_misaligned": "ldmatrix: the row is not aligned to 16 bytes: 0x\\w+ is byte \\d+ of the block's 512 bytes"
                           ".*in kernel load_matrix, .* thread \\(\\d*[13579], 0, 0\\)",
    "ldmatrix_after_end": "ldmatrix: the row is not in the block's shared memory: 0x\\w+ is 0 bytes after the end"
                          ".*in kernel load_matrix, .* thread \\(31, 0, 0\\)",
    "ldmatrix_of_global_memory": "ldmatrix: the row is not in the block's shared memory: 0x\\w+ is byte 0 of device "
                                 "allocation 1 .*in kernel load_matrix, .* thread \\(9, 0, 0\\)",
    "ldmatrix_uninitialised": "ldmatrix reads shared memory that is not initialised, .*: 0x\\w+ is byte 508 of the "
                              "block's 512 bytes.*in kernel load_matrix, .* thread \\(31, 0, 0\\)",
    "missing_wait": None,
    "wait_for_too_few": None,
    "missing_commit": None,
    "wait_without_barrier": None,
    "copy_never_waited_for": "a thread returns without a wait for 1 of its asynchronous copies: the first one, to "
                             "0x\\w+ is byte \\d+ of the block's 2048 bytes.*in kernel copy_groups, .* thread",
    "copy_to_misaligned": "copy_async: the destination is not aligned to 16 bytes.*in kernel copy_groups, .* thread",
    "copy_to_after_end": "copy_async: the destination is not in the block's shared memory: 0x\\w+ is 0 bytes after the "
                         "end.*in kernel copy_groups, .* thread \\(63, 0, 0\\)",
    "copy_to_before_begin": "copy_async: the destination is not in the block's shared memory: 0x\\w+ is \\d+ bytes "
                            "before.*in kernel copy_groups, .* thread",
    "copy_from_misaligned": "copy_async: the source is not aligned to 16 bytes.*in kernel copy_groups, .* thread",
    "copy_from_after_end": "copy_async: the source of 16 bytes is not inside of an allocation: its first byte, 0x\\w+ "
                           "is 0 bytes after the end of .*in kernel copy_groups, .* thread \\(63, 0, 0\\)",
    "copy_over_what_is_read": None,
}
# Only the sanitizers see these.
SANITIZED = {
    "misaligned_pack": ("undefined", "misaligned address"),
    "index_overflow": ("undefined", "signed integer overflow"),
    "blocks_write_the_same": ("thread", "data race.*add_all"),
    "missing_syncwarp": ("thread", "data race.*neighbours"),
    "missing_barrier": ("thread", "data race.*from_other_warp"),
    "write_shortly_after_end": ("address", "use-after-poison.*fill"),
    "shared_shortly_after_end": ("address", "use-after-poison.*write_shared"),
}


def test_every_case_is_listed():
    cases = run(build("bugs", "STRICT=1")).stdout.split()
    assert set(cases) == set(CASES) | set(SANITIZED)


@pytest.mark.parametrize("case", CASES)
def test_strict_reports(case):
    program, report = build("bugs", "STRICT=1"), CASES[case]
    runs = [run(program, case, "bug", CUDA_SEED=seed) for seed in SEEDS]
    if report is None:
        # Orders are drawn: at least two of ten seeds must find it, so that the five seeds of a test are enough
        assert all(r.returncode in (0, 1) for r in runs), [r.stderr for r in runs]
        assert sum(r.returncode == 1 for r in runs) >= 2
    else:
        for r in runs:
            assert r.returncode == 99, (r.returncode, r.stderr)
            assert r.stderr.startswith("cuda-on-cpu: ") and re.search(report, r.stderr, re.S), r.stderr


@pytest.mark.parametrize("case", CASES)
def test_strict_accepts_corrected(case):
    for seed in SEEDS:
        done = run(build("bugs", "STRICT=1"), case, "fixed", CUDA_SEED=seed)
        assert done.returncode == 0 and done.stderr == "", (seed, done.returncode, done.stderr)


@pytest.mark.parametrize("case", SANITIZED)
def test_sanitizers(case):
    sanitizer, report = SANITIZED[case]
    program = build("bugs", f"SANITIZE={sanitizer}")
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}
    bug = run(program, case, "bug", **environment)
    assert bug.returncode != 0 and re.search(report, bug.stderr, re.S), bug.stderr
    fixed = run(program, case, "fixed", **environment)
    assert fixed.returncode == 0 and fixed.stderr == "", fixed.stderr


def test_same_seed_same_run():
    program = build("bugs", "STRICT=1")
    for seed in (1, 2):
        first, second = (run(program, "mismatched_masks", "bug", CUDA_SEED=seed).stderr for _ in range(2))
        strip = lambda text: re.sub(r"0x\w+", "", text)
        assert strip(first) == strip(second)


# ---- several ranks

needs_mpi = pytest.mark.skipif(not shutil.which("mpirun") or not shutil.which("mpicc"),
                               reason="needs Open MPI: make setup")


def run_ranks(ranks, program, *arguments, **environment):
    """On one rank without mpirun and so without MPI."""
    if ranks == 1:
        return run(program, *arguments, OMP_NUM_THREADS=1, **environment)
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    return run(*mpirun, program, *arguments, OMP_NUM_THREADS=1, **environment)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi), pytest.param(3, marks=needs_mpi)])
def test_collectives(ranks):
    """Right, and the same bits in each run, in both machines."""
    fast, strict = build("collectives"), build("collectives", "STRICT=1")
    runs = [run_ranks(ranks, fast) for _ in range(2)]
    runs += [run_ranks(ranks, strict, CUDA_SEED=seed) for seed in (1, 2, 3)]
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
    lines = [sorted(done.stdout.splitlines()) for done in runs]
    assert len(lines[0]) == ranks, lines[0]
    for rank, line in enumerate(lines[0]):
        assert re.fullmatch(rf"rank {rank} of {ranks}: hash \w{{16}}", line), lines[0]
    assert all(other == lines[0] for other in lines), lines


@needs_mpi
@pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 << 30,
                    reason="needs 8 GB of free memory")
def test_counts_beyond_int():
    done = run_ranks(2, build("collectives"), "huge")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_mpi
@pytest.mark.parametrize("case, ranks, report", [
    ("counts", 2, "the ranks' calls differ: .*ncclAllReduce of 6[34] elements.*ncclAllReduce of 6[34] elements"),
    ("counts", 3, "the ranks' calls differ: .*ncclAllReduce of 6[34] elements.*ncclAllReduce of 6[34] elements"),
    ("calls", 3, "the ranks' calls differ: .*(ncclBroadcast.*ncclAllReduce|ncclAllReduce.*ncclBroadcast)"),
    ("roots", 2, "the ranks' calls differ: .*root [01].*root [01]"),
    ("types", 2, "the ranks' calls differ: .*type [27].*type [27]"),
    ("sizes", 2, "rank 0 receives 256 bytes from rank 1, which sent fewer"),
    ("touch", 2, "host code touches device memory"),
])
def test_strict_compares_ranks(case, ranks, report):
    done = run_ranks(ranks, build("collectives", "STRICT=1"), case)
    assert done.returncode == 99 and re.search("cuda-on-cpu: " + report, done.stderr), done.stdout + done.stderr


def test_signatures_are_nccls():
    """What cpu/nccl.h declares is also in NVIDIA's header, with the same arguments and values."""
    folders = [os.environ.get("NCCL_HOME", "") + "/include", "/usr/local/cuda/include",
               "/usr/include", "/usr/local/include"]
    headers = [path for path in (folder + "/nccl.h" for folder in folders) if os.path.exists(path)]
    if not headers:
        pytest.skip("needs NVIDIA's nccl.h")
    def declared(path):
        with open(path) as f:
            text = re.sub(r"/\*.*?\*/|//[^\n]*", "", f.read(), flags=re.S)
        flat = lambda arguments: re.sub(r"\s*([*,])\s*", r"\1 ", " ".join(arguments.split()))
        declarations = re.finditer(r"^((?:const )?\w+\*?)\s+(nccl\w+)\(([^)]*)\);", text, flags=re.M)
        functions = {m[2]: (m[1].strip(), flat(m[3])) for m in declarations}
        return functions, dict(re.findall(r"\b(nccl\w+)\s*=\s*(\d+)\b", text))
    (functions, values), (real_functions, real_values) = declared(f"{ROOT}/cpu/nccl.h"), declared(headers[0])
    assert len(functions) == 17 and len(values) > 20
    assert {k: real_functions.get(k) for k in functions} == functions
    assert {k: real_values.get(k) for k in values} == values


def test_build_without_mpi(tmp_path):
    """One rank, and make reports it."""
    shutil.copytree(f"{ROOT}/cpu", tmp_path / "cpu")
    shutil.copytree(f"{ROOT}/tests/machine", tmp_path / "tests" / "machine")
    shutil.copy(f"{ROOT}/Makefile", tmp_path)
    target = "build/cpu-fp32-strict/tests/machine/collectives"
    without_mpi = ["DEVICE=cpu", "MPICC=/nowhere/mpicc"]
    made = subprocess.run(["make", *without_mpi, "STRICT=1", target], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0 and "warning" not in made.stderr, made.stdout + made.stderr
    assert "-lmpi" not in made.stdout, made.stdout
    assert run(tmp_path / target).stdout.startswith("rank 0 of 1: hash ")
    asked = subprocess.run(["make", "-n", *without_mpi, "olmoe"], cwd=ROOT, capture_output=True, text=True)
    assert "Building for the CPU in FP32, without MPI: " in asked.stdout, asked.stdout


def test_build_without_nccl(tmp_path):
    """The header that CUDA builds have in place of NCCL's, here in a build of the fast machine: one rank, and the same
    results as NCCL over MPI."""
    alone = run(build("collectives"))
    compiler = ["g++", "-std=c++17", "-fopenmp"]
    folders = ["-Icpu/no_nccl", "-Icpu", "-Icpu/no_mpi"]
    preprocessed = subprocess.run([*compiler, "-DWARP=1", *folders, "-E", "-x", "c++", "tests/machine/collectives.cu"],
                                  cwd=ROOT, capture_output=True, check=True).stdout
    rewritten = subprocess.run(["cpu/rewrite"], cwd=ROOT, input=preprocessed, capture_output=True, check=True).stdout
    (tmp_path / "program.cpp").write_bytes(rewritten)
    (tmp_path / "unused.cpp").write_text("""#include "collective.h"
#include <stdlib.h>
void run_collectives(const std::vector<NcclCall>&) { abort(); }
""")
    sources = [tmp_path / "program.cpp", tmp_path / "unused.cpp"]
    objects = [f"build/cpu-fp32/cpu/{name}.o" for name in ("fast", "gemm", "device")]
    made = subprocess.run([*compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-Icpu", *sources, *objects, "-ldnnl",
                           "-o", tmp_path / "program"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    done = run(tmp_path / "program")
    assert done.returncode == 0 and done.stdout == alone.stdout, done.stdout + done.stderr


# ---- what does not build

def compile_text(tmp_path, text, flags=()):
    source = tmp_path / "program.cu"
    source.write_text(text)
    preprocessed = subprocess.run(["g++", "-E", "-fopenmp", "-std=c++17", f"-I{ROOT}/cpu", *flags, "-x", "c++",
                                   str(source)], capture_output=True)
    assert preprocessed.returncode == 0, preprocessed.stderr
    rewritten = subprocess.run([f"{ROOT}/cpu/rewrite"], input=preprocessed.stdout, capture_output=True)
    if rewritten.returncode != 0:
        return rewritten.returncode, rewritten.stderr.decode()
    compiled = subprocess.run(["g++", "-fopenmp", "-std=c++17", "-fpreprocessed", "-x", "c++", "-c", "-o", "/dev/null",
                               "-"], input=rewritten.stdout, capture_output=True)
    return compiled.returncode, compiled.stderr.decode()


PROGRAM = """#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <nccl.h>
#include <tensor_core.h>
__global__ void kernel(float* y) {{ {device} }}
int main() {{
    float* y = nullptr; cudaStream_t stream = nullptr;
    {host}
    kernel<<<1, 32, 0, stream>>>(y);
}}
"""


@pytest.mark.parametrize("flags", [(), ("-DCUDA_STRICT",)], ids=["fast", "strict"])
def test_program_builds(tmp_path, flags):
    code, errors = compile_text(tmp_path, PROGRAM.format(device="y[threadIdx.x] = 0;", host="cudaFree(y);"), flags)
    assert code == 0, errors


@pytest.mark.parametrize("flags", [(), ("-DCUDA_STRICT",)], ids=["fast", "strict"])
@pytest.mark.parametrize("device, host, name", [
    ("__shared__ float s[32]; y[0] = s[0];", "", "__shared__"),
    ("atomicAdd(y, 1.f);", "", "atomicAdd"),
    ("y[0] = __shfl_down_sync(0xffffffff, y[0], 1);", "", "__shfl_down_sync"),
    ("y[0] = __ldg(y);", "", "__ldg"),
    ("", "cudaMallocManaged(&y, 4);", "cudaMallocManaged"),
    ("", "cudaMallocAsync(&y, 4, stream);", "cudaMallocAsync"),
    ("", "cudaStreamQuery(stream);", "cudaStreamQuery"),
    ("", "cudaStreamCreate(&stream);", "cudaStreamCreate"),
    ("", "cudaMemcpy2D(y, 4, y, 4, 4, 1, cudaMemcpyDeviceToDevice);", "cudaMemcpy2D"),
    ("", "cublasHandle_t h; cublasSgemm(h, CUBLAS_OP_N);", "cublasSgemm"),
    ("", "cudaDataType_t t = CUDA_R_16F;", "CUDA_R_16F"),
    ("", "ncclReduce(y, y, 1, ncclFloat, ncclSum, 0, nullptr, stream);", "ncclReduce"),
    ("", "ncclDataType_t t = ncclFloat16;", "ncclFloat16"),
    ("", "ncclRedOp_t op = ncclAvg;", "ncclAvg"),
])
def test_unimplemented_is_an_error(tmp_path, device, host, name, flags):
    code, errors = compile_text(tmp_path, PROGRAM.format(device=device, host=host), flags)
    assert code != 0 and name in errors, errors


# What only the strict build has: {name: what a kernel does, what the host does}
ONLY_STRICT = {
    "__syncthreads": ("__syncthreads();", ""),
    "shared_memory": ("y[0] = shared_memory()[0];", ""),
    "mma": ("float c[4] = {}; unsigned a[4] = {}; mma(c, a, 0, 0);", ""),
    "ldmatrix": ("unsigned r[4]; ldmatrix(r, y);", ""),
    "ldmatrix_transposed": ("unsigned r[4]; ldmatrix_transposed(r, y);", ""),
    "copy_async": ("copy_async(y, y, true);", ""),
    "copy_commit": ("copy_commit();", ""),
    "copy_wait": ("copy_wait<1>();", ""),
    "cudaFuncSetAttribute": ("", "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 8);"),
}


@pytest.mark.parametrize("name", ONLY_STRICT)
def test_outside_the_strict_build(tmp_path, name):
    device, host = ONLY_STRICT[name]
    code, errors = compile_text(tmp_path, PROGRAM.format(device=device, host=host))
    assert code != 0 and re.search(rf"program.cu:\d+:\d+: error: call to .*{name}.*: this is outside the strict build",
                                   errors), errors
    code, errors = compile_text(tmp_path, PROGRAM.format(device=device, host=host), ("-DCUDA_STRICT",))
    assert code == 0, errors


def test_kernels_for_tensor_cores_are_left_out(tmp_path):
    """Behind `if constexpr (TENSOR_CORES)`: in the fast build there is no trace of them, in the strict one there is."""
    text = """#include <cuda_runtime.h>
#include <tensor_core.h>
template <int D> __global__ void with_barrier(float* y) { __syncthreads(); y[threadIdx.x] = shared_memory()[D]; }
int main() {
    if constexpr (TENSOR_CORES) {
        cudaFuncSetAttribute(with_barrier<64>, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 16);
        with_barrier<64><<<1, 32, 1 << 16>>>(nullptr);
    }
}
"""
    for flags in ((), ("-DCUDA_STRICT",)):
        code, errors = compile_text(tmp_path, text, flags)
        assert code == 0 and errors == "", errors


def test_error_names_line(tmp_path):
    text = """#include <cuda_runtime.h>
__global__ void k(int) {}
int main() {
    k<<<1,
        32>>>(1);
    undefined_name;
}
"""
    code, errors = compile_text(tmp_path, text)
    assert code != 0 and "program.cu:6:" in errors, errors


def test_unreadable_launch_is_an_error(tmp_path):
    text = "#include <cuda_runtime.h>\n__global__ void k(int) {}\nint main() { (k)<<<1, 32>>>(1); }\n"
    code, errors = compile_text(tmp_path, text)
    assert code != 0 and "cannot read this launch" in errors, errors


# ---- profile

def test_profile():
    done = run(build("profile"))
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    profile = json.loads(done.stderr)
    assert profile["kernels"]["fill"]["calls"] == 3 and profile["kernels"]["scale<float>"]["calls"] == 1
    gemms = {(g["m"], g["n"], g["k"], g["batch"]): g for g in profile["gemms"]}
    assert {key: g["calls"] for key, g in gemms.items()} == {(64, 32, 16, 1): 4, (8, 8, 8, 3): 2}
    assert abs(gemms[64, 32, 16, 1]["gflop"] - 4 * 2 * 64 * 32 * 16 / 1e9) < 1e-9
    assert profile["gemm_ms_in_step"] > 0 and profile["gemm_ms_alone"] > 0 and profile["memcpy_memset_ms"] > 0
    parts = sum(k["ms"] for k in profile["kernels"].values()) + profile["gemm_ms_in_step"] + profile["memcpy_memset_ms"]
    assert 0 < parts <= profile["wall_ms"]


def test_no_profile_unless_asked(tmp_path):
    done = subprocess.run([build("profile"), "without"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
