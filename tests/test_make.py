"""What a user meets before the program runs: the goals and options of make, what setup finds, names of texts, a
processor that lacks what the program was built to use, and the scripts that launch ranks.

Nothing of the program is compiled. Stand-ins for g++, nvcc, dpkg-query and others are first on PATH, and write down how
they were called.
"""
import io
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLMOE = os.path.abspath(os.environ.get("OLMOE", ROOT / "olmoe"))
sys.path.insert(0, str(ROOT / "scripts"))
import made_up_routing
import make_corpus
import split_text

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="features of x86")
QEMU = pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="no qemu-x86_64; Debian: qemu-user")

# A g++ that makes files, a program that makes token files, and a Python that runs split_text.py alone
GXX = """#!/bin/sh
line=$(printf '\t%s' "$@")
printf '%s\n' "g++$line" >> "$LOG"
case "$*" in *" -dM "*) cat "$MACROS";; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -n "$out" ] || exit 0
printf '#!/bin/sh\\nwhile [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done\\n' > "$out"
printf 'case $out in *.npy) echo tokens > $out;; esac\\n' >> "$out"
chmod +x "$out"
"""
PYTHON = """#!/bin/sh
echo "python $*" >> "$LOG"
case "$1" in *split_text.py) exec "$REAL_PYTHON" "$@";; esac
[ "$2" != --out ] || { mkdir -p "$3"; touch "$3/train.jsonl" "$3/val.jsonl"; }
"""
# An nvcc that makes files. $GPU: the GPUs that native finds, as sm_90; none: it warns as NVIDIA's does
NVCC = """#!/bin/sh
line=$(printf '\t%s' "$@")
case "$*" in *--dryrun*) ;; *) printf '%s\n' "nvcc$line" >> "$LOG";; esac
case "$GPU $*" in
    " "*-arch=native*) echo "nvcc warning : Cannot find valid GPU for '-arch=native', default arch is used" >&2;;
esac
case "$*" in *--dryrun*) for sm in ${GPU:-sm_75}; do echo "#$ ptxas -arch=$sm -m64" >&2; done; exit 0;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
[ -z "$out" ] || { echo '#!/bin/sh' > "$out"; chmod +x "$out"; }
"""
DPKG_QUERY = """#!/bin/sh
[ ! -e "$LOG.installed" ] || printf 'ii '
"""
APT_GET = """#!/bin/sh
echo "apt-get begins" >> "$LOG"
sleep 0.4
touch "$LOG.installed"
echo "apt-get ends" >> "$LOG"
"""
SUDO = """#!/bin/sh
exec "$@"
"""


class Tree:
    """A copy of what make reads, with stand-ins; `lines` is what these wrote down."""

    def __init__(self, folder):
        self.folder, self.log = folder / "tree", folder / "log"
        self.folder.mkdir()
        for name in ("Makefile", "cpu", "configs", "lib", "commands", "olmoe.cu", "test_olmoe.cu"):
            (self.folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "scripts", self.folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        self.macros = folder / "macros"
        self.macros.write_text("#define __AVX2__ 1\n")
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in {"g++": GXX, "python": PYTHON, "dpkg-query": DPKG_QUERY, "apt-get": APT_GET,
                           "sudo": SUDO}.items():
            self.program(name, text)
        not_for_it = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "DATA", "SLURM_JOB_ID", "RANKS")
        self.environment = {key: value for key, value in os.environ.items() if key not in not_for_it}
        self.environment.update(PATH=f"{self.bin}:{os.environ['PATH']}", LOG=str(self.log), MACROS=str(self.macros),
                                REAL_PYTHON=sys.executable)

    def program(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *words, cwd=None, **environment):
        return subprocess.run([*map(os.fsencode, words)], cwd=cwd or self.folder, capture_output=True, text=True,
                              errors="replace", timeout=100, env={**self.environment, **environment})

    def make(self, *words, **environment):
        return self.run("make", "DEVICE=cpu", "MPICC=false", "PYTHON=python", *words, **environment)

    def lines(self):
        """What was written since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return lines


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tree where the program is built"""
    tree = Tree(tmp_path_factory.mktemp("built"))
    made(tree.make("-j2", "olmoe"))
    return tree


def made(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------
# Goals

@pytest.mark.parametrize("goals, flags", [("-j2 setup train", ""), ("setup train", "-j"), ("-j4 train setup", "")],
                         ids=["j2", "MAKEFLAGS", "last"])
def test_setup_is_first(tree, goals, flags):
    made(tree.make(*goals.split(), MAKEFLAGS=flags))
    lines = tree.lines()
    installed = lines.index("apt-get ends")
    early = [line for line in lines[:installed] if line != "apt-get begins"]
    assert not early, early
    after = " ".join(lines[installed:])
    assert "olmoe.cu" in after and "make_corpus.py" in after and "learned.py" in after


def test_nothing_is_built_where_setup_fails(tree):
    tree.program("apt-get", "#!/bin/sh\nexit 7\n")
    assert tree.make("-j2", "-k", "setup", "train").returncode == 2
    assert tree.lines() == []


def test_clean_and_build_do_not_overlap(tree):
    made(tree.make("olmoe"))
    (tree.folder / "build/old").mkdir()
    tree.program("rm", '#!/bin/sh\nsleep 0.3\nexec /bin/rm "$@"\n')
    made(tree.make("-j4", "clean", "olmoe"))
    assert (tree.folder / "olmoe").exists() and not (tree.folder / "build/old").exists()


def test_tasks_are_those_of_the_corpus(tree):
    """The default run evaluates on all that make_corpus.py writes, a run on a text on none."""
    (tree.folder / "my.txt").write_text("hello\n" * 70000)
    command, = [line for line in made(tree.make("-n", "train")).splitlines() if "--eval-tasks" in line]
    tasks = command.split("--eval-tasks ")[1].split(" --")[0].split()
    assert tasks == [f"build/train/tasks/{name}.jsonl" for name in make_corpus.QUESTIONS]
    assert "--eval" not in made(tree.make("-n", "train", "DATA=my.txt"))


def test_finetune(tree):
    """After the default run, which it starts from; clean leaves what it made."""
    made(tree.make("finetune", "SEED=2", SEED="5"))
    calls = [line for line in tree.lines() if line.startswith("python ")]
    scripts = ("make_corpus", "learned", "finetune")
    assert [call.split()[1] for call in calls] == [f"scripts/{name}.py" for name in scripts]
    assert calls[-1].split()[2:] == "--base build/train/run --out build/finetune/seed-2 --seed 2".split()
    made(tree.make("finetune", SEED="5"))
    assert tree.lines()[-1].endswith("--out build/finetune/seed-1 --seed 1")
    (tree.folder / "build/finetune/seed-1").mkdir(parents=True)
    made(tree.make("clean"))
    assert (tree.folder / "build/finetune/seed-1").exists() and not (tree.folder / "build/cpu-fp32").exists()


# ------------------------------------------------------------------------------------------------
# Options of the compiler

def compiled(lines):
    """The calls of g++ for objects, and for the program: name of what is made -> words"""
    calls = [line.split("\t") for line in lines if line.startswith("g++\t") and "\t-o\t" in line]
    return {words[words.index("-o") + 1].split("/")[-1]: words for words in calls}


def test_cxxflags_add_options(tree):
    made(tree.make("-j4", "CXXFLAGS=-O0 -std=c++14 -ffast-math '-DNAME=\"a b\"'", "olmoe", CXXFLAGS="-DENVIRONMENT"))
    calls = compiled(tree.lines())
    check = calls.pop("processor.o")
    assert "-march=x86-64" in check or platform.machine() != "x86_64"
    assert "-march=native" not in check and "-ffast-math" not in check
    assert set(calls) == {"olmoe.i", "olmoe.o", "fast.o", "gemm.o", "nccl.o", "device.o", "olmoe"}
    for words in calls.values():
        assert "-fopenmp" in words and "-march=native" in words and '-DNAME="a b"' in words
        assert [word for word in words if word.startswith("-O")][-1] == "-O0"
        assert [word for word in words if word.startswith("-std=")][-1] == "-std=c++17"
        assert words.index("-fno-finite-math-only") > words.index("-ffast-math")
        assert "-DENVIRONMENT" not in words


def test_march_names_a_processor(tree):
    made(tree.make("-j4", "MARCH=haswell", "olmoe"))
    calls = compiled(tree.lines())
    processor = calls.pop("processor.o")
    assert "-march=native" not in processor and "-march=haswell" not in processor
    for words in calls.values():
        assert "-march=haswell" in words and "-march=native" not in words


def test_another_processor_is_built_for_again(tree):
    """In a folder that two kinds of machine share, -march=native has two meanings."""
    made(tree.make("-j4", "olmoe"))
    assert "olmoe.o" in compiled(tree.lines())
    made(tree.make("-j4", "olmoe"))
    assert not compiled(tree.lines())
    tree.macros.write_text("#define __AVX512F__ 1\n")
    time.sleep(0.02)                                    # a file system's clock may have coarse steps
    made(tree.make("-j4", "olmoe"))
    assert {"olmoe.o", "device.o", "olmoe"} <= set(compiled(tree.lines()))
    made(tree.make("-j4", "olmoe"))
    assert not compiled(tree.lines())
    made(tree.make("-j4", "CXXFLAGS=-g3", "olmoe"))
    assert "-g3" in compiled(tree.lines())["olmoe.o"]


# ------------------------------------------------------------------------------------------------
# The GPU that is built for

def for_cuda(tree, *words, **environment):
    return tree.make("DEVICE=cuda", f"NVCC={tree.bin}/nvcc", *words, **environment)


def targets(tree):
    """What nvcc was called for since the last call: name -> words that say for which GPU"""
    calls = [line.split("\t") for line in tree.lines() if line.startswith("nvcc\t")]
    return {words[words.index("-o") + 1].split("/")[-1]: [word for word in words if "arch=" in word] for words in calls}


@pytest.fixture
def gpu_tree(tree):
    tree.program("nvcc", NVCC)
    return tree


def test_native_where_no_gpu_answers(gpu_tree):
    """Refused before anything is compiled, with one line; compiled where one answers, or where a GPU is named."""
    done = for_cuda(gpu_tree, "olmoe")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: *** ")]
    assert done.returncode == 2 and len(lines) == 1 and "finds no GPU here" in lines[0] and "SM=90 (H100" in lines[0]
    assert not targets(gpu_tree) and not list(gpu_tree.folder.glob("build/*/olmoe"))
    made(for_cuda(gpu_tree, "olmoe", GPU="sm_90"))
    assert targets(gpu_tree) == {"olmoe": ["-arch=native"]}
    made(for_cuda(gpu_tree, "SM=90", "olmoe"))
    assert targets(gpu_tree) == {"olmoe": ["arch=compute_90,code=[compute_90,sm_90]"]}


def test_an_nvcc_that_does_not_know_native(gpu_tree):
    gpu_tree.program("nvcc", "#!/bin/sh\necho \"nvcc fatal   : Unsupported gpu architecture 'native'\" >&2\nexit 1\n")
    done = for_cuda(gpu_tree, "olmoe")
    assert done.returncode == 2 and "SM=90" in done.stderr, done.stderr


def test_another_gpu_is_built_for_again(gpu_tree):
    """In a folder that two kinds of machine share, native has two meanings."""
    both = "sm_80 sm_90"
    for gpu, again in (("sm_90", True), ("sm_90", False), ("sm_80", True), (both, True), (both, False)):
        made(for_cuda(gpu_tree, "olmoe", GPU=gpu))
        assert bool(targets(gpu_tree)) == again, gpu
        time.sleep(0.02)


def test_several_gpus_are_named(gpu_tree):
    made(for_cuda(gpu_tree, "SM=80 90a", "olmoe"))
    assert targets(gpu_tree) == {"olmoe": [f"arch=compute_{sm},code=[compute_{sm},sm_{sm}]" for sm in ("80", "90a")]}
    for sm in ("9.0", "sm_90", "", "H100", "80,90"):
        done = for_cuda(gpu_tree, f"SM={sm}", "olmoe")
        assert done.returncode == 2 and f"SM={sm}: write SM=native, or" in done.stderr, done.stderr


def test_builds_for_all_gpus_name_them(gpu_tree):
    made(for_cuda(gpu_tree, "build/cuda-all-fp32/olmoe", "build/ptx-bf16/olmoe"))
    calls = [line for line in gpu_tree.lines() if line.startswith("nvcc\t")]
    assert [[f"compute_{sm}" in line for sm in (80, 90, 100)] for line in calls] == [[True] * 3, [False, True, False]]
    assert not any("native" in line for line in calls)


# ------------------------------------------------------------------------------------------------
# Setup

@pytest.fixture
def bare(tree):
    """setup.sh on a system that has the tools of `tree.bin` and a shell's, and no other."""
    for name in list(os.listdir(tree.bin)):
        (tree.bin / name).unlink()
    for name in ("sh", "cat", "dirname", "id", "readlink", "tr"):
        (tree.bin / name).symlink_to(shutil.which(name))
    tree.environment.update(PATH=str(tree.bin))
    for name in ("DEVICE", "NVCC", "NCCL_HOME"):
        tree.environment.pop(name, None)
    return tree


def toolkit(tree, *missing):
    """A CUDA toolkit in a folder of its own, and its nvcc"""
    home = tree.folder / "cuda"
    for name in {"bin/nvcc", "include/cublas_v2.h", "include/cuda_bf16.h", "include/nvtx3/nvToolsExt.h"} - set(missing):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("#!/bin/sh\n")
        (home / name).chmod(0o755)
    (tree.bin / "nvcc").symlink_to(home / "bin/nvcc")
    return home


def set_up(tree, **environment):
    done = tree.run(tree.bin / "sh", "scripts/setup.sh", **{"NVCC": f"{tree.bin}/nvcc", **environment})
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("tool, query, has, command", [
    ("dnf", "rpm", '#!/bin/sh\ncase "$3" in *-devel) exit 1;; esac\n',
     "dnf install onednn-devel json-devel utf8proc-devel zlib-devel openmpi-devel libzstd-devel"),
    ("pacman", "pacman", '#!/bin/sh\nprintf "onednn\\nlibutf8proc\\n"\nexit 127\n',
     "pacman -S --needed onednn libutf8proc")], ids=["dnf", "pacman"])
def test_setup_of_other_distributions(bare, tool, query, has, command):
    """What is missing is named as the distribution's packages are, and nothing is installed; where nothing is missing
    that is enough."""
    bare.program(tool, "#!/bin/sh\n")
    bare.program(query, has)
    code, out, errors = set_up(bare)
    assert code == 1 and f"as root, run: {command}" in errors and out == ""
    bare.program(query, "#!/bin/sh\n")
    assert set_up(bare) == (0, "setup: everything is installed\n", "")


def test_setup_of_the_browser(bare):
    """make setup-page installs what is missing of it alone, and nothing where nothing is missing."""
    def set_up_page():
        done = bare.run(bare.bin / "sh", "scripts/setup.sh", "page")
        return done.returncode, done.stdout, done.stderr

    code, out, errors = set_up_page()
    assert code == 1 and "no apt-get, dnf or pacman here" in errors and "chromedriver" in errors and out == ""
    bare.program("apt-get", "#!/bin/sh\necho apt-get $*\n")
    bare.program("sudo", '#!/bin/sh\nexec "$@"\n')
    bare.program("dpkg-query", '#!/bin/sh\ncase "$*" in *chromium-driver) echo "un ";; *) echo "ii ";; esac\n')
    code, out, errors = set_up_page()
    assert (code, errors) == (0, "") and "install -y -q --no-install-recommends chromium-driver\n" in out
    installed(bare)
    assert set_up_page() == (0, "setup: everything is installed\n", "")


def test_setup_where_no_packages_are_known(bare):
    code, out, errors = set_up(bare)
    assert code == 1 and "no apt-get, dnf or pacman here" in errors and "oneDNN 2 or 3" in errors and out == ""


def installed(tree):
    tree.program("apt-get", "#!/bin/sh\nexit 7\n")
    tree.program("dpkg-query", "#!/bin/sh\nprintf 'ii '\n")


def test_setup_reports_on_cuda(bare):
    """What it never installs: of driver, toolkit and NCCL what is there and what is missing, where there is an nvcc."""
    installed(bare)
    home = toolkit(bare)
    code, out, errors = set_up(bare)
    assert code == 0 and errors == "", errors
    assert "driver: MISSING" in out and f"toolkit: {home}\n" in out
    bare.program("nvidia-smi", "#!/bin/sh\n")
    (home / "include/nccl.h").touch()
    code, out, errors = set_up(bare)
    assert code == 0 and "MISSING" not in out and f"NCCL: {home}\n" in out and "driver: nvidia-smi finds a GPU" in out
    assert set_up(bare, DEVICE="cpu") == (0, "setup: everything is installed\n", "")


def test_setup_for_cuda_fails_where_it_could_not_be_built(bare):
    installed(bare)
    toolkit(bare, "include/nvtx3/nvToolsExt.h", "include/cublas_v2.h")
    if any(Path("/usr/include", name).exists() for name in ("cublas_v2.h", "nvtx3/nvToolsExt.h")):
        pytest.skip("the system has CUDA's headers, and they are found")
    code, out, errors = set_up(bare, DEVICE="cuda")
    assert code == 1 and "toolkit: MISSING: cublas_v2.h nvtx3/nvToolsExt.h of" in out
    assert errors == "setup: a CUDA build needs what is missing above\n"
    assert set_up(bare)[0] == 0                              # not asked for: the CPU build works


# ------------------------------------------------------------------------------------------------
# Names of texts

NAMES = ["book(1).txt", "it's.txt", 'a"b.txt', "a&b.txt", "a:b.txt", "50%.txt", "a;b.txt", "a$b.txt", "a$$b.txt",
         "a b.txt", "a#b.txt", "a|b=c.txt", "*?[a].txt", "-x.txt", "~a.txt", "a\\", "$(touch RAN)`touch RAN`.txt",
         "$(shell touch RAN).txt", "';touch RAN;'.txt", b"\xe9 \xe6\x97\xa5.txt"]


def text_of(name):
    return (b"%s\n" % os.fsencode(name) * 400000)[:400000]


@pytest.mark.parametrize("name", NAMES, ids=map(str, range(len(NAMES))))
def test_names_of_texts(built, name):
    """The text is trained on, in its own folder, and nothing of the name is run. Beside it is a script that another
    reading of a & b would run."""
    tree, before = built, os.listdir(built.folder / "build")
    raw = os.fsencode(tree.folder) + b"/" + os.fsencode(name)
    with open(raw, "wb") as f:
        f.write(text_of(name))
    (tree.folder / "b.txt").write_text("#!/bin/sh\ntouch RAN\n")
    (tree.folder / "b.txt").chmod(0o755)
    output = made(tree.make("train", b"DATA=" + os.fsencode(name), PATH=f"{tree.environment['PATH']}:."))
    runs = [path for path in os.listdir(tree.folder / "build") if path not in before]
    assert runs == ["train-" + os.fsdecode(split_text.folder_of(name))], output
    run = tree.folder / "build" / runs[0]
    parts = [(run / part).read_bytes() for part in ("train.txt", "val.txt")]
    assert sum(map(len, parts)) == 400000 and parts[0].startswith(text_of(name)[:200])
    assert not (tree.folder / "RAN").exists() and (run / "val.npy").exists()


def test_a_name_is_not_run_beside_setup(tree):
    (tree.folder / "$(shell touch RAN).txt").write_bytes(text_of("a"))
    made(tree.make("-j2", "setup", "train", "DATA=$(shell touch RAN).txt"))
    assert not (tree.folder / "RAN").exists()


def test_plain_names_stay():
    assert split_text.folder_of("my_Text-2.txt") == b"my_Text-2.txt"
    assert split_text.folder_of("a/b c+d@e.txt") == b"a+b@20c@2Bd@40e.txt"


def test_two_texts_never_share_a_folder():
    """A folder's name gives the text's name back."""
    def name_of(folder):
        pieces = folder.replace(b"+", b"/").split(b"@")
        return pieces[0] + b"".join(bytes([int(piece[:2], 16)]) + piece[2:] for piece in pieces[1:])

    random.seed(11)
    for _ in range(2000):
        name = bytes(random.choices(b"a2FZ/+@%_.-: \n\xe9", k=random.randrange(1, 9)))
        assert name_of(split_text.folder_of(name)) == name
        assert b"/" not in split_text.folder_of(name)


@pytest.mark.parametrize("name, text, words", [
    ("a\nb.txt", text_of("a"), "a line break in the name"),
    ("none.txt", None, "none.txt: No such file or directory"),
    (".", None, ". is a folder"),
    ("/dev/null", None, "/dev/null is no file with a size"),
    ("short.txt", b"a" * 399999, "short.txt has 399999 bytes"),
    ("x.JSONL", b"{}", "x.JSONL is not plain text"),
    ("utf16.txt", "\ufeffa".encode("utf-16-le") * 200000, "utf16.txt is UTF-16"),
    ("l" * 251, text_of("a"), "File name too long"),
], ids=["line break", "none", "folder", "device", "short", "jsonl", "utf16", "long"])
def test_texts_that_are_refused(built, name, text, words):
    if text:
        (built.folder / name).write_bytes(text)
    done = built.make("train", f"DATA={name}")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: *** [Makefile:")]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr


def test_a_changed_text_is_cut_again(tree):
    """Also where another text comes to its place that is older. Else nothing is done twice."""
    text, train = tree.folder / "my.txt", tree.folder / "build/train-my.txt/train.txt"

    def tokenized():
        output = made(tree.make("train", "DATA=my.txt"))
        return output.count("olmoe tokenize")

    text.write_bytes(text_of("one"))
    assert tokenized() == 2
    assert tokenized() == 0
    text.write_bytes(text_of("two"))
    os.utime(text, (1e9, 1e9))
    time.sleep(0.02)
    assert tokenized() == 2 and train.read_bytes().startswith(b"two\n")
    train.unlink()
    assert tokenized() == 2 and train.read_bytes().startswith(b"two\n")


def test_stretches_end_with_whole_characters():
    text = ("ж€𝄞a" * 12000).encode()
    pieces = list(split_text.stretches(io.BufferedReader(io.BytesIO(text))))
    assert b"".join(pieces) == text and len(pieces) == 6
    for piece in pieces:
        piece.decode()
    no_text = b"\x80" * 50000
    assert b"".join(split_text.stretches(io.BufferedReader(io.BytesIO(no_text)))) == no_text


BALANCE = [{"max_over_mean": 1.5, "dead": 0}]
STEP = {"step": 3, "ms": 40.0, "val_loss": 1.0, "val_bpb": 1.25, "balance": BALANCE}


@pytest.mark.parametrize("steps, text, words", [
    ([STEP], "hello\n", "xz -9e spends no byte"),                   # was divided by
    ([STEP], "", "val.txt is empty"),
    ([{"step": 1, "ms": 1.0}], "hello\n", "no validation in"),
    ([], "hello\n", "no validation in"),
    ([{**STEP, "val_bpb": None}], "hello\n", "no bits per byte"),
    ([{"step": 3, "ms": 40.0, "val_loss": 0.0, "balance": BALANCE}], "hello\n", "no bits per byte"),
    ([{"step": 3, "val_loss": 1.0, "val_bpb": 1.25}], "hello\n", "KeyError('ms')"),
    ([3], "hello\n", "TypeError"),
], ids=["xz", "val", "steps", "log", "null", "targets", "ms", "number"])
def test_what_was_learned_of_a_degenerate_text(tmp_path, steps, text, words):
    (tmp_path / "train.txt").write_text(text * 63000)
    (tmp_path / "val.txt").write_text(text * 3000)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    done = subprocess.run([sys.executable, ROOT / "scripts/learned.py", tmp_path, tmp_path], capture_output=True,
                          text=True)
    assert words in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == done.returncode == (0 if done.stdout else 1), done.stderr


@pytest.fixture
def default_run(tmp_path):
    """learned(log's lines) of a default run whose other bars are met. Its tasks: 100 questions with four choices; 50
    with two and 50 with four"""
    (tmp_path / "tasks").mkdir()
    for name, few in (("b", 0), ("a", 50)):
        choices = [(i, choice) for i in range(100) for choice in range(2 if i < few else 4)]
        (tmp_path / f"tasks/{name}.jsonl").write_text("".join(json.dumps({"doc_id": i}) + "\n" for i, _ in choices))
    (tmp_path / "train.txt").write_text("hello\n" * 63000)
    (tmp_path / "val.txt").write_bytes(random.Random(1).randbytes(3000))
    (tmp_path / "entropy.json").write_text(json.dumps({"bits_per_byte": {"all": 1.0}}))
    made_up_routing.write_default_run(tmp_path, tmp_path)

    def learned(*steps):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in ({"config": {}}, *steps)))
        return subprocess.run([sys.executable, ROOT / "scripts/learned.py", tmp_path, tmp_path], capture_output=True,
                              text=True)
    return learned


def evaluated(step, a, b):
    return {**step, "eval/downstream/a_acc": a, "eval/downstream/b_acc": b}


@pytest.mark.parametrize("a, b, missed", [(0.52, 0.38, []), (0.51, 0.38, ["a"]), (0.52, 0.37, ["b"]),
                                          (float("nan"), 0.37, ["a", "b"])], ids=["none", "a", "b", "nan"])
def test_bars_of_tasks(default_run, a, b, missed):
    """Chance and three standard errors: (50/2 + 50/4 + 3 sqrt(50/4 + 50 3/16)) / 100 = 0.515, and 0.25 + 3 sqrt(3/16 /
    100) = 0.380. It is the last evaluation that counts."""
    early = evaluated({"step": 0}, 0.4, 0.2), evaluated({**STEP, "step": 2}, 0.1, 0.1)
    done = default_run(*early, evaluated(STEP, a, b))
    rows = {name: line for line in done.stdout.splitlines() for name in "ab" if f" of {name} right" in line}
    assert list(rows) == ["a", "b"] and done.stderr == "", done.stderr
    assert f" {a:.2f} of a right, 0.40 before training; three standard errors above chance are 0.52 " in rows["a"]
    assert f" {b:.2f} of b right, 0.20 before training; three standard errors above chance are 0.38 " in rows["b"]
    assert [name for name, line in rows.items() if line.endswith("MISSED")] == missed
    assert done.returncode == (1 if missed else 0), done.stdout


def test_bars_of_a_run_without_a_start(default_run):
    assert "before training" not in default_run(evaluated(STEP, 1, 1)).stdout
    done = default_run({"step": 0, "eval/downstream/b_acc": 0.5}, STEP)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no evaluation of" in done.stderr


# ------------------------------------------------------------------------------------------------
# A processor that lacks what the program was built to use

BASELINE = "-march=x86-64" if platform.machine() == "x86_64" else "-O1"
REPORTS = r"""
#include "processor.h"
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char** argv) {           // needs, has, room for the line: the line. Without arguments: needs, names
    char line[2000] = "";
#define F(name, macro) " " name
    if (argc < 4) return printf("%llu" PROCESSOR_FEATURES(F) "\n", processor_needs) < 0;
    unsigned long length = processor_report(strtoull(argv[1], 0, 0), strtoull(argv[2], 0, 0), line, atoi(argv[3]));
    printf("%lu %s", length, line);
}
"""
INITIALISED = r"""
#include <stdio.h>
struct Speaks { Speaks() { fputs("an initialiser ran\n", stderr); } } speaks;
extern const unsigned long long processor_needs;
const unsigned long long processor_needs = %s;
int main() { return 0; }
"""


class Check:
    """The check, compiled as make does, and programs with it."""

    def __init__(self, folder):
        self.folder = folder
        self.compile("check.o", "-c", BASELINE, ROOT / "cpu/processor.cpp")
        (folder / "reports.cpp").write_text(REPORTS)

    def compile(self, name, *words):
        done = subprocess.run(["g++", "-std=c++17", "-fopenmp", "-Wall", "-Wextra", f"-I{ROOT}/cpu", *words, "-o",
                               self.folder / name], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return self.folder / name

    def built_for(self, march):
        """A program that is built for this processor: every function of it, but not the check"""
        return self.compile(march, f"-march={march}", "-O3", ROOT / "cpu/device.cpp", self.folder / "reports.cpp",
                            self.folder / "check.o")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    return Check(tmp_path_factory.mktemp("check"))


def output_of(*words, code=0):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env={**os.environ, "GOMP_SPINCOUNT": "0"})
    errors = "".join(line for line in done.stderr.splitlines(True) if "TCG doesn't support" not in line)
    assert done.returncode == code, (done.returncode, done.stdout, errors)
    return done.stdout + errors


LACKS = "olmoe: this processor lacks what the program was built to use:"
AGAIN = "Build it again here: make (or elsewhere, for this processor: make MARCH=...)"


@X86
def test_features_of_made_up_processors(check):
    program = check.built_for("x86-64")
    needs, *names = output_of(program).split()
    assert needs == "0" and len(names) == len(set(names)) and {"avx2", "fma", "lzcnt", "avx512f"} <= set(names)

    def report(needs, has, room=2000):
        sets = [sum(1 << names.index(word) for word in words.split()) for words in (needs, has)]
        length, line = output_of(program, *sets, room).split(" ", 1)
        assert int(length) == len(line)
        return line

    assert report("", "") == report("", "avx2") == report("avx2 fma", "fma avx2 bmi") == ""
    assert report("avx2", "fma") == f"{LACKS} avx2. {AGAIN}\n"
    assert report("sse3 fma avx2 avx512f", "sse3 fma") == f"{LACKS} avx2 avx512f. {AGAIN}\n"
    assert report(" ".join(names), "") == f"{LACKS} {' '.join(names)}. {AGAIN}\n"
    assert len(report(" ".join(names), "")) < 1024          # the room that the program has
    assert report("avx2", "", 9) == "olmoe: th"


@X86
def test_what_a_build_needs(check):
    needs, *names = output_of(check.built_for("x86-64")).split()
    assert needs == "0"
    macros = subprocess.run(["g++", "-march=haswell", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True,
                            text=True, check=True).stdout
    expected = {name for name in names if f"#define __{name.replace('.', '_').upper()}__ 1\n" in macros}
    assert {"sse4.2", "avx2", "fma", "bmi2"} <= expected and "avx512f" not in expected
    symbols = check.compile("haswell.o", "-c", "-march=haswell", ROOT / "cpu/device.cpp")
    program = check.compile("haswell", BASELINE, check.folder / "reports.cpp", symbols,
                            *no_check(check))               # without the check, so that it runs anywhere
    needs = int(output_of(program).split()[0])
    assert {name for i, name in enumerate(names) if needs >> i & 1} == expected


def no_check(check):
    """The check's object without its place among the initialisers"""
    path = check.folder / "no_check.o"
    subprocess.run(["objcopy", "--remove-section=.preinit_array", "--remove-section=.rela.preinit_array",
                    check.folder / "check.o", path], check=True)
    return [path]


@X86
def test_the_check_is_before_initialisers(check):
    for needs, code, words in (("0", 0, "an initialiser ran\n"), ("1ull << 63", 1, f"{LACKS}. {AGAIN}\n")):
        source = check.folder / "initialised.cpp"
        source.write_text(INITIALISED % needs)
        program = check.compile("initialised", "-O1", source, check.folder / "check.o")
        assert output_of(program, code=code) == words


@X86
def test_a_build_for_this_processor_runs_here(check):
    assert output_of(check.built_for("native")).split()[0].isdigit()


@X86
@QEMU
def test_an_older_processor(check):
    program = check.built_for("haswell")
    assert output_of("qemu-x86_64", "-cpu", "Haswell", program).split()[0].isdigit()
    older = output_of("qemu-x86_64", "-cpu", "Nehalem", program, code=1)
    assert older == f"{LACKS} lzcnt movbe bmi bmi2 avx avx2 fma f16c. {AGAIN}\n"


@X86
@QEMU
@pytest.mark.skipif(not os.path.exists(OLMOE) or "cuda" in os.path.basename(os.path.dirname(os.path.realpath(OLMOE))),
                    reason="needs ./olmoe for the CPU")
@pytest.mark.skipif(" avx2 " not in Path("/proc/cpuinfo").read_text(), reason="needs a processor with AVX2")
def test_the_program_on_an_older_processor():
    line = output_of("qemu-x86_64", "-cpu", "Nehalem", OLMOE, "info", "--config", ROOT / "configs/tiny.json", code=1)
    assert line.startswith(LACKS) and line.endswith(f"{AGAIN}\n") and " avx2 " in line and line.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Launching ranks

LAUNCHED = '#!/bin/sh\npwd >> "$LOG"\necho "$@" >> "$LOG"\n'


@pytest.fixture
def launching(tree):
    """Stand-ins for mpirun and Slurm, a program, and a folder to call from"""
    for name in ("mpirun", "srun"):
        tree.program(name, LAUNCHED)
    (tree.folder / "olmoe").write_text("#!/bin/sh\n")
    (tree.folder / "olmoe").chmod(0o755)
    tree.here = tree.folder.parent / "my work"
    tree.here.mkdir()
    return tree


def launched(tree, *words, **environment):
    done = tree.run("bash", *words, cwd=tree.here, **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder, words = tree.lines()[-2:]
    return folder, words.replace("--allow-run-as-root ", "")


def test_scripts_do_not_change_folder(launching):
    here, program = str(launching.here), f"{launching.folder}/olmoe"
    scripts = launching.folder / "scripts"
    folder, words = launched(launching, scripts / "launch_node.sh", "--out", "run", RANKS="2")
    assert folder == here and words == f"-np 2 --oversubscribe --bind-to none {program} train --out run"
    (launching.here / "hosts").write_text("localhost\n")
    folder, words = launched(launching, "../tree/scripts/launch_hosts.sh", "hosts", "--out", "run")
    assert folder == here
    assert words == f"--hostfile hosts --map-by slot --bind-to none --wdir {here} {program} train --out run"


def test_scripts_are_found_through_links(launching):
    (launching.here / "launch").symlink_to(launching.folder / "scripts/launch_node.sh")
    folder, words = launched(launching, "launch", "--out", "run", RANKS="2", CDPATH="/")
    assert folder == str(launching.here) and f" {launching.folder}/olmoe train" in words


def test_scripts_name_the_program_that_is_missing(launching):
    (launching.folder / "olmoe").unlink()
    (launching.here / "hosts").write_text("localhost\n")
    for words in (["launch_node.sh"], ["launch_hosts.sh", "hosts", "--out"], ["launch_slurm.sh"]):
        done = launching.run("bash", launching.folder / "scripts" / words[0], *words[1:], cwd=launching.here, RANKS="2")
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "make builds it" in done.stderr and words[0] in done.stderr


def test_a_machine_without_gpus(launching):
    """Where there is no nvidia-smi, and where there is one that fails."""
    for program in (None, "#!/bin/sh\necho broken >&2\nexit 9\n"):
        if program:
            launching.program("nvidia-smi", program)
        done = launching.run("bash", launching.folder / "scripts/launch_node.sh", "--out", "run", cwd=launching.here)
        assert done.returncode == 1, done.stderr
        assert done.stderr == "launch_node.sh: no GPU found; RANKS=N starts N ranks\n"
    launching.program("nvidia-smi", "#!/bin/sh\necho GPU 0: A\necho GPU 1: A\n")
    _, words = launched(launching, launching.folder / "scripts/launch_node.sh", "--out", "run")
    assert words.startswith("-np 2 ")


def test_slurm_runs_a_copy_of_the_script(launching):
    """sbatch copies it to a folder of its own. Slurm has recorded the path and the arguments."""
    script = launching.folder / "scripts/launch_slurm.sh"
    record = f"JobId=7 JobName=olmoe\\n   Command={script} --out run\\n   WorkDir=/"
    launching.program("scontrol", f"#!/bin/sh\nprintf '{record}\\n'\n")
    shutil.copy(script, launching.bin / "slurm_script")
    folder, words = launched(launching, launching.bin / "slurm_script", "--out", "run", SLURM_JOB_ID="7",
                             SLURM_JOB_NODELIST="n1", SLURM_SUBMIT_DIR="/")
    assert folder == str(launching.here) and f" {launching.folder}/olmoe train --resume " in words
