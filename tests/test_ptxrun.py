"""The nvcc-built programs on an emulator of PTX: what g++ compiled for the CPU is checked here as compiled GPU code.

The variable PTXRUN names the folder of the emulator ptxrun, which puts its own CUDA libraries below a program and interprets its
PTX with checks of memory, barriers, races and synchronisation. Without it these tests are skipped. It is copied to
build/ptxrun and built there; the programs are those of `make ptx`.
"""
import array
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = os.environ.get("PTXRUN", "")
EMULATOR = ROOT / "build" / "ptxrun" / "ptxrun"

pytestmark = pytest.mark.skipif(not SOURCE or not Path(SOURCE).is_dir(), reason="needs the emulator ptxrun in the folder PTXRUN")


@pytest.fixture(scope="module", autouse=True)
def emulator():
    shutil.copytree(SOURCE, EMULATOR.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build"))
    subprocess.run(["chmod", "-R", "u+w", EMULATOR.parent], check=True)
    subprocess.run(["make", "-s", "-j2", "-C", EMULATOR.parent], check=True)


def run(program, *args, timeout=1500, **env):
    return subprocess.run([EMULATOR, ROOT / "build" / program, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**os.environ, **env})


# The finite differences' thousands of evaluations show nothing more in the other modes. The race detector's cells are words of
# 4 bytes, in which the odd-width matrices of neighbouring bf16 experts meet.
MODES = {"plain": {}, "race": {"PTXRUN_RACE": "2"}, "async": {"PTXRUN_ASYNC": "1"}, "seed": {"PTXRUN_SEED": "7"}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_and_model(precision, mode):
    without = ([] if mode == "plain" else ["--without", "gradient"]) + (["--without", "odd width"] if mode == "race" and precision == "bf16" else [])
    result = run(f"ptx-{precision}/test_olmoe", *without, **MODES[mode])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].endswith(" passed, 0 failed")


@pytest.mark.parametrize("mode", MODES)
def test_verify(mode):
    for fixture in ["regular", "odd"]:
        model = ROOT / "tests" / "fixtures" / fixture
        result = run("ptx-fp32/olmoe", "verify", "--model", model, "--reference", model / "reference.safetensors", **MODES[mode])
        assert result.returncode == 0 and result.stdout.endswith("they agree\n"), result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize("mode", ["race", "async"])
def test_train(tmp_path, mode):
    """Two steps of two micro-batches, with validation and a checkpoint: nothing reported, and the losses of the plain mode."""
    tokens(tmp_path / "data.npy", 320, 16 * 64)
    losses = {}
    for name in ["plain", mode]:
        result = run("ptx-bf16/olmoe", "train", "--config", "configs/tiny.json", "--data", tmp_path / "data.npy", "--val", tmp_path / "data.npy", "--val-batches", 1, "--out",
                     tmp_path / name, "--steps", 2, "--batch", 1, "--global-batch", 2, "--seq", 64, "--peak-tflops", 1, **MODES[name])
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        losses[name] = [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]]
    assert len(losses["plain"]) == 2 and losses["plain"] == losses[mode]


def tokens(path, vocabulary, count):
    random.seed(1)
    with open(path, "wb") as f:
        array.array("H", [random.randrange(vocabulary) for _ in range(count)]).tofile(f)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_coalescing(tmp_path, precision):
    """Kernels with 1 % or more of a step's modelled time use 90 % or more of the bytes in the memory sectors that they ask for."""
    config = json.loads((ROOT / "configs" / "tiny.json").read_text())
    config.update(hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, num_experts=16, num_experts_per_tok=8, intermediate_size=1024, num_hidden_layers=1,
                  vocab_size=8192, max_position_embeddings=256)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens(tmp_path / "data.npy", 8192, 256)
    profile = tmp_path / "profile.json"
    result = run(f"ptx-{precision}/olmoe", "train", "--config", tmp_path / "config.json", "--data", tmp_path / "data.npy", "--out", tmp_path / "out", "--steps", 1, "--batch", 1,
                 "--peak-tflops", 1, PTXRUN_PROFILE=str(profile))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(profile.read_text())
    kernels, seen = [k for k in report["kernels"] if k["name"] not in ("init_normal_kernel", "fill_kernel")], 0
    step_us = sum(k["model_us"] for k in kernels) + report["cublas_us"]
    for kernel in kernels:
        read, write = kernel["global"]["read"], kernel["global"]["write"]
        share = kernel["model_us"] / step_us
        used = (read["bytes_unique_per_request"] + write["bytes_unique_per_request"]) / (32 * (read["sectors"] + write["sectors"]))
        print(f"{kernel['name']:40} {100 * share:5.1f} % of the time, {100 * used:3.0f} % of the bytes used")
        if share >= 0.01:
            seen += 1
            assert used >= 0.9, (kernel["name"], share, used)
    assert seen > 0
