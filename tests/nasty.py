"""Strings that tokenizers get wrong: all planes of Unicode, controls, what is not UTF-8, runs of white space, combining
marks out of order, added tokens in odd places, long words. The same for the same seed, with any version of Python."""
import hashlib
import json
import struct

OLMOE_TOKENS = ["<|endoftext|>", "<|padding|>", "|||IP_ADDRESS|||", "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||"]
WORDS = ["the", "Hello", "don't", "I'LL", "we've", "naïve", "straße", "Привет", "мир", "日本語", "한국어", "العربية",
         "हिन्दी", "ไทย", "123", "3.14", "x_1", "def", "'s", "''re", "'d", "ﬁ", "Ⅷ", "²", "😀", "👩‍👩‍👧", "🇩🇪", "e\u0301",
         "a\u0323\u0302", "\u1112\u1161\u11ab", "가\u11a8", "\u212b", "\u0344", "ü", "Ã©", "\ufeff", "\u00ad"]
MARKS = ["\u0300", "\u0301", "\u0323", "\u0327", "\u0334", "\u0345", "\u05b0", "\u0651", "\u093c", "\u0f71", "\u0f72",
         "\u1939", "\u3099", "\u302a", "\U0001d165", "\U0001d16d", "\u1dfa", "\u0eba", "\u07fd", "\U00011930",
         "\U00011938", "\U00011935", "\u1161", "\u11a8", "\u09be", "\u0dcf", "\u0b57", "\u1b35", "\U000110ba", "\u0338"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u0085", "\u2003", "\u3000", "\u2028", "\u200b",
          "\v", "\f", "\x1c", "\x1f", " \n ", "      "]
BYTES = [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xc3",
         b"\xe0\x80\x80", b"\xf5\x80", b"\xf0\x80\x80\x80", b"\xfe\xff"]
RANGES = [(0, 0x80), (0, 0x80), (0x80, 0x250), (0x250, 0x800), (0x800, 0x3000), (0x3000, 0xd800), (0xe000, 0x10000),
          (0x10000, 0x12000), (0x12000, 0x20000), (0x1d000, 0x1f000), (0x20000, 0x32400), (0x32400, 0xe0000),
          (0xe0000, 0xe0200), (0xe0200, 0x110000)]


class Random:
    """xorshift64*"""
    def __init__(self, seed):
        self.state = seed * 2654435761 + 88172645463325252 & (1 << 64) - 1

    def below(self, n):
        x = self.state
        x ^= x >> 12
        x ^= x << 25 & (1 << 64) - 1
        x ^= x >> 27
        self.state = x
        return (x * 2685821657736338717 & (1 << 64) - 1) * n >> 64

    def choice(self, items):
        return items[self.below(len(items))]


def nasty_string(r, tokens):
    """Bytes, mostly UTF-8. A string is drawn from a few kinds of pieces, so that their neighbourhoods vary."""
    kinds = [r.below(10) for _ in range(1 + r.below(4))]
    out = []
    for _ in range(1 + r.below(1 + r.below(40))):
        kind = r.choice(kinds)
        if kind == 0:
            piece = chr((lambda low, high: low + r.below(high - low))(*r.choice(RANGES)))
        elif kind == 1:
            piece = r.choice(WORDS)
        elif kind == 2:
            piece = r.choice(SPACES)
        elif kind == 3:
            piece = r.choice("aeoAuIKкあ\u0905\u1100") + "".join(r.choice(MARKS) for _ in range(r.below(5)))
        elif kind == 4:
            piece = r.choice(tokens)
            if r.below(4) == 0:     # a token cut short
                piece = piece[:r.below(len(piece) + 1)]
        elif kind == 5:
            out.append(r.choice(BYTES))
            continue
        elif kind == 6:
            piece = " " * r.below(60)
        elif kind == 7:
            piece = "".join(chr(97 + r.below(26)) for _ in range(r.below(1 + r.below(120))))
        elif kind == 8:
            piece = "".join(chr(32 + r.below(95)) for _ in range(r.below(12)))
        else:
            piece = r.choice(" '-_|<>/.\"(") * (1 + r.below(5))
        out.append(piece.encode())
    return b"".join(out)


def nasty_strings(seed, count, tokens=OLMOE_TOKENS):
    r = Random(seed)
    return [nasty_string(r, tokens) for _ in range(count)]


COMMON = ("the of and to in that with which their there would from were have been return print other time about these "
          "people after being never world still")


def long_words():
    """Where pairs overlap, and where the first merges are far apart."""
    r = Random(8)
    draw = lambda letters, n: "".join(r.choice(letters) for _ in range(n)).encode()
    alphabets = ("e", "on", "the", "etaoinshrdlu", "мирудо", "日本語のé", COMMON.split())
    return [draw(letters, n) for letters in alphabets for n in (63, 64, 65, 66, 257, 5000)]


def write_texts(path, texts):
    """The file of texts that test_tokenizer.cpp reads."""
    path.write_bytes(b"".join(struct.pack("<I", len(text)) + text for text in texts))


def read_ids(path):
    numbers, ids, i = memoryview(path.read_bytes()).cast("i").tolist(), [], 0
    while i < len(numbers):
        ids.append(numbers[i + 1:i + 1 + numbers[i]])
        i += 1 + numbers[i]
    return ids


def read_texts(path):
    data, texts, i = path.read_bytes(), [], 0
    while i < len(data):
        n, = struct.unpack_from("<I", data, i)
        texts.append(data[i + 4:i + 4 + n])
        i += 4 + n
    return texts


def digests(ids, texts, size=250):
    """A digest for each run of strings: of their ids, and of the texts (bytes) that these decode to."""
    def digest(run_ids, run_texts):
        return hashlib.sha256(json.dumps(run_ids).encode() + b"\0".join(run_texts)).hexdigest()[:16]
    return [digest(ids[i:i + size], texts[i:i + size]) for i in range(0, len(ids), size)]
