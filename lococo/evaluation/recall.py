"""Recall loss: what is lost on tokens that a text repeats from a place further back, by distance.

A token whose last words stood earlier in the text can be copied from there, by a model that still has the place in its
cache. Where it is further back than the slots could hold by age alone, only a cache that chose well has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lococo.evaluation.losses import ALL_DOMAINS, DocumentLosses, Losses
from lococo.evaluation.repeats import NGRAM
from lococo.files import write_whole
from lococo.metrics import CONFIDENCE, RESAMPLES, SEED, mean_interval
from lococo.results.plots import Lines, Series, picture, thousands
from lococo.results.tables import beside, write_result

HOW = (
    f"Tokens that end {NGRAM} tokens which stood earlier in the window, by the distance of the last such place: from "
    "so many tokens back to twice as many. lost: nats per token more than the full cache loses on the same tokens; "
    f"lost_low and lost_high: its {CONFIDENCE:.0%} interval, {RESAMPLES} bootstrap resamples of the documents, seed "
    f"{SEED}."
)


def recall_rows(losses: Losses) -> list[dict[str, Any]]:
    """One row per run, domain and distance of losses that ``measure_losses`` grouped by distance."""
    full = next((groups for run, groups in losses.items() if run.name == "full"), None)
    return [
        _row(run.columns, group, measured, None if full is None else full[group])
        for run, groups in losses.items()
        for group, measured in sorted(groups.items(), key=lambda each: (each[0][1], each[0][0]))
    ]


def _row(
    columns: dict[str, Any], group: tuple[int, str], measured: DocumentLosses, full: DocumentLosses | None
) -> dict[str, Any]:
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
        write_whole(beside(output, ".png"), _picture(compared))


def _picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """What is lost against the distance, a line per method; a panel per number of slots."""
    distances = sorted({row["distance"] for row in rows})
    budgets = sorted({row["num_slots"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))

    def line(name: str, own: Sequence[dict[str, Any]]) -> Series:
        lost, places = [row["lost"] for row in own], [row["distance"] for row in own]
        low, high = (
            [row["lost"] if row[end] is None else row[end] for row in own] for end in ("lost_low", "lost_high")
        )
        return Series(name, lost, places, low, high, {"color": f"C{names.index(name)}"})

    def panel(slots: int) -> Lines:
        found = {name: [row for row in rows if (row["method"], row["num_slots"]) == (name, slots)] for name in names}
        lines = [line(name, own) for name, own in found.items() if own]
        ticks = {distance: thousands(distance) for distance in distances}
        return Lines(lines, f"{slots} slots", log="x", ticks=ticks, bottom=min(0, *(row["lost"] for row in rows)))

    grid = [[panel(slots) for slots in budgets]]
    xlabel, ylabel = "tokens back, and up to twice as many", "lost (nats per token)"
    return picture(grid, (max(6, 1 + 3.4 * len(budgets)), 4), xlabel=xlabel, ylabel=ylabel, share=True)
