"""The command line, as a user meets it: training, stopping, resuming, and every input that is wrong.

The program is ./olmoe, or what the variable OLMOE names.
"""
import ctypes
import fcntl
import gzip
import hashlib
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
FIXTURES = ROOT / "tests" / "fixtures"

CONFIG = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 24, "intermediate_size": 20,
          "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "num_experts": 5,
          "num_experts_per_tok": 2, "vocab_size": 320, "max_position_embeddings": 48, "eos_token_id": 256,
          "pad_token_id": None, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
          "tie_word_embeddings": False, "norm_topk_prob": False}


def run(*args, **kwargs):
    return subprocess.run([OLMOE, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


def ok(*args, **kwargs):
    result = run(*args, **kwargs)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def refused(*args, words=(), **kwargs):
    """Exit code 1 and one line on standard error that contains these words."""
    result = run(*args, **kwargs)
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("olmoe: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a config, and training and validation tokens of a text with two kinds of documents."""
    d = tmp_path_factory.mktemp("data")
    (d / "config.json").write_text(json.dumps(CONFIG))
    with open(d / "text.jsonl", "w") as f:
        for i in range(60):
            f.write(json.dumps({"id": f"count-{i}", "text": " ".join(str(i + j) for j in range(30))}) + "\n")
            words = "the cat sat on the mat and the dog ran after it " * (1 + i % 3)
            f.write(json.dumps({"id": f"word-{i}", "text": words}) + "\n")
    ok("tokenize", "--tokenizer", "bytes", "--out", d / "train.npy", d / "text.jsonl")
    ok("tokenize", "--tokenizer", "bytes", "--out", d / "val.npy", d / "text.jsonl")
    return d


def train_args(data, out, *more):
    return ["train", "--config", data / "config.json", "--data", data / "train.npy", "--out", out, "--batch", 2,
            "--warmup", 2, "--lr", "1e-3", "--peak-tflops", 1, *more]


def files(directory):
    """Name -> digest. Where bytes differ, pytest would print the difference, which takes minutes."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).iterdir()}


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# What a step computes, without what depends on the clock
def steps(out):
    return [{k: v for k, v in line.items() if k not in ("ms", "tokens_per_s", "mfu")} for line in steps_with_times(out)]


def steps_with_times(out):
    return [line for line in log(out) if "step" in line]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """20 steps without a stop."""
    out = tmp_path_factory.mktemp("straight")
    ok(*train_args(data, out, "--steps", 20, "--skip-spikes", 3))
    return out


# ------------------------------------------------------------------------------------------------
# Training

def test_log(data, tmp_path):
    out = ok(*train_args(data, tmp_path, "--steps", 4, "--val", data / "val.npy", "--val-every", 2,
                         "--tokenizer", "bytes", "--sample-every", 2, "--sample-tokens", 20))
    assert "\x1b" not in out
    lines = log(tmp_path)
    assert list(lines[0]) == ["config", "command", "folder"] and lines[0]["config"]["num_experts"] == 5
    assert lines[0]["command"][1:3] == ["train", "--config"] and os.path.isdir(lines[0]["folder"])
    assert lines[0]["config"]["adamw"]["beta2"] == 0.95
    assert [line["step"] for line in lines[1:]] == [1, 2, 3, 4]
    for line in lines[1:]:
        assert {"step", "loss", "ce_loss", "lb_loss", "z_loss", "grad_norm", "lr", "max_over_mean", "dead", "ms",
                "tokens_per_s", "mfu"} <= set(line)
        assert ("val_loss" in line) == (line["step"] % 2 == 0) == ("balance" in line)
        # loss counts the cross entropy over all 48 positions, ce_loss is the mean over the 47 that have a target
        assert abs(line["loss"] - (line["ce_loss"] * 47 / 48 + line["lb_loss"] + line["z_loss"])) < 1e-6 * line["loss"]
    assert abs(lines[1]["ce_loss"] - 5.768) < 0.05      # ln 320
    for layer in lines[2]["balance"]:
        assert 1 <= layer["max_over_mean"] <= 5 and 0 <= layer["entropy"] <= 1
    assert out.count("sample:") == 2 and "bits per byte" in out
    assert "count" in out and "word" in out             # experts by domain


def test_balance_of_a_batch(data, tmp_path):
    """A step's line has the largest load of its layers, and their dead experts: those of the report where that covers
    this step alone, of two micro-batches. The screen has the first."""
    out = ok(*train_args(data, tmp_path, "--steps", 6, "--lr", 0.3, "--global-batch", 4, "--val-every", 1))
    shown = re.findall(r"\| max/mean (\S+) \|", out)
    assert len(shown) == 6
    for line, load in zip(steps(tmp_path), shown):
        layers = line["balance"]
        assert line["max_over_mean"] == max(layer["max_over_mean"] for layer in layers)
        assert line["dead"] == sum(layer["dead"] for layer in layers)
        assert load == f"{line['max_over_mean']:.2f}"
        assert all(sum(layer["counts"]) == 4 * 48 * 2 for layer in layers)
    assert any(line["dead"] > 0 for line in steps(tmp_path)), "the learning rate was to kill experts"


def test_balance_since_the_last_report(data, tmp_path):
    """Without --val the report covers all steps since the last one."""
    ok(*train_args(data, tmp_path, "--steps", 5, "--val-every", 3))
    reports = [line["balance"] for line in steps(tmp_path) if "balance" in line]
    rows = [sum(layer["counts"]) for balance in reports for layer in balance]
    assert rows == [3 * 2 * 48 * 2] * 2 + [2 * 2 * 48 * 2] * 2


def flops_per_token(T):
    """Of CONFIG: 6 for each weight that a token meets, and attention, of which half is masked"""
    C, F, L, V = (CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    E, K = CONFIG["num_experts"], CONFIG["num_experts_per_tok"]
    weights = L * (4 * C + 4 * C * C + E * C + K * 3 * F * C) + C + V * C
    return 6 * weights + 6 * L * C * T


@pytest.mark.parametrize("more, words", [(("--peak-tflops", 0.004), "4 GFLOP/s (given)"),
                                         (("--peak-tflops", 0), "(a large product of random numbers, measured)")],
                         ids=["given", "measured"])
def test_mfu(data, tmp_path, more, words):
    """The share of the peak that the table names, which is measured on a device that no table of NVIDIA's has."""
    out = ok(*train_args(data, tmp_path, "--steps", 2, *more))
    row = re.search(r"\| peak +\| (\S+) (.?)FLOP/s (.*?) *\|\n", out)
    assert words in row[0], row[0]
    peak = float(row[1]) * {"G": 1e9, "T": 1e12}[row[2]]
    assert 1e8 < peak < 1e15
    shown = re.findall(r"\| MFU (\d+)% \|", out)
    for line, share in zip(steps_with_times(tmp_path), shown, strict=True):
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops_per_token(48) / peak, rel=2e-3)
        assert float(share) == pytest.approx(100 * line["mfu"], abs=0.51)


def test_ranges(data, tmp_path):
    """NVTX ranges of a step, its phases and their layers, as the CPU build's profile of the last step counts them."""
    result = run(*train_args(data, tmp_path, "--steps", 2, "--global-batch", 4, "--profile"))
    assert result.returncode == 0, result.stderr
    ranges = {path: count["calls"] for path, count in json.loads(result.stderr)["ranges"].items()}
    layers = {f"step 2/{phase}/layer {l}": 2 for phase in ("forward", "backward") for l in (0, 1)}
    assert ranges == {"step 2": 1, "step 2/forward": 2, "step 2/head": 2, "step 2/backward": 2, "step 2/losses": 2,
                      "step 2/agreement": 1, "step 2/update": 1, **layers}
    ms = {path: count["ms"] for path, count in json.loads(result.stderr)["ranges"].items()}
    assert 0 < sum(ms[path] for path in layers) < ms["step 2/forward"] + ms["step 2/backward"] < ms["step 2"]


def test_learns(data, tmp_path):
    ok(*train_args(data, tmp_path, "--steps", 60, "--lr", "1e-2", "--batch", 4))
    lines = steps(tmp_path)
    assert lines[-1]["ce_loss"] < 0.6 * lines[0]["ce_loss"]


def test_same_bits_twice(data, straight, tmp_path):
    ok(*train_args(data, tmp_path, "--steps", 20, "--skip-spikes", 3))
    assert files(straight / "step-00000020") == files(tmp_path / "step-00000020")
    assert steps(straight) == steps(tmp_path)


def test_resume_same_bits(data, straight, tmp_path):
    more = ["--skip-spikes", 3, "--decay-steps", 20]
    ok(*train_args(data, tmp_path, "--steps", 10, *more))
    ok(*train_args(data, tmp_path, "--steps", 20, *more, "--resume", "--save-every", 5))
    assert files(straight / "step-00000020") == files(tmp_path / "step-00000020")
    assert steps(straight)[10:19] == steps(tmp_path)[10:19]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl"] + [f"step-{s:08}" for s in (10, 15, 20)]


@pytest.mark.parametrize("level", [1, 2])
def test_recompute_same_bits(data, straight, tmp_path, level):
    ok(*train_args(data, tmp_path, "--steps", 20, "--skip-spikes", 3, "--recompute", level))
    assert files(straight / "step-00000020") == files(tmp_path / "step-00000020")


def test_micro_batches(data, tmp_path):
    """Two micro-batches of 2 are one of 4, except for the load-balancing loss, which each computes on its own."""
    args = ["--steps", 5, "--lb-coef", 0, "--eps", "1e-5"]
    ok(*train_args(data, tmp_path / "a", *args, "--global-batch", 4))
    ok(*train_args(data, tmp_path / "b", *args, "--global-batch", 4, "--batch", 4))
    for a, b in zip(steps(tmp_path / "a"), steps(tmp_path / "b")):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * b["loss"]
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-4 * b["grad_norm"]


def test_schedules(data, tmp_path):
    """Spec: warm-up from a tenth; cosine and linear to a tenth; anneal to nothing, without warm-up."""
    expected = {"cosine": lambda s: 1e-4 + 9e-4 * (1 + math.cos(math.pi * (s - 2) / 6)) / 2,
                "linear": lambda s: 1e-3 - 9e-4 * (s - 2) / 6,
                "constant": lambda s: 1e-3,
                "anneal": lambda s: 1e-3 * (1 - s / 8)}
    for kind, lr in expected.items():
        ok(*train_args(data, tmp_path / kind, "--steps", 8, "--schedule", kind))
        for line in steps(tmp_path / kind):
            s = line["step"]
            want = 1e-3 * (0.1 + 0.9 * s / 2) if s < 2 and kind != "anneal" else lr(s)
            assert abs(line["lr"] - want) <= 1e-8 * 1e-3 + 1e-8 * want, (kind, s)


def test_steps_in_tokens(data, tmp_path):
    ok(*train_args(data, tmp_path, "--steps", f"{3 * 2 * 48}T"))
    assert len(steps(tmp_path)) == 3


def test_keep(data, tmp_path):
    ok(*train_args(data, tmp_path, "--steps", 10, "--save-every", 1, "--keep-last", 2, "--keep-every", 4))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{s:08}" for s in (4, 8, 9, 10)]


def test_existing_output_is_not_overwritten(data, straight):
    refused(*train_args(data, straight, "--steps", 20), words=["--resume"])


def test_resume_with_every_checkpoint_damaged(data, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "step-00000020" / "model.safetensors").write_bytes(b"")
    result = run(*train_args(data, tmp_path / "run", "--steps", 21, "--resume"))
    assert result.returncode == 1 and "undamaged" in result.stderr.splitlines()[-1]


def test_no_target_at_all(data, tmp_path):
    """A batch whose sequences are all repetitive has no cross entropy, and no gradient except the router's losses'."""
    (tmp_path / "same.npy").write_bytes(b"\x41\x00" * 480)
    args = train_args(data, tmp_path / "out", "--steps", 1, "--ce-divisor", "valid", "--lb-coef", 0, "--z-coef", 0)
    args[args.index("--data") + 1] = tmp_path / "same.npy"
    ok(*args)
    assert steps(tmp_path / "out")[0]["loss"] == 0 and steps(tmp_path / "out")[0]["grad_norm"] == 0


def test_resume_without_checkpoint_starts_anew(data, tmp_path):
    ok(*train_args(data, tmp_path, "--steps", 1, "--resume"))


def test_resume_of_another_run(data, straight):
    refused(*train_args(data, straight, "--steps", 30, "--resume", "--seed", 1), words=["seed", "6198"])
    refused(*train_args(data, straight, "--steps", 30, "--resume", "--seq", 16), words=["seq", "48"])
    refused(*train_args(data, straight, "--steps", 30, "--resume", "--order", "sequential"), words=["order"])


def test_resume_from_a_directory(data, straight, tmp_path):
    """An earlier checkpoint goes on in another --out; in its own, later ones would be taken for its successors."""
    ok(*train_args(data, tmp_path / "a", "--steps", 4, "--save-every", 2, "--schedule", "constant"))
    resume = ["--steps", 4, "--schedule", "constant", "--resume", tmp_path / "a" / "step-00000002"]
    refused(*train_args(data, tmp_path / "a", *resume), words=["later steps"])
    ok(*train_args(data, tmp_path / "b", *resume))
    assert files(tmp_path / "a" / "step-00000004") == files(tmp_path / "b" / "step-00000004")
    refused(*train_args(data, tmp_path / "c", "--resume", tmp_path / "nothing"), words=["nothing"])


def test_resume_on_other_data(data, straight, tmp_path):
    tokens = bytearray((data / "train.npy").read_bytes())
    (tmp_path / "other.npy").write_bytes(tokens[: len(tokens) // 2 * 1 // 2 * 2])
    args = train_args(data, straight, "--steps", 30, "--resume")
    args[args.index("--data") + 1] = tmp_path / "other.npy"
    refused(*args, words=["data_fingerprint"])


def test_fine_tune_from_directory(data, straight, tmp_path):
    args = train_args(data, tmp_path, "--steps", 2)
    args[1:3] = ["--model", straight / "step-00000020"]
    ok(*args)
    # it goes on where training was, not at ln 320
    assert steps(tmp_path)[0]["ce_loss"] < steps(straight)[0]["ce_loss"] - 0.2

# What a folder from the hub has beside config.json and weights, and what else may lie there.
COMES_ALONG = {
    "generation_config.json": b'{"temperature": 0.5,  "eos_token_id": [982, 7]}',
    "tokenizer_config.json": b'{"a": 1}\r\n',
    "tokenizer.json": (FIXTURES / "tokenizer" / "tokenizer.json").read_bytes(), "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{ }", "chat_template.jinja": b"{{ messages }}", "merges.txt": b"#version: 0.2\na b\n",
    "vocab.json": b'{"a": 0}', "spiece.model": bytes(range(256))}
STAYS = ("README.md", "pytorch_model.bin", "model.gguf", "optimizer.pt", "rng_state.pth", "training_args.bin",
         "tokenizer_old/tokenizer.json", "original/tokenizer.model")
TRAINED = ("config.json", "model.safetensors", "model.safetensors.index.json", "optimizer.safetensors",
           "trainer_state.json")


@pytest.fixture(scope="module")
def downloaded(data, tmp_path_factory):
    """A model's directory as from the hub."""
    d = tmp_path_factory.mktemp("downloaded")
    (d / "shape.json").write_text(json.dumps({**CONFIG, "vocab_size": 1024, "eos_token_id": [982, 7]}))
    ok("train", "--config", d / "shape.json", "--data", data / "train.npy", "--out", d, "--steps", 1, "--batch", 1,
       "--warmup", 0, "--peak-tflops", 1)
    model = (d / "step-00000001").rename(d / "model")
    config = json.loads((model / "config.json").read_text())
    assert config["eos_token_id"] == [982, 7]
    config.update(transformers_version="4.57.1", router_aux_loss_coef=0.05, use_cache=False, aaa={"b": 1, "a": [2]},
                  rope_scaling={"rope_type": "default"}, torch_dtype="float16", dtype="float16", bos_token_id=3)
    (model / "config.json").write_text(json.dumps(config))
    for name, contents in COMES_ALONG.items():
        (model / name).write_bytes(contents)
    for name in STAYS:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    return model


def tune(model, data, out, *more):
    """The checkpoint of a step of training on from the model."""
    ok("train", "--model", model, "--data", data / "train.npy", "--out", out, "--steps", 1, "--batch", 1, "--warmup", 0,
       "--peak-tflops", 1, *more)
    return out / "step-00000001"


def test_what_came_with_a_model_stays(data, straight, downloaded, tmp_path):
    """Files of tokenizer and chat and generation_config.json, byte by byte; all of config.json but the dtype."""
    saved = tune(downloaded, data, tmp_path / "out")
    assert {p.name for p in saved.iterdir()} == {*COMES_ALONG, *TRAINED}
    assert all((saved / name).read_bytes() == contents for name, contents in COMES_ALONG.items())
    before, after = (json.loads((d / "config.json").read_text()) for d in (downloaded, saved))
    dtype = json.loads((straight / "step-00000020" / "config.json").read_text())["torch_dtype"]
    assert after == {**before, "torch_dtype": dtype, "dtype": dtype} and list(after) == sorted(after)
    # and it is all there for what comes next: text from it, and training on from it, twice
    ok("generate", "--model", saved, "--prompt", "the cat", "--max-tokens", 3)
    again = tune(saved, data, tmp_path / "again")
    assert all(files(again)[name] == files(saved)[name] for name in ("config.json", *COMES_ALONG))
    ok("train", "--model", downloaded, "--data", data / "train.npy", "--out", tmp_path / "out", "--steps", 2, "--batch",
       1, "--warmup", 0, "--peak-tflops", 1, "--resume")
    assert files(tmp_path / "out" / "step-00000002")["tokenizer.json"] == files(saved)["tokenizer.json"]


def test_another_tokenizer_than_the_models(data, straight, downloaded, tmp_path):
    """With --tokenizer its files are saved, not those of the model's; from a shape alone, its tokenizer.json."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes(COMES_ALONG["tokenizer.json"] + b"\n")
    (other / "chat_template.jinja").write_text("other")
    (other / "config.json").write_text('{"eos_token_id": 982}')

    def of_tokenizer(n, *options):
        saved = tune(downloaded, data, tmp_path / str(n), *options, "--sample-tokens", 1)
        found = {p.name: p.read_bytes() for p in saved.iterdir() if p.name not in TRAINED}
        assert found.pop("generation_config.json") == COMES_ALONG["generation_config.json"]
        return found
    its = {name: text for name, text in COMES_ALONG.items() if name != "generation_config.json"}
    for n, same in enumerate((downloaded, downloaded / "tokenizer.json", FIXTURES / "tokenizer" / "tokenizer.json")):
        assert of_tokenizer(n, "--tokenizer", same) == its, same
    both = {name: (other / name).read_bytes() for name in ("tokenizer.json", "chat_template.jinja")}
    assert of_tokenizer("directory", "--tokenizer", other) == both
    (other / "tokenizer.json").rename(other / "my.json")
    one = {"tokenizer.json": both["tokenizer.json"]}
    assert of_tokenizer("file", "--tokenizer", other / "my.json") == one
    assert of_tokenizer("bytes", "--tokenizer", "bytes") == {}
    assert {p.name for p in (straight / "step-00000020").iterdir()} == {*TRAINED, "generation_config.json"}


def test_an_edit_that_means_nothing_loses_no_checkpoint(data, downloaded, tmp_path):
    """Of any JSON file of a checkpoint: another layout, order or spelling, another key that nothing reads."""
    saved = tune(downloaded, data, tmp_path / "out")
    for path in saved.glob("*.json"):
        found = json.loads(path.read_text())
        if path.name in ("config.json", "generation_config.json"):
            found["mine"] = 1
        path.write_text(json.dumps(found, indent=5, sort_keys=True) + "\n\n")
    resume = ["train", "--model", downloaded, "--data", data / "train.npy", "--batch", 1, "--warmup", 0,
              "--peak-tflops", 1, "--keep-last", 1, "--resume"]
    assert "nothing to do" in ok(*resume, "--out", tmp_path / "out", "--steps", 1)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    ok(*resume, "--out", tmp_path / "out", "--steps", 2)
    assert [p.name for p in (tmp_path / "out").glob("step-*")] == ["step-00000002"]
    config = json.loads((tmp_path / "other" / saved.name / "config.json").read_text())
    (tmp_path / "other" / saved.name / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    result = run(*resume, "--out", tmp_path / "other", "--steps", 2)
    assert result.returncode == 1 and "passing over" in result.stderr and "config.json" in result.stderr


def test_the_ends_of_ranges(data, tmp_path):
    """No limit as infinity, an epsilon of 0, no lines between the first and the last."""
    base = ["--steps", 4, "--seq", 16]
    out = ok(*train_args(data, tmp_path / "a", *base, "--grad-clip", "inf", "--skip-spikes", "inf", "--eps", 0,
                         "--log-every", 0))
    assert out.count(" | loss ") == 2
    ok(*train_args(data, tmp_path / "b", *base, "--grad-clip", 0, "--skip-spikes", 0, "--eps", "1e-30"))
    assert files(tmp_path / "a" / "step-00000004") == files(tmp_path / "b" / "step-00000004")
    refused(*train_args(data, tmp_path / "c", *base, "--grad-clip", "nan"), words=["grad-clip"])
    for key in ("rms_norm_eps", "initializer_range"):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: 0}))
        ok("info", "--config", tmp_path / "config.json")


# ------------------------------------------------------------------------------------------------
# Stops and faults

started = []


def popen(command, **options):
    started.append(subprocess.Popen(command, **options))
    return started[-1]


def start(*args, hangup=signal.SIG_DFL):
    """What SIGHUP does is not as pytest has it: nohup ignores it."""
    return popen([OLMOE, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                 preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup))


@pytest.fixture(autouse=True)
def end_what_was_started():
    """A test that fails must not leave a training of a million steps that slows all others."""
    yield
    while started:
        process = started.pop()
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for_step(out, step):
    deadline = time.time() + 60
    while time.time() < deadline:
        path = Path(out) / "log.jsonl"
        if path.exists() and path.read_text().count('{"step"') >= step:
            return
        time.sleep(0.005)
    raise AssertionError("no step was logged")


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(data, tmp_path, which):
    more = ["--steps", 4000, "--schedule", "constant"]
    process = start(*train_args(data, tmp_path / "a", *more))
    wait_for_step(tmp_path / "a", 3)
    process.send_signal(which)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stderr == "" and "go on with --resume" in stdout
    stopped = steps(tmp_path / "a")[-1]["step"]
    assert (tmp_path / "a" / f"step-{stopped:08}").is_dir()
    # what it saved is what a run that ends there saves
    ok(*train_args(data, tmp_path / "b", "--steps", stopped, "--schedule", "constant"))
    a, b = files(tmp_path / "a" / f"step-{stopped:08}"), files(tmp_path / "b" / f"step-{stopped:08}")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert a[name] == b[name]


def test_no_signal_is_handled_where_matmuls_run(data, tmp_path):
    """A handler's frame on oneDNN's stack, which is in the heap, would overwrite what lies below it: so every thread
    blocks the signals that stop a run."""
    process = start(*train_args(data, tmp_path, "--steps", 4000, "--schedule", "constant"))
    wait_for_step(tmp_path, 3)
    stops = sum(1 << (s - 1) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    threads = [dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
               for task in Path(f"/proc/{process.pid}/task").iterdir()]
    process.kill()
    process.communicate()
    assert len(threads) >= 2
    for thread in threads:
        assert int(thread["SigCgt"], 16) & stops == 0
    # one thread waits for them
    assert sum(int(thread["SigBlk"], 16) & stops == stops for thread in threads) >= len(threads) - 1


def test_second_interrupt(data, tmp_path):
    """Ctrl-C twice ends the program at once, in the middle of a step that takes long."""
    (tmp_path / "long.npy").write_bytes((data / "train.npy").read_bytes() * 200)
    process = start("train", "--config", data / "config.json", "--data", tmp_path / "long.npy",
                    "--out", tmp_path / "out", "--batch", 1, "--global-batch", 30000, "--steps", 1, "--peak-tflops", 1)
    until = time.time() + 60
    while time.time() < until and not (tmp_path / "out" / "log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT


def test_kill(data, tmp_path):
    """SIGKILL while it trains and saves: the newest complete checkpoint resumes, and ends where an undisturbed run
    ends."""
    more = ["--schedule", "constant", "--save-every", 1]
    process = start(*train_args(data, tmp_path / "a", "--steps", 100000, *more))
    wait_for_step(tmp_path / "a", 5)
    process.kill()
    process.communicate()
    newest = max(int(p.name[5:]) for p in (tmp_path / "a").glob("step-*"))
    end = newest + 3
    ok(*train_args(data, tmp_path / "a", "--steps", end, *more, "--resume"))
    ok(*train_args(data, tmp_path / "b", "--steps", end, "--schedule", "constant"))
    last = f"step-{end:08}"
    assert files(tmp_path / "a" / last)["model.safetensors"] == files(tmp_path / "b" / last)["model.safetensors"]
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]
    assert [line["step"] for line in steps(tmp_path / "a")] == list(range(1, end + 1))


def test_output_folder_with_another_name(data, tmp_path):
    """The run follows its folder, also where another one takes the name."""
    process = start(*train_args(data, tmp_path / "a", "--steps", 100000, "--schedule", "constant"))
    wait_for_step(tmp_path / "a", 3)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stderr == "" and f"goes on in {tmp_path}/b" in stdout
    assert not list((tmp_path / "a").iterdir())
    stopped = steps(tmp_path / "b")[-1]["step"]
    assert (tmp_path / "b" / f"step-{stopped:08}" / "model.safetensors").exists()
    ok(*train_args(data, tmp_path / "b", "--steps", stopped + 1, "--schedule", "constant", "--resume"))


@pytest.mark.parametrize("anew", [False, True])
def test_output_folder_that_is_removed(data, tmp_path, anew):
    """One line, and nothing is written where the name leads now."""
    process = start(*train_args(data, tmp_path / "a", "--steps", 100000, "--schedule", "constant"))
    wait_for_step(tmp_path / "a", 3)
    shutil.rmtree(tmp_path / "a")
    if anew:
        (tmp_path / "a").mkdir()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count("\n") == 1 and f"{tmp_path}/a was removed" in stderr
    assert [*tmp_path.rglob("*")] == ([tmp_path / "a"] if anew else [])


def test_full_disk(data, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
    refused(*train_args(data, tmp_path, "--steps", 2), preexec_fn=small_files, words=["write"])
    assert not list(tmp_path.glob("*step-*"))


def test_unwritable_output(data):
    refused(*train_args(data, "/proc/nothing", "--steps", 2), words=["/proc/nothing"])


def test_damaged_checkpoints(data, straight, tmp_path):
    """Each kind of damage is refused with its reason, and --resume falls back to the one before."""
    shutil.copytree(straight, tmp_path / "run")
    run_dir = tmp_path / "run"
    ok(*train_args(data, run_dir, "--steps", 21, "--skip-spikes", 3, "--resume"))
    good = tmp_path / "good"
    shutil.copytree(run_dir / "step-00000021", good)
    damages = {
        "model.safetensors": [lambda b: b[:-1], lambda b: b[:100], lambda b: b"",
                              lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]],
        "optimizer.safetensors": [lambda b: b[: len(b) // 2], None],
        "trainer_state.json": [lambda b: b[:-20], None],
        "config.json": [lambda b: b[:10]],
    }
    for name, changes in damages.items():
        for change in changes:
            shutil.rmtree(run_dir / "step-00000021")
            shutil.copytree(good, run_dir / "step-00000021")
            if change:
                (run_dir / "step-00000021" / name).write_bytes(change((good / name).read_bytes()))
            else:
                (run_dir / "step-00000021" / name).unlink()
            refused(*train_args(data, run_dir, "--steps", 22, "--resume", run_dir / "step-00000021"))
            result = run(*train_args(data, run_dir, "--steps", 20, "--resume"))
            assert result.returncode == 0 and "step 20 of 20" in result.stdout, (name, result)
            assert "step-00000021" in result.stderr and len(result.stderr.splitlines()) == 1, (name, result.stderr)


def set_value(path, name, index, value):
    """Overwrites one element, F32 or BF16, of a tensor in a safetensors file."""
    data = bytearray(Path(path).read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    tensor = json.loads(data[8:8 + length])[name]
    raw = struct.pack("<f", value)[2 if tensor["dtype"] == "BF16" else 0:]
    at = 8 + length + tensor["data_offsets"][0] + len(raw) * index
    data[at:at + len(raw)] = raw
    Path(path).write_bytes(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_parameter(data, straight, tmp_path, value):
    shutil.copytree(straight / "step-00000020", tmp_path / "model")
    set_value(tmp_path / "model" / "model.safetensors", "model.layers.1.self_attn.v_proj.weight", 7, value)
    args = train_args(data, tmp_path / "out", "--steps", 2)
    args[1:3] = ["--model", tmp_path / "model"]
    refused(*args, words=["step 1", "model.layers.1.self_attn.v_proj.weight", "not finite"])


def test_overflow_names_the_layer(data, straight, tmp_path):
    """Finite weights whose products are not."""
    shutil.copytree(straight / "step-00000020", tmp_path / "model")
    for i in range(24):
        set_value(tmp_path / "model" / "model.safetensors", "model.layers.1.self_attn.v_proj.weight", i, 3e38)
    args = train_args(data, tmp_path / "out", "--steps", 2)
    args[1:3] = ["--model", tmp_path / "model"]
    refused(*args, words=["step 1", "qkv projection of layer 1", "not finite"])


def test_diverging_run_stops(data, tmp_path):
    refused(*train_args(data, tmp_path, "--steps", 200, "--lr", "1e3", "--grad-clip", 0, "--warmup", 0,
                        "--schedule", "constant"), words=["step", "not finite"])


def test_skip_spikes(data, tmp_path):
    """With a limit of no deviation about half of the steps after the first 64 are skipped, and a resumed run skips the
    same ones."""
    more = ["--skip-spikes", "1e-9", "--schedule", "constant", "--lr", "1e-5"]
    ok(*train_args(data, tmp_path / "a", "--steps", 80, *more))
    skipped = [line["step"] for line in steps(tmp_path / "a") if line.get("skipped")]
    assert skipped and min(skipped) > 64
    state = json.loads((tmp_path / "a" / "step-00000080" / "trainer_state.json").read_text())["trainer"]
    assert state["updates"] == 80 - len(skipped)
    ok(*train_args(data, tmp_path / "b", "--steps", 70, *more))
    ok(*train_args(data, tmp_path / "b", "--steps", 80, *more, "--resume"))
    assert files(tmp_path / "a" / "step-00000080") == files(tmp_path / "b" / "step-00000080")


def test_recipe_changed_between_runs(data, tmp_path):
    """A resumed run may have another recipe; the table shows what it was. A warm-up longer than the run is also
    reported."""
    out = ok(*train_args(data, tmp_path, "--steps", 2))
    assert "warm-up 2: longer than the run" in out
    out = ok(*train_args(data, tmp_path, "--steps", 4, "--weight-decay", 0.2, "--resume"))
    assert "longer than the run" not in out
    assert "adamw until step 2" in out and '"weight_decay":0.1' in out
    assert "schedule until step 2" in out and "losses until" not in out
    out = ok(*train_args(data, tmp_path, "--steps", 4, "--weight-decay", 0.2, "--resume"))
    assert "until step" not in out


def test_screen_that_goes_away(data, tmp_path):
    """Ctrl-C at `olmoe train | tee` ends tee at once: the step's line has no reader, and yet all is saved. The same
    holds when there is no reader from the start."""
    for stop in (True, False):
        out = tmp_path / str(stop)
        process = start(*train_args(data, out, "--steps", 4000 if stop else 5, "--schedule", "constant"))
        process.stdout.close()
        if stop:
            wait_for_step(out, 3)
            process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert process.returncode == 1 and "cannot write to standard output" in process.stderr.read()
        assert [p.name for p in out.glob("step-*")] == [f"step-{steps(out)[-1]['step']:08}"]


def test_closed_streams(data, tmp_path):
    """No file takes the number of a standard stream that is closed, and with it the messages."""
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    for closed in (1, 2):
        result = run("tokenize", "--tokenizer", "bytes", "--out", tmp_path / "t.npy", tmp_path / "bad.jsonl",
                     preexec_fn=lambda: os.close(closed))
        assert result.returncode == 0 and (tmp_path / "t.npy").read_bytes() == struct.pack("<5H", *b"good", 256)
        result = run(*train_args(data, tmp_path / f"out{closed}", "--steps", 2), preexec_fn=lambda: os.close(closed))
        assert result.returncode == 0 and [line["step"] for line in steps(tmp_path / f"out{closed}")] == [1, 2]


def test_two_runs_in_one_directory(data, tmp_path):
    process = start(*train_args(data, tmp_path, "--steps", 1000000, "--schedule", "constant"))
    wait_for_step(tmp_path, 3)
    for more in ([], ["--resume"]):
        refused(*train_args(data, tmp_path, "--steps", 5, *more), words=["another run", str(tmp_path)])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(list(tmp_path.glob("step-*"))) == 1
    ok(*train_args(data, tmp_path, "--steps", steps(tmp_path)[-1]["step"] + 1, "--schedule", "constant", "--resume"))


def test_validation_is_checked_before_training(data, tmp_path):
    """An error in it is found before training, not after the last step and before its checkpoint."""
    tokens = (data / "val.npy").read_bytes()
    (tmp_path / "ids.npy").write_bytes(tokens[:1000] + struct.pack("<H", 9999) + tokens[1002:])
    args = train_args(data, tmp_path / "out", "--steps", 2)
    refused(*args, "--val", tmp_path / "ids.npy", words=["ids.npy", "token 500", "9999"])
    assert not (tmp_path / "out").exists()
    ok(*args, "--val", tmp_path / "ids.npy", "--val-batches", 5)                # 480 tokens, which are all right


def test_documents_that_do_not_fit_are_left_out(data, tmp_path):
    """The list of documents beside the validation data: training does not need it, and goes on with a warning."""
    good, npy, lists = (data / "val.csv.gz").read_bytes(), tmp_path / "v.npy", tmp_path / "v.csv.gz"
    npy.write_bytes((data / "val.npy").read_bytes())
    for i, content in enumerate([good, good[:20], gzip.compress(b"0,5,a-1,b,1\n5,9,b-1,b,1\n"), b"hello"]):
        lists.write_bytes(content)
        result = run(*train_args(data, tmp_path / f"out{i}", "--steps", 1, "--val", npy))
        assert result.returncode == 0 and ("by domain:" in result.stdout) == (i == 0)
        assert result.stderr.count("\n") == (i > 0) and (i == 0 or f"warning: {lists}" in result.stderr)


def test_token_type(data, tmp_path):
    """uint32 trains as the same tokens in uint16 do, validation and all; what is not as it says is refused before."""
    ids = struct.unpack(f"<{(data / 'train.npy').stat().st_size // 2}H", (data / "train.npy").read_bytes())
    wide = tmp_path / "wide.npy"
    wide.write_bytes(struct.pack(f"<{len(ids)}I", *ids))
    args = [*train_args(data, tmp_path / "a", "--steps", 2), "--val", data / "train.npy", "--val-batches", 2]
    ok(*args)
    args = [tmp_path / "b" if a == tmp_path / "a" else wide if a == data / "train.npy" else a for a in args]
    refused(*args, words=[str(wide), "uint32", "--token-type uint32"])
    assert not (tmp_path / "b").exists()
    ok(*args, "--token-type", "uint32")
    drop = lambda lines: [{k: v for k, v in line.items() if k != "config"} for line in lines]
    assert drop(steps(tmp_path / "a")) == drop(steps(tmp_path / "b"))
    refused(*train_args(data, tmp_path / "c", "--steps", 2, "--token-type", "uint32"), words=["uint16"])
    refused(*args, "--token-type", "int64", words=["'int64' is not one of uint16|uint32"])


def test_weights_in_other_files(data, straight, tmp_path):
    """The message says what is there in the place of the weights."""
    shutil.copytree(straight / "step-00000020", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "model-00001-of-00002.safetensors")
    info = ["info", "--model", tmp_path / "m", "--json"]
    refused(*info, words=["only model-00001-of-00002.safetensors", "fetch the index, too"])
    (tmp_path / "m" / "model-00001-of-00002.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    refused(*info, words=["only pytorch_model.bin, PyTorch's pickle"])
    (tmp_path / "m" / "pytorch_model.bin").unlink()
    refused(*info, words=["is it a model's directory?"])


def test_tokenizer_that_goes_away(data, tmp_path):
    """It is part of the checkpoints as it was when the run began."""
    shutil.copy(ROOT / "tests" / "fixtures" / "tokenizer" / "tokenizer.json", tmp_path / "t.json")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 50304, "hidden_size": 6}))
    args = train_args(data, tmp_path / "out", "--steps", 4000, "--schedule", "constant",
                      "--tokenizer", tmp_path / "t.json")
    args[2] = tmp_path / "config.json"
    process = start(*args)
    wait_for_step(tmp_path / "out", 1)
    content = (tmp_path / "t.json").read_bytes()
    (tmp_path / "t.json").unlink()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert [p.read_bytes() == content for p in (tmp_path / "out").glob("step-*/tokenizer.json")] == [True]


def test_weights_that_overflow_are_not_saved(data, straight, tmp_path):
    """By an update, which no step has computed with yet: a weight of an id that is nowhere in the data, and a decay of
    1 - 10 x 10 overflows it at the second step."""
    shutil.copytree(straight / "step-00000020", tmp_path / "model")
    set_value(tmp_path / "model" / "model.safetensors", "model.embed_tokens.weight", 300 * 24, 1e35)
    args = train_args(data, tmp_path / "out", "--steps", 5, "--lr", 10, "--min-lr", 10, "--weight-decay", 10,
                      "--warmup", 0, "--schedule", "constant", "--save-every", 1, "--keep-last", 1)
    args[1:3] = ["--model", tmp_path / "model"]
    refused(*args, words=["step 2 is not saved", "model.embed_tokens.weight", "not finite"])
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name != "log.jsonl"] == ["step-00000001"]


def test_many_domains(data, tmp_path):
    """Where each document's id names a domain of its own, there is no table."""
    with open(tmp_path / "val.jsonl", "w") as f:
        for i in range(3000):
            f.write(json.dumps({"id": hashlib.md5(str(i).encode()).hexdigest(), "text": "the cat"}) + "\n")
    ok("tokenize", "--tokenizer", "bytes", "--out", tmp_path / "val.npy", tmp_path / "val.jsonl")
    said = ok(*train_args(data, tmp_path / "out", "--steps", 1, "--val", tmp_path / "val.npy", "--val-batches", 2))
    assert "validation loss" in said and "by domain" not in said and len(said.splitlines()) < 60


def test_deeply_nested_json(data, tmp_path):
    deep = "[" * 300000 + "]" * 300000
    (tmp_path / "config.json").write_text(json.dumps(CONFIG).replace('"hidden_size": 24', f'"hidden_size": {deep}'))
    refused("info", "--config", tmp_path / "config.json", words=["hidden_size"])
    tokenizer = json.loads((ROOT / "tests" / "fixtures" / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["model"]["dropout"] = "deep"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer).replace('"deep"', deep))
    (tmp_path / "text.txt").write_text("text")
    refused("tokenize", "--tokenizer", tmp_path / "tokenizer.json", "--out", tmp_path / "x.npy", tmp_path / "text.txt",
            words=["dropout"])


def test_deeply_nested_header(data, straight, tmp_path):
    shutil.copytree(straight / "step-00000020", tmp_path / "model")
    header = ('{"x":{"dtype":' + "[" * 300000 + "]" * 300000 + ',"shape":[],"data_offsets":[0,0]}}').encode()
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused("info", "--model", tmp_path / "model", words=["model.safetensors"])


def test_file_that_shrinks(data, tmp_path):
    (tmp_path / "t.npy").write_bytes((data / "train.npy").read_bytes() * 100)
    args = train_args(data, tmp_path / "out", "--steps", 100000, "--schedule", "constant")
    args[4] = tmp_path / "t.npy"
    process = start(*args)
    wait_for_step(tmp_path / "out", 3)
    os.truncate(tmp_path / "t.npy", 0)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == "olmoe: a file became shorter while it was read, or shared memory is full\n"


@pytest.mark.parametrize("args", [
    [], ["--help"], ["info", "--help"], ["train", "--help"], ["info", "--config", "DATA/config.json"],
    ["verify", "--model", "ODD", "--reference", "ODD/reference.safetensors"],
    ["generate", "--model", "ODD", "--ids", "1,2", "--max-tokens", 3],
    ["tokenize", "--tokenizer", "bytes", "--out", "OUT/x.npy", "DATA/text.jsonl"],
    ["train", "--config", "DATA/config.json", "--data", "DATA/train.npy", "--out", "OUT/run", "--steps", 2,
     "--batch", 2, "--warmup", 0, "--peak-tflops", 1]], ids=lambda args: "".join(map(str, args[:2])) or "nothing")
def test_output_that_cannot_be_written(data, tmp_path, args):
    """The reason is that of the write that failed, not of whatever was called after it; what was asked for is done."""
    places = {"DATA": data, "OUT": tmp_path, "ODD": FIXTURES / "odd"}
    words = [re.sub("^(DATA|OUT|ODD)", lambda m: str(places[m[1]]), str(word)) for word in args]
    with open("/dev/full", "w") as full:
        result = subprocess.run([OLMOE, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "olmoe: cannot write to standard output: No space left on device\n"
    made = {"tokenize": "x.npy", "train": "run/step-00000002"}
    if args[:1] and args[0] in made and args[1] != "--help":
        assert (tmp_path / made[args[0]]).exists()


# ------------------------------------------------------------------------------------------------
# Wrong options and files

@pytest.mark.parametrize("args, words", [
    (["nonsense"], ["nonsense"]),
    (["train"], ["--config", "--model"]),
    (["train", "--config", "x.json"], ["--data"]),
    (["train", "--config", "x.json", "--data", "d.npy"], ["--out"]),
    (["train", "--config", "x.json", "--data", "d.npy", "--out", "o"], ["x.json"]),
    (["train", "--bogus", "1"], ["--bogus"]),
    (["train", "--batch"], ["--batch"]),
    (["train", "--batch", "--seq"], ["--batch"]),
    (["train", "--batch", "two"], ["--batch", "two"]),
    (["train", "--batch", "2.5"], ["--batch", "2.5"]),
    (["train", "--batch", "0"], ["--batch", "0"]),
    (["train", "--batch", "-3"], ["--batch"]),
    (["train", "--lr", "nan"], ["--lr", "nan"]),
    (["train", "--lr", "1e-3x"], ["--lr"]),
    (["train", "--schedule", "triangle"], ["triangle", "cosine|linear|constant|anneal"]),
    (["train", "--recompute", "3"], ["--recompute"]),
    (["train", "--schedule", "cosine|linear"], ["cosine|linear"]),
    (["train", "--eps", "-1"], ["--eps"]),
    (["tokenize", "--tokenizer", "bytes", "--out", "text.txt", "text.txt"], ["text.txt", ".npy"]),
    (["train", "extra"], ["extra"]),
    (["train", "--batch=two"], ["--batch", "two"]),
    (["train", "--batch="], ["--batch", "''"]),
    (["train", "--batch", "---"], ["--batch", "'---'"]),
    (["train", "--profile=1"], ["--profile", "no value"]),
    (["train", "--bogus=1"], ["--bogus"]),
    (["train", "--config=x.json", "--data=d.npy", "--out=o"], ["x.json"]),
    (["train", "--sample-prompt", "--steps", "1"], ["--sample-prompt needs a value", "--sample-prompt=--steps"]),
    (["train", "--config", "--help"], ["--config needs a value"]),
    (["train", "--data", "--val", "x.npy"], ["--data", "at least one value"]),
    (["generate", "--prompt=a", "b"], ["unexpected argument 'b'"]),
    (["tokenize", "--tokenizer", "bytes", "--out", "x.npy", "--", "--help"], ["--help: cannot be read"]),
    (["verify"], ["--model", "--reference"]),
    (["info"], ["--config"]),
    (["info", "--config", "/nonexistent/config.json"], ["/nonexistent/config.json"]),
    (["info", "--config", "two\nlines"], ["two?lines"]),
    (["tokenize"], ["--tokenizer"]),
    (["tokenize", "--tokenizer", "martian", "--out", "x.npy", "y.txt"], ["martian"]),
    (["tokenize", "--tokenizer", "bytes", "--out", "/tmp/x.npy", "/nonexistent.txt"], ["/nonexistent.txt"]),
])
def test_bad_options(args, words, tmp_path):
    refused(*args, words=words, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mistyped_options(tmp_path):
    """After a value they are no further values; nor where the value may be left out."""
    for args in (["train", "--data", "d.npy", "--bogus", "1"], ["train", "--resume", "--bogus"],
                 ["train", "--profile", "--bogus"], ["generate", "--prompt", "a", "--bogus=5"]):
        refused(*args, words=["unknown option '--bogus"], cwd=tmp_path)
    refused("generate", "--prompt", "a", "--bogus=5", words=["--prompt=--bogus=5"])


def test_bad_combinations(data, tmp_path):
    out = tmp_path / "out"
    refused(*train_args(data, out, "--seq", 49), words=["49", "48"])
    refused(*train_args(data, out, "--global-batch", 3), words=["3", "2"])
    refused(*train_args(data, out, "--steps", "many"), words=["--steps", "many"])
    refused(*train_args(data, out, "--steps", "10.7"), words=["--steps", "10.7"])
    refused(*train_args(data, out, "--global-batch", 100000), words=["100000"])
    refused(*train_args(data, out, "--model", "x"), words=["--config", "--model"])


def test_bad_data(data, tmp_path):
    def with_data(content, name="bad.npy"):
        (tmp_path / name).write_bytes(content)
        args = train_args(data, tmp_path / "out", "--steps", 2)
        args[args.index("--data") + 1] = tmp_path / name
        return args
    refused(*with_data(b""), words=["bad.npy"])
    refused(*with_data(b"\x01" * 101), words=["bad.npy"])                       # half a token
    refused(*with_data(b"\x01\x00" * 20), words=["bad.npy"])                    # shorter than a sequence
    refused(*with_data(b"\xff\xff" * 480), words=["bad.npy", "65535", "320"])   # no such id
    shard = struct.pack("<256i", 20240520, 1, 1000, *[0] * 253) + b"\0\0" * 10
    refused(*with_data(shard, "bad.bin"), words=["bad.bin"])


def test_bad_configs(data, tmp_path):
    changes = [("clip_qkv", 8.0), ("num_key_value_heads", 1), ("tie_word_embeddings", True), ("attention_bias", True),
               ("rope_scaling", {"type": "linear", "factor": 2.0}), ("hidden_act", "gelu"), ("model_type", "llama"),
               ("num_experts_per_tok", 6), ("hidden_size", 25), ("hidden_size", "24"), ("num_hidden_layers", 0),
               ("rms_norm_eps", -1)]
    for key, value in changes:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: value}))
        refused("info", "--config", tmp_path / "config.json", words=[key])
    (tmp_path / "config.json").write_text("{not json")
    refused("info", "--config", tmp_path / "config.json", words=["config.json"])


def test_tokenizer_json(data, tmp_path):
    """Trains on its tokens, samples with it, and saves it, so that a checkpoint is all that is needed to go on."""
    tokenizer = FIXTURES / "tokenizer"
    ok("tokenize", "--tokenizer", tokenizer, "--out", tmp_path / "text.npy", data / "text.jsonl")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 1024, "eos_token_id": 982}))
    words = ["--data", tmp_path / "text.npy", "--out", tmp_path / "run", "--batch", 2, "--warmup", 0,
             "--peak-tflops", 1]
    ok("train", "--config", tmp_path / "config.json", "--tokenizer", tokenizer, "--steps", 2,
       "--sample-prompt", "naïve", "--sample-tokens", 20, *words)
    saved = tmp_path / "run" / "step-00000002"
    assert (saved / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    ok("tokenize", "--tokenizer", saved, "--out", tmp_path / "again.npy", data / "text.jsonl")
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "text.npy").read_bytes()
    refused("train", "--config", data / "config.json", "--tokenizer", tokenizer, "--steps", 1, *words,
            words=["vocabulary"])


# ------------------------------------------------------------------------------------------------
# verify, info, tokenize

FIXTURE = FIXTURES / "normalized"


def edited_reference(tmp_path, edit, fixture=FIXTURE, **more_metadata):
    """The fixture's reference file with its header and tensors changed by `edit(header, tensors)`. Metadata that are
    None are left out."""
    raw = (fixture / "reference.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    metadata = {k: v for k, v in {**header.pop("__metadata__"), **more_metadata}.items() if v is not None}
    tensors = {n: raw[8 + length + t["data_offsets"][0]: 8 + length + t["data_offsets"][1]] for n, t in header.items()}
    edit(header, tensors)
    at = 0
    for name, t in header.items():
        t["data_offsets"] = [at, at + len(tensors[name])]
        at += len(tensors[name])
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "reference.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors[n] for n in header))
    return path


def test_verify_agrees(tmp_path):
    out = ok("verify", "--model", FIXTURE, "--reference", edited_reference(tmp_path, lambda h, t: None))
    assert out.splitlines()[-1].endswith("they agree")


@pytest.mark.parametrize("name, index, value", [
    ("logits", 5, 9.0), ("logits", 5, float("nan")), ("loss", 0, 4.0), ("losses", 3, 4.0),
    ("grad.lm_head.weight", 11, 1.0), ("grad.model.norm.weight", 1, float("nan")), ("router.0.logits", 2, 40.0)])
def test_verify_sees_a_difference(tmp_path, name, index, value):
    def edit(header, tensors):
        b = bytearray(tensors[name])
        struct.pack_into("<f", b, 4 * index, value)
        tensors[name] = bytes(b)
    result = run("verify", "--model", FIXTURE, "--reference", edited_reference(tmp_path, edit))
    assert result.returncode == 1 and "FAILED" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("they DIFFER")


def test_verify_sees_other_experts(tmp_path):
    def edit(header, tensors):
        ids = list(struct.unpack("<2i", tensors["router.0.experts"][:8]))
        tensors["router.0.experts"] = struct.pack("<2i", ids[1], ids[0]) + tensors["router.0.experts"][8:]
    result = run("verify", "--model", FIXTURE, "--reference", edited_reference(tmp_path, edit))
    assert result.returncode == 1 and "router.0.experts" in [l for l in result.stdout.splitlines() if "FAILED" in l][0]


def test_verify_allocates_what_it_compares(tmp_path):
    """Logits and routing need no gradients, gradients need no moments: shown by the least memory that is enough for a
    model of 60 MB."""
    config = {**CONFIG, "hidden_size": 96, "intermediate_size": 2048, "num_hidden_layers": 5,
              "max_position_embeddings": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "ids.npy").write_bytes(struct.pack("<16H", *range(16)))
    ok("train", "--config", tmp_path / "config.json", "--data", tmp_path / "ids.npy", "--out", tmp_path / "out",
       "--batch", 1, "--steps", 1, "--peak-tflops", 1)
    model = next((tmp_path / "out").glob("step-*"))
    tensors = {"inputs": ("I32", [1, 8], bytes(32)), "targets": ("I32", [1, 8], bytes(32))}
    parts = {"logits": ("F32", [1, 8, 320], bytes(4 * 8 * 320)),
             "grad.model.norm.weight": ("F32", [96], bytes(4 * 96)), "losses": ("F32", [2], bytes(8))}
    needed = []
    for part in parts:
        some = {**tensors, part: parts[part]}
        if part == "logits":
            some["router.4.logits"] = ("F32", [1, 8, 5], bytes(4 * 8 * 5))
        at, header = 0, {}
        for name, (dtype, shape, data) in some.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = tmp_path / "reference.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in some.values()))
        low, high = 0, 4096                                     # MB of address space: too little, enough
        while high - low > 4:
            limit = (low + high) // 2 << 20
            result = run("verify", "--model", model, "--reference", path,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
            if "they DIFFER" in result.stdout:                  # zeros agree with none of them
                high = limit >> 20
            else:
                low = limit >> 20
        needed.append(high)
    assert abs(needed[1] - needed[0] - 60) < 12 and abs(needed[2] - needed[1] - 120) < 12, needed


def test_verify_zero_reference(tmp_path):
    def edit(header, tensors):
        tensors["grad.lm_head.weight"] = bytes(len(tensors["grad.lm_head.weight"]))
    result = run("verify", "--model", FIXTURE, "--reference", edited_reference(tmp_path, edit))
    assert result.returncode == 1 and "grad.lm_head.weight (zero)" in result.stdout


def test_verify_bad_references(tmp_path):
    def drop_all(header, tensors):
        for name in list(header):
            if name not in ("inputs", "targets"):
                del header[name], tensors[name]

    def unknown(header, tensors):
        header["grad.model.layers.9.nothing"] = dict(header["loss"])
        tensors["grad.model.layers.9.nothing"] = tensors["loss"]

    def shape(header, tensors):
        header["logits"]["shape"] = header["logits"]["shape"][::-1]

    def no_inputs(header, tensors):
        del header["inputs"], tensors["inputs"]

    for edit, word in [(drop_all, "nothing to compare"), (unknown, "grad.model.layers.9.nothing"), (shape, "logits"),
                       (no_inputs, "inputs")]:
        refused("verify", "--model", FIXTURE, "--reference", edited_reference(tmp_path, edit), words=[word])


# Names that a micro-batch's tokens index: all but the model's tensors and the scalars
def is_of_tokens(name):
    return name in ("inputs", "targets", "logits") or name.startswith("router.")


def put(header, tensors, name, dtype, shape, values):
    tensors[name] = struct.pack(f"<{len(values)}{'f' if dtype == 'F32' else 'i'}", *values)
    header[name] = {"dtype": dtype, "shape": shape}


def put_lengths(header, tensors, lengths):
    """The same tokens as sequences one after another."""
    for name, t in header.items():
        if is_of_tokens(name):
            t["shape"] = [1, t["shape"][0] * t["shape"][1], *t["shape"][2:]]
    put(header, tensors, "lengths", "I32", [len(lengths)], lengths)


@pytest.mark.parametrize("name", ["regular", "odd", "all_experts", "normalized"])
def test_verify_lengths_of_rows(tmp_path, name):
    """B rows of T tokens are B sequences of this length: not one digit of the output is another. Sequences that end
    elsewhere are others."""
    model = FIXTURES / name
    rows = ok("verify", "--model", model, "--reference", model / "reference.safetensors")

    def edit(header, tensors):
        B, T = header["inputs"]["shape"]
        put_lengths(header, tensors, [T] * B)
    assert ok("verify", "--model", model, "--reference", edited_reference(tmp_path, edit, model)) == rows

    def edit_wrong(header, tensors):
        B, T = header["inputs"]["shape"]
        put_lengths(header, tensors, [T - 1, 1] + [T] * (B - 1))
    result = run("verify", "--model", model, "--reference", edited_reference(tmp_path, edit_wrong, model))
    assert result.returncode == 1 and result.stdout.splitlines()[1].startswith("logits")
    assert "FAILED" in result.stdout.splitlines()[1]


def test_verify_lengths_of_prefixes(tmp_path):
    """What a token computes depends on those before it alone: parts of the fixture's rows, in any order, from each
    row's first token on."""
    model, taken = FIXTURES / "odd", [(1, 7), (0, 1), (2, 33), (0, 1), (1, 1), (0, 20)]         # row, tokens

    def edit(header, tensors):
        T = header["inputs"]["shape"][1]
        N = sum(n for _, n in taken)
        for name in list(header):
            if name == "targets" or not is_of_tokens(name):
                del header[name], tensors[name]
                continue
            bytes = len(tensors[name]) // math.prod(header[name]["shape"][:2])                  # of a token
            tensors[name] = b"".join(tensors[name][row * T * bytes:][:n * bytes] for row, n in taken)
            header[name]["shape"] = [1, N, *header[name]["shape"][2:]]
        put(header, tensors, "lengths", "I32", [len(taken)], [n for _, n in taken])
    out = ok("verify", "--model", model, "--reference", edited_reference(tmp_path, edit, model))
    assert out.splitlines()[-1].startswith("5 tensors compared, 5 in the reference")


@pytest.mark.parametrize("name, divisor", [("regular", "valid"), ("odd", "all")])
def test_verify_weights(tmp_path, name, divisor):
    """All of them one over the number of targets, or over the number of tokens: that is ce_divisor. Another weight of
    one target is another loss."""
    model = FIXTURES / name

    def verify(factor):
        def edit(header, tensors):
            B, T = header["inputs"]["shape"]
            targets = struct.unpack(f"<{B * T}i", tensors["targets"])
            valid = [i for i in range(B * T) if targets[i] >= 0]
            weights = [1e9] * (B * T)                           # an ignored target's weight does not count
            for i in valid:
                weights[i] = 1 / (B * T if divisor == "all" else len(valid))
            weights[valid[5]] *= factor
            put(header, tensors, "weights", "F32", [B, T], weights)
        path = edited_reference(tmp_path, edit, model, ce_divisor=None)
        return run("verify", "--model", model, "--reference", path)

    assert verify(1).stdout.splitlines()[-1].endswith("they agree")
    result = verify(1.5)
    failed = [line.split()[0] for line in result.stdout.splitlines() if "FAILED" in line]
    assert result.returncode == 1 and {"loss", "ce_loss", "grad.lm_head.weight", "losses"} <= set(failed)
    assert not {"logits", "lb_loss", "z_loss"} & set(failed)


def test_verify_bad_lengths_and_weights(tmp_path):
    """A line that says what is wrong, and no other."""
    def lengths(values, dtype="I32", shape=None):
        def edit(header, tensors):
            put_lengths(header, tensors, [])
            put(header, tensors, "lengths", dtype, shape or [len(values)], values)
        return edit

    def rows(header, tensors):
        put(header, tensors, "lengths", "I32", [2], [3, 3])

    def no_inputs(header, tensors):
        put_lengths(header, tensors, [3, 3])
        del header["inputs"], tensors["inputs"]

    for edit, words in [
            (lengths([3.0, 3.0], "F32"), ["lengths is F32", "I32"]),
            (lengths([3, 3], shape=[1, 2]), ["lengths should be I32 [S]"]),
            (lengths([], shape=[0]), ["lengths should be I32 [S]"]),
            (lengths([3, 0, 3]), ["lengths[1] is 0"]),
            (lengths([3, 4, -1]), ["lengths[2] is -1"]),
            (lengths([65, -59]), ["lengths[0] is 65", "max_position_embeddings", "64"]),
            (lengths([-2147483648]), ["lengths[0] is -2147483648"]),
            (lengths([3, 2]), ["sum to 5", "6 tokens"]),
            (lengths([3, 3, 1]), ["sum to 7", "6 tokens"]),
            (lengths([64] * 50), ["sum to 3200", "6 tokens"]),
            (rows, ["[1, N]", "[2, 3]"]), (no_inputs, ["needs a tensor `inputs`"])]:
        refused("verify", "--model", FIXTURE, "--reference", edited_reference(tmp_path, edit), words=words)

    def weights(values, dtype="F32", shape=(2, 3), without=()):
        def edit(header, tensors):
            put(header, tensors, "weights", dtype, list(shape), values)
            for name in without:
                del header[name], tensors[name]
        return edit

    good = [1 / 6] * 6
    for edit, divisor, words in [
            (weights([1] * 6, "I32"), None, ["weights is I32", "F32"]),
            (weights(good, shape=[1, 6]), None, ["weights has shape [1,6]", "[2,3]"]),
            (weights(good[1:], shape=[5]), None, ["weights has shape [5]"]),
            (weights([*good[1:], math.nan]), None, ["weights has nan at 5"]),
            (weights([math.inf, *good[1:]]), None, ["weights has inf at 0"]),
            (weights(good, without=["targets"]), None, ["`targets`"]),
            (weights(good), "valid", ["ce_divisor", "`weights`"])]:
        path = edited_reference(tmp_path, edit, ce_divisor=divisor)
        refused("verify", "--model", FIXTURE, "--reference", path, words=words)
    path = edited_reference(tmp_path, weights(good), ce_divisor=None)
    assert ok("verify", "--model", FIXTURE, "--reference", path).splitlines()[-1].endswith("they agree")


def test_launches_are_checked(data, straight, tmp_path):
    """--sync and --check-finite change no number. The first result that is not finite is named by its kernel."""
    lines = []
    for name, more in (("plain", []), ("sync", ["--sync"]), ("finite", ["--check-finite"])):
        ok(*train_args(data, tmp_path / name, "--steps", 2, "--val", data / "train.npy", "--val-batches", 1, *more))
        lines.append(steps(tmp_path / name))
    assert lines[0] == lines[1] == lines[2]
    shutil.copytree(straight / "step-00000020", tmp_path / "model")
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.0.input_layernorm.weight"):
        set_value(tmp_path / "model" / "model.safetensors", name, 3, 3e38)      # products that overflow, or a norm
        args = train_args(data, tmp_path / "out", "--steps", 2, "--check-finite")
        args[1:3] = ["--model", tmp_path / "model"]
        kernel = "matmul of layer 1" if "v_proj" in name else "rmsnorm_forward_kernel of layer 0"
        refused(*args, words=[f"olmoe: {kernel}: what it wrote to ", " is not finite, first ", "inf at "])
    model = FIXTURES / "odd"
    for more in (["--sync"], ["--check-finite"]):
        verified = ok("verify", "--model", model, "--reference", model / "reference.safetensors", *more)
        assert verified.endswith("they agree\n")
    texts = {ok("generate", "--model", model, "--ids", "1,2", "--max-tokens", 5, "--seed", 3, *more)
             for more in ([], ["--sync"], ["--check-finite"])}
    assert len(texts) == 1


def test_info():
    out = ok("info", "--config", ROOT / "configs" / "olmoe-1b-7b.json")
    assert "6919161856" in out and "1282017280" in out and "7.879 GFLOP" in out


def test_info_model(straight):
    assert "all there" in ok("info", "--model", straight / "step-00000020")


def info_json(*args):
    return json.loads(ok("info", "--json", *args))


def test_info_json():
    """Counts by closed formulas, and tensors that tile the flat order."""
    path = ROOT / "configs" / "tiny.json"
    config, T = json.loads(path.read_text()), 100
    L, C, V = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    E, K, F = config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    info = info_json("--config", path, "--seq", T)
    assert all(info["config"][name] == config[name] for name in ("hidden_size", "num_experts", "vocab_size"))
    assert info["precision"] in ("FP32", "BF16") and info["seq"] == T
    groups = {"embedding": V * C, "norms": C + 4 * L * C, "attention": 4 * L * C * C, "router": L * E * C,
              "experts": 3 * L * E * F * C, "head": V * C}
    active = sum(groups.values()) - groups["experts"] * (E - K) // E
    assert info["groups"] == groups
    assert info["parameters"] == sum(groups.values()) and info["active_parameters"] == active
    assert info["flops_per_token"] == 6 * (active - V * C) + 6 * L * C * T

    at, by_group = 0, dict.fromkeys(groups, 0)
    kinds = {"embedding": "lookup", "norms": "norm", "experts": "experts"}
    for tensor in info["tensors"]:
        assert tensor["offset"] == at and tensor["count"] == math.prod(tensor["shape"])
        assert tensor["kind"] == kinds.get(tensor["group"], "matrix")
        layer = re.match(r"model\.layers\.(\d+)\.", tensor["name"])
        assert tensor["layer"] == (int(layer[1]) if layer else None)
        at += tensor["count"]
        by_group[tensor["group"]] += tensor["count"]
    assert at == info["parameters"] and by_group == groups

    memory = info["memory"]
    bytes = info["parameters"] * (4 if info["precision"] == "FP32" else 2)
    assert bytes <= memory["parameters"] == memory["gradients"] < 1.1 * bytes
    assert memory["sum"] == sum(size for part, size in memory.items() if part != "sum")


def test_info_json_of_ranks():
    """Shares of memory are a rank's; the tensors are the model's."""
    args = ["--config", ROOT / "configs" / "tiny.json", "--batch", 1]
    alone, share = info_json(*args), info_json(*args, "--gpus", 4, "--ep", 2, "--zero", 1)
    assert share["tensors"] == alone["tensors"] and share["groups"] == alone["groups"]
    assert share["memory"]["parameters"] < 0.9 * alone["memory"]["parameters"]
    assert share["memory"]["optimizer"] < 0.3 * alone["memory"]["optimizer"] and "arriving rows" in share["memory"]


def test_info_estimates_what_cuda_and_nccl_take():
    """Not part of the plan's sum, and named as an estimate; what fits a GPU leaves room for it."""
    args = ["--config", ROOT / "configs" / "tiny.json", "--batch", 1]
    estimates = [info_json(*args, *more)["overhead_estimate"] for more in (
        [], ["--gpus", 8], ["--gpus", 8, "--ep", 8], ["--gpus", 8, "--ep", 2])]
    # CUDA; a communicator of all ranks; and exchanges with 7 others; and two smaller groups, exchanges with one
    assert estimates == [500e6, 2100e6, 5390e6, 5770e6]
    sum_of = info_json(*args)["memory"]["sum"]
    for memory, word in ((sum_of + 600e6, "yes"), (sum_of + 400e6, "no")):
        out = ok("info", *args, "--memory", memory / 1e9)
        assert re.search(rf"\| {word} +\| fp32, fp32:", out) and "500 MB more of a GPU (estimate)" in out


def test_info_json_of_a_model(straight):
    """Names and shapes are those of the files, in whatever order these have them."""
    checkpoint = straight / "step-00000020"
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    names = [tensor["name"] for tensor in info_json("--model", checkpoint)["tensors"]]
    assert len(set(names)) == len(names) and set(names) == set(index)
    for model in [checkpoint, FIXTURES / "odd", FIXTURES / "bf16"]:
        raw = (model / "model.safetensors").read_bytes()
        header = json.loads(raw[8:8 + struct.unpack("<Q", raw[:8])[0]])
        header.pop("__metadata__", None)
        info = info_json("--model", model)
        shapes = {tensor["name"]: tensor["shape"] for tensor in info["tensors"]}
        assert shapes == {name: tensor["shape"] for name, tensor in header.items()}
        assert info["dtypes"] == {header["lm_head.weight"]["dtype"]: info["parameters"]}


def test_tokenize(tmp_path):
    """Options, environment and what is printed; the rules are in test_data.py."""
    documents = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(30000))
    (tmp_path / "a.jsonl").write_text(documents + "{\n")
    printed = set()
    for threads in ("1", "3", ""):
        (tmp_path / threads / "out").mkdir(parents=True)
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        if threads:
            environment["OMP_NUM_THREADS"] = threads
        result = run("tokenize", "--tokenizer", "bytes", "--out", "out/x.npy", "--max-tokens", 200000,
                     "--save-every", 100000, tmp_path / "a.jsonl", cwd=tmp_path / threads, env=environment)
        assert result.returncode == 0
        assert result.stderr == f"{tmp_path}/a.jsonl:30001: not JSON from byte 2 on; left out\n"
        printed.add(result.stdout)
    assert printed == {"out/x.npy: 30000 documents, 438890 tokens in 3 files, 1 damaged lines left out\n"}
    assert files(tmp_path / "1" / "out") == files(tmp_path / "3" / "out") == files(tmp_path / "out")
    assert len(files(tmp_path / "out")) == 6
    refused("tokenize", "--tokenizer", "bytes", "--out", tmp_path / "out" / "x.npy", "--max-tokens", 200000,
            tmp_path / "a.jsonl", words=["x-00000.npy", "--restart"])
    command = [OLMOE, "tokenize", "--tokenizer", "bytes", "--out", tmp_path / "y.npy", tmp_path / "a.jsonl"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and "standard output" in result.stderr.splitlines()[-1]


def pause(process):
    """Stops a process, and returns when it has stopped or ended: on a busy machine that takes a while."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def is_locked(path):
    """By a process that is stopped. One that was stopped between creating the file and locking it has no lock."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def test_tokenize_two_at_a_time(tmp_path):
    """A second run into the same file is refused, and does the first no harm."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(30000)))
    command = ["tokenize", "--tokenizer", "bytes", "--out", tmp_path / "x.npy"]
    ok(*command, tmp_path / "a.jsonl")
    before = files(tmp_path)
    for _ in range(50):                     # once more where the first run has ended before it was seen
        first = popen([OLMOE, *map(str, command), tmp_path / "a.jsonl"], stdout=subprocess.DEVNULL)
        pause(first)
        while not is_locked(tmp_path / "x.npy.tmp") and first.poll() is None:
            first.send_signal(signal.SIGCONT)
            time.sleep(0.001)
            pause(first)
        seen = is_locked(tmp_path / "x.npy.tmp")
        if seen:
            refused(*command, tmp_path / "a.jsonl", words=["x.npy.tmp", "another run"])
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0 and files(tmp_path) == before
        if seen:
            return
    pytest.fail("never saw the first run while it wrote")


def unprivileged():
    """For preexec_fn: rights to files are those of their mode, for root too."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):               # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)     # PR_CAPBSET_DROP


def test_folder_that_cannot_be_listed(data, tmp_path):
    """What is written there is complete, and no earlier file passes for it."""
    folder, text = tmp_path / "d", tmp_path / "in.txt"
    folder.mkdir()

    def do(*args):
        args = [OLMOE, *map(str, args)]
        result = subprocess.run(args, capture_output=True, text=True, preexec_fn=unprivileged, timeout=120)
        folder.chmod(0o700)
        return result
    for content in ("one\n", "one two three\n", "one two three four\n"):
        text.write_text(content)
        folder.chmod(0o300)
        result = do("tokenize", "--tokenizer", "bytes", "--out", folder / "x.npy", text)
        n = len(content)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"{folder}/x.npy: 1 documents, {n} tokens\n"
        assert (folder / "x.npy").read_bytes() == struct.pack(f"<{n}H", *content.strip().encode(), 256)
        assert sorted(os.listdir(folder)) == ["x.csv.gz", "x.npy"]
    for out in (folder / "run", folder):
        folder.chmod(0o300)
        result = do(*train_args(data, out, "--steps", 1))
        assert result.returncode == 0, result.stderr
        assert len(files(out / "step-00000001")) > 5 and not list(out.glob(".step*"))
    lines, first = (folder / "log.jsonl").read_text(), files(folder / "step-00000001")
    for resume in ([], ["--resume"]):       # what can't be seen is not replaced
        folder.chmod(0o300)
        result = do(*train_args(data, folder, "--steps", 2, *resume))
        assert result.returncode == 1 and result.stderr.count("\n") == 1 and "cannot be listed" in result.stderr
        assert (folder / "log.jsonl").read_text() == lines and files(folder / "step-00000001") == first


def test_tokenize_progress(tmp_path):
    """A bar on a terminal, and only there; a damaged line is reported on a line of its own."""
    with open(tmp_path / "a.jsonl", "w") as f:
        for part in range(40):
            f.writelines(json.dumps({"text": f"document {i} of part {part}", "id": str(i)}) + "\n"
                         for i in range(10000))
            f.write("{\n")
    command = [OLMOE, "tokenize", "--tokenizer", "bytes", "--out", tmp_path / "x.npy", tmp_path / "a.jsonl"]
    terminal, end = pty.openpty()
    process = popen(command, stdout=subprocess.PIPE, stderr=end, text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(end)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:                     # the other end of the terminal is closed
            break
    os.close(terminal)
    tokens = (tmp_path / "x.npy").stat().st_size // 2
    assert process.wait() == 0
    assert process.stdout.read() == f"{tmp_path}/x.npy: 400000 documents, {tokens} tokens, 40 damaged lines left out\n"
    bars = re.findall(r"\r\[(#*) *\] +(\d+) % \| ([\d.]+) MB/s \| ([\d.]+) M tok/s \| eta 0h\d\dm\d\ds\x1b\[K",
                      shown.decode())
    assert bars and all(len(bar) == int(share) // 5 for bar, share, *_ in bars) and shown.endswith(b"\r\x1b[K")
    assert float(bars[-1][2]) > 0 and float(bars[-1][3]) > 0
    assert shown.count(b"\r\x1b[K" + str(tmp_path).encode() + b"/a.jsonl:") == 21
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and len(result.stderr.splitlines()) == 21
    assert "\r" not in result.stderr and "\x1b" not in result.stderr + result.stdout


def test_help():
    for command in ["train", "verify", "info", "tokenize", "generate"]:
        out = ok(command, "--help")
        assert out.startswith(f"usage: olmoe {command}") and "--" in out
        assert "--name=VALUE" in out
    assert "train" in ok("--help")


def test_verify_every_tensor_is_compared(tmp_path):
    """A name that is read like a layer's but is not looked up must not pass for compared."""
    def edit(header, tensors):
        header["router.00.logits"] = header.pop("router.0.logits")
        tensors["router.00.logits"] = tensors["router.0.logits"]
    result = run("verify", "--model", FIXTURE, "--reference", edited_reference(tmp_path, edit))
    assert result.returncode == 1 and "agree\n" not in result.stdout


def test_verify_nan_elementwise(tmp_path):
    """Also with an absolute tolerance, a NaN that is not the last element fails."""
    def edit(header, tensors):
        b = bytearray(tensors["logits"])
        struct.pack_into("<f", b, 4 * 5, float("nan"))
        tensors["logits"] = bytes(b)
    path = edited_reference(tmp_path, edit, atol="1e-3")
    result = run("verify", "--model", FIXTURE, "--reference", path)
    failed = [line for line in result.stdout.splitlines() if "FAILED" in line]
    assert result.returncode == 1 and len(failed) == 1 and failed[0].startswith("logits (elementwise)")


def test_hangup_saves(data, tmp_path):
    process = start(*train_args(data, tmp_path, "--steps", 4000, "--schedule", "constant"))
    wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and list(tmp_path.glob("step-*"))


def test_hangup_under_nohup(data, tmp_path):
    """nohup ignores SIGHUP, and so does what it starts."""
    process = start(*train_args(data, tmp_path, "--steps", 4000, "--schedule", "constant"), hangup=signal.SIG_IGN)
    wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGHUP)
    wait_for_step(tmp_path, steps(tmp_path)[-1]["step"] + 3)
    assert process.poll() is None and not list(tmp_path.glob("step-*"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0 and list(tmp_path.glob("step-*"))
