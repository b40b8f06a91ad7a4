"""The page of `olmoe routing --page` without a browser: what data it carries, and that no text in it is markup. What it
does is in test_page.py."""
import base64
import json
import re
import subprocess
from html.parser import HTMLParser

import pytest

import routing_pages
from routing_pages import made_up, nasty_data

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
