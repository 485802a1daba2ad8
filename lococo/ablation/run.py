"""Every cell calibrated alike, then measured on the same texts; what is finished is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.ablation.grid import Cell
from lococo.config import CONFIG_NAME
from lococo.data.texts import Window
from lococo.data.windows import DataConfig
from lococo.evaluation.perplexity import Losses, measure_losses
from lococo.files import write_whole
from lococo.heads import read_heads_config
from lococo.methods import Run
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.journal import Journal
from lococo.training.calibrate import Calibration
from lococo.training.recipes import Recipe
from lococo.training.runs import check_same_run, plain, weights_identity

RUN_NAME = "ablation.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an ablation does.

    Parameters
    ----------
    cells : sequence of Cell
        The centre first.
    methods : sequence of Run
        What they are compared with: the full cache, H2O and others, at every number of slots.
    data : DataConfig
        Text to calibrate on; each cell has a seed of its own.
    recipe : Recipe
        How cells are calibrated. One that fuses nothing has no head to train and is given its slots per head alone.
    first : int
        First token of a text that counts.
    """

    cells: Sequence[Cell]
    methods: Sequence[Run]
    data: DataConfig
    recipe: Recipe
    first: int

    def check(self, work_dir: Path) -> None:
        """Refuse what cannot be done, before a model is there.

        Raises
        ------
        ValueError, OSError, ImportError
            As in ``lococo.training.calibrate.calibrate``, or if ``work_dir`` is something else.
        """
        if work_dir.exists() and any(work_dir.iterdir()) and not (work_dir / RUN_NAME).is_file():
            raise FileExistsError(
                f"{work_dir} has no {RUN_NAME}, so it is no run to go on with: give a new --work-dir"
            )
        for cell in self.cells:
            self.calibration_of(cell, work_dir).check()

    def calibration_of(self, cell: Cell, work_dir: Path, **more: Any) -> Calibration:
        """How a cell is calibrated; more fields of ``Calibration`` may be said."""
        recipe = self.recipe
        if not cell.config.num_fused:  # no head to train
            recipe = dataclasses.replace(recipe, local=None, objective=None)
        return Calibration(
            config=cell.config,
            data=dataclasses.replace(self.data, seed=cell.seed),
            recipe=recipe,
            output=_heads(work_dir, cell),
            work_dir=work_dir / "unfinished" / cell.name,
            cache_dir=work_dir / "cache",
            recordings_dir=work_dir / f"recordings-{cell.seed}",
            resume=True,
            first=self.first,
            dtype=None,
            **more,
        )

    def description(self, model: PreTrainedModel) -> dict[str, Any]:
        """What all cells share, as plain JSON values; the grid may grow."""
        recipe = {"recipe": self.recipe, "objective": self.recipe.objective_name}
        return plain({"model": weights_identity(model), "data": self.data, **recipe, "first": self.first})


@dataclasses.dataclass(frozen=True)
class Measured:
    """A cell with its losses.

    Attributes
    ----------
    trained, untrained : Run
        With the heads that were calibrated, and as they were before; the same where nothing is fused.
    """

    cell: Cell
    trained: Run
    untrained: Run


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    texts: Sequence[Window],
    work_dir: Path,
    command: str,
    deadline: Deadline | None = None,
) -> tuple[Losses, list[Measured]]:
    """Calibrate and measure every cell. A killed run goes on where it stopped, within a cell too.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    texts : sequence of Window
        To measure on; none of them is calibrated on.
    work_dir : Path
        Heads, figures and unfinished calibrations.

    Returns
    -------
    tuple
        Losses of the methods and of the finished cells, and these cells, all of them unless the deadline came before.

    Raises
    ------
    ValueError
        If ``work_dir`` holds a run with other settings than the grid's.
    """
    deadline = deadline or Deadline()
    description = plan.description(model)
    check_same_run(work_dir / RUN_NAME, description)
    write_whole(work_dir / RUN_NAME, json.dumps(description, indent=1))
    journal = Journal(work_dir / "measured.jsonl", deadline)
    losses: Losses = {}
    finished: list[Measured] = []
    try:
        losses |= measure_losses(model, texts, plan.methods, plan.first, journal)
        for cell in tqdm(plan.cells, desc="cells", disable=None):
            done = _calibrated(model, tokenizer, plan, cell, work_dir, command, deadline)
            torch.manual_seed(cell.seed)  # the weights that its calibration began with
            losses |= measure_losses(model, texts, [done.untrained, done.trained], plan.first, journal)
            finished.append(done)
    except OutOfTime:
        pass
    return losses, finished


def _calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    cell: Cell,
    work_dir: Path,
    command: str,
    deadline: Deadline,
) -> Measured:
    heads = _heads(work_dir, cell)
    if not (heads / CONFIG_NAME).is_file():
        plan.calibration_of(cell, work_dir, command=command, deadline=deadline).run(model, tokenizer)
    config = read_heads_config(heads)
    trained = Run("lococo", config, str(heads))
    if not config.num_fused:
        return Measured(cell, trained, trained)
    return Measured(cell, trained, Run(f"lococo-untrained-{cell.seed}", config))


def _heads(work_dir: Path, cell: Cell) -> Path:
    return work_dir / "heads" / cell.name


def finish(work_dir: Path) -> None:
    """Remove the state of a run that is complete."""
    shutil.rmtree(work_dir, ignore_errors=True)
