"""Training of a whole extended model: adapters, embeddings, norms and heads."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from lococo.extension.folder import ADAPTER_FOLDER, HEADS_FOLDER, save_parts
from lococo.extension.sharding import check_sharding, gathered, keep_precision
from lococo.heads import load_heads
from lococo.state import is_ours
from lococo.training.objectives import NextToken, NextTokenLoss
from lococo.training.window_trainer import EMBEDDING_NOISE, WindowTrainer

TWICE = (
    "layers of a full cache are computed twice already; with a compressed one they would read twice into the cache, "
    "set depth to save memory"
)


class ExtensionTrainer(WindowTrainer):
    """A ``WindowTrainer`` of everything in a model that requires gradients; heads have a learning rate of their own.

    Checkpoints hold adapters and heads, and the Trainer's own state.

    Parameters
    ----------
    model : peft.PeftModel
        Patched, or not: a model with its full cache is trained on windows as a whole.
    args : transformers.TrainingArguments
        DDP, DeepSpeed ZeRO-2, and FSDP2 (``lococo.extension.sharding.sharded_arguments``).
    objective : NextToken
        Gives the chunks of a patched model.
    heads_learning_rate : float
        Of heads' convolutions.
    scalar_lr_factor, **kwargs
        As of ``WindowTrainer``.

    Raises
    ------
    ValueError
        For arguments under which the model cannot be trained.
    """

    not_supported = {
        "gradient_checkpointing": TWICE,
        "activation_checkpointing": TWICE,
        **EMBEDDING_NOISE,
        "push_to_hub": "upload the folder that the run writes",
    }
    all_finite = "all parameters are finite: the numbers of the model overflow"

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objective: NextToken,
        heads_learning_rate: float,
        scalar_lr_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.heads_learning_rate = heads_learning_rate
        keep_precision(args)
        super().__init__(NextTokenLoss(model, objective), args, scalar_lr_factor, **kwargs)
        check_sharding(self)

    def learning_rate_of(self, name: str, parameter: nn.Parameter) -> float:
        """Of a parameter of a head, or of the model."""
        if not is_ours(name):
            return self.args.learning_rate
        return self.heads_learning_rate * (1.0 if parameter.dim() > 1 else self.scalar_lr_factor)

    def place_of(self, name: str) -> tuple[str, str]:
        """The parameter by its name in the model."""
        return "", name.removeprefix("model.")

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        """Autocast as of ``Trainer``; for a sharded model, too, whose weights are in two dtypes."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*args, **kwargs)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write adapters and heads into folders of another, by default of ``args.output_dir``."""
        with gathered(self.trained_model):
            if self.args.should_save:
                save_parts(self.trained_model, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_parts(self.trained_model, Path(resume_from_checkpoint))


@torch.no_grad()
def load_parts(model: Any, folder: Path) -> None:
    """Copy what ``save_parts`` has written into a model that has the same adapters and heads."""
    from peft import get_peft_model_state_dict, load_peft_weights

    saved = load_peft_weights(str(folder / ADAPTER_FOLDER), device="cpu")
    with gathered(model, write_back=True):
        for name, values in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            values.copy_(saved[name])
        if (folder / HEADS_FOLDER).is_dir():
            load_heads(model, folder / HEADS_FOLDER)
