"""What a stage of a visit to a GPU found: a line on the terminal and a row in its result file, check by check."""

import argparse
import contextlib
import shlex
import sys
import time
import traceback
from pathlib import Path

import torch

from lococo.results.tables import write_result

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def stage_options(description):
    """The parser of a stage: where it runs and where its result goes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="result file, without a suffix")
    return parser


class Skip(Exception):
    """Why a check makes no sense on this machine."""


class Report:
    """Rows of a stage. The file is written anew, whole, after every row, so that an end by force leaves it."""

    def __init__(self, options, how):
        self.output, self.device, self.how = options.output, torch.device(options.device), how
        self.command = shlex.join(["python", *sys.argv])
        self.rows = []

    def add(self, **row):
        self.rows.append(row)
        self.write()

    def write(self):
        names = dict.fromkeys(name for row in self.rows for name in row)
        rows = [{name: row.get(name) for name in names} for row in self.rows]
        write_result(self.output, self.command, self.device, rows, how=self.how)

    @contextlib.contextmanager
    def check(self, **names):
        """A check: the ``with`` block gets a dict for what it found. An error in it fails the check alone."""
        print(*names.values(), end=" ... ", flush=True)
        found, start, outcome, detail = {}, time.monotonic(), PASSED, ""
        try:
            yield found
        except Skip as reason:
            outcome, detail = SKIPPED, str(reason)
        except Exception as error:
            traceback.print_exc()
            outcome, detail = FAILED, f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        detail = detail or found.pop("detail", "")
        found.pop("detail", None)
        print(outcome, detail, flush=True)
        seconds = round(time.monotonic() - start, 2)
        self.add(**names, outcome=outcome, **found, seconds=seconds, detail=detail)

    def status(self):
        """Exit status: 0 if something passed and nothing failed."""
        outcomes = {row["outcome"] for row in self.rows}
        return int(FAILED in outcomes or PASSED not in outcomes)
