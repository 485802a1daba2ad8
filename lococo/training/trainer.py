"""End-to-end training of the heads of a patched model, and of nothing else, on ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from lococo.heads import load_heads, save_heads
from lococo.training.frozen import base_unchanged, only_heads_learn
from lococo.training.objectives import Objective, WindowLoss
from lococo.training.window_trainer import EMBEDDING_NOISE, WindowTrainer

HEADS_FOLDER = "heads"
TWICE = "layers run twice would read twice into the cache; set backprop_tokens to save memory"


class HeadTrainer(WindowTrainer):
    """A ``WindowTrainer`` whose model is the heads of a patched model.

    During ``train`` and ``evaluate`` the base model is frozen and without dropout; afterwards it is as it was, bit
    for bit. Heads in half precision learn in float32 and are rounded at the end. Checkpoints hold the heads, in a
    folder for ``load_heads``, and the Trainer's own state. Gates are kept within [0, 1].

    Parameters
    ----------
    model : torch.nn.Module
        A patched causal language model; moved to ``args.device`` unless it has a device map.
    objective : Objective
        ``NextToken`` or ``Distill``.
    args, scalar_lr_factor, **kwargs
        As of ``WindowTrainer``.

    Raises
    ------
    ValueError
        If the model is not patched or has no heads to train, or for arguments under which heads cannot be trained.
    """

    not_supported = {
        "gradient_checkpointing": TWICE,
        "activation_checkpointing": TWICE,
        "fsdp": "use a copy of the model per process, a device map, or lococo.training.window_trainer.DEEPSPEED_ZERO2",
        **EMBEDDING_NOISE,
        "push_to_hub": "use lococo.push_heads after training",
    }
    all_finite = "all heads are finite: the numbers of the base model overflow"

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objective: Objective,
        scalar_lr_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(WindowLoss(model, objective), args, scalar_lr_factor, **kwargs)
        if self.is_fsdp_enabled:  # accelerate launch may say so
            raise ValueError(f"FSDP is not supported by HeadTrainer: {self.not_supported['fsdp']}")

    def learning_rate_of(self, name: str, parameter: nn.Parameter) -> float:
        """Of a parameter of a head."""
        return self.args.learning_rate * (1.0 if parameter.dim() > 1 else self.scalar_lr_factor)

    def place_of(self, name: str) -> tuple[str, str]:
        """The layer, and the parameter of its head."""
        _, index, parameter = name.split(".", 2)
        return f"in layer {index} ", f"the head's {parameter}"

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the heads. Arguments and errors as of ``WindowTrainer.train``.

        Raises
        ------
        RuntimeError
            If the base model's weights have changed.
        """
        with base_unchanged(self.trained_model), only_heads_learn(self.trained_model, self.loss.patch):
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the base model frozen. Arguments as of ``Trainer.evaluation_loop``."""
        with only_heads_learn(self.trained_model, self.loss.patch):
            return super().evaluation_loop(*args, **kwargs)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the heads into the folder ``heads`` of another, by default of ``args.output_dir``."""
        if self.args.should_save:
            save_heads(self.trained_model, Path(output_dir or str(self.args.output_dir), HEADS_FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_heads(self.trained_model, Path(resume_from_checkpoint, HEADS_FOLDER))
