"""Fine-tuning on rows, as a user meets it: which ids are targets, layouts of ranks, stopping and resuming, what the
reference's log-probabilities cost, frozen tensors, bad input. test_objectives.py compares the numbers with PyTorch.

The program is ./olmoe, or what OLMOE names.
"""
import gzip
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
TOKENIZER = ROOT / "tests/fixtures/tokenizer/tokenizer.json"
EOS = 256                               # of the byte tokenizer, which is also BOS
SHAPE = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 2, "vocab_size": 320,
         "max_position_embeddings": 128, "eos_token_id": EOS, "pad_token_id": 1}
KINDS = ("sft", "dpo", "kto")


def command(ranks, *args):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    return [*launcher, OLMOE, *map(str, args)]


def run(ranks, *args):
    return subprocess.run(command(ranks, *args), capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def user(role, content):
    return {"role": role, "content": content}


def draw_rows(kind, n, seed=0):
    """Rows of all forms, of one token and of more than fit into --seq."""
    r = random.Random(seed)

    some = "a fox owl goes home 12 + 33 = ß ö 你好 yes no".split()

    def words(low, high):
        return " ".join(r.choice(some) for _ in range(r.randint(low, high)))

    def talk():
        return [m for _ in range(r.choice([1, 1, 2]))
                for m in (user("user", words(1, 9)), user("assistant", words(0, 12)))]
    rows = []
    for i in range(n):
        prompt, asked = words(1, 5), talk()
        texts = i % 3 == 0
        if kind == "sft":
            rows.append({"prompt": prompt, "completion": words(1, 9)} if texts else {"messages": asked})
        elif kind == "dpo":
            rows.append({"prompt": prompt, "chosen": words(1, 9), "rejected": words(1, 9)} if texts
                        else {"chosen": asked, "rejected": asked[:-1] + [user("assistant", words(0, 12))]})
        else:
            label = r.random() < 0.5
            rows.append({"prompt": prompt, "completion": words(1, 9), "label": label} if texts
                        else {"prompt": asked[:1], "completion": asked[1:], "label": label})
    return rows


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as f:
        for row in rows:
            f.write((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Models (two of different weights, one of another shape) and 40 rows of each kind"""
    d = tmp_path_factory.mktemp("base")
    script = ROOT / "scripts/make_random_model.py"
    for name, seed, shape in (("model", 1, SHAPE), ("other", 2, SHAPE), ("wider", 1, {**SHAPE, "hidden_size": 40})):
        (d / "shape.json").write_text(json.dumps(shape))
        subprocess.run([sys.executable, script, "--out", d / name, "--config", d / "shape.json", "--seed", str(seed)],
                       check=True, capture_output=True)
    for kind in KINDS:
        write(d / f"{kind}.jsonl", draw_rows(kind, 40))
    return d


def train(base, out, kind, *more, ranks=1, data=None, code=0):
    data = [base / f"{kind}.jsonl"] if data is None else data
    result = run(ranks, "train", "--objective", kind, "--model", base / "model", "--tokenizer", "bytes", "--data",
                 *data, "--out", out, "--global-batch", 8, "--batch", 2, "--seq", 64, "--lr", "1e-3", "--log-every", 1,
                 "--sample-tokens", 1, "--peak-tflops", 1, *more)
    assert result.returncode == code, result.stderr[-3000:]
    return result.stdout if code == 0 else result.stderr


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(path):
    """Name -> list of numbers of a safetensors file"""
    raw = path.read_bytes()
    length, = struct.unpack("<Q", raw[:8])
    found, letters = {}, {"I64": "q", "I32": "i", "U8": "B", "F64": "d", "F32": "f", "BF16": "f"}
    for name, t in json.loads(raw[8:8 + length]).items():
        if name != "__metadata__":
            data = raw[8 + length:][slice(*t["data_offsets"])]
            if t["dtype"] == "BF16":        # the upper half of a float
                data = b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2))
            letter = letters[t["dtype"]]
            found[name] = list(struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data))
    return found


def shown(sequence):
    """[(id, is it a target)] as a text with a * after each target, to read where two differ"""
    return " ".join((chr(i) if 32 < i < 127 else str(i)) + "*" * t for i, t in sequence)


def sequences(out):
    """The sequences of a run, as shown"""
    t = table(out / "rows.safetensors")
    return [shown(list(zip(t["ids"][a:b], t["targets"][a:b]))) for a, b in zip(t["starts"], t["starts"][1:])]


# ---- Which ids are targets

def ids_of(*parts):
    """[(id, is it a target)] of texts, EOS where a part is None; a part (text,) or (None,) is targets."""
    ids = []
    for part in parts:
        chosen = isinstance(part, tuple)
        value = part[0] if chosen else part
        ids += [(i, int(chosen)) for i in ([EOS] if value is None else value.encode())]
    return ids


def marked(*parts):
    return shown(ids_of(*parts))


def early(marked):
    """The same targets from one id earlier, where a span of them begins: as open-instruct's mask has it."""
    targets = [t for _, t in marked]
    return [(i, int(t or (k + 1 < len(targets) and targets[k + 1]))) for k, (i, t) in enumerate(marked)]


U, A, S = "<|user|>\n", "<|assistant|>\n", "<|system|>\n"


def sft(base, tmp_path, rows, *more):
    train(base, tmp_path / "out", "sft", "--steps", 1, "--global-batch", 1, "--batch", 1, "--seq", 128, *more,
          data=[write(tmp_path / "rows.jsonl", rows)])
    return sequences(tmp_path / "out")


def test_targets_of_the_assistant(base, tmp_path):
    space = "\u2003\u00a0\x1c \n"
    rows = [{"messages": [user("system", " be kind "), user("user", space + "hi" + space), user("assistant", "yo  "),
                          user("user", "bye"), user("assistant", "")]},
            {"messages": [user("assistant", "one"), user("assistant", "two"), user("user", "three ")]},
            {"messages": [user("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                          user("assistant", "你好")], "id": 7},
            {"prompt": "1 + 1 =", "completion": "2"}, {"prompt": "a\t", "completion": "b"},
            {"prompt": "", "completion": "\nc "}, {"prompt": " x", "completion": ""}]
    assert sft(base, tmp_path, rows) == [
        marked(None, S + "be kind\n" + U + "hi\n" + A, ("yo",), (None,), "\n" + U + "bye\n" + A, (None,)),
        marked(None, A, ("one",), (None,), "\n" + A, ("two",), (None,), "\n" + U + "three"),
        marked(None, U + "ab\n" + A, ("你好",), (None,)),
        marked(None, "1 + 1 =", (" 2",), (None,)), marked(None, "a\t", ("b",), (None,)),
        marked(None, ("\nc ",), (None,)), marked(None, " x", (" ",), (None,))]


def test_null_is_no_field(base, tmp_path):
    """Rows of both forms that came out of one table have null for the other form's fields."""
    rows = [{"messages": None, "prompt": "a", "completion": "b"},
            {"messages": [user("user", "hi"), user("assistant", "yo")], "prompt": None, "completion": None}]
    assert sft(base, tmp_path, rows) == [marked(None, "a", (" b",), (None,)),
                                         marked(None, U + "hi\n" + A, ("yo",), (None,))]


def test_targets_of_olmoe(base, tmp_path):
    rows = [{"messages": [user("user", "hi"), user("assistant", "yo"), user("user", "bye"), user("assistant", "")]},
            {"messages": [user("assistant", "one"), user("assistant", "two"), user("user", "three"),
                          user("system", "four"), user("assistant", "five")]},
            {"prompt": "1 + 1 =", "completion": "2"}]
    # Spans that begin at the first id are not early there; what no one else spoke before has its header trained.
    assert sft(base, tmp_path, rows, "--label-mask", "olmoe") == [
        shown(early(ids_of(None, U + "hi\n" + A, ("yo",), (None,), "\n" + U + "bye\n" + A, (None,)))),
        marked((None,), (A + "one",), (None,), ("\n" + A + "two",), (None,), "\n" + U + "three\n" + S + "four\n"
               + A[:-1], (A[-1] + "five",), (None,)),
        shown(early(ids_of(None, "1 + 1 =", (" 2",), (None,))))]


def test_prompt_of_a_pair(base, tmp_path):
    """A list of messages for a prompt, as in files for TRL, comes before answers that do not begin with it."""
    asked, chosen, rejected = [user("user", "hi")], [user("assistant", "yo")], [user("assistant", "no")]
    rows = [{"prompt": asked, "chosen": chosen, "rejected": rejected},
            {"prompt": asked, "chosen": asked + chosen, "rejected": asked + rejected},
            {"prompt": "hi", "chosen": asked + chosen, "rejected": asked + rejected}]
    train(base, tmp_path / "out", "dpo", "--steps", 1, "--global-batch", 1, "--batch", 1,
          data=[write(tmp_path / "rows.jsonl", rows)])
    found = sequences(tmp_path / "out")
    assert found[:2] == [marked(None, U + "hi\n" + A, (answer,), (None,)) for answer in ("yo", "no")]
    assert found == found[:2] * 3


def test_many_messages(base, tmp_path):
    """What is cut off is not encoded again and again, and does not change what is before it."""
    long = [user("user", str(i % 10)) for i in range(20000)]
    rows = [{"messages": long + [user("assistant", "yes")]}, {"messages": long[:8] + [user("assistant", "a")] + long}]
    start = time.monotonic()
    a, = sft(base, tmp_path, rows, "--label-mask", "olmoe")
    assert time.monotonic() - start < 10                        # 43 s where each message encodes all before it
    head = ids_of(None, "".join(U + f"{i}\n" for i in range(8)) + A, ("a",), (None,))
    assert a == shown(early(head + ids_of("\n" + U + "0\n" + U + "1\n" + U))[:128])


def test_rows_without_targets(base, tmp_path):
    """Cut at --seq, BOS included, and no EOS is put back; what is left without targets differs between the masks."""
    head = ids_of(None, U + "hi\n" + A)
    rows = [{"messages": [user("user", "hi"), user("assistant", "y" * 40)]},
            {"messages": [user("user", "only a question")]},
            {"messages": [user("user", "hi"), user("assistant", "no"), user("user", "x")]}]
    said = train(base, tmp_path / "a", "sft", "--steps", 1, "--global-batch", 1, "--batch", 1, "--seq", len(head) + 1,
                 data=[write(tmp_path / "rows.jsonl", rows)])
    assert sequences(tmp_path / "a") == [shown(head + [(ord(c), 1)]) for c in "yn"]
    assert "dropped 1 rows without targets" in said and log(tmp_path / "a")[0]["dropped_rows"] == 1
    said = train(base, tmp_path / "b", "sft", "--steps", 1, "--global-batch", 1, "--batch", 1, "--seq", len(head),
                 data=[tmp_path / "rows.jsonl"], code=1)
    assert "dropped 3 rows" not in said and "no row with a target within --seq" in said
    train(base, tmp_path / "c", "sft", "--steps", 1, "--global-batch", 1, "--batch", 1, "--seq", len(head),
          "--label-mask", "olmoe", data=[tmp_path / "rows.jsonl"])
    assert log(tmp_path / "c")[0]["dropped_rows"] == 1 and len(sequences(tmp_path / "c")) == 2


@pytest.mark.parametrize("came", [None, {"chat_template": None, "bos_token": None, "model_max_length": 5}], ids=str)
def test_real_tokenizer(base, tmp_path, came):
    """Merges do not cross from a header into what is said, and EOS is one id. The checkpoint talks in transformers."""
    (tmp_path / "shape.json").write_text(json.dumps({**SHAPE, "vocab_size": 1024, "eos_token_id": 0}))
    subprocess.run([sys.executable, ROOT / "scripts/make_random_model.py", "--out", tmp_path / "model", "--config",
                    tmp_path / "shape.json"], check=True, capture_output=True)
    shutil.copy(TOKENIZER, tmp_path / "model/tokenizer.json")
    if came:
        (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(came))
    rows = [{"messages": [user("user", "the the"), user("assistant", "the end")]},
            {"prompt": "the", "completion": "end"}]
    result = run(1, "train", "--objective", "sft", "--model", tmp_path / "model", "--data",
                 write(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "out", "--batch", 1, "--steps", 1, "--order",
                 "sequential", "--peak-tflops", 1)
    assert result.returncode == 0, result.stderr
    t = table(tmp_path / "out/rows.safetensors")
    both = list(zip(t["ids"], t["targets"]))
    chat, text = both[:t["starts"][1]], both[t["starts"][1]:]
    eos = chat[0][0]
    ends = [k for k, (i, _) in enumerate(chat) if i == eos]
    first = [t for _, t in chat].index(1)
    assert ends == [0, len(chat) - 1] and [t for _, t in chat] == [0] * first + [1] * (len(chat) - first)
    assert text[0] == (eos, 0) and text[-1] == (eos, 1)
    config = json.loads((tmp_path / "out/step-00000001/tokenizer_config.json").read_text())
    assert config["eos_token"] == config["bos_token"] and "add_generation_prompt" in config["chat_template"]
    assert config.get("model_max_length") == (came or {}).get("model_max_length")
    assert (tmp_path / "out/step-00000001/tokenizer.json").read_bytes() == TOKENIZER.read_bytes()


# ---- Layouts

@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """Kind -> the directory of 7 steps on one rank; 40 rows are 5 steps an epoch."""
    d = tmp_path_factory.mktemp("straight")
    for kind in KINDS:
        train(base, d / kind, kind, "--steps", 7, "--save-every", 3, "--val", base / f"{kind}.jsonl", "--val-every", 4)
    return d


FIELDS = ("loss", "ce_loss", "grad_norm", "targets", "chosen_logp", "rejected_logp", "reward_margin", "reward_accuracy",
          "kl", "chosen_reward", "rejected_reward", "val_loss", "val_reward_accuracy", "val_kl")


def same_logs(a, b, at=""):
    """Equal but for rounding: a margin of rewards is a difference of sums of hundreds."""
    a, b = log(a)[1:], log(b)[1:]
    assert len(a) == len(b) and [x["lr"] for x in a] == [x["lr"] for x in b]
    for x, y in zip(a, b):
        assert [f for f in FIELDS if f in x] == [f for f in FIELDS if f in y]
        for f in FIELDS:
            if isinstance(x.get(f), float):
                assert math.isclose(x[f], y[f], rel_tol=1e-4, abs_tol=2e-5), (at, f, x, y)
            else:
                assert x.get(f) == y.get(f), (at, f, x, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [("--batch", 1), ("--batch", 4, "--recompute", 2)], ids=["one", "four"])
def test_micro_batches(base, straight, tmp_path, kind, more):
    train(base, tmp_path / "out", kind, "--steps", 7, "--val", base / f"{kind}.jsonl", "--val-every", 4, *more)
    same_logs(straight / kind, tmp_path / "out")


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun; make setup installs it")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks,more", [(2, ("--ep", 2)), (4, ("--zero", 1, "--recompute", 1))], ids=["ep", "zero"])
def test_ranks(base, straight, tmp_path, kind, ranks, more):
    train(base, tmp_path / "out", kind, "--steps", 7, "--val", base / f"{kind}.jsonl", "--val-every", 4, *more,
          ranks=ranks)
    same_logs(straight / kind, tmp_path / "out")


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun; make setup installs it")
def test_global_load_balancing_of_ragged_rows(base, tmp_path):
    """Over the rows of all ranks, however many tokens each has: a step that is one micro-batch is the same on one rank
    and on two."""
    more = ["--steps", 3, "--lb-coef", 1, "--lb", "global", "--global-batch", 4, "--warmup", 0]
    train(base, tmp_path / "one", "sft", *more, "--batch", 4)
    train(base, tmp_path / "two", "sft", *more, "--batch", 2, ranks=2)
    for x, y in zip(log(tmp_path / "one")[1:], log(tmp_path / "two")[1:]):
        assert x["lb_loss"] > 0.5
        for field in ("loss", "lb_loss", "grad_norm"):
            assert math.isclose(x[field], y[field], rel_tol=1e-5), (field, x, y)


def same_logs_exactly(a, b):
    for x, y in zip(log(a)[1:], log(b)[1:], strict=True):
        for f in FIELDS:
            assert f.startswith("val_") or x.get(f) == y.get(f), (f, x, y)


def test_first_losses_are_ln_2(straight):
    """Policy and reference are the same weights in the first two steps: the first update has rate 0."""
    for line in log(straight / "dpo")[1:3]:
        assert abs(line["loss"] - math.log(2)) < 1e-9 and line["reward_margin"] == 0 and line["reward_accuracy"] == 0
    assert log(straight / "dpo")[1]["lr"] == 0 < log(straight / "dpo")[2]["lr"]
    assert log(straight / "kto")[1]["kl"] == 0 and abs(log(straight / "kto")[1]["loss"] - 0.5) < 1e-9


# ---- Stopping and resuming

@pytest.mark.parametrize("kind", KINDS)
def test_resume(base, straight, tmp_path, kind):
    """From the middle of an epoch, and then longer than the run that was planned: byte for byte as without a stop."""
    out = tmp_path / "out"
    decay = ("--decay-steps", 7, "--warmup", 0.5)
    train(base, tmp_path / "all", kind, "--steps", 7, *decay)
    train(base, out, kind, "--steps", 3, *decay)
    before = table(out / "reference.safetensors") if kind != "sft" else {}
    said = train(base, out, kind, "--steps", 7, *decay, "--resume")
    for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json"):
        assert digest(out / "step-00000007" / name) == digest(tmp_path / "all/step-00000007" / name), name
    for x, y in zip(log(out)[1:], log(tmp_path / "all")[1:]):
        assert {f: x.get(f) for f in FIELDS} == {f: y.get(f) for f in FIELDS}
    if kind == "sft":
        return
    after = table(out / "reference.safetensors")
    known = [v for v in before["rows"] if not math.isnan(v)]
    assert len(known) == 24 * (2 if kind == "dpo" else 1) and len(after["rows"]) == 40 * (2 if kind == "dpo" else 1)
    assert not any(map(math.isnan, after["rows"]))
    assert all(math.isnan(a) or a == b for a, b in zip(before["rows"], after["rows"]))
    assert len(after["mismatched"]) == (56 if kind == "kto" else 0)
    rows = int(re.search(r"reference: (\d+) rows through the reference", said)[1])
    assert rows == (16 if kind == "dpo" else 32)        # kto: of each step, for the mismatched ones
    assert "through the reference" not in train(base, out, kind, "--steps", 7, *decay, "--resume")


@pytest.mark.parametrize("kind,more,words", [
    ("dpo", ("--reference", "other"), "reference_fingerprint"), ("sft", ("--label-mask", "olmoe"), "label_mask"),
    ("sft", ("--freeze", "router"), "freeze"), ("sft", ("--seed", 5), "seed"),
    ("dpo", ("--data", "changed.jsonl"), "data_fingerprint")], ids=str)
def test_resume_refuses(base, straight, tmp_path, kind, more, words):
    rows = draw_rows("dpo", 40)
    rows[20]["chosen"], rows[20]["rejected"] = rows[20]["rejected"], rows[20]["chosen"]
    write(tmp_path / "changed.jsonl", rows)
    out = tmp_path / "out"
    shutil.copytree(straight / kind, out)
    more = [base / m if m == "other" else tmp_path / m if m == "changed.jsonl" else m for m in more]
    said = train(base, out, kind, "--steps", 8, "--resume", *more, code=1)
    assert words in said and len([line for line in said.splitlines() if line.startswith("olmoe: ")]) == 1
    saved = "step-00000007/model.safetensors"
    assert digest(out / saved) == digest(straight / kind / saved)


def started(base, out, kind, *more, data):
    """A run that goes on, and what it prints"""
    return subprocess.Popen(
        command(1, "train", "--objective", kind, "--model", base / "model", "--tokenizer", "bytes", "--data", data,
                "--out", out, "--global-batch", 8, "--batch", 2, "--seq", 64, "--lr", "1e-3", "--log-every", 1,
                "--sample-tokens", 1, "--peak-tflops", 1, "--save-every", 5, *more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_killed(base, tmp_path, kind):
    """While the reference's log-probabilities are computed, and between checkpoints: nothing is lost."""
    data = write(tmp_path / "rows.jsonl", draw_rows(kind, 1000))
    for line in ("reference: log-probabilities of the rows", "step +2/", "step +12/"):
        p = started(base, tmp_path / "killed", kind, "--steps", 100, "--resume", data=data)
        for said in p.stdout:
            if re.match(line, said):
                p.kill()
        assert p.wait() == -signal.SIGKILL, p.stderr.read()
    for out in ("killed", "straight"):
        p = started(base, tmp_path / out, kind, "--steps", 100, "--resume", data=data)
        assert "step 100/100" in p.communicate()[0] and p.returncode == 0
    for name in ("reference.safetensors", "step-00000100/model.safetensors", "step-00000100/optimizer.safetensors"):
        assert digest(tmp_path / "killed" / name) == digest(tmp_path / "straight" / name), name
    same_logs_exactly(tmp_path / "killed", tmp_path / "straight")


def test_stopped_before_the_first_step(base, tmp_path):
    """A signal while the reference's log-probabilities are computed: what is known is kept, as the line says."""
    data = write(tmp_path / "rows.jsonl", draw_rows("dpo", 3000))
    p = started(base, tmp_path / "out", "dpo", data=data)
    for line in p.stdout:
        if line.startswith("reference: log-probabilities of the rows"):
            p.send_signal(signal.SIGTERM)
    said = p.stderr.read()
    assert p.wait() == 1 and len(said.splitlines()) == 1 and "those that are known are in" in said, said
    known = [not math.isnan(v) for v in table(tmp_path / "out/reference.safetensors")["rows"]]
    assert any(known) and not all(known)
    p = started(base, tmp_path / "out", "dpo", "--steps", 1, data=data)
    assert "step 1/1" in (said := p.communicate()[0]) and "rows through the reference" not in said


def test_rows_are_kept(base, tmp_path):
    """Read once; read again where a file, the mask or the length is another."""
    data = write(tmp_path / "rows.jsonl", draw_rows("sft", 20))
    out = tmp_path / "out"
    train(base, out, "sft", "--steps", 1, data=[data])
    before = (out / "rows.safetensors").stat().st_ino
    train(base, out, "sft", "--steps", 2, "--resume", data=[data])
    assert (out / "rows.safetensors").stat().st_ino == before
    os.utime(data, (1, 1))                      # the same rows of a file that may be another: read again, and the same
    train(base, out, "sft", "--steps", 3, "--resume", data=[data])
    assert (out / "rows.safetensors").stat().st_ino != before
    packed = write(tmp_path / "rows.jsonl.gz", draw_rows("sft", 20))
    train(base, tmp_path / "packed", "sft", "--steps", 3, data=[packed])
    assert sequences(tmp_path / "packed") == sequences(out)
    assert not [p for p in out.iterdir() if p.name.endswith(".tmp")]


# ---- The reference, freezing, lengths

def test_another_reference(base, tmp_path):
    """Its log-probabilities are those of a run whose model it is."""
    train(base, tmp_path / "a", "dpo", "--steps", 5, "--reference", base / "other")
    train(base, tmp_path / "b", "dpo", "--steps", 5, "--model", base / "other")
    a, b = (table(tmp_path / x / "reference.safetensors")["rows"] for x in "ab")
    assert a == b and abs(log(tmp_path / "a")[1]["reward_margin"]) > 1e-4


def test_fewer_rows_of_validation(base, tmp_path):
    """KTO's mismatched rows of the last block depend on how many rows it has."""
    more = ("--steps", 2, "--val", base / "kto.jsonl", "--batch", 2)
    train(base, tmp_path / "a", "kto", *more, "--steps", 1, "--decay-steps", 2)
    train(base, tmp_path / "a", "kto", *more, "--decay-steps", 2, "--val-batches", 6, "--resume")
    train(base, tmp_path / "b", "kto", *more, "--decay-steps", 2, "--val-batches", 6)
    a, b = (log(tmp_path / x)[2] for x in "ab")
    assert (a["val_loss"], a["val_kl"]) == (b["val_loss"], b["val_kl"])


def test_reference_of_nan(base, tmp_path):
    """Found at the first row, not after all of them, and it is said which model it is."""
    shutil.copytree(base / "other", tmp_path / "nan")
    file = tmp_path / "nan/model.safetensors"
    raw = bytearray(file.read_bytes())
    length, = struct.unpack("<Q", raw[:8])
    tensor = json.loads(raw[8:8 + length])["model.norm.weight"]
    at = 8 + length + tensor["data_offsets"][0]
    raw[at:at + 4] = struct.pack("<I", 0x7fc07fc0)              # NaN in F32 and in BF16
    file.write_bytes(raw)
    said = train(base, tmp_path / "out", "dpo", "--reference", tmp_path / "nan", code=1)
    assert re.search(r"--reference .*/nan: the log-probability of .*/dpo.jsonl:\d+ is not finite", said), said


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun; make setup installs it")
def test_ranks_with_another_reference(base, tmp_path):
    """A directory of the same name that holds another model on another machine"""
    args = ["train", "--objective", "dpo", "--model", base / "model", "--reference", "ref", "--tokenizer", "bytes",
            "--data", base / "dpo.jsonl", "--out", tmp_path / "out", "--batch", 2, "--seq", 64, "--peak-tflops", 1]
    words = []
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ref").symlink_to(base / name)
        words += [":", "-np", "1", "-wdir", tmp_path / name, OLMOE, *args]
    result = subprocess.run(["mpirun", "--allow-run-as-root", "--oversubscribe", *map(str, words[1:])],
                            capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in result.stderr.splitlines() if line.startswith("olmoe: ")]
    assert result.returncode == 1 and len(lines) == 1 and "other weights than on rank 0" in lines[0], result.stderr
    assert not list((tmp_path / "out").glob("step-*"))


def test_tables_of_another_run(base, straight, tmp_path):
    """Rows and log-probabilities that a killed run left are taken by what they were made from."""
    for name, more in (("mask", ("--label-mask", "olmoe")), ("reference", ("--reference", base / "other"))):
        train(base, tmp_path / name, "dpo", "--steps", 7, *more)
        (tmp_path / f"after-{name}").mkdir()
        for table_name in ("rows.safetensors", "reference.safetensors"):
            shutil.copy(tmp_path / name / table_name, tmp_path / f"after-{name}")
        train(base, tmp_path / f"after-{name}", "dpo", "--steps", 7)
        same_logs_exactly(tmp_path / f"after-{name}", straight / "dpo")


def test_defaults(straight):
    """Those of OLMoE's fine-tuning"""
    for kind, lr, warmup in (("sft", 2e-5, 0.03), ("dpo", 5e-7, 0.1), ("kto", 5e-7, 0)):
        first = log(straight / kind)[0]["config"]
        schedule, losses = first["schedule"], first["losses"]
        assert schedule["kind"] == "hf-linear" and schedule["decay_steps"] == 7
        assert math.isclose(schedule["warmup_steps"], 7 * warmup, abs_tol=1e-12)
        assert (losses["lb_coef"], losses["z_coef"], losses["ce_divisor"]) == (0, 0, "valid")
        assert first["adamw"]["beta2"] == 0.999 and first["adamw"]["weight_decay"] == 0
        assert first["adamw"]["grad_clip"] == 1
        said = run(1, "train", "--objective", kind, "--help").stdout
        assert re.search(rf"--lr X +peak learning rate \({lr:g}\)", said)


def test_plan(base, straight):
    """info plans what train then takes; DPO's micro-batch has two sequences of each row."""
    plans = {}
    for kind in KINDS:
        plan = run(1, "info", "--config", base / "model/config.json", "--objective", kind, "--batch", 2, "--seq", 64)
        plans[kind] = re.search(r"memory: activations +\| +(.*?) +\|", plan.stdout)[1]
    assert plans["sft"] == plans["kto"] != plans["dpo"]
    said = run(1, "info", "--config", base / "model/config.json", "--objective", "dpo", "--batch", 2, "--seq", 64,
               "--rows", 40, "--epochs", 3, "--global-batch", 8, "--mean-length", 30).stdout
    assert "head's first pass" in said and re.search(r"time: run .* 15 steps, 3 epochs of 40 rows", said)
    result = run(1, "info", "--config", base / "model/config.json", "--rows", 5)
    assert result.returncode == 1 and "--rows is for --objective" in result.stderr


@pytest.mark.parametrize("groups", [("router",), ("experts", "norms", "embedding"), ("attention", "head")], ids=str)
def test_freeze(base, tmp_path, groups):
    """A frozen tensor stays as it is and has no state, no memory, no part in the norm; the others train."""
    out = tmp_path / "out"
    more = ("--steps", 2, "--schedule", "constant", "--warmup", 0, "--weight-decay", "0.1")
    train(base, out, "sft", *more, "--freeze", *groups)
    info = json.loads(run(1, "info", "--config", base / "model/config.json", "--json").stdout)
    frozen = {t["name"] for t in info["tensors"] if t["group"] in groups}
    before, after = (table(path / "model.safetensors") for path in (base / "model", out / "step-00000002"))
    assert frozen and {name for name in before if before[name] == after[name]} == frozen
    state = table(out / "step-00000002/optimizer.safetensors")
    assert {name[2:] for name in state} == set(before) - frozen
    train(base, tmp_path / "all", "sft", *more)
    part, whole = log(out)[1], log(tmp_path / "all")[1]
    assert part["grad_norm"] < whole["grad_norm"] and part["loss"] == whole["loss"]
    plan, less = (json.loads(run(1, "info", "--config", base / "model/config.json", "--json", *x).stdout)["memory"]
                  for x in ((), ("--freeze", *groups)))
    assert less["gradients"] < plan["gradients"] and less["optimizer"] < plan["optimizer"]
    train(base, out, "sft", *more, "--freeze", *groups, "--steps", 3, "--resume")
    train(base, tmp_path / "again", "sft", *more, "--freeze", *groups, "--steps", 3)
    assert digest(out / "step-00000003/model.safetensors") == digest(tmp_path / "again/step-00000003/model.safetensors")


def test_padding_costs_nothing(base, tmp_path):
    """A micro-batch of a short and a long row has the tokens of both, and no more."""
    rows = [{"prompt": "a", "completion": "b" * n} for n in (1, 100, 1, 100)]
    out = tmp_path / "out"
    train(base, out, "sft", "--steps", 1, "--seq", 128, "--global-batch", 4, "--ce-divisor", "all", data=[
        write(tmp_path / "rows.jsonl", rows)])
    line = log(out)[1]
    tokens = 2 * (4 + 1) + 2 * (4 + 100)                    # BOS, a, space, b's, EOS
    assert math.isclose(line["tokens_per_s"] * line["ms"] / 1000, tokens, rel_tol=1e-6)
    assert math.isclose(line["loss"], line["ce_loss"] * line["targets"] / tokens, rel_tol=1e-6)


def test_epochs(base, tmp_path):
    """floor(rows / G) steps each; the default is one"""
    for more, steps in (((), 13), (("--epochs", 2), 26), (("--epochs", 0.5), 7)):
        train(base, tmp_path / str(steps), "sft", "--global-batch", 3, "--batch", 3, *more)
        assert len(log(tmp_path / str(steps))) == 1 + steps


def test_rates_of_hf_linear(base, tmp_path):
    """As transformers has it, also where the warm-up is longer than the schedule: the rate is 0 after it."""
    for w, n in ((5, 4), (4, 4), (1.5, 5.5)):
        train(base, tmp_path / f"{w}", "sft", "--steps", 7, "--warmup", w, "--decay-steps", n, "--lr", 1)
        expected = [s / w if s < w else max(0, (n - s) / max(1, n - w)) for s in range(7)]
        rates = [line["lr"] for line in log(tmp_path / f"{w}")[1:]]
        assert all(math.isclose(a, b, rel_tol=1e-8) for a, b in zip(rates, expected, strict=True)), rates


# ---- Bad input

def test_bad_rows_are_left_out(base, tmp_path):
    good = {"sft": {"prompt": "a", "completion": "b"}, "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"},
            "kto": {"prompt": "a", "completion": "b", "label": True}}
    bad = {
        "sft": [("{", "not JSON"), ("[1]", "not a JSON object"), ({"text": "a"}, 'neither "messages" nor'),
                ({"prompt": "a"}, 'no "completion"'), ({"messages": None, "prompt": None}, 'neither "messages" nor'),
                ({"prompt": "a", "completion": None}, 'no "completion"'),
                ({"prompt": 1, "completion": "b"}, "prompt is no text: 1"),
                ({"messages": []}, "messages is no list"), ({"messages": "a"}, "messages is no list"),
                ({"messages": [{"role": "user"}]}, 'a message has no "content"'),
                ({"messages": [user("robot", "a")]}, 'the role "robot" is not one of'),
                ({"messages": [user("user", None)]}, "content is no text")],
        "dpo": [({"chosen": "a"}, 'no "rejected"'), ({"chosen": "a", "rejected": "b"}, 'no "prompt"'),
                ({"prompt": "a", "chosen": "a", "rejected": [user("user", "a")]}, "one of"),
                ({"prompt": "a", "chosen": 5, "rejected": "b"}, "chosen is no text")],
        "kto": [({"prompt": "a", "completion": "b"}, 'no "label"'),
                ({"prompt": "a", "completion": "b", "label": "true"}, "label is neither true nor false"),
                ({"prompt": "a", "completion": "b", "label": 1}, "label is neither true nor false"),
                ({"prompt": "a", "completion": [user("assistant", "b")], "label": True}, "one of")]}
    for kind in KINDS:
        data = write(tmp_path / f"{kind}.jsonl", [row for row, _ in bad[kind]] + ["", good[kind]])
        result = run(1, "train", "--objective", kind, "--model", base / "model", "--tokenizer", "bytes", "--data", data,
                     "--out", tmp_path / f"{kind}-out", "--batch", 1, "--peak-tflops", 1, "--sample-tokens", 1)
        assert result.returncode == 0, result.stderr
        lines = result.stderr.splitlines()
        assert len(lines) == len(bad[kind]), result.stderr
        for number, (line, (_, words)) in enumerate(zip(lines, bad[kind]), 1):
            assert line.startswith(f"{data}:{number}: ") and words in line and line.endswith("; left out"), line
        assert f"left out {len(bad[kind])} bad rows" in result.stdout


def test_files_without_rows(base, tmp_path):
    """A JSON array over many lines, a file of blank lines; a name with a newline in it stays on one line."""
    for name, lines, bad in (("a\nb.jsonl", ["[", "{},", "]"], 3), ("blank.jsonl", ["", "  "], 0)):
        data = write(tmp_path / name, lines)
        said = train(base, tmp_path / "out", "sft", data=[data], code=1).splitlines()
        assert len(said) == bad + 1 and said[-1].startswith("olmoe: ") and "\n" not in said[-1]
        assert f"none of {bad} lines is a row of --objective sft" in said[-1]
        assert all(line.startswith(str(data).replace("\n", "?")) for line in said[:-1]), said


def test_memory_for_rows(base, tmp_path):
    """Where there is too little of it, that is the line, whichever thread of those that encode meets it."""
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "word " * 800000}] * 4)
    for limit in range(60, 400, 20):
        limit <<= 20
        result = subprocess.run(
            command(1, "train", "--objective", "sft", "--model", base / "model", "--tokenizer", "bytes", "--data", data,
                    "--out", tmp_path / "out", "--batch", 1, "--seq", 64, "--steps", 0, "--peak-tflops", 1),
            capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        assert result.returncode in (0, 1), (limit, result.stderr)
        assert "terminate" not in result.stderr and "left out" not in result.stderr, (limit, result.stderr)
        if result.returncode == 0:
            break


@pytest.mark.parametrize("kind,more,words", [
    ("sft", ("--objective", "rlhf"), "is not one of pretrain|sft|dpo|kto"),
    ("dpo", ("--beta", 0), "--beta 0"), ("dpo", ("--beta", -1), "--beta"),
    ("sft", ("--reference", "model"), "--reference"),
    ("dpo", ("--reference", "wider"), "another shape"), ("dpo", ("--reference", "nowhere"), "nowhere"),
    ("sft", ("--steps", "100T"), "no number of steps"), ("sft", ("--warmup", "1T"), "no number of steps"),
    ("sft", ("--steps", 1, "--epochs", 1), "--steps and --epochs"), ("sft", ("--steps", 1.5), "whole number"),
    ("sft", ("--ce-divisor", "some"), "--ce-divisor"), ("sft", ("--ce-divisor", 0), "--ce-divisor"),
    ("sft", ("--freeze", "routers"), "the groups are attention, embedding"),
    ("sft", ("--freeze", "attention", "embedding", "experts", "head", "norms", "router"), "nothing to train"),
    ("sft", ("--label-mask", "all"), "assistant|olmoe"), ("sft", ("--global-batch", 64), "more than the 40 rows"),
    ("sft", ("--data", "model"), "not a regular file"), ("sft", ("--data", "empty.jsonl"), "empty"),
    ("sft", ("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ("sft", ("--data", "table.parquet"), "scripts/rows.py"), ("sft", ("--data", "cut.jsonl.gz"), "cut short"),
    ("pretrain", ("--label-mask", "olmoe"), "--label-mask"), ("pretrain", ("--data", "sft.jsonl"), "text where tokens"),
], ids=str)
def test_refused(base, tmp_path, kind, more, words):
    (base / "empty.jsonl").write_text("")
    (base / "table.parquet").write_bytes(b"PAR1" + bytes(100))
    (base / "cut.jsonl.gz").write_bytes(gzip.compress((base / "sft.jsonl").read_bytes())[:-200])
    files = ("model", "wider", "nowhere", "empty", "table", "cut", "sft.jsonl")
    more = [base / m if isinstance(m, str) and m.startswith(files) and more[0] in ("--data", "--reference") else m
            for m in more]
    data = [base / "sft.jsonl"] if kind == "pretrain" else None
    said = train(base, tmp_path / "out", kind, *more, data=data, code=1)
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("olmoe: ") and words in lines[0], said
    assert not list(tmp_path.glob("out/step-*"))
    if more[0] == "--data" and "cut short" not in words:        # found before there is a directory
        assert not (tmp_path / "out").exists()


def test_other_rows_without_resume(base, straight, tmp_path):
    """Forgotten --resume, or another --out: the rows of the run there stay."""
    shutil.copytree(straight / "sft", tmp_path / "out")
    rows = write(tmp_path / "rows.jsonl", draw_rows("sft", 20, seed=1))
    said = train(base, tmp_path / "out", "sft", data=[rows], code=1)
    assert "holds checkpoints already" in said and len(said.splitlines()) == 1
    assert digest(tmp_path / "out/rows.safetensors") == digest(straight / "sft/rows.safetensors")


def test_no_tokenizer(base, tmp_path):
    result = run(1, "train", "--objective", "sft", "--model", base / "model", "--data", base / "sft.jsonl", "--out",
                 tmp_path / "out")
    assert result.returncode == 1 and "give --tokenizer NAME" in result.stderr
