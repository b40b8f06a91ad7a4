"""Data: token files, their order, the filter, text to token files, the corpus, the plot. C++ runs under the address and
undefined-behaviour sanitizers."""
import errno
import gzip
import hashlib
import json
import lzma
import math
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from words import words

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "scripts"))
import make_corpus as grammar


def build(path, sanitizers):
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-g", "-O1", f"-fsanitize={sanitizers}",
                    "-fno-sanitize-recover=all", "-o", str(path), os.path.join(ROOT, "tests", "test_data.cpp"),
                    "-lz", "-lutf8proc"], check=True)
    return str(path)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("build") / "test_data", "address,undefined")


@pytest.fixture
def drive(program):
    """Runs commands; the lines printed. With fails, the one line on standard error; with says, also the lines there;
    with stopped, the exit code."""
    def run(*commands, fails=False, says=False, stopped=False, limit=None):
        r = subprocess.run([program], input=words(*commands), capture_output=True, text=True,
                           preexec_fn=limit)
        if stopped:
            return r.returncode
        if fails:
            assert r.returncode == 1, (r.returncode, r.stderr)
            assert r.stderr.count("\n") == 1 and r.stderr.endswith("\n"), r.stderr
            return r.stderr.strip()
        assert r.returncode == 0 and (says or r.stderr == ""), r.stderr
        return (r.stdout.splitlines(), r.stderr.splitlines()) if says else r.stdout.splitlines()
    return run


def tokens(path, values, kind="<H"):
    path.write_bytes(struct.pack(f"{kind[0]}{len(values)}{kind[1]}", *values))
    return str(path)


def npy(path, values, descr="<u2", shape=None, version=1, length=None):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape or f'({len(values)},)'}, }}"
    text += " " * (-(len(text) + (11 if version == 1 else 13)) % 64) + "\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    header = b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()
    path.write_bytes(header + struct.pack(f"<{len(values)}{'I' if descr == '<u4' else 'H'}", *values))
    return str(path)


def llmc(path, values, magic=20240520, version=1, count=None):
    header = struct.pack("<256i", magic, version, len(values) if count is None else count, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(values)}{'H' if magic == 20240520 else 'I'}", *values))
    return str(path)


def rows(lines):
    return [[int(x) for x in line.split()] for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# Order: the vectors are NumPy's

ORDER = {6198: [4, 14, 6, 15, 3, 2, 13, 0, 10, 11, 9, 7, 8, 1, 12, 5],
         6199: [5, 6, 15, 8, 4, 9, 11, 12, 2, 1, 14, 3, 10, 13, 0, 7],
         42: [6, 15, 11, 10, 9, 3, 0, 7, 12, 5, 2, 4, 14, 1, 13, 8]}


def test_pcg64_outputs(drive):
    assert drive("pcg 6198 3") == ["0xb4539f5cff6dcdf5", "0x4943c97e3b66ef81", "0x72b1c0d75cf4db48"]


@pytest.mark.parametrize("seed", ORDER)
def test_shuffle(drive, seed):
    assert rows(drive(f"shuffle {seed} 16")) == [ORDER[seed]]


def test_shuffle_100000(drive):
    order, = rows(drive("shuffle 6198 100000"))
    assert order[:4] == [27125, 8068, 8648, 93142] and order[-4:] == [20871, 42781, 56136, 61313]
    assert sorted(order) == list(range(100000))


def test_shuffle_of_one_and_two(drive):
    assert drive("shuffle 5 1") == ["0 "]
    assert sorted(rows(drive("shuffle 5 2"))[0]) == [0, 1]


def sixteen(tmp_path, T=3):
    """16 instances in two files with tails; instance i is i, 100 + i, 100 + i."""
    data = [x for i in range(16) for x in [i] + [100 + i] * (T - 1)]
    a = tokens(tmp_path / "a.npy", data[:5 * T] + [99])
    b = tokens(tmp_path / "b.npy", data[5 * T:] + [99] * (T - 1))
    return a + " " + b


def firsts(lines, count):
    """The instances of a batch: the first token of each row of inputs."""
    return [row[0] for row in rows(lines)[:count]]


def test_epochs_follow_numpy(drive, tmp_path):
    lines = drive(f"open 3 200 global 6198 0 {sixteen(tmp_path)}", *["next 4 0 1"] * 8)
    batches = [firsts(lines[8 * i:8 * i + 8], 4) for i in range(8)]
    assert sum(batches, []) == ORDER[6198] + ORDER[6199]


def test_partial_batch_of_an_epoch_is_dropped(drive, tmp_path):
    lines = drive(f"open 3 200 global 6198 0 {sixteen(tmp_path)}", *["next 5 0 1"] * 4, "state")
    batches = [firsts(lines[10 * i:10 * i + 10], 5) for i in range(4)]
    assert batches == [ORDER[6198][:5], ORDER[6198][5:10], ORDER[6198][10:15], ORDER[6199][:5]]
    assert lines[-1].split()[:2] == ["1", "5"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(drive, tmp_path, world):
    files = sixteen(tmp_path)
    for batch in range(4):
        merged = [None] * 4
        for rank in range(world):
            lines = drive(f"open 3 200 global 6198 0 {files}", *[f"next 4 {rank} {world}"] * (batch + 1))
            count = 4 // world
            merged[rank::world] = firsts(lines[-2 * count:], count)
        assert merged == ORDER[6198][4 * batch:4 * batch + 4]


def test_resume(drive, tmp_path):
    files = sixteen(tmp_path)
    whole = drive(f"open 3 200 global 6198 0 {files}", *["next 3 0 1", "state"] * 13)
    for step in range(13):      # 5 batches an epoch; step 5 resumes at an epoch's end
        epoch, position = whole[7 * step + 6].split()[:2]
        rest = drive(f"open 3 200 global 6198 0 {files}", f"seek {epoch} {position}",
                     *["next 3 0 1", "state"] * (12 - step))
        assert rest == whole[7 * step + 7:]


def test_seek_out_of_range(drive, tmp_path):
    files = sixteen(tmp_path)
    for where in ("0 17", "-1 0", "0 -1"):
        assert "16 sequences" in drive(f"open 3 200 global 6198 0 {files}", f"seek {where}", fails=True)
    drive(f"open 3 200 global 6198 0 {files}", "seek 3 16")


def test_sequential(drive, tmp_path):
    lines = drive(f"open 3 200 sequential 6198 0 {sixteen(tmp_path)}", *["next 6 0 1"] * 3)
    batches = [firsts(lines[12 * i:12 * i + 12], 6) for i in range(3)]
    assert batches == [list(range(6)), list(range(6, 12)), list(range(6))]


# ---------------------------------------------------------------------------------------------------------------------
# Files that count more than once or in part

def numbered(path, first, n, T=3, tail=1):
    """A file of n instances, and a tail that is too short; instance i is first + i, 100 + first + i, ..."""
    return tokens(path, [x for i in range(first, first + n) for x in [i] + [100 + i] * (T - 1)] + [99] * tail)


def test_shares_follow_numpy(drive, tmp_path):
    """16 instances of three files: 5, then 4 twice, then half of 7."""
    files = [numbered(tmp_path / "a.npy", 0, 5), numbered(tmp_path / "b.npy", 20, 4) + ":2",
             numbered(tmp_path / "c.npy", 40, 7) + ":0.5"]
    instances = [*range(5), *range(20, 24), *range(20, 24), *range(40, 43)]
    for seed in (6198, 42):
        lines = drive(f"open 3 200 global {seed} 0 {' '.join(files)}", *["next 4 0 1"] * 4)
        assert [firsts(lines[8 * i:], 4) for i in range(4)] == [[instances[i] for i in ORDER[seed][4 * b:4 * b + 4]]
                                                                for b in range(4)]
    lines = drive(f"open 3 200 sequential 0 0 {' '.join(files)}", "next 16 0 1", "state")
    assert firsts(lines[:16], 16) == instances and lines[-1].split()[3:5] == ["16", str(16 + 13 + 13 + 9)]


@pytest.mark.parametrize("order", ["global", "sequential"])
def test_shares_are_the_files_written_out(drive, tmp_path, order):
    """Token for token, over several epochs, on 1, 2 and 4 ranks: as one file of all their instances, in the order of
    the list. Headers and tails take no part in it."""
    draw = random.Random(3)
    T, kinds = 5, {"raw.npy": tokens, "head.npy": npy, "shard.bin": llmc, "odd:name.npy": tokens, "short.npy": tokens}
    shares = {"raw.npy": (53, ""), "head.npy": (44, ":2.5"), "shard.bin": (37, ":0.75"), "odd:name.npy": (20, ":1"),
              "short.npy": (4, ":3")}                           # the last has no instance at all
    files, written_out = [], []
    for name, (n, share) in shares.items():
        values = [draw.randrange(300) for _ in range(n)]
        files.append(kinds[name](tmp_path / name, values) + share)
        instances, times = n // T, Fraction(share[1:] or 1)
        for left in [1] * int(times) + [times % 1]:
            written_out += values[:T * int(left * instances)]
    assert len(written_out) == T * (10 + (8 + 8 + 4) + 5 + 4)
    whole = tokens(tmp_path / "whole.npy", written_out)
    layouts = [(world, rank) for world in (1, 2, 4) for rank in range(world)]
    a, b = (drive(*[line for world, rank in layouts
                    for line in (f"open {T} 300 {order} 11 1 {names}", *[f"next 8 {rank} {world}"] * 13, "state")])
            for names in (" ".join(files), whole))              # 4 batches an epoch, and 7 instances left over
    assert len(a) == len(b) == sum(13 * 2 * 8 // world + 1 for world, _ in layouts)
    for x, y in zip(a, b):
        if len(x.split()) != 6:
            assert x == y
        else:                                                   # but for the tokens and the fingerprint
            assert x.split()[:4] == y.split()[:4] == ["3", "8", "0", "39"]


def test_parts_are_rounded_down(drive, tmp_path):
    """For shares as they are written, not as they are stored: 0.29 of 100 are 29."""
    draw = random.Random(4)
    shares = [(100, "0.29"), (10, "0.1"), (10, "2.3"), (1000, "0.999"), (7, "1.999"), (3, "0.34")]
    shares += [(n, f"{draw.randrange(1, 3000) / 1000}") for n in draw.sample(range(200, 900), 40)]
    files = [tokens(tmp_path / f"{n}.npy", [1] * (2 * n + 1)) for n, _ in shares]
    lines = drive(*[line for file, (_, share) in zip(files, shares)
                    for line in (f"open 2 9 sequential 0 0 {file}:{share}", "state", "close")])
    for line, (n, share) in zip(lines, shares, strict=True):
        whole, part = divmod(Fraction(share), 1)
        assert int(line.split()[3]) == whole * n + math.floor(part * n), (n, share)


def test_names_with_colons(drive, tmp_path):
    """What exists is a name; else what follows its last colon is a share."""
    numbered(tmp_path / "a", 0, 2), numbered(tmp_path / "a:2", 10, 3), numbered(tmp_path / "a:nan", 20, 1)
    (tmp_path / "folder:2").mkdir()
    for name, found in {"a": [0, 1], "a:3": [0, 1] * 3, "a:0.5": [0], "a:1e0": [0, 1], "a:2": [10, 11, 12],
                        "a:2:1": [10, 11, 12], "a:2:2": [10, 11, 12] * 2, "a:nan": [20], "a:nan:2": [20, 20]}.items():
        lines = drive(f"open 3 200 sequential 0 0 {tmp_path}/{name}", f"next {len(found)} 0 1", "state")
        assert firsts(lines[:-1], len(found)) == found and lines[-1].split()[3] == str(len(found)), name
    message = drive(f"open 3 200 sequential 0 0 {tmp_path}/folder:2", fails=True)
    assert "folder:2: not a regular file" in message


@pytest.mark.parametrize("share, message", [
    *[(share, f"a.npy:{share}: a file counts more than 0 and up to 1000 times")
      for share in ("0", "-1", "-0.5", "nan", "inf", "1e9", "1000.5", "1e-400")],
    *[(share, f"a.npy:{share}: cannot be read: No such file") for share in ("", "text", "2x", "1,5", "2:", "2:x")],
    ("0.1", "a.npy:0.1: 0.1 of the file's 9 sequences of 3 tokens is less than one"),
    ("2.1", "a.npy:2.1: 0.1 of the file's 9 sequences of 3 tokens is less than one"),
    ("1e-300", "of the file's 9 sequences of 3 tokens is less than one"),
    ("2:2", "a.npy:2: cannot be read: No such file")], ids=lambda x: x if len(x) < 10 else "")
def test_shares_that_are_refused(drive, tmp_path, share, message):
    assert message in drive(f"open 3 200 global 0 0 {numbered(tmp_path / 'a.npy', 0, 9)}:{share}", fails=True)


def test_fingerprints_of_shares(drive, tmp_path):
    """Equal where the lists of instances are."""
    a, b = numbered(tmp_path / "a.npy", 0, 5), numbered(tmp_path / "b.npy", 20, 8)

    def of(*files):
        return drive(f"open 3 200 global 0 0 {' '.join(files)}", "state")[0].split()[-1]

    assert of(a, b + ":2.5") == of(a + ":1", b, b, b + ":0.5") == of(a, b, b, b + ":0.6") and of(a) == of(a + ":1")
    others = [of(a, b), of(a, b + ":2"), of(a, b + ":3"), of(a + ":2", b), of(b, a), of(b, a, b), of(a, b + ":0.5"),
              of(a, b + ":0.75"), of(a, b + ":2.5"), of(a, b + ":0.5", b, b)]
    assert len(set(others)) == len(others)


# ---------------------------------------------------------------------------------------------------------------------
# Batches that are skipped

SKIPPED = {             # 16 instances are 5 batches of 3 an epoch: (as given, as they are recorded)
    "one": ("2", [[2, 2]]), "the first": ("1-1", [[1, 1]]), "a stretch": ("3-4", [[3, 4]]),
    "touching": ("3-4 5-6", [[3, 6]]), "overlapping": ("2-6 4-8", [[2, 8]]), "within": ("2-8 4-5 3", [[2, 8]]),
    "out of order": ("9 7 2-3", [[2, 3], [7, 7], [9, 9]]), "over an epoch's end": ("4-7", [[4, 7]]),
    "whole epochs": ("1-5 11-15", [[1, 5], [11, 15]]), "an epoch's last": ("5 10-10", [[5, 5], [10, 10]]),
    "twice": ("3 3-3", [[3, 3]]), "never reached": ("500-1000000000000000", [[500, 10**15]])}


@pytest.mark.parametrize("order", ["global", "sequential"])
@pytest.mark.parametrize("case", SKIPPED)
def test_skipped_batches(drive, tmp_path, case, order):
    """The others follow one another as they would without; from the state after any step it goes on the same."""
    given, recorded = SKIPPED[case]
    n, each = 9, 7                      # lines of a batch on one rank, and of the state after it
    left = [b for b in range(1, 30) if not any(first <= b <= last for first, last in recorded)][:n]
    opened, skip = f"open 3 200 {order} 6198 0 {sixteen(tmp_path)}", f"skip {given}"
    begun = [(step, f"seek {(b - 1) // 5} {(b - 1) % 5 * 3 + 3}") for step, b in enumerate(left, 1)]
    lines = iter(drive(opened, *["next 3 0 1", "state"] * left[-1], opened, skip, f"batches {n}",
                       *["next 3 0 1", "state"] * n,
                       *[line for step, seek in begun
                         for line in (opened, skip, seek, *["next 3 0 1", "state"] * (n - step))],
                       *[line for rank in range(3) for line in (opened, skip, *[f"next 3 {rank} 3"] * n)]))
    plain = [[next(lines) for _ in range(each)] for _ in range(left[-1])]
    assert json.loads(next(lines)) == recorded and rows([next(lines)]) == [left]
    wanted = [plain[b - 1] for b in left]
    assert [[next(lines) for _ in range(each)] for _ in range(n)] == wanted
    for step, _ in begun:
        assert json.loads(next(lines)) == recorded
        assert [[next(lines) for _ in range(each)] for _ in range(n - step)] == wanted[step:]
    ranks = [[next(lines) for _ in range(1 + 2 * n)][1:] for _ in range(3)]
    for i in range(n):
        assert [rank[2 * i] for rank in ranks] == wanted[i][:3]
        assert [rank[2 * i + 1] for rank in ranks] == wanted[i][3:6]


def test_batches_by_their_numbers(drive, tmp_path):
    """Any batch of any epoch is found without those before it."""
    opened = f"open 3 200 global 6198 0 {sixteen(tmp_path)}"
    lines = drive(opened, *["next 3 0 1", "state"] * 12)
    order = random.Random(5).sample(range(1, 13), 12)
    found = drive(opened, *[line for batch in order for line in (f"go 3 {batch}", "next 3 0 1", "state")])
    for i, batch in enumerate(order):
        assert found[7 * i:7 * i + 7] == lines[7 * (batch - 1):7 * batch]


@pytest.mark.parametrize("given", ["0", "0-3", "-3", "3-1", "3-", "-", "x", "3-x", "3-4-5", "1.5", "1e3", "+3", "3-+4",
                                   "3--4", "0x3", "3..4", "1000000000000001", "9223372036854775808",
                                   "3-18446744073709551620"])
def test_stretches_that_are_refused(drive, given):
    message = drive(f"skip {given}", fails=True)
    assert message == f"--skip-batches '{given}': not FROM-TO, numbers of batches from 1 on"


# ---------------------------------------------------------------------------------------------------------------------
# Instances and targets

def test_instances_of_two_files(drive, tmp_path):
    a, b = tokens(tmp_path / "a.npy", range(16)), tokens(tmp_path / "b.npy", range(16, 32))
    lines = drive(f"open 4 64 sequential 0 0 {a} {b}", "rows 7 1", "rows 3 2", "state")
    assert rows(lines[1:3]) == [[28, 29, 30, 31], [29, 30, 31, -100]]
    assert rows(lines[4:8]) == [[12, 13, 14, 15], [16, 17, 18, 19], [13, 14, 15, -100], [17, 18, 19, -100]]
    assert lines[-1].split()[3:5] == ["8", "32"]


def test_instances_never_cross_files(drive, tmp_path):
    files = [tokens(tmp_path / "a.npy", range(7)), tokens(tmp_path / "short.npy", [50]),
             tokens(tmp_path / "empty.npy", []), tokens(tmp_path / "b.npy", range(20, 31))]
    lines = drive(f"open 4 64 sequential 0 0 {' '.join(files)}", "rows 0 3", "state")
    assert lines[0] == "3" and rows(lines[1:4]) == [[0, 1, 2, 3], [20, 21, 22, 23], [24, 25, 26, 27]]
    assert lines[-1].split()[3:5] == ["3", "19"]


def test_rows_past_the_end_are_ignored(drive, tmp_path):
    lines = drive(f"open 2 64 sequential 0 0 {tokens(tmp_path / 'a.npy', range(1, 7))}", "rows 2 3", "rows 3 1")
    assert lines[0] == "1" and rows(lines[1:7]) == [[5, 6], [0, 0], [0, 0], [6, -100], [-100, -100], [-100, -100]]
    assert lines[7] == "0" and rows(lines[8:]) == [[0, 0], [-100, -100]]


def test_one_token_sequences(drive, tmp_path):
    lines = drive(f"open 1 64 sequential 0 0 {tokens(tmp_path / 'a.npy', [5, 6])}", "next 2 0 1")
    assert rows(lines) == [[5], [6], [-100], [-100]]


def test_repetition_filter(drive, tmp_path):
    """Against its definition: some pattern of p <= 13 tokens is repeated 32 times in a row."""
    draw, T = random.Random(1), 450
    instances = []
    for n in range(1500):
        x = [draw.randrange(3 if n % 3 == 0 else 3000) for _ in range(T)]
        if n % 5 != 0:      # plant a run about as long as the threshold, sometimes at an end
            p = draw.randrange(1, 16)
            length = max(p, min(T, 32 * p + draw.choice([-p, -2, -1, -1, 0, 0, 1, p])))
            at = draw.choice([0, T - length, draw.randrange(T - length + 1)])
            pattern = [draw.randrange(3000) for _ in range(p)]
            x[at:at + length] = [pattern[i % p] for i in range(length)]
        instances.append(x)

    def hits(x):
        raw = struct.pack(f"<{T}H", *x)
        return any(raw[2 * i:2 * (i + 31 * p)] == raw[2 * (i + p):2 * (i + 32 * p)]
                   for p in range(1, 14) for i in range(T - 32 * p + 1))

    expected = [hits(x) for x in instances]
    assert 200 < sum(expected) < 1300
    data = tokens(tmp_path / "a.npy", sum(instances, []))
    lines = drive(f"open {T} 3000 sequential 0 1 {data}", "next 1500 0 1", "state")
    masked = [all(t == -100 for t in row) for row in rows(lines[1500:3000])]
    assert rows(lines[:1500]) == instances      # the inputs stay
    assert masked == expected
    assert lines[-1].split()[2] == str(sum(expected))
    lines = drive(f"open {T} 3000 sequential 0 0 {data}", "next 1500 0 1", "state")
    assert not any(all(t == -100 for t in row) for row in rows(lines[1500:3000]))
    assert lines[-1].split()[2] == "0"


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_formats_hold_the_same_tokens(drive, tmp_path):
    values = [random.Random(2).randrange(50000) for _ in range(1000)]
    files = [tokens(tmp_path / "raw.npy", values), tokens(tmp_path / "raw.tokens", values),
             npy(tmp_path / "v1.npy", values), npy(tmp_path / "v2.npy", values, version=2),
             npy(tmp_path / "v3.npy", values, version=3), llmc(tmp_path / "shard.bin", values)]
    seen = {tuple(drive(f"open 50 50000 global 1 0 {f}", "next 20 0 1", "state")) for f in files}
    assert len(seen) == 1


def test_uint32(drive, tmp_path):
    """The tokens of uint16, and ids that do not fit into it; the order and the filter do not depend on the type. A
    header says what its own file holds, whatever is said of the others."""
    values = random.Random(2).choices(range(50000), k=1000) + [7, 8] * 50
    narrow = drive(f"open 50 50000 global 1 1 {tokens(tmp_path / 'u2.npy', values)}", "next 22 0 1", "state")
    files = [tokens(tmp_path / "raw.npy", values, "<I"), npy(tmp_path / "v1.npy", values, "<u4"),
             npy(tmp_path / "v2.npy", values, "<u4", version=2), llmc(tmp_path / "x.bin", values, 20240801, 7)]
    wide = [drive(f"open 50 50000 global 1 1 uint32 {f}", "next 22 0 1", "state") for f in files]
    assert all(w == wide[0] for w in wide) and wide[0][:-1] == narrow[:-1]
    assert wide[0][-1].split()[:5] == narrow[-1].split()[:5]                # the fingerprint is that of the bytes
    for f in files[1:]:
        assert drive(f"open 50 50000 global 1 1 {f}", "next 22 0 1", "state") == wide[0]
    header = npy(tmp_path / "header.npy", values)
    assert drive(f"open 50 50000 global 1 1 uint32 {header}", "next 22 0 1", "state") == narrow

    values[333] = 99999
    path = tokens(tmp_path / "large.npy", values, "<I")
    assert "99999" in " ".join(drive(f"open 50 100000 sequential 1 0 uint32 {path}", "rows 6 1"))
    message = drive(f"open 50 99999 sequential 1 0 uint32 {path}", "rows 6 1", fails=True)
    assert path in message and "token 333 has id 99999" in message and "vocabulary of 99999" in message
    values[333] = 2**32 - 1
    message = drive(f"open 50 99999 sequential 1 0 uint32 {tokens(tmp_path / 'large.npy', values, '<I')}", "rows 6 1",
                    fails=True)
    assert "token 333 has id 4294967295" in message


SMALL, LARGE = [i % 900 for i in range(4000)], random.Random(6).choices(range(120000), k=4000)
TEXT = open(os.path.join(ROOT, "README.md"), "rb").read()
OTHER_FILES = {     # (contents, vocabulary, what is in the message)
    "uint32": (struct.pack("<4000I", *SMALL), 1024, "its numbers are uint32, not uint16; give --token-type uint32"),
    "uint32 of a large vocabulary": (struct.pack("<4000I", *LARGE), 128256, "its numbers are uint32"),
    "uint32 of another vocabulary": (struct.pack("<4000I", *LARGE), 50304, "its numbers are uint32"),
    "uint32 with many zeros": (struct.pack("<4000I", *[x * (x % 7 < 2) for x in SMALL]), 1024, "uint32"),
    "int64": (struct.pack("<4000q", *SMALL), 1024, "its numbers are int64, not uint16; save them with .astype('<u2')"),
    "int64 labels": (struct.pack("<4000q", *[-100 if x % 5 else x for x in SMALL]), 1024, "its numbers are int64"),
    "int64 large": (struct.pack("<4000q", *LARGE), 128256, "its numbers are int64"),
    "float32": (struct.pack("<4000f", *SMALL), 50304, "its numbers are float32"),
    "float64": (struct.pack("<4000d", *SMALL), 50304, "its numbers are float64"),
    "big-endian uint32": (struct.pack(">4000I", *SMALL), 1024, "its numbers are big-endian uint32"),
    "big-endian int64": (struct.pack(">4000q", *SMALL), 1024, "its numbers are big-endian int64"),
    "big-endian uint16": (struct.pack(">4000H", *SMALL), 1024, "its numbers are big-endian uint16"),
    "big-endian bytes": (struct.pack(">4000H", *list(range(257)) * 15, *[9] * 145), 65536, "big-endian uint16"),
    "text": (TEXT, 65536, "text where tokens are needed"),
    "Chinese": ("這是一個句子。".encode() * 20, 65536, "text where tokens are needed"),
    "Latin-1": ("Es würde schön, sagte Jürgen. ".encode("latin-1") * 20, 65536, "text where tokens are needed"),
    "gzip": (gzip.compress(TEXT), 65536, "compressed by gzip; first: gunzip"),
    "xz": (lzma.compress(TEXT), 65536, "compressed by xz; first: xz -d"),
    "zstd": (b"\x28\xb5\x2f\xfd" + random.Random(1).randbytes(200), 65536, "compressed by zstd; first: zstd -d"),
    "zip": (b"PK\x03\x04" + random.Random(1).randbytes(200), 65536, "a zip archive"),
    "Parquet": (b"PAR1" + random.Random(1).randbytes(200), 65536, "a Parquet table; first: write its texts as .jsonl"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_contents_are_recognised(drive, tmp_path, case):
    """A file without a header is not what it is read as: whatever its name, in one line, before training."""
    content, vocabulary, reason = OTHER_FILES[case]
    path = written(tmp_path / "x.npy", content)
    message = drive(f"open 4 {vocabulary} global 0 0 {path}", fails=True)
    assert reason in message and path in message
    if not case.startswith("uint32"):
        message = drive(f"open 4 {vocabulary} global 0 0 uint32 {path}", fails=True)
        assert path in message and (reason.split(",")[0] in message or "uint16" in case)


def test_right_files_are_not_suspected(drive, tmp_path):
    """Every kind of data that could be taken for another: none is refused."""
    draw = random.Random(8)
    byte_text = [256 if x == 10 else x for x in TEXT]
    for i, (values, vocabulary) in enumerate([
            (byte_text, 320), ([0] * 5000, 320),
            ([7] + [0] * 5000, 65536), ([draw.randrange(2) for _ in range(5000)], 320),
            ([draw.randrange(2) * 256 for _ in range(5000)], 320),
            ([draw.randrange(65536) for _ in range(5000)], 65536),
            ([draw.randrange(50304) for _ in range(5000)], 50304), ([draw.randrange(16) for _ in range(5000)], 320),
            ([x for c in TEXT[:3000] for x in (c, 10)], 320), ([5, 0] * 7, 320), ([0x2020, 0x6564] * 7, 65536)]):
        for kind in "HI":
            path = tokens(tmp_path / f"{i}{kind}.npy", values, "<" + kind)
            drive(f"open 4 {vocabulary} sequential 0 0 {'uint32' if kind == 'I' else ''} {path}", "next 1 0 1")
    # of another tokenizer: the id is what is wrong
    path = tokens(tmp_path / "a.npy", [draw.randrange(50304) for _ in range(5000)])
    assert "outside of the vocabulary of 320" in drive(f"open 4 320 sequential 0 0 {path}", "next 1 0 1", fails=True)
    path = tokens(tmp_path / "b.npy", [100000 + x for x in SMALL], "<I")
    assert "has id 100000" in drive(f"open 4 50304 sequential 0 0 uint32 {path}", "next 1 0 1", fails=True)


def listed(path, ends):
    starts = [0, *ends[:-1]]
    path.write_bytes(gzip.compress("".join(f"{a},{b},d-{i},s,{i}\n" for i, (a, b) in
                                           enumerate(zip(starts, ends))).encode()))


def test_documents_say_the_type(drive, tmp_path):
    """The list of documents beside a file is evidence: for its type, where its number of tokens fits no other and all
    documents end alike, and against a suspicion."""
    path, lists = tmp_path / "x.npy", tmp_path / "x.csv.gz"
    values = [x for i in range(200) for x in [1 + i] * 9 + [0]]
    ends = list(range(10, 2001, 10))
    for kind, name in (("B", "uint8"), ("I", "uint32"), ("q", "int64")):
        tokens(path, [x * 1000 if kind == "I" and i % 9 == 0 else x for i, x in enumerate(values)], "<" + kind)
        listed(lists, ends)
        message = drive(f"open 4 65536 global 0 0 {path}", fails=True)
        assert f"its numbers are {name}, not uint16" in message
    # Columns of a table: each second word is 0, but there are as many words as the documents have
    tokens(path, [x for v in SMALL for x in (v, 0)])
    lists.unlink()
    assert "uint32" in drive(f"open 4 1024 global 0 0 {path}", fails=True)
    listed(lists, [100, 8000])
    drive(f"open 4 1024 global 0 0 {path}")


def test_documents_of_another_file_are_not_believed(drive, tmp_path):
    """Nor damaged ones: tokens of uint16 are read, also where the list has half as many, or twice as many."""
    path, lists = tmp_path / "x.npy", tmp_path / "x.csv.gz"
    draw = random.Random(3)
    tokens(path, [x for _ in range(400) for x in [*(draw.randrange(50000) for _ in range(9)), 7]])
    for ends in ([10, 1000, 2000], [10, 4000], [500, 1000], [10, 8000], [10, 20], [5000, 8000]):
        listed(lists, ends)
        drive(f"open 4 50304 global 0 0 {path}")
    listed(lists, [10, 2000])
    content = lists.read_bytes()
    for damaged in (b"", b"hello", content[:-9], content[:12], gzip.compress(b"a,b\n"), gzip.compress(b"0,-1,a,b,1\n")):
        lists.write_bytes(damaged)
        drive(f"open 4 50304 global 0 0 {path}")
    lists.unlink()
    lists.mkdir()
    drive(f"open 4 50304 global 0 0 {path}")
    lists.rmdir()
    os.mkfifo(lists)
    drive(f"open 4 50304 global 0 0 {path}")


def test_fingerprint(drive, tmp_path):
    values = [random.Random(3).randrange(300) for _ in range(30000)]

    def of(*files):
        return drive(f"open 50 300 global 1 0 {' '.join(files)}", "state")[0].split()[5]

    one = of(tokens(tmp_path / "a.npy", values))
    (tmp_path / "elsewhere").mkdir()
    assert of(tokens(tmp_path / "elsewhere" / "b.npy", values)) == one
    in_two = [tokens(tmp_path / "d.npy", values[:15000]), tokens(tmp_path / "e.npy", values[15000:])]
    seen = {one, of(tokens(tmp_path / "c.npy", values[:-1])), of(*in_two)}
    for i in (0, 12345, 29999):
        changed = values[:]
        changed[i] ^= 1
        seen.add(of(tokens(tmp_path / f"f{i}.npy", changed)))
    assert len(seen) == 6


def test_file_larger_than_memory(drive, tmp_path):
    """40 GB with holes: tokens 1 .. 8 at the ends, zeros between. Under 1 % of it may become resident."""
    path, size = tmp_path / "big.npy", 40 * 10**9 // 8192 * 8192
    with open(path, "wb") as f:
        f.write(struct.pack("<4H", 1, 2, 3, 4))
        f.seek(size - 8)
        f.write(struct.pack("<4H", 5, 6, 7, 8))
    last = size // 8192 - 1
    lines = drive(f"open 4096 50304 global 6198 1 {path}", "rows 0 1", f"rows {last} 1", "state", "next 8 0 1",
                  "resident")
    first, end = rows(lines[1:2])[0], rows(lines[4:5])[0]
    assert first[:5] == [1, 2, 3, 4, 0] and end[-5:] == [0, 5, 6, 7, 8]
    state = lines[6].split()
    assert state[2:5] == ["2", str(last + 1), str(size // 2)]
    assert int(lines[-1]) * 1024 < size / 100


def written(path, content):
    path.write_bytes(content)
    return str(path)


ODD_OFFSET = b"\x93NUMPY\x01\x00\x37\x00" + b"{'descr': '<u2', 'fortran_order': False, 'shape': (5,)}" + bytes(10)
BAD_FILES = {
    "missing": (lambda p: str(p / "nothing.npy"), "No such file"),
    "directory": (lambda p: str(p), "not a regular file"),
    "odd size": (lambda p: written(p / "x.npy", b"abc"), "odd number"),
    "empty": (lambda p: tokens(p / "x.npy", []), "no sequence of 4 tokens"),
    "too short": (lambda p: tokens(p / "x.npy", [1, 2, 3]), "has 3 tokens"),
    "text": (lambda p: written(p / "x.txt", b"hello world"), "olmoe tokenize"),
    "gzipped": (lambda p: written(p / "x.npy.gz", b""), "compressed by gzip; first: gunzip"),
    "zstd": (lambda p: written(p / "x.jsonl.zst", b""), "compressed by zstd; first: zstd -d"),
    "Parquet": (lambda p: written(p / "x.parquet", b""), "a Parquet table; first: write its texts as .jsonl"),
    "list of documents": (lambda p: written(p / "x.csv.gz", b""), "name the .npy beside it"),
    "being written": (lambda p: tokens(p / "x.npy.tmp", range(50)), "not complete"),
    "npy cut short": (lambda p: npy(p / "x.npy", range(50), shape="(51,)"), "51 tokens"),
    "npy too long": (lambda p: npy(p / "x.npy", range(50), shape="(49,)"), "49 tokens"),
    "npy int32": (lambda p: npy(p / "x.npy", range(50), descr="<i4", shape="(25,)"), "dtype <i4"),
    "npy int64": (lambda p: npy(p / "x.npy", range(48), descr="<i8", shape="(12,)"), "dtype <i8"),
    "npy uint32 cut short": (lambda p: npy(p / "x.npy", range(50), descr="<u4", shape="(51,)"), "51 tokens (4 bytes"),
    "npy big endian": (lambda p: npy(p / "x.npy", range(50), descr=">u2"), "dtype >u2"),
    "npy matrix": (lambda p: npy(p / "x.npy", range(50), shape="(5, 10)"), "shape (5, 10)"),
    "npy scalar": (lambda p: npy(p / "x.npy", [1], shape="()"), "shape ()"),
    "npy header past the end": (lambda p: npy(p / "x.npy", range(50), length=60000), "header"),
    "npy huge header": (lambda p: npy(p / "x.npy", range(50), version=2, length=2**32 - 1), "header"),
    "npy header cut off": (lambda p: npy(p / "x.npy", range(50), length=20), "header"),
    "npy version": (lambda p: npy(p / "x.npy", range(50), version=4), "header"),
    "npy magic only": (lambda p: written(p / "x.npy", b"\x93NUMPY"), "header"),
    "npy odd offset": (lambda p: written(p / "x.npy", ODD_OFFSET), "odd byte"),
    "bin cut short": (lambda p: llmc(p / "x.bin", range(50), count=51), "51 tokens"),
    "bin too long": (lambda p: llmc(p / "x.bin", range(50), count=49), "49 tokens"),
    "bin negative": (lambda p: llmc(p / "x.bin", range(50), count=-1), "header"),
    "bin version": (lambda p: llmc(p / "x.bin", range(50), version=2), "version 2"),
    "bin of uint32, version": (lambda p: llmc(p / "x.bin", range(50), magic=20240801), "version 1"),
    "bin of another program": (lambda p: llmc(p / "x.bin", range(50), magic=20240802), "magic"),
    "bin header only in part": (lambda p: written(p / "x.bin", struct.pack("<4i", 20240520, 1, 4, 0)), "header"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(drive, tmp_path, case):
    make, reason = BAD_FILES[case]
    path = make(tmp_path)
    message = drive(f"open 4 64 global 0 0 {path}", "next 1 0 1", fails=True)
    assert reason in message and path in message


def test_no_files(drive):
    assert "no token file" in drive("open 4 64 global 0 0", fails=True)


def test_token_outside_of_the_vocabulary(drive, tmp_path):
    good, bad = tokens(tmp_path / "good.npy", [63] * 8), tokens(tmp_path / "bad.npy", [0, 1, 2, 3, 4, 5, 64, 7])
    message = drive(f"open 4 64 sequential 0 0 {good} {bad}", "next 4 0 1", fails=True)
    assert bad in message and "token 6 has id 64" in message and "vocabulary of 64" in message
    drive(f"open 4 65 sequential 0 0 {good} {bad}", "next 4 0 1")


def test_impossible_batches(drive, tmp_path):
    files = sixteen(tmp_path)
    assert "only 16" in drive(f"open 3 200 global 0 0 {files}", "next 17 0 1", fails=True)
    for batch in ("3 0 2", "4 4 4", "4 -1 4", "0 0 1", "4 0 0"):
        assert "cannot be divided" in drive(f"open 3 200 global 0 0 {files}", f"next {batch}", fails=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

def read_tokens(path):
    raw = path.read_bytes()
    return list(struct.unpack(f"<{len(raw) // 2}H", raw))


def test_tokenize_round_trip(drive, tmp_path):
    texts = ["Hello, world.", "  two lines\nand a \"quote\" \u00a0\n", "naïve 日本語 😀\u3000", "   ", ""]
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        for i, text in enumerate(texts):
            f.write(json.dumps({"id": f"story,\"x\"-{i}", "text": text}, ensure_ascii=i % 2 == 0) + "\n")
        f.write("\n" + json.dumps({"text": "no id", "other": 1}))      # an empty line, and a last line without its end
    (tmp_path / "all.txt").write_bytes(bytes(range(256)))
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as f:
        f.write('{"id": "z-1", "text": "zipped"}\n')
    out = tmp_path / "out.npy"
    command = f"tokenize bytes {out} {tmp_path}/a.jsonl {tmp_path}/all.txt {tmp_path}/z.jsonl.gz"
    kept = [t.strip().encode() for t in texts[:3]] + [b"no id", bytes(range(256)), b"zipped"]
    kept[4] = bytes(range(256))     # its first and last bytes are no white space
    lines, said = drive(command, f"documents {out}", says=True)
    assert said == [f"{tmp_path}/all.txt: 128 bytes are not UTF-8, the first at byte 129; kept as they are"]
    expected = [x for text in kept for x in list(text) + [256]]
    assert read_tokens(out) == expected and lines[0] == f"6 {len(expected)} 1 0"

    starts = [0]
    for text in kept:
        starts.append(starts[-1] + len(text) + 1)
    ids = ['story,"x"-0', 'story,"x"-1', 'story,"x"-2', "a.jsonl-7", "all.txt", "z-1"]
    assert lines[1:] == [f"{starts[i]}\t{starts[i + 1]}\t{ids[i]}\t{ids[i].split('-')[0]}" for i in range(6)]
    with gzip.open(tmp_path / "out.csv.gz", "rt") as f:
        table = f.read().splitlines()
    assert table[0] == f'0,{starts[1]},"story,""x""-0",{tmp_path}/a.jsonl,1'
    assert table[3] == f"{starts[3]},{starts[4]},a.jsonl-7,{tmp_path}/a.jsonl,7"
    assert table[5] == f"{starts[5]},{starts[6]},z-1,{tmp_path}/z.jsonl.gz,1" and len(table) == 6

    decoded = drive("decode " + " ".join(map(str, expected)), "decode 256 257 319 -1 65")
    assert bytes.fromhex(decoded[0]) == b"".join(kept) and decoded[1] == "41"

    before = [(tmp_path / name).read_bytes() for name in ("out.npy", "out.csv.gz")]
    drive(command, says=True)
    assert before == [(tmp_path / name).read_bytes() for name in ("out.npy", "out.csv.gz")]


def test_strip_is_pythons(drive, tmp_path):
    spaces = [chr(c) for c in range(0x3001) if chr(c).isspace()]
    assert len(spaces) > 20
    text = "".join(spaces) + "a" + "".join(spaces) + "b" + "".join(reversed(spaces))
    (tmp_path / "a.txt").write_bytes(text.encode())
    drive(f"tokenize bytes {tmp_path}/a.npy {tmp_path}/a.txt")
    assert bytes(read_tokens(tmp_path / "a.npy")[:-1]) == text.strip().encode()
    (tmp_path / "b.txt").write_bytes("\u2800é\u00e0".encode())      # share bytes with white space, but are none
    drive(f"tokenize bytes {tmp_path}/b.npy {tmp_path}/b.txt")
    assert bytes(read_tokens(tmp_path / "b.npy")[:-1]) == "\u2800é\u00e0".encode()


def test_long_lines_and_many_documents(drive, tmp_path):
    """Lines longer than the read buffer, and line breaks on its edge."""
    texts = ["x" * n for n in (70000, 65535, 65536, 1, 200000)] + ["y"] * 3000
    with open(tmp_path / "a.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    lines = drive(f"tokenize bytes {tmp_path}/a.npy {tmp_path}/a.jsonl", f"documents {tmp_path}/a.npy")
    assert [int(x.split()[1]) - int(x.split()[0]) - 1 for x in lines[1:]] == [len(t) for t in texts]


BAD_TEXT = {
    "nothing": ("a.jsonl", b"\n\n", "no text"),
    "empty documents": ("a.jsonl", b'{"text": ""}\n{"text": "  "}\n', "no text"),
    "empty file": ("a.txt", b"", "no text"),
    "other name": ("a.csv", b"a,b\n", "neither .txt"),
    "json of many lines": ("a.json", b'{\n"text": "a"\n}\n', "neither .txt"),
    "zstd": ("a.jsonl.zst", b"", "not text, but compressed by zstd; first: zstd -d"),
    "Parquet": ("a.parquet", b"", "not text, but a Parquet table; first: write its texts as .jsonl"),
    "tokens": ("a.npy.gz", b"", "not text, but compressed by gzip; first: gunzip"),
    "zstd by another name": ("a.jsonl.gz", b"\x28\xb5\x2f\xfd" + bytes(99), "not text, but compressed by zstd"),
    "tokens by another name": ("a.txt", b"\x93NUMPY" + bytes(99), "not text, but numbers"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(b'{"text": "good"}\n' * 100, mtime=0)[:-20], "damaged"),
    "gzip damaged": ("a.txt.gz", gzip.compress(random.Random(4).randbytes(5000))[:2000] + bytes(100), "damaged"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text_writes_nothing(drive, tmp_path, case):
    name, content, reason = BAD_TEXT[case]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "x.npy"
    first = f"{tmp_path}/good.txt " if reason != "no text" else ""
    message = drive(f"tokenize bytes {out} {first}{tmp_path}/{name}", fails=True)
    assert reason in message and name in message
    assert os.listdir(tmp_path / "out") == []
    out.write_bytes(b"ab")
    drive(f"tokenize bytes {out} {first}{tmp_path}/{name}", fails=True)
    assert os.listdir(tmp_path / "out") == ["x.npy"] and out.read_bytes() == b"ab"


def test_tokenize_refusals(drive, tmp_path):
    (tmp_path / "a.txt").write_text("good")
    assert "missing.txt" in drive(f"tokenize bytes {tmp_path}/a.npy {tmp_path}/missing.txt", fails=True)
    message = drive(f"tokenize martian {tmp_path}/a.npy {tmp_path}/a.txt", fails=True)
    assert "tokenizer martian: cannot be read" in message
    assert "no/such/a.npy" in drive(f"tokenize bytes {tmp_path}/no/such/a.npy {tmp_path}/a.txt", fails=True)
    assert "no input file" in drive(f"tokenize bytes {tmp_path}/a.npy", fails=True)
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]


DAMAGED = [(b'{"text": "bad', "not JSON from byte 14"), (b'["text"]', "not an object with a string \"text\""),
           (b'{"id": "x"}', "not an object with a string"), (b'{"text": 5}', "not an object with a string"),
           (b'{"text": "\xff\xfe"}', "not UTF-8 at byte 11"), (b'{"text": "\\ud800"}', "not JSON"),
           (b"[" * 100000, "not JSON"), (b'{"text": "a"} {"text": "b"}', "not JSON from byte 15")]


def test_damaged_lines_are_left_out(drive, tmp_path):
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(len(DAMAGED) + 1)]
    pairs = [[good[i], DAMAGED[i][0]] for i in range(len(DAMAGED))]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(sum(pairs, [])) + b"\n" + good[-1])
    lines, said = drive(f"tokenize bytes {tmp_path}/x.npy {tmp_path}/a.jsonl", f"documents {tmp_path}/x.npy", says=True)
    text = bytes(t if t < 256 else 10 for t in read_tokens(tmp_path / "x.npy")).decode()
    assert text.splitlines() == [f"good {i}" for i in range(len(good))]
    assert lines[0].split()[0::3] == [str(len(good)), str(len(DAMAGED))] and len(lines) == 1 + len(good)
    assert len(said) == len(DAMAGED)
    for i, (line, (_, why)) in enumerate(zip(said, DAMAGED)):
        assert line.startswith(f"{tmp_path}/a.jsonl:{2 * i + 2}: {why}"), line


def test_numbers_too_large_for_a_double(drive, tmp_path):
    """They are errors of the JSON library, also where nobody reads them. The lines are read; what is really no JSON is
    reported at its byte."""
    zeros = "0" * 400
    lines = ['{"id": "a", "text": "one"}', '{"id": "b", "text": "two", "score": 1e400}',
             '{"id": "c", "scores": [-1e400, 1' + zeros + ', 1.5E+999], "text": "three 1e400 \\" 1e400"}',
             '{"id": 1e400, "text": "four"}', '{"id": 1' + zeros + ', "text": "five"}',
             '{"score": 01e400, "text": "bad"}', '{"score": 1e400, "text": "bad}', '{"text": 1e400}',
             '{"text": "last"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    x = tmp_path / "x.npy"
    printed, said = drive(f"tokenize bytes {x} {tmp_path}/a.jsonl", f"documents {x}", says=True)
    text = bytes(t if t < 256 else 10 for t in read_tokens(x)).decode()
    assert text.splitlines() == ["one", "two", 'three 1e400 " 1e400', "four", "five", "last"]
    assert [line.split("\t")[2] for line in printed[1:]] == ["a", "b", "c", "a.jsonl-4", "a.jsonl-5", "a.jsonl-9"]
    assert printed[0].split()[0::3] == ["6", "3"] and len(said) == 3
    for line, number, why in zip(said, (6, 7, 8), ("JSON from byte 16 on", "JSON from byte 31 on", "an object with")):
        assert line.startswith(f"{tmp_path}/a.jsonl:{number}: not {why}") and line.endswith("; left out"), line


def test_ids_that_are_numbers(drive, tmp_path):
    """They are those of the file, digit for digit; without an id that is a string or a number it is FILE-LINE."""
    ids = {"7": "7", "-3": "-3", "0": "0", "18446744073709551615": "18446744073709551615", "1.0": "1.0",
           "123456789012345678901234567890": "123456789012345678901234567890", '"x"': "x", '"7"': "7", "null": None,
           "true": None, "[7]": None, '{"id": 7}': None}
    lines = [f'{{"id": {i}, "text": "a", "more": {{"id": 5, "text": "b"}}}}' for i in ids] + ['{"text": "a"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    printed = drive(f"tokenize bytes {tmp_path}/x.npy {tmp_path}/a.jsonl", f"documents {tmp_path}/x.npy")
    wanted = [i or f"a.jsonl-{number}" for number, i in enumerate([*ids.values(), None], 1)]
    assert [line.split("\t")[2] for line in printed[1:]] == wanted
    assert read_tokens(tmp_path / "x.npy") == [97, 256] * len(lines)


def test_text_that_is_not_utf8(drive, tmp_path):
    """One line for a file: how many bytes, as Python counts them, where the first is, and whether it is UTF-16."""
    draw, words = random.Random(5), ["café", "日本", "x" * 9, " ", "\n", "😀"]
    long = b"".join(draw.choice([b"\xe9", b"\xf0\x9f\x98", b"\xe6\x97 "]) if draw.random() < 0.001
                    else draw.choice(words).encode() for _ in range(300000))
    texts = {"utf8": "café 日本 😀 \ufffd".encode(), "empty": b"", "one": b"a\x80", "latin": b"  caf\xe9 ol\xe9\n",
             "cut": "eight bytes 日".encode()[:-1], "surrogate": b"a\xed\xa0\x80b", "long": long,
             "late": b"a b" * 200000 + b"\xff", "little": "hi é".encode("utf-16"), "bom": b"\xef\xbb\xbfa",
             "big": b"\xfe\xff" + "hi".encode("utf-16-be")}
    wanted = []
    for name, text in texts.items():
        packed = name == "long"
        path = tmp_path / (name + ".txt" + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(text) if packed else text)
        wrong, rest = [], text
        while rest:
            try:
                rest.decode()
                break
            except UnicodeDecodeError as e:
                wrong.append((len(text) - len(rest) + e.start, e.end - e.start))
                rest = rest[e.end:]
        n = sum(size for _, size in wrong)
        mark = "begins with the mark of UTF-16, but is read as UTF-8; " if name in ("little", "big") else ""
        what = "byte is" if n == 1 else "bytes are"
        if wrong:
            wanted.append(f"{path}: {mark}{n} {what} not UTF-8, the first at byte {wrong[0][0] + 1}; ")
    inputs = " ".join(str(tmp_path / n) for n in (t + (".txt.gz" if t == "long" else ".txt") for t in texts))
    _, said = drive(f"tokenize bytes {tmp_path}/x.npy threads=2 {inputs}", says=True)
    assert said == [line + "kept as they are" for line in wanted] and len(said) == 8
    tokenizer = os.path.join(ROOT, "tests", "fixtures", "tokenizer", "tokenizer.json")
    _, said = drive(f"tokenize {tokenizer} {tmp_path}/y.npy {inputs}", says=True)
    assert said == [line + "replaced by U+FFFD" for line in wanted]
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "b"}'.encode("utf-16"))
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\xff\xfe{"text": "b"}')
    _, said = drive(f"tokenize bytes {tmp_path}/z.npy {tmp_path}/a.jsonl {tmp_path}/b.jsonl", says=True)
    assert said == [f"{tmp_path}/a.jsonl:1: UTF-16, and not UTF-8; left out",
                    f"{tmp_path}/a.jsonl:2: not JSON from byte 1 on; left out",
                    f"{tmp_path}/b.jsonl:2: not JSON from byte 1 on; left out"]


def test_damaged_lines_past_the_twentieth_are_counted(drive, tmp_path):
    for name, count in (("a", 30), ("b", 21), ("c", 20)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(["{"] * count + ['{"text": "good"}']))
    inputs = " ".join(f"{tmp_path}/{name}.jsonl" for name in "abc")
    lines, said = drive(f"tokenize bytes {tmp_path}/x.npy {inputs}", says=True)
    assert lines == ["3 15 1 71"] and len(said) == 62
    assert said[20] == f"{tmp_path}/a.jsonl: 10 more damaged lines"
    assert said[41] == f"{tmp_path}/b.jsonl: 1 more damaged lines"
    assert said[61].startswith(f"{tmp_path}/c.jsonl:20: ")


def folder(path):
    """Name -> digest. Where bytes differ, pytest would print the difference, which takes minutes."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Some MB of text in all kinds of input: gzipped or not, a document a line or a file, small ones and large ones,
    damaged lines."""
    d, draw = tmp_path_factory.mktemp("texts"), random.Random(7)
    words = ["the", "cat", "sät", "日本", "on", "a", "mat", "😀", "12", "\n\n", "  ", "x" * 50]
    text = lambda n: " ".join(draw.choices(words, k=n))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
        with (gzip.open if name.endswith("gz") else open)(d / name, "wt", encoding="utf-8") as f:
            for i in range(1500):
                if draw.random() < 0.01:
                    f.write("{\n")
                    continue
                document = {"text": text(draw.choice([0, 1, 20, 200])), "id": f"{name}-{i}"}
                f.write(json.dumps(document, ensure_ascii=False) + "\n")
            f.write(json.dumps({"text": text(100000)}))
    (d / "d.txt").write_text(text(150000))
    (d / "e.txt").write_text("")
    with gzip.open(d / "f.txt.gz", "wt") as f:
        f.write(text(60000))
    for i in range(100):
        (d / f"g{i}.txt").write_text(text(10))
    return " ".join(str(d / name) for name in sorted(os.listdir(d)))


def expected_files(texts, max_tokens):
    """Tokens and rows of every file, by the rules, one document after the other."""
    files, n = [([], [])], 0
    for path in re.split(" (?=/)", texts):
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            lines = [f.read()] if ".txt" in path else f.read().split("\n")
        for number, line in enumerate(lines, 1):
            document, name = {"text": line, "id": os.path.basename(path)}, os.path.basename(path)
            if ".jsonl" in path:
                if line in ("", "{"):
                    continue
                document = {"id": f"{name}-{number}", **json.loads(line)}
            if not document["text"].strip():
                continue
            ids = list(document["text"].strip().encode()) + [256]
            n += 1
            if max_tokens and files[-1][0] and len(files[-1][0]) + len(ids) >= max_tokens:
                files.append(([], []))
            while ids:
                if max_tokens and len(files[-1][0]) + len(ids) > max_tokens and files[-1][0]:
                    files.append(([], []))
                part, ids = (ids[:max_tokens], ids[max_tokens:]) if max_tokens else (ids, [])
                start = len(files[-1][0])
                files[-1][1].append(f"{start},{start + len(part)},{document['id']},{path},{number}")
                files[-1][0].extend(part)
    return n, files


@pytest.mark.parametrize("max_tokens", [0, 10**8, 1 << 20, 20000])
def test_tokenize_by_the_rules(drive, tmp_path, texts, max_tokens):
    n, files = expected_files(texts, max_tokens)
    lines, _ = drive(f"tokenize bytes {tmp_path}/x.npy max={max_tokens} threads=3 {texts}", says=True)
    assert lines[0].split()[:3] == [str(n), str(sum(len(f[0]) for f in files)), str(len(files))]
    assert len(files) == {0: 1, 10**8: 1, 1 << 20: 8}.get(max_tokens, len(files))
    assert max_tokens != 20000 or len(files) > 200
    names = ["x"] if len(files) == 1 else [f"x-{i:05d}" for i in range(len(files))]
    assert sorted(os.listdir(tmp_path)) == sorted(f"{name}.{kind}" for name in names for kind in ("npy", "csv.gz"))
    for name, (ids, table) in zip(names, files):
        assert (tmp_path / f"{name}.npy").read_bytes() == struct.pack(f"<{len(ids)}H", *ids), name
        packed = (tmp_path / f"{name}.csv.gz").read_bytes()
        # neither a name nor a time
        assert gzip.decompress(packed).decode().splitlines() == table and packed[3:8] == bytes(5)
        assert not max_tokens or len(ids) <= max_tokens


def test_tokenize_document_that_reaches_the_limit(drive, tmp_path):
    """It begins the next file, as in dolma; one as long as the limit has a file for itself, longer ones several."""
    (tmp_path / "a.jsonl").write_text('{"text": "aaaa"}\n{"text": "bbbb"}\n')
    (tmp_path / "b.txt").write_text("b" * 9)
    sizes = lambda: [p.stat().st_size // 2 for p in sorted(tmp_path.glob("x*.npy"))]
    drive(f"tokenize bytes {tmp_path}/x.npy max=11 {tmp_path}/a.jsonl")
    assert sizes() == [10]
    for limit, found in ((10, [5, 5, 10]), (12, [10, 10]), (9, [5, 5, 9, 1]), (5, [5, 5, 5, 5])):
        drive(f"tokenize bytes {tmp_path}/x.npy max={limit} restart {tmp_path}/a.jsonl {tmp_path}/b.txt")
        assert sizes() == found, limit


def test_tokenize_any_number_of_threads(drive, tmp_path, texts):
    found = []
    for threads in (1, 2, 3, 7):
        (tmp_path / str(threads)).mkdir()
        command = f"tokenize bytes {tmp_path}/{threads}/x.npy max=500000 save=300000 threads={threads} {texts}"
        lines, said = drive(command, says=True)
        found.append((lines, said, folder(tmp_path / str(threads))))
    assert all(f == found[0] for f in found) and len(found[0][2]) > 20 and len(found[0][1]) > 20


def test_tokenize_threads_do_not_race(tmp_path, texts):
    program = build(tmp_path / "racing", "thread")
    command = f"tokenize bytes {tmp_path}/x.npy max=500000 save=300000 threads=7 {texts}"
    r = subprocess.run([program], input=words(command), capture_output=True, text=True)
    assert r.returncode == 0 and "WARNING" not in r.stderr, r.stderr[-3000:]


@pytest.mark.parametrize("max_tokens", [0, 300000])
def test_tokenize_killed_again_and_again(program, drive, tmp_path, texts, max_tokens):
    """Killed soon after a save, as often as it takes; then the files are those of a run that was not killed, and there
    are no others."""
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    command = "tokenize bytes {}/x.npy max={} save=100000 threads=3 {}"
    straight, _ = drive(command.format(tmp_path / "straight", max_tokens, texts), says=True)
    draw, kills, went_on, state = random.Random(3), 0, 0, tmp_path / "killed" / "x.npy.state"

    def saved():
        return state.stat().st_ino if state.exists() else 0

    for attempt in range(100):
        went_on += state.exists()
        before = saved()
        with open(tmp_path / "said", "w+") as said:
            process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
            process.stdin.write(words(command.format(tmp_path / "killed", max_tokens, texts)))
            process.stdin.close()
            while process.poll() is None and (saved() == before or kills == 12):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.05))
            if process.poll() is not None:
                assert process.returncode == 0, open(said.name).read()[-1000:]
                assert process.stdout.read().splitlines() == straight, open(said.name).read()[-1000:]
                break
            process.kill()
            process.wait()
            kills += 1
        # killed after its last step, before it reported that
        if folder(tmp_path / "killed") == folder(tmp_path / "straight"):
            break
    assert folder(tmp_path / "killed") == folder(tmp_path / "straight")
    assert kills >= 3 and went_on >= 2, (kills, went_on)


def test_tokenize_stopped_at_every_step(drive, tmp_path, monkeypatch):
    """Between any two steps that another program could see."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "text " * (i % 300)}) + "\n" for i in range(1000)))
    (tmp_path / "b.txt").write_text("text " * 100000)
    texts = f"{tmp_path}/a.jsonl {tmp_path}/b.txt"
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    command = "tokenize bytes {}/x.npy max=400000 save=200000 threads=2 {}"
    drive(command.format(tmp_path / "straight", texts))
    for step in range(1, 100):
        monkeypatch.setenv("DIE_AT", str(step))
        for p in (tmp_path / "stopped").iterdir():
            p.unlink()
        r = drive(command.format(tmp_path / "stopped", texts), stopped=True)
        monkeypatch.delenv("DIE_AT")
        if r == 0:
            break
        drive(command.format(tmp_path / "stopped", texts))
        assert folder(tmp_path / "stopped") == folder(tmp_path / "straight"), step
    assert step > 15


@pytest.mark.parametrize("call", ["FOLDER_OPEN", "FOLDER_SYNC"])
def test_tokenize_folder_that_cannot_be_synced(drive, tmp_path, monkeypatch, call):
    """It is no error but where the disk fails or is full. Then what was written stays, with the state that knows it."""
    (tmp_path / "out").mkdir()
    x, a = tmp_path / "out" / "x.npy", tmp_path / "a.txt"
    no_errors = (errno.EACCES, errno.EINVAL, errno.EROFS, errno.ENOTSUP, errno.EMFILE, errno.ENOENT)
    for length, error in enumerate(no_errors):
        a.write_text("x" * (length + 5))
        monkeypatch.setenv(call, str(error))
        assert drive(f"tokenize bytes {x} {a}") == [f"1 {length + 6} 1 0"]
        assert read_tokens(x) == [120] * (length + 5) + [256] and sorted(folder(x.parent)) == ["x.csv.gz", "x.npy"]
    for length, error in enumerate((errno.EIO, errno.ENOSPC, errno.EDQUOT)):
        for there in (True, False):
            if not there:
                x.unlink()
            old = folder(x.parent)
            a.write_text("y" * (10 + 2 * length + there))
            monkeypatch.setenv(call, str(error))
            message = drive(f"tokenize bytes {x} {a}", fails=True)
            assert f"{os.strerror(error)}; the same command goes on from what is saved" in message
            assert {"x.npy.state", "x.npy.tmp", "x.csv.gz.tmp"} < set(folder(x.parent))
            assert {name: d for name, d in folder(x.parent).items() if name in old} == old
            monkeypatch.delenv(call)
            assert drive(f"tokenize bytes {x} {a}") == [f"1 {11 + 2 * length + there} 1 0"]
            assert read_tokens(x) == [121] * (10 + 2 * length + there) + [256]
            assert sorted(folder(x.parent)) == ["x.csv.gz", "x.npy"]


def test_tokenize_believes_only_the_files_that_it_saved(drive, tmp_path, monkeypatch):
    """Stopped where a state is there, finished or not: without one of its files, or with another in its place, the same
    command is refused by that file's name, and changes nothing. Parts that have their final names count by size."""
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(250)))
    (tmp_path / "b.txt").write_text("b" * 400)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(random.Random(4).randbytes(5000))[:2000])
    # as much as is encoded at a time, BATCH_BYTES: after it is a save, and then comes what can't be read
    (tmp_path / "d.jsonl").write_text('{"text": "dddddddd", "more": "%s"}\n' % ("." * 16000) * 17)
    out = tmp_path / "out"
    out.mkdir()
    all_ways, one, names = ("none", "short", "other"), f"{tmp_path}/a.txt", ("x.csv.gz.tmp", "x.npy.tmp")
    parts = [f"x-{part:05d}.{kind}" for part in range(3) for kind in ("csv.gz", "npy")]
    # 3, 5 and 7: the state, the .csv.gz and the .npy have just been renamed
    cases = [(one, 3, names, all_ways), (one, 5, ("x.csv.gz", "x.npy.tmp"), all_ways),
             (one, 7, ("x.csv.gz", "x.npy"), all_ways),
             (f"max=260 {one} {tmp_path}/b.txt", 3, ("x.npy.tmp", "x-00001.npy.tmp", "x-00002.csv.tmp"), all_ways),
             (f"max=260 save=1 {one} {tmp_path}/b.txt {tmp_path}/d.jsonl {tmp_path}/c.txt.gz", 0, parts,
              ("none", "short")),
             (f"save=1 {tmp_path}/d.jsonl {tmp_path}/c.txt.gz", 0, ("x.npy.tmp", "x.csv.tmp"), all_ways)]
    for options, step, files, ways in cases:
        command = f"tokenize bytes {out}/x.npy {options}"
        for p in out.iterdir():
            p.unlink()
        monkeypatch.setenv("DIE_AT", str(step))
        assert drive(command, stopped=True) == (2 if step else 1)
        monkeypatch.delenv("DIE_AT")
        assert {"x.npy.state", *files} <= set(folder(out))
        for name in files:
            was = (out / name).read_bytes()
            for way in ways:
                (out / name).unlink() if way == "none" else (out / name).write_bytes(was[:-1] + b"!" * (way == "other"))
                before = folder(out)
                message = drive(command, fails=True)
                assert "not as the stopped run left it; start over with --restart" in message, (options, name, way)
                final = name.replace(".tmp", "")        # of several parts the first is x-00000 when it is complete
                assert final in message or final.replace("x.", "x-00000.") in message, (options, way, message)
                after = folder(out)
                assert all(after[n] == before[n] for n in before), (options, name, way)
                (out / name).write_bytes(was)
                for new in set(after) - set(before) - {name}:
                    (out / new).unlink()
        if step:
            drive(command)


@pytest.mark.parametrize("max_tokens", [0, 300])
def test_tokenize_two_at_a_time_at_every_step(program, drive, tmp_path, max_tokens):
    """A second run, while the first is stopped between two steps that others could see: it is refused, or finds the
    first one finished. It does the first no harm."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "text " * (i % 30)}) + "\n" for i in range(20)))
    for name in ("straight", "twice"):
        (tmp_path / name).mkdir()
    command = f"tokenize bytes {{}}/x.npy max={max_tokens} {tmp_path}/a.jsonl"
    straight, refused = drive(command.format(tmp_path / "straight")), 0
    twice = words(command.format(tmp_path / "twice"))
    for step in range(1, 100):
        for p in (tmp_path / "twice").iterdir():
            p.unlink()
        first = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True, env={**os.environ, "STOP_AT": str(step)})
        first.stdin.write(twice)
        first.stdin.close()
        stopped = os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code == os.CLD_STOPPED
        if stopped:
            second = subprocess.run([program], input=twice, capture_output=True, text=True)
            refused += second.returncode
            assert second.returncode == 0 or "another run is writing it" in second.stderr, (step, second.stderr)
            assert second.returncode == 1 or second.stdout.splitlines() == straight, step
            first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 0, (step, first.stderr.read())
        assert folder(tmp_path / "twice") == folder(tmp_path / "straight"), step
        if not stopped:
            break
    assert step > 8 and refused > 0


def test_tokenize_goes_on_only_with_the_same(drive, tmp_path, texts):
    """What was saved is refused where inputs that were read, options or the tokenizer are others; inputs not yet read
    may be."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(30000)))
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 100, mtime=0)[:-20])
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "out").mkdir()
    x, a, bad, good = (tmp_path / name for name in ("out/x.npy", "a.jsonl", "bad.jsonl.gz", "good.txt"))
    message = drive(f"tokenize bytes {x} save=100000 {a} {bad}", fails=True)
    assert "bad.jsonl.gz:" in message and "cannot be read from here on" in message
    assert "the same command goes on" in message
    saved = folder(tmp_path / "out")
    assert sorted(saved) == ["x.csv.tmp", "x.npy.state", "x.npy.tmp"]
    for command in (f"max=100000000 {a} {bad}", f"{good} {a}", f"{bad}"):
        message = drive(f"tokenize bytes {x} save=100000 {command}", fails=True)
        assert "x.npy.state: saved by a run with other inputs" in message and folder(tmp_path / "out") == saved
    was = os.stat(a)
    os.utime(a, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    assert "other inputs" in drive(f"tokenize bytes {x} {a} {bad}", fails=True)
    os.utime(a, ns=(was.st_atime_ns, was.st_mtime_ns))
    lines = drive(f"tokenize bytes {x} save=100000 {a} {good}")
    assert lines[0].startswith("30001 ") and sorted(folder(tmp_path / "out")) == ["x.csv.gz", "x.npy"]
    went_on = folder(tmp_path / "out")
    drive(f"tokenize bytes {x} {a} {good}")
    assert folder(tmp_path / "out") == went_on

    for content in (b"", b"{}", b"nonsense", b'{"run": 1, "at": 2}'):
        (tmp_path / "out" / "x.npy.state").write_bytes(content)
        message = drive(f"tokenize bytes {x} {good}", fails=True)
        assert "x.npy.state: " in message and "--restart" in message
    assert drive(f"tokenize bytes {x} restart {good}") == ["1 5 1 0"]
    assert sorted(folder(tmp_path / "out")) == ["x.csv.gz", "x.npy"]


def test_tokenize_replaces_parts_only_when_told(drive, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    x, a = tmp_path / "x.npy", tmp_path / "a.txt"
    drive(f"tokenize bytes {x} {a}")
    assert "x.npy: written by an earlier run" in drive(f"tokenize bytes {x} max=20 {a}", fails=True)
    assert sorted(folder(tmp_path)) == ["a.txt", "x.csv.gz", "x.npy"]
    assert drive(f"tokenize bytes {x} max=20 restart {a}")[0] == "1 101 6 0"
    many = folder(tmp_path)
    assert sorted(many) == sorted(["a.txt"] + [f"x-{i:05d}.{s}" for i in range(6) for s in ("npy", "csv.gz")])
    assert "x-00000.npy: written by an earlier run" in drive(f"tokenize bytes {x} max=60 {a}", fails=True)
    assert folder(tmp_path) == many
    assert drive(f"tokenize bytes {x} max=60 restart {a}")[0] == "1 101 2 0"
    assert sorted(folder(tmp_path)) == ["a.txt", "x-00000.csv.gz", "x-00000.npy", "x-00001.csv.gz", "x-00001.npy"]
    assert drive(f"tokenize bytes {x} max=200 restart {a}")[0] == "1 101 1 0"
    assert sorted(folder(tmp_path)) == ["a.txt", "x.csv.gz", "x.npy"]


def test_pieces_of_a_long_text(drive, tmp_path):
    """They are cut before white space that does not follow white space, where no word of a tokenizer can reach across,
    and so that little is left at the ends to strip."""
    draw = random.Random(9)
    parts = {"a": 9, "é": 2, "日": 2, " ": 3, "\n": 1, "\u3000": 1, "\u00a0": 1, "\x1c": 1, "\t": 1, "x" * 99: 1}
    text = "".join(draw.choices(list(parts), weights=list(parts.values()), k=60000))
    (tmp_path / "a.txt").write_text(text, newline="")
    for size in (1, 1000, 70000):
        pieces = [bytes.fromhex(line).decode() for line in drive(f"pieces {size} {tmp_path}/a.txt")]
        assert "".join(pieces) == text and len(pieces) > 1
        assert all(p[0] in " \t\n" for p in pieces[1:]) and not any(p[-1].isspace() for p in pieces[:-1])
        assert max(len(p.encode()) for p in pieces[:-1]) < size + (1 << 16) + 200
    (tmp_path / "b.txt").write_bytes(b" " * 200000 + b"a" * 300000 + b" " * 100000)
    assert [len(line) // 2 for line in drive(f"pieces 1000 {tmp_path}/b.txt")] == [500000, 100000]
    drive(f"tokenize bytes {tmp_path}/b.npy {tmp_path}/b.txt")
    assert read_tokens(tmp_path / "b.npy") == [97] * 300000 + [256]


def full_at(size):
    """A limit on file sizes, in place of a full disk: a write fails in the middle."""
    def limit():
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit


def test_full_disk(drive, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 300000)
    (tmp_path / "out").mkdir()
    command = f"tokenize bytes {tmp_path}/out/x.npy {tmp_path}/a.txt"
    assert "File too large" in drive(command, fails=True, limit=full_at(100000))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("size", [0, 10, 1000, 2000, 10000])
def test_full_disk_by_the_documents(drive, tmp_path, size):
    """Many documents of two tokens: it is the list of documents that finds no room."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 2000)
    (tmp_path / "out").mkdir()
    command = f"tokenize bytes {tmp_path}/out/x.npy {tmp_path}/a.jsonl"
    assert "File too large" in drive(command, fails=True, limit=full_at(size))
    assert os.listdir(tmp_path / "out") == []


def test_full_disk_loses_nothing(drive, tmp_path, texts):
    """What was saved stays, and the run goes on from there when there is room again."""
    for name in ("straight", "out"):
        (tmp_path / name).mkdir()
    command = "tokenize bytes {}/x.npy save=100000 {}"
    straight, _ = drive(command.format(tmp_path / "straight", texts), says=True)
    r = drive(command.format(tmp_path / "out", texts), stopped=True, limit=full_at(3000000))
    assert r == 1 and sorted(os.listdir(tmp_path / "out")) == ["x.csv.tmp", "x.npy.state", "x.npy.tmp"]
    assert drive(command.format(tmp_path / "out", texts), says=True)[0] == straight
    assert folder(tmp_path / "out") == folder(tmp_path / "straight")


def test_files_reach_the_disk_before_their_names(drive, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setenv("TRACE", "1")
    trace = drive(f"tokenize bytes {tmp_path}/x.npy {tmp_path}/a.txt")
    a, b, s = f"{tmp_path}/x.npy", f"{tmp_path}/x.csv.gz", f"{tmp_path}/x.npy.state"
    assert sorted(trace[:2]) == sorted([f"fsync {a}.tmp", f"fsync {b}.tmp"])
    assert trace[2:5] == [f"fsync {s}.tmp", f"rename {s}.tmp {s}", f"fsync {tmp_path}"]
    assert trace[5:8] == [f"rename {b}.tmp {b}", f"rename {a}.tmp {a}", f"fsync {tmp_path}"]


def test_documents_of_other_files(drive, tmp_path):
    """They are left out, with one line that says why."""
    path = tokens(tmp_path / "a.npy", range(9))
    assert drive(f"documents {path}") == []
    lists = tmp_path / "a.csv.gz"
    for content in (b"0,5,a\n3,9,b\n", b"5,3,a\n", b"x,3,a\n", b"0,3\n", b"\n", b"0,1x,a,b,1\n"):
        lists.write_bytes(gzip.compress(content))
        found, = drive(f"documents {path}")
        assert found.startswith(f"left out: {lists}:") and "not a line of start,end,id" in found
    for end in (8, 10):
        lists.write_bytes(gzip.compress(b"0,5,a,b,1\n5,%d,b,b,1\n" % end))
        assert drive(f"documents {path}") == [f"left out: {lists}: its documents have {end} tokens, and {path} has 9"]
    cut = gzip.compress(b"0,9,a,b,1\n")[:-6]
    for content, why in ((cut, "damaged after 1 documents"), (b"", "holds no documents")):
        lists.write_bytes(content)
        assert drive(f"documents {path}") == [f"left out: {lists}: {why}"]
    lists.write_bytes(gzip.compress(b"0,5,a-1,b,1\n5,9,b,b,1\n"))
    assert drive(f"documents {path}") == ["0\t5\ta-1\ta", "5\t9\tb\tb"]
    lists.unlink()
    lists.mkdir()
    assert drive(f"documents {path}") == [f"left out: {lists}: not a regular file"]


def test_tokenize_writes_uint32_for_large_ids(drive, tmp_path):
    """A tokenizer with an id above 65,535: all its files are uint32, with or without such an id, also where a run goes
    on."""
    tokenizer = json.load(open(os.path.join(ROOT, "tests", "fixtures", "tokenizer", "tokenizer.json")))
    (tmp_path / "small.json").write_text(json.dumps(tokenizer))
    extra = {**tokenizer["added_tokens"][0], "content": "<|far|>", "id": 70000}
    tokenizer["added_tokens"].append(extra)
    (tmp_path / "large.json").write_text(json.dumps(tokenizer))
    (tmp_path / "a.txt").write_text("far <|far|> away")
    (tmp_path / "b.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 20000)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 100, mtime=0)[:-20])
    read = lambda name: [x for x, in struct.iter_unpack("<I", (tmp_path / name).read_bytes())]
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    drive(*(f"tokenize {tmp_path}/{tokenizer}.json {tmp_path}/{out}.npy {inputs}" for tokenizer, out, inputs in (
        ("large", "a", a), ("small", "s", b), ("large", "b", b), ("large", "ba", f"{b} {a}"))))
    assert 70000 in read("a.npy") and read("b.npy") == read_tokens(tmp_path / "s.npy")
    assert read("ba.npy") == read("b.npy") + read("a.npy")
    command = f"tokenize {tmp_path}/large.json {tmp_path}/r.npy save=5000 {b}"
    assert "goes on" in drive(f"{command} {tmp_path}/cut.jsonl.gz", fails=True)
    assert os.path.exists(tmp_path / "r.npy.state")
    drive(f"{command} {a}")
    assert read("r.npy") == read("ba.npy")
    ids = drive(f"open 4 70001 sequential 0 0 uint32 {tmp_path}/a.npy", "rows 0 1")
    assert rows(ids[1:2]) == [read("a.npy")[:4]]
    assert "give --token-type uint32" in drive(f"open 4 70001 sequential 0 0 {tmp_path}/b.npy", fails=True)


def test_real_text(drive, tmp_path):
    data = os.environ.get("OLMOE_DATA")
    folder = os.path.join(data, "text") if data else None
    if not folder or not os.path.isdir(folder):
        pytest.skip("test_real_text: needs text/*.txt in the folder OLMOE_DATA")
    files = sorted(os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".txt"))
    out = tmp_path / "real.npy"
    lines = drive(f"tokenize bytes {out} {' '.join(files)}", f"documents {out}", f"open 256 320 global 6198 1 {out}",
                  "next 64 0 1", "state")
    assert lines[0].split()[0] == str(len(files))
    assert [x.split("\t")[2] for x in lines[1:1 + len(files)]] == [os.path.basename(f) for f in files]

    def stripped(path):
        text = open(path, "rb").read().decode("utf-8", "surrogateescape").strip()
        return text.encode("utf-8", "surrogateescape")

    expected = [x for f in files for x in list(stripped(f)) + [256]]
    assert read_tokens(out) == expected
    assert lines[-1].split()[3] == str(len(expected) // 256)


# ---------------------------------------------------------------------------------------------------------------------
# Corpus

def make_corpus(out, *options):
    script = os.path.join(ROOT, "scripts", "make_corpus.py")
    return subprocess.run([sys.executable, script, "--out", str(out), *options], capture_output=True, text=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    before = os.times()
    r = make_corpus(out)
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert r.returncode == 0 and seconds < 10, r.stderr     # of the processor, which other processes may use meanwhile
    assert "bits per byte" in r.stdout
    return out


def documents(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def test_corpus_documents(corpus):
    train, val = documents(corpus / "train.jsonl"), documents(corpus / "val.jsonl")
    assert 3.9e6 < sum(len(d["text"]) for d in train) < 4.1e6
    assert 1.9e5 < sum(len(d["text"]) for d in val) < 2.1e5
    by_domain = {}
    for d in train:
        by_domain.setdefault(d["id"].split("-")[0], []).append(len(d["text"]))
        assert 150 < len(d["text"]) < 1700 and d["text"] == d["text"].strip() and d["text"].isascii()
    assert set(by_domain) == {"story", "arithmetic", "dialogue", "code"}
    for sizes in by_domain.values():
        assert sum(sizes) > 0.15 * 4e6 and 600 < sum(sizes) / len(sizes) < 1100
    assert len({d["id"] for d in train}) == len(train)
    assert not {d["text"] for d in train} & {d["text"] for d in val}
    words = {w for d in train for w in d["text"].split() if w.isalpha()}
    assert 400 < len(words) < 2000
    assert (corpus / "val.txt").read_text() == "\n\n".join(d["text"] for d in val) + "\n"


def test_corpus_is_right_about_numbers(corpus):
    """Every equation of the arithmetic documents holds."""
    checked = 0
    for d in documents(corpus / "val.jsonl"):
        if not d["id"].startswith("arithmetic"):
            continue
        for clause in d["text"].replace(".", ",").replace(":", ",").replace("\n", ",").split(","):
            if clause.count("=") == 1 and not any(c.isalpha() for c in clause.replace(" x ", "")):
                left, right = clause.replace(" x ", " * ").split("=")
                assert eval(left) == int(right), clause
                checked += 1
    assert checked > 1000


def test_corpus_is_deterministic(corpus, tmp_path):
    names = ["train.jsonl", "train.txt", "val.jsonl", "val.txt", "entropy.json",
             *(f"tasks/{task}.jsonl" for task in TASKS)]
    assert make_corpus(tmp_path / "again").returncode == 0
    assert all((corpus / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    other = make_corpus(tmp_path / "other", "--seed", "1", "--train-bytes", "20000", "--val-bytes", "20000")
    assert other.returncode == 0
    assert (tmp_path / "other" / "train.txt").read_bytes()[:2000] != (corpus / "train.txt").read_bytes()[:2000]


TASKS = ("stories", "arithmetic", "dialogues", "programs")


def questions(path):
    """(context, right choice, wrong ones, the right one's number) of a file of requests"""
    found = {}
    for line in documents(path):
        assert line["request_type"] == "loglikelihood" and line["idx"] == len(found.setdefault(line["doc_id"], []))
        found[line["doc_id"]].append((line["request"]["context"], line["request"]["continuation"], line["label"]))
    assert list(found) == list(range(len(found)))
    for lines in found.values():
        (context,), (label,) = {line[0] for line in lines}, {line[2] for line in lines}
        assert all(choice[0] == " " and choice[1:] == choice.strip() for _, choice, _ in lines)
        choices = [choice[1:] for _, choice, _ in lines]
        yield context, choices.pop(label), choices, label


@pytest.mark.parametrize("task", TASKS)
def test_corpus_questions(corpus, task):
    """Four choices, the right one anywhere among them. They have room in the default run's positions, and the training
    text does not have the answers."""
    asked = list(questions(corpus / f"tasks/{task}.jsonl"))
    limit = json.load(open(os.path.join(ROOT, "configs/tiny.json")))["max_position_embeddings"]
    train = (corpus / "train.txt").read_text()
    assert len(asked) == 100 == len({context for context, *_ in asked})
    for context, right, wrong, _ in asked:
        choices = [right, *wrong]
        assert len(choices) == 4 and not any(x is not y and x.startswith(y) for x in choices for y in choices)
        assert len(context) + 1 + max(map(len, choices)) <= limit
        assert f"{context} {right}" not in train
    # 25 of 100 are expected, and the standard deviation is 4.3
    assert all(5 < sum(label == i for *_, label in asked) < 45 for i in range(4))


def shape(text):
    """A text with the names of the grammar's word lists in the place of words that are in one of them"""
    lists = {"adjective": grammar.TRAITS + grammar.LOOKS + grammar.FEEL, "stuff": grammar.STUFF,
             "place": grammar.PLACES, "spot": grammar.SPOTS, "food": grammar.FOODS, "family": grammar.FAMILY,
             "being": grammar.KINDS + grammar.JOBS, "name": list(grammar.CAST), "thing": grammar.THINGS,
             "how": grammar.HOW, "verb": grammar.MOVES + grammar.FINDS, "time": grammar.TIMES + grammar.WHEN,
             "where": grammar.WHERE, "task": grammar.TASKS, "number": grammar.NUMBERS, "storm": grammar.STORMS}
    text = re.sub(r"\ban\b", "a", text.lower())
    found = [word.lower() for words in lists.values() for word in dict.fromkeys(words)]
    names = {word.lower(): name for name, words in lists.items() for word in words if found.count(word.lower()) == 1}
    for phrase in names:
        if " " in phrase:
            text = text.replace(phrase, names[phrase])
    return re.sub(r"\w+", lambda m: names.get(m[0], m[0]), text)


def lines_of(corpus, domain):
    return [d["text"].split("\n") for d in documents(corpus / "train.jsonl") if d["id"].startswith(domain)]


def test_corpus_questions_about_stories(corpus):
    """Only the right animal is the name's in the training text; only the right sentence is one of its sentences, but
    for the words that the grammar draws."""
    lines = sum(lines_of(corpus, "story"), [])
    animals = {pair for line in lines for pair in re.findall(r"\b([A-Z][a-z]+) the (\w+)", line)}
    shapes = set(shape("\n".join(lines)).split("\n"))
    about_animals = 0
    for context, right, wrong, _ in questions(corpus / "tasks/stories.jsonl"):
        *_, last = context.split("\n")
        if right in grammar.KINDS:
            about_animals += 1
            name = re.search(r"(\w+) the$", last)[1]
            assert [(name, choice) in animals for choice in (right, *wrong)] == [True, False, False, False], context
            assert set(wrong) & {grammar.CAST[name] for name in re.findall(r"\w+", context) if name in grammar.CAST}
        else:
            begun = [shape(f"{last} {choice}") for choice in (right, *wrong)]
            assert [any(line.startswith(x) for line in shapes) for x in begun] == [True, False, False, False], context
    assert about_animals == 50


def test_corpus_questions_about_numbers(corpus):
    """The right number is that of a calculation, and any of four in a row."""
    ranks = []
    for task in ("arithmetic", "programs"):
        for context, right, wrong, _ in questions(corpus / f"tasks/{task}.jsonl"):
            if not right.isdigit():
                continue
            numbers = sorted(map(int, [right, *wrong]))
            assert numbers == list(range(numbers[0], numbers[0] + 4))
            ranks.append(numbers.index(int(right)))
            assert result(context) == int(right), context
    assert len(ranks) == 150 and all(20 < ranks.count(i) < 80 for i in range(4))    # 37.5 +- 5.3; 0 to 2 have no room


def result(context):
    """Of the calculation that a context ends with"""
    *before, last = context.replace(" x ", " * ").split("\n")
    if last == ">":                                         # a loop, of which some results are there, or a list
        printed = [line for line in before if not line.startswith("> ")]
        done = len(before) - 1 - before[::-1].index(printed[-1])
        if printed[-1] == "print count(list)":
            return len(printed[-2].split(","))
        low, formula = re.fullmatch(r"for i in (\d+)\.\.\d+: print (i [+*] \d+)", printed[-1]).groups()
        return eval(formula, {"i": int(low) + len(before) - 1 - done})
    if last.startswith("By "):
        step, *row = map(int, re.findall(r"\d+", last))
        assert all(y - x == step for x, y in zip(row, row[1:]))
        return row[-1] + step
    if last.startswith("Take "):
        return eval(re.sub(r"Take|is \d+,|,| is$", "", last).replace("plus", "+").replace("minus", "-"))
    if last.endswith(", sum"):
        return eval(last.split(":")[0])
    return eval(re.split(r"[,:]", last)[-1].rstrip("= "))


def test_corpus_questions_about_dialogues(corpus):
    """Only the right answer follows such a question in the training text; who is spoken to is the one who listens."""
    texts = ["\n".join(lines) for lines in lines_of(corpus, "dialogue")]
    lines = [text.split("\n") for text in shape("\n\n".join(texts)).split("\n\n")]
    shapes = {f"{x}\n{y}" for text in lines for x, y in zip(text, text[1:])}
    replies = 0
    for context, right, wrong, _ in questions(corpus / "tasks/dialogues.jsonl"):
        *_, question, answer = context.split("\n")
        speaker, listener = answer.split(":")[0], question.split(":")[0]
        if answer == f"{speaker}:":
            replies += 1
            known = [shape(f"{question}\n{answer} {choice}") in shapes for choice in (right, *wrong)]
            assert known == [True, False, False, False], context
        else:
            assert right == listener and speaker in wrong and set(wrong) < set(grammar.CAST)
    assert replies == 50


def test_corpus_questions_about_printed_words(corpus):
    """The right one is what the program prints, and the others are not in it."""
    words = 0
    for context, right, wrong, _ in questions(corpus / "tasks/programs.jsonl"):
        if right.isdigit():
            continue
        words += 1
        before, command = context.split("\n")[-3:-1]
        if command.startswith("else"):
            value, limit, yes = re.fullmatch(r'\w+ = (\d+)\nif \w+ > (\d+): print "(\w+)"',
                                             "\n".join(context.split("\n")[-4:-2])).groups()
            assert right == (yes if int(value) > int(limit) else re.search(r'"(\w+)"', command)[1])
        else:
            items = re.fullmatch(r"list = \[(.*)\]", before)[1].split(", ")
            which = re.fullmatch(r"print (\w+)\(list\)", command)[1]
            assert right == items[{"first": 0, "second": 1, "last": -1}[which]]
        assert not set(wrong) & set(re.findall(r"\w+", before + command))
    assert words == 50


def test_corpus_entropy(corpus):
    """The grammar's entropy is a bound that leaves room below what a compressor spends, so that a model has something
    to learn."""
    entropy = json.load(open(corpus / "entropy.json"))
    bits, size = entropy["bits_per_byte"], entropy["bytes"]
    domains = [d for d in bits if d != "all"]
    assert sum(size[d] for d in domains) == size["all"]
    assert abs(sum(bits[d] * size[d] for d in domains) / size["all"] - bits["all"]) < 1e-9
    assert all(0.25 < b < 0.9 for b in bits.values())
    train, val = (corpus / "train.txt").read_bytes(), (corpus / "val.txt").read_bytes()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    xz = [len(lzma.compress(text, lzma.FORMAT_XZ, filters=filters)) for text in (train + val, train)]
    assert bits["all"] < 0.5 * (xz[0] - xz[1]) * 8 / len(val)


def test_corpus_bad_options(tmp_path):
    (tmp_path / "file").write_text("")
    for out, options in ((tmp_path / "file" / "x", []), (tmp_path, ["--train-bytes", "0"]),
                         (tmp_path, ["--questions", "0"])):
        r = make_corpus(out, *options)
        assert r.returncode == 1 and r.stderr.count("\n") == 1 and r.stderr.startswith("make_corpus.py: ")
    if os.path.exists("/dev/full"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "train.jsonl").symlink_to("/dev/full")
        r = make_corpus(tmp_path / "full", "--train-bytes", "1000")
        assert r.returncode == 1 and r.stderr.count("\n") == 1 and "No space left" in r.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Plot

def plot(*arguments):
    script = os.path.join(ROOT, "scripts", "plot.py")
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


def write_log(out, steps, tail=""):
    out.mkdir()
    with open(out / "log.jsonl", "w") as f:
        f.write(json.dumps({"config": {"L": 2}}) + "\n")
        for step in steps:
            record = {"step": step, "loss": 3 / step, "ce_loss": 3 / step, "lr": 1e-3, "ms": 5}
            if step % 5 == 0:
                balance = [{"max_over_mean": 1.5, "entropy": 2, "dead": 0}] * 2
                record.update(val_loss=2 / step, val_bpb=3 / step, balance=balance)
            f.write(json.dumps(record) + "\n")
        f.write(tail)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="test_plot: needs python3-matplotlib")
    # resumed, and killed in a line
    write_log(tmp_path / "a", list(range(1, 21)) + list(range(15, 31)), tail='{"step": 31, "lo')
    write_log(tmp_path / "b", range(1, 4))
    two = [tmp_path / "a", tmp_path / "b", "--out", tmp_path / "two.png"]
    for arguments, picture in (([tmp_path / "a"], tmp_path / "a" / "plot.png"), (two, tmp_path / "two.png")):
        r = plot(*arguments)
        assert r.returncode == 0, r.stderr
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10000
        assert r.stdout.strip() == str(picture)


def test_plot_resumed_steps():
    pytest.importorskip("matplotlib", reason="test_plot_resumed_steps: needs python3-matplotlib")
    log = '{"config": {}}\n{"step": 1, "lr": 1}\n{"step": 2, "lr": 2}\n{"step": 1, "lr": 3}\n'
    code = ("import sys, tempfile; sys.dont_write_bytecode = True; sys.path.insert(0, sys.argv[1]); import plot\n"
            f"f = tempfile.NamedTemporaryFile('w', suffix='.jsonl'); f.write({log!r}); f.flush()\n"
            "print(plot.read(f.name))")
    r = subprocess.run([sys.executable, "-c", code, os.path.join(ROOT, "scripts")], capture_output=True, text=True)
    assert r.stdout.strip() == str([{"step": 1, "lr": 3}, {"step": 2, "lr": 2}]), r.stderr


def drawn(*calls):
    """What the pictures show, of each call of plot.py with a list of runs: [title, x label, lines] of its axes, a line
    being [label, style, points]"""
    code = """if True:
        import json, sys
        sys.dont_write_bytecode = True
        sys.path.insert(0, sys.argv.pop(1))
        import plot
        def show(figure, *_, **more):
            axes = [axis for axis in figure.axes if axis.get_visible()]
            lines = [[(line.get_label(), line.get_linestyle(), line.get_xydata().tolist()) for line in axis.get_lines()]
                     for axis in axes]
            print(json.dumps([(axis.get_title(), axis.get_xlabel(), found) for axis, found in zip(axes, lines)]))
        plot.matplotlib.figure.Figure.savefig = show
        for call in json.loads(sys.argv[1]):
            sys.argv[1:] = call
            plot.main()"""
    calls = json.dumps([[str(run) for run in call] for call in calls])
    words = [sys.executable, "-c", code, os.path.join(ROOT, "scripts"), calls]
    r = subprocess.run(words, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return [json.loads(line) for line in r.stdout.splitlines() if line.startswith("[")]


def write_fine_tuning(out, steps):
    out.mkdir()
    lines = [{"config": {}}, *({"step": i, "ce_loss": 2.0, "lr": 1e-6, "targets": 9, **step}
                               for i, step in enumerate(steps, 1))]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


BEFORE = ["training loss (cross entropy, nats a token)", "validation loss (nats a token)", "learning rate",
          "expert load, largest over mean, by layer"]


def test_plot_of_fine_tuning(tmp_path):
    """What each objective logs is in axes of its own, a null is a gap; pretraining's four are as they were."""
    pytest.importorskip("matplotlib", reason="test_plot_of_fine_tuning: needs python3-matplotlib")
    write_log(tmp_path / "pretrain", range(1, 4))
    write_fine_tuning(tmp_path / "sft", [{"loss": 60.0, "val_loss": 1.0}, {"loss": 50.0}])
    write_fine_tuning(tmp_path / "dpo", [
        {"loss": 0.7, "chosen_logp": -9.0, "rejected_logp": -8.0, "reward_margin": 0.0, "reward_accuracy": 0.0},
        {"loss": 0.6, "chosen_logp": -7.0, "rejected_logp": -8.5, "reward_margin": 0.1, "reward_accuracy": 0.5,
         "val_loss": 0.65, "val_reward_accuracy": 0.75}])
    write_fine_tuning(tmp_path / "kto", [{"loss": 0.5, "kl": 0.0, "chosen_reward": 0.1, "rejected_reward": None},
                                         {"loss": 0.4, "kl": 1.5, "chosen_reward": None, "rejected_reward": -0.1},
                                         {"loss": 0.3, "kl": 2.0, "chosen_reward": 0.3, "rejected_reward": -0.2}])
    runs = [["pretrain"], ["sft"], ["dpo"], ["pretrain", "kto"]]
    pretrain, sft, dpo, both = drawn(*([tmp_path / run for run in call] for call in runs))
    assert [title for title, _, _ in pretrain] == BEFORE
    assert [title for title, _, _ in sft] == [*BEFORE, "loss that is minimised"]
    assert sft[0][2][0][2] == [[1, 2], [2, 2]] and sft[4][2] == [["loss", "-", [[1, 60], [2, 50]]]]
    assert [label for _, label, _ in sft] == ["", "", "", "step", "step"]     # of the lowest of each column

    dpo = {title: lines for title, _, lines in dpo}
    assert list(dpo)[1] == "validation loss" and list(dpo)[4:] == [
        "loss that is minimised", "log-probability of answers", "reward of chosen over rejected",
        "pairs with the larger reward chosen"]
    assert dpo["log-probability of answers"] == [["chosen_logp", "-", [[1, -9], [2, -7]]],
                                                 ["rejected_logp", "--", [[1, -8], [2, -8.5]]]]
    assert dpo["reward of chosen over rejected"] == [["reward_margin", "-", [[1, 0], [2, 0.1]]]]
    assert dpo["pairs with the larger reward chosen"] == [["reward_accuracy", "-", [[1, 0], [2, 0.5]]],
                                                          ["val_reward_accuracy", "None", [[2, 0.75]]]]

    both = {title: lines for title, _, lines in both}
    assert list(both)[4:] == ["loss that is minimised", "KL estimate", "reward"]
    assert both["loss that is minimised"] == [["kto: loss", "-", [[1, 0.5], [2, 0.4], [3, 0.3]]]]
    assert both["KL estimate"] == [["kto: kl", "-", [[1, 0], [2, 1.5], [3, 2]]]]
    assert both["reward"] == [["kto: chosen_reward", "-", [[1, 0.1], [3, 0.3]]],
                              ["kto: rejected_reward", "--", [[2, -0.1], [3, -0.2]]]]


def test_plot_of_evaluations(tmp_path):
    """Losses of sets and accuracies of tasks are in axes of their own, also of a step 0, which has nothing else; a run
    without them draws as before."""
    pytest.importorskip("matplotlib", reason="test_plot_of_evaluations: needs python3-matplotlib")

    def write(name, steps):
        (tmp_path / name).mkdir()
        lines = [{"config": {}}, *({"ce_loss": 2.0, "lr": 1e-3, **step} if step["step"] else step for step in steps)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def scores(step, copa, piqa, c4):
        return {"step": step, "eval/c4_en-validation/CrossEntropyLoss": c4, "eval/c4_en-validation/Perplexity": 9.0,
                "eval/downstream/copa_acc": copa, "eval/downstream/copa_len_norm": copa / 2,
                "eval/downstream/piqa_acc": piqa, "eval/downstream/piqa_len_norm": None,
                "eval/downstream_bpb/copa_bpb": 1.0, "eval/downstream_ce_loss/copa_ce_loss": 1.0}

    write("a", [scores(0, 0.5, 0.25, 9.0), {"step": 1}, scores(2, 0.75, 0.5, None)])
    write("b", [{"step": 1, "eval/downstream/copa_acc": 1.0}])
    write("plain", [{"step": 1}])
    alone, two, plain = drawn([tmp_path / "a"], [tmp_path / "a", tmp_path / "b"], [tmp_path / "plain"])
    sets, norm = "loss of evaluation sets (nats a token)", "accuracy in tasks, by log-probability a character"
    assert [title for title, _, _ in alone] == [*BEFORE, sets, "accuracy in tasks", norm]
    lines = {title: lines for title, _, lines in alone}
    assert lines[sets] == [["c4_en-validation", "-", [[0, 9]]]]
    assert lines["accuracy in tasks"] == [["copa", "-", [[0, 0.5], [2, 0.75]]], ["piqa", "-", [[0, 0.25], [2, 0.5]]]]
    assert lines[norm] == [["copa", "-", [[0, 0.25], [2, 0.375]]]]
    assert lines[BEFORE[0]] == [["a", "-", [[1, 2], [2, 2]]]]
    assert dict((title, lines) for title, _, lines in two)["accuracy in tasks"] == [
        ["a: copa", "-", [[0, 0.5], [2, 0.75]]], ["a: piqa", "--", [[0, 0.25], [2, 0.5]]], ["b: copa", "-", [[1, 1]]]]
    assert [title for title, _, _ in plain] == BEFORE


def test_plot_errors(tmp_path):
    pytest.importorskip("matplotlib", reason="test_plot_errors: needs python3-matplotlib")
    write_log(tmp_path / "empty", [])
    write_log(tmp_path / "bad", [1], tail="not json\n")
    write_log(tmp_path / "good", [1])
    for arguments, reason in (([tmp_path / "none"], "No such file"), ([tmp_path / "empty"], "no training step"),
                              ([tmp_path / "bad"], "log.jsonl:3:"),
                              ([tmp_path / "good", "--out", tmp_path / "no" / "x.png"], "No such file")):
        r = plot(*arguments)
        assert r.returncode == 1 and r.stderr.count("\n") == 1 and reason in r.stderr and r.stdout == "", r.stderr
