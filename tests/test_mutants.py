"""Do the tests test? Each fault of mutants.py is put into a copy of the tree, alone, and the test it names has to fail: by a
comparison, or by a report of the strict machine. That a copy does not build, hangs or dies otherwise does not count, and without the
fault every named test has to pass.

    python3 -m pytest tests/test_mutants.py [-k NAME]

The copies lie in build/mutants/; that of a fault that nothing noticed stays there. Two at a time: half of it is compiling.
"""
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
COPIES = ROOT / "build" / "mutants"
BASELINE = COPIES / "baseline"
SECONDS = 600                           # for a build, or for a test; on a busy machine, too

# What test_olmoe is built for, name: (folder under build/, options of make, seeds it runs with)
BUILDS = {
    "fast": ("cpu-fp32", (), ("1",)),
    "bf16": ("cpu-bf16", ("PRECISION=BF16",), ("1",)),
    "strict": ("cpu-fp32-strict", ("STRICT=1",), ("1", "2", "3", "4", "5")),
    "ranks": ("cpu-fp32-strict", ("STRICT=1",), ("1", "2", "3")),
}
# Compiled for quick compiling; the tests' tolerances hold with any optimisation
FLAGS = "CXXFLAGS=-std=c++17 -O0 -fopenmp -fno-math-errno -w"
# Which program a test of the command line runs
PROGRAMS = {"tests/test_cli.py": "build/cpu-fp32/olmoe"}

# What a make that called this one was told is not meant for the copies.
clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CUDA_SEED", "OLMOE", "PYTEST_ADDOPTS")}
clean.update(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000")


def group_of(test):
    """What has to be there for a test: a build of test_olmoe, or a file of pytest's."""
    return test.split(":")[0]


def name_of(test):
    return test.split(": ")[-1]


GROUPS = list(dict.fromkeys(group_of(test) for *_, test in MUTANTS))


def words_of(group):
    """How the group's test_olmoe is called: the strict one, or the same on two ranks."""
    program = f"build/{BUILDS[group][0]}/test_olmoe"
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", program, "--ranks"] if group == "ranks" else [program]


def run(command, tree, **environment):
    return subprocess.run(command, cwd=tree, env={**clean, **environment}, capture_output=True, text=True, errors="replace", timeout=SECONDS)


def build(tree, group):
    """Builds what the group's tests run; raises where that fails."""
    folder, options, _ = BUILDS.get(group, BUILDS["fast"])
    target = f"build/{folder}/test_olmoe" if group in BUILDS else PROGRAMS.get(group)
    if not target:
        return
    made = run(["make", "-s", "DEVICE=cpu", FLAGS, *options, target], tree)
    if made.returncode != 0:
        raise RuntimeError(f"it does not build: {made.stderr[-2000:]}")


def pytest_run(tree, group, tests):
    environment = {"OLMOE": PROGRAMS[group]} if group in PROGRAMS else {}
    return run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], tree, **environment)


def judge(tree, test):
    """None where the test notices something, else what happened instead."""
    group, name = group_of(test), name_of(test)
    build(tree, group)
    if group not in BUILDS:
        done = pytest_run(tree, group, [test])
        noticed = done.returncode == 1 and re.search(rf"^FAILED {re.escape(test)}( - |$)", done.stdout, re.M) and re.search(r"^1 failed in ", done.stdout, re.M)
        return None if noticed else f"exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    for seed in BUILDS[group][2]:
        done = run([*words_of(group), "--only", name], tree, CUDA_SEED=seed)
        if done.returncode == 1 and re.search(r"^\d+ passed, [1-9]\d* failed$", done.stdout, re.M):
            return None
        if group in ("strict", "ranks") and done.returncode == 99 and re.search(r"^cuda-on-cpu: ", done.stderr, re.M):
            return None
        if done.returncode != 0:
            break
    return f"exit code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


baseline_builds = threading.Lock()


def judge_baseline(group):
    """Builds the tree as it is and runs the group's tests; returns what is wrong, or None."""
    with baseline_builds:                   # two groups share objects
        build(BASELINE, group)
    tests = list(dict.fromkeys(name_of(test) for *_, test in MUTANTS if group_of(test) == group))
    if group not in BUILDS:
        done = pytest_run(BASELINE, group, tests)
        return None if done.returncode == 0 and re.search(rf"^{len(tests)} passed in ", done.stdout, re.M) else done.stdout[-3000:] + done.stderr[-3000:]
    missing = set(tests) - set(run([f"build/{BUILDS[group][0]}/test_olmoe", "--list"], BASELINE).stdout.splitlines())
    if missing:
        return f"test_olmoe has no test {sorted(missing)}"
    for seed in BUILDS[group][2]:
        done = run([*words_of(group), *(word for test in tests for word in ("--only", test))], BASELINE, CUDA_SEED=seed)
        if done.returncode != 0 or not re.search(r"^[1-9]\d* passed, 0 failed$", done.stdout, re.M):
            return f"seed {seed}, exit code {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return None


def copy_tree():
    """The tree as git knows it, with files not yet added; the fixtures as a link."""
    shutil.rmtree(COPIES, ignore_errors=True)
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in files:
        if name and not name.startswith("tests/fixtures/") and (ROOT / name).is_file():
            (BASELINE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, BASELINE / name)
    (BASELINE / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures")


def judge_mutant(mutant, baseline):
    name, file, old, new, test = mutant
    assert baseline.result() is None, "not judged: the named tests have to pass without the fault"
    tree = COPIES / name
    shutil.copytree(BASELINE, tree, symlinks=True, ignore=shutil.ignore_patterns("build", "__pycache__"))
    machine = Path("build") / BUILDS.get(group_of(test), BUILDS["fast"])[0] / "cpu"
    if (BASELINE / machine).is_dir():       # a fault is never in these objects
        shutil.copytree(BASELINE / machine, tree / machine)
    text = (tree / file).read_text()
    assert text.count(old) == 1, f"{file} holds {text.count(old)} times, where it should once: {old}"
    (tree / file).write_text(text.replace(old, new))
    what = judge(tree, test)
    if what is None:
        shutil.rmtree(tree)
    return what


@pytest.fixture(scope="module")
def judged(request):
    """What the chosen tests need, name -> future. Baselines go first, so that whoever waits for one waits for one that runs."""
    mutants, groups = [], []
    for item in request.session.items:
        if item.fspath == request.node.fspath:
            parameters = item.callspec.params
            mutants += [m for m in MUTANTS if m[0] == parameters.get("name")]
            groups += [parameters["group"]] if "group" in parameters else []
    groups = [group for group in GROUPS if group in groups or any(group_of(m[-1]) == group for m in mutants)]
    copy_tree()
    with ThreadPoolExecutor(min(2, os.cpu_count())) as pool:
        futures = {group: pool.submit(judge_baseline, group) for group in groups}
        futures.update({m[0]: pool.submit(judge_mutant, m, futures[group_of(m[-1])]) for m in mutants})
        yield futures


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_fault(judged, group):
    wrong = judged[group].result()
    assert wrong is None, wrong


@pytest.mark.parametrize("name", [mutant[0] for mutant in MUTANTS])
def test_mutant(judged, name):
    survived = judged[name].result()
    assert survived is None, f"it does not fail as it should; build/mutants/{name}: {survived}"
