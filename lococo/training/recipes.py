"""What a training does and for how long: calibrations, and what extensions share with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lococo.config import LoCoCoConfig, check_count
from lococo.training.objectives import Distill, NextToken, Objective

OBJECTIVES: dict[str, Objective | None] = {"distill": Distill(), "next-token": NextToken(), "none": None}


def check_ranges(values: Any, least: Mapping[str, int], positive: Sequence[str], kind: str = "") -> None:
    """Refuse attributes that are out of range.

    Parameters
    ----------
    least : mapping of str to int
        The smallest whole number that each attribute may be, if it is not None.
    positive : sequence of str
        Attributes that must be numbers above zero.
    kind : str
        Put before names.

    Raises
    ------
    ValueError
        Names the attribute, its value and what is allowed.
    """
    for name, smallest in least.items():
        value = getattr(values, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{kind}{name} must be a whole number, got {value!r}")
        if value is not None and value < smallest:
            raise ValueError(f"{kind}{name} must be at least {smallest}, got {value}")
    for name in positive:
        value = getattr(values, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:  # NaN is not, either
            raise ValueError(f"{kind}{name} must be positive, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What every training on windows has.

    Parameters
    ----------
    steps : int
        Steps of the optimizer.
    windows_per_step : int
        Windows in the global batch of a step.
    learning_rate : float
        Falling linearly to 0.
    scalar_lr_factor : float
        Factor on the heads' learning rate for gates, mass scales and biases: few numbers that have far to go.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    steps: int
    windows_per_step: int
    learning_rate: float
    scalar_lr_factor: float = 10.0

    def __post_init__(self) -> None:
        check_ranges(self, {"windows_per_step": 1}, ("learning_rate", "scalar_lr_factor"))

    @property
    def windows_needed(self) -> int:
        """Windows for every step to read new ones."""
        return self.steps * self.windows_per_step


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """How long and how fast the head of a layer learns.

    Parameters
    ----------
    steps : int
        Texts read per layer, one after another and again from the first.
    learning_rate : float
        Of AdamW, falling linearly to 0.
    scalar_learning_rate : float
        Of gates, mass scale and biases: few numbers, that have far to go.
    num_checked : int
        Texts at the end of the recordings that are not learned from: the error is measured on them.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    steps: int = 40
    learning_rate: float = 2e-3
    scalar_learning_rate: float = 2e-2
    num_checked: int = 2

    def __post_init__(self) -> None:
        check_ranges(self, {"steps": 1, "num_checked": 1}, ("learning_rate", "scalar_learning_rate"), "local ")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How the networks of a learned score learn.

    Parameters
    ----------
    texts : int
        Texts read, each once.
    length : int
        Tokens read of a text, at most, or twice the slots if that is more: scores of shorter texts serve longer ones.
    texts_at_once : int
        Texts that are held, and learned from in turn.
    texts_per_step : int
        Those that a step of the optimizer learns from.
    repeats : int
        Steps on each text.
    learning_rate : float
        Of AdamW, falling linearly to 0.
    weight_decay : float
        Of matrices.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    texts: int = 48
    length: int = 2048
    texts_at_once: int = 8
    texts_per_step: int = 2
    repeats: int = 20
    learning_rate: float = 2e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        check_ranges(self, {"texts": 1, "length": 2, "texts_per_step": 1, "repeats": 1}, ("learning_rate",), "score ")
        check_ranges(self, {"texts_at_once": self.texts_per_step}, (), "score ")
        if not isinstance(self.weight_decay, int | float) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"score weight_decay must be at least 0, got {self.weight_decay!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """Stages of a calibration, each left out where its number is 0 or None.

    Parameters
    ----------
    scores : ScoreConfig, optional
        Training of a learned score, with which the slots of each KV head are found.
    budget_texts : int
        Texts on which the errors are measured that decide how many slots each KV head gets.
    local : LocalConfig, optional
        Layer-local training, a start for what follows.
    local_texts : int
        Texts recorded for it.
    objective : Objective, optional
        End-to-end training; ``steps`` and the fields after it, of ``TrainingRecipe``, are its own.
    measure_every : int
        Steps between two measurements of the gap ratio.
    """

    scores: ScoreConfig | None = None
    budget_texts: int = 7
    local: LocalConfig | None = None
    local_texts: int = 12
    objective: Objective | None = Distill(backprop_tokens=1024)
    steps: int = 50
    windows_per_step: int = 1
    learning_rate: float = 1e-3
    measure_every: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, Objective | None):
            raise TypeError(f"objective must be Distill(...), NextToken(...) or None, got {self.objective!r}")
        for name, kind in {"local": LocalConfig, "scores": ScoreConfig}.items():
            value = getattr(self, name)
            if not isinstance(value, kind | None):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {value!r}")
        check_ranges(self, {"budget_texts": 0, "local_texts": 1, "steps": 0, "measure_every": 1}, ())
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
        end_to_end = super().windows_needed if self.objective else 0
        scores, local = self.scores.texts if self.scores else 0, self.local_texts if self.local else 0
        return max(self.budget_texts, scores, local, end_to_end, 1)


def default_recipe(num_slots: int, block_size: int) -> tuple[LoCoCoConfig, Recipe]:
    """Ours: learned scores and, with them, slots per head and the weight of centroids. Nothing goes backward."""
    recent = min(6, num_slots // 4)
    fused = min(max(num_slots // 16, 1), num_slots - 1 - recent)
    config = LoCoCoConfig(
        num_slots,
        block_size=block_size,
        num_sinks=1,
        num_recent=recent,
        num_heavy=num_slots - 1 - recent - fused,
        score="learned",
        compressor="centroids",
        scaling="count",
    )
    return config, Recipe(scores=ScoreConfig(), objective=None, steps=0)


def blend_recipe(num_slots: int, block_size: int) -> tuple[LoCoCoConfig, Recipe]:
    """The default's, then distillation of low-rank heads that blend, whose gates start a little open."""
    config = LoCoCoConfig(num_slots, block_size=block_size, score="learned", head_rank=16, gate_init=0.05)
    return config, Recipe(scores=ScoreConfig(), objective=Distill(backprop_tokens=max(1024, 2 * block_size)))


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


RECIPES = {"default": default_recipe, "blend": blend_recipe, "paper": paper_recipe}


def adjusted(
    recipe: Recipe,
    *,
    objective: str | None = None,
    backprop_tokens: int | None = None,
    local_steps: int | None = None,
    score_texts: int | None = None,
    **changes: Any,
) -> Recipe:
    """A recipe with some things said otherwise; what is None stays as it is.

    Parameters
    ----------
    objective : {"distill", "next-token", "none"}, optional
        End-to-end training.
    backprop_tokens : int, optional
        Of the objective; 0: through the whole window.
    local_steps : int, optional
        Of layer-local training; 0: none.
    score_texts : int, optional
        Texts that a learned score learns from; 0: none.
    **changes
        Other fields of ``Recipe``.

    Raises
    ------
    ValueError
        If a value is out of range.
    TypeError
        If there is no such field.
    """
    if objective is not None and (not isinstance(objective, str) or objective not in OBJECTIVES):
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if local_steps is not None:
        check_count("local_steps", local_steps, least=0)
    if backprop_tokens is not None:
        check_count("backprop_tokens", backprop_tokens, least=0)
    chosen = recipe.objective if objective is None else OBJECTIVES[objective]
    if chosen is not None:
        default = recipe.objective.backprop_tokens if recipe.objective else None
        tokens = default if backprop_tokens is None else backprop_tokens or None
        chosen = dataclasses.replace(chosen, backprop_tokens=tokens)
    changes = {name: value for name, value in changes.items() if value is not None}
    if local_steps is not None:
        local = recipe.local or LocalConfig()
        changes["local"] = dataclasses.replace(local, steps=local_steps) if local_steps else None
    if score_texts is not None:
        check_count("score_texts", score_texts, least=0)
        scores = recipe.scores or ScoreConfig()
        changes["scores"] = dataclasses.replace(scores, texts=score_texts) if score_texts else None
    return dataclasses.replace(recipe, objective=chosen, **changes)
