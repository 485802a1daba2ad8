"""What an extension leaves behind besides its weights: the losses, what it took, and a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lococo.data.documents import local_files
from lococo.data.windows import DataConfig
from lococo.extension.folder import RECORD_NAMES
from lococo.extension.recipe import ExtensionRecipe
from lococo.results.plots import THIN, Lines, Series, picture
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
    loss = Series("", [row["loss"] for row in rows], [row["step"] for row in rows], style=THIN)
    title = f"training loss, {recipe.method}, {recipe.rope_scaling.length}"
    return picture([[Lines([loss], title, "step", "nats per token")]], (6, 3.6))
