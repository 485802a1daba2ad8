"""What an extension leaves behind besides its weights: the losses, what it took, and a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lococo.data.documents import local_files
from lococo.data.windows import DataConfig
from lococo.extension.folder import RECORD_NAMES
from lococo.extension.recipe import ExtensionRecipe
from lococo.results.tables import result_content
from lococo.training.report import without_folders

RESULT_NAME, PICTURE_NAME = RECORD_NAMES


def record_files(
    rows: Sequence[dict[str, Any]],
    recipe: ExtensionRecipe,
    data: DataConfig,
    usage: dict[str, Any],
    command: str,
    device: torch.device,
) -> dict[str, bytes]:
    """``training.json`` and ``training.png`` by name."""
    sources = ["/".join(Path(source).parts[-2:]) if local_files(source) else source for source in data.sources]
    facts = {"recipe": dataclasses.asdict(recipe), "length": data.length, "sources": sources, "usage": usage}
    content = {**json.loads(json.dumps(facts)), **result_content(without_folders(command), device, rows)}
    return {RESULT_NAME: (json.dumps(content, indent=1) + "\n").encode(), PICTURE_NAME: _picture(rows, recipe)}


def _picture(rows: Sequence[dict[str, Any]], recipe: ExtensionRecipe) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
    axes.set(
        xlabel="step", ylabel="nats per token", title=f"training loss, {recipe.method}, {recipe.rope_scaling.length}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()
