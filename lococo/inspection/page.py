"""One self-contained HTML page of what the slots hold."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lococo.config import LoCoCoConfig
from lococo.files import write_whole
from lococo.inspection.decisions import OUTCOMES, Decisions
from lococo.inspection.trace import KINDS, Trace, trace
from lococo.patch import patched

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
        ``slots``, each ``[kind, token, thousandths, token, thousandths, ...]`` with the heaviest token first, and
        ``why``, its ``Decisions``: outcomes by their first letters, numbers of tokens as 16 bits each in base64, whole
        numbers (65535: none) or, in ``weight`` and ``scores``, bfloat16.

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
            "why": _why(each.decisions),
        }
        for each in traces
    ]
    return {"title": title, "kinds": list(KINDS), "threshold": threshold, "tokens": list(tokens), "heads": heads}


def _slot(kind: str, row: Any, threshold: float) -> list[int]:
    positions = (row >= threshold).nonzero()[:, 0]
    positions = positions[row[positions].argsort(descending=True, stable=True)]
    pairs = zip(positions.tolist(), (SCALE * row[positions]).round().int().tolist(), strict=True)
    return [KINDS.index(kind), *(number for pair in pairs for number in pair)]


def _why(decisions: Decisions) -> dict[str, Any]:
    scores = decisions.parts or {"score": decisions.score}
    return {
        "compressions": [list(each) for each in decisions.compressions],
        "outcome": "".join(OUTCOMES[outcome][0] for outcome in decisions.outcome.tolist()),
        **{name: _base64(getattr(decisions, name).to(torch.uint16)) for name in ("at", "rank", "slot")},
        "weight": _base64(decisions.weight.bfloat16()),
        "scores": {name: _base64(each.bfloat16()) for name, each in scores.items() if not each.isnan().all()},
    }


def _base64(numbers: torch.Tensor) -> str:
    """Numbers of 16 bits, the lower byte of each first."""
    return base64.b64encode(numbers.view(torch.int16).numpy().astype("<i2").tobytes()).decode()


def page(data: dict[str, Any]) -> str:
    """The data inside the page that shows it. No text in it can end the script that holds it."""
    written = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", written)


def write_page(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: torch.Tensor,
    output: Path,
    config: LoCoCoConfig,
    *,
    heads: str | None = None,
    title: str = "",
    threshold: float = 0.01,
) -> dict[str, Any]:
    """Read a text with a model, write the page of what its slots hold, and return what it shows.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched; it is as it was afterwards.
    ids : torch.Tensor
        (1, tokens) of the text.
    config : LoCoCoConfig
        How the model is patched; with trained heads, theirs.
    heads : str, optional
        Folder or Hub id of trained heads.
    threshold : float
        Smallest weight listed, from 0.001 to 1.
    """
    with patched(model, config, heads=heads):
        traces = trace(model, ids)
    data = page_data(traces, [tokenizer.decode([token]) for token in ids[0].tolist()], title, threshold)
    write_whole(output, page(data))
    return data
