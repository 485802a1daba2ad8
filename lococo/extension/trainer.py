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
from lococo.state import HEAD, is_patched
from lococo.training.objectives import Caches, NextToken, NextTokenLoss
from lococo.training.window_trainer import WindowTrainer

NOT_SUPPORTED = {"push_to_hub": "upload the folder that the run writes"}


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
    scalar_lr_factor : float
        Factor on it for their gates, mass scales and biases.
    **kwargs
        For ``Trainer``.

    Raises
    ------
    ValueError
        For arguments under which the model cannot be trained.
    """

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
        for name, instead in NOT_SUPPORTED.items():
            if getattr(args, name, None):
                raise ValueError(f"{name}={getattr(args, name)!r} is not supported by ExtensionTrainer: {instead}")
        if objective.backprop_tokens is not None and not is_patched(model):
            raise ValueError("backprop_tokens is for compressed caches: a full cache is trained on whole windows")
        self.heads_learning_rate = heads_learning_rate
        self.scalar_lr_factor = scalar_lr_factor
        keep_precision(args)
        super().__init__(NextTokenLoss(model, objective), model, args, objective, **kwargs)
        check_sharding(self)

    def new_caches(self) -> Caches | None:
        """See ``WindowTrainer``."""
        return Caches(self.trained_model) if is_patched(self.trained_model) else None

    def what_is_unhealthy(self) -> str:
        """See ``WindowTrainer``."""
        for name, parameter in self.trained_model.named_parameters():
            if not parameter.isfinite().all():
                return f"{name} is not finite"
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name} is not finite"
        return "all parameters are finite: the numbers of the model overflow"

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
        """See ``Trainer``; for a sharded model, too, whose weights are in two dtypes."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with weight decay on matrices, and the heads' learning rates."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(self._parameter_groups(), **options)
        return self.optimizer

    def _parameter_groups(self) -> list[dict[str, Any]]:
        rate = self.args.learning_rate
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.trained_model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.dim() > 1
            heads_rate = self.heads_learning_rate * (1.0 if is_matrix else self.scalar_lr_factor)
            key = (heads_rate if f".{HEAD}." in name else rate, self.args.weight_decay if is_matrix else 0.0)
            groups.setdefault(key, []).append(parameter)
        return [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]

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
