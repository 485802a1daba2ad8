"""The commands ``lococo bench memory | prefill | decode | train | extend | score``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lococo.cli import options
from lococo.cli.options import MEASURED, MODEL, RUN, names_of, option
from lococo.cli.terminal import print_table, print_written

if TYPE_CHECKING:
    from lococo.bench.runner import Subject, Topic

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
        from lococo import loading
        from lococo.bench.runner import Subject
        from lococo.bench.shapes import build

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
        option(RUN, "Name of the files to write, without a suffix.", show_default="bench_COMMAND_DEVICE"),
    ] = None


def memory(
    context: typer.Context,
    source: options.ModelOptions,
    *,
    methods: options.MethodNames = "full,h2o,lococo-uncalibrated",
    num_slots: options.NumSlots = 256,
    block_size: options.BlockSize = 256,
    tokens: Annotated[int, option(MEASURED, "Tokens to read.", min=1)] = 16384,
    step: Annotated[int, option(MEASURED, "Tokens between two measurements.", min=1)] = 512,
    output: options.Output = Path("memory"),
) -> None:
    """Cache bytes against tokens read.

    Example: lococo bench memory --model MODEL --num-slots 256
    """
    from lococo.bench.memory import cache_growth

    model, _ = source.load()
    rows = cache_growth(model, names_of(methods), num_slots, block_size, tokens, step, output, context.obj)
    print_table([row for row in rows if row["tokens"] == rows[-1]["tokens"]])
    print_written(output)


def prefill(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    *,
    methods: options.MethodNames = "full,streaming,h2o,lococo-uncalibrated,lococo-open,lococo-open-rank16",
    lengths: Lengths = [2048, 4096, 8192, 16384],
) -> None:
    """Reading a text: tokens per second, peak memory.

    Example: lococo bench prefill --shape llama-3.1-8b --num-slots 512 --lengths 4096 16384
    """
    from lococo.bench.prefill import Prefill

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

    Example: lococo bench decode --shape llama-3.1-8b --num-slots 512 --batches 1 16
    """
    from lococo.bench.decode import Decode

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

    Example: lococo bench train --shape smollm2-135m --objectives distill next-token
    """
    from lococo.bench.train import Train

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

    Example: lococo bench extend --shape llama-3.1-8b --lengths 8192 32768
    """
    from lococo.bench.extend import Extend

    _measure(context, subject, grid, Extend(depth), methods, lengths)


def score(
    context: typer.Context,
    subject: SubjectOptions,
    grid: GridOptions,
    *,
    methods: options.MethodNames = "full,streaming,h2o,lococo-uncalibrated",
) -> None:
    """Scoring of heavy hitters: share of a layer's time, bytes.

    Example: lococo bench score --shape llama-3.1-8b --num-slots 512
    """
    from lococo.bench.score import Score

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
    from lococo.bench.runner import Grid, write_grid
    from lococo.loading import chosen_device
    from lococo.methods import plan_runs
    from lococo.results.journal import Journal
    from lococo.results.tables import beside

    if (subject.model is None) == (subject.shape is None):
        raise ValueError("give what is measured: either --model or --shape")
    if min(grid.batches) < 1:
        raise ValueError(f"batches must be at least 1, got {min(grid.batches)}")
    output = grid.output or Path(f"bench_{topic.name}_{chosen_device(subject.device).type}")
    runs = plan_runs(names_of(methods), grid.num_slots, grid.block_size, grid.heads, name_heads=True)
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
