#!/usr/bin/env python3
"""Writes tests/fixtures/tokenizer: a small tokenizer.json of OLMoE's family, and ids that `tokenizers` gives with it.

    [OLMOE_DATA=FOLDER] build/venv/bin/python scripts/make_tokenizer_fixture.py

tokenizer.json is trained on the words and sentences below; its added tokens have every flag. vectors.json has, for it,
strings with their ids, and digests for 10,000 generated strings and some long words (tests/nasty.py); with OLMOE_DATA,
also digests with OLMoE's own tokenizer for those strings and for the lines of data/text. Needs tokenizers.
"""
import json
import os
import sys
from pathlib import Path

try:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
except ImportError:
    sys.exit("make_tokenizer_fixture.py: no tokenizers here; run it by build/venv/bin/python after make venv")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.dont_write_bytecode = True
import nasty

FOLDER = ROOT / "tests" / "fixtures" / "tokenizer"
TEXT = """\
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one \
you were all her she there would their
we him been has when who will no more if out so up said what its about than into them can only other time new some \
could these two may first then do any like my now over
such our man me even most made after also did many off before must well back through years much where your way down \
should because long each just state people those too
mister little good very make world still see own work men day get here between both life being under three never know \
same last another while us might great go come
def return import from self class print range for while if else elif None True False int str list dict len open with \
yield lambda assert raise except
naïve café déjà vu über straße größer señor mañana façade résumé Привет мир как дела это что быть который русский язык
日本語の文章です。東京は大きい。生活的真谛是爱。中文的句子，很短。 한국어 문장 안녕하세요 العربية لغة جميلة हिन्दी भाषा ภาษาไทย ελληνική γλώσσα עברית 😀😀👍🏽
Question: What is it?\nAnswer: 42. 1 2 3 10 100 1000 1984 2024 3.14 2.718 https://www.example.com/index.html?x=1&y=2 \
don't I'm we're they've she'll he'd it's
    if x == 0:\n        return [i for i in range(10)]\n\t{ "key": "value", "n": -1 };\n/* ... */ // ---- ==== !!! ??? \
... <|user|> <|assistant|>"""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
ADDED = [("<|endoftext|>", "special"), ("<|padding|>", "special"), ("|||IP_ADDRESS|||", "normalized"),
         *((" " * n, "normalized") for n in range(8, 1, -1)),
         ("[L]", "lstrip"), ("[R]", "rstrip"), ("[LR]", "lstrip rstrip"), ("[NLR]", "lstrip rstrip normalized"),
         ("word", "single_word normalized"), ("[W]", "single_word"), ("the", "single_word lstrip"),
         ("é!", "normalized"), ("e\u0301?", "normalized"), ("e\u0301.", ""),
         ("ab", "normalized"), ("abab", "normalized"), ("abc", ""), ("ÿ", "normalized"), ("Ġé", "special normalized"),
         ("日本", "normalized single_word"), ("<|mask|>", "special lstrip"), ("|", "normalized rstrip single_word")]
STRINGS = ["", " ", "  ", "Hello world", "a    b", "def f(x):\n    return x\n", "I'm don't we'LL 'stop ''s",
           "e\u0301 é naïve", "日本語 日本", "a[L] b [R] c", "word words sword word", "the  the lathe",
           "x <|mask|> y<|endoftext|>z", "ababab abc abcab", "ÿ Ġé é!e\u0301?e\u0301.", "a | b|c", "tail   ",
           "   \n\n  x", "\u1112\u1161\u11ab", "😀\ufffd"]


def train():
    t = Tokenizer(models.BPE())
    t.normalizer, t.decoder = normalizers.NFC(), decoders.ByteLevel()
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.post_processor = processors.ByteLevel(trim_offsets=True)
    # Training breaks ties as it likes: the committed file is one of its results, the vectors belong to it.
    trainer = trainers.BpeTrainer(vocab_size=1200, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    t.train_from_iterator(TEXT.split("\n") * 2 + TEXT.split("\n")[:3], trainer)
    data = json.loads(t.to_str())
    vocab = data["model"]["vocab"]
    first = max(vocab.values()) + 1
    data["added_tokens"] = [{"id": vocab.get(content), "content": content,
                             **{flag: flag in flags.split() for flag in FLAGS}} for content, flags in ADDED]
    for token in data["added_tokens"]:
        if token["id"] is None:
            token["id"], first = first, first + 1
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def results(tokenizer, texts, size=250):
    strings = [text.decode("utf-8", "replace") for text in texts]
    ids = [e.ids for e in tokenizer.encode_batch(strings, add_special_tokens=False)]
    return nasty.digests(ids, [tokenizer.decode(x, skip_special_tokens=False).encode() for x in ids], size)


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, vectors_path = FOLDER / "tokenizer.json", FOLDER / "vectors.json"
    if not path.exists():           # delete it to train it again
        path.write_text(train() + "\n")
    t = Tokenizer.from_file(str(path))
    vectors = json.loads(vectors_path.read_text()) if vectors_path.exists() else {}
    vectors["strings"] = [[s, t.encode(s, add_special_tokens=False).ids] for s in STRINGS]
    vectors["nasty"] = results(t, nasty.nasty_strings(1, 10000, [content for content, _ in ADDED]))
    vectors["long_words"] = results(t, nasty.long_words())
    data = os.environ.get("OLMOE_DATA")
    if data:
        t = Tokenizer.from_file(f"{data}/tokenizer/tokenizer.json")
        vectors["olmoe_nasty"] = results(t, nasty.nasty_strings(2, 10000))
        vectors["olmoe_text"] = {p.name: results(t, p.read_bytes().splitlines(keepends=True), 1 << 30)[0]
                                 for p in sorted(Path(data, "text").glob("*.txt"))}
    vectors_path.write_text(json.dumps(vectors, ensure_ascii=False, indent=0) + "\n")
    print(f"{path.stat().st_size} and {vectors_path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
