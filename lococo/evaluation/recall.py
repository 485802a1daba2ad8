"""Recall loss: what is lost on tokens that a text repeats from a place further back, by distance.

A token whose last words stood earlier in the text can be copied from there, by a model that still has the place in its
cache. Where it is further back than the slots could hold by age alone, only a cache that chose well has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lococo.evaluation.losses import ALL_DOMAINS, DocumentLosses, Losses
from lococo.evaluation.repeats import NGRAM
from lococo.files import write_whole
from lococo.methods import bits_name
from lococo.metrics import CONFIDENCE, RESAMPLES, SEED, mean_interval
from lococo.results.plots import Lines, Series, in_rows, picture, thousands
from lococo.results.tables import beside, write_result

Row = dict[str, Any]
Panels = dict[str, dict[str, list[Row]]]  # rows by the title of a panel and the name of a line
MOST_PANELS, MOST_COLUMNS = 6, 3
HEADS = "lococo"  # trained ones, which there may be several of in a format

HOW = (
    f"Tokens that end {NGRAM} tokens which stood earlier in the window, by the distance of the last such place: from "
    "so many tokens back to twice as many. lost: nats per token more than the full cache loses on the same tokens; "
    f"lost_low and lost_high: its {CONFIDENCE:.0%} interval, {RESAMPLES} bootstrap resamples of the documents, seed "
    f"{SEED}."
)


def recall_rows(losses: Losses) -> list[Row]:
    """One row per run, domain and distance of losses that ``measure_losses`` grouped by distance."""
    full = next((groups for run, groups in losses.items() if run.name == "full"), None)
    return [
        _row(run.columns, group, measured, None if full is None else full[group])
        for run, groups in losses.items()
        for group, measured in sorted(groups.items(), key=lambda each: (each[0][1], each[0][0]))
    ]


def _row(columns: Row, group: tuple[int, str], measured: DocumentLosses, full: DocumentLosses | None) -> Row:
    nll, tokens = measured.table
    lost, low, high = None, None, None
    if full is not None:
        lost = measured.mean - full.mean
        low, high = mean_interval(nll - full.table[0], tokens) or (None, None)
    return {
        "domain": group[1],
        **columns,
        "distance": group[0],
        "nll": measured.mean,
        "lost": lost,
        "lost_low": low,
        "lost_high": high,
        "documents": int((tokens > 0).sum()),
        "tokens": int(tokens.sum()),
    }


def write_recall(
    losses: Losses, output: Path, command: str, device: torch.device, commits: Sequence[str | None] = ()
) -> None:
    """Write ``<output>.json``, ``.md`` of all domains together, and ``.png`` if the full cache is there to compare.

    Nothing is written where nothing repeats.
    """
    rows = recall_rows(losses)
    if not rows:
        return
    shown = [row for row in rows if row["domain"] == ALL_DOMAINS]
    write_result(output, command, device, rows, table=shown, how=HOW, commits=commits)
    compared = [row for row in shown if row["method"] != "full" and row["lost"] is not None]
    if compared:
        bits = {run.name: bits_name(run.config) for run in losses if run.config is not None}
        write_whole(beside(output, ".png"), _picture(compared, bits))


def _picture(rows: Sequence[Row], bits: Mapping[str, str]) -> bytes:
    """What is lost against the distance: panels of lines. ``bits`` are those of each method."""
    distances = sorted({row["distance"] for row in rows})
    panels = _by_slots(rows)
    if len(panels) > MOST_PANELS:
        panels = _by_format(rows, bits)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))

    def line(name: str, own: Sequence[Row]) -> Series:
        lost, places = [row["lost"] for row in own], [row["distance"] for row in own]
        low, high = (
            [row["lost"] if row[end] is None else row[end] for row in own] for end in ("lost_low", "lost_high")
        )
        return Series(name, lost, places, low, high, {"color": f"C{names.index(name)}"})

    def panel(title: str) -> Lines:
        lines = [line(name, own) for name, own in panels[title].items()]
        ticks = {distance: thousands(distance) for distance in distances}
        return Lines(lines, title, log="x", ticks=ticks, bottom=min(0, *(row["lost"] for row in rows)))

    columns = min(len(panels), MOST_COLUMNS)
    grid = in_rows(list(map(panel, panels)), columns)
    size = (max(6, 1 + 3.4 * columns), 1 + 3 * len(grid))
    xlabel, ylabel = "tokens back, and up to twice as many", "lost (nats per token)"
    return picture(grid, size, xlabel=xlabel, ylabel=ylabel, share=True)


def _by_slots(rows: Sequence[Row]) -> Panels:
    """A panel per number of slots, a line per method."""
    panels: Panels = {}
    for row in sorted(rows, key=lambda row: row["num_slots"]):
        panels.setdefault(f"{row['num_slots']} slots", {}).setdefault(row["method"], []).append(row)
    return panels


def _by_format(rows: Sequence[Row], bits: Mapping[str, str]) -> Panels:
    """A panel per format, a line per method in it; at equal bytes each has a number of slots of its own."""
    panels: Panels = {}
    for row in sorted(rows, key=lambda row: -row["block_size"]):
        method, block_size = row["method"], row["block_size"]
        coded = "" if bits[method] == "16" else f"-{bits[method]}"
        name = method.removesuffix(coded).removesuffix(f"-b{block_size}")
        slots = f" {row['num_slots']}" if name == HEADS else ""
        title = f"{bits[method]} bits, blocks of {block_size}"
        panels.setdefault(title, {}).setdefault(name + slots, []).append(row)
    return panels
