"""The commands ``lococo bench memory | prefill | decode | train | extend | score | targets``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lococo.bench.decode import Decode
from lococo.bench.extend import Extend
from lococo.bench.grid import Grid, Subject
from lococo.bench.memory import cache_growth
from lococo.bench.pictures import plot
from lococo.bench.prefill import Prefill
from lococo.bench.score import Score
from lococo.bench.shapes import SHAPES, build
from lococo.bench.table import columns, rows_of
from lococo.bench.targets import target_rows
from lococo.bench.topic import Cell, Topic
from lococo.bench.train import Train, with_objectives
from lococo.loading import add_model_options, chosen_device, chosen_dtype, load
from lococo.methods import plan_runs
from lococo.results.journal import Journal
from lococo.results.tables import beside, markdown_table, write_result

METHODS = {
    "prefill": "full,streaming,h2o,lococo-uncalibrated,lococo-open,lococo-open-rank16",
    "decode": "full,streaming,h2o,lococo-uncalibrated,lococo-open-rank16",
    "train": "full,streaming,lococo-open-rank16",
    "extend": "full,streaming,h2o,lococo-open-rank16",
    "score": "full,streaming,h2o,lococo-uncalibrated",
}
LENGTHS = {
    "prefill": [2048, 4096, 8192, 16384],
    "decode": [512, 8192],
    "train": [2048, 4096],
    "extend": [4096, 8192, 16384, 32768],
}
OBJECTIVES = ("distill", "next-token")


def add_bench_commands(commands: Any) -> None:
    """Add a parser for everything that can be measured."""
    _add_memory(commands.add_parser("memory", help="cache bytes against tokens read"))
    _add_grid("prefill", commands.add_parser("prefill", help="reading a text: tokens per second, peak memory"))
    decode = commands.add_parser("decode", help="one token after another: seconds per step, cache bytes")
    decode.add_argument("--steps", type=int, default=32, help="tokens per measurement (default: %(default)s)")
    _add_grid("decode", decode)
    train = commands.add_parser("train", help="a training step of the heads: seconds per token, peak memory")
    train.add_argument("--objectives", nargs="+", default=["distill"], choices=OBJECTIVES, help="(default: distill)")
    _add_grid("train", train)
    extend = commands.add_parser("extend", help="a training step of an extension: seconds per token, peak memory")
    extend.add_argument(
        "--depth", type=int, default=2, help="compressions that back-propagation goes through (default: %(default)s)"
    )
    _add_grid("extend", extend)
    _add_grid("score", commands.add_parser("score", help="scoring of heavy hitters: share of a layer's time, bytes"))
    _add_targets(commands.add_parser("targets", help="what was wanted beside what the result files say"))


def _add_grid(topic: str, parser: argparse.ArgumentParser) -> None:
    add_model_options(parser, list(SHAPES))
    parser.add_argument("--methods", default=METHODS[topic], help="(default: %(default)s)")
    parser.add_argument("--heads", nargs="+", default=[], help="folders or Hub ids of trained heads to compare")
    parser.add_argument("--num-slots", type=int, nargs="+", default=[512], help="(default: 512)")
    parser.add_argument("--block-size", type=int, default=512, help="(default: %(default)s)")
    if topic in LENGTHS:
        default = " ".join(map(str, LENGTHS[topic]))
        parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS[topic], help=f"(default: {default})")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="(default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each cell (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, help="seconds after which no measurement begins")
    parser.add_argument("--no-counts", action="store_true", help="times and memory alone, nothing counted apart")
    parser.add_argument("--output", type=Path, help=f"(default: docs/results/bench_{topic}_DEVICE)")
    parser.set_defaults(run=_grid, topic=topic)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--methods", default="full,h2o,lococo-uncalibrated")
    parser.add_argument("--num-slots", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="(default: %(default)s)")
    parser.add_argument("--step", type=int, default=512, help="tokens between two readings (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/memory"), help="(default: %(default)s)")
    parser.set_defaults(run=_memory)


def _add_targets(parser: argparse.ArgumentParser) -> None:
    folder = Path("docs/results")
    parser.add_argument("--results", type=Path, default=folder, help="folder of result files (default: %(default)s)")
    parser.set_defaults(run=_targets)


def _targets(options: argparse.Namespace) -> None:
    if not options.results.is_dir():
        raise ValueError(f"--results must be a folder of result files, got {options.results}")
    rows = target_rows(options.results)
    write_result(options.results / "targets", options.command_line, "cpu", rows)
    print(markdown_table(rows))


def _memory(options: argparse.Namespace) -> None:
    model, _ = load(options)
    cache_growth(
        model,
        options.methods.split(","),
        options.num_slots,
        options.block_size,
        options.tokens,
        options.step,
        options.output,
        options.command_line,
    )


def _grid(options: argparse.Namespace) -> None:
    device = chosen_device(options.device)
    output = options.output or Path(f"docs/results/bench_{options.topic}_{device.type}")
    topic, groups = _plan(options)
    for group in groups:
        for cell in group:
            topic.check(cell)
    journal = Journal(beside(output, ".partial.jsonl"))
    counts = not options.no_counts
    grid = Grid(_subject(options), topic, groups, options.repeats, journal, options.time_limit, counts)
    try:
        remaining = grid.run()
    finally:  # what was measured before an error or an interrupt is a result, too
        _write(grid, output, options.command_line)
    if remaining:
        print(f"{output}: the time limit left {len(remaining)} cells; the same command goes on with", file=sys.stderr)
        print(*(f"  {cell}" for cell in remaining), sep="\n", file=sys.stderr)
    else:
        journal.finish()


def _write(grid: Grid, output: Path, command: str) -> None:
    rows = rows_of(grid)
    if not rows:
        return
    shown = columns(grid.topic.name, rows)
    write_result(output, command, grid.device, rows, shown, limits=dataclasses.asdict(grid.limits()))
    print(markdown_table([{name: row[name] for name in shown} for row in rows]))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{output}: no picture, matplotlib is not installed", file=sys.stderr)
    else:
        plot(grid.topic.name, rows, beside(output, ".png"))


def _subject(options: argparse.Namespace) -> Subject:
    if options.shape:
        device, dtype = chosen_device(options.device), chosen_dtype(options.dtype)
        return Subject(options.shape, build(options.shape, device, dtype))
    return Subject(Path(options.model).name, load(options)[0])


def _plan(options: argparse.Namespace) -> tuple[Topic, list[list[Cell]]]:
    """The topic, and its cells in groups that are compared with each other."""
    if min(options.batches) < 1:
        raise ValueError(f"batches must be at least 1, got {min(options.batches)}")
    runs = plan_runs(options.methods.split(","), options.num_slots, options.block_size, options.heads, name_heads=True)
    if options.topic == "score":
        groups = [
            [Cell(run, slots + options.block_size, batch) for run in runs if run.num_slots in (None, slots)]
            for batch in options.batches
            for slots in dict.fromkeys(run.num_slots for run in runs if run.num_slots)
        ]
        return Score(options.block_size), groups
    groups = [[Cell(run, length, batch) for run in runs] for batch in options.batches for length in options.lengths]
    if options.topic == "train":
        return Train(), [with_objectives(group, options.objectives) for group in groups]
    if options.topic == "extend":
        return Extend(options.depth), groups
    return Prefill() if options.topic == "prefill" else Decode(options.steps), groups
