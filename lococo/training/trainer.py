"""End-to-end training of the heads of a patched model, and of nothing else, on ``transformers.Trainer``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from lococo.evaluation.deadline import Deadline
from lococo.heads import load_heads, save_heads
from lococo.state import head_modules, lococo_config
from lococo.training.frozen import base_unchanged, first_unhealthy_head, only_heads_learn
from lococo.training.objectives import Caches, Objective, WindowLoss

HEADS_FOLDER = "heads"
DEEPSPEED_ZERO2 = Path(__file__).with_name("deepspeed_zero2.json")  # for TrainingArguments(deepspeed=...)

NOT_SUPPORTED = {
    "gradient_checkpointing": "layers run twice would read twice into the cache; set backprop_tokens to save memory",
    "activation_checkpointing": "layers run twice would read twice into the cache; set backprop_tokens to save memory",
    "fsdp": "use a copy of the model per process, a device map, or lococo.training.trainer.DEEPSPEED_ZERO2",
    "push_to_hub": "use lococo.push_heads after training",
}


class HeadTrainer(Trainer):
    """A ``Trainer`` whose model is the heads of a patched model.

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
        For ``Trainer``. Datasets give ``input_ids`` of one length, without padding (``lococo.training.data.Windows``).

    Raises
    ------
    ValueError
        If the model is not patched or has no heads to train, or for arguments under which heads cannot be trained.
    """

    patched_model: nn.Module
    objective: Objective
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
        window_loss = WindowLoss(model, objective)
        _check_arguments(args, objective, lococo_config(model).block_size, scalar_lr_factor)
        if getattr(model, "hf_device_map", None) is None:
            model.to(args.device)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every head has a gradient, whatever the text
        self.patched_model = model
        self.objective = objective
        self.scalar_lr_factor = scalar_lr_factor
        super().__init__(window_loss, args, **kwargs)
        self.add_callback(GatesWithinReach(model))
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: start one process per GPU (torchrun, accelerate launch), or "
                "choose one with CUDA_VISIBLE_DEVICES"
            )

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the heads.

        Parameters
        ----------
        resume_from_checkpoint : str or bool, optional
            A checkpoint's folder; True: the last whole one in ``args.output_dir``.
        *args, **kwargs
            For ``Trainer.train``.

        Raises
        ------
        ValueError
            If there is no checkpoint to resume from, or windows are padded.
        FloatingPointError
            If a loss or a gradient is not finite; says where. Other processes of the run are not told.
        RuntimeError
            If the base model's weights have changed.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(str(self.args.output_dir)))
        with base_unchanged(self.patched_model), only_heads_learn(self.patched_model):
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one chunk of a batch of windows after another. Returns their loss."""
        input_ids = _unpadded(inputs)
        predicted = input_ids.shape[1] - 1
        caches = Caches(self.patched_model)
        losses = []
        for start, stop in self.objective.spans(predicted):
            chunk = {"input_ids": input_ids, "caches": caches, "start": start, "stop": stop}
            with self._synchronising(model, is_last=stop == predicted):
                losses.append(super().training_step(model, chunk, num_items_in_batch))
            caches.detach()
        self._check_gradients()
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over a chunk's tokens, divided by the number of predicted tokens of whole windows."""
        losses = model(**inputs)
        loss = losses.sum() / inputs["input_ids"][:, 1:].numel()
        if not loss.isfinite():
            raise FloatingPointError(self._what_failed(losses, **inputs))
        return (loss, losses) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The mean loss of a batch of windows; no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return model(_unpadded(self._prepare_inputs(inputs))).mean(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer.evaluation_loop``."""
        with only_heads_learn(self.patched_model):
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _synchronising(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Let processes exchange gradients, and DeepSpeed take its step, after the last chunk only."""
        state = self.accelerator.gradient_state
        is_wanted = state.sync_gradients
        state._set_sync_gradients(is_wanted and is_last)
        try:
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(is_wanted)

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but vectors."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

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
            save_heads(self.patched_model, Path(output_dir or str(self.args.output_dir), HEADS_FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_heads(self.patched_model, Path(resume_from_checkpoint, HEADS_FOLDER))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "attention_mask"]  # type: ignore[assignment]

    # Failures

    def _check_gradients(self) -> None:
        if not self.accelerator.sync_gradients or self.accelerator.scaler is not None:
            return  # not whole yet; or the scaler leaves out steps with infinite ones
        gradients = [parameter.grad for parameter in self.model.parameters()]  # type: ignore[union-attr]
        finite = [grad.isfinite().all().to(self.args.device) for grad in gradients if grad is not None]
        if finite and not torch.stack(finite).all():
            raise FloatingPointError(f"step {self.state.global_step + 1}: {first_unhealthy_head(self.patched_model)}")

    def _what_failed(
        self, losses: torch.Tensor, input_ids: torch.Tensor, caches: Caches, start: int, stop: int
    ) -> str:
        row = int((~losses.isfinite()).any(dim=1).nonzero()[0])
        return (
            f"step {self.state.global_step + 1}: the loss of tokens {start} to {stop - 1} of "
            f"{self._window_name(input_ids[row].cpu())} is not finite; {first_unhealthy_head(self.patched_model)}"
        )

    def _window_name(self, input_ids: torch.Tensor) -> str:
        dataset: Any = self.train_dataset
        for index in range(len(dataset)) if hasattr(dataset, "__len__") else []:
            if torch.equal(torch.as_tensor(dataset[index]["input_ids"]), input_ids):
                domains = getattr(dataset, "domains", None)
                return f"window {index}" + (f" ({domains[index]})" if domains else "")
        return "a window"


class GatesWithinReach(TrainerCallback):
    """Moves gates of a patched model that left [0, 1] back after every step: outside they have no gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        for head in head_modules(self.model).values():
            if head.gate is not None:
                head.gate.clamp_(0, 1)


class StopInTime(TrainerCallback):
    """Ends training after the first step that a deadline came before, with a checkpoint."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        """See ``TrainerCallback``."""
        if self.deadline.is_over:
            control.should_save = control.should_training_stop = True


def last_checkpoint(folder: str | os.PathLike) -> Path:
    """The last checkpoint in a folder whose writing was not cut short: the Trainer's state is written last.

    Raises
    ------
    ValueError
        If there is none.
    """
    states = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    whole = sorted((state.parent for state in states), key=lambda path: int(path.name.rpartition("-")[2]))
    if not whole:
        raise ValueError(f"{folder} has no checkpoint to resume from")
    return whole[-1]


def _check_arguments(args: TrainingArguments, objective: Objective, block_size: int, scalar_lr_factor: float) -> None:
    for name, instead in NOT_SUPPORTED.items():
        if getattr(args, name, None):
            raise ValueError(f"{name}={getattr(args, name)!r} is not supported by HeadTrainer: {instead}")
    if not scalar_lr_factor > 0:
        raise ValueError(f"scalar_lr_factor must be positive, got {scalar_lr_factor!r}")
    objective.check_block_size(block_size)


def _unpadded(inputs: dict[str, Any]) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("windows must not be padded, got an attention_mask with zeros: cut texts to one length")
    return inputs["input_ids"]
