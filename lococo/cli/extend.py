"""The command ``lococo extend``."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import typer

from lococo.cli import options
from lococo.cli.options import METHOD, NUM_SLOTS, RUN, TEXT, TRAINING, option

LENGTH = "Length"


@dataclasses.dataclass(frozen=True)
class ExtensionOptions:
    """Arguments of ``lococo.extend_context``."""

    method: Annotated[
        str, option(METHOD, "Cache to train with: lococo, h2o, streaming or full.", metavar="METHOD")
    ] = "lococo"
    factor: Annotated[float, option(LENGTH, "New length divided by the old one.")] = 8.0
    original_length: Annotated[int | None, option(LENGTH, "Old length in tokens.", show_default="the model's")] = None
    rope_type: Annotated[
        str, option(LENGTH, "How positions are stretched: linear, yarn or dynamic.", metavar="TYPE")
    ] = "linear"
    num_slots: options.NumSlots = NUM_SLOTS
    block_size: options.OwnBlockSize = None
    positions: Annotated[
        str | None,
        option(METHOD, "absolute; or slot, which are not stretched.", show_default="absolute; streaming: slot"),
    ] = None
    heads: Annotated[
        str | None, option(METHOD, "Folder or Hub id of heads to start from; sets slots and block size.")
    ] = None
    length: Annotated[int | None, option(TEXT, "Tokens per window.", show_default="the new length")] = None
    steps: Annotated[int, option(TRAINING, "Steps of the optimizer.")] = 1000
    windows_per_step: Annotated[int, option(TRAINING, "Windows in the global batch.")] = 8
    learning_rate: Annotated[float, option(TRAINING, "Learning rate of everything but the heads.")] = 5e-5
    heads_learning_rate: Annotated[float, option(TRAINING, "Learning rate of the heads.")] = 1e-3
    rank: Annotated[int, option(TRAINING, "LoRA's r.", "--lora-rank")] = 8
    alpha: Annotated[int, option(TRAINING, "LoRA's alpha.", "--lora-alpha")] = 16
    depth: Annotated[int, option(TRAINING, "Compressions to back-propagate through; 0: all.", min=0)] = 2
    save_every: Annotated[int, option(TRAINING, "Steps between checkpoints.")] = 100
    shard: Annotated[bool, option(RUN, "Shard the model over all processes (FSDP2).", "--fsdp")] = False
    merge_into: Annotated[
        Path | None,
        option(RUN, "Folder to write a plain checkpoint with its heads to, too.", "--merge", metavar="FOLDER"),
    ] = None
    time_limit: Annotated[
        float | None, option(RUN, "Seconds after which the run ends; the same command with --resume continues it.")
    ] = None


def extend(
    context: typer.Context,
    source: options.ModelOptions,
    run: options.TrainingRunOptions,
    text: options.DatasetOptions,
    extension: ExtensionOptions,
) -> None:
    """Train a model to read longer texts.

    Example: lococo extend --model MODEL --factor 8 --num-slots 512 --dataset books.jsonl --output longer/
    """
    from lococo.extension.extend import plan_extension
    from lococo.loading import longest_text
    from lococo.results.deadline import OutOfTime

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate launch was told to use FSDP: leave that out and give lococo extend --fsdp")
    if extension.shard and run.deepspeed:
        raise ValueError("--fsdp and --deepspeed both spread the training over the processes: give one of them")
    given = {**dataclasses.asdict(extension), "depth": extension.depth or None}
    if extension.original_length is None:
        given["original_length"] = longest_text(source.model, source.gguf_file)
    plan = plan_extension(**given, command=context.obj, **text.arguments(), **run.arguments())
    process = run.process(source)
    plan.read_data(source.load_tokenizer())
    model, tokenizer = source.load("cpu" if extension.shard else None)
    try:
        rows = plan.run(model, tokenizer).rows
    except OutOfTime:
        process.print(f"out of time: the same command with --resume goes on from {plan.work}")
        return
    process.print(f"{run.output}: loss {rows[0]['loss']:.3f} at step 1, {rows[-1]['loss']:.3f} at the end")
    if extension.merge_into:
        process.print(f"{extension.merge_into}: the plain checkpoint, and its heads")
