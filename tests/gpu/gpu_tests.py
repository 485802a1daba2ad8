"""tests/gpu/test_gpu.py by groups, those first that say most; a row for each group."""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from gpu_report import FAILED, PASSED, SKIPPED, Report, stage_options

FILE = Path(__file__).with_name("test_gpu.py")
# A test is of the first group whose word is in its name.
GROUPS = {
    "GPU against CPU": "gpu_equals",
    "gradients": "gradients",
    "no host waits": "never_waits",
    "recorded steps": "recorded",
    "flat memory": "memory",
    "kernels": "",
}
EVERY = 2.0  # seconds between two writes


def group_of(test):
    name = test.rpartition("::")[2]
    return next(group for group, word in GROUPS.items() if word in name)


class Groups:
    """A plugin of pytest: the order of the tests, and what became of them."""

    def __init__(self, report):
        self.report, self.written = report, time.monotonic()
        self.counts = {group: Counter() for group in GROUPS}
        self.seconds, self.details = Counter(), {}

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: list(GROUPS).index(group_of(item.nodeid)))
        for item in items:
            self.counts[group_of(item.nodeid)]["tests"] += 1

    def pytest_runtest_logreport(self, report):
        group = group_of(report.nodeid)
        self.seconds[group] += report.duration
        if report.when == "call" or report.outcome != PASSED:
            self.counts[group][report.outcome] += 1
        if report.outcome == FAILED:
            reason = report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else report.longrepr
            self.details.setdefault(group, f"{report.nodeid.rpartition('::')[2]}: {reason}".partition("\n")[0][:300])
        if time.monotonic() - self.written > EVERY:
            self.write()

    def pytest_sessionfinish(self):
        self.write()

    def write(self):
        self.report.rows = [self.row(group, counts) for group, counts in self.counts.items()]
        self.report.write()
        self.written = time.monotonic()

    def row(self, group, counts):
        return {
            "group": group,
            "outcome": self.outcome(counts),
            "tests": counts["tests"],
            **{outcome: counts[outcome] for outcome in (PASSED, FAILED, SKIPPED)},
            "seconds": round(self.seconds[group], 1),
            "detail": self.details.get(group, ""),
        }

    def outcome(self, counts):
        if counts[FAILED] or not counts["tests"]:
            return FAILED
        if counts[PASSED] + counts[SKIPPED] < counts["tests"]:
            return "not finished"
        return PASSED if counts[PASSED] else SKIPPED


def main():
    options = stage_options(__doc__).parse_args()
    report = Report(options, f"{FILE.name} by groups.")
    groups = Groups(report)
    # Deprecations of the releases that happen to be there are not what is tested here.
    arguments = ["-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    status = pytest.main([*arguments, str(FILE)], plugins=[groups])
    # On a GPU no group may be skipped as a whole; elsewhere all are, but they were found and imported.
    wanted = {PASSED} if report.device.type == "cuda" else {PASSED, SKIPPED}
    return int(status) or int(not {row["outcome"] for row in report.rows} <= wanted)


if __name__ == "__main__":
    sys.exit(main())
