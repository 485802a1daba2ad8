"""Runs that go on where they were killed: the folder that they do it in, and the Trainer's part."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lococo.results.deadline import OutOfTime
from lococo.training.window_trainer import WindowTrainer


def check_work_folder(work_dir: Path, names: tuple[str, ...], resume: bool) -> None:
    """Refuse a work folder that is no run to resume, or one that is not to be resumed.

    Parameters
    ----------
    names : tuple of str
        What a run keeps there.

    Raises
    ------
    FileExistsError
        If it holds something else, or a run without ``resume``.
    """
    if work_dir.exists() and not resume:
        raise FileExistsError(f"{work_dir} holds an unfinished run: resume it (--resume) or remove that folder")
    surplus = sorted({entry.name for entry in work_dir.iterdir()}.difference(names)) if work_dir.exists() else []
    if surplus:
        raise FileExistsError(f"{work_dir} holds {', '.join(surplus)}, so it is no run to resume")


def check_same_run(path: Path, run: dict[str, Any]) -> None:
    """Refuse to go on with another run.

    Parameters
    ----------
    path : Path
        File of the work folder that says which run it is; there is none before the first.
    run : dict
        What makes one run another, as plain JSON values.

    Raises
    ------
    ValueError
        If it differs from what the file says; names what differs.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else run
    changed = [name for name in run if before.get(name) != run[name]]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with another {', '.join(changed)}: resume it with the same arguments, or "
            "remove that folder"
        )


def trainer_arguments(
    folder: Path, steps: int, windows_per_process: int, save_every: int, on_cpu: bool
) -> dict[str, Any]:
    """What runs tell ``transformers.TrainingArguments`` alike."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": windows_per_process,
        "logging_steps": 1,
        "save_steps": max(1, min(save_every, steps)),
        "save_total_limit": 2,
        "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        "use_cpu": on_cpu,
    }


def train_to_the_end(trainer: WindowTrainer, load: Callable[[Path], Any]) -> TrainerState:
    """Train from the last checkpoint on, if there is one, up to the last step.

    Parameters
    ----------
    load : callable
        Puts what a checkpoint holds into the model.

    Raises
    ------
    OutOfTime
        If the trainer stopped before.
    """
    folder, steps = Path(str(trainer.args.output_dir)), trainer.args.max_steps
    done = folder / f"{PREFIX_CHECKPOINT_DIR}-{steps}"
    if (done / TRAINER_STATE_NAME).is_file():  # Trainer would train a step more
        load(done)
        return TrainerState.load_from_json(str(done / TRAINER_STATE_NAME))
    trainer.train(resume_from_checkpoint=any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")))
    if trainer.state.global_step < steps:
        raise OutOfTime
    return trainer.state
