"""The tokenizer against vectors that `tokenizers` made, with a small tokenizer.json of its family, and with OLMoE's own
where OLMOE_DATA has it. C++ runs under the address and undefined-behaviour sanitizers; slow tests run without them."""
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import nasty
from words import words

FIXTURE = ROOT / "tests" / "fixtures" / "tokenizer"
VECTORS = json.loads((FIXTURE / "vectors.json").read_text())
DATA = os.environ.get("OLMOE_DATA", "")
OLMOE = os.path.join(DATA, "tokenizer", "tokenizer.json")
needs_data = pytest.mark.skipif(not (DATA and os.path.exists(OLMOE)),
                                reason="needs OLMoE's tokenizer.json; OLMOE_DATA=FOLDER with tokenizer/ and text/")
ADDED = [token["content"] for token in json.loads((FIXTURE / "tokenizer.json").read_text())["added_tokens"]]


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    flags = {"checked": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "fast": ["-O2"],
             "threads": ["-O1", "-fsanitize=thread"]}
    source = ROOT / "tests" / "test_tokenizer.cpp"

    def build(name):
        subprocess.run(["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags[name], "-o", folder / name, source,
                        "-lz", "-lutf8proc", "-pthread"], check=True)
        return str(folder / name)
    return build


@pytest.fixture(scope="session")
def checked(programs):
    return programs("checked")


@pytest.fixture(scope="session")
def fast(programs):
    return programs("fast")


def drive(program, *commands, fails=False):
    """Runs commands; the lines printed. With fails, the one line on standard error."""
    r = subprocess.run([program], input=words(*commands), capture_output=True, text=True)
    if fails:
        assert r.returncode == 1, (r.returncode, r.stderr)
        assert r.stderr.count("\n") == 1 and r.stderr.endswith("\n"), r.stderr
        return r.stderr.strip()
    assert r.returncode == 0 and r.stderr == "", r.stderr
    return r.stdout.splitlines()


def encode(program, tokenizer, texts):
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    lines = drive(program, f"open {tokenizer}", *(f"encode {text.hex()}" for text in raw))
    return [[int(x) for x in line.split()] for line in lines[1:]]


def encode_file(program, tokenizer, texts, folder):
    """ids, and the texts they decode to."""
    nasty.write_texts(folder / "texts", texts)
    drive(program, f"open {tokenizer}", f"file {folder / 'texts'} {folder / 'ids'}")
    return nasty.read_ids(folder / "ids"), nasty.read_texts(folder / "ids.text")


def decode(program, tokenizer, ids, skip=0):
    return bytes.fromhex(drive(program, f"open {tokenizer}", f"decode {skip} {' '.join(map(str, ids))}")[1]).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Encode

def test_vectors(checked):
    strings = [text for text, _ in VECTORS["strings"]]
    for text, ours, (_, theirs) in zip(strings, encode(checked, FIXTURE, strings), VECTORS["strings"]):
        assert ours == theirs, text


def test_nasty(checked, tmp_path):
    ids, texts = encode_file(checked, FIXTURE, nasty.nasty_strings(1, 10000, ADDED), tmp_path)
    assert nasty.digests(ids, texts) == VECTORS["nasty"]


# From the releases of OLMoE and from transformers' tests of it
OLMOE_VECTORS = {
    "Hello world": [12092, 1533], "Bitcoin is": [12871, 9669, 310], "  two spaces": [50276, 9389, 8470],
    "a    b": [66, 50274, 67], "def f(x):\n    return x\n": [1545, 269, 9, 89, 2262, 187, 50274, 2309, 1269, 187],
    " " * 26 + "z": [50254, 50276, 91], "naïve café": [2072, 30180, 36241], "e\u0301": [860],
    "日本語": [49868, 19119, 241], "😀": [14931, 235, 211], "I'm don't": [42, 1353, 1053, 626],
    "1234567 3.14": [42594, 2251, 495, 15, 1047], " A": [329], " B": [378], " C": [330], " D": [399],
    " yes": [4754], " no": [642], "Question: x\nAnswer:": [23433, 27, 1269, 187, 32869, 27],
    "A sample test": [34, 3410, 1071], "This is a test": [1552, 310, 247, 1071],
    "生活的真谛是": [20025, 46549, 5225, 48561, 33656, 238, 12105], "Hi  Hello": [12764, 50276, 12092],
    "Hi   Hello": [12764, 50275, 12092], "": [], " ": [209], "  ": [50276], " Hello": [24387], "\t": [186],
    "\n": [187], "\n\n": [535],
    "<|endoftext|><|user|>\nHi\n<|assistant|>\n": [50279, 29, 93, 4537, 49651, 187, 12764, 187, 29, 93, 515, 5567,
                                                   49651, 187]}


@needs_data
def test_olmoe_vectors(checked):
    assert drive(checked, f"open {OLMOE}") == ["50279 50280"]
    assert dict(zip(OLMOE_VECTORS, encode(checked, OLMOE, OLMOE_VECTORS))) == OLMOE_VECTORS


@needs_data
def test_olmoe_nasty(fast, tmp_path):
    ids, texts = encode_file(fast, OLMOE, nasty.nasty_strings(2, 10000), tmp_path)
    assert nasty.digests(ids, texts) == VECTORS["olmoe_nasty"]


@needs_data
@pytest.mark.parametrize("name", VECTORS["olmoe_text"])
def test_olmoe_text(fast, tmp_path, name):
    lines = Path(DATA, "text", name).read_bytes().splitlines(keepends=True)
    ids, texts = encode_file(fast, OLMOE, lines, tmp_path)
    assert nasty.digests(ids, texts, 1 << 30) == [VECTORS["olmoe_text"][name]]


def test_invalid_utf8(checked):
    texts = [b"a\xffb", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"a\xe2\x82", b"\xe2\x82z",
             b"\xf0\x9f\x98<|endoftext|>", b"\x80" * 3, b"\xe0\x80\x80", b"\xf8\x88\x80\x80\x80",
             "\U0010ffff".encode(), b"\x00"]
    replaced = [text.decode("utf-8", "replace") for text in texts]
    assert encode(checked, FIXTURE, texts) == encode(checked, FIXTURE, replaced)


def test_where_text_ends(checked):
    """Words of every length at every distance from the end of the text, where fewer bytes may be read."""
    words = [" " + "abcdefghijklmnopqrstuvwxyz"[:n] for n in range(1, 27)]
    alone = encode(checked, FIXTURE, words)
    ends = ["?" * n for n in range(20)]
    for end, ids in zip(ends, encode(checked, FIXTURE, ends)):
        assert encode(checked, FIXTURE, [word + end for word in words]) == [word + ids for word in alone]


def test_words_alike(checked, tmp_path):
    """Words of one length that differ in one byte are not mistaken for each other, whichever byte it is."""
    lines = [b"".join(b" " + b"q" * i + b"xyz"[k:k + 1] + b"q" * (n - i - 1) for k in range(3) for i in range(n))
             for n in range(1, 40)]
    assert encode_file(checked, FIXTURE, lines * 2, tmp_path)[1] == lines * 2


def test_long_words(fast, tmp_path):
    ids, texts = encode_file(fast, FIXTURE, nasty.long_words(), tmp_path)
    assert nasty.digests(ids, texts) == VECTORS["long_words"]


def test_10_mb_without_a_space(fast, tmp_path):
    """In seconds: some 3 on an idle core."""
    r = nasty.Random(7)
    thousand = bytes(b"etaoinshrdlu"[r.below(12)] for _ in range(997))
    for line in (b"z" * (10 << 20), b"".join(thousand[i % 900:] for i in range(20000))[:10 << 20]):
        nasty.write_texts(tmp_path / "texts", [line])
        assert float(drive(fast, f"open {FIXTURE}", f"time 1 {tmp_path / 'texts'}")[1].split()[0]) < 20


def test_many_words(fast, tmp_path):
    """More words than a thread remembers."""
    r = nasty.Random(4)
    lines = [" ".join("%x" % r.below(1 << 24 if i % 2 else 1 << 62) + "z" * (i % 20) for _ in range(500)).encode()
             for i in range(800)]
    once, texts = encode_file(fast, FIXTURE, lines, tmp_path)
    assert texts == lines
    again, _ = encode_file(fast, FIXTURE, lines[::-1] + lines, tmp_path)
    assert again == once[::-1] + once


def test_threads(programs, tmp_path):
    nasty.write_texts(tmp_path / "texts", nasty.nasty_strings(5, 300, ADDED))
    assert drive(programs("threads"), f"open {FIXTURE}", f"threads 4 {tmp_path / 'texts'}")[1] == "1"


def test_two_tokenizers_take_turns(checked, tmp_path):
    other = changed(tmp_path, lambda t: t["model"].update(merges=[]))
    hello = f"encode {b'Hello world'.hex()}"
    lines = drive(checked, *[f"open {FIXTURE}", hello, f"open {other}", hello] * 2)
    assert lines[1] == lines[5] and lines[3] == lines[7] and len(lines[3].split()) == 11 > len(lines[1].split())


# ---------------------------------------------------------------------------------------------------------------------
# Unicode

def test_unicode_tables(fast):
    """Classes, combining classes and compositions of every code point are those of `tokenizers`."""
    header = (ROOT / "lib" / "unicode_differences.h").read_text()
    digest = re.search(r"digest of the tables as they have to be: (\w+)", header).group(1)
    ours = hashlib.sha256("\n".join(drive(fast, "unicode")).encode()).hexdigest()
    wrong = "unicode_differences.h is not for this utf8proc: scripts/make_unicode_differences.py makes it"
    assert ours == digest, wrong


# ---------------------------------------------------------------------------------------------------------------------
# Decode

def test_decode(checked):
    text = "naïve 日本語 😀 a  b"
    ids, = encode(checked, FIXTURE, [text])
    assert decode(checked, FIXTURE, ids) == text
    assert decode(checked, FIXTURE, ids[:1] + [-1, 5000] + ids[1:]) == text
    special = encode(checked, FIXTURE, ["a<|endoftext|>b<|padding|>  c"])[0]
    assert decode(checked, FIXTURE, special) == "a<|endoftext|>b<|padding|>  c"
    assert decode(checked, FIXTURE, special, 1) == "ab  c"


def test_decode_bytes(checked):
    assert decode(checked, "bytes", [104, 105, 0xc3, 0xa9, 256, 300, 0xff]) == "hié\ufffd"


def test_stream(checked):
    """Each piece is whole characters; together they are the text, wherever it is cut, and whatever the ids are."""
    r = nasty.Random(6)
    draws = [[r.below(1260 if i % 2 else 256) for _ in range(r.below(12))] for i in range(300)]
    draws += encode(checked, FIXTURE, ["日本語 😀👩‍👩‍👧 naïve"])
    for tokenizer in (FIXTURE, "bytes"):
        words = [f"{command} {' '.join(map(str, ids))}" for ids in draws for command in ("stream", "decode 0")]
        lines = drive(checked, f"open {tokenizer}", *words)[1:]
        for ids in draws:
            # decoding raises an error where one is not UTF-8
            pieces = [bytes.fromhex(line).decode() for line in lines[:len(ids) + 1]]
            assert "".join(pieces) == bytes.fromhex(lines[len(ids) + 1]).decode(), ids
            lines = lines[len(ids) + 2:]
        assert lines == []


def test_stream_gives_what_is_complete(checked):
    ids = list("aé€😀".encode()) + [0xe2, 0x82, 65, 0xf0, 0x9f, 0xc3]
    lines = drive(checked, "open bytes", f"stream {' '.join(map(str, ids))}")[1:]
    pieces = [bytes.fromhex(line).decode() for line in lines]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "", "", "\ufffdA", "", "", "\ufffd", "\ufffd"]


# ---------------------------------------------------------------------------------------------------------------------
# Chat

def chat(program, generate, *messages):
    words = " ".join(f"{role} {content.encode().hex()}" for role, content in messages)
    line, = drive(program, f"chat {generate} " + words)
    return bytes.fromhex(line).decode()


def test_chat(checked):
    assert chat(checked, 1, ("user", "Hi")) == "<|endoftext|><|user|>\nHi\n<|assistant|>\n"
    messages = [("system", "Be kind. "), ("user", "Hi"), ("assistant", " Hello\n"), ("user", "Bye")]
    assert chat(checked, 0, *messages) == (
        "<|endoftext|><|system|>\nBe kind. \n<|user|>\nHi\n<|assistant|>\n Hello\n<|endoftext|>\n<|user|>\nBye\n")
    assert "the role tool" in drive(checked, "chat 1 tool 41", fails=True)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def changed(folder, change):
    """The fixture's tokenizer.json with a change."""
    t = json.loads((FIXTURE / "tokenizer.json").read_text())
    change(t)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(t))
    return folder / "tokenizer.json"


ADDS_TOKENS = {"type": "TemplateProcessing",
               "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
REFUSALS = {
    "unigram": (lambda t: t.update(model={"type": "Unigram", "vocab": []}), "its model is Unigram"),
    "wordpiece": (lambda t: t.update(model={"type": "WordPiece", "vocab": {}}), "WordPiece"),
    "byte_fallback": (lambda t: t["model"].update(byte_fallback=True), "byte_fallback true"),
    "ignore_merges": (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
    "dropout": (lambda t: t["model"].update(dropout=0.1), "dropout 0.1"),
    "suffix": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "</w>"),
    "normalizer": (lambda t: t.update(normalizer={"type": "NFKC"}), "its normalizer is NFKC"),
    "metaspace": (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "its pre_tokenizer is Metaspace"),
    "sequence": (lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
                 "its pre_tokenizer is Sequence"),
    "no_pre_tokenizer": (lambda t: t.update(pre_tokenizer=None), "its pre_tokenizer is none"),
    "prefix_space": (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    "use_regex": (lambda t: t["pre_tokenizer"].update(use_regex=False), "use_regex"),
    "post_processor": (lambda t: t.update(post_processor=ADDS_TOKENS), "adds tokens"),
    "bert": (lambda t: t.update(post_processor={"type": "BertProcessing"}), "BertProcessing"),
    "decoder": (lambda t: t.update(decoder={"type": "WordPiece"}), "its decoder is WordPiece"),
    "truncation": (lambda t: t.update(truncation={"max_length": 5}), "truncation"),
    "padding": (lambda t: t.update(padding={"strategy": "BatchLongest"}), "padding"),
    "no_vocab": (lambda t: t["model"].pop("vocab"), "no vocab"),
    "merges": (lambda t: t["model"]["merges"].append("zzzz q"), "zzzz q"),
    "merge_type": (lambda t: t["model"]["merges"].append(7), "its merge 7"),
    "byte": (lambda t: t["model"]["vocab"].pop("!"), "byte 33"),
    "id_type": (lambda t: t["model"]["vocab"].update({"!": "0"}), "the id of \"!\""),
    "id_range": (lambda t: t["model"]["vocab"].update({"zq": 1 << 20}), "1048576"),
    "id_twice": (lambda t: t["model"]["vocab"].update({"zqzq": 5}), "the id 5"),
    "two_ids": (lambda t: t["added_tokens"].append({**t["added_tokens"][0], "content": "!", "id": 9}), "two ids"),
    "no_flag": (lambda t: t["added_tokens"][0].pop("lstrip"), "lstrip"),
    "no_content": (lambda t: t["added_tokens"][0].update(content=""), "content"),
    "no_end": (lambda t: t["added_tokens"].pop(0), "nothing ends a document"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(checked, tmp_path, name):
    change, reason = REFUSALS[name]
    path = changed(tmp_path, change)
    message = drive(checked, f"open {path}", fails=True)
    assert message.startswith(f"tokenizer {path}: ") and reason in message


def test_unreadable(checked, tmp_path):
    assert "cannot be read: No such file" in drive(checked, f"open {tmp_path}/none", fails=True)
    assert "cannot be read: No such file" in drive(checked, f"open {tmp_path}", fails=True)
    for text in ("", "{", "[]", "{}", "null", '"x"', "\xff", (FIXTURE / "tokenizer.json").read_text()[:-100]):
        (tmp_path / "tokenizer.json").write_text(text)
        assert "tokenizer.json: " in drive(checked, f"open {tmp_path}", fails=True)


def test_other_ways_to_write_it(checked, tmp_path):
    """Merges as pairs; no normalizer; the post-processor as transformers writes it."""
    strings = [text for text, _ in VECTORS["strings"]]
    ours = encode(checked, FIXTURE, strings)

    def change(t):
        merges = t["model"]["merges"]
        t["model"]["merges"] = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
        single = [{"Sequence": {"id": "A", "type_id": 0}}]
        t["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
        t["pre_tokenizer"].pop("use_regex")
    assert encode(checked, changed(tmp_path, change), strings) == ours

    def spaced(t):
        merges = t["model"]["merges"]
        t["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        t["post_processor"] = None
    assert encode(checked, changed(tmp_path, spaced), strings) == ours

    def sequences(t):                       # of one part each
        for part, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"), ("decoder", "decoders"),
                            ("post_processor", "processors")):
            if t.get(part):
                t[part] = {"type": "Sequence", parts: [t[part]]}
    assert encode(checked, changed(tmp_path, sequences), strings) == ours
    plain = changed(tmp_path, lambda t: t.update(normalizer=None))
    composed = encode(checked, FIXTURE, ["é"])
    assert encode(checked, plain, ["e\u0301"]) != encode(checked, FIXTURE, ["e\u0301"]) == composed


def test_end_of_document(checked, tmp_path):
    """The config beside it decides; in OLMoE's 0125 releases <|endoftext|> is not what ends a document."""
    path = changed(tmp_path, lambda t: None)
    end, vocab = map(int, drive(checked, f"open {path}")[0].split())
    assert encode(checked, path, ["<|endoftext|>"]) == [[end]] and vocab > end
    # a number that no double holds is none of the tokenizer's business
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "more": [1e400, -1e999]}')
    assert drive(checked, f"open {path}") == drive(checked, f"open {tmp_path}") == [f"7 {vocab}"]
    for first in ("[7, 3]", "[null, -1, 7]", "7.0"):
        (tmp_path / "config.json").write_text('{"eos_token_id": %s}' % first)
        assert drive(checked, f"open {tmp_path}") == [f"7 {vocab}"]
    for none in ("null", "-1", "[]", "[null]"):
        (tmp_path / "config.json").write_text('{"eos_token_id": %s}' % none)
        assert drive(checked, f"open {tmp_path}") == [f"{end} {vocab}"]
    for far in ("100000", "4294967303", "1e300", "7.5"):        # 2^32 + 7
        (tmp_path / "config.json").write_text('{"eos_token_id": %s}' % far)
        assert f"eos_token_id {json.loads(far)}" in drive(checked, f"open {tmp_path}", fails=True)
    (tmp_path / "config.json").write_text('{"eos_token_id": 100000}')
    message = drive(checked, f"open {tmp_path}", fails=True)
    assert "eos_token_id 100000, but it has no token of this id" in message and "endoftext" not in message

