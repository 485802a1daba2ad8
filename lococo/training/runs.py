"""Runs of training that go on where they were killed: what they read, where they write, and the Trainer's part."""

from __future__ import annotations

import abc
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lococo.data.documents import check_sources, local_files
from lococo.data.windows import DEFAULT_CACHE, DataConfig, as_sources, prepare
from lococo.digest import config_text
from lococo.files import as_path, check_output, temporary_name, write_whole
from lococo.models import find_family
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.plots import THIN, Lines, Panel, Series
from lococo.results.tables import peak_memory, result_content
from lococo.state import is_patched
from lococo.training.frozen import checksums, random_state_kept
from lococo.training.recipes import TrainingRecipe
from lococo.training.window_trainer import StopInTime, WindowTrainer, step_of, whole_checkpoints

RUN_NAME, TRAINER_FOLDER = "run.json", "trainer"
FIGURES = ("loss", "grad_norm", "learning_rate", "heldout_nll", "gap_ratio")  # of a step

Dataset = str | os.PathLike | Iterable[str | os.PathLike | Mapping[str, Any]]
R = TypeVar("R", bound="TrainingRun")

# Fields of TrainingArguments that follow from a run, and what says them.
SAID_BY_RUN = {
    "output_dir": "work_dir",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "windows_per_step",
    "gradient_accumulation_steps": "windows_per_step",
    "seed": "seed",
    "use_cpu": "the device that the model is on",
    "resume_from_checkpoint": "resume",
}


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
class TrainingRun(abc.ABC):
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
    trainer: ClassVar[type[WindowTrainer]]

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
            If a folder cannot be written or holds something else, ``work_dir`` holds a run that is not to be resumed,
            there is no such text, or ``training_arguments`` say what the run says or cannot do.
        TypeError
            If an argument is of another kind.
        ImportError
            If a package is missing.
        """
        if not isinstance(self.resume, bool):
            raise TypeError(f"resume must be True or False, got {self.resume!r}")
        if self.on_progress is not None and not callable(self.on_progress):
            raise TypeError(f"on_progress must be a function of a row, got {self.on_progress!r}")
        self._check_training_arguments()
        for path in (self.output, self.work / RUN_NAME, self.cache_dir / "tokens"):
            check_output(path)
        if self.work.exists():
            self._check_work_folder()
        check_sources(self.data.sources, self.data.text_column)
        if not importlib.util.find_spec("matplotlib"):
            raise ImportError("training draws a picture with the package matplotlib: pip install lococo[train]")

    def _check_work_folder(self) -> None:
        if not self.resume:
            raise FileExistsError(f"{self.work} holds an unfinished run: resume it (--resume) or remove that folder")
        found = {entry.name for entry in self.work.iterdir()}.difference(map(temporary_name, self.work_names))
        if surplus := found.difference(self.work_names):
            raise FileExistsError(f"{self.work} holds {', '.join(sorted(surplus))}, so it is no run to resume")
        if found and RUN_NAME not in found:  # it was killed while it removed the folder
            raise FileExistsError(f"{self.work} has no {RUN_NAME}, so it is no run to resume: remove that folder")

    def _check_training_arguments(self) -> None:
        given = {} if self.training_arguments is None else self.training_arguments
        if not isinstance(given, Mapping):
            raise TypeError(f"training_arguments must be a dict, got {given!r}")
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        if unknown := [str(name) for name in given if name not in known]:
            raise ValueError(f"training_arguments: transformers.TrainingArguments has no {', '.join(unknown)}")
        for name in SAID_BY_RUN.keys() & given.keys():
            raise ValueError(f"training_arguments must leave out {name}: it follows from {SAID_BY_RUN[name]}")
        self.trainer.check_supported(given)

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that the run is not for. Errors as of ``check_model``."""
        check_model(model, tokenizer)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Result:
        """Train and save; random numbers are afterwards drawn as if nothing had been.

        Raises
        ------
        ValueError, OSError, TypeError, ImportError
            As of ``check``, ``check_model`` and ``lococo.data.windows.prepare``, or if the run to resume was another.
        FloatingPointError
            If training diverges.
        OutOfTime
            If the deadline came before the end.
        """
        self.check()
        self.check_model(model, tokenizer)
        with random_state_kept(model):
            return self._run(model, tokenizer)

    @abc.abstractmethod
    def _run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Result:
        """Train and save."""

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
        """What the Trainer is told, with what the run's own ``training_arguments`` say at last.

        Values that it does not take are refused by the Trainer's own errors: make it before any work.
        """
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
        checkpoints, steps = whole_checkpoints(str(trainer.args.output_dir)), trainer.args.max_steps
        if checkpoints and step_of(checkpoints[-1]) == steps:  # Trainer would train a step more
            load(checkpoints[-1])
            state = TrainerState.load_from_json(str(checkpoints[-1] / TRAINER_STATE_NAME))
        else:
            trainer.train(resume_from_checkpoint=bool(checkpoints))
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


def split_options(
    function: str, options: Mapping[str, Any], own: Iterable[str], of_recipe: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a run and its data, and those of its recipe.

    Parameters
    ----------
    function : str
        Whose options they are, as messages name it.
    own : iterable of str
        Names of the function's other options.
    of_recipe : collection of str
        Names of a recipe's options.

    Raises
    ------
    TypeError
        If there is no such option; lists those that there are.
    """
    of_run = {name: value for name, value in options.items() if name in RUN_OPTIONS}
    others = {name: value for name, value in options.items() if name not in RUN_OPTIONS}
    if unknown := others.keys() - set(of_recipe):
        known = sorted({*own, *of_recipe, *RUN_OPTIONS} - {"options"})
        raise TypeError(f"{function} has no option {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return of_run, others


def plan_run(kind: type[R], dataset: Dataset, output: str | os.PathLike, options: dict[str, Any], **fields: Any) -> R:
    """A run of a kind, checked before a model is there.

    Parameters
    ----------
    options : dict
        Of the run and its data; ``time_limit`` in seconds.
    **fields
        Other fields of the run, or of ``DataConfig``.
    """
    given = {"cache_dir": DEFAULT_CACHE, "text_column": "text", **options, **fields, "output": output}
    for name in ("output", "cache_dir", "work_dir", "merge_into"):
        if given.get(name) is not None or name == "output":
            given[name] = as_path(name, given[name])
    deadline = Deadline(given.pop("time_limit", None))
    about_data = {name: given.pop(name) for name in DATA_OPTIONS.intersection(given)}
    sources = as_sources(dataset, given["cache_dir"], about_data["text_column"])
    run = kind(data=DataConfig(sources=sources, **about_data), deadline=deadline, **given)
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


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what is no model with its tokenizer, or is patched.

    Raises
    ------
    TypeError
        If it is something else, such as the name of one.
    ValueError
        If the model is patched, or none that can be.
    """
    if is_patched(model):
        raise ValueError("the model is patched: call lococo.unpatch_model first")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a Transformers tokenizer, got {tokenizer!r}")
    find_family(model)


def this_process(*, on_cpu: bool) -> PartialState:
    """One process among those of a distributed run, with a GPU of its own; the others wait long for the first."""
    return PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))


def weights_identity(model: nn.Module) -> str:
    """Name of a model by its weights and its config, for figures measured on it."""
    content = json.dumps([list(checksums(model).values()), config_text(model)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
