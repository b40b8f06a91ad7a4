"""Training on from a model's directory, and what --master-weights and --moments promise of whole runs: which bits they
keep, and that resuming works between them.

The programs are ./olmoe, or what OLMOE names, and OLMOE_BF16 where it is set. What needs a BF16 build is a test where
there is one.
"""
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {os.path.abspath(path): None
            for path in (os.environ.get("OLMOE", ROOT / "olmoe"), os.environ.get("OLMOE_BF16")) if path}
SHAPE = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "num_experts": 5, "num_experts_per_tok": 2, "vocab_size": 320,
         "max_position_embeddings": 32, "eos_token_id": 256, "pad_token_id": 1}
SCHEMES = [("fp32", "fp32"), ("fp32", "bf16"), ("remainder", "fp32"), ("remainder", "bf16"), ("none", "fp32"),
           ("none", "bf16")]


def run(program, *args):
    return subprocess.run([program, *map(str, args)], capture_output=True, text=True, timeout=300)


def is_bf16(program):
    info = run(program, "info", "--config", ROOT / "configs/tiny.json").stdout
    return "BF16" in info.split("training")[1].split(",")[0]


def folder(program):
    return Path(program).parent.name


BF16, FP32 = ([program for program in PROGRAMS if is_bf16(program) == wanted] for wanted in (True, False))


def of_builds(programs):
    """Decorates a test that some builds can't pass."""
    if not programs:
        return lambda test: None
    return pytest.mark.parametrize("program", programs, ids=folder, indirect=True, scope="module")


@pytest.fixture(scope="module", params=PROGRAMS, ids=folder)
def program(request):
    return request.param


@pytest.fixture(scope="module")
def bf16(program):
    return program in BF16


@pytest.fixture(scope="module")
def schemes(bf16):
    return [s for s in SCHEMES if bf16 or s[0] == "fp32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's directory and tokens to train it on: a text that repeats."""
    d = tmp_path_factory.mktemp("base")
    (d / "shape.json").write_text(json.dumps(SHAPE))
    script = ROOT / "scripts/make_random_model.py"
    subprocess.run([sys.executable, script, "--out", d / "model", "--config", d / "shape.json"], check=True)
    ids = [(i * i // 3 + i) % 50 + 60 for i in range(40)] * 60
    (d / "ids.npy").write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    return d


def train(program, base, out, scheme, steps, *more, code=0):
    result = run(program, "train", "--model", base / "model", "--data", base / "ids.npy", "--out", out, "--batch", 4,
                 "--steps", steps, "--decay-steps", 40, "--warmup", 2, "--lr", "2e-3", "--peak-tflops", 1,
                 "--master-weights", scheme[0], "--moments", scheme[1], *more)
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def digest(directory, name):
    return hashlib.sha256((directory / name).read_bytes()).hexdigest()


def steps_of(out):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "step" in line]


def losses(out):
    return [line["loss"] for line in steps_of(out)]


def tensors(path):
    raw = path.read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    found = {}
    for name, t in json.loads(raw[8:8 + length]).items():
        if name != "__metadata__":
            begin, end = t["data_offsets"]
            found[name] = raw[8 + length + begin:8 + length + end]
    return found


@pytest.fixture(scope="module")
def straight(program, base, schemes, tmp_path_factory):
    """Scheme -> 40 steps with it."""
    d = tmp_path_factory.mktemp("straight")
    for scheme in schemes:
        train(program, base, d / "-".join(scheme), scheme, 40, "--save-every", 20)
    return lambda scheme: d / "-".join(scheme)


@of_builds(BF16)
def test_remainders_are_fp32_masters(program, straight):
    """Of a whole run, byte by byte: weights, moments, masters, losses."""
    for moments in ("fp32", "bf16"):
        a, b = straight(("fp32", moments)), straight(("remainder", moments))
        for step in ("step-00000020", "step-00000040"):
            for name in ("model.safetensors", "optimizer.safetensors"):
                assert digest(a / step, name) == digest(b / step, name), (moments, step, name)
        assert losses(a) == losses(b)


SMALL = ("--warmup", 0, "--lr", "2e-4", "--min-lr", "2e-4")     # given twice, an option's last value counts


def deviation(out, wide):
    """Standard deviation of a scheme's last loss around that of fp32 throughout, to first order in the roundings: the
    sum over all weights of gradient squared times the variance of the weight, and the noise of forward. From the fp32
    run: the gradient is distributed as its m, and as large as its last norm. With these betas |mhat| / sqrt(vhat) is at
    most 1.165 (Cauchy-Schwarz), so that an update is at most 1.165 lr."""
    lr, steps, tokens, layers = 2e-4, 40, 4 * 32, SHAPE["num_hidden_layers"]
    step = out / "step-00000040"
    weights, state = tensors(step / "model.safetensors"), tensors(step / "optimizer.safetensors")
    total = square = 0
    for name in weights:
        values = weights[name] if wide else state["master." + name]
        for m, w in zip(array("f", state["m." + name]), array("f", values)):
            ulp = 0 if wide or w == 0 else math.ldexp(1, math.frexp(w)[1] - 8)
            # a weight rounded at random has a variance of f (1 - f) ulp^2 a step, f = |update| / ulp; the rounding of
            # fp32 masters ulp^2 / 12; a moment in bf16 is off by 2^-8 a rounding, which lasts 1 / (1 - beta1) = 10
            # steps, in the root of v 1 / 2 (1 - beta2) = 10
            by_moments = (lr * 2**-8) ** 2 * steps * (10**2 + 10**2)
            total += m * m * (steps * min(1.165 * lr * ulp, ulp * ulp / 4) + ulp * ulp / 12 + by_moments)
            square += m * m
    norm = steps_of(out)[-1]["grad_norm"]
    # forward rounds a token's stream some 24 times a layer, and 8 times around them, and logits are of the order of 1
    return math.sqrt(norm**2 * total / square + (24 * layers + 8) * (2**-24 if wide else 2**-8) ** 2 / tokens)


def test_all_of_them_learn(program, bf16, base, schemes, tmp_path):
    """With updates below half of the last bit of bf16, which rounding to nearest would drop, each comes as far as fp32,
    and no further."""
    final = {}
    for scheme in schemes:
        out = tmp_path / "-".join(scheme)
        train(program, base, out, scheme, 40, *SMALL)
        first, *_, final[scheme] = losses(out)
    best = final["fp32", "fp32"]
    bound = 5 * deviation(tmp_path / "fp32-fp32", not bf16)
    assert bound < 0.05 * (first - best)                        # otherwise the test would show nothing
    for scheme, loss in final.items():
        assert abs(loss - best) <= bound, (scheme, first, loss, best, bound)


def test_what_is_saved(schemes, straight):
    """The optimizer's file is F32 whatever the memory's format, and has masters where there are some, whose rounding
    the weights are."""
    for scheme in schemes:
        step = straight(scheme) / "step-00000040"
        weights, state = tensors(step / "model.safetensors"), tensors(step / "optimizer.safetensors")
        masters = [name for name in state if name.startswith("master.")]
        wide = len(next(iter(weights.values()))) == len(state["m." + next(iter(weights))])
        assert len(masters) == (0 if wide or scheme[0] == "none" else len(weights)), scheme
        for name, raw in weights.items():
            if masters:
                words = struct.unpack(f"<{len(raw) // 2}I", state["master." + name])
                assert raw == struct.pack(f"<{len(words)}H", *((word + 0x8000) >> 16 for word in words)), name
            moments = struct.unpack(f"<{len(state['v.' + name]) // 4}I", state["v." + name])
            only_bf16 = all(word & 0xffff == 0 for word in moments)
            assert only_bf16 == (scheme[1] == "bf16" or not any(moments)), (scheme, name)


def test_resuming_is_exact(program, base, schemes, straight, tmp_path):
    for scheme in schemes:
        out = tmp_path / "-".join(scheme)
        train(program, base, out, scheme, 20)
        said = train(program, base, out, scheme, 40, "--resume")
        assert "until step" not in said
        wanted = straight(scheme) / "step-00000040"
        for name in os.listdir(wanted):
            assert digest(out / "step-00000040", name) == digest(wanted, name), (scheme, name)


@of_builds(BF16)
def test_resuming_with_another_scheme(program, base, straight, tmp_path):
    """Between fp32 and remainders it changes nothing; from no masters to some, the weights become masters; the table
    shows what was before."""
    pairs = [("fp32", "remainder"), ("remainder", "fp32"), ("none", "remainder"), ("none", "fp32"),
             ("remainder", "none")]
    wanted = digest(straight(("fp32", "fp32")) / "step-00000040", "model.safetensors")
    for n, (a, b) in enumerate(pairs):
        out = tmp_path / str(n)
        train(program, base, out, (a, "fp32"), 20)
        said = train(program, base, out, (b, "fp32"), 40, "--resume")
        assert "adamw until step 20" in said and f'"master_weights":"{a}"' in said
        state = tensors(out / "step-00000040" / "optimizer.safetensors")
        assert any(name.startswith("master.") for name in state) == (b != "none")
        same = digest(out / "step-00000040", "model.safetensors") == wanted
        assert same == ("none" not in (a, b))
        assert losses(out)[-1] < losses(out)[0] - 1


def test_moments_of_another_format(program, base, straight, tmp_path):
    """fp32 moments are rounded when they come into bf16, and the other way round they are exact."""
    for n, (a, b) in enumerate([("fp32", "bf16"), ("bf16", "fp32")]):
        out = tmp_path / str(n)
        train(program, base, out, ("fp32", a), 20)
        train(program, base, out, ("fp32", b), 40, "--resume")
        assert losses(out)[-1] < losses(out)[0] - 1


def test_the_table_and_the_plan(program, base, bf16, tmp_path):
    said = train(program, base, tmp_path, ("fp32", "bf16"), 1)
    masters = "master weights in fp32, " if bf16 else ""
    assert re.search(r"\| AdamW's state +\| " + masters + "moments in bf16 ", said)
    info = ["info", "--config", ROOT / "configs/olmoe-1b-7b.json", "--batch", 1, "--recompute", 2]
    plan = run(program, *info).stdout
    fits = {tuple(m[1].split(", ")): m[0] for m in re.findall(r"\| (yes|no) +\| (\w+, \w+): [\d.]+ GB", plan)}
    if bf16:                                # 6.92 B parameters of 16, 14, 12, 10 and 8 bytes on a GPU of 80 GB
        best = [("remainder", "bf16"), ("none", "bf16")]
        assert fits == {scheme: "yes" if scheme in best else "no" for scheme in SCHEMES}
        sums = dict(re.findall(r"\| (?:yes|no) +\| (\w+, \w+): ([\d.]+) GB", plan))
        per_parameter = {"fp32, fp32": 16, "fp32, bf16": 12, "remainder, fp32": 14, "remainder, bf16": 10,
                         "none, fp32": 12, "none, bf16": 8}
        rest = {scheme: float(sums[scheme]) - 6.919161856 * bytes for scheme, bytes in per_parameter.items()}
        # activations, the same for all
        assert max(rest.values()) - min(rest.values()) < 0.2 and 0 < min(rest.values()) < 4, rest
        chosen = run(program, *info, "--master-weights", "remainder", "--moments", "bf16").stdout
        assert re.search(r"memory: sum +\| " + re.escape(sums["remainder, bf16"]), chosen)
    else:
        assert set(fits) == {("fp32", "fp32"), ("fp32", "bf16")}


@of_builds(FP32)
def test_what_an_fp32_build_cannot(program, base, tmp_path):
    for masters in ("remainder", "none"):
        said = train(program, base, tmp_path / "out", (masters, "fp32"), 1, code=1)
        assert re.fullmatch(f"olmoe: --master-weights {masters} needs a BF16 build .*\n", said)
        assert not (tmp_path / "out").exists()
        assert run(program, "info", "--config", ROOT / "configs/tiny.json", "--master-weights", masters).returncode == 1


def test_bad_choices(program, base, tmp_path):
    assert "--master-weights" in train(program, base, tmp_path, ("fp16", "fp32"), 1, code=1)
    assert "--moments" in train(program, base, tmp_path, ("fp32", "int8"), 1, code=1)
