"""The command ``lococo calibrate``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from lococo.cli import options
from lococo.cli.options import METHOD, NUM_SLOTS, TEXT, TRAINING, option
from lococo.cli.terminal import print_progress, ratio_text

RECIPE = "as the recipe says"


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """Arguments of ``lococo.calibrate``."""

    num_slots: options.NumSlots = NUM_SLOTS
    block_size: options.OwnBlockSize = None
    slot_bits: Annotated[
        str, option(METHOD, "Bits of keys and values: 16, 8 or 4, or of both, such as 8-4.", metavar="BITS")
    ] = "16"
    recipe: Annotated[
        str,
        option(
            METHOD,
            "default: learned scores and slots per head; blend: trained blends, too; paper: the paper's settings.",
            metavar="default|blend|paper",
        ),
    ] = "default"
    length: Annotated[int, option(TEXT, "Tokens per window.")] = 4096
    first: Annotated[
        int | None,
        option(
            TEXT,
            "First token of a window that counts for the gap ratio.",
            show_default="512, or half the length if that is less",
        ),
    ] = None
    num_heldout: Annotated[int, option(TEXT, "Windows to measure the gap ratio on.", "--heldout")] = 8
    heldout_share: Annotated[
        float | None, option(TEXT, "Share of the documents to hold out.", show_default="at least one document")
    ] = None
    score_texts: Annotated[
        int | None, option(TRAINING, "Texts to learn scores from; 0: keep the untrained score.", show_default=RECIPE)
    ] = None
    scores_from: Annotated[
        str | None,
        option(
            TRAINING,
            "Heads whose learned scores are reused; any number of slots.",
            metavar="FOLDER",
            show_default="learn new ones",
        ),
    ] = None
    objective: Annotated[
        str | None, option(TRAINING, "distill, next-token, or none for no end-to-end training.", show_default=RECIPE)
    ] = None
    steps: Annotated[int | None, option(TRAINING, "Steps of end-to-end training.", show_default=RECIPE)] = None
    windows_per_step: Annotated[int | None, option(TRAINING, "Windows in the global batch.", show_default=RECIPE)] = (
        None
    )
    learning_rate: Annotated[
        float | None, option(TRAINING, "Learning rate of the convolutions.", show_default=RECIPE)
    ] = None
    backprop_tokens: Annotated[
        int | None, option(TRAINING, "Tokens to back-propagate through; 0: the whole window.", show_default=RECIPE)
    ] = None
    budget_texts: Annotated[
        int | None,
        option(TRAINING, "Texts for finding the slots of each KV head; 0: the same for all.", show_default=RECIPE),
    ] = None
    local_steps: Annotated[
        int | None,
        option(TRAINING, "Layer-local training before it, in texts per layer; 0: none.", show_default=RECIPE),
    ] = None
    local_texts: Annotated[
        int | None, option(TRAINING, "Texts recorded for layer-local training.", show_default=RECIPE)
    ] = None
    measure_every: Annotated[
        int | None, option(TRAINING, "Steps between two measurements of the gap ratio.", show_default=RECIPE)
    ] = None


def calibrate(
    context: typer.Context,
    source: options.ModelOptions,
    run: options.TrainingRunOptions,
    text: options.DatasetOptions,
    calibration: CalibrationOptions,
) -> None:
    """Train heads for a model, on RedPajama or your own texts.

    Example: lococo calibrate --model MODEL --num-slots 256 --dataset texts.jsonl --output heads/
    """
    from lococo.methods import parse_bits
    from lococo.training.calibrate import plan_calibration

    plan = plan_calibration(
        **{**dataclasses.asdict(calibration), "slot_bits": parse_bits(calibration.slot_bits)},
        command=context.obj,
        on_progress=print_progress,
        **text.arguments(),
        **run.arguments(),
    )
    process = run.process(source)
    plan.read_data(source.load_tokenizer())
    made = plan.run(*source.load())
    process.print(f"{made.folder}: gap ratio {ratio_text(made.gap_ratio)} (0 is the full cache, 1 is H2O)")
