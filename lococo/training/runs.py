"""Runs of training that go on where they were killed: what they read, where they write, and the Trainer's part."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lococo.data.documents import check_sources, local_files
from lococo.data.windows import DEFAULT_CACHE, DataConfig, as_sources, prepare
from lococo.files import write_whole
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.plots import THIN, Lines, Panel, Series
from lococo.results.tables import peak_memory, result_content
from lococo.training.frozen import checksums
from lococo.training.recipes import TrainingRecipe
from lococo.training.window_trainer import StopInTime, WindowTrainer

RUN_NAME, TRAINER_FOLDER = "run.json", "trainer"
FIGURES = ("loss", "grad_norm", "learning_rate", "heldout_nll", "gap_ratio")  # of a step

Dataset = str | os.PathLike | Iterable[str | os.PathLike | Mapping[str, Any]]
R = TypeVar("R", bound="TrainingRun")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run of training has made.

    Attributes
    ----------
    folder : Path
        What it wrote.
    rows : list of dict
        One per thing measured on the way. Of several processes the main one has all of them.
    """

    folder: Path
    rows: list[dict[str, Any]]

    @property
    def gap_ratio(self) -> float | None:
        """The last one measured. None where H2O loses nothing, and for extensions, in which none is measured."""
        measured = [row["gap_ratio"] for row in self.rows if "gap_ratio" in row]
        return measured[-1] if measured else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run of training, all but the model. What is not listed is an option of ``lococo.calibrate``.

    Parameters
    ----------
    data : DataConfig
        Text that is read.
    recipe : TrainingRecipe
        How it is learned from.
    output : Path
        Folder to write.
    deadline : Deadline
        The run stops after it, between two steps, and can be resumed.
    """

    data: DataConfig
    recipe: TrainingRecipe
    output: Path
    work_dir: Path | None = None
    cache_dir: Path = DEFAULT_CACHE.expanduser()
    resume: bool = False
    training_arguments: Mapping[str, Any] | None = None
    command: str = "lococo"
    deadline: Deadline = dataclasses.field(default_factory=Deadline)
    on_progress: Callable[[dict[str, Any]], None] | None = None

    work_names: ClassVar[tuple[str, ...]] = (RUN_NAME, TRAINER_FOLDER)  # what may stand in the work folder

    @property
    def work(self) -> Path:
        """The work folder."""
        output = self.output.absolute()  # "." has no name
        return self.work_dir or output.with_name(f"{output.name}.work")

    def check(self) -> None:
        """Refuse what cannot be run, before a model is there.

        Raises
        ------
        ValueError, OSError
            If a folder holds something else, ``work_dir`` a run that is not to be resumed, or there is no such text.
        ImportError
            If a package is missing.
        """
        if self.work.exists() and not self.resume:
            raise FileExistsError(f"{self.work} holds an unfinished run: resume it (--resume) or remove that folder")
        surplus = {entry.name for entry in self.work.iterdir()} if self.work.exists() else set()
        if surplus := surplus.difference(self.work_names):
            raise FileExistsError(f"{self.work} holds {', '.join(sorted(surplus))}, so it is no run to resume")
        check_sources(self.data.sources, self.data.text_column)
        if not importlib.util.find_spec("matplotlib"):
            raise ImportError("training draws a picture with the package matplotlib: pip install lococo[train]")

    def read_data(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the windows, if no run has, so that what is wrong with the data is said before a model is loaded.

        Raises
        ------
        ValueError, OSError, ImportError
            As of ``lococo.data.windows.prepare``.
        """
        with warnings.catch_warnings(), PartialState().main_process_first():
            warnings.simplefilter("ignore", UserWarning)  # the run itself says that there are few
            prepare(self.data, tokenizer, self.cache_dir / "tokens")

    def processes(self, *, on_cpu: bool, has_steps: bool = True) -> PartialState:
        """The processes of the run, once all of them have seen the work folder as it was.

        Raises
        ------
        ValueError
            If they cannot share the windows of a step evenly.
        """
        processes, windows = this_process(on_cpu=on_cpu), self.recipe.windows_per_step
        if has_steps and windows % processes.num_processes:
            raise ValueError(f"windows_per_step={windows} must be a multiple of {processes.num_processes} processes")
        processes.wait_for_everyone()
        return processes

    def begin(self, description: dict[str, Any]) -> None:
        """Write down which run the work folder is of."""
        write_whole(self.work / RUN_NAME, json.dumps(description, indent=1))

    def meter(self) -> Callable[[torch.device], dict[str, Any]]:
        """What gives, at the end, what the run has taken from now on; a process before it is not counted."""
        started, resumed = time.monotonic(), (self.work / RUN_NAME).is_file()

        def usage(device: torch.device) -> dict[str, Any]:
            seconds, peak = time.monotonic() - started, peak_memory(device)
            return {"seconds": seconds, "peak_memory_bytes": peak, "resumed": resumed}

        return usage

    def trainer_arguments(self, save_every: int, **changes: Any) -> TrainingArguments:
        """What the Trainer is told, with what the run's own ``training_arguments`` say at last."""
        processes, steps = PartialState(), self.recipe.steps
        given = {
            "output_dir": str(self.work / TRAINER_FOLDER),
            "max_steps": steps,
            "learning_rate": self.recipe.learning_rate,
            "lr_scheduler_type": "linear",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.recipe.windows_per_step // processes.num_processes,
            "logging_steps": 1,
            "save_steps": max(1, min(save_every, steps)),
            "save_total_limit": 2,
            "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
            "seed": self.data.seed,
            "use_cpu": processes.device.type == "cpu",
        }
        return TrainingArguments(**{**given, **changes, **(self.training_arguments or {})})

    def tell(self, row: dict[str, Any]) -> None:
        """Tell of a row of the record, in the main process."""
        if self.on_progress and PartialState().is_main_process:
            self.on_progress(row)

    def callbacks(self, stage: str | None = None) -> list[TrainerCallback]:
        """What ends training in time, and tells of its progress."""
        return [Progress(self.tell, stage), StopInTime(self.deadline)]

    def train(
        self, trainer: WindowTrainer, load: Callable[[Path], Any], stage: str | None = None
    ) -> list[dict[str, Any]]:
        """Train from the last checkpoint on, if there is one, up to the last step. Returns a row per thing measured.

        Parameters
        ----------
        load : callable
            Puts what a checkpoint holds into the model.
        stage : str, optional
            What the rows say that they are of.

        Raises
        ------
        OutOfTime
            If the deadline came before.
        """
        folder, steps = Path(str(trainer.args.output_dir)), trainer.args.max_steps
        state, last = trainer.state, folder / f"{PREFIX_CHECKPOINT_DIR}-{steps}"
        if (last / TRAINER_STATE_NAME).is_file():  # Trainer would train a step more
            load(last)
            state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        else:
            trainer.train(resume_from_checkpoint=any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")))
            state = trainer.state
            if state.global_step < steps:
                raise OutOfTime
        return [row for entry in state.log_history if (row := figures(entry, stage))]

    def remove_work(self) -> None:
        """Remove the state of a run that is complete."""
        shutil.rmtree(self.work, ignore_errors=True)


DATA_OPTIONS = {field.name for field in dataclasses.fields(DataConfig)} - {"sources"}
RUN_OPTIONS = {field.name for field in dataclasses.fields(TrainingRun)} - {"data", "recipe", "output", "deadline"}
RUN_OPTIONS |= DATA_OPTIONS | {"time_limit"}


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a run and its data, and the others, which are those of a recipe."""
    of_run = {name: value for name, value in options.items() if name in RUN_OPTIONS}
    return of_run, {name: value for name, value in options.items() if name not in RUN_OPTIONS}


def plan_run(kind: type[R], dataset: Dataset, output: str | os.PathLike, options: dict[str, Any], **fields: Any) -> R:
    """A run of a kind, checked before a model is there.

    Parameters
    ----------
    options : dict
        Of the run and its data; ``time_limit`` in seconds.
    **fields
        Other fields of the run, or of ``DataConfig``.
    """
    given = {"cache_dir": DEFAULT_CACHE, "text_column": "text", **options, **fields}
    cache = given["cache_dir"] = Path(given["cache_dir"]).expanduser()
    if given.get("work_dir") is not None:
        given["work_dir"] = Path(given["work_dir"])
    deadline = Deadline(given.pop("time_limit", None))
    about_data = {name: given.pop(name) for name in DATA_OPTIONS.intersection(given)}
    data = DataConfig(sources=as_sources(dataset, cache, about_data["text_column"]), **about_data)
    run = kind(data=data, output=Path(output), deadline=deadline, **given)
    run.check()
    return run


def figures(entry: Mapping[str, Any], stage: str | None = None) -> dict[str, Any]:
    """The row that an entry of the Trainer's history gives; empty where it is of something else."""
    if "loss" not in entry and "gap_ratio" not in entry:
        return {}
    named = {} if stage is None else {"stage": stage}
    return {**named, **{name: entry[name] for name in ("step", *FIGURES) if name in entry}}


class Progress(TrainerCallback):
    """Tells of every row as soon as it is there."""

    def __init__(self, tell: Callable[[dict[str, Any]], None], stage: str | None) -> None:
        self.tell, self.stage = tell, stage

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer with what it logs."""
        row = figures({**(logs or {}), "step": state.global_step}, self.stage)
        if row:
            self.tell(row)


def record_file(command: str, device: torch.device, rows: Sequence[dict[str, Any]], **facts: Any) -> bytes:
    """A result file: the facts, what made the rows where, and the rows."""
    content = {**facts, **result_content(without_folders(command), device, rows)}
    return (json.dumps(content, indent=1) + "\n").encode()


def without_folders(command: str) -> str:
    """A command whose absolute paths are cut to their last part: the folder may be published."""
    words = shlex.split(command)
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in words)


def source_names(sources: Sequence[str]) -> list[str]:
    """Sources by name: a Hub id as it is, the last part of a path."""
    return [Path(source).name if local_files(source) else source for source in sources]


def loss_panel(rows: Sequence[dict[str, Any]], title: str) -> Panel:
    """The training loss over the steps."""
    trained = [row for row in rows if "loss" in row]
    loss = Series("", [row["loss"] for row in trained], [row["step"] for row in trained], style=THIN)
    return Lines([loss], title, "step", "nats per token")


def this_process(*, on_cpu: bool) -> PartialState:
    """One process among those of a distributed run, with a GPU of its own; the others wait long for the first."""
    return PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))


def weights_identity(model: nn.Module) -> str:
    """Name of a model by its weights, for figures measured on it."""
    total = 0
    for value in checksums(model).values():
        total = (31 * total + value) % 2**64
    return f"{total:016x}"


def plain(content: Any) -> dict[str, Any]:
    """Content as JSON would give it back; dataclasses, on their own or inside, are dicts."""
    return json.loads(json.dumps(content, default=dataclasses.asdict))


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
