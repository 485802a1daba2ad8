"""``lococo eval ablate``: rows and files of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lococo.ablation.run import Measured
from lococo.evaluation.perplexity import ALL_DOMAINS, Losses, gap_change, loss_row
from lococo.methods import Run

BASELINE = "baseline"

# What the Markdown table shows; the JSON has all.
COLUMNS = (
    "varied",
    "method",
    "combination",
    "num_slots",
    "kernel_size",
    "num_sinks",
    "num_heavy",
    "num_recent",
    "num_fused",
    "seed",
    "ppl",
    "gap_ratio",
    "gap_low",
    "gap_high",
    "untrained_gap_ratio",
    "change",
    "change_low",
    "change_high",
)
MEASURES = ("nll", "ppl", "gap_ratio", "gap_low", "gap_high")


def rows_of(losses: Losses, methods: Sequence[Run], finished: Sequence[Measured], length: int) -> list[dict[str, Any]]:
    """One row per method and number of slots, then one per finished cell, over all texts.

    ``change`` is the gap ratio less that of the centre, at as many slots, with its interval in ``change_low`` and
    ``change_high``; ``untrained_gap_ratio`` is what the cell had before its heads learned.
    """
    if not finished:
        return []
    group = (length, ALL_DOMAINS)
    centre = finished[0].trained
    rows = [
        _row(loss_row(losses, method, group), BASELINE, method.name, method.config, None, None) for method in methods
    ]
    for each in finished:
        cell = each.cell
        measured = loss_row(losses, each.trained, group)
        row = _row(measured, cell.varied, "lococo", cell.config, cell.combination, cell.seed)
        row["untrained_gap_ratio"] = loss_row(losses, each.untrained, group)["gap_ratio"]
        if each.trained != centre and each.trained.num_slots == centre.num_slots:
            changes = gap_change(losses, each.trained, centre, group)
            row["change"], row["change_low"], row["change_high"] = changes
        rows.append(row)
    return rows


def _row(
    measured: dict[str, Any], varied: str, method: str, config: Any, combination: str | None, seed: int | None
) -> dict[str, Any]:
    learns = config is not None and config.num_fused > 0 and combination is not None
    shares = ("num_slots", "block_size", "num_sinks", "num_heavy", "num_recent", "num_fused")
    return {
        "varied": varied,
        "method": method,
        "combination": combination,
        **{name: None if config is None else getattr(config, name) for name in shares},
        "kernel_size": config.kernel_size if learns else None,
        "seed": seed if learns else None,
        "length": measured["length"],
        **{name: measured[name] for name in MEASURES},
        "untrained_gap_ratio": None,
        **dict.fromkeys(("change", "change_low", "change_high")),
        "documents": measured["documents"],
        "tokens": measured["tokens"],
    }
