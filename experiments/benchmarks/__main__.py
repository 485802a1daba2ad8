"""The commands ``python -m experiments.benchmarks prefill | decode | train | extend | score``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lococo.cli import options
from lococo.cli.main import run
from lococo.cli.options import MEASURED, MODEL, RUN, names_of, option
from lococo.cli.parsing import add_command, command_group
from lococo.cli.terminal import print_table, print_written

if TYPE_CHECKING:
    from experiments.benchmarks.runner import Subject, Topic

# Of a grid's table, the most telling first.
SUMMARY = ("method", "num_slots", "length", "batch", "unit", "objective", "median", "speedup_over_full", "limit_share")
MEMORY = ("skipped", "peak_bytes", "cache_bytes")
Lengths = Annotated[list[int], option(MEASURED, "Tokens.", "--lengths")]
Batches = Annotated[list[int], option(MEASURED, "Texts at once.", "--batches")]


@dataclasses.dataclass(frozen=True)
class SubjectOptions:
    """A model, or random weights of a shape."""

    model: Annotated[str | None, option(MODEL, "Folder or Hub id of a causal language model.")] = None
    shape: Annotated[
        str | None, option(MODEL, "Random weights of a shape such as llama-3.1-8b: nothing is downloaded.")
    ] = None
    gguf_file: options.GgufFile = None
    device: options.Device = "auto"
    dtype: options.Dtype = "auto"

    def load(self) -> Subject:
        """The model that is measured."""
        from experiments.benchmarks.runner import Subject
        from experiments.benchmarks.shapes import build
        from lococo import loading

        if self.shape:
            device, dtype = loading.chosen_device(self.device), loading.chosen_dtype(self.dtype)
            return Subject(self.shape, build(self.shape, device, dtype))
        name = str(self.model)
        model, _ = loading.load_model(name, gguf_file=self.gguf_file, device=self.device, dtype=self.dtype)
        return Subject(Path(name).name, model)


@dataclasses.dataclass(frozen=True)
class GridOptions:
    """What every grid of measurements is told."""

    heads: options.ComparedHeads = dataclasses.field(default_factory=list)
    num_slots: options.SlotCounts = dataclasses.field(default_factory=lambda: [512])
    block_size: options.BlockSize = 512
    batches: Batches = dataclasses.field(default_factory=lambda: [1])
    repeats: Annotated[int, option(RUN, "Measurements of each cell.")] = 5
    no_counts: Annotated[bool, option(RUN, "Times and memory alone, nothing counted apart.", "--no-counts")] = False
    time_limit: Annotated[float | None, option(RUN, "Seconds after which no measurement begins.")] = None
    output: Annotated[
        Path | None,
        option(
            RUN,
            "Name of the files to write, without a suffix.",
            show_default="bench_COMMAND_DEVICE",
            callback=options.writable,
        ),
    ] = None


def prefill(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    *,
    methods: options.MethodNames = "full,streaming,h2o,lococo-uncalibrated,lococo-open,lococo-open-rank16",
    lengths: Lengths = [2048, 4096, 8192, 16384],
) -> None:
    """Reading a text: tokens per second, peak memory.

    Example: python -m experiments.benchmarks prefill --shape llama-3.1-8b --num-slots 512 --lengths 4096 16384
    """
    from experiments.benchmarks.prefill import Prefill

    _measure(context, subject, grid, Prefill(), methods, lengths)


def decode(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    *,
    methods: options.MethodNames = "full,streaming,h2o,lococo-uncalibrated,lococo-open-rank16",
    lengths: Lengths = [512, 8192],
    steps: Annotated[int, option(MEASURED, "Tokens per measurement.")] = 32,
) -> None:
    """One token after another: seconds per step, cache bytes.

    Example: python -m experiments.benchmarks decode --shape llama-3.1-8b --num-slots 512 --batches 1 16
    """
    from experiments.benchmarks.decode import Decode

    _measure(context, subject, grid, Decode(steps), methods, lengths)


def train(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    *,
    methods: options.MethodNames = "full,streaming,lococo-open-rank16",
    lengths: Lengths = [2048, 4096],
    objectives: Annotated[list[str], option(MEASURED, "distill, next-token or both.")] = ["distill"],
) -> None:
    """A training step of the heads: seconds per token, peak memory.

    Example: python -m experiments.benchmarks train --shape smollm2-135m --objectives distill next-token
    """
    from experiments.benchmarks.train import Train

    _measure(context, subject, grid, Train(objectives), methods, lengths)


def extend(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    *,
    methods: options.MethodNames = "full,streaming,h2o,lococo-open-rank16",
    lengths: Lengths = [4096, 8192, 16384, 32768],
    depth: Annotated[int, option(MEASURED, "Compressions that back-propagation goes through.")] = 2,
) -> None:
    """A training step of an extension: seconds per token, peak memory.

    Example: python -m experiments.benchmarks extend --shape llama-3.1-8b --lengths 8192 32768
    """
    from experiments.benchmarks.extend import Extend

    _measure(context, subject, grid, Extend(depth), methods, lengths)


def score(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    *,
    methods: options.MethodNames = "full,streaming,h2o,lococo-uncalibrated",
) -> None:
    """Scoring of heavy hitters: share of a layer's time, bytes.

    Example: python -m experiments.benchmarks score --shape llama-3.1-8b --num-slots 512
    """
    from experiments.benchmarks.score import Score

    _measure(context, subject, grid, Score(grid.block_size), methods, [])


def _measure(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    topic: Topic,
    methods: str,
    lengths: list[int],
) -> None:
    """Measure a topic, also after an error or an interrupt write what has been measured, and show it."""
    from experiments.benchmarks.runner import Grid, write_grid
    from lococo.loading import chosen_device
    from lococo.methods import plan_runs
    from lococo.results.journal import Journal
    from lococo.results.tables import beside

    if (subject.model is None) == (subject.shape is None):
        raise ValueError("give what is measured: either --model or --shape")
    output = grid.output or Path(f"bench_{topic.name}_{chosen_device(subject.device).type}")
    runs = plan_runs(
        names_of(methods), grid.num_slots, grid.block_size, grid.heads, name_heads=True, any_block_size=True
    )
    groups = topic.groups(runs, lengths, grid.batches)
    for cell in (cell for group in groups for cell in group):
        topic.check(cell)
    journal = Journal(beside(output, ".partial.jsonl"))
    cells = Grid(subject.load(), topic, groups, grid.repeats, journal, grid.time_limit, not grid.no_counts)
    try:
        remaining = cells.run()
    finally:
        rows = write_grid(cells, output, context.obj)
        if rows:
            print_table(rows, dict.fromkeys((*SUMMARY, *MEMORY, *topic.columns, *rows[0])))
            print_written(output)
    if remaining:
        print(f"{output}: the time limit left {len(remaining)} cells; the same command goes on with", file=sys.stderr)
        print(*(f"  {cell}" for cell in remaining), sep="\n", file=sys.stderr)
    else:
        journal.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends with one line on stderr and status 2."""
    app = command_group("Measure speed and memory in grids.")
    for topic in (prefill, decode, train, extend, score):
        add_command(app, topic.__name__, topic)
    return run(app, "python -m experiments.benchmarks", arguments)


if __name__ == "__main__":
    sys.exit(main())
