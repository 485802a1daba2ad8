"""The command ``lococo calibrate``."""

from __future__ import annotations

import argparse
from typing import Annotated, Any

import typer

from lococo.cli.options import (
    METHOD,
    NUM_SLOTS,
    TEXT,
    TRAINING,
    DatasetOptions,
    ModelOptions,
    NumSlots,
    OwnBlockSize,
    TrainingRunOptions,
    block_of,
    option,
)

RECIPE = "as the recipe says"


def calibrate(
    context: typer.Context,
    source: ModelOptions,
    run: TrainingRunOptions,
    text: DatasetOptions,
    *,
    num_slots: NumSlots = NUM_SLOTS,
    block_size: OwnBlockSize = None,
    recipe: Annotated[str, option(METHOD, "default, or the paper's.", metavar="default|paper")] = "default",
    length: Annotated[int, option(TEXT, "Tokens per window.")] = 4096,
    first: Annotated[int, option(TEXT, "First token that is measured.")] = 512,
    heldout: Annotated[int, option(TEXT, "Windows to measure on.")] = 8,
    heldout_share: Annotated[
        float | None, option(TEXT, "Share of the documents that is held out.", show_default="at least one document")
    ] = None,
    objective: Annotated[
        str | None, option(TRAINING, "distill, next-token, or none: no end-to-end training.", show_default=RECIPE)
    ] = None,
    steps: Annotated[int | None, option(TRAINING, "Of end-to-end training.", show_default=RECIPE)] = None,
    windows_per_step: Annotated[int | None, option(TRAINING, "Global batch.", show_default=RECIPE)] = None,
    learning_rate: Annotated[float | None, option(TRAINING, "Of the convolutions.", show_default=RECIPE)] = None,
    backprop_tokens: Annotated[
        int | None, option(TRAINING, "Length of back-propagation; 0: the whole window.", show_default=RECIPE)
    ] = None,
    budget_texts: Annotated[
        int | None,
        option(TRAINING, "Texts for the slots of each KV head; 0: the same for all.", show_default=RECIPE),
    ] = None,
    local_steps: Annotated[
        int | None,
        option(TRAINING, "Layer-local training first, so many texts per layer; 0: none.", show_default=RECIPE),
    ] = None,
    local_texts: Annotated[int | None, option(TRAINING, "Texts recorded for it.", show_default=RECIPE)] = None,
    measure_every: Annotated[
        int | None, option(TRAINING, "Steps between two looks at the gap ratio.", show_default=RECIPE)
    ] = None,
) -> None:
    """Train heads for a model, on RedPajama or your own texts.

    Example: lococo calibrate --model MODEL --num-slots 256 --dataset texts.jsonl --output heads/
    """
    from lococo.data.windows import DEFAULT_DATASET, DataConfig, prepare
    from lococo.training import calibrate as calibration
    from lococo.training.recipe import RECIPES, adjusted

    if recipe not in RECIPES:
        raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    config, chosen = RECIPES[recipe](num_slots, block_of(num_slots, block_size))
    chosen = adjusted(
        chosen,
        argparse.Namespace(
            objective=objective,
            steps=steps,
            windows_per_step=windows_per_step,
            learning_rate=learning_rate,
            backprop_tokens=backprop_tokens,
            budget_texts=budget_texts,
            local_steps=local_steps,
            local_texts=local_texts,
            measure_every=measure_every,
        ),
    )
    data = DataConfig(
        sources=tuple(text.dataset or [DEFAULT_DATASET]),
        length=length,
        num_windows=chosen.windows_needed if text.windows is None else text.windows,
        num_heldout=heldout,
        boundaries=text.boundaries,  # type: ignore[arg-type]
        text_column=text.text_column,
        seed=text.seed,
        heldout_share=0.05 if heldout_share is None else heldout_share,
    )
    state: dict[str, Any] = {"work_dir": run.work_folder, "resume": run.resume, "first": first}
    cache_dir = run.cache_dir.expanduser()
    calibration.check_calibration(config, data, chosen, run.output, **state)
    training_arguments = run.training_arguments
    process = calibration.this_process(on_cpu=source.device == "cpu")  # "cuda" is its own GPU from here on
    with process.main_process_first():
        prepare(data, source.load_tokenizer(), cache_dir / "tokens")  # what is wrong with the data is said at once
    model, tokenizer = source.load()
    rows = calibration.calibrate(
        model,
        tokenizer,
        config,
        data,
        chosen,
        run.output,
        cache_dir=cache_dir,
        training_arguments=training_arguments,
        command=context.obj,
        **state,
    )
    if process.is_main_process:
        last = [row for row in rows if "gap_ratio" in row][-1]
        ratio = "-" if last["gap_ratio"] is None else f"{last['gap_ratio']:.3f}"
        print(f"{run.output}: gap ratio {ratio} (0 is the full cache, 1 is H2O, - where H2O loses nothing)")
