"""What an ablation does, from what is asked for; refused before a model is there where it cannot be done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.ablation.grid import grid_cells
from experiments.ablation.run import Plan
from lococo.data.documents import local_files
from lococo.data.windows import DEFAULT_DATASET, DataConfig
from lococo.methods import plan_runs
from lococo.training.recipes import Recipe, adjusted, blend_recipe

NEEDED = ("full", "h2o")
OBJECTIVES = ("distill", "next-token", "local")


def plan_ablation(
    *,
    centre: tuple[int, int, str],
    num_slots: Sequence[int] = (),
    kernel_size: Sequence[int] = (),
    combine: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    product: bool = False,
    dataset: Sequence[str] | None = None,
    data: Sequence[str] | None = None,
    windows: int | None = None,
    objective: str = "distill",
    steps: int = 50,
    windows_per_step: int = 1,
    learning_rate: float | None = None,
    budget_texts: int = 0,
    methods: Sequence[str] = ("full", "streaming", "h2o", "h2o-slot"),
    block_size: int = 128,
    length: int = 2048,
    first: int = 512,
) -> Plan:
    """The cells of an ablation, how each is calibrated, and what they are compared with.

    Parameters
    ----------
    centre : tuple
        Slots, kernel size and kinds of slots that are not varied.
    num_slots, kernel_size, combine, seeds
        What is varied, one thing at a time, as in ``grid_cells``; with ``product`` every value with every other.
    dataset, data : sequence of str, optional
        Sources of texts to calibrate on, and to measure on: no file may be in both.
    windows : int, optional
        Training windows. None: as many as are read.
    objective : {"distill", "next-token", "local"}
        "local" trains layer by layer, ``steps`` steps each.
    learning_rate : float, optional
        Of training from end to end. None: that of the recipe "blend".
    budget_texts : int
        Texts for the slots of each KV head. 0: the same slots for all.
    length, first : int
        Tokens of a window, in training too, and the first token that counts.

    Raises
    ------
    ValueError, OSError
        If nothing is varied, a value is out of range, or texts to measure on are calibrated on.
    """
    _check_apart(data or (), dataset or ())
    base, recipe = blend_recipe(1, block_size)
    cells = grid_cells(
        dataclasses.replace(base, score="distant"),  # the blends alone are compared
        centre,
        slots=num_slots,
        kernels=kernel_size,
        combinations=combine,
        seeds=list(dict.fromkeys(seeds)),
        product=product,
    )
    if len(cells) < 2:
        raise ValueError("nothing is varied: give values for --num-slots, --kernel-size, --combine or --seeds")
    if missing := [name for name in NEEDED if name not in methods]:
        raise ValueError(f"--methods needs {' and '.join(NEEDED)} for the gap ratio, {', '.join(missing)} is missing")
    recipe = _recipe(recipe, objective, steps, windows, windows_per_step, learning_rate, budget_texts)
    texts = DataConfig(
        sources=tuple(dataset or [DEFAULT_DATASET]),
        length=length,
        num_windows=recipe.windows_needed if windows is None else windows,
        num_heldout=1,  # calibration looks at it on its way; cells are measured on other texts
    )
    runs = plan_runs(methods, sorted({cell.config.num_slots for cell in cells}), block_size)
    return Plan(cells, runs, texts, recipe, first)


def describe(plan: Plan) -> str:
    """How the figures of an ablation came about, in sentences for its files."""
    centre, recipe = plan.cells[0], plan.recipe
    objective = {"Distill": "distill", "NextToken": "next-token", None: "local"}[recipe.objective_name]
    steps = recipe.local.steps if recipe.local else recipe.steps
    budget = (
        f"slots per KV head found on {recipe.budget_texts} texts, on average as many as said"
        if recipe.budget_texts
        else "the same slots for every KV head"
    )
    return (
        f"The centre is M={centre.config.num_slots}, kernel {centre.config.kernel_size}, {centre.combination}; "
        "`varied` says what differs from it. Every cell's heads have been calibrated alike "
        f"({objective}, {steps} steps on at most {plan.data.num_windows} windows of {plan.data.length} tokens, "
        f"{budget}), then measured on other texts. `change` is the gap ratio less the centre's, low and high bound "
        "95 % of its bootstrap over documents, drawn for both alike. Where `varied` is seed the centre was calibrated "
        "once more: what chance adds to that."
    )


def _check_apart(data: Sequence[str], dataset: Sequence[str]) -> None:
    """Refuse to measure heads on what they learn from."""
    learned = {path.resolve() for source in dataset for path in local_files(source) or []}
    for path in (path for source in data for path in local_files(source) or []):
        if path.resolve() in learned:
            raise ValueError(f"{path} is in --data and in --dataset: heads are not measured on what they learn from")


def _recipe(
    recipe: Recipe,
    objective: str,
    steps: int,
    windows: int | None,
    windows_per_step: int,
    learning_rate: float | None,
    budget_texts: int,
) -> Recipe:
    """How every cell is calibrated."""
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    if objective == "local" and learning_rate is not None:
        raise ValueError("--learning-rate is that of training from end to end, not of --objective local")
    is_local = objective == "local"
    return adjusted(
        recipe,
        objective="none" if is_local else objective,
        steps=None if is_local else steps,
        local_steps=steps if is_local else None,
        local_texts=windows if is_local else None,
        windows_per_step=windows_per_step,
        learning_rate=learning_rate,
        budget_texts=budget_texts,
        score_texts=0,
        measure_every=max(1, steps // 4),  # and as often the state is saved
    )
