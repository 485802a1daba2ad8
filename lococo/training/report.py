"""What a calibration leaves behind: the heads folder with its record and picture."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lococo.config import LoCoCoConfig
from lococo.data.documents import local_files
from lococo.data.windows import DataConfig
from lococo.heads import ATTACHMENTS, save_heads
from lococo.results.plots import THIN, HeatMap, Lines, Series, picture
from lococo.results.tables import result_content
from lococo.training.gap import GapRatio
from lococo.training.recipe import Recipe

RESULT_NAME, PICTURE_NAME = ATTACHMENTS


def save_calibrated(
    model: PreTrainedModel,
    output: Path,
    rows: Sequence[dict[str, Any]],
    usage: dict[str, Any],
    gap: GapRatio,
    recipe: Recipe,
    data: DataConfig,
    config: LoCoCoConfig,
    dtype: torch.dtype | None,
    command: str,
) -> None:
    """Write a heads folder with how the heads were made, what that took, what they measure, and a picture."""
    command = without_folders(command)
    last = [row for row in rows if "gap_ratio" in row][-1]
    metrics = {
        "heldout_nll": last["heldout_nll"],
        "heldout_nll_full": gap.full,
        "heldout_nll_h2o": gap.h2o,
        "gap_ratio": last["gap_ratio"],
        "heldout_windows": len(gap.windows),
        "length": data.length,
        "first": gap.first,
    }
    training = {
        "command": command,
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "objective": recipe.objective_name,
        "sources": [Path(source).name if local_files(source) else source for source in data.sources],
    }
    result = {"usage": usage, **result_content(command, model.device, rows)}
    attachments = {
        RESULT_NAME: (json.dumps(result, indent=1) + "\n").encode(),
        PICTURE_NAME: _picture(rows, config),
    }
    save_heads(model, output, training=training, metrics=metrics, dtype=dtype, attachments=attachments)


def without_folders(command: str) -> str:
    """A command whose absolute paths are cut to their last part: the folder may be published."""
    words = shlex.split(command)
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def _picture(rows: Sequence[dict[str, Any]], config: LoCoCoConfig) -> bytes:
    """PNG: slots per KV head, loss and gap ratio over the steps."""
    budgets = None
    if config.slots_per_head:
        by_head = list(zip(*config.slots_per_head, strict=True))
        budgets = HeatMap(by_head, f"slots per head, {config.num_slots} on average", "layer", "KV head", log=True)
    trained = [row for row in rows if "loss" in row]
    loss = Series("", [row["loss"] for row in trained], [row["step"] for row in trained], style=THIN)
    measured = [row for row in rows if row.get("gap_ratio") is not None and row["stage"] != "local"]
    ratios = [row["gap_ratio"] for row in measured]
    gaps = Lines(
        [Series("", ratios, [row["step"] for row in measured])],
        "gap ratio on held-out text" if ratios else "no gap: H2O loses nothing",
        "step",
        bottom=1.1 * min([0.0, *ratios]),
        top=1.1 * max([0.1, *ratios]),
    )
    return picture([[budgets, Lines([loss], "training loss (nats per token)", "step"), gaps]], (11, 3.6))
