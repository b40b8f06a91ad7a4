"""Rules of style that a program can check, over the files that git tracks. Each rule is a function from files to
complaints, with a test on small sources that break it."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cpp_source

ROOT = Path(__file__).resolve().parent.parent

WIDTH = 120
LONGEST_FUNCTION = 120                  # lines
LONG_FUNCTION = 80                      # a longer one needs a reason in LONG_FUNCTIONS
LONGEST_MODEL = 3050                    # lines of olmoe.cu

# "file: function": why it is longer than LONG_FUNCTION
LONG_FUNCTIONS = {
}

# What may be at the top, apart from dot files
TOP = {"Makefile", "README.md", "olmoe.cu", "dataloader.h", "tokenizer.h", "test_olmoe.cu"}

# Variables of the environment that the program may read: those of launchers, and of the libraries below it. Its own
# options are on the command line.
VARIABLES = re.compile(r"OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|(OMPI|PMI|PMIX|SLURM)(_\w+)?|PBS_JOBID|LSB_JOBID"
                       r"|TORCHELASTIC_RUN_ID|RANK|WORLD_SIZE|LOCAL_RANK|MPI_LOCALRANKID")


def is_cpp(name):
    return name.endswith((".cu", ".cuh", ".h", ".cpp"))


def is_program(name):
    """A source of the program, without its tests and without the CPU machine."""
    if name.startswith(("lib/", "commands/")):
        return is_cpp(name)
    return name in ("olmoe.cu", "dataloader.h", "tokenizer.h")


def wide_lines(files):
    return [f"{name}:{i}: {len(line)} characters" for name, text in files.items()
            if is_cpp(name) or name.endswith(".py")
            for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]


def long_functions(files, reasons):
    wrong, used = [], set()
    for name, text in files.items():
        if not is_cpp(name) or name.startswith("tests/"):
            continue
        for function in cpp_source.functions(text):
            key = f"{name}: {function.name}"
            has = f"{name}:{function.line}: {function.name} has {function.lines} lines, more than"
            if function.lines > LONG_FUNCTION:
                used.add(key)
            if function.lines > LONGEST_FUNCTION:
                wrong.append(f"{has} {LONGEST_FUNCTION}")
            elif function.lines > LONG_FUNCTION and not reasons.get(key):
                wrong.append(f"{has} {LONG_FUNCTION}, and LONG_FUNCTIONS has no reason")
    return wrong + [f"LONG_FUNCTIONS: {key}: there is no such function of more than {LONG_FUNCTION} lines"
                    for key in reasons if key not in used]


def top_level(files):
    wrong = [f"{name}: it belongs into a folder" for name in files
             if "/" not in name and not name.startswith(".") and name not in TOP]
    lines = files.get("olmoe.cu", "").count("\n")
    return wrong + ([f"olmoe.cu has {lines} lines, more than {LONGEST_MODEL}"] if lines > LONGEST_MODEL else [])


def variables_read(text):
    """Names of the environment's variables that a source reads. Where a name comes from a variable, all texts in
    capital letters count."""
    code = cpp_source.blank(text)
    calls = [match.end() for match in re.finditer(r"\b(?:(?:secure_)?getenv|ranks_variable)\s*\(\s*", code)]
    literals = {match.start(): match[1] for match in re.finditer(r'"([^"\n\\]*)"', text) if code[match.start()] == '"'}
    names = [literals[at] for at in calls if at in literals]
    if any(code[at] != '"' for at in calls):
        names += [name for name in literals.values() if re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", name)]
    return names + re.findall(r"\benviron\b", code)


def environment(files):
    return [f"{name}: reads {variable} from the environment" for name, text in files.items() if is_program(name)
            for variable in variables_read(text) if not VARIABLES.fullmatch(variable)]


def includes(files):
    """olmoe.cu says what each of our headers brings."""
    lines = files.get("olmoe.cu", "").splitlines()
    return [f"olmoe.cu:{i}: {line}: a comment says what it brings" for i, line in enumerate(lines, 1)
            if re.match(r'\s*#\s*include\s*"', line) and not re.search(r"//.*\w", line)]


def shadows(files):
    program = {name: text for name, text in files.items() if is_program(name)}
    defined = {function.name: name for name, text in program.items()
               for function in cpp_source.functions(text) if not function.member}
    return [f"{name}:{line}: {local} hides the function {local} of {defined[local]}" for name, text in program.items()
            for local, line in cpp_source.declarations(text) if local in defined]


# ------------------------------------------------------------------------------------------------
# The rules hold

@pytest.fixture(scope="module")
def files():
    """The files that git tracks, as they are now: name -> text. Of data only the names."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    if "olmoe.cu" not in names:
        pytest.skip("this is no checkout of git's")
    return {name: (ROOT / name).read_text() if is_cpp(name) or name.endswith(".py") else "" for name in names}


def complain(complaints):
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def test_no_line_is_wide(files):
    complain(wide_lines(files))


def test_no_function_is_long(files):
    complain(long_functions(files, LONG_FUNCTIONS))


def test_top_level_is_short(files):
    complain(top_level(files))


def test_options_are_not_in_the_environment(files):
    complain(environment(files))


def test_includes_say_what_they_bring(files):
    complain(includes(files))


def test_no_local_name_hides_a_function(files):
    complain(shadows(files))


# ------------------------------------------------------------------------------------------------
# The rules see what breaks them

def test_wide_lines_are_seen():
    wide = "é" * 121
    found = wide_lines({"a.cu": f"x\n{wide}\n", "tests/a.py": wide, "a.md": wide, "b.h": wide[1:], "c.cuh": wide,
                        "d.cpp": "", "e.h": f"// {wide}"})
    assert found == ["a.cu:2: 121 characters", "tests/a.py:1: 121 characters", "c.cuh:1: 121 characters",
                     "e.h:1: 124 characters"]


def lines(n, line="    f();\n"):
    return line * n


def test_long_functions_are_seen():
    short, middle, long = (f"void {name}() {{\n{lines(n - 2)}}}\n" for name, n in (("a", 80), ("b", 81), ("c", 121)))
    assert long_functions({"x.h": short}, {}) == []
    assert long_functions({"x.h": middle}, {"x.h: b": "a table"}) == []
    reasons = {"x.h: a": "?", "z.h: b": "?", "x.h: c": "?"}
    found = long_functions({"x.h": short + middle + long, "tests/y.cpp": long}, reasons)
    assert found == ["x.h:81: b has 81 lines, more than 80, and LONG_FUNCTIONS has no reason",
                     "x.h:162: c has 121 lines, more than 120",
                     "LONG_FUNCTIONS: x.h: a: there is no such function of more than 80 lines",
                     "LONG_FUNCTIONS: z.h: b: there is no such function of more than 80 lines"]


def test_files_at_the_top_are_seen():
    assert top_level({name: "" for name in [*TOP, ".gitignore", ".ci/run", "lib/new.h"]}) == []
    assert top_level({"new.h": "", "olmoe.cu": "\n" * 3050}) == ["new.h: it belongs into a folder"]
    assert top_level({"olmoe.cu": "\n" * 3051}) == ["olmoe.cu has 3051 lines, more than 3050"]


def test_variables_of_the_environment_are_seen():
    good = 'getenv("OMP_NUM_THREADS"); getenv("OMPI_COMM_WORLD_SIZE"); "OLMOE_TEXT"; // getenv("OLMOE_COMMENT")\n'
    one_of_ours = 'int f() { return getenv( "OLMOE_FAST" ) != 0; }'
    by_name = 'for (auto name : {"RANK", "OLMOE_RANK", "rank", "%s", "BF"}) ranks += std::getenv(name);'
    assert environment({"lib/a.h": good, "cpu/a.cpp": one_of_ours, "tests/a.cpp": one_of_ours}) == []
    assert environment({"commands/a.h": good + one_of_ours}) == ["commands/a.h: reads OLMOE_FAST from the environment"]
    assert environment({"olmoe.cu": by_name}) == ["olmoe.cu: reads OLMOE_RANK from the environment"]
    assert environment({"tokenizer.h": 'ranks_variable("OURS")'}) == ["tokenizer.h: reads OURS from the environment"]
    assert environment({"dataloader.h": "char** e = environ;"}) == ["dataloader.h: reads environ from the environment"]


def test_includes_without_a_comment_are_seen():
    source = '#include <map>\n#include "a.h"   // what it brings\n#include "b.h"\n  # include "c.h" //\n'
    assert includes({"olmoe.cu": source, "lib/a.h": '#include "b.h"'}) == [
        'olmoe.cu:3: #include "b.h": a comment says what it brings',
        'olmoe.cu:4:   # include "c.h" //: a comment says what it brings']


SHADOWS = """
std::string text(const char* format, ...) { return format; }
namespace deep { inline int deep_one() { return 1; } }
template <typename T> __global__ void kernel(T* x) { x[0] = 0; }
struct Pair {
    std::string text;                               // a member is no local variable
    int kernel = 0;
    int size() const { int member = 1; return member; }
    Pair(int n) : kernel{n}, text() { int deep_one = n; }                                   // 9
};
static int table[] = {1, 2};
void locals(Pair* p, const Pair& q) {
    std::string text = "text = 1";                                                          // 13
    p->text = q.text; p->kernel = q.kernel * 2;
    // int kernel = 1;
    auto [kernel, other] = std::make_pair(1, 2);                                            // 16
    for (const auto& text : names) use(text);                                               // 17
    for (int i = 0, deep_one = 3; i < deep_one; i++) use(i);                                // 18
    if (auto text = find(); text) use(text);                                                // 19
    if (p->kernel == q.kernel && q.text == text(1)) return text(2);
    auto f = [&](const std::map<int, std::vector<Pair>>& kernel) { return kernel; };        // 21
    const floatX *x = q.x, *text = q.y;                                                     // 22
    use(a * text, b & kernel, x[text], f[text](kernel), Pair{text, kernel});
    struct Inner { int text; int size(int kernel) { return kernel; } };                     // 24
    switch (x) { case 1: int text = 3; break; default: text(2); }                           // 25
    try { return kernel<int>(0); } catch (const Error& text) { throw text; }                // 26
    std::vector<int> kernel(3);                                                             // 27
    static const unsigned long long deep_one{1};                                            // 28
    else_text: while (a < text && b > kernel) deep::deep_one();
    if (text(a) == b) { delete text; } else text("x");
    x = a * kernel(1); y = c ? text : kernel;
}
void parameters(int n, const std::string& text = "a, b", int (&kernel)[2], T... deep_one) { }   // 33
void prototype(int text);
bool operator<(const Pair& text, const Pair& b) { return true; }                            // 35
"""


def test_shadows_are_seen():
    found = [tuple(complaint.split(" ")[:2]) for complaint in shadows({"lib/a.h": SHADOWS})]
    expected = [(9, "deep_one"), (13, "text"), (16, "kernel"), (17, "text"), (18, "deep_one"), (19, "text"),
                (21, "kernel"), (22, "text"), (24, "kernel"), (25, "text"), (26, "text"), (27, "kernel"),
                (28, "deep_one"), (33, "text"), (33, "deep_one"), (35, "text")]
    assert found == [(f"lib/a.h:{line}:", name) for line, name in expected]
    # A function of another file; not those of the tests, and not members
    sources = {"olmoe.cu": "int g() { int text = size; int size = 1; }", "lib/a.h": SHADOWS,
               "tests/a.cpp": "int size() { }"}
    assert shadows(sources)[0] == "olmoe.cu:1: text hides the function text of lib/a.h"
    assert len(shadows(sources)) == len(expected) + 1
    assert shadows({"cpu/a.h": SHADOWS}) == []


FUNCTIONS = r'''// void comment() {
#define MACRO(x) { x
static const std::map<int, Handler> handlers = {
    {1, [](int x) { return x; }},
};
template <typename T, int N = (1 > 0)>
inline std::vector<T> wrapped(const T* a,
                              std::vector<int> b = {1, 2},
                              int n) {
    auto inner = [&](int x) {
        if (x) { return n; } else { return '{'; }
    };
    struct Local { int size() { return 1; } } local;
    return {inner(1)};                      // }
}
__global__ void __launch_bounds__(256) kernel(float* x) {
    for (int i : {1, 2}) { x[i] = 1'000'000; }
}
[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
void die(const char* format, ...) { const char* s = "}\"{"; }
const char* raw() {
    return R"json({"a": "}}}" )" {)json"
           R"(\)";
}
namespace a { namespace b {
struct Thing {
    int x = 1;
    Thing(int n) : x{n}, y(n) {
        x = 2;
    }
    ~Thing() { }
    bool operator()(int a) const { return a; }
    bool operator==(const Thing& t) const {
        return x == t.x;
    }
    operator bool() const { return true; }
public:
    enum class Kind : int { one, two };
    template <typename F> auto run(F f) const noexcept -> decltype(f()) {
        return f();
    }
};
}}
Thing::Thing() : x(1) { }
extern "C" {
int main(int argc, char** argv)
{
    return 0;
}
}
Thing global(1), other{2};
auto lambda = [](int x) { return x; };
struct Last { int a; } last = {1};
enum Colour { red };
std::string after_the_last() { return ""; }
'''


def test_functions_are_found():
    found = [(f.name, f.line, f.lines) for f in cpp_source.functions(FUNCTIONS)]
    assert found == [
        ("wrapped", 6, 10), ("kernel", 16, 3), ("die", 20, 1), ("raw", 21, 4), ("Thing::Thing", 28, 3),
        ("Thing::~Thing", 31, 1), ("Thing::operator()", 32, 1), ("Thing::operator==", 33, 3),
        ("Thing::operator bool", 36, 1), ("Thing::run", 39, 3), ("Thing::Thing", 44, 1), ("main", 46, 4),
        ("after_the_last", 55, 1)]


def test_braces_have_to_match():
    for source in ("void f() {", "void f() { } }", "void f() { g(1; }"):
        with pytest.raises(ValueError, match="line 1"):
            cpp_source.functions(source)
