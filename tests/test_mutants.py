"""Do the tests test? Each fault of mutants.py is put into a copy of the tree, alone, and the test it names has to fail:
by a comparison, or by a report of the strict machine. That a copy does not build, hangs or dies otherwise does not
count, and without the fault every named test has to pass.

    python3 -m pytest tests/test_mutants.py [-k NAME]

The copies are in build/mutants/; that of a fault that no test noticed stays there. Two at a time: half of it is
compiling. CI runs a choice of them: ci_mutants.py.
"""
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
COPIES = ROOT / "build" / "mutants"
BASELINE = COPIES / "baseline"
SECONDS = 600                           # for a build, or for a test, also on a busy machine

# What test_olmoe is built for, name: (folder under build/, options of make, seeds it runs with)
BUILDS = {
    "fast": ("cpu-fp32", (), ("1",)),
    "bf16": ("cpu-bf16", ("PRECISION=BF16",), ("1",)),
    "strict": ("cpu-fp32-strict", ("STRICT=1",), ("1", "2", "3", "4", "5")),
    # a missing wait between two streams shows in one draw of three
    "ranks": ("cpu-fp32-strict", ("STRICT=1",), tuple("12345678")),
    "cores": ("cpu-bf16-strict", ("PRECISION=BF16", "STRICT=1"), ("1", "2", "3", "4", "5")),
}
# Compiled for quick compiling; the tests' tolerances hold with any optimisation
FLAGS = "CXXFLAGS=-O0 -g0 -w"
# Which program a test of the command line runs
PROGRAMS = {f"tests/test_{name}.py": "build/cpu-fp32/olmoe"
            for name in ("cli", "generate", "rows", "objectives", "evaluate", "evaluate_runs", "batch", "mixing",
                         "routing", "routing_page", "routing_runs")}

# The options of a make that called this one are not meant for the copies.
NOT_FOR_COPIES = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CUDA_SEED", "OLMOE", "PYTEST_ADDOPTS")
clean = {key: value for key, value in os.environ.items() if key not in NOT_FOR_COPIES}
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
    if group != "ranks":
        return [program]
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", program, "--ranks"]


def run(command, tree, **environment):
    return subprocess.run(command, cwd=tree, env={**clean, **environment}, capture_output=True, text=True,
                          errors="replace", timeout=SECONDS)


def ending(done):
    """The last lines that a program printed, for messages."""
    return done.stdout[-3000:] + done.stderr[-3000:]


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
        named = re.search(rf"^FAILED {re.escape(test)}( - |$)", done.stdout, re.M)
        noticed = done.returncode == 1 and named and re.search(r"^1 failed in ", done.stdout, re.M)
        return None if noticed else f"exit code {done.returncode}:\n{ending(done)}"
    for seed in BUILDS[group][2]:
        done = run([*words_of(group), "--only", name], tree, CUDA_SEED=seed)
        if done.returncode == 1 and re.search(r"^\d+ passed, [1-9]\d* failed$", done.stdout, re.M):
            return None
        reported = done.returncode == 99 and re.search(r"^cuda-on-cpu: ", done.stderr, re.M)
        if group in ("strict", "ranks", "cores") and reported:
            return None
        if done.returncode != 0:
            break
    return f"exit code {done.returncode}:\n{ending(done)}"


baseline_builds = threading.Lock()


def judge_baseline(group):
    """Builds the tree as it is and runs the group's tests; returns what is wrong, or None."""
    with baseline_builds:                   # two groups share objects
        build(BASELINE, group)
    tests = list(dict.fromkeys(name_of(test) for *_, test in MUTANTS if group_of(test) == group))
    if group not in BUILDS:
        done = pytest_run(BASELINE, group, tests)
        passed = done.returncode == 0 and re.search(rf"^{len(tests)} passed in ", done.stdout, re.M)
        return None if passed else ending(done)
    listed = run([f"build/{BUILDS[group][0]}/test_olmoe", "--list"], BASELINE).stdout.splitlines()
    missing = set(tests) - set(listed)
    if missing:
        return f"test_olmoe has no test {sorted(missing)}"
    only = [word for test in tests for word in ("--only", test)]
    for seed in BUILDS[group][2]:
        done = run([*words_of(group), *only], BASELINE, CUDA_SEED=seed)
        if done.returncode != 0 or not re.search(r"^[1-9]\d* passed, 0 failed$", done.stdout, re.M):
            return f"seed {seed}, exit code {done.returncode}:\n{ending(done)}"
    return None


def copy_tree():
    """The tree as git knows it, with files not yet added; the fixtures as a link."""
    shutil.rmtree(COPIES, ignore_errors=True)
    list_files = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(list_files, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if name and not name.startswith("tests/fixtures/") and (ROOT / name).is_file():
            (BASELINE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, BASELINE / name)
    (BASELINE / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures")


def judge_mutant(mutant):
    name, file, old, new, test = mutant
    tree = COPIES / name
    shutil.copytree(BASELINE, tree, symlinks=True, ignore=shutil.ignore_patterns("build", "__pycache__"))
    machine = Path("build") / BUILDS.get(group_of(test), BUILDS["fast"])[0] / "cpu"
    if (BASELINE / machine).is_dir():       # a fault is never in these objects
        shutil.copytree(BASELINE / machine, tree / machine)
    text = (tree / file).read_text()
    assert text.count(old) == 1, f"{file} contains this {text.count(old)} times, not once: {old}"
    (tree / file).write_text(text.replace(old, new))
    what = judge(tree, test)
    if what is None:
        shutil.rmtree(tree)
    return what


NOT_STARTED = object()                  # the outcome of a mutant that CI's choice left out


class Judging:
    """The work that the tests of a session wait for, in a pool of two. Baselines go first, so that what waits for one
    waits for one that runs; those that only CI's other mutants need are run when the first of these starts."""

    def __init__(self, session):
        parameters = [item.callspec.params for item in session.items if item.module is sys.modules[__name__]]
        mutants = {mutant[0]: mutant for mutant in MUTANTS}
        names = [p["name"] for p in parameters if "name" in p]      # CI's in the order of the choice
        self.choice = getattr(session, "mutant_choice", None)
        always = [name for name in names if not self.choice or name in self.choice.always]
        asked = {p["group"] for p in parameters if "group" in p} if not self.choice else set()
        first = [g for g in GROUPS if g in asked or any(group_of(mutants[name][-1]) == g for name in always)]
        self.lock, self.begun = threading.Lock(), set()
        self.baselines = {group: Future() for group in GROUPS}
        copy_tree()
        self.pool = ThreadPoolExecutor(min(2, os.cpu_count()))
        for group in first:
            self.pool.submit(self.baseline, group)
        self.outcomes = {name: self.pool.submit(self.outcome, mutants[name]) for name in names}

    def baseline(self, group):
        """What is wrong without a fault, or None: run by the first that asks; the others wait."""
        with self.lock:
            mine = group not in self.begun
            self.begun.add(group)
        if mine:
            try:
                self.baselines[group].set_result(judge_baseline(group))
            except BaseException as error:
                self.baselines[group].set_exception(error)
        return self.baselines[group].result()

    def outcome(self, mutant):
        if self.choice and not self.choice.may_start(mutant[0]):
            return NOT_STARTED
        assert self.baseline(group_of(mutant[-1])) is None, "not judged: the named tests have to pass without the fault"
        return judge_mutant(mutant)


def judging_of(session):
    """The work of the session, started by the first call."""
    if not hasattr(session, "judging"):
        session.judging = Judging(session)
    return session.judging


def left_out(item):
    """Whether CI's choice left this test out: a mutant that was not started, a group that no mutant needed. Waits for
    the mutant. The groups' tests come last."""
    judging, parameters = judging_of(item.session), item.callspec.params
    if "group" in parameters:
        return parameters["group"] not in judging.begun
    outcome = judging.outcomes[parameters["name"]]
    return outcome.exception() is None and outcome.result() is NOT_STARTED


@pytest.fixture(scope="module")
def judging(request):
    yield judging_of(request.session)
    judging_of(request.session).pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_fault(judging, group):
    wrong = judging.baselines[group].result()
    assert wrong is None, wrong


@pytest.mark.parametrize("name", [mutant[0] for mutant in MUTANTS])
def test_mutant(judging, name):
    survived = judging.outcomes[name].result()
    assert survived is None, f"it does not fail as it should; build/mutants/{name}: {survived}"
