"""``python -m experiments.benchmarks train``: a training step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.benchmarks.roofline import Least, Sizes, train_memory, train_work
from experiments.benchmarks.runner import Cell, Topic
from lococo.bench import speed
from lococo.bench.meter import Meter
from lococo.bench.speed import random_ids
from lococo.config import LoCoCoConfig
from lococo.methods import Run
from lococo.state import is_patched, patch_of
from lococo.training.frozen import only_heads_learn
from lococo.training.objectives import Caches, NextToken, Objective, WindowLoss
from lococo.training.recipes import blend_recipe

OBJECTIVES = ("distill", "next-token")
Loss = Callable[[torch.Tensor, Caches, int, int], torch.Tensor]


class Train(Topic):
    """One step of AdamW on a window of ``length`` tokens.

    Heads learn as in calibration, the model around them frozen, back-propagation ending at every chunk of the default
    recipe. The full cache and methods without heads have none to train: there the next token is learned by the norms'
    weights (and biases) alone, so that what is measured is the cheapest training of a model through that cache. The
    full cache's back-propagation goes through the whole window at once, as without LoCoCo. Steps have size zero: the
    model stays as it is.

    Parameters
    ----------
    objectives : sequence of str
        What heads are trained for, of ``distill`` and ``next-token``: each has cells of its own.
    """

    name = "train"
    unit = "token"
    columns = ("objective",)

    def __init__(self, objectives: Sequence[str] = ("distill",)) -> None:
        for objective in objectives:
            if objective not in OBJECTIVES:
                raise ValueError(f"objectives must be of {', '.join(OBJECTIVES)}, got {objective!r}")
        self.objectives = objectives

    def groups(self, runs: Sequence[Run], lengths: Sequence[int], batches: Sequence[int]) -> list[list[Cell]]:
        """Cells of methods with heads once for each objective."""
        return [with_objectives(group, self.objectives) for group in super().groups(runs, lengths, batches)]

    def check(self, cell: speed.Cell) -> None:
        """Refuse a window without a token to predict."""
        super().check(cell)
        if cell.length < 2:
            raise ValueError(f"lengths must be at least 2, one token to read and one to predict, got {cell.length}")

    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """A token's share of a step, and the memory of all of it: weights, and what a chunk keeps for the backward."""
        config, tokens = cell.run.config, cell.length - 1
        chunk = None if config is None else objective_of(cell).backprop_tokens
        step = train_work(sizes, config, tokens, cell.batch, distills=cell.objective == "distill")
        return Least(1, step.over(cell.batch * tokens), train_memory(sizes, config, tokens, cell.batch, chunk))

    # Every cell is one of this package.
    def take(  # type: ignore[override]
        self, model: PreTrainedModel, cell: Cell, meter: Meter
    ) -> dict[str, float | None]:
        """Take one step of size zero."""
        ids = random_ids(model, cell.batch, cell.length)
        caches = Caches(model) if is_patched(model) else None
        with learning(model) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=0.0)
            with meter.lap():
                if caches is None:
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                else:
                    _backward_in_chunks(_loss(model, objective_of(cell)), objective_of(cell), ids, caches)
                optimizer.step()
            seconds = meter.seconds()[0] / (cell.batch * (cell.length - 1))
        return {"seconds": seconds, "cache_bytes": None if caches is None else caches.compressed.nbytes}


def with_objectives(cells: Sequence[Cell], objectives: Sequence[str]) -> list[Cell]:
    """Cells of methods with heads once for each objective, the others for the next token."""
    expanded = []
    for cell in cells:
        config = cell.run.config
        wanted = objectives if config is not None and config.num_fused else ["next-token"]
        expanded += [dataclasses.replace(cell, objective=objective) for objective in wanted]
    return expanded


def objective_of(cell: Cell) -> Objective:
    """The objective of a cell with a compressed cache, its chunks those of the default calibration."""
    config: LoCoCoConfig = cell.run.config  # type: ignore[assignment]
    objective: Objective = blend_recipe(config.num_slots, config.block_size)[1].objective  # type: ignore[assignment]
    return objective if cell.objective == "distill" else NextToken(backprop_tokens=objective.backprop_tokens)


@contextlib.contextmanager
def learning(model: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """A model in which only heads learn, or only vectors (norms, biases) if it has none; gives what learns."""
    heads = patch_of(model).heads.values() if is_patched(model) else []
    with only_heads_learn(model) if heads else _only_vectors_learn(model):
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            yield learned
        finally:
            for parameter in learned:
                parameter.grad = None


@contextlib.contextmanager
def _only_vectors_learn(model: PreTrainedModel) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.dim() == 1)
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def _loss(model: PreTrainedModel, objective: Objective) -> Loss:
    if patch_of(model).heads:
        return WindowLoss(model, objective)

    def losses(ids: torch.Tensor, caches: Caches, start: int, stop: int) -> torch.Tensor:
        return objective.losses(caches.logits(ids[:, start:stop]), ids[:, start + 1 : stop + 1], None)

    return losses


def _backward_in_chunks(loss: Loss, objective: Objective, ids: torch.Tensor, caches: Caches) -> None:
    predicted = ids.shape[1] - 1
    for start, stop in objective.spans(predicted):
        (loss(ids, caches, start, stop).sum() / (len(ids) * predicted)).backward()
        caches.detach()
