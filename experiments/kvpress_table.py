"""The table and the picture of ``kvpress_side_by_side.py``: both sides joined over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lococo.data.texts import Window
from lococo.metrics import gap_interval, gap_ratio, mean_interval

FULL, REFERENCE, OURS = "full", "h2o", "lococo"
MEASURED = ("nll", "ppl", "gap_ratio", "gap_low", "gap_high", "minus_lococo", "low", "high", "tokens")

# By method and window: loss summed over its last block ("last") and, where every block was predicted from what is left
# of those before, over all tokens from the second block on ("all").
Nlls = dict[str, list[dict[str, float]]]


def by_document(windows: Sequence[Window], values: Sequence[float]) -> np.ndarray:
    """(documents,) sums over the windows of each document."""
    documents: dict[tuple[str, str], float] = {}
    for window, value in zip(windows, values, strict=True):
        key = (window.domain, window.document)
        documents[key] = documents.get(key, 0.0) + value
    return np.array(list(documents.values()))


def columns(
    windows: Sequence[Window], found: Nlls, name: str, part: str, block_size: int
) -> dict[str, float | int | None]:
    """What is said of a method's loss on a part of every window: ``last`` or ``all``."""
    if part not in found[name][0]:
        return dict.fromkeys(
            ("nll", "ppl", "gap_ratio", "gap_low", "gap_high", "minus_lococo", "low", "high", "tokens")
        )
    per_window = {"last": block_size, "all": windows[0].ids.shape[1] - 1 - block_size}[part]
    tokens = by_document(windows, [per_window] * len(windows))
    mine, full, reference, ours = (
        by_document(windows, [each[part] for each in found[each_name]]) for each_name in (name, FULL, REFERENCE, OURS)
    )
    nll, full_nll, reference_nll = (each.sum() / tokens.sum() for each in (mine, full, reference))
    interval = gap_interval(mine, full, reference[None], tokens) or (None, None)
    low, high = mean_interval(mine - ours, tokens) or (None, None)
    return {
        "nll": float(nll),
        "ppl": math.exp(nll),
        "gap_ratio": gap_ratio(nll, full_nll, [reference_nll]),
        "gap_low": interval[0],
        "gap_high": interval[1],
        "minus_lococo": float((mine - ours).sum() / tokens.sum()),
        "low": low,
        "high": high,
        "tokens": int(tokens.sum()),
    }


def join(
    windows: Sequence[Window], found: Nlls, reads: Mapping[str, str], num_slots: int, block_size: int
) -> list[dict[str, Any]]:
    """One row per method, in the order of how they read and, within that, of their loss on the last block."""
    rows = []
    for name in found:
        last, every = (columns(windows, found, name, part, block_size) for part in ("last", "all"))
        by_domain: dict[str, list[float]] = {}
        for window, each in zip(windows, found[name], strict=True):
            by_domain.setdefault(window.domain, []).append(each["last"] / block_size)
        rows.append(
            {
                "method": name,
                "reads": reads[name],
                "num_slots": None if name == FULL else num_slots,
                **last,
                **{f"{column}_all": value for column, value in every.items()},
                "windows": len(windows),
                "tokens_read": sum(window.ids.shape[1] - 1 for window in windows),
                **{f"nll_{domain}": sum(values) / len(values) for domain, values in sorted(by_domain.items())},
            }
        )
    order = list(dict.fromkeys(reads.values()))
    return sorted(rows, key=lambda row: (order.index(row["reads"]), row["nll"]))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Gap ratio of the last block by method, with its interval, coloured by how the text was read."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["method"] != FULL and row["gap_ratio"] is not None]
    figure = Figure(figsize=(9, 0.3 * len(shown) + 1.6), layout="constrained")
    axes, limit = figure.subplots(), 2.2
    groups = list(dict.fromkeys(row["reads"] for row in shown))
    for index, group in enumerate(groups):
        places = [place for place, row in enumerate(shown) if row["reads"] == group]
        ratios = [shown[place]["gap_ratio"] for place in places]
        axes.barh(places, ratios, color=f"C{index}", label=group)
        for place, ratio in zip(places, ratios, strict=True):
            style = {"xytext": (3, -3), "textcoords": "offset points", "fontsize": 7, "annotation_clip": False}
            axes.annotate(f"{ratio:.2f}", (min(ratio, limit), place), **style)
    for place, row in enumerate(shown):
        if row["gap_low"] is not None:
            axes.plot([row["gap_low"], row["gap_high"]], [place + 0.25] * 2, "k-", linewidth=1)
    axes.set(xlim=(0, limit), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [row["method"] for row in shown], fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel(f"gap ratio: 0 is the full cache, 1 is {REFERENCE}; what is longer than {limit} is cut")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(groups))
    figure.savefig(path, dpi=110)
