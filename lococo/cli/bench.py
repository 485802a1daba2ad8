"""The commands ``lococo bench memory | prefill | decode``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lococo.cli import options
from lococo.cli.options import MEASURED, RUN, names_of, option
from lococo.cli.terminal import print_table, print_written

if TYPE_CHECKING:
    from lococo.bench.speed import Measurement

# Of a table, the most telling first.
SUMMARY = ("method", "num_slots", "length", "batch", "unit", "median", "tokens_per_second", "speedup_over_full")
MEMORY = ("skipped", "peak_bytes", "cache_bytes")
Lengths = Annotated[list[int], option(MEASURED, "Tokens of the text.", "--lengths")]


@dataclasses.dataclass(frozen=True)
class ComparisonOptions:
    """What is compared, and how often."""

    heads: options.ComparedHeads = dataclasses.field(default_factory=list)
    num_slots: options.SlotCounts = dataclasses.field(default_factory=list)
    block_size: options.ComparedBlockSize = None
    slot_bits: options.SlotBits = dataclasses.field(default_factory=list)
    batches: Annotated[list[int], option(MEASURED, "Texts read or continued at once.")] = dataclasses.field(
        default_factory=lambda: [1]
    )
    repeats: Annotated[int, option(RUN, "Measurements of each method.", min=1)] = 5


def memory(
    context: typer.Context,
    source: options.ModelOptions,
    *,
    methods: options.MethodNames = "full,h2o,lococo-uncalibrated",
    heads: options.ComparedHeads = [],
    num_slots: options.SlotCounts = [],
    block_size: options.ComparedBlockSize = None,
    slot_bits: options.SlotBits = [],
    tokens: Annotated[int, option(MEASURED, "Tokens to read.", min=1)] = 16384,
    step: Annotated[int, option(MEASURED, "Tokens between two measurements.", min=1)] = 512,
    output: options.Output = Path("memory"),
) -> None:
    """Size of the cache by tokens read.

    Example: lococo bench memory --model MODEL --num-slots 256
    """
    from lococo.bench.memory import cache_growth
    from lococo.methods import plan_runs

    of_heads = num_slots, block_size, heads
    runs = plan_runs(names_of(methods), *of_heads, name_heads=True, any_block_size=True, slot_bits=slot_bits)
    model, _ = source.load()
    rows = cache_growth(model, runs, tokens, step, output, context.obj)
    print_table([row for row in rows if row["tokens"] == rows[-1]["tokens"]])
    print_written(output)


def prefill(
    context: typer.Context,
    source: options.ModelOptions,
    comparison: ComparisonOptions,
    *,
    methods: options.MethodNames = "full,h2o,lococo-uncalibrated",
    lengths: Lengths = [2048, 4096, 8192, 16384],
    output: options.Output = Path("prefill"),
) -> None:
    """Speed of reading a text, and peak memory.

    Example: lococo bench prefill --model MODEL --num-slots 256 --lengths 4096 16384
    """
    from lococo.bench.speed import Prefill

    _compare(context, source, comparison, Prefill(), methods, lengths, output)


def decode(
    context: typer.Context,
    source: options.ModelOptions,
    comparison: ComparisonOptions,
    *,
    methods: options.MethodNames = "full,h2o,lococo-uncalibrated",
    lengths: Lengths = [512, 8192],
    steps: Annotated[int, option(MEASURED, "Tokens per measurement.")] = 32,
    output: options.Output = Path("decode"),
) -> None:
    """Speed of generating token by token, peak memory and size of the cache.

    Example: lococo bench decode --model MODEL --num-slots 256 --batches 1 16
    """
    from lococo.bench.speed import Decode

    _compare(context, source, comparison, Decode(steps), methods, lengths, output)


def _compare(
    context: typer.Context,
    source: options.ModelOptions,
    comparison: ComparisonOptions,
    measurement: Measurement,
    methods: str,
    lengths: list[int],
    output: Path,
) -> None:
    from lococo.bench.speed import Cell, compare_speed
    from lococo.methods import plan_runs
    from lococo.results.tables import write_result

    of_heads = comparison.num_slots, comparison.block_size, comparison.heads
    runs = plan_runs(
        names_of(methods), *of_heads, name_heads=True, any_block_size=True, slot_bits=comparison.slot_bits
    )
    groups = [[Cell(run, length, batch) for run in runs] for batch in comparison.batches for length in lengths]
    for cell in (cell for group in groups for cell in group):
        measurement.check(cell)
    model, _ = source.load()
    rows = compare_speed(model, measurement, groups, comparison.repeats)
    write_result(output, context.obj, model.device, rows)
    print_table(rows, dict.fromkeys((*SUMMARY, *MEMORY, *rows[0])))
    print_written(output)
