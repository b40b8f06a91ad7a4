#!/usr/bin/env python3
"""Writes unicode_differences.h: where utf8proc's Unicode tables are not those that `tokenizers` was built with.

    build/venv/bin/python scripts/make_unicode_differences.py [--check]

`tokenizers` has three sets of tables: the regular expression that splits words (\\p{L}, \\p{N}, \\s), that of added
tokens (\\w), and NFC, which is of an older version. They are asked about every code point, by what is done to a few
characters around it. A code point is listed where any of these differs: the utf8proc that is installed, Python's
unicodedata, the newer one of the package unicodedata2. So the list also holds for utf8proc's versions between them.
With --check nothing is written, and the exit code reports whether the file is what would be written.
Needs tokenizers and unicodedata2, and libutf8proc.
"""
import argparse
import ctypes
import ctypes.util
import hashlib
import sys
import unicodedata
from pathlib import Path

try:
    import tokenizers
    import unicodedata2
except ImportError as e:
    sys.exit(f"make_unicode_differences.py: {e}; run it by build/venv/bin/python after make venv")
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

FILE = Path(__file__).resolve().parent.parent / "lib" / "unicode_differences.h"
CODE_POINTS = [c for c in range(0x110000) if not 0xd800 <= c < 0xe000]
WIDTH = 120                                 # of a line of the file
KINDS = {"L": 1, "N": 2, "Z": 3}            # as in tokenizer.h; anything else 0


class Utf8proc:
    """The installed library by the names of Python's unicodedata."""
    CATEGORIES = "Cn Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co".split()

    def __init__(self):
        path = ctypes.util.find_library("utf8proc")
        if not path:
            sys.exit("make_unicode_differences.py: libutf8proc is not installed; run make setup")
        self.library = ctypes.CDLL(path)
        self.library.utf8proc_get_property.restype = ctypes.POINTER(ctypes.c_int16)
        self.library.utf8proc_unicode_version.restype = ctypes.c_char_p
        self.unidata_version = self.library.utf8proc_unicode_version().decode()

    def category(self, c):
        return self.CATEGORIES[self.library.utf8proc_category(ord(c))]

    def combining(self, c):
        return self.library.utf8proc_get_property(ord(c))[1]

    def normalize(self, form, c):
        """NFD of a character or NFC of a string."""
        out, bound = (ctypes.c_int32 * 16)(), ctypes.c_int(0)
        decompose = self.library.utf8proc_decompose_char
        n = 0
        for x in c:
            n += decompose(ord(x), ctypes.byref(out, 4 * n), 16 - n, 1 << 4, ctypes.byref(bound))
        if form == "NFC":
            n = self.library.utf8proc_normalize_utf32(out, n, 1 << 1 | 1 << 3)
        return "".join(map(chr, out[:n]))


def kind(source, c):
    if c in "\t\n\v\f\r\x85":
        return 3
    return KINDS.get(source.category(c)[0], 0)


def in_word(source, c):
    return source.category(c)[0] in "LM" or source.category(c) in ("Nd", "Nl", "Pc")


def batches(size=2048):
    for i in range(0, len(CODE_POINTS), size):
        yield CODE_POINTS[i:i + size]


def their_kinds():
    """From how a, c twice, ! and a line break are split: [acc][!], [a][c][c][!], [a][cc][!] or [a][cc!]."""
    split, kinds = pre_tokenizers.ByteLevel(add_prefix_space=False), {}
    for batch in batches():
        ends = {end for _, (_, end) in split.pre_tokenize_str("".join(f"a{chr(c)}{chr(c)}!\n" for c in batch))}
        for i, c in enumerate(batch):
            kinds[c] = 1 if 5 * i + 1 not in ends else 3 if 5 * i + 2 in ends else 2 if 5 * i + 3 in ends else 0
    return kinds


def their_words_and_spaces():
    """Whether an added token X that must be a word is refused before a character; whether one that strips what follows
    strips the character."""
    word, space = {}, {}
    alone, strips = Tokenizer(models.BPE()), Tokenizer(models.BPE())
    alone.add_tokens([AddedToken("X", single_word=True, normalized=False)])
    strips.add_tokens([AddedToken("X", rstrip=True, normalized=False)])
    for batch in batches():
        text = "".join(f"X{chr(c)}+" for c in batch)
        starts = {start for start, _ in alone.encode(text).offsets}
        ends = {end for _, end in strips.encode(text).offsets}
        for i, c in enumerate(batch):
            word[c] = 3 * i not in starts and c != ord("X")
            space[c] = 3 * i + 2 in ends
    word[ord("X")], space[ord("X")] = True, False
    return word, space


def their_combining(nfd):
    """Canonical combining classes, from which characters change places."""
    moves = lambda first, second: nfd("a" + first + second) != "a" + first + second
    low, high = "\u0334", "\u0345"          # of the classes 1 and 240, the lowest and the highest
    example = {}
    for c in map(chr, CODE_POINTS):
        if unicodedata.combining(c) and nfd(c) == c and (moves(c, low) or moves(high, c)):
            example.setdefault(unicodedata.combining(c), c)
    classes = {}
    for c in map(chr, CODE_POINTS):
        if nfd(c) != c or not (moves(c, low) or moves(high, c)):
            continue
        same = [k for k, x in example.items() if not moves(c, x) and not moves(x, c)]
        assert len(same) == 1, (hex(ord(c)), same)
        classes[ord(c)] = same[0]
    return classes


def ranges(values):
    """[(first, last, value)] of neighbours of the same value."""
    out = []
    for c, value in sorted(values.items()):
        if out and out[-1][1] == c - 1 and out[-1][2] == value:
            out[-1][1] = c
        else:
            out.append([c, c, value])
    return out


def filled(entries):
    """Lines that hold as many of the entries as fit."""
    lines = []
    for entry in entries:
        if lines and len(lines[-1]) + 1 + len(entry) <= WIDTH:
            lines[-1] += " " + entry
        else:
            lines.append("    " + entry)
    return lines


def cpp_text(digest, versions, other_kind, other_class, not_composed):
    """The file."""
    kinds = [f"{{0x{a:04x}, 0x{b:04x}, {k}, {str(w).lower()}}}," for a, b, (k, w) in ranges(other_kind)]
    classes = [f"{{0x{a:04x}, 0x{b:04x}, {k}}}," for a, b, k in ranges(other_class)]
    lines = [
        "// Made by scripts/make_unicode_differences.py: where tables of utf8proc are not those of `tokenizers`.",
        f"// tokenizers {tokenizers.__version__}; utf8proc's Unicode {versions[0]}, and {', '.join(versions[1:])}",
        f"// digest of the tables as they have to be: {digest}",
        "",
        "#pragma once",
        "",
        "// Code points whose kind (0 other, 1 letter, 2 number, 3 white space) or place in words is another.",
        "struct UnicodeKind { char32_t first, last; unsigned char kind; bool in_word; };",
        "constexpr UnicodeKind unicode_kinds[] = {",
        *filled(kinds),
        "};",
        "",
        "// Code points whose combining class is another. Those newer than the NFC of `tokenizers` have none there.",
        "struct UnicodeCombining { char32_t first, last; unsigned char combining; };",
        "constexpr UnicodeCombining unicode_combining[] = {",
        *filled(classes),
        "};",
        "",
        "// Characters that the NFC of `tokenizers` neither composes nor decomposes.",
        "constexpr char32_t unicode_not_composed[] = {",
        *filled(f"0x{c:04x}," for c in not_composed),
        "};",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    sources = [Utf8proc(), unicodedata, unicodedata2]
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    kinds, combining = their_kinds(), their_combining(nfd)
    words, spaces = their_words_and_spaces()

    other_kind, other_class, not_composed = {}, {}, []
    for c in CODE_POINTS:
        s = chr(c)
        if spaces[c] != (kinds[c] == 3):
            sys.exit(f"make_unicode_differences.py: U+{c:04X} is white space for words and not for added tokens, "
                     "or the other way round: tokenizer.h has one class for both")
        if any((kind(u, s), in_word(u, s)) != (kinds[c], words[c]) for u in sources):
            other_kind[c] = (kinds[c], words[c])
        if nfd(s) == s and any(u.combining(s) != combining.get(c, 0) for u in sources):
            other_class[c] = combining.get(c, 0)
        for u in sources:
            if u.normalize("NFD", s) != nfd(s) or u.normalize("NFC", s) != nfc(s):
                if nfd(s) != s:
                    sys.exit(f"make_unicode_differences.py: U+{c:04X} decomposes in another way: "
                             "tokenizer.h has no list for that")
                not_composed.append(c)
                break

    # What test_tokenizer.cpp prints of our tables, from theirs
    table = []
    for c in CODE_POINTS:
        s = chr(c)
        if kinds[c] or words[c] or combining.get(c) or nfd(s) != s:
            parts = ""
            if nfd(s) != s:
                parts = "".join(f" {ord(x):x}" for x in nfd(s)) + (" made" if nfc(s) == s else " not made")
            table.append(f"{c:x} {kinds[c] | words[c] << 2} {combining.get(c, 0)}{parts}")
    digest = hashlib.sha256("\n".join(table).encode()).hexdigest()

    text = cpp_text(digest, [u.unidata_version for u in sources], other_kind, other_class, not_composed)
    print(f"{len(other_kind)} code points of another kind, {len(other_class)} of another combining class, "
          f"{len(not_composed)} not composed")
    if not check:
        FILE.write_text(text)
    elif FILE.read_text() != text:
        sys.exit(f"make_unicode_differences.py: {FILE.name} is another one; make it again")


if __name__ == "__main__":
    main()
