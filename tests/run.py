"""Runs pytest with the arguments given, then prints a table by file, the skipped tests by name, and as the last line

    N passed, M failed[, K skipped]

With --tally FILE the counts are added to those in FILE, so that several runs end with one sum.
"""
import sys
import time
from collections import OrderedDict

import pytest


class Tally:
    def __init__(self):
        self.files = OrderedDict()          # file -> [passed, failed, skipped, seconds]
        self.skipped, self.failed = [], []

    def pytest_runtest_logreport(self, report):
        row = self.files.setdefault(report.nodeid.split("::")[0], [0, 0, 0, 0.0])
        row[3] += report.duration
        if report.skipped:
            row[2] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped.append((report.nodeid, reason))
        elif report.failed:                 # in the test, or in one of its fixtures
            row[1] += 1
            self.failed.append(report.nodeid)
        elif report.when == "call":
            row[0] += 1

    def pytest_collectreport(self, report):
        if report.failed:
            self.files.setdefault(report.nodeid, [0, 0, 0, 0.0])[1] += 1
            self.failed.append(report.nodeid)


def main():
    args, tally_file = sys.argv[1:], None
    if "--tally" in args:
        at = args.index("--tally")
        tally_file = args[at + 1]
        del args[at:at + 2]
    tally, start = Tally(), time.time()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *args], plugins=[tally])
    print(f"\n{'file':34} passed  failed  skipped  seconds")
    for name, (passed, failed, skipped, seconds) in tally.files.items():
        print(f"{name:34} {passed:6}  {failed:6}  {skipped:7}  {seconds:7.0f}")
    for name in tally.failed:
        print(f"FAILED   {name}")
    for name, reason in tally.skipped:
        print(f"skipped  {name}: {reason}")
    passed, failed, skipped = (sum(row[i] for row in tally.files.values()) for i in range(3))
    if code not in (0, 1) and failed == 0:
        failed = 1                          # pytest itself failed, or found no test
    print(f"in {time.time() - start:.0f} s")
    if tally_file:
        with open(tally_file, "a") as f:
            f.write(f"{passed} {failed} {skipped}\n")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
