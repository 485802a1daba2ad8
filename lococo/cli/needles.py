"""The command ``lococo eval needles``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lococo.cli import options
from lococo.cli.options import TEXT, names_of, option
from lococo.cli.terminal import print_table, print_written


def needles(
    context: typer.Context,
    source: options.ModelOptions,
    *,
    data: Annotated[
        list[str],
        option(TEXT, "Texts to hide needles in: files, folders or Hub ids.", metavar="DATA", show_default="made up"),
    ] = [],
    text_column: options.TextColumn = "text",
    lengths: Annotated[list[int], option(TEXT, "Tokens of prompt and answer together.")] = [4096],
    depths: Annotated[int, option(TEXT, "Number of places of the needle, from start to end.")] = 11,
    items: Annotated[int, option(TEXT, "Needles for each length and depth.")] = 1,
    distractors: Annotated[int, option(TEXT, "Other needles in the text, which are not asked for.")] = 0,
    chat: options.Chat = False,
    seed: options.Seed = 0,
    methods: options.MethodNames = "full,streaming,h2o,lococo-uncalibrated",
    heads: options.ComparedHeads = [],
    num_slots: options.SlotCounts = [],
    block_size: options.ComparedBlockSize = None,
    slot_bits: options.SlotBits = [],
    output: options.Output = Path("needles"),
) -> None:
    """Find numbers hidden in long texts, by depth and length.

    Example: lococo eval needles --model MODEL --lengths 4096 16384 --heads heads/
    """
    from lococo.data.documents import documents
    from lococo.evaluation.needles import Filler, by_length, evaluate_needles, make_needles
    from lococo.methods import plan_runs

    runs = plan_runs(names_of(methods), num_slots, block_size, heads, slot_bits=slot_bits)
    asked = make_needles(
        source.load_tokenizer(),
        Filler(document["text"] for document in documents(data, text_column, in_order=True)),
        lengths,
        depths=depths,
        items=items,
        distractors=distractors,
        chat=chat,
        seed=seed,
    )
    model, tokenizer = source.load()
    rows = evaluate_needles(model, tokenizer, asked, runs, output, context.obj)
    print_table(by_length(rows))
    print_written(output)
