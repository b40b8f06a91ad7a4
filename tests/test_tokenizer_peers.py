"""tokenizer.h against `tokenizers`: ids, decoded text, NFC, on strings drawn by a seed, with random tokenizers of the
family, with the fixture and, where OLMOE_DATA has it, with OLMoE's own; all code points alone and beside others.

Run by `make test-peers`. PEER_SEED repeats a run, PEER_STRINGS sets the number of strings for each.
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers
os.environ["RUST_BACKTRACE"] = "0"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import nasty

FIXTURE = ROOT / "tests" / "fixtures" / "tokenizer" / "tokenizer.json"
DATA = os.environ.get("OLMOE_DATA", "")
OLMOE = Path(DATA, "tokenizer", "tokenizer.json")
SEED = int(os.environ.get("PEER_SEED") or random.SystemRandom().randrange(10**6))
STRINGS = int(os.environ.get("PEER_STRINGS", 10000))
needs_data = pytest.mark.skipif(not (DATA and OLMOE.exists()),
                                reason="needs OLMoE's tokenizer.json; OLMOE_DATA=FOLDER with tokenizer/ and text/")


@pytest.fixture(scope="module")
def tokenizers():
    return pytest.importorskip("tokenizers", reason="run it by `make test-peers`")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("build") / "test_tokenizer"
    source = ROOT / "tests" / "test_tokenizer.cpp"
    subprocess.run(["g++", "-std=c++17", "-O2", "-o", path, source, "-lz", "-lutf8proc", "-pthread"], check=True)
    return path


def compare(program, tokenizers, path, strings, folder):
    """Returns the texts that our ids decode to."""
    theirs = tokenizers.Tokenizer.from_file(str(path))
    nasty.write_texts(folder / "texts", strings)
    commands = f"open {path}\nfile {folder / 'texts'} {folder / 'ids'}\n"
    r = subprocess.run([program], input=commands, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    ids, texts = nasty.read_ids(folder / "ids"), nasty.read_texts(folder / "ids.text")
    assert len(ids) == len(texts) == len(strings)
    skipped = 0
    for string, ours, text in zip(strings, ids, texts):
        try:
            wanted = theirs.encode(string.decode("utf-8", "replace"), add_special_tokens=False).ids
        except BaseException as e:      # it panics where a token that strips swallows the next one
            if type(e).__name__ != "PanicException":
                raise
            skipped += 1
            continue
        assert ours == wanted, f"PEER_SEED={SEED} {ascii(string)}"
        assert text.decode() == theirs.decode(ours, skip_special_tokens=False), f"PEER_SEED={SEED} {ascii(string)}"
    assert skipped <= len(strings) // 4
    return texts


def test_nasty(program, tokenizers, tmp_path):
    added = [token["content"] for token in json.loads(FIXTURE.read_text())["added_tokens"]]
    compare(program, tokenizers, FIXTURE, nasty.nasty_strings(SEED, STRINGS, added), tmp_path)


@needs_data
def test_olmoe_nasty(program, tokenizers, tmp_path):
    """Between the special tokens, which are cut out first, the text that ids decode to is its NFC."""
    strings = nasty.nasty_strings(SEED, STRINGS)
    nfc = tokenizers.normalizers.NFC().normalize_str
    for string, text in zip(strings, compare(program, tokenizers, OLMOE, strings, tmp_path)):
        pieces = string.decode("utf-8", "replace").split("<|endoftext|>")
        if not any("<|padding|>" in piece for piece in pieces):
            assert text.decode() == "<|endoftext|>".join(map(nfc, pieces)), f"PEER_SEED={SEED} {ascii(string)}"


@needs_data
@pytest.mark.parametrize("by", ["lines", "pieces"])
def test_olmoe_text(program, tokenizers, tmp_path, by):
    texts = [path.read_bytes() for path in sorted(Path(DATA, "text").glob("*.txt"))]
    if by == "lines":
        strings = [line for text in texts for line in text.splitlines(keepends=True)]
    else:
        strings = [text[i:i + (1 << 20)] for text in texts for i in range(0, len(text), 1 << 20)]
    compare(program, tokenizers, OLMOE, strings, tmp_path)


@pytest.mark.parametrize("around", [("", ""), ("a", "b"), (" ", "1"), ("e", "\u0301"), ("\u0345", "\u0334"),
                                    ("[R]", "[L]"), ("word", "word")])
def test_every_code_point(program, tokenizers, tmp_path, around):
    def lines(low):
        code_points = [c for c in range(low, low + 64) if not 0xd800 <= c < 0xe000]
        return "".join(around[0] + chr(c) + around[1] + "\n" for c in code_points).encode()
    strings = [lines(low) for low in range(0, 0x110000, 64)]
    compare(program, tokenizers, FIXTURE, strings, tmp_path)


@pytest.mark.parametrize("number", range(4))
def test_random_tokenizers(program, tokenizers, tmp_path, number):
    """Trained on nasty strings, with added tokens drawn from them, and with every flag by chance."""
    r = random.Random(f"{SEED} {number}")
    texts = [s.decode("utf-8", "replace") for s in nasty.nasty_strings(SEED + number, 500)]
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.normalizer = tokenizers.normalizers.NFC() if number % 2 == 0 else None
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=r.choice([256, 400, 2000]), show_progress=False,
                                             initial_alphabet=alphabet)
    t.train_from_iterator(texts, trainer)
    data = json.loads(t.to_str())
    vocab, added = data["model"]["vocab"], ["<|endoftext|>"]
    while len(added) < 12:
        text = r.choice(texts)
        at = r.randrange(max(1, len(text)))
        content = text[at:at + r.choice([1, 1, 2, 3, 8])]
        if content and content not in added and content not in vocab:
            added.append(content)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    data["added_tokens"] = [{"id": len(vocab) + i, "content": content, **{flag: r.random() < 0.4 for flag in flags}}
                            for i, content in enumerate(added)]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    compare(program, tokenizers, path, nasty.nasty_strings(SEED + number, STRINGS // 4, added), tmp_path)


def test_seed(capsys):
    with capsys.disabled():
        print(f"\nPEER_SEED={SEED}", flush=True)
