"""Calibration from data to a heads folder: budgets, layer-local start, end-to-end training, measurement."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lococo.config import LoCoCoConfig
from lococo.data.documents import local_files
from lococo.data.windows import DataConfig, Windows, prepare
from lococo.files import write_whole
from lococo.heads import check_heads_folder, load_heads
from lococo.patch import patched
from lococo.results.deadline import Deadline
from lococo.results.journal import Journal
from lococo.results.tables import peak_memory
from lococo.state import head_modules
from lococo.training.budgets import allocate, eviction_errors, slot_levels
from lococo.training.frozen import checksums
from lococo.training.gap import GapRatio, MeasureGap, baselines
from lococo.training.local import Recordings, train_locally
from lococo.training.recipe import Recipe
from lococo.training.report import save_calibrated
from lococo.training.runs import check_same_run, check_work_folder, train_to_the_end, trainer_arguments
from lococo.training.trainer import HEADS_FOLDER, HeadTrainer
from lococo.training.window_trainer import StopInTime

RUN_NAME = "run.json"
WORK_NAMES = (RUN_NAME, "recordings", "local", "trainer")


def this_process(*, on_cpu: bool) -> PartialState:
    """One process among those of a distributed run, with a GPU of its own; the others wait long for the first."""
    return PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=1))


def check_calibration(
    config: LoCoCoConfig,
    data: DataConfig,
    recipe: Recipe,
    output: Path,
    *,
    work_dir: Path,
    resume: bool = False,
    first: int = 512,
) -> None:
    """Refuse what ``calibrate`` would refuse with these arguments, before a model is there.

    Raises
    ------
    ValueError, OSError
        As in ``calibrate``.
    ImportError
        If a package is missing.
    """
    check_heads_folder(output)
    check_work_folder(work_dir, WORK_NAMES, resume)
    for source in data.sources:
        local_files(source)
    if not 1 <= first < data.length:
        raise ValueError(f"first must lie between 1 and {data.length - 1} for windows of {data.length}, got {first}")
    if not data.num_heldout:
        raise ValueError("num_heldout must be at least 1: the heads are measured on held-out windows")
    evicting = (config.num_slots // config.block_size + 1) * config.block_size  # tokens before the first compression
    if data.length <= evicting + 1:
        raise ValueError(
            f"windows of {data.length} tokens are too short for num_slots={config.num_slots} and "
            f"block_size={config.block_size}: the first token is evicted after {evicting}"
        )
    if not importlib.util.find_spec("matplotlib"):
        raise ImportError("calibration draws a picture with the package matplotlib: pip install lococo[train]")


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: LoCoCoConfig,
    data: DataConfig,
    recipe: Recipe,
    output: Path,
    *,
    work_dir: Path,
    cache_dir: Path,
    resume: bool = False,
    first: int = 512,
    dtype: torch.dtype | None = torch.bfloat16,
    training_arguments: dict[str, Any] | None = None,
    command: str = "lococo.calibrate(...)",
    recordings_dir: Path | None = None,
    deadline: Deadline | None = None,
) -> list[dict[str, Any]]:
    """Train the heads of a model and write them, with how they were made and what they measure, into a folder.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, not patched; it is as it was afterwards, bit for bit.
    config : LoCoCoConfig
        The heads to train. ``slots_per_head`` is found by calibration if the recipe says so.
    data : DataConfig
        Text for training and for measurement.
    output : Path
        The heads folder.
    work_dir : Path
        State of the run: recordings, finished layers, checkpoints. Removed at the end.
    cache_dir : Path
        Token windows, errors per head and baselines, which other runs use too.
    resume : bool
        Go on with the run in ``work_dir``, if there is one.
    first : int
        First token of a held-out window that counts for the gap ratio.
    dtype : torch.dtype, optional
        Of the saved heads. None: as they were trained.
    training_arguments : dict, optional
        For ``transformers.TrainingArguments``: DeepSpeed, logging, precision.
    command : str
        What is written down as having made the heads.
    recordings_dir : Path, optional
        Recorded texts of this model, data and number of texts, for other runs too. None: in ``work_dir``.
    deadline : Deadline, optional
        The run stops after it, between two steps, texts or layers, and can be resumed.

    Returns
    -------
    list of dict
        One row per thing measured: ``stage``, ``step``, and what it is about. Stage ``saved`` is what stands in the
        folder. Of several processes the main one has all rows.

    Raises
    ------
    ValueError
        For a bad argument, before any work, or if the run to resume was another.
    FileExistsError
        If ``output`` holds something else, or ``work_dir`` a run that is not resumed or something else.
    FloatingPointError
        If training diverges.
    OutOfTime
        If the deadline came before the end.
    """
    deadline = deadline or Deadline()
    started, resumed = time.monotonic(), (work_dir / RUN_NAME).is_file()
    processes = this_process(on_cpu=model.device.type == "cpu")
    check_calibration(config, data, recipe, output, work_dir=work_dir, resume=resume, first=first)
    if recipe.objective and recipe.windows_per_step % processes.num_processes:
        raise ValueError(
            f"windows_per_step={recipe.windows_per_step} must be a multiple of {processes.num_processes} processes"
        )
    processes.wait_for_everyone()  # all have seen the work folder as it was
    with processes.main_process_first():
        train, heldout = prepare(data, tokenizer, cache_dir / "tokens")
        run = _description(config, data, recipe, first, weights_identity(model))
        check_same_run(work_dir / RUN_NAME, run)
        journal = Journal(cache_dir / f"measured-{run['model']}.jsonl", deadline)
        gap = baselines(model, heldout.ids, config, first, journal)
        config, rows = _with_budgets(model, train, config, recipe, journal)
        if processes.is_main_process:
            write_whole(work_dir / RUN_NAME, json.dumps(run, indent=1))
        recordings = Recordings(recordings_dir or work_dir / "recordings", deadline)
        if recipe.local:
            recordings.add(model, train.evenly(recipe.local_texts))
    torch.manual_seed(data.seed)  # the heads' initial weights
    with patched(model, config):
        rows.append({"stage": "start", "step": 0, **gap.measure(model)})
        if recipe.local:
            with processes.main_process_first():
                layers = train_locally(model, recordings, recipe.local, work_dir / "local", deadline)
            rows += [{"stage": "local", **row} for row in layers]
            rows.append({"stage": "local", "step": recipe.local.steps, **gap.measure(model)})
        if recipe.objective:
            trainer_dir = work_dir / "trainer"
            rows += _train_end_to_end(model, train, recipe, gap, trainer_dir, data.seed, training_arguments, deadline)
        processes.wait_for_everyone()  # none still writes into the work folder
        if processes.is_main_process:
            if dtype is not None:
                _round_heads(model, dtype)
                rows.append({"stage": "saved", "step": recipe.steps if recipe.objective else 0, **gap.measure(model)})
            usage = {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory(model.device)}
            usage["resumed"] = resumed  # what an earlier process took is not counted
            save_calibrated(model, output, rows, usage, gap, recipe, data, config, dtype, command)
            shutil.rmtree(work_dir, ignore_errors=True)
    return rows


def weights_identity(model: PreTrainedModel) -> str:
    """Name of a model by its weights, for figures measured on it."""
    total = 0
    for value in checksums(model).values():
        total = (31 * total + value) % 2**64
    return f"{total:016x}"


def _description(config: LoCoCoConfig, data: DataConfig, recipe: Recipe, first: int, model: str) -> dict[str, Any]:
    """What makes one run another, as plain JSON values."""
    content = {
        "model": model,
        "config": config.to_dict(),
        "data": dataclasses.asdict(data),
        "recipe": dataclasses.asdict(recipe),
        "objective": recipe.objective_name,
        "first": first,
    }
    return json.loads(json.dumps(content))


@torch.no_grad()
def _round_heads(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the heads the values that they have when saved in a dtype."""
    for head in head_modules(model).values():
        for parameter in head.parameters():
            parameter.copy_(parameter.to(dtype))


def _with_budgets(
    model: PreTrainedModel, train: Windows, config: LoCoCoConfig, recipe: Recipe, journal: Journal
) -> tuple[LoCoCoConfig, list[dict[str, Any]]]:
    if not recipe.budget_texts or config.slots_per_head is not None:
        return config, []
    levels = slot_levels(config.num_slots)
    errors = eviction_errors(model, train.evenly(recipe.budget_texts), config, levels, journal.measure)
    slots = allocate(errors, levels, config.num_slots)
    rows = [
        {"stage": "budgets", "layer": layer, "kv_head": head, "slots": count}
        for layer, counts in enumerate(slots)
        for head, count in enumerate(counts)
    ]
    return dataclasses.replace(config, slots_per_head=slots), rows


def _train_end_to_end(
    model: PreTrainedModel,
    train: Windows,
    recipe: Recipe,
    gap: GapRatio,
    folder: Path,
    seed: int,
    training_arguments: dict[str, Any] | None,
    deadline: Deadline,
) -> list[dict[str, Any]]:
    assert recipe.objective is not None
    wanted = ("step", "loss", "grad_norm", "learning_rate", "heldout_nll", "gap_ratio")
    windows, on_cpu = recipe.windows_per_step // PartialState().num_processes, model.device.type == "cpu"
    given = trainer_arguments(folder, recipe.steps, windows, recipe.measure_every, on_cpu)
    given.update(learning_rate=recipe.learning_rate, seed=seed)
    trainer = HeadTrainer(
        model,
        TrainingArguments(**{**given, **(training_arguments or {})}),
        objective=recipe.objective,
        scalar_lr_factor=recipe.scalar_lr_factor,
        train_dataset=train,
        callbacks=[MeasureGap(model, gap, recipe.measure_every), StopInTime(deadline)],
    )
    state = train_to_the_end(trainer, lambda checkpoint: load_heads(model, checkpoint / HEADS_FOLDER))
    return [
        {"stage": "end-to-end", **{name: entry[name] for name in wanted if name in entry}}
        for entry in state.log_history
        if "loss" in entry or "gap_ratio" in entry
    ]
