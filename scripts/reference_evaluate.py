#!/usr/bin/env python3
"""Makes request files and token files, and what plain PyTorch in float64 gives where a model is evaluated on them.

  reference_evaluate.py --all tests/fixtures/evaluate    the committed fixtures again

The models are those of tests/fixtures/finetune. For each of CASES it writes a directory with request files, files of
uint16 tokens, and expected.json: the model, the tokenizer, and of every run (a length, the files that go with it)

  tasks: {NAME: {"table": {"n", "acc", "acc_norm", "acc_bytes", "acc_stderr", "bpb", "ce_loss"},
                 "limits": {N: the table of the first N documents},
                 "documents": [{"doc_id", "label", "logprobs", "tokens", "characters", "bytes", "predictions"}]}}
  perplexity: {NAME: {"loss", "perplexity", "tokens", "bits_per_byte"}}

predictions are the choices by acc, acc_norm and acc_bytes. A query is context + continuation without its last token,
and goes through transformers' model alone, whole, without a cache, as does a piece of a token file. What is not fit to
be compared is drawn again: a query whose router has two experts nearer than MARGIN, and a document whose prediction is
nearer than that to another. PyTorch's float32 has to agree with float64 within half of what the tests allow.
"""
import argparse
import gzip
import json
import math
import os
import random
import re
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import reference
from reference import torch

import numpy
from tokenizers import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL = "tests/fixtures/tokenizer/tokenizer.json"
RELATIVE = 1e-5             # what tests/test_evaluate.py allows
MARGIN = 2e-4               # of a router's logits; of a sum of log-probabilities, relative to it
UNCONDITIONAL = 1_000_000   # documents from here on are no questions

ALPHABETS = [
    ["water", "stone", "when", "It", "of", "the", "people", "there", "Sun", "moon", "which", "two", "goes"],
    ["вода", "камень", "когда", "Он", "люди", "там", "луна", "два"],
    ["νερό", "πέτρα", "Αυτό", "δύο", "και"],
    ["水", "石头", "什么时候", "人们", "月亮", "二"],
    ["みず", "イシ", "いつ", "東京", "ください"],
    ["ماء", "حجر", "متى", "אבן", "מים"],
    ["पानी", "पत्थर", "कब", "नहीं"],
    ["🙂", "👩‍🔬", "🇪🇺", "👍🏽", "🌊🌊"],
    ["cafe\u0301", "n\u0303o", "a\u0302\u0323", "o\u0308k", "caf\u00e9"],      # of which the last is composed
]


def die(message):
    print(f"reference_evaluate.py: {message}", file=sys.stderr)
    sys.exit(1)


# ------------------------------------------------------------------------------------------------
# Requests: a function for each kind of document, from a generator of random numbers to (contexts, continuations,
# label). One context stands for all choices.

def phrase(r, low, high, alphabet=None):
    """So many words, of one alphabet or of any."""
    words = [r.choice(r.choice(ALPHABETS) if alphabet is None else ALPHABETS[alphabet])
             for _ in range(r.randint(low, high))]
    return " ".join(words)


def question(r):
    return f"Question: {phrase(r, 1, 6)}?\nAnswer:"


def shared(r):
    C = r.randint(2, 5)
    return [question(r)], [" " + phrase(r, 1, 3) for _ in range(C)], r.randrange(C)


def by_choice(r):
    """Two options in the place of a blank, and what is after it."""
    before = phrase(r, 1, 5)
    return [f"{before} {phrase(r, 1, 2)}" for _ in range(2)], [" " + phrase(r, 1, 3)] * 2, r.randrange(2)


def partly_shared(r):
    """The first and the last of three choices have one context, the second one that it begins with."""
    context = phrase(r, 3, 5)
    return [context, context[:len(context) // 2], context], [" " + phrase(r, 1, 2) for _ in range(3)], r.randrange(3)


def letters(r):
    """Continuations of one token of the byte tokenizer, and most of them of any other."""
    return [question(r)], r.sample("ABCDEFGH", 4), r.randrange(4)


def lengths(r):
    """One token, and more of them, after the same context."""
    return [question(r)], ["x", " of", " " + phrase(r, 3, 4, 0)], r.randrange(3)


def tied_second(r):
    return [question(r)], [" " + phrase(r, 1, 2)] * 2, 1


def tied_first(r):
    return [question(r)], [" " + phrase(r, 2, 2)] * 3, 0


def single(r):
    return [question(r)], [" " + phrase(r, 1, 2)], 0


def no_context(r):
    return [""], [" " + phrase(r, 1, 2), phrase(r, 1, 1), "y"], r.randrange(3)


def blanks(r):
    """No blank before the continuation, one, two, and one that is no space."""
    word = r.choice(ALPHABETS[0])
    return [question(r)], [word, " " + word, "  " + word, "\u3000" + word], r.randrange(4)


def apart(r):
    """What a tokenizer would join if it saw both parts: ab + ab, a letter and what is put on it, halves of a word."""
    return [phrase(r, 1, 2) + " ab", phrase(r, 1, 2) + " e", phrase(r, 1, 2) + " whe"], ["ab", "\u0301t", "re"], \
        r.randrange(3)


def long_context(r):
    return [phrase(r, 30, 40)], [" " + phrase(r, 1, 1), " " + phrase(r, 2, 2), " " + phrase(r, 3, 3)], r.randrange(3)


def as_long_as(tokens):
    """A continuation of exactly so many bytes, which leaves one token of the context, beside one of a byte."""
    def longest(r):
        return [question(r)], ["z" + "".join(r.choice("abcd ") for _ in range(tokens - 2)) + "e", "z"], r.randrange(2)
    return longest


def spaced(tokens):
    """As as_long_as, where a token is a letter and the blank before it, and so is every token."""
    def longest(r):
        return [question(r)], ["".join(" " + r.choice("bcdfghlnrty") for _ in range(tokens)), " d"], r.randrange(2)
    return longest


def short(r):
    C = r.randint(1, 4)
    return [phrase(r, 1, 3, 0)], r.sample(["a", "b", " d", "q", "!", "7"], C), r.randrange(C)


MIXED = [shared, by_choice, letters, tied_second, single, no_context, blanks, lengths, shared, apart, tied_first,
         partly_shared, long_context, by_choice]
SEVERAL = [shared, by_choice, shared, long_context, shared, by_choice, shared]

# NAME is a file's name up to its first dot. A run: the length, or None for the model's own, and its files.
CASES = {
    "bytes": dict(
        tokenizer="bytes", model="bytes",
        files={"mixed.rc.jsonl": [*MIXED, as_long_as(64)], "alphabets.jsonl.gz": SEVERAL, "alone.jsonl": [shared],
               "short.v1.5shot.jsonl.gz": [short] * 7},
        tokens={"set.validation.npy": 2 * 96 + 33, "other.npy": 96 + 7},
        runs=[(None, ["mixed.rc.jsonl", "alphabets.jsonl.gz"], ["set.validation.npy", "other.npy"], [4]),
              (64, ["alone.jsonl", "mixed.rc.jsonl"], ["other.npy"], [1, 100]),
              (4, ["short.v1.5shot.jsonl.gz"], ["set.validation.npy"], [3])]),
    "words": dict(
        tokenizer=REAL, model="words",
        files={"mixed.jsonl.gz": [*MIXED, spaced(28)], "several.csv.jsonl": SEVERAL},
        tokens={"set.npy": 3 * 96 + 1},
        runs=[(None, ["several.csv.jsonl", "mixed.jsonl.gz"], ["set.npy"], [6]),
              (28, ["mixed.jsonl.gz"], ["set.npy"], [2])]),
}


class Encoder:
    """Text -> ids, without what a tokenizer adds."""

    def __init__(self, name, end):
        self.end = end
        self.tokenizer = None if name == "bytes" else Tokenizer.from_file(os.path.join(ROOT, name))

    def __call__(self, text):
        if self.tokenizer:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        return list(text.encode())

    def size(self, token):
        """Bytes of its text. The vocabulary writes each byte as a character; what ends a document is no text."""
        return 0 if token == self.end else len(self.tokenizer.id_to_token(token)) if self.tokenizer else 1


class Document:
    def __init__(self, doc_id, contexts, continuations, label):
        self.doc_id, self.continuations, self.label = doc_id, continuations, label
        self.contexts = contexts * len(continuations) if len(contexts) == 1 else contexts

    def pairs(self):
        return list(zip(self.contexts, self.continuations, strict=True))

    def lines(self):
        return [{"request_type": "loglikelihood", "doc": {"query": context, "gold": self.label},
                 "request": {"context": context, "continuation": continuation}, "idx": i, "task_name": "made up",
                 "doc_id": self.doc_id, "native_id": None, "label": self.label}
                for i, (context, continuation) in enumerate(self.pairs())]


# ------------------------------------------------------------------------------------------------
# Scores

class Model:
    def __init__(self, model, dtype):
        self.model, self.margin = reference.twin(model, dtype), torch.inf

    def __call__(self, ids):
        """Log-probabilities (tokens, vocabulary) of what is after each of ids."""
        with torch.no_grad():
            logits, routers, choices = reference.forward(self.model, torch.tensor([ids]))
        K = choices[0].shape[-1]
        for z in routers:
            z = z.sort(dim=-1, descending=True).values
            self.margin = min(self.margin, (z[..., K - 1] - z[..., K]).min().item())
        return logits[0].log_softmax(dim=-1)


def logprob(model, encoder, seq, context, continuation):
    """(the sum over the continuation's tokens, how many these are)."""
    before = encoder(context) if context else [encoder.end]
    after = encoder(continuation)
    if not 0 < len(after) <= seq:
        die(f"{continuation!r} has {len(after)} tokens, --seq is {seq}; change what draws it")
    query = (before + after[:-1])[-seq:]
    rows = model(query)[len(query) - len(after):]
    return rows.gather(1, torch.tensor(after)[:, None]).sum().item(), len(after)


def first_maximum(values):
    return max(range(len(values)), key=lambda i: (values[i], -i))


def score(model, encoder, seq, document):
    bare = [text[1:] if text.startswith(" ") else text for text in document.continuations]
    sums, tokens = zip(*(logprob(model, encoder, seq, *pair) for pair in document.pairs()))
    characters, size = [len(text) for text in bare], [len(text.encode()) for text in bare]
    ways = [sums, [s / n for s, n in zip(sums, characters)], [s / n for s, n in zip(sums, size)]]
    return {"doc_id": document.doc_id, "label": document.label, "logprobs": list(sums), "tokens": list(tokens),
            "characters": characters, "bytes": size, "predictions": [first_maximum(way) for way in ways]}, ways


def is_sure(document, ways):
    """Whether rounding cannot move a prediction. Equal requests have equal scores, and are no doubt."""
    pairs = document.pairs()
    for values in ways:
        best = first_maximum(values)
        if any(pairs[i] != pairs[best] and values[best] - value < MARGIN * abs(value)
               for i, value in enumerate(values)):
            return False
    return True


def table(documents):
    """The means over documents, as scored."""
    n = len(documents)
    right = [sum(d["predictions"][way] == d["label"] for d in documents) / n for way in range(3)]
    gold = [(-d["logprobs"][d["label"]], d["characters"][d["label"]], d["bytes"][d["label"]]) for d in documents]
    return {"n": n, "acc": right[0], "acc_norm": right[1], "acc_bytes": right[2],
            "acc_stderr": math.sqrt(right[0] * (1 - right[0]) / (n - 1)) if n > 1 else None,
            "bpb": sum(loss / size for loss, _, size in gold) / n / math.log(2),
            "ce_loss": sum(loss / characters for loss, characters, _ in gold) / n}


def perplexity(model, encoder, seq, tokens):
    losses, targets = [], []
    for at in range(0, len(tokens) - seq + 1, seq):
        piece = tokens[at:at + seq]
        rows = model(piece)[:-1]
        losses.append(-rows.gather(1, torch.tensor(piece[1:])[:, None]).mean().item())
        targets += piece[1:]
    loss = sum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": len(targets),
            "bits_per_byte": loss * len(targets) / sum(map(encoder.size, targets)) / math.log(2)}


# ------------------------------------------------------------------------------------------------
# What is drawn until it is fit

def lengths_of(case, file, default):
    return [seq or default for seq, tasks, sets, _ in CASES[case]["runs"] if file in tasks or file in sets]


def draw_document(model, encoder, seqs, make, doc_id, seed):
    for attempt in range(100):
        r = random.Random(f"{seed} {attempt}")
        document = Document(doc_id, *make(r))
        model.margin = torch.inf
        sure = all(is_sure(document, score(model, encoder, seq, document)[1]) for seq in seqs)
        if sure and model.margin >= MARGIN:
            return document
    die(f"{seed}: no fit document in 100 draws")


def draw_tokens(model, encoder, seqs, count, vocab, seed):
    for attempt in range(100):
        r = random.Random(f"{seed} {attempt}")
        tokens = [encoder.end if r.random() < 0.05 else r.randrange(vocab) for _ in range(count)]
        model.margin = torch.inf
        for seq in seqs:
            perplexity(model, encoder, seq, tokens)
        if model.margin >= MARGIN:
            return tokens
    die(f"{seed}: no fit tokens in 100 draws")


def mixed_up(documents, r):
    """The lines of all documents in any order; unconditional ones among them, one of which is the first. Gives the
    documents in the order of their first lines, also."""
    lines = [line for document in documents for line in document.lines()]
    for i, document in enumerate(documents[:3]):
        for line in document.lines():
            lines.append({**line, "doc_id": UNCONDITIONAL + i * 17,
                          "request": {**line["request"], "context": "Answer:" if i % 2 else ""}})
    r.shuffle(lines)
    first = next(i for i, line in enumerate(lines) if line["doc_id"] >= UNCONDITIONAL)
    lines.insert(0, lines.pop(first))
    order = list(dict.fromkeys(line["doc_id"] for line in lines if line["doc_id"] < UNCONDITIONAL))
    return lines, sorted(documents, key=lambda document: order.index(document.doc_id))


def write(path, raw):
    with open(path, "wb") as f:
        f.write(gzip.compress(raw, mtime=0) if path.endswith(".gz") else raw)


def name_of(file):
    return file.split(".")[0]


def scores(model, encoder, seq, tasks, sets, limits):
    """What a run should give: of files with documents, and of files with tokens."""
    result = {"tasks": {}, "perplexity": {}}
    for name, documents in tasks.items():
        scored = [score(model, encoder, seq, document)[0] for document in documents]
        result["tasks"][name] = {"table": table(scored), "limits": {n: table(scored[:n]) for n in limits},
                                 "documents": scored}
    for name, tokens in sets.items():
        result["perplexity"][name] = perplexity(model, encoder, seq, tokens)
    return result


def differences(a, b):
    """Relative, of all numbers at the same places. Nothing but numbers may differ."""
    if isinstance(a, dict):
        return [x for key in a.keys() | b.keys() for x in differences(a[key], b[key])]
    if isinstance(a, list):
        return [x for both in zip(a, b, strict=True) for x in differences(*both)]
    if isinstance(a, float) and a != b:
        return [abs(a - b) / abs(a)]
    return [] if a == b else [math.inf]


def make(out, case):
    c = CASES[case]
    folder = os.path.join(ROOT, "tests", "fixtures", "finetune", f"model-{c['model']}")
    loaded = reference.OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    encoder, config = Encoder(c["tokenizer"], loaded.config.eos_token_id), loaded.config
    with reference.Float64():
        exact = Model(loaded, torch.float64)
    narrow, tasks, sets, runs = Model(loaded, torch.float32), {}, {}, []
    building = f"{out}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    os.makedirs(building)
    with reference.Float64():
        for file, makers in c["files"].items():
            r = random.Random(f"{case} {file}")
            ids = r.sample(range(1000), len(makers))
            documents = [draw_document(exact, encoder, lengths_of(case, file, config.max_position_embeddings), make,
                                       doc_id, f"{case} {file} {number}")
                         for number, (make, doc_id) in enumerate(zip(makers, ids))]
            lines, tasks[file] = mixed_up(documents, r)
            write(f"{building}/{file}", "".join(json.dumps(line, ensure_ascii=file.endswith(".gz")) + "\n"
                                                for line in lines).encode())
        for file, count in c["tokens"].items():
            seqs = lengths_of(case, file, config.max_position_embeddings)
            vocab = 256 if not encoder.tokenizer else encoder.tokenizer.get_vocab_size(with_added_tokens=False)
            sets[file] = draw_tokens(exact, encoder, seqs, count, vocab, f"{case} {file}")
            write(f"{building}/{file}", numpy.array(sets[file], dtype="<u2").tobytes())
    for seq, files, token_files, limits in c["runs"]:
        words = (encoder, seq or config.max_position_embeddings, {name_of(file): tasks[file] for file in files},
                 {name_of(file): sets[file] for file in token_files}, limits)
        with reference.Float64():
            result = scores(exact, *words)
        worst = max(differences(result, scores(narrow, *words)))
        if not worst < RELATIVE / 2:
            die(f"{case}, --seq {seq}: PyTorch's float32 differs by {worst:.1e}; change MARGIN or what is drawn")
        for name, task in result["tasks"].items():
            t = task["table"]
            print(f"{case}, --seq {words[1]}, {name}: {t['n']} documents, acc {t['acc']:.3f}, acc_norm "
                  f"{t['acc_norm']:.3f}, acc_bytes {t['acc_bytes']:.3f}, bpb {t['bpb']:.3f}; float32 off by "
                  f"{worst:.1e}")
        runs.append({"seq": seq, "task_files": files, "perplexity_files": token_files, **result})
    text = json.dumps({"model": f"../../finetune/model-{c['model']}", "tokenizer": c["tokenizer"], "runs": runs},
                      indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text)     # on one line
    write(f"{building}/expected.json", (text + "\n").encode())
    shutil.rmtree(out, ignore_errors=True)
    os.rename(building, out)
    print(f"{out}: {sum(os.path.getsize(os.path.join(out, file)) for file in os.listdir(out))} bytes", flush=True)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", metavar="DIR", required=True, help="where to make them, replacing what is there")
    arguments = parser.parse_args(words)
    reference.quiet()
    torch.set_num_threads(1)                # the same bits on any number of cores
    torch.use_deterministic_algorithms(True)
    for case in CASES:
        make(os.path.join(arguments.all, case), case)


if __name__ == "__main__":
    main()
