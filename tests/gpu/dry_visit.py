"""As gpu_visit.py, but all stages in this process: to import torch for each of them takes longer than they do."""

import contextlib
import os
import runpy
import sys

import gpu_visit

from experiments.benchmarks import runner
from experiments.benchmarks.roofline import Limits


def run(command, seconds, log, env):
    os.environ.update(env)
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            if command[1] == "-m":
                sys.argv = command[2:]
                runpy.run_module(command[2], run_name="__main__", alter_sys=True)
            else:
                sys.argv = command[1:]
                runpy.run_path(command[1], run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


if __name__ == "__main__":
    gpu_visit.run = run
    runner.measure_limits = lambda device, dtype: Limits(bytes_per_second=1e9, flops_per_second=1e9)
    sys.exit(gpu_visit.main())
