"""Tests of checkpoint.h and safetensors.h. Builds tests/test_checkpoint.cpp with the address and undefined-behaviour
sanitizers, runs its groups, and reads and writes the files' formats with code of its own, so that reader and writer
can't share a mistake."""
import json
import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ["config", "configs", "tensors", "safetensors", "weights", "layouts", "roundtrip", "damage", "kill", "sync",
          "full", "prune", "ranks"]


@pytest.fixture(scope="module")
def program():
    """The test program, built once; again only when a source is newer."""
    out = ROOT / "build" / "tests" / "test_checkpoint"
    headers = [ROOT / "lib" / name for name in ("checkpoint.h", "files.h", "safetensors.h")]
    source = ROOT / "tests" / "test_checkpoint.cpp"
    sources = [source, *headers, Path(__file__)]
    if not out.exists() or any(s.stat().st_mtime >= out.stat().st_mtime for s in sources):
        out.parent.mkdir(parents=True, exist_ok=True)
        built = out.with_name(f"{out.name}.{os.getpid()}")
        subprocess.run(["g++", "-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-Werror",
                        "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f'-DCONFIGS="{ROOT}/configs"',
                        str(source), "-o", str(built), "-lz"], check=True)
        built.rename(out)
    return out


@pytest.fixture
def folder():
    """A folder in memory where there is one: the tests sync thousands of files."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="test_checkpoint-", dir=base))
    yield path
    shutil.rmtree(path)


def run(program, *args):
    return subprocess.run([str(program), *map(str, args)], capture_output=True, text=True)


def test_every_group_is_run(program):
    assert run(program, "list").stdout.split() == GROUPS


@pytest.mark.parametrize("group", GROUPS)
def test_group(program, folder, group):
    result = run(program, group, folder / "work")
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout


def read_safetensors(path):
    """{name: (dtype, shape, bytes)} and the metadata, from the format's definition."""
    raw = path.read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0, "the data is aligned"
    header = json.loads(raw[8:8 + length])
    metadata = header.pop("__metadata__", {})
    data, end, tensors = raw[8 + length:], 0, {}
    for name, t in header.items():
        begin, stop = t["data_offsets"]
        assert begin == end, "no holes"
        tensors[name] = t["dtype"], t["shape"], data[begin:stop]
        end = stop
    assert end == len(data)
    return tensors, metadata


# The model and the values of test_checkpoint.cpp's little() and value().
C, V, E, F = 4, 5, 2, 3
STATES = {"": 0, "m.": 1, "v.": 2, "master.": 3}


def expected_tensors():
    layer = "model.layers.0."
    names = [("model.embed_tokens", [V, C]), (layer + "input_layernorm", [C])]
    names += [(f"{layer}self_attn.{p}_proj", [C, C]) for p in "qkv"]
    names += [(layer + "self_attn.q_norm", [C]), (layer + "self_attn.k_norm", [C])]
    names += [(layer + "self_attn.o_proj", [C, C])]
    names += [(layer + "post_attention_layernorm", [C]), (layer + "mlp.gate", [E, C])]
    names += [(f"{layer}mlp.experts.{e}.{p}_proj", [F, C]) for e in range(E) for p in ("gate", "up")]
    names += [(f"{layer}mlp.experts.{e}.down_proj", [C, F]) for e in range(E)]
    return [(name + ".weight", shape) for name, shape in names + [("model.norm", [C]), ("lm_head", [V, C])]]


def value(state, i, generation=1):
    return ((i * 2654435761 + state * 40503 + generation * 97 & 0xffffffff) >> 8) / 2**24 - 0.5


def expected_bytes(state, dtype, offset, count):
    floats = b"".join(struct.pack("<f", value(state, i)) for i in range(offset, offset + count))
    return floats if dtype == "F32" else b"".join(floats[i + 2:i + 4] for i in range(0, len(floats), 4))


def product(shape):
    n = 1
    for s in shape:
        n *= s
    return n


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("shard", [5000000000, 150])
def test_format(program, folder, bf16, shard):
    assert run(program, "save", folder, bf16, 20, shard).returncode == 0
    step, dtype = folder / "step-00000020", "BF16" if bf16 else "F32"
    assert [p.name for p in folder.iterdir()] == ["step-00000020"]
    weights = {}
    index = json.loads((step / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in step.glob("model*.safetensors"))
    if shard > 1000:
        assert shards == ["model.safetensors"]
    else:
        assert len(shards) > 2
        assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name in shards:
        tensors, metadata = read_safetensors(step / name)
        assert metadata == {"format": "pt"}
        assert len(tensors) == 1 or sum(len(t[2]) for t in tensors.values()) <= shard
        assert all(index["weight_map"][t] == name for t in tensors)
        weights.update(tensors)
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(len(t[2]) for t in weights.values())
    optimizer, _ = read_safetensors(step / "optimizer.safetensors")
    wanted = 0
    for prefix, state in STATES.items():
        if prefix == "master." and not bf16:
            continue
        offset = 0
        for name, shape in expected_tensors():
            got = (optimizer if prefix else weights)[prefix + name]
            kind = "F32" if prefix else dtype
            assert got == (kind, shape, expected_bytes(state, kind, offset, product(shape))), prefix + name
            offset += product(shape)
            wanted += 1
    assert wanted == len(weights) + len(optimizer)

    text = (step / "trainer_state.json").read_text()
    state = json.loads(text)
    assert state["step"] == 20 and state["trainer"] == {"g": 1, "seen": 1234567890123456789, "loss": 0.1}
    assert set(state["files"]) == {p.name for p in step.iterdir()} - {"trainer_state.json"}
    for name, entry in state["files"].items():
        data = (step / name).read_bytes()
        assert entry == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    body, crc = text.rsplit(',\n  "crc32": ', 1)
    assert crc == f'"{zlib.crc32((body + chr(10) + "}" + chr(10)).encode()):08x}"\n}}\n'
    assert json.loads((step / "generation_config.json").read_text()) == {"_from_model_config": True, "eos_token_id": 4}
    assert json.loads((step / "config.json").read_text())["torch_dtype"] == ("bfloat16" if bf16 else "float32")


@pytest.mark.parametrize("shards", [1, 3])
def test_loads_what_others_write(program, folder, shards):
    """F32, BF16 and F16 in one model, a header of any length (so data at any alignment), tensors in another order."""
    pack = {"F32": lambda x: struct.pack("<f", x), "F16": lambda x: struct.pack("<e", x),
            "BF16": lambda x: struct.pack("<f", x)[2:]}
    offset, flat, model = 0, b"", []
    for n, (name, shape) in enumerate(expected_tensors()):
        dtype = ["F16", "BF16", "F32"][n % 3]
        numbers = [(i % 255 - 127) / 64 for i in range(offset, offset + product(shape))]     # exact in all three
        flat += struct.pack(f"<{len(numbers)}f", *numbers)
        model.append((name, dtype, shape, b"".join(map(pack[dtype], numbers))))
        offset += product(shape)
    model = model[::-1]
    weight_map = {}
    for s in range(shards):
        header, data = {"__metadata__": {"format": "pt", "note": "x" * s}}, b""
        for name, dtype, shape, raw in model[s::shards]:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
            weight_map[name] = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * ((4 - len(text)) % 8 + 1)
        assert len(text) % 8 == 5
        path = folder / ("model.safetensors" if shards == 1 else f"model-{s + 1:05}-of-{shards:05}.safetensors")
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "olmoe", "hidden_size": C, "intermediate_size": F, "num_attention_heads": 2, "num_experts": E,
        "num_experts_per_tok": 1, "num_hidden_layers": 1, "vocab_size": V}))
    result = run(program, "load", folder, folder / "flat")
    assert result.returncode == 0, result.stderr
    assert (folder / "flat").read_bytes() == flat


def test_every_half_and_bfloat(program, folder):
    assert run(program, "half", folder / "half").returncode == 0
    got = (folder / "half").read_bytes()
    for i in range(65536):
        x, = struct.unpack("<e", struct.pack("<H", i))
        bits, = struct.unpack_from("<I", got, 4 * i)
        if x != x:
            assert bits == (i & 0x8000) << 16 | 0x7f800000 | (i & 0x3ff) << 13      # a NaN keeps its sign and fraction
        else:
            assert got[4 * i:4 * i + 4] == struct.pack("<f", x), hex(i)
        assert struct.unpack_from("<I", got, 4 * (65536 + i))[0] == i << 16


SHAPES = {
    "tiny": dict(num_hidden_layers=4, hidden_size=128, num_attention_heads=4, num_experts=16, num_experts_per_tok=2,
                 intermediate_size=128, vocab_size=320, max_position_embeddings=256, eos_token_id=256,
                 pad_token_id=None, torch_dtype="float32"),
    "small": dict(num_hidden_layers=8, hidden_size=512, num_attention_heads=8, num_experts=32, num_experts_per_tok=4,
                  intermediate_size=256, vocab_size=320, max_position_embeddings=512, eos_token_id=256,
                  pad_token_id=None, torch_dtype="float32"),
    "olmoe-1b-7b": dict(num_hidden_layers=16, hidden_size=2048, num_attention_heads=16, num_experts=64,
                        num_experts_per_tok=8, intermediate_size=1024, vocab_size=50304, max_position_embeddings=4096,
                        eos_token_id=50279, pad_token_id=1, torch_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    config = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    wanted = dict(SHAPES[name], architectures=["OlmoeForCausalLM"], attention_bias=False, attention_dropout=0.0,
                  clip_qkv=None, hidden_act="silu", initializer_range=0.02, model_type="olmoe", norm_topk_prob=False,
                  num_key_value_heads=SHAPES[name]["num_attention_heads"], rms_norm_eps=1e-05, rope_theta=10000.0,
                  tie_word_embeddings=False)
    assert {key: config[key] for key in wanted} == wanted
