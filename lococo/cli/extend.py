"""The command ``lococo extend``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lococo.cli.options import (
    METHOD,
    NUM_SLOTS,
    RUN,
    TEXT,
    TRAINING,
    DatasetOptions,
    ModelOptions,
    NumSlots,
    OwnBlockSize,
    TimeLimit,
    TrainingRunOptions,
    block_of,
    option,
)

LENGTH = "Length"


def extend(
    context: typer.Context,
    source: ModelOptions,
    run: TrainingRunOptions,
    text: DatasetOptions,
    *,
    method: Annotated[
        str, option(METHOD, "Cache to learn with: lococo, h2o, streaming, full or longlora.", metavar="METHOD")
    ] = "lococo",
    factor: Annotated[float, option(LENGTH, "New length / old length.")] = 8.0,
    original_length: Annotated[int | None, option(LENGTH, "Old length in tokens.", show_default="the model's")] = None,
    rope_type: Annotated[str, option(LENGTH, "linear, yarn or dynamic.", metavar="TYPE")] = "linear",
    num_slots: NumSlots = NUM_SLOTS,
    block_size: OwnBlockSize = None,
    positions: Annotated[str, option(METHOD, "Of lococo: absolute, or slot, which are not stretched.")] = "absolute",
    heads: Annotated[
        str | None, option(METHOD, "Folder or Hub id of heads to start from; sets slots and block of lococo.")
    ] = None,
    length: Annotated[int | None, option(TEXT, "Tokens per window.", show_default="the new length")] = None,
    steps: Annotated[int, option(TRAINING, "Of the optimizer.")] = 1000,
    windows_per_step: Annotated[int, option(TRAINING, "Global batch.")] = 8,
    learning_rate: Annotated[float, option(TRAINING, "Of all but heads.")] = 5e-5,
    heads_learning_rate: Annotated[float, option(TRAINING, "Of heads.")] = 1e-3,
    lora_rank: Annotated[int, option(TRAINING, "LoRA's r.")] = 8,
    lora_alpha: Annotated[int, option(TRAINING, "LoRA's alpha.")] = 16,
    depth: Annotated[int, option(TRAINING, "Compressions that back-propagation goes through; 0: all.")] = 2,
    save_every: Annotated[int, option(TRAINING, "Steps between checkpoints.")] = 100,
    fsdp: Annotated[bool, option(RUN, "Shard the model over the processes (FSDP2).", "--fsdp")] = False,
    merge: Annotated[
        Path | None, option(RUN, "Write a plain checkpoint and its heads, too.", metavar="FOLDER")
    ] = None,
    time_limit: TimeLimit = None,
) -> None:
    """Train a model to read longer texts.

    Example: lococo extend --model MODEL --factor 8 --num-slots 512 --dataset books.jsonl --output longer/
    """
    from lococo.data.windows import DEFAULT_DATASET, DataConfig, prepare
    from lococo.extension.extend import check_extension, extend_context
    from lococo.extension.recipe import ExtensionRecipe, extension_config
    from lococo.extension.rope_scaling import Stretch
    from lococo.heads import read_heads_config
    from lococo.loading import longest_text
    from lococo.results.deadline import Deadline, OutOfTime
    from lococo.training.calibrate import this_process

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate launch was told to use FSDP: leave that out and give lococo extend --fsdp")
    deadline = Deadline(time_limit)
    if heads is not None and method != "lococo":
        raise ValueError(f"--heads is for --method lococo, got --method {method}")
    config = (
        read_heads_config(heads)
        if heads
        else extension_config(method, num_slots, block_of(num_slots, block_size), positions)
    )
    stretch = Stretch(factor, original_length or longest_text(source.model, source.gguf_file), rope_type)
    recipe = ExtensionRecipe(
        method=method,
        stretch=stretch,
        config=config,
        rank=lora_rank,
        alpha=lora_alpha,
        steps=steps,
        windows_per_step=windows_per_step,
        learning_rate=learning_rate,
        heads_learning_rate=heads_learning_rate,
        depth=depth or None,
        save_every=save_every,
    )
    data = DataConfig(
        sources=tuple(text.dataset or [DEFAULT_DATASET]),
        length=length or stretch.length,
        num_windows=recipe.windows_needed if text.windows is None else text.windows,
        num_heldout=0,
        heldout_share=0.0,
        boundaries=text.boundaries,  # type: ignore[arg-type]
        text_column=text.text_column,
        seed=text.seed,
    )
    state: dict[str, Any] = {"work_dir": run.work_folder, "resume": run.resume, "merge_into": merge, "shard": fsdp}
    cache_dir = run.cache_dir.expanduser()
    check_extension(data, run.output, **state)
    training_arguments = run.training_arguments
    if fsdp and training_arguments:
        raise ValueError("--fsdp and --deepspeed both spread the training over the processes: give one of them")
    process = this_process(on_cpu=source.device == "cpu")  # "cuda" is its own GPU from here on
    with process.main_process_first():
        prepare(data, source.load_tokenizer(), cache_dir / "tokens")  # what is wrong with the data is said at once
    model, tokenizer = source.load("cpu" if fsdp else None)
    try:
        rows = extend_context(
            model,
            tokenizer,
            data,
            recipe,
            run.output,
            cache_dir=cache_dir,
            heads=heads,
            training_arguments=training_arguments,
            command=context.obj,
            deadline=deadline,
            **state,
        )
    except OutOfTime:
        process.print(f"out of time: the same command with --resume goes on from {run.work_folder}")
        return
    process.print(f"{run.output}: loss {rows[0]['loss']:.3f} at step 1, {rows[-1]['loss']:.3f} at the end")
