"""What a calibration leaves behind: the heads folder with its record and picture."""

from __future__ import annotations

import dataclasses
import io
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    budgets, losses, gaps = figure.subplots(1, 3)
    if config.slots_per_head:
        image = budgets.imshow(torch.tensor(config.slots_per_head).T.log2().numpy(), aspect="auto", cmap="viridis")
        bar = figure.colorbar(image, ax=budgets)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{2**value:.0f}")
        budgets.yaxis.get_major_locator().set_params(integer=True)
    budgets.set(xlabel="layer", ylabel="KV head", title=f"slots per head, {config.num_slots} on average")
    trained = [row for row in rows if "loss" in row]
    losses.plot([row["step"] for row in trained], [row["loss"] for row in trained], linewidth=1)
    losses.set(xlabel="step", title="training loss (nats per token)")
    measured = [row for row in rows if row.get("gap_ratio") is not None and row["stage"] != "local"]
    ratios = [row["gap_ratio"] for row in measured]
    gaps.plot([row["step"] for row in measured], ratios, marker="o")
    gaps.set(xlabel="step", title="gap ratio on held-out text" if ratios else "no gap: H2O loses nothing")
    gaps.set_ylim(1.1 * min([0.0, *ratios]), 1.1 * max([0.1, *ratios]))
    for axes in (losses, gaps):
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()
