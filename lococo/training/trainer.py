"""End-to-end training of the heads of a patched model, and of nothing else, on ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from lococo.heads import load_heads, save_heads
from lococo.training.frozen import base_unchanged, first_unhealthy_head, only_heads_learn
from lococo.training.objectives import Caches, Objective, WindowLoss
from lococo.training.window_trainer import WindowTrainer

HEADS_FOLDER = "heads"

NOT_SUPPORTED = {
    "gradient_checkpointing": "layers run twice would read twice into the cache; set backprop_tokens to save memory",
    "activation_checkpointing": "layers run twice would read twice into the cache; set backprop_tokens to save memory",
    "fsdp": "use a copy of the model per process, a device map, or lococo.training.window_trainer.DEEPSPEED_ZERO2",
    "push_to_hub": "use lococo.push_heads after training",
}


class HeadTrainer(WindowTrainer):
    """A ``WindowTrainer`` whose model is the heads of a patched model.

    During ``train`` and ``evaluate`` the base model is frozen and without dropout; afterwards it is as it was, bit
    for bit. Heads in half precision learn in float32 and are rounded at the end. Checkpoints hold the heads, in a
    folder for ``load_heads``, and the Trainer's own state. Gates are kept within [0, 1].

    Parameters
    ----------
    model : torch.nn.Module
        A patched causal language model; moved to ``args.device`` unless it has a device map.
    args : transformers.TrainingArguments
    objective : Objective
        ``NextToken`` or ``Distill``.
    scalar_lr_factor : float
        Factor on the learning rate of gates, mass scales and biases: few numbers that have far to go. They have no
        weight decay.
    **kwargs
        For ``Trainer``. Datasets give ``input_ids`` of one length, without padding (``lococo.data.windows.Windows``).

    Raises
    ------
    ValueError
        If the model is not patched or has no heads to train, or for arguments under which heads cannot be trained.
    """

    scalar_lr_factor: float

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objective: Objective,
        scalar_lr_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = WindowLoss(model, objective)
        _check_arguments(args, scalar_lr_factor)
        self.scalar_lr_factor = scalar_lr_factor
        super().__init__(loss, model, args, objective, **kwargs)
        if self.is_fsdp_enabled:  # accelerate launch may say so
            raise ValueError(f"FSDP is not supported by HeadTrainer: {NOT_SUPPORTED['fsdp']}")

    def new_caches(self) -> Caches:
        """See ``WindowTrainer``."""
        return Caches(self.trained_model)

    def what_is_unhealthy(self) -> str:
        """See ``WindowTrainer``."""
        return first_unhealthy_head(self.trained_model)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the heads. Arguments as of ``WindowTrainer.train``.

        Raises
        ------
        ValueError, FloatingPointError
            See ``WindowTrainer.train``.
        RuntimeError
            If the base model's weights have changed.
        """
        with base_unchanged(self.trained_model), only_heads_learn(self.trained_model):
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer.evaluation_loop``."""
        with only_heads_learn(self.trained_model):
            return super().evaluation_loop(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """See ``Trainer.create_optimizer``."""
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in [] if is_given else optimizer.param_groups:
            if all(parameter.dim() <= 1 for parameter in group["params"]):
                group["lr"] *= self.scalar_lr_factor
        return optimizer

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the heads into the folder ``heads`` of another, by default of ``args.output_dir``."""
        if self.args.should_save:
            save_heads(self.trained_model, Path(output_dir or str(self.args.output_dir), HEADS_FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_heads(self.trained_model, Path(resume_from_checkpoint, HEADS_FOLDER))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _check_arguments(args: TrainingArguments, scalar_lr_factor: float) -> None:
    for name, instead in NOT_SUPPORTED.items():
        if getattr(args, name, None):
            raise ValueError(f"{name}={getattr(args, name)!r} is not supported by HeadTrainer: {instead}")
    if not scalar_lr_factor > 0:
        raise ValueError(f"scalar_lr_factor must be positive, got {scalar_lr_factor!r}")
