"""Pages for test_routing_page.py and test_page.py: data as `olmoe routing` makes it, of made-up choices, and a program
that makes its page with commands/routing_page.h alone."""
import base64
import math
import os
import random
import struct
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SOURCE = """
#include <iostream>
#include <iterator>
#include "commands/routing_page.h"
int main() {
    std::string json{std::istreambuf_iterator<char>(std::cin), {}};
    Json data = json_parse(json);
    if (data.contains("not_utf8")) data["title"] = "a\\xff\\xc3";         // no JSON text can say this
    std::cout << routing_page(data);
}
"""


# Texts of tokens, and names, that a careless page would take for markup, or that move the text around them
NASTY = ["</script>", "<!--", "<script>", "-->", "]]>", "<img src=x onerror=hacked=1>", "&lt;&amp;", "\"'`${hacked=1}",
         "\\u003c/script>", "\0\1\x07\x1b\x7f\x85", "\u2028\u2029\u202e\u200b\ufeff", "שלום", "مرحبا", "👩\u200d🚀",
         "\r", "\n\t", " ", "", "@DATA@", "$&", "\\", "javascript:hacked=1"]


def build(folder):
    """A program that reads the data as JSON and prints the page"""
    source, program = folder / "page.cpp", folder / "page"
    source.write_text(SOURCE)
    subprocess.run(["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}", "-o", program, source],
                   check=True)
    return program


def packed(values, kind):
    return base64.b64encode(struct.pack(f"<{len(values)}{kind}", *values)).decode()


def made_up(pieces, layers=2, experts=4, k=2, seed=0, title="a model", of=None):
    """Data of a page. pieces: (domain, texts of its tokens), a section each. Experts depend on the token, the domain
    and the layer, with noise."""
    rng = random.Random(seed)
    names = list(dict.fromkeys(domain for domain, _ in pieces))
    tokens = [text for _, texts in pieces for text in texts]
    vocab = list(dict.fromkeys(tokens))
    index = {text: i for i, text in enumerate(vocab)}
    taste = {}
    choices, weights, losses, sections = [], [], [], []
    counts = {name: [[0] * experts for _ in range(layers)] for name in names}
    for piece, (domain, texts) in enumerate(pieces):
        sections.append({"domain": names.index(domain), "begin": len(losses), "piece": piece})
        for t, text in enumerate(texts):
            losses.append(65535 if t == 0 else min(65534, round(1000 * rng.expovariate(0.8))))
            for layer in range(layers):
                for key in ((layer, text), (layer, domain)):
                    if key not in taste:
                        taste[key] = [rng.gauss(0, 1.5) for _ in range(experts)]
                scores = [a + b + rng.gauss(0, 0.7) for a, b in zip(taste[layer, text], taste[layer, domain])]
                ranked = sorted(range(experts), key=lambda e: -scores[e])[:k]
                total = sum(math.exp(x) for x in scores)
                choices += ranked
                weights += [round(255 * math.exp(scores[e]) / total) for e in ranked]
                for e in ranked:
                    counts[domain][layer][e] += 1
    n = len(tokens)
    first = [[choices[(p * layers + layer) * k] for p in range(n)] for layer in range(layers)]
    top = [[favourites(tokens, first[layer], e) for e in range(experts)] for layer in range(layers)]
    return {"title": title, "layers": layers, "experts": experts, "k": k, "tokens": n, "of": of or n,
            "domains": [{"name": name, "tokens": sum(len(texts) for domain, texts in pieces if domain == name),
                         "counts": counts[name]} for name in names],
            "vocab": vocab, "ids": packed([index[text] for text in tokens], "H"), "shown": [], "sections": sections,
            "choices": packed(choices, "B"), "weights": packed(weights, "B"), "losses": packed(losses, "H"),
            "saturation": {"top1": [0.5 + 0.4 * layer / layers for layer in range(layers)],
                           "topk": [0.6 + 0.3 * layer / layers for layer in range(layers)]},
            "router": {"entropy": [0.8 * math.log(experts) - 0.05 * layer for layer in range(layers)],
                       "max_over_mean": [1.4 + 0.1 * layer for layer in range(layers)], "dead": [0] * layers},
            "top": top}


def favourites(tokens, first, e):
    all_of, own = {}, {}
    for text, choice in zip(tokens, first):
        all_of[text] = all_of.get(text, 0) + 1
        own[text] = own.get(text, 0) + (choice == e)
    found = [{"text": text, "share": own[text] / n, "count": n} for text, n in all_of.items()
             if n >= 10 and 2 * own[text] > n]
    return sorted(found, key=lambda word: (-word["share"], -word["count"]))[:15]


def nasty_data():
    data = made_up([(name, NASTY * 12) for name in NASTY], title=" ".join(NASTY))
    data["shown"] = [[i, text] for i, text in enumerate(NASTY)]
    return data
