"""One self-contained HTML page of what the slots hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo.inspection.trace import KINDS, Trace

SCALE = 1000  # weights are written as whole thousandths
TEMPLATE = Path(__file__).with_name("page.html")


def page_data(traces: Sequence[Trace], tokens: Sequence[str], title: str, threshold: float) -> dict[str, Any]:
    """What the page shows, as JSON values.

    Parameters
    ----------
    tokens : sequence of str
        Text of every token read.
    threshold : float
        Weights below it are left out of the slots; the sums over slots count them.

    Returns
    -------
    dict
        ``heads`` holds one entry per layer and KV head: ``kept``, thousandths of every token over all slots, and
        ``slots``, each ``[kind, token, thousandths, token, thousandths, ...]`` with the heaviest token first.

    Raises
    ------
    ValueError
        If the threshold does not lie between 0 and 1.
    """
    if not 1 / SCALE <= threshold <= 1:
        raise ValueError(f"threshold must lie between {1 / SCALE} and 1, got {threshold}")
    heads = [
        {
            "layer": each.layer,
            "head": each.head,
            "kept": (SCALE * each.weights.sum(dim=0)).round().int().tolist(),
            "slots": [_slot(kind, row, threshold) for kind, row in zip(each.kinds, each.weights, strict=True)],
        }
        for each in traces
    ]
    return {"title": title, "kinds": list(KINDS), "threshold": threshold, "tokens": list(tokens), "heads": heads}


def _slot(kind: str, row: Any, threshold: float) -> list[int]:
    places = (row >= threshold).nonzero()[:, 0]
    places = places[row[places].argsort(descending=True, stable=True)]
    pairs = zip(places.tolist(), (SCALE * row[places]).round().int().tolist(), strict=True)
    return [KINDS.index(kind), *(number for pair in pairs for number in pair)]


def page(data: dict[str, Any]) -> str:
    """The data inside the page that shows it. No text in it can end the script that holds it."""
    written = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", written)
