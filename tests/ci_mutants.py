"""Which faults of mutants.py CI puts in: always those of the files that the change touches, and as many of the others
as fit.

    python3 tests/run.py tests/test_mutants.py -p ci_mutants --ci-seconds 1900

The change is the difference between a base (base_of finds it) and the files as they are, with those not committed. A
fault whose entry in mutants.py is new or has changed belongs to it also.

Both come in an order drawn by the hash of the commit. None of the others starts after .ci/run's 65th minute, or later
than 25 minutes after the first of them. None at all starts after the 73rd minute: a change that touches everything ends
in time on a slow machine, too. A fault that has not started is not run, and counts neither as skipped nor as failed. A
line at the end reports how many ran.
"""
import hashlib
import os
import subprocess
import threading
import time

import pytest

LAST_MINUTE, END_MINUTE = 65, 73        # of .ci/run, which is cut off after 90: for the others, and for all
MINUTES_OF_OTHERS = 25
OLDER = 4 * 3600                        # seconds by which an ancestor is older than what was committed just now


def git(root, *words):
    """What git prints; raises where it fails."""
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout


def commit_of(root, name):
    """The hash of what `name` names, or None where there is no such commit."""
    try:
        return git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    except (subprocess.CalledProcessError, OSError):
        return None


def older_ancestor(root):
    """The newest ancestor of HEAD that was committed more than four hours before it, or None."""
    commits = [line.split() for line in git(root, "log", "--format=%H %ct", "HEAD").splitlines()]
    head = int(commits[0][1])
    older = [(int(seconds), commit) for commit, seconds in commits if int(seconds) < head - OLDER]
    return max(older)[1] if older else None


def base_of(root, given=None):
    """The commit before the change: the one given, else where it left origin/main, else an older ancestor; or None."""
    head = commit_of(root, "HEAD")
    if head is None or given:
        return commit_of(root, given) if head else None
    try:
        merge_base = git(root, "merge-base", "origin/main", "HEAD").strip()
    except subprocess.CalledProcessError:
        merge_base = head
    return merge_base if merge_base != head else older_ancestor(root)


def touched_files(root, base):
    """The files that differ between the base and HEAD, or are not committed. A moved file counts under both names."""
    names = git(root, "diff", "-z", "--name-only", "--no-renames", base, "HEAD")
    names += git(root, "diff", "-z", "--name-only", "--no-renames", "HEAD")
    names += git(root, "ls-files", "-z", "--others", "--exclude-standard")
    return set(names.split("\0")) - {""}


def mutants_at(root, commit):
    """The entries of mutants.py as the commit has it."""
    module = {}
    try:
        exec(git(root, "show", f"{commit}:tests/mutants.py"), module)
    except (subprocess.CalledProcessError, SyntaxError):
        return []
    return module.get("MUTANTS", [])


def touched_mutants(root, mutants, given=None):
    """The mutants that the change touches: all of them where there is nothing to compare with."""
    base = base_of(root, given)
    if base is None:
        return list(mutants)
    files, before = touched_files(root, base), mutants_at(root, base)
    return [mutant for mutant in mutants if mutant[1] in files or mutant not in before]


def draw(mutants, commit):
    """The mutants in an order that the commit decides."""
    return sorted(mutants, key=lambda mutant: hashlib.sha256(f"{commit} {mutant[0]}".encode()).digest())


class Choice:
    """Says of each mutant whether it may start, and counts. `seconds` have passed since the start of .ci/run."""

    def __init__(self, mutants, touched, commit, seconds, clock=time.monotonic):
        self.commit, self.clock = commit, clock
        self.touched = draw([mutant for mutant in mutants if mutant in touched], commit)
        self.others = draw([mutant for mutant in mutants if mutant not in touched], commit)
        self.order = [mutant[0] for mutant in self.touched + self.others]
        self.always = {mutant[0] for mutant in self.touched}
        self.until, self.others_until = clock() - seconds + LAST_MINUTE * 60, None
        self.end = clock() - seconds + END_MINUTE * 60
        self.lock, self.started = threading.Lock(), []

    def may_start(self, name):
        with self.lock:
            now = self.clock()
            if now >= self.end:
                return False
            if name not in self.always:
                if self.others_until is None:
                    self.others_until = min(self.until, now + MINUTES_OF_OTHERS * 60)
                if now >= self.others_until:
                    return False
            self.started.append(name)
            return True

    def line(self):
        others = sum(name not in self.always for name in self.started)
        touched = len(self.started) - others
        return (f"mutants: {len(self.started)} of {len(self.order)} ran "
                f"({touched} of {len(self.touched)} of touched files, "
                f"{others} of the {len(self.others)} others, drawn by {self.commit[:12]})")


# ------------------------------------------------------------------------------------------------
# What pytest calls

def pytest_addoption(parser):
    parser.addoption("--ci-seconds", type=float, default=0, help="seconds since .ci/run started")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session, config, items):
    """Chooses among the mutants that -k left, and puts their tests in that order; the groups' tests come last."""
    from mutants import MUTANTS
    from test_mutants import ROOT
    names = {item.callspec.params.get("name") for item in items}
    mutants = [mutant for mutant in MUTANTS if mutant[0] in names]
    touched = touched_mutants(ROOT, mutants, os.environ.get("CHANGE_BASE"))
    commit = commit_of(ROOT, "HEAD") or "no commit"
    session.mutant_choice = Choice(mutants, touched, commit, config.getoption("--ci-seconds"))
    place = {name: i for i, name in enumerate(session.mutant_choice.order)}
    items.sort(key=lambda item: place.get(item.callspec.params.get("name"), len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """A test that the choice left out is not run: True says that this was all."""
    return True if item.module.left_out(item) else None


def pytest_sessionfinish(session):
    session.config.mutants_line = session.mutant_choice.line() if hasattr(session, "mutant_choice") else ""


def pytest_unconfigure(config):
    if getattr(config, "mutants_line", ""):
        print(config.mutants_line, flush=True)
