"""What a calibration does and for how long."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from lococo.config import LoCoCoConfig
from lococo.training.local import LocalConfig
from lococo.training.objectives import Distill, NextToken, Objective


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages of a calibration, each left out where its number is 0 or None.

    Parameters
    ----------
    budget_texts : int
        Texts on which the errors are measured that decide how many slots each KV head gets.
    local : LocalConfig, optional
        Layer-local training, a start for what follows.
    local_texts : int
        Texts recorded for it.
    objective : Objective, optional
        End-to-end training.
    steps : int
        Steps of end-to-end training.
    windows_per_step : int
        Windows in the global batch of a step.
    learning_rate : float
        Of the convolutions, falling linearly to 0.
    scalar_lr_factor : float
        Factor on it for gates, mass scales and biases.
    measure_every : int
        Steps between two measurements of the gap ratio.
    """

    budget_texts: int = 6
    local: LocalConfig | None = None
    local_texts: int = 12
    objective: Objective | None = Distill(backprop_tokens=1024)
    steps: int = 50
    windows_per_step: int = 1
    learning_rate: float = 1e-3
    scalar_lr_factor: float = 10.0
    measure_every: int = 25

    def __post_init__(self) -> None:
        for name, least in {"budget_texts": 0, "local_texts": 1, "steps": 0, "windows_per_step": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.measure_every < 1:
            raise ValueError(f"measure_every must be at least 1, got {self.measure_every}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.objective is not None and self.steps == 0:
            raise ValueError("steps must be at least 1 with an objective; for none pass objective=None")
        if self.local is not None and self.local_texts <= self.local.num_checked:
            raise ValueError(
                f"local_texts must be more than the {self.local.num_checked} that the error is measured on, got "
                f"{self.local_texts}"
            )

    @property
    def objective_name(self) -> str | None:
        """Name of the end-to-end objective."""
        return type(self.objective).__name__ if self.objective else None

    @property
    def windows_needed(self) -> int:
        """Training windows that no stage has to read twice."""
        end_to_end = self.steps * self.windows_per_step if self.objective else 0
        return max(self.budget_texts, self.local_texts if self.local else 0, end_to_end, 1)


def default_recipe(num_slots: int, block_size: int) -> tuple[LoCoCoConfig, Recipe]:
    """Ours: budgets per head, then distillation of low-rank heads whose gates start a little open."""
    recipe = Recipe(objective=Distill(backprop_tokens=max(1024, 2 * block_size)))
    return LoCoCoConfig(num_slots, block_size=block_size, head_rank=16, gate_init=0.05), recipe


def paper_recipe(num_slots: int, block_size: int) -> tuple[LoCoCoConfig, Recipe]:
    """The paper's: the authors' heads from N(0, 1) weights with softmax, 200 steps of 524,288 tokens, lr 5e-2."""
    recipe = Recipe(
        budget_texts=0,
        objective=NextToken(backprop_tokens=4 * block_size),
        steps=200,
        windows_per_step=128,
        learning_rate=5e-2,
        scalar_lr_factor=1.0,
    )
    return LoCoCoConfig.reference(num_slots, block_size=block_size), recipe


def adjusted(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """A recipe with what the command line says otherwise; options that are None leave it as it is."""
    names = ("steps", "windows_per_step", "learning_rate", "budget_texts", "local_texts", "measure_every")
    changes: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.local_steps is not None:
        local = recipe.local or LocalConfig()
        changes["local"] = dataclasses.replace(local, steps=options.local_steps) if options.local_steps else None
    objective = {"distill": Distill(), "next-token": NextToken(), "none": None}.get(
        options.objective, recipe.objective
    )
    if objective is not None:
        default = recipe.objective.backprop_tokens if recipe.objective else None
        tokens = default if options.backprop_tokens is None else options.backprop_tokens or None
        objective = dataclasses.replace(objective, backprop_tokens=tokens)
    return dataclasses.replace(recipe, objective=objective, **changes)


RECIPES = {"default": default_recipe, "paper": paper_recipe}
