"""The page of `olmoe routing --page` without a browser: what data it carries, and that no text in it is markup. What it
does is in test_page.py."""
import base64
import json
import os
import re
import struct
import subprocess
from html.parser import HTMLParser

import pytest

import routing_pages
from routing_pages import ROOT, made_up, nasty_data

OLMOE = os.path.abspath(os.environ.get("OLMOE", os.path.join(ROOT, "olmoe")))

@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return routing_pages.build(tmp_path_factory.mktemp("page"))


@pytest.fixture
def page(program):
    def make(data):
        done = subprocess.run([program], input=json.dumps(data).encode(), capture_output=True, check=True)
        return done.stdout.decode()
    return make


class Reader(HTMLParser):
    """Elements of a page, and what is inside its scripts"""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.scripts, self.comments, self.script = [], [], {}, [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.script = dict(attrs).get("type", "")
            self.scripts[self.script] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self.script = None

    def handle_data(self, data):
        if self.script is not None:
            self.scripts[self.script] += data

    def handle_comment(self, data):
        self.comments.append(data)


def test_texts_and_names_are_data(page):
    data = nasty_data()
    plain, nasty = Reader(page(made_up([("d", ["a"])]))), Reader(page(data))
    assert nasty.elements == plain.elements and nasty.attributes == plain.attributes
    assert nasty.comments == [] and nasty.scripts[""] == plain.scripts[""]
    assert json.loads(nasty.scripts["application/json"]) == data
    assert "<" not in nasty.scripts["application/json"]


def test_what_is_not_utf8_is_replaced(page):
    read = Reader(page({**made_up([("d", ["a"])]), "not_utf8": True}))
    assert json.loads(read.scripts["application/json"])["title"] == "a\ufffd\ufffd"


def test_the_page_needs_nothing_else(page):
    text = page(made_up([("d", ["a"])]))
    read = Reader(text)
    assert not {"iframe", "img", "object", "embed", "base", "form"} & set(read.elements)
    assert [value for name, value in read.attributes if name in ("href", "src", "action")] == ["data:,"]
    policy = next(value for name, value in read.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert re.findall(r"(?i)https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttp|WebSocket|import\(", text) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|srcdoc", text) == []


def test_the_size_of_the_default_run(page):
    """20,000 tokens of bytes, 4 layers, 2 of 16 experts: under 2 MB"""
    words = "Once upon a time there was a wolf. 12 + 30 = 42\n"
    data = made_up([("story", list(words * 10))] * 42, layers=4, experts=16, k=2)
    data["tokens"] = 20000
    for name, size in (("ids", 2), ("losses", 2), ("choices", 8), ("weights", 8)):
        data[name] = base64.b64encode(base64.b64decode(data[name])[:20000 * size]).decode()
    data["sections"] = [section for section in data["sections"] if section["begin"] < 20000]
    assert 500_000 < len(page(data).encode()) < 2_000_000


# ------------------------------------------------------------------------------------------------
# What olmoe routing puts into it

def unpacked(text, kind):
    data = base64.b64decode(text)
    return struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data)


def test_page_of_two_texts(page, tmp_path):
    """All tokens of both texts are on the page: so its choices add up to the counts, and its texts to the files. No
    piece ends within a character."""
    seq = 50
    texts = {"a <b> & c": "</script><!-- 5 < 6 & é 👩\u200d🚀 \0\x1b\t\n", "other": "Once upon a time there was\n"}
    texts = {name: (text + "." * (seq - len(text.encode()))) * 30 for name, text in texts.items()}
    for name, text in texts.items():
        (tmp_path / f"{name}.v1.txt").write_text(text, newline="")
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    subprocess.run([OLMOE, "routing", "--model", f"{ROOT}/tests/fixtures/finetune/model-bytes", "--tokenizer", "bytes",
                    "--seq", str(seq), "--data", *(tmp_path / f"{name}.v1.txt" for name in texts), "--out", out,
                    "--page", html], check=True, capture_output=True)
    analysis, read = json.loads(out.read_text()), Reader(html.read_text())
    assert read.comments == [] and len(read.scripts) == 2
    assert read.scripts[""] == Reader(page(made_up([("d", ["a"])]))).scripts[""]
    data = json.loads(read.scripts["application/json"])
    layers, experts, k, n = (data[name] for name in ("layers", "experts", "k", "tokens"))
    assert [layers, experts, k, n] == [analysis[name] for name in ("layers", "experts", "k", "tokens")]
    assert data["of"] == n
    assert [(d["name"], d["tokens"], d["counts"]) for d in data["domains"]] == \
        [(name, d["tokens"], d["counts"]) for name, d in analysis["domains"].items()]
    assert [d["name"] for d in data["domains"]] == list(texts)

    ids, losses = unpacked(data["ids"], "H"), unpacked(data["losses"], "H")
    choices, weights = unpacked(data["choices"], "B"), unpacked(data["weights"], "B")
    assert len(ids) == len(losses) == n and len(choices) == len(weights) == n * layers * k
    lengths = [len(text.encode()) for text in texts.values()]
    assert n == sum(lengths) and all(length % seq == 0 for length in lengths)
    assert [section["begin"] for section in data["sections"]] == list(range(0, n, seq))
    assert [section["piece"] for section in data["sections"]] == list(range(n // seq))
    assert [section["domain"] for section in data["sections"]] == [0] * (lengths[0] // seq) + [1] * (lengths[1] // seq)
    assert [p for p, loss in enumerate(losses) if loss == 65535] == list(range(0, n, seq))
    shown = dict(map(tuple, data["shown"]))
    begin = 0
    for domain, (name, text) in enumerate(texts.items()):
        end = begin + lengths[domain]
        assert "".join(shown.get(p, data["vocab"][ids[p]]) for p in range(begin, end)) == text
        for layer in range(layers):
            chosen = [choices[(p * layers + layer) * k:][:k] for p in range(begin, end)]
            counted = analysis["domains"][name]
            assert [sum(e in row for row in chosen) for e in range(experts)] == counted["counts"][layer]
            assert [sum(row[0] == e for row in chosen) for e in range(experts)] == counted["top1"][layer]
        begin = end
    for at in range(0, n * layers * k, k):
        row = weights[at:at + k]
        assert list(row) == sorted(row, reverse=True) and sum(row) <= 256
    assert data["top"] == [[[{"text": analysis["texts"][str(f["id"])], "share": f["share"], "count": f["count"]}
                             for f in of_expert] for of_expert in layer]
                           for layer in analysis["vocabulary"]["input"]["top"]]
    assert data["router"] == analysis["router"] and data["saturation"] is None
    assert data["title"].endswith("model-bytes")
