"""Training on whole windows of text, chunk by chunk, on ``transformers.Trainer``."""

from __future__ import annotations

import abc
import contextlib
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from lococo.results.deadline import Deadline
from lococo.state import Patch
from lococo.training.objectives import Caches, NextTokenLoss, WindowLoss
from lococo.training.processes import is_over_anywhere

# What none of these trainers can follow: it is put into the embeddings of the module that is trained.
EMBEDDING_NOISE = {"neftune_noise_alpha": "the loss that is trained has no embeddings to put noise into"}
DEEPSPEED_ZERO2 = Path(__file__).with_name("deepspeed_zero2.json")  # for TrainingArguments(deepspeed=...)


class WindowTrainer(Trainer, abc.ABC):
    """A ``Trainer`` of losses over windows, each chunk's backward coming before the next chunk's forward.

    Weight decay is that of matrices alone.

    Parameters
    ----------
    loss : WindowLoss or NextTokenLoss
        Its parameters that require gradients are trained. Its model is moved to ``args.device`` unless it has a device
        map or is to be sharded.
    args : transformers.TrainingArguments
    scalar_lr_factor : float
        Factor on the heads' learning rate for gates, mass scales and biases: few numbers that have far to go.
    **kwargs
        For ``Trainer``. Datasets give ``input_ids`` of one length, without padding (``lococo.data.windows.Windows``).

    Raises
    ------
    ValueError
        For arguments that are not supported, or if the process has several GPUs to itself.
    """

    not_supported: ClassVar[dict[str, str]]  # arguments, and what to do instead
    all_finite: ClassVar[str]  # what to say of a loss that is not, where all parameters are

    def __init__(
        self, loss: WindowLoss | NextTokenLoss, args: TrainingArguments, scalar_lr_factor: float, **kwargs: Any
    ) -> None:
        self.check_supported(vars(args))
        if not scalar_lr_factor > 0:
            raise ValueError(f"scalar_lr_factor must be positive, got {scalar_lr_factor!r}")
        if getattr(loss.model, "hf_device_map", None) is None and not args.fsdp:
            loss.model.to(args.device)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every parameter has a gradient, whatever the text
        self.loss, self.scalar_lr_factor = loss, scalar_lr_factor
        super().__init__(loss, args, **kwargs)
        self.add_callback(GatesWithinReach(loss.patch))
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process: start one process per GPU (torchrun, accelerate launch), or "
                "choose one with CUDA_VISIBLE_DEVICES"
            )

    @classmethod
    def check_supported(cls, arguments: Mapping[str, Any]) -> None:
        """Refuse arguments of ``transformers.TrainingArguments`` that it cannot follow.

        Raises
        ------
        ValueError
            Names the argument and what to do instead.
        """
        for name, instead in cls.not_supported.items():
            if arguments.get(name):
                raise ValueError(f"{name}={arguments[name]!r} is not supported by {cls.__name__}: {instead}")

    @property
    def trained_model(self) -> nn.Module:
        """The model in the loss."""
        return self.loss.model

    @abc.abstractmethod
    def learning_rate_of(self, name: str, parameter: nn.Parameter) -> float:
        """Of a parameter of the loss."""

    @abc.abstractmethod
    def place_of(self, name: str) -> tuple[str, str]:
        """Where a parameter of the loss lies, in words, and what it is called there."""

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
        caches = self.loss.new_caches()
        losses = []
        for start, stop in self.loss.objective.spans(predicted):
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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of ``args``, with a learning rate of its own for every kind of parameter."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in self.loss.named_parameters():
                if parameter.requires_grad:
                    decay = self.args.weight_decay if parameter.dim() > 1 else 0.0
                    groups.setdefault((self.learning_rate_of(name, parameter), decay), []).append(parameter)
            listed = [{"params": each, "lr": rate, "weight_decay": decay} for (rate, decay), each in groups.items()]
            self.optimizer = optimizer_class(listed, **options)
        return self.optimizer

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "attention_mask"]  # type: ignore[assignment]

    # Checkpoints

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    # Failures

    def what_is_unhealthy(self) -> str:
        """Where the first number among parameters and gradients that is not finite lies, in words."""
        for name, parameter in self.loss.named_parameters():
            place, known = self.place_of(name)
            if not parameter.isfinite().all():
                return f"{place}{known} is not finite"
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"{place}the gradient of {known} is not finite"
        return self.all_finite

    def _check_gradients(self) -> None:
        if not self.accelerator.sync_gradients or self.accelerator.scaler is not None:
            return  # not whole yet; or the scaler leaves out steps with infinite ones
        gradients = [parameter.grad for parameter in self.loss.parameters()]
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

    Parameters
    ----------
    patch : Patch, optional
        Of the model; None where it has no heads.
    """

    def __init__(self, patch: Patch | None) -> None:
        self.patch = patch

    @torch.no_grad()
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        for head in self.patch.heads.values() if self.patch else []:
            for parameter in head.after_step():
                if hasattr(parameter, "_hp_mapping"):
                    importlib.import_module("deepspeed.utils").safe_set_full_fp32_param(parameter, parameter)


class StopInTime(TrainerCallback):
    """Ends training after the first step that a deadline came before in any of the processes, with a checkpoint."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        """Called by the Trainer."""
        if is_over_anywhere(self.deadline):
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
    """The last checkpoint in a folder whose writing was not cut short.

    Raises
    ------
    ValueError
        If there is none.
    """
    whole = whole_checkpoints(folder)
    if not whole:
        raise ValueError(f"{folder} has no checkpoint to resume from")
    return whole[-1]


def whole_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints in a folder whose writing was not cut short, by steps: the Trainer's state is written last."""
    states = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    return sorted((state.parent for state in states if _is_whole_json(state)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps that were done when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _unpadded(inputs: dict[str, Any]) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("windows must not be padded, got an attention_mask with zeros: cut texts to one length")
    return inputs["input_ids"]
