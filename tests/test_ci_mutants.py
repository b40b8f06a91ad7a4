"""CI's choice among the mutants, on small repositories made here."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ci_mutants

HERE = Path(__file__).resolve().parent
HOUR = 3600
START = 1_700_000_000                   # the time of a first commit

# What another git or a CI around us sets is not meant for these repositories.
clean = {key: value for key, value in os.environ.items()
         if not key.startswith("GIT_") and key not in ("CHANGE_BASE", "PYTEST_ADDOPTS")}


class Repository:
    def __init__(self, root):
        self.root = root
        self.git("init", "-q", "-b", "main")

    def git(self, *words, **environment):
        names = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *names, *words], cwd=self.root, env={**clean, **environment}, check=True,
                              capture_output=True, text=True)
        return done.stdout.strip()

    def write(self, **files):
        """Writes files; the first _ of a name is its dot."""
        for name, text in files.items():
            (self.root / name.replace("_", ".", 1)).write_text(text)

    def commit(self, hours, **files):
        """Writes files and commits all there is, so many hours after the first commit."""
        self.write(**files)
        self.git("add", "-A")
        date = f"@{START + int(hours * HOUR)} +0000"
        self.git("commit", "-q", "--allow-empty", "-m", "x", GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for key in set(os.environ) - set(clean):
        monkeypatch.delenv(key)
    return Repository(tmp_path)


def files_of(repository, given=None):
    return ci_mutants.touched_files(repository.root, ci_mutants.base_of(repository.root, given))


def test_base_is_an_older_ancestor(repository):
    root = repository.root
    assert ci_mutants.base_of(root) is None             # no commit
    repository.commit(0, a_h="1")
    assert ci_mutants.base_of(root) is None             # no ancestor
    second = repository.commit(1, b_h="1")
    repository.commit(2, a_h="2")
    assert ci_mutants.base_of(root) is None             # none that is old enough
    repository.commit(5, c_h="1")
    assert ci_mutants.base_of(root) != second           # four hours are not more than four hours
    repository.commit(5.1, c_h="2")
    assert ci_mutants.base_of(root) == second
    assert files_of(repository) == {"a.h", "c.h"}


def test_base_is_where_the_branch_left_main(repository):
    root = repository.root
    repository.commit(0, a_h="1")
    left = repository.commit(10, a_h="2")
    repository.git("update-ref", "refs/remotes/origin/main", left)
    assert ci_mutants.base_of(root) != left             # HEAD is on it: an older ancestor
    repository.commit(11, b_h="1")
    repository.commit(20, c_h="1")
    assert ci_mutants.base_of(root) == left
    assert files_of(repository) == {"b.h", "c.h"}


def test_base_is_given(repository):
    first = repository.commit(0, a_h="1")
    repository.commit(10, b_h="1")
    last = repository.commit(20, c_h="1")
    assert ci_mutants.base_of(repository.root, first) == first
    assert files_of(repository, first) == {"b.h", "c.h"}
    assert files_of(repository, last) == set()
    assert ci_mutants.base_of(repository.root, "0" * 40) is None        # what a CI gives for a new branch
    assert ci_mutants.base_of(repository.root, "") is not None


def test_shallow_clone_has_no_base(repository, tmp_path):
    first = repository.commit(0, a_h="1")
    repository.commit(10, b_h="1")
    shallow = tmp_path / "shallow"
    repository.git("clone", "-q", "--depth", "1", f"file://{repository.root}", str(shallow))
    repository.git("-C", str(shallow), "remote", "remove", "origin")
    assert ci_mutants.base_of(shallow) is None
    assert ci_mutants.base_of(shallow, first) is None   # a commit that the clone does not have


def test_touched_files(repository):
    base = repository.commit(0, a_h="1", b_h="a long enough text\n" * 9, c_h="1", d_h="1", e_h="1")
    repository.git("mv", "b.h", "moved.h")
    repository.commit(1, d_h="2")
    repository.write(a_h="2", new_h="1")                # not added
    repository.write(c_h="2")
    repository.git("add", "c.h")
    assert files_of(repository, base) == {"a.h", "b.h", "c.h", "d.h", "moved.h", "new.h"}


MUTANTS = [(f"{file}{i}", file + ".h", "old", "new", "test") for file in "abc" for i in range(20)]


def test_touched_mutants(repository):
    (repository.root / "tests").mkdir()
    entries = repository.root / "tests" / "mutants.py"
    entries.write_text(f"MUTANTS = {MUTANTS}")
    base = repository.commit(0, a_h="1", b_h="1", c_h="1")
    repository.commit(1, b_h="2")
    touched = ci_mutants.touched_mutants(repository.root, MUTANTS, base)
    assert touched == [m for m in MUTANTS if m[1] == "b.h"]
    # An entry that is new or has changed
    changed = [("c3", "c.h", "old", "newer", "test") if m[0] == "c3" else m for m in MUTANTS]
    touched = ci_mutants.touched_mutants(repository.root, changed, base)
    assert touched == [m for m in changed if m[1] == "b.h" or m[0] == "c3"]
    # Nothing to compare with
    assert ci_mutants.touched_mutants(repository.root, MUTANTS, "0" * 40) == MUTANTS
    entries.unlink()
    without = repository.commit(2)
    assert ci_mutants.touched_mutants(repository.root, MUTANTS, without) == MUTANTS


def test_draw():
    one, again, another = (ci_mutants.draw(MUTANTS, commit) for commit in ("1f", "1f", "2e"))
    assert one == again != another
    assert sorted(one) == sorted(another) == sorted(MUTANTS)
    assert ci_mutants.draw(MUTANTS[::-1], "1f") == one
    assert one not in (MUTANTS, sorted(MUTANTS))
    first = {ci_mutants.draw(MUTANTS, str(commit))[0] for commit in range(1000)}
    assert len(first) == len(MUTANTS)                   # each comes first at some commit


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def choice_at(minute):
    clock = Clock()
    return ci_mutants.Choice(MUTANTS, MUTANTS[:20], "123456789abcdef", minute * 60, clock), clock


def test_order_of_a_choice():
    choice, _ = choice_at(0)
    names = [m[0] for m in MUTANTS]
    assert sorted(choice.order[:20]) == sorted(names[:20]) != choice.order[:20]
    assert sorted(choice.order[20:]) == sorted(names[20:]) != choice.order[20:]


@pytest.mark.parametrize("minute, minutes", [(0, 25), (39, 25), (50, 15), (64, 1)])
def test_others_end_with_the_65th_minute_or_after_25(minute, minutes):
    choice, clock = choice_at(minute)
    *early, late = choice.order[20:]
    assert choice.may_start(early[0])
    clock.now += minutes * 60 - 1
    assert choice.may_start(early[1])
    clock.now += 1
    assert not choice.may_start(early[2])
    clock.now += 400
    assert not choice.may_start(late)
    assert all(choice.may_start(name) for name in choice.order[:20])    # those of touched files always
    assert choice.line() == ("mutants: 22 of 60 ran (20 of 20 of touched files, 2 of the 40 others, "
                             "drawn by 123456789abc)")


def test_25_minutes_count_from_the_first_of_the_others():
    choice, clock = choice_at(10)
    clock.now += 20 * 60
    assert choice.may_start(choice.order[0]) and choice.may_start(choice.order[20])
    clock.now += 24 * 60
    assert choice.may_start(choice.order[21])
    clock.now += 60
    assert not choice.may_start(choice.order[22])


def test_none_after_the_73rd_minute():
    choice, clock = choice_at(72)
    assert choice.may_start(choice.order[0])
    clock.now += 59
    assert choice.may_start(choice.order[1])
    clock.now += 1
    assert not choice.may_start(choice.order[2])
    assert choice.line() == "mutants: 2 of 60 ran (2 of 20 of touched files, 0 of the 40 others, drawn by 123456789abc)"


def test_none_of_the_others_when_it_is_late():
    choice, _ = choice_at(70)
    assert not choice.may_start(choice.order[20])
    assert choice.may_start(choice.order[0])
    assert choice.line() == "mutants: 1 of 60 ran (1 of 20 of touched files, 0 of the 40 others, drawn by 123456789abc)"


# ------------------------------------------------------------------------------------------------
# The whole: a repository with faults and tests of its own, judged by our test_mutants.py

TEST = """import time
from pathlib import Path
import pytest
@pytest.mark.parametrize("i", range(20))
def test_word(i):
    time.sleep({sleep})
    assert f"word{{i}}." in Path("{file}.h").read_text()
"""


@pytest.fixture
def project(repository):
    tests = repository.root / "tests"
    (tests / "fixtures").mkdir(parents=True)
    for name in ("run.py", "test_mutants.py", "ci_mutants.py"):
        shutil.copy(HERE / name, tests / name)
    (repository.root / ".gitignore").write_text("/build/\n__pycache__/\n")
    mutants = []
    for file in "ab":
        (repository.root / f"{file}.h").write_text(" ".join(f"word{i}." for i in range(20)))
        (tests / f"test_{file}.py").write_text(TEST.format(file=file, sleep=0 if file == "a" else 0.2))
        for i in range(2 if file == "a" else 8):
            mutants.append((f"{file}{i}", f"{file}.h", f"word{i}.", "", f"tests/test_{file}.py::test_word[{i}]"))
    (tests / "mutants.py").write_text(f"MUTANTS = {mutants}")
    repository.commit(0)
    repository.commit(10, a_h=(repository.root / "a.h").read_text() + " more")
    return repository


def judge(project, *options):
    command = [sys.executable, "tests/run.py", "--tally", "tally", "tests/test_mutants.py", *options]
    done = subprocess.run(command, cwd=project.root, env=clean, capture_output=True, text=True, timeout=600)
    passed, failed, skipped = map(int, (project.root / "tally").read_text().split())
    assert done.stdout.splitlines()[-1] == f"{passed} passed, {failed} failed" and skipped == 0, done.stdout
    assert done.returncode == (failed > 0)
    return done.stdout, passed, failed


def in_ci(project, minute):
    """The output in CI at a minute, and how many mutants it says ran of the touched file and of the other one."""
    stdout, passed, failed = judge(project, "-p", "ci_mutants", "--ci-seconds", str(minute * 60))
    commit = project.git("rev-parse", "--short=12", "HEAD")
    line = (rf"^mutants: (\d+) of 10 ran \((\d+) of (\d+) of touched files, (\d+) of the (\d+) others, "
            rf"drawn by {commit}\)$")
    ran, touched, of_touched, others, of = map(int, re.search(line, stdout, re.M).groups())
    assert ran == touched + others and touched == of_touched
    # Of each group a baseline, if a mutant of it ran
    assert passed + failed == ran + (touched > 0) + (others > 0)
    return stdout, touched, others, of, failed


def test_by_hand_all_run(project):
    stdout, passed, failed = judge(project)
    assert (passed, failed) == (12, 0) and "mutants:" not in stdout


def test_late_in_ci_those_of_the_touched_file_run(project):
    _, *counts = in_ci(project, 66)
    assert counts == [2, 0, 8, 0]


def test_early_in_ci_all_run(project):
    _, *counts = in_ci(project, 20)
    assert counts == [2, 8, 8, 0]


def test_shortly_before_the_end_some_run(project):
    _, touched, others, of, failed = in_ci(project, 65 - 1 / 60)        # one second: their baseline alone takes longer
    assert (touched, of, failed) == (2, 8, 0) and others <= 2


def test_a_fault_that_nothing_notices_fails_in_ci(project):
    """An entry that is new belongs to the change."""
    entries = project.root / "tests" / "mutants.py"
    unnoticed = ("b99", "b.h", "word19.", "word19. ", "tests/test_b.py::test_word[0]")
    entries.write_text(entries.read_text()[:-1] + f", {unnoticed}]")
    stdout, passed, failed = judge(project, "-p", "ci_mutants", "--ci-seconds", "4200")
    assert failed == 1 and "FAILED   tests/test_mutants.py::test_mutant[b99]" in stdout
    assert re.search(r"^mutants: 3 of 11 ran \(3 of 3 of touched files, 0 of the 8 others", stdout, re.M)


def test_nothing_touched_and_late_is_no_failure(project):
    project.commit(20)
    stdout, passed, failed = judge(project, "-p", "ci_mutants", "--ci-seconds", "4200")
    assert (passed, failed) == (0, 0)
    assert re.search(r"^mutants: 0 of 10 ran \(0 of 0 of touched files, 0 of the 10 others", stdout, re.M)
