"""The documents keep step with the code: line numbers, links, kernels, and the numbers of the worked example.

A link of the form [`name`](../olmoe.cu#L321) says that `name` is on that line. The name is an identifier, whose
definition is meant where it occurs more than once, or a piece of code that occurs on one line only. After lines have
moved:

    python3 tests/test_docs.py --fix        writes the right numbers; where a name is not clear, exit code 1 and nothing
                                            written
"""
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cpp_source

ROOT = Path(__file__).resolve().parent.parent
LINE_LINK = re.compile(r"\[`([^`\n]+)`\]\(([^()#\s]+)#L(\d+)\)")
ANY_LINK = re.compile(r"\[[^\]\n`]*(?:`[^`\n]*`[^\]\n`]*)*\]\(([^()\s]+)\)")


def documents(root):
    return [*sorted((root / "docs").glob("*.md")), *root.glob("README.md")]


def prose(text):
    """The text with its code blocks blanked, so that offsets and lines stay."""
    return re.sub(r"^(```|~~~).*?^\1", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.M | re.S)


def defines(lines, i, name):
    """Does line i of a C++ source define the identifier, at the top level? A prototype does not."""
    line = lines[i]
    if re.match(rf"#define {name}\b|(struct|enum|enum class) {name}\b[^;]*\{{|typedef .*\b{name};", line):
        return True
    if re.match(rf"(static|constexpr|const|volatile)\b[^(]*\b{name}(\[| =|;)", line):
        return True
    if not re.match(rf"[A-Za-z_][^(;={{]*\b{name}\(", line):
        return False
    head = re.search(r"[;{]", "\n".join(lines[i:i + 8]))
    return head is not None and head[0] == "{"


def find(lines, name):
    """The number of the line that `name` means, or a ValueError that says why there is none."""
    identifier = re.fullmatch(r"\w+", name) is not None
    pattern = re.compile(rf"\b{name}\b" if identifier else re.escape(name))
    found = [i for i, line in enumerate(lines) if pattern.search(line)]
    if not found:
        raise ValueError("does not occur")
    if len(found) > 1 and identifier:
        defined = [i for i in found if defines(lines, i, name)]
        if not defined:
            raise ValueError(f"occurs on {len(found)} lines and none defines it: name a longer piece of code")
        return defined[0] + 1
    if len(found) > 1:
        raise ValueError(f"occurs on the lines {', '.join(str(i + 1) for i in found)}: name a longer piece of code")
    return found[0] + 1


# A link: where it is, its text, the right number (None where there is none), and what is wrong ("" where nothing is)
LineLink = namedtuple("LineLink", "document at name target number right wrong")


def line_links(root):
    links = []
    for document in documents(root):
        text = prose(document.read_text())
        for match in LINE_LINK.finditer(text):
            name, target, number = match[1], match[2], int(match[3])
            right, wrong = None, ""
            try:
                right = find((document.parent / target).read_text().splitlines(), name)
                if right != number:
                    wrong = f"is on line {right}, not {number}; run: python3 tests/test_docs.py --fix"
            except (OSError, ValueError) as error:
                wrong = str(error)
            at = f"{document.relative_to(root)}:{text.count(chr(10), 0, match.start()) + 1}"
            links.append(LineLink(document, at, name, target, number, right, wrong))
    return links


def fix(root):
    links = line_links(root)
    unclear = [link for link in links if link.right is None]
    for link in unclear:
        print(f"{link.at}: `{link.name}` in {link.target}: {link.wrong}", file=sys.stderr)
    if unclear:
        return 1
    for document in documents(root):
        text = document.read_text()
        numbers = {(link.name, link.target): link.right for link in links if link.document == document}
        fixed = LINE_LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{numbers.get((m[1], m[2]), m[3])})", text)
        if fixed != text:
            document.write_text(fixed)
    print(f"{len(links)} links to lines, {sum(link.number != link.right for link in links)} changed")
    return 0


# ------------------------------------------------------------------------------------------------
# Tests

def test_links_to_lines():
    links = line_links(ROOT)
    assert {"tour.md", "derivations.md"} <= {link.document.name for link in links}
    wrong = [f"{link.at}: `{link.name}` in {link.target}: {link.wrong}" for link in links if link.wrong]
    assert not wrong, "\n".join(wrong)


def anchors(markdown):
    """The names that headings get as link targets."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(markdown), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_lead_somewhere():
    wrong = []
    for document in documents(ROOT):
        text = prose(document.read_text())
        lines_checked = {m.start(2) for m in LINE_LINK.finditer(text)}
        for match in ANY_LINK.finditer(text):
            path, _, fragment = match[1].partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = (document.parent / path).resolve() if path else document
            if not target.exists():
                wrong.append(f"{document.name}: {match[0]}: no such file")
            elif re.fullmatch(r"L\d+", fragment):
                if match.start(1) not in lines_checked:
                    wrong.append(f"{document.name}: {match[0]}: a link to a line has to name what is there, as `code`")
            elif fragment and fragment not in anchors(target.read_text()):
                wrong.append(f"{document.name}: {match[0]}: no such heading")
    assert not wrong, "\n".join(wrong)


def kernels_of(source):
    """The names of the kernels that a source defines, also of templates."""
    code = cpp_source.blank(source)
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(", code)
    assert len(kernels) == len(re.findall(r"\b__global__\b", code)), "a kernel whose name is not clear"
    return kernels


def test_kernels_are_found():
    source = """// __global__ void in_a_comment(
__global__ void plain(int* x) { }
template <typename T> __global__ void short_header(T* x) { }
template <typename T, int N = std::max(1, 2), bool last = (N > 1)>
__global__ void
long_header(T* x) { }
template <class... Ts>
static __global__ void __launch_bounds__(256) bounded(Ts... x) { }
"""
    assert kernels_of(source) == ["plain", "short_header", "long_header", "bounded"]


def test_tour_names_every_kernel():
    sources = [path for folder in ("", "lib", "commands") for ending in ("cu", "cuh", "h")
               for path in sorted((ROOT / folder).glob(f"*.{ending}")) if path.name != "test_olmoe.cu"]
    kernels = {kernel: path.name for path in sources for kernel in kernels_of(path.read_text())}
    assert "olmoe.cu" in kernels.values()
    tour = (ROOT / "docs" / "tour.md").read_text()
    missing = [f"{k} of {file}" for k, file in kernels.items() if not re.search(rf"\b{k}\b", tour)]
    assert not missing, missing


def worked_example():
    """The tour's example, from the definitions: rows of text that it has to contain, but for their spaces."""
    E, K, N, alpha, beta = 4, 2, 3, 0.01, 0.001
    z = [[.5, -1, 2, 0], [1, 1.5, -.5, .25], [-2, .75, .5, 3]]
    y = [[.5, .2], [.1, .3], [.4, -.1], [.2, .3], [.6, .1], [.05, .3]]         # by assignment
    dout = [[1, -1], [.5, 1], [-1, 1]]
    rows = []
    lse = [math.log(sum(map(math.exp, r))) for r in z]
    p = [[math.exp(v - s) for v in r] for r, s in zip(z, lse)]
    ids = [sorted(range(E), key=lambda i: (-r[i], i))[:K] for r in z]
    w = [[p[t][i] for i in ids[t]] for t in range(N)]
    for t in range(N):
        rows.append(f"{t} " + " ".join(f"{v:.2f}" for v in z[t]) + " " + " ".join(f"{v:.4f}" for v in p[t])
                    + f" {lse[t]:.4f} {ids[t][0]}, {ids[t][1]} {w[t][0]:.4f} {w[t][1]:.4f} {sum(w[t]):.4f}")

    expert = [i for chosen in ids for i in chosen]
    counts = [expert.count(e) for e in range(E)]
    assignment_of = sorted(range(N * K), key=lambda a: expert[a])               # stable
    row_of = [assignment_of.index(a) for a in range(N * K)]
    for label, numbers in [("its token, a / K", [a // K for a in range(N * K)]), ("its expert", expert),
                           ("row_of", row_of), ("counts", counts), ("first row", [sum(counts[:e]) for e in range(E)]),
                           ("assignment_of", assignment_of), ("its token", [a // K for a in assignment_of])]:
        rows.append(f"{label} " + " ".join(map(str, numbers)))

    dw = [[sum(a * b for a, b in zip(dout[t], y[t * K + k])) for k in range(K)] for t in range(N)]
    for t in range(N):
        out = [sum(w[t][k] * y[t * K + k][c] for k in range(K)) for c in range(2)]
        outputs = [f"{row_of[a]}: ({y[a][0]:.2f}, {y[a][1]:.2f})" for a in range(t * K, t * K + K)]
        rows.append(f"{t} {' '.join(outputs)} ({out[0]:.4f}, {out[1]:.4f})")
        rows.append(f"{t} ({dout[t][0]:.2f}, {dout[t][1]:.2f}) {dw[t][0]:.2f} {dw[t][1]:.2f}")

    mean = [sum(p[t][i] for t in range(N)) / N for i in range(E)]
    rows.append("Pbar " + " ".join(f"{v:.4f}" for v in mean))
    balanced = sum(c * m for c, m in zip(counts, mean))
    rows.append(f"LB = 0.01 * 4 / (1 * 3 * 2) * {balanced:.6f} = {alpha * E / (N * K) * balanced:.6f}")
    squares = sum(s * s for s in lse)
    rows.append(f"Z = 0.001 / (1 * 3 * 2) * {squares:.6f} = {beta / (N * K) * squares:.6f}")

    for t in range(N):
        chosen = [dw[t][ids[t].index(i)] if i in ids[t] else 0 for i in range(E)]
        balance = [alpha * E * c / (N * N * K) for c in counts]
        terms = [[p[t][j] * (g[j] - sum(a * b for a, b in zip(p[t], g))) for j in range(E)] for g in (chosen, balance)]
        terms.append([2 * beta * lse[t] * p[t][j] / (N * K) for j in range(E)])
        terms.append([sum(term[j] for term in terms) for j in range(E)])
        names = ("weights", "balance", "z-loss", "dz")
        rows += [f"{t} {name} " + " ".join(f"{v:.6f}" for v in term) for name, term in zip(names, terms)]
    return rows


def test_numbers_of_the_worked_example():
    lines = {" ".join(line.split()) for line in (ROOT / "docs" / "tour.md").read_text().splitlines()}
    missing = [row for row in worked_example() if row not in lines]
    assert not missing, "\n".join(missing)


SOURCE = """void late(int x);
#define LIMIT 3
struct Pair { int a, b; };
// late calls early
__global__ void early(int* p,
                      int n) {
    p[n] = LIMIT;
}
template <typename T>
T late(T x) {
    early(0, x); early(1, x);
    Pair pair;
    return x + 1;
}
"""
PAGE = """[`early`](../a.cu#L1) [`late`](../a.cu#L1), [`p[n] = LIMIT`](../a.cu#L1)
```
[`gone`](../a.cu#L1)
```
[`LIMIT`](../a.cu#L1) [`Pair`](../a.cu#L9)
"""


def test_fix_writes_the_lines_of_definitions(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.cu").write_text(SOURCE)
    page = tmp_path / "docs" / "page.md"
    page.write_text(PAGE)
    assert [bool(link.wrong) for link in line_links(tmp_path)] == [True] * 5
    assert fix(tmp_path) == 0
    assert re.findall(r"L(\d+)\)", page.read_text()) == ["5", "10", "7", "1", "2", "3"]     # not in the code block
    assert not any(link.wrong for link in line_links(tmp_path))
    (tmp_path / "a.cu").write_text("\n\n" + SOURCE)
    assert all(link.wrong for link in line_links(tmp_path))
    assert fix(tmp_path) == 0
    assert re.findall(r"L(\d+)\)", page.read_text()) == ["7", "12", "9", "1", "4", "5"]
    capsys.readouterr()


def test_fix_refuses_what_is_not_clear(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.cu").write_text(SOURCE)
    page = tmp_path / "docs" / "page.md"
    for name, reason in [("nowhere", "does not occur"), ("x", "none defines it"), ("early(", "lines 5, 11"),
                         ("lat", "does not occur")]:
        text = f"[`early`](../a.cu#L1) [`{name}`](../a.cu#L1)\n"
        page.write_text(text)
        assert fix(tmp_path) == 1
        assert page.read_text() == text
        assert f"docs/page.md:1: `{name}` in ../a.cu: " in (error := capsys.readouterr().err) and reason in error


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__.strip())
    sys.exit(fix(ROOT))
