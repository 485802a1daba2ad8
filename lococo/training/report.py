"""What a training leaves behind besides weights: its record, and a picture of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lococo.config import LoCoCoConfig
from lococo.data.documents import local_files
from lococo.results.plots import THIN, HeatMap, Lines, Panel, Series, picture
from lococo.results.tables import result_content


def record(command: str, device: torch.device, rows: Sequence[dict[str, Any]], **facts: Any) -> bytes:
    """A result file: the facts, what made the rows where, and the rows."""
    content = {**facts, **result_content(without_folders(command), device, rows)}
    return (json.dumps(content, indent=1) + "\n").encode()


def without_folders(command: str) -> str:
    """A command whose absolute paths are cut to their last part: the folder may be published."""
    words = shlex.split(command)
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def source_names(sources: Sequence[str]) -> list[str]:
    """Sources by name: a Hub id as it is, the last part of a path."""
    return [Path(source).name if local_files(source) else source for source in sources]


def loss_panel(rows: Sequence[dict[str, Any]], title: str) -> Panel:
    """The training loss over the steps."""
    trained = [row for row in rows if "loss" in row]
    loss = Series("", [row["loss"] for row in trained], [row["step"] for row in trained], style=THIN)
    return Lines([loss], title, "step", "nats per token")


def calibration_picture(rows: Sequence[dict[str, Any]], config: LoCoCoConfig) -> bytes:
    """PNG: slots per KV head, loss and gap ratio over the steps."""
    budgets = None
    if config.slots_per_head:
        by_head = list(zip(*config.slots_per_head, strict=True))
        budgets = HeatMap(by_head, f"slots per head, {config.num_slots} on average", "layer", "KV head", log=True)
    measured = [row for row in rows if row.get("gap_ratio") is not None and row["stage"] != "local"]
    ratios = [row["gap_ratio"] for row in measured]
    gaps = Lines(
        [Series("", ratios, [row["step"] for row in measured])],
        "gap ratio on held-out text" if ratios else "no gap: H2O loses nothing",
        "step",
        bottom=1.1 * min([0.0, *ratios]),
        top=1.1 * max([0.1, *ratios]),
    )
    return picture([[budgets, loss_panel(rows, "training loss"), gaps]], (11, 3.6))
