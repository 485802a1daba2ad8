"""The methods whose speed is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lococo.config import LoCoCoConfig
from lococo.methods import PRESETS, Run, plan_runs

# The default preset's gates are closed: blends are copies, and the convolution is never run. Open gates make it run
# at every compression, as trained heads do; what they blend before training is worth nothing.
OPEN: dict[str, Callable[..., LoCoCoConfig]] = {
    "lococo-open": partial(LoCoCoConfig, gate_init=0.5),
    "lococo-open-rank16": partial(LoCoCoConfig, gate_init=0.5, head_rank=16),
}
BENCH_PRESETS = {**PRESETS, **OPEN}


def plan_bench(
    methods: Sequence[str], budgets: Sequence[int], block_size: int, heads: Sequence[str] = ()
) -> list[Run]:
    """The methods of a benchmark, as ``lococo.methods.plan_runs``, trained heads named by their folder.

    Besides the methods of result files there are ``lococo-open``, the default preset with open gates: what the full
    convolution costs, which ``lococo-uncalibrated`` with its closed gates never runs; and ``lococo-open-rank16``, with
    the low-rank convolution that ``lococo calibrate`` trains by default.

    Raises
    ------
    ValueError, OSError
        If a method is not known, or heads cannot be read or were trained with another block size.
    """
    runs = plan_runs(methods, budgets, block_size, heads, BENCH_PRESETS)
    return [dataclasses.replace(run, name=f"lococo-{Path(run.heads).name}") if run.heads else run for run in runs]
