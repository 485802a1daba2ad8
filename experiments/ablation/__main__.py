"""The command ``python -m experiments.ablation``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lococo.cli import options
from lococo.cli.main import run
from lococo.cli.options import TEXT, TRAINING, names_of, option
from lococo.cli.parsing import add_command, command_group
from lococo.cli.terminal import print_table, print_written

VARIED = "What is varied, one thing at a time"
SUMMARY = (
    "varied",
    "method",
    "combination",
    "num_slots",
    "kernel_size",
    "seed",
    "ppl",
    "gap_ratio",
    "untrained_gap_ratio",
    "change",
    "change_low",
    "change_high",
)


def ablation(
    context: typer.Context,
    source: options.ModelOptions,
    *,
    centre: Annotated[tuple[int, int, str], option(VARIED, "What is not varied.", metavar="SLOTS KERNEL KINDS")] = (
        128,
        21,
        "sinks+heavy+recent+fused",
    ),
    num_slots: Annotated[list[int], option(VARIED, "Numbers of slots to try.", show_default=False)] = [],
    kernel_size: Annotated[list[int], option(VARIED, "Odd numbers to try.", show_default=False)] = [],
    combine: Annotated[
        list[str],
        option(
            VARIED,
            "Kinds of slots to try, sinks+heavy+fused for instance: each has its share in the default preset or, as "
            "in heavy:32, a number at the centre; fused, else heavy, else recent takes what is left.",
            metavar="KINDS",
            show_default=False,
        ),
    ] = [],
    product: Annotated[bool, option(VARIED, "Every value with every other.", "--product")] = False,
    seeds: Annotated[
        list[int],
        option(VARIED, "The first is every cell's, the centre is calibrated with the others too: what is chance?"),
    ] = [0],
    dataset: Annotated[
        list[str] | None,
        option(
            TRAINING,
            "Texts to calibrate on: files, folders or Hub ids.",
            metavar="DATA",
            show_default="togethercomputer/RedPajama-Data-1T-Sample",
        ),
    ] = None,
    windows: Annotated[int | None, option(TRAINING, "Training windows.", show_default="as many as are read")] = None,
    objective: Annotated[str, option(TRAINING, "distill, next-token or local.")] = "distill",
    steps: Annotated[int, option(TRAINING, "With local: per layer.", min=1)] = 50,
    windows_per_step: Annotated[int, option(TRAINING, "Not with local.")] = 1,
    learning_rate: Annotated[
        float | None, option(TRAINING, "Not with local.", show_default="as in lococo calibrate")
    ] = None,
    budget_texts: Annotated[
        int, option(TRAINING, "Texts for the slots of each KV head; 0: the same for all, as in the paper.")
    ] = 0,
    data: options.Data = None,
    text_column: options.TextColumn = "text",
    length: Annotated[int, option(TEXT, "Tokens of a window, in training too.")] = 2048,
    first: Annotated[int, option(TEXT, "First token that counts.")] = 512,
    documents: Annotated[int, option(TEXT, "Texts per file.")] = 6,
    methods: options.MethodNames = "full,streaming,h2o,h2o-slot",
    block_size: options.BlockSize = 128,
    time_limit: options.TimeLimit = None,
    work_dir: options.WorkDir = None,
    output: options.Output = Path("ablation"),
) -> None:
    """Memory size, kernel size and kinds of slots compared, each with heads calibrated for it.

    Example: python -m experiments.ablation --model MODEL --dataset train.jsonl --data heldout.jsonl --kernel-size 3 7
    """
    from experiments.ablation.plan import describe, plan_ablation
    from experiments.ablation.run import COLUMNS, evaluate_ablation, finish, plot_rows, rows_of
    from lococo.data.texts import Cut, read_windows
    from lococo.results.deadline import Deadline
    from lococo.results.tables import beside, write_result

    deadline = Deadline(time_limit)
    cut = Cut((length,), first, documents)
    plan = plan_ablation(
        centre=centre,
        num_slots=num_slots,
        kernel_size=kernel_size,
        combine=combine,
        seeds=seeds,
        product=product,
        dataset=dataset,
        data=data,
        windows=windows,
        objective=objective,
        steps=steps,
        windows_per_step=windows_per_step,
        learning_rate=learning_rate,
        budget_texts=budget_texts,
        methods=names_of(methods),
        block_size=block_size,
        length=length,
        first=first,
    )
    state = work_dir or beside(output, ".work")
    plan.check(state)
    texts = read_windows(data, source.load_tokenizer(), cut, text_column)
    model, tokenizer = source.load()
    losses, finished = evaluate_ablation(model, tokenizer, plan, texts, state, context.obj, deadline)
    rows = rows_of(losses, plan.methods, finished, length)
    remaining = [cell.name for cell in plan.cells[len(finished) :]]
    if rows:
        write_result(
            output, context.obj, model.device, rows, columns=COLUMNS, how=describe(plan), not_measured=remaining
        )
        plot_rows(rows, beside(output, ".png"))
        print_table(rows, SUMMARY)
        print_written(output)
    if remaining:
        print(f"{output}: no time for {len(remaining)} cells; the same command goes on", file=sys.stderr)
    else:
        finish(state)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends with one line on stderr and status 2."""
    app = command_group("")
    add_command(app, "ablation", ablation)
    return run(app, "python -m experiments.ablation", arguments)


if __name__ == "__main__":
    sys.exit(main())
