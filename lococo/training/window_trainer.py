"""Training on whole windows of text, chunk by chunk, on ``transformers.Trainer``."""

from __future__ import annotations

import abc
import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from lococo.results.deadline import Deadline
from lococo.state import head_modules, is_patched
from lococo.training.objectives import Caches, Objective

DEEPSPEED_ZERO2 = Path(__file__).with_name("deepspeed_zero2.json")  # for TrainingArguments(deepspeed=...)


class WindowTrainer(Trainer, abc.ABC):
    """A ``Trainer`` of losses over windows, each chunk's backward coming before the next chunk's forward.

    Parameters
    ----------
    loss : torch.nn.Module
        Called as ``WindowLoss``. Its parameters that require gradients are trained.
    model : torch.nn.Module
        The model in it; moved to ``args.device`` unless it has a device map or is to be sharded.
    args : transformers.TrainingArguments
    objective : Objective
        Gives the chunks.
    **kwargs
        For ``Trainer``. Datasets give ``input_ids`` of one length, without padding (``lococo.data.windows.Windows``).

    Raises
    ------
    ValueError
        If the process has several GPUs to itself.
    """

    trained_model: nn.Module
    objective: Objective

    def __init__(
        self, loss: nn.Module, model: nn.Module, args: TrainingArguments, objective: Objective, **kwargs: Any
    ) -> None:
        if getattr(model, "hf_device_map", None) is None and not args.fsdp:
            model.to(args.device)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter has a gradient, whatever the text
        self.trained_model = model
        self.objective = objective
        super().__init__(loss, args, **kwargs)
        self.add_callback(GatesWithinReach(model))
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: start one process per GPU (torchrun, accelerate launch), or "
                "choose one with CUDA_VISIBLE_DEVICES"
            )

    @abc.abstractmethod
    def new_caches(self) -> Caches | None:
        """What the model remembers of a batch of windows between chunks. None where there is one chunk."""

    @abc.abstractmethod
    def what_is_unhealthy(self) -> str:
        """Where the first number that is not finite lies, in words."""

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train.

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
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(str(self.args.output_dir)))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one chunk of a batch of windows after another. Returns their loss."""
        input_ids = _unpadded(inputs)
        predicted = input_ids.shape[1] - 1
        caches = self.new_caches()
        losses = []
        for start, stop in self.objective.spans(predicted):
            chunk = {"input_ids": input_ids, "caches": caches, "start": start, "stop": stop}
            with self._synchronising(model, is_last=stop == predicted):
                losses.append(super().training_step(model, chunk, num_items_in_batch))
            if caches is not None:
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

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "attention_mask"]  # type: ignore[assignment]

    # Failures

    def _check_gradients(self) -> None:
        if not self.accelerator.sync_gradients or self.accelerator.scaler is not None:
            return  # not whole yet; or the scaler leaves out steps with infinite ones
        gradients = [parameter.grad for parameter in self.model.parameters()]  # type: ignore[union-attr]
        finite = [grad.isfinite().all().to(self.args.device) for grad in gradients if grad is not None]
        if finite and not torch.stack(finite).all():
            raise FloatingPointError(f"step {self.state.global_step + 1}: {self.what_is_unhealthy()}")

    def _what_failed(
        self, losses: torch.Tensor, input_ids: torch.Tensor, caches: Caches | None, start: int, stop: int
    ) -> str:
        row = int((~losses.isfinite()).any(dim=1).nonzero()[0])
        return (
            f"step {self.state.global_step + 1}: the loss of tokens {start} to {stop - 1} of "
            f"{self._window_name(input_ids[row].cpu())} is not finite; {self.what_is_unhealthy()}"
        )

    def _window_name(self, input_ids: torch.Tensor) -> str:
        dataset: Any = self.train_dataset
        for index in range(len(dataset)) if hasattr(dataset, "__len__") else []:
            if torch.equal(torch.as_tensor(dataset[index]["input_ids"]), input_ids):
                domains = getattr(dataset, "domains", None)
                return f"window {index}" + (f" ({domains[index]})" if domains else "")
        return "a window"


class GatesWithinReach(TrainerCallback):
    """Moves gates of a model that left [0, 1] back after every step: steps beyond would have to be taken back first.

    DeepSpeed steps copies of its own, which it then writes into the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See ``TrainerCallback``."""
        for head in head_modules(self.model).values() if is_patched(self.model) else []:
            for parameter in head.after_step():
                if hasattr(parameter, "_hp_mapping"):
                    importlib.import_module("deepspeed.utils").safe_set_full_fp32_param(parameter, parameter)


class StopInTime(TrainerCallback):
    """Ends training after the first step that a deadline came before, with a checkpoint."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        """See ``TrainerCallback``."""
        if self.deadline.is_over:
            control.should_save = control.should_training_stop = True


def deepspeed_arguments(config: str) -> dict[str, str]:
    """What ``transformers.TrainingArguments`` are told to train with DeepSpeed.

    Parameters
    ----------
    config : str
        A DeepSpeed config file, or ``zero2`` for ours.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ImportError
        If DeepSpeed is not installed.
    """
    path = DEEPSPEED_ZERO2 if config == "zero2" else Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such DeepSpeed config file")
    if not importlib.util.find_spec("deepspeed"):
        raise ImportError("--deepspeed needs the package deepspeed: pip install deepspeed")
    return {"deepspeed": str(path)}


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


def _unpadded(inputs: dict[str, Any]) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("windows must not be padded, got an attention_mask with zeros: cut texts to one length")
    return inputs["input_ids"]
