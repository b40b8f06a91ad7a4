"""The released model: its layout, loading, the published logits, the download. Its weights are in no test: random ones
of the same layout are (scripts/make_random_model.py), here of small shapes; `make test-full-size` takes the full size.

The program is ./olmoe, or what the variable OLMOE names.
"""
import hashlib
import http.server
import json
import os
import pty
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
PUBLISHED = ROOT / "tests" / "fixtures" / "olmoe-1b-7b-0924.safetensors"


def run(*args, **kwargs):
    return subprocess.run([OLMOE, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


def ok(*args):
    result = run(*args)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout


def read(path):
    """{name: (dtype, shape, bytes)} and the metadata of a safetensors file."""
    raw = Path(path).read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        tensors[name] = t["dtype"], t["shape"], raw[8 + length + begin:8 + length + end]
    return tensors, metadata


def write(path, tensors, metadata=None):
    header, end = {"__metadata__": metadata or {}}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(raw for _, _, raw in tensors.values()))


def widened(raw):
    """F32 bytes of BF16 bytes."""
    return b"".join(b"\0\0" + raw[i:i + 2] for i in range(0, len(raw), 2))


SHAPE = dict(num_hidden_layers=2, hidden_size=48, num_attention_heads=3, num_key_value_heads=3, num_experts=6,
             num_experts_per_tok=2, intermediate_size=20, vocab_size=400, max_position_embeddings=64, eos_token_id=399,
             pad_token_id=1)


def make_random_model(out, shape, *options):
    script = ROOT / "scripts" / "make_random_model.py"
    subprocess.run([sys.executable, script, "--out", out, "--config", shape, *options], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model in three shards."""
    d = tmp_path_factory.mktemp("model")
    (d / "shape.json").write_text(json.dumps(SHAPE))
    make_random_model(d / "model", d / "shape.json", "--shard-bytes", "80000")
    return d / "model"


# ------------------------------------------------------------------------------------------------
# Layout and loading

def test_random_model(model):
    """The published layout: names, shapes, shards in the order of the layers, none above the limit; numbers that spread
    as they should."""
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "generation_config.json", *shards,
                                                       "model.safetensors.index.json"]
    config = json.loads((model / "config.json").read_text())
    assert {key: config[key] for key in SHAPE} == SHAPE and config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == 10000.0 and "rms_norm_eps" not in config
    index = json.loads((model / "model.safetensors.index.json").read_text())
    found = {}
    for shard in shards:
        tensors, metadata = read(model / shard)
        assert metadata == {"format": "pt"} and list(tensors) == sorted(tensors)
        assert sum(len(raw) for _, _, raw in tensors.values()) <= 80000
        assert all(index["weight_map"][name] == shard for name in tensors)
        found.update(tensors)
    assert set(found) == set(index["weight_map"]) and len(found) == 3 + 2 * (9 + 6 * 3)
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in found.values())
    for name, (dtype, shape, raw) in found.items():
        x = struct.unpack(f"<{len(raw) // 2}f", widened(raw))
        mean = sum(x) / len(x)
        deviation = (sum((v - mean) ** 2 for v in x) / len(x)) ** 0.5
        if "norm" in name:
            wanted = 0.2
        elif "embed" in name:
            wanted = 1
        else:
            wanted = (2 if name.endswith("mlp.gate.weight") else 1) / shape[-1] ** 0.5
        assert dtype == "BF16" and abs(deviation / wanted - 1) < 5 / len(x) ** 0.5, name
        assert abs(mean - ("norm" in name)) < 5 * wanted / len(x) ** 0.5, name


def test_info(model):
    assert "57 tensors, all there" in ok("info", "--model", model)


def test_same_logits_however_stored(model, tmp_path):
    """Shards and one file, BF16 and F32, at any alignment, are the same model: what is copied as it is, and what is
    converted."""
    tensors = {}
    for shard in model.glob("*.safetensors"):
        tensors.update(read(shard)[0])
    wide = {name: ("F32", shape, widened(raw)) for name, (_, shape, raw) in tensors.items()}
    inputs = ("I32", [2, 5], struct.pack("<10i", *range(7, 17)))
    write(tmp_path / "reference.safetensors", {"inputs": inputs, "logits": ("F32", [2, 5, 400], bytes(4 * 10 * 400))})
    tables = [run("verify", "--model", model, "--reference", tmp_path / "reference.safetensors").stdout]
    for stored in (tensors, wide):
        for pad in range(3):
            d = tmp_path / f"model-{len(tables)}"
            d.mkdir()
            (d / "config.json").write_bytes((model / "config.json").read_bytes())
            write(d / "model.safetensors", stored, {"note": "x" * pad})
            tables.append(run("verify", "--model", d, "--reference", tmp_path / "reference.safetensors").stdout)
    assert "they DIFFER" in tables[0] and len(set(tables)) == 1, tables


def test_training_starts_from_it(model, tmp_path):
    """AdamW's master weights are read from the same file as the weights: a step with a learning rate of 0 changes
    neither."""
    (tmp_path / "ids.npy").write_bytes(struct.pack("<256H", *range(100, 356)))
    ok("train", "--model", model, "--data", tmp_path / "ids.npy", "--out", tmp_path / "out", "--seq", 16, "--batch", 2,
       "--steps", 1, "--lr", 0, "--peak-tflops", 1)
    saved = read(tmp_path / "out" / "step-00000001" / "model.safetensors")[0]
    states = read(tmp_path / "out" / "step-00000001" / "optimizer.safetensors")[0]
    for shard in model.glob("*.safetensors"):
        for name, (_, shape, raw) in read(shard)[0].items():
            wide = widened(raw)
            assert saved[name] in (("BF16", shape, raw), ("F32", shape, wide)), name
            assert states.get("master." + name, ("F32", shape, wide)) == ("F32", shape, wide), name


def test_progress_on_a_terminal(model, tmp_path):
    """Standard error reports the loading where it is a terminal, and nothing elsewhere (as all tests here see)."""
    tensors = {"inputs": ("I32", [1, 2], bytes(8)), "logits_mean": ("F32", [1, 2], bytes(8))}
    write(tmp_path / "reference.safetensors", tensors)
    end, terminal = pty.openpty()
    subprocess.run([OLMOE, "verify", "--model", model, "--reference", tmp_path / "reference.safetensors"],
                   stdout=subprocess.PIPE, stderr=terminal)
    shown = os.read(end, 1 << 16).decode()
    os.close(end)
    os.close(terminal)
    assert re.search(r"loading: 0.00 GB in \d+\.\d s, \d+\.\d\d GB/s\s*$", shown), shown


# ------------------------------------------------------------------------------------------------
# The published logits

# transformers' test of the released weights (the specification's acceptance vector)
INPUTS = (1, 306, 4658, 278, 6593, 310, 2834, 338)
MEAN = (-1.3814, -3.4450, -2.2990, -1.9542, -2.4387, -2.7941, -2.9312, -2.8309)
SLICE = (-2.3874, -2.4076, -2.4995, 4.2278, 1.4004, -0.0252, 0.4189, -2.7560, 0.3531, 1.6678, -0.7941, -1.1818,
         -0.2920, 0.7131, -1.4173, 1.6723, 0.5406, 0.1345, -0.1800, 0.2304, 1.2791, 0.7489, 0.6341, -0.0151,
         -1.3693, -1.2532, -2.3921, 0.7376, 1.6876, 0.5483)


def test_published_logits(tmp_path):
    tensors, metadata = read(PUBLISHED)
    assert tensors == {"inputs": ("I32", [1, 8], struct.pack("<8i", *INPUTS)),
                       "logits_mean": ("F32", [1, 8], struct.pack("<8f", *MEAN)),
                       "logits_slice": ("F32", [1, 1, 30], struct.pack("<30f", *SLICE))}
    assert (metadata["rtol"], metadata["atol"]) == ("1e-2", "1e-2")
    subprocess.run([sys.executable, ROOT / "scripts" / "acceptance.py", tmp_path / "again"], check=True,
                   stdout=subprocess.PIPE)
    assert (tmp_path / "again").read_bytes() == PUBLISHED.read_bytes()


def test_published_logits_are_not_those_of_another_model(tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps({**SHAPE, "vocab_size": 7000}))
    make_random_model(tmp_path / "model", tmp_path / "shape.json")
    result = run("verify", "--model", tmp_path / "model", "--reference", PUBLISHED)
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and result.stderr == ""
    assert [line.split()[0] for line in lines[1:3]] == ["logits_mean", "logits_slice"]
    assert all("FAILED" in line and "worst" in line for line in lines[1:3])
    assert lines[3].startswith("2 tensors compared, 2 in the reference") and lines[3].endswith("they DIFFER")


def test_limits_of_bf16(model, tmp_path):
    """bf16_rtol replaces rtol and atol, and PyTorch's own bf16 errors set the limits, in a BF16 build alone."""
    bf16 = "BF16" in ok("info", "--model", model).split("training")[1].split(",")[0]
    tensors = {"inputs": ("I32", [1, 4], struct.pack("<4i", 5, 6, 7, 8)),
               "logits": ("F32", [1, 4, 400], struct.pack("<1600f", *[1.0] * 1600)),
               "router.0.logits": ("F32", [1, 4, 6], struct.pack("<24f", *[1.0] * 24)),
               "router.0.experts": ("I32", [1, 4, 2], struct.pack("<8i", *[0, 1] * 4))}

    def limits(metadata, *options):
        write(tmp_path / "reference.safetensors", tensors, metadata)
        table = run("verify", "--model", model, "--reference", tmp_path / "reference.safetensors", *options).stdout
        found = {}
        for line in table.splitlines()[1:-1]:
            name, error, share = re.match(r"(.+?)\s+(\d\S+)\s+([\d.]+) %", line).groups()
            if float(error) > 0:
                found[name.split(" (")[0]] = float(error) / float(share) * 100
        return found

    near = pytest.approx
    assert limits({})["logits"] == near(3e-2 if bf16 else 1e-4, rel=0.01)
    found = limits({"rtol": "1e-2", "atol": "1e-2", "bf16_rtol": "5e-2"})
    assert found["logits"] == near(5e-2 if bf16 else 1, rel=0.01)
    peers = {"bf16_eager_logits": "0.02", "bf16_sdpa_logits": "0.04", "bf16_eager_router": "0.016",
             "bf16_sdpa_router": "0.008", "bf16_eager_experts": "0.2", "bf16_sdpa_experts": "0.1"}
    found = limits(peers)
    assert found["logits"] == near(0.05 if bf16 else 1e-4, rel=0.01)
    assert found["router.0.logits"] == near(0.02 if bf16 else 1e-4, rel=0.01)
    assert found.get("tokens with other experts, all layers") == (near(0.25, rel=0.01) if bf16 else None)
    assert limits(peers, "--rtol", 0.5)["logits"] == near(0.5, rel=0.01)


# ------------------------------------------------------------------------------------------------
# scripts/download.sh, from a server like the hub: pointers of large files, redirects, ranges

class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files, large = {}, set()        # name -> bytes; names that the repository holds as pointers
    cut, damage = 0, None           # a transfer is interrupted after so many bytes; a name of which a byte is wrong
    requests = []

    def do_GET(self):
        Hub.requests.append((self.path, self.headers.get("Range")))
        kind, _, name = self.path.removeprefix("/allenai/OLMoE-1B-7B-0924/").partition("/main/")
        if self.path.startswith("/cdn/"):
            kind, name = "cdn", self.path[5:]
        data = Hub.files.get(name)
        if data is None:
            return self.answer(404, b"no such file")
        if kind == "raw":
            pointer = ("version https://git-lfs.github.com/spec/v1\n"
                       f"oid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n")
            return self.answer(200, pointer.encode() if name in Hub.large else data)
        if kind == "resolve":
            return self.answer(302, b"", Location=f"http://{self.headers['Host']}/cdn/{name}")
        if name == Hub.damage:
            data = data[:100] + b"?" + data[101:]
        begin = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers.get("Range") else 0
        if begin >= len(data):
            return self.answer(416, b"")
        if begin:
            self.answer(206, data[begin:], **{"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"})
        else:
            self.answer(200, data)

    def answer(self, code, body, **headers):
        self.send_response(code)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if Hub.cut and code in (200, 206) and len(body) > Hub.cut:
            self.wfile.write(body[:Hub.cut])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(model):
    Hub.files = {p.name: p.read_bytes() for p in model.iterdir()}
    Hub.files.update({"tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}"})
    Hub.large = {name for name in Hub.files if name.endswith(".safetensors")}
    Hub.cut, Hub.damage, Hub.requests = 0, None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def download(hub, to, **environment):
    return subprocess.run([ROOT / "scripts" / "download.sh", to], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "HF_ENDPOINT": hub, **environment})


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_download(hub, tmp_path):
    result = download(hub, tmp_path / "there")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "there") == Hub.files
    assert result.stdout.count("SHA-256") == 3 and "is complete" in result.stdout and result.stderr == ""
    assert "57 tensors, all there" in ok("info", "--model", tmp_path / "there")
    Hub.requests.clear()
    assert download(hub, tmp_path / "there").returncode == 0                    # complete: checked, not fetched
    assert not [path for path, _ in Hub.requests if "/resolve/" in path or "/cdn/" in path]


def test_download_goes_on(hub, tmp_path):
    """A transfer that is interrupted goes on by itself, one that was killed with the next call: no byte twice."""
    Hub.cut = 40000
    assert download(hub, tmp_path / "a").returncode == 0
    assert contents(tmp_path / "a") == Hub.files
    Hub.cut, name = 0, "model-00001-of-00003.safetensors"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / (name + ".part")).write_bytes(Hub.files[name][:12345])
    Hub.requests.clear()
    assert download(hub, tmp_path / "b").returncode == 0
    assert contents(tmp_path / "b") == Hub.files
    assert [r for path, r in Hub.requests if path == "/cdn/" + name] == ["bytes=12345-"]


def test_download_of_nothing_more(hub, tmp_path):
    """Where nothing more comes it reports how much it has; the part stays."""
    name = "model-00003-of-00003.safetensors"
    real, Hub.cut = Hub.answer, 5000
    left = [3]                                  # transfers that are cut; then the server hangs up at once

    def answer(self, code, body, **headers):
        if self.path == "/cdn/" + name:
            left[0] -= 1
            if left[0] < 0:
                self.close_connection = True
                return
        real(self, code, body, **headers)
    Hub.answer = answer
    try:
        result = download(hub, tmp_path / "there")
    finally:
        Hub.answer = real
    assert result.returncode == 1 and "call this again to go on" in result.stderr.splitlines()[-1]
    assert (tmp_path / "there" / (name + ".part")).read_bytes() == Hub.files[name][:15000]
    assert not (tmp_path / "there" / name).exists()


def test_download_damaged(hub, tmp_path):
    name = "model-00002-of-00003.safetensors"
    Hub.damage = name
    result = download(hub, tmp_path / "there")
    assert result.returncode == 1 and f"{name}: damaged" in result.stderr and "SHA-256" in result.stderr
    assert not [p for p in (tmp_path / "there").iterdir() if p.name.startswith(name)]
    Hub.damage = None
    assert download(hub, tmp_path / "there").returncode == 0
    # damaged here, later
    (tmp_path / "there" / name).write_bytes(Hub.files[name][:-1] + bytes([Hub.files[name][-1] ^ 1]))
    assert download(hub, tmp_path / "there").returncode == 1
    assert download(hub, tmp_path / "there").returncode == 0
    assert contents(tmp_path / "there") == Hub.files


def test_download_refusals(hub, tmp_path):
    """No such repository, a disk too small, no server: one reason each, and no weights fetched."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "df").write_text("#!/bin/sh\necho Filesystem\necho disk 9 9 10 9 /\n")
    (fake / "df").chmod(0o755)
    result = download(hub, tmp_path / "full", PATH=f"{fake}:{os.environ['PATH']}")
    assert result.returncode == 1 and "are free" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "full").iterdir())
    del Hub.files["config.json"]
    result = download(hub, tmp_path / "none")
    assert result.returncode == 1 and "cannot fetch config.json" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "none").iterdir())
    result = download("http://127.0.0.1:9", tmp_path / "none")
    assert result.returncode == 1 and "network" in result.stderr.splitlines()[-1]
