"""Extension from data to a folder: a model learns to read texts longer than those it was trained on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lococo.data.documents import local_files
from lococo.data.windows import DataConfig, Windows, prepare
from lococo.extension.adapters import adapted, adapter_config, checkpoint_layers, restored, unfreeze
from lococo.extension.folder import check_extension_folder, merge_extended, save_extended
from lococo.extension.longlora import shifted_sparse
from lococo.extension.recipe import ExtensionRecipe
from lococo.extension.report import record_files
from lococo.extension.rope_scaling import scale_positions
from lococo.extension.sharding import gathered, sharded_arguments
from lococo.extension.trainer import ExtensionTrainer, load_parts
from lococo.files import write_whole
from lococo.heads import load_heads
from lococo.patch import patched
from lococo.results.deadline import Deadline
from lococo.results.tables import peak_memory
from lococo.state import is_patched
from lococo.training.calibrate import this_process, weights_identity
from lococo.training.runs import check_same_run, check_work_folder, train_to_the_end, trainer_arguments
from lococo.training.window_trainer import StopInTime

RUN_NAME = "run.json"
WORK_NAMES = (RUN_NAME, "trainer")


def check_extension(
    data: DataConfig,
    output: Path,
    *,
    work_dir: Path,
    resume: bool = False,
    merge_into: Path | None = None,
    shard: bool = False,
) -> None:
    """Refuse what ``extend_context`` would refuse with these arguments, before a model is there.

    Raises
    ------
    ValueError, OSError
        As in ``extend_context``.
    ImportError
        If a package is missing.
    """
    check_extension_folder(output)
    if merge_into is not None and shard:
        raise ValueError("a sharded run writes no merged model: lococo.merge_extended makes one of what it writes")
    if merge_into is not None and merge_into.exists():
        raise FileExistsError(f"{merge_into} exists; give a new folder for the merged model")
    check_work_folder(work_dir, WORK_NAMES, resume)
    for source in data.sources:
        local_files(source)
    for name in ("peft", "matplotlib"):
        if not importlib.util.find_spec(name):
            raise ImportError(f"extension needs the package {name}: pip install lococo[train]")


def extend_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    recipe: ExtensionRecipe,
    output: Path,
    *,
    work_dir: Path,
    cache_dir: Path,
    heads: str | None = None,
    resume: bool = False,
    merge_into: Path | None = None,
    shard: bool = False,
    training_arguments: dict[str, Any] | None = None,
    command: str = "lococo.extend_context(...)",
    deadline: Deadline | None = None,
) -> list[dict[str, Any]]:
    """Train a model to read longer texts, and write what was trained into a folder for ``load_extended``.

    Adapters, copies of embeddings and norms, and heads learn in float32; a base model in bfloat16 computes in it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, not patched; it is as it was afterwards, bit for bit, unless it was sharded.
    data : DataConfig
        Text, its windows as long as the texts that the model is to read. No window is held out.
    recipe : ExtensionRecipe
    output : Path
        The folder: adapters for PEFT, heads, what it was made from, and the losses.
    work_dir : Path
        State of the run, removed at the end.
    cache_dir : Path
        Token windows, which other runs use too.
    heads : str, optional
        Folder or Hub id of heads that the training starts from; made for the recipe's config.
    resume : bool
        Go on with the run in ``work_dir``, if there is one.
    merge_into : Path, optional
        Folder for a plain checkpoint with all that was trained in its weights.
    shard : bool
        Every process keeps a part of each layer's weights only (FSDP2). The model is best on the CPU before.
    training_arguments : dict, optional
        For ``transformers.TrainingArguments``: DeepSpeed, logging, precision.
    command : str
        What is written down as having made it.
    deadline : Deadline, optional
        The run stops after it, between two steps, and can be resumed.

    Returns
    -------
    list of dict
        ``step``, ``loss``, ``grad_norm`` and ``learning_rate`` of every step.

    Raises
    ------
    ValueError
        For a bad argument, before any work, or if the run to resume was another.
    FileExistsError
        If a folder holds something else, or ``work_dir`` a run that is not resumed.
    FloatingPointError
        If training diverges.
    OutOfTime
        If the deadline came before the end.
    """
    deadline, started = deadline or Deadline(), time.monotonic()
    check_extension(data, output, work_dir=work_dir, resume=resume, merge_into=merge_into, shard=shard)
    _check_model(model, recipe)
    resumed = (work_dir / RUN_NAME).is_file()
    processes = this_process(on_cpu=model.device.type == "cpu" and not shard)
    if shard and processes.num_processes == 1:
        raise ValueError("shard=True needs several processes, this is the only one: start it with accelerate launch")
    if recipe.windows_per_step % processes.num_processes:
        raise ValueError(
            f"windows_per_step={recipe.windows_per_step} must be a multiple of {processes.num_processes} processes"
        )
    processes.wait_for_everyone()  # all have seen the work folder as it was
    with processes.main_process_first():
        windows, _ = prepare(data, tokenizer, cache_dir / "tokens")
        run = _description(data, recipe, heads, weights_identity(model), shard)
        check_same_run(work_dir / RUN_NAME, run)
        if processes.is_main_process:
            write_whole(work_dir / RUN_NAME, json.dumps(run, indent=1))
    dtype = model.dtype  # what learns is wider
    # What could put a sharded model together again would keep the memory of the whole one.
    kept = contextlib.nullcontext() if shard else restored(model)
    with kept, extended_for_training(model, recipe, heads, data.seed) as learner:
        precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
        sharding = sharded_arguments() if shard else {}
        given = {**precision, **sharding, "seed": data.seed, **(training_arguments or {})}
        rows = _train(learner, windows, recipe, work_dir / "trainer", given, deadline)
        processes.wait_for_everyone()  # none still writes into the work folder
        with gathered(learner):
            if processes.is_main_process:
                usage = {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory(processes.device)}
                usage["resumed"] = resumed  # what an earlier process took is not counted
                files = record_files(rows, recipe, data, usage, command, processes.device)
                save_extended(learner, output, recipe.extension, files=files)
                if merge_into is not None:
                    _write_merged(learner, merge_into, tokenizer)
                shutil.rmtree(work_dir, ignore_errors=True)
    return rows


@contextlib.contextmanager
def extended_for_training(
    model: PreTrainedModel, recipe: ExtensionRecipe, heads: str | None = None, seed: int = 0
) -> Iterator[Any]:
    """A model inside a ``with`` block, ready to be trained: stretched, with adapters, and its cache in force."""
    extension = recipe.extension
    if extension.rope_scaling:
        scale_positions(model, extension.rope_scaling)
    torch.manual_seed(seed)  # first weights of adapters and heads
    learner = adapted(model, adapter_config(model, recipe.rank, recipe.alpha))
    in_force = patched(learner, recipe.config) if recipe.config else contextlib.nullcontext()
    if recipe.method == "longlora":
        in_force = shifted_sparse(learner)
    with in_force:
        if heads is not None:
            load_heads(learner, heads)
        unfreeze(learner)
        if recipe.config is None:  # its memory grows with the window
            checkpoint_layers(model)
        yield learner.train()


def _check_model(model: PreTrainedModel, recipe: ExtensionRecipe) -> None:
    if is_patched(model):
        raise ValueError("the model is patched: call lococo.unpatch_model first")
    with restored(model):
        if recipe.extension.rope_scaling:
            scale_positions(model, recipe.extension.rope_scaling)
        adapter_config(model, recipe.rank, recipe.alpha)


def _train(
    learner: Any,
    windows: Windows,
    recipe: ExtensionRecipe,
    folder: Path,
    training_arguments: dict[str, Any],
    deadline: Deadline,
) -> list[dict[str, Any]]:
    processes = PartialState()
    per_process, on_cpu = recipe.windows_per_step // processes.num_processes, processes.device.type == "cpu"
    given = trainer_arguments(folder, recipe.steps, per_process, recipe.save_every, on_cpu)
    given["learning_rate"] = recipe.learning_rate
    trainer = ExtensionTrainer(
        learner,
        TrainingArguments(**{**given, **training_arguments}),
        objective=recipe.objective,
        heads_learning_rate=recipe.heads_learning_rate,
        scalar_lr_factor=recipe.scalar_lr_factor,
        train_dataset=windows,
        callbacks=[StopInTime(deadline)],
    )
    state = train_to_the_end(trainer, lambda checkpoint: load_parts(learner, checkpoint))
    wanted = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in wanted} for entry in state.log_history if "loss" in entry]


def _write_merged(learner: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Merge a copy: the model itself is to be as it was."""
    merge_extended(copy.deepcopy(learner), folder, tokenizer)


def _description(
    data: DataConfig, recipe: ExtensionRecipe, heads: str | None, model: str, shard: bool
) -> dict[str, Any]:
    """What makes one run another, as plain JSON values."""
    content = {
        "model": model,
        "data": dataclasses.asdict(data),
        "recipe": dataclasses.asdict(recipe),
        "heads": heads,
        "shard": shard,
    }
    return json.loads(json.dumps(content))
