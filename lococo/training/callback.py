"""Heads in the checkpoints of trainers that know nothing of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lococo.heads import check_heads, load_heads, save_heads
from lococo.training.trainer import HEADS_FOLDER


class SaveHeadsCallback(TrainerCallback):
    """Writes the heads of a patched model into the checkpoints of a ``transformers.Trainer``, and reads them again.

    A checkpoint holds the base model alone, as ``save_pretrained`` writes it: without this, training goes on from it
    with the heads that the model was patched with. Heads in PEFT's ``modules_to_save`` are part of the adapter and
    need no callback.

    Each checkpoint gets a folder ``heads`` for ``lococo.patch_model(model, heads=...)``. They are loaded when training
    is resumed, and at its end those of the best checkpoint under ``load_best_model_at_end``.

    Raises
    ------
    FileNotFoundError
        If the checkpoint that training goes on from has no heads, or does not lie in ``args.output_dir``.
    ValueError
        If another training has left a checkpoint of the same step there, the model is not patched, or its heads lie in
        parts on several processes (FSDP).
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by the Trainer."""
        if args.should_save:
            save_heads(model, _checkpoint(args, state) / HEADS_FOLDER)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by the Trainer."""
        check_heads(model)
        if state.global_step:
            checkpoint = _checkpoint(args, state)
            _check_is_of(checkpoint, state)
            _load(model, checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by the Trainer."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _load(model, Path(state.best_model_checkpoint))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _check_is_of(checkpoint: Path, state: TrainerState) -> None:
    """Refuse a checkpoint with another history than the one that training goes on from."""
    written = checkpoint / TRAINER_STATE_NAME
    if written.is_file():
        histories = (TrainerState.load_from_json(str(written)).log_history, state.log_history)
        if len({json.dumps(each) for each in histories}) > 1:  # NaN is NaN here
            raise ValueError(
                f"{checkpoint} is of another training than the one that goes on: give an args.output_dir without it, "
                "or the one that the checkpoint lies in"
            )


def _load(model: nn.Module, checkpoint: Path) -> None:
    heads = checkpoint / HEADS_FOLDER
    if not heads.is_dir():
        raise FileNotFoundError(
            f"{heads} does not exist: the checkpoint was written without SaveHeadsCallback, or lies outside "
            "args.output_dir; leave the callback out and patch the model with the heads to go on with, heads=..."
        )
    load_heads(model, heads)
