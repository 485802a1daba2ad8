"""``python -m experiments.benchmarks extend``: a step of an extension."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from experiments.benchmarks.counters import SavedBytes, freed_blocks_returned, saved_bytes
from experiments.benchmarks.roofline import Least, Sizes, train_memory, train_work
from experiments.benchmarks.runner import Cell, Topic
from experiments.benchmarks.train import Train
from lococo.bench.meter import Meter
from lococo.bench.speed import random_ids
from lococo.extension.adapters import adapted, adapter_config, checkpoint_layers, restored, unfreeze
from lococo.methods import Run
from lococo.state import is_patched
from lococo.training.objectives import Caches, NextToken, NextTokenLoss


class Extend(Train):
    """One step of AdamW on a window of ``length`` tokens: adapters, embeddings, norms and heads learn.

    Back-propagation through a compressed cache ends after ``depth`` compressions. The full cache's goes through the
    whole window, its layers computed again in the backward. Steps have size zero.

    Parameters
    ----------
    depth : int
        Compressions between two cuts of back-propagation.
    """

    name = "extend"
    held = ("cache_bytes", "saved_bytes")
    columns = ("saved_bytes",)

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.depth = depth

    def groups(self, runs: Sequence[Run], lengths: Sequence[int], batches: Sequence[int]) -> list[list[Cell]]:
        """Every method at every length; all learn to predict the next token."""
        return Topic.groups(self, runs, lengths, batches)

    def settings(self) -> dict[str, int]:
        """The depth."""
        return {"depth": self.depth}

    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """As in ``Train``, without what adapters take; of the full cache, which keeps little, the logits alone."""
        config, tokens = cell.run.config, cell.length - 1
        work = train_work(sizes, config, tokens, cell.batch).over(cell.batch * tokens)
        if config is None:
            logits = cell.batch * tokens * (sizes.element_size + 4) * sizes.vocab_size
            return Least(1, work, sizes.model_bytes + logits)
        backprop_tokens = self._objective(cell).backprop_tokens
        return Least(1, work, train_memory(sizes, config, tokens, cell.batch, backprop_tokens))

    # Every cell is one of this package.
    def take(  # type: ignore[override]
        self, model: PreTrainedModel, cell: Cell, meter: Meter
    ) -> dict[str, float | None]:
        """Take one step; ``saved_bytes`` is the most that autograd keeps at once, counted where memory is watched.

        While it is watched, freed memory of a CPU goes back at once: only what is in use counts, as on a GPU.
        """
        ids, objective = random_ids(model, cell.batch, cell.length), self._objective(cell)
        dtype = model.dtype  # what learns is wider
        with contextlib.ExitStack() as stack:
            saved = SavedBytes(most=None)
            if meter.watches_memory:
                stack.enter_context(freed_blocks_returned())
                saved = stack.enter_context(saved_bytes())
            stack.enter_context(restored(model))
            learner = unfreeze(adapted(model, adapter_config(model)))
            if cell.run.config is None:
                checkpoint_layers(model)
            caches = Caches(learner) if is_patched(learner) else None
            loss, predicted = NextTokenLoss(learner.train(), objective), cell.length - 1
            parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=0.0)
            with meter.lap():
                for start, stop in objective.spans(predicted):
                    with torch.autocast(ids.device.type, dtype, enabled=dtype.itemsize == 2):
                        losses = loss(ids, caches, start, stop)
                    (losses.sum() / (cell.batch * predicted)).backward()
                    if caches is not None:
                        caches.detach()
                optimizer.step()
            seconds = meter.seconds()[0] / (cell.batch * predicted)
            cache_bytes = None if caches is None else caches.compressed.nbytes
        return {"seconds": seconds, "cache_bytes": cache_bytes, "saved_bytes": saved.most}

    def _objective(self, cell: Cell) -> NextToken:
        config = cell.run.config
        return NextToken(backprop_tokens=None if config is None else self.depth * config.block_size)
