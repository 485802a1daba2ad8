"""The commands ``lococo eval ppl``, ``extended`` and ``tasks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lococo.cli import options
from lococo.cli.options import METHOD, TEXT, names_of, option
from lococo.cli.terminal import print_table, print_written

TASKS = ["race:2", "triviaqa:50", "hellaswag:10", "winogrande:70", "arc_easy:40", "arc_challenge:40"]
SUMMARY = ("method", "num_slots", "length", "ppl", "gap_ratio", "gap_low", "gap_high", "documents", "bytes_per_head")


def perplexity(
    context: typer.Context,
    source: options.ModelOptions,
    *,
    data: options.Data = None,
    text_column: options.TextColumn = "text",
    lengths: Annotated[list[int], option(TEXT, "Tokens of a window.", "--length", "--lengths")] = [2048],
    min_length: Annotated[
        int | None, option(TEXT, "Shortest texts to measure on, in tokens, for files that have no long ones.")
    ] = None,
    first: options.First = 512,
    sliding: Annotated[
        bool,
        option(
            TEXT,
            "Slide over whole documents: every token from --first on counts once, the same at every length.",
            "--sliding",
        ),
    ] = False,
    documents: options.Documents = 6,
    per_document: Annotated[
        int | None,
        option(TEXT, "Maximum number of windows per document.", "--windows-per-document", show_default="all"),
    ] = None,
    methods: options.MethodNames = "full,streaming,h2o,h2o-slot,lococo-uncalibrated",
    heads: options.ComparedHeads = [],
    num_slots: options.SlotCounts = [],
    bytes_of: Annotated[
        str | None,
        option(
            METHOD,
            "In place of --num-slots: a method and its slots, such as h2o:128, at the first --block-size. "
            "All others get as many slots as fit into the bytes of its cache.",
            metavar="METHOD:M",
        ),
    ] = None,
    block_size: Annotated[
        list[int],
        option(
            METHOD,
            "Tokens read between two compressions (B); several with --bytes-of.",
            show_default="the heads', or M, at most 512",
        ),
    ] = [],
    slot_bits: options.SlotBits = [],
    output: options.Output = Path("perplexity"),
) -> None:
    """Perplexity by length, domain, method and number of slots, with the gap ratio.

    A second result, OUTPUT_recall, has the loss on text that repeats something from further back.

    Example: lococo eval ppl --model MODEL --data texts.jsonl --heads heads/
    """
    from lococo.data.texts import Cut, read_windows
    from lococo.evaluation.equal_bytes import plan_equal_bytes
    from lococo.evaluation.losses import ALL_DOMAINS
    from lococo.evaluation.perplexity import evaluate_perplexity
    from lococo.methods import plan_runs

    cut = Cut(tuple(sorted(set(lengths))), first, documents, min_length, sliding, per_document=per_document)
    if bytes_of is None:
        if len(block_size) > 1:
            raise ValueError(f"one --block-size is compared, several with --bytes-of, got {block_size}")
        size = block_size[0] if block_size else None
        runs = plan_runs(names_of(methods), num_slots, size, heads, slot_bits=slot_bits)
    windows = read_windows(data, source.load_tokenizer(), cut, text_column)
    model, _ = source.load()
    if bytes_of is not None:
        runs = plan_equal_bytes(model, bytes_of, names_of(methods), block_size, heads, slot_bits)
    rows = evaluate_perplexity(model, windows, runs, first, output, context.obj)
    print_table([row for row in rows if row["domain"] == ALL_DOMAINS], SUMMARY)
    print_written(output)


def extended(
    context: typer.Context,
    source: options.ModelOptions,
    *,
    data: Annotated[list[str], option(TEXT, "Texts to measure on: files, folders or Hub ids.", metavar="DATA")],
    text_column: options.TextColumn = "text",
    lengths: Annotated[list[int], option(TEXT, "Tokens of a window.")] = [2048, 4096, 8192, 16384, 32768],
    first: options.First = 512,
    documents: Annotated[int, option(TEXT, "Documents per file.")] = 1,
    extensions: Annotated[
        list[Path],
        option(
            METHOD,
            "Folders written by lococo extend; each gets a row with its name.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = [],
    methods: options.MethodNames = "full,lococo-uncalibrated-slot",
    num_slots: options.NumSlots = 512,
    block_size: options.BlockSize = 512,
    output: options.Output = Path("extension"),
) -> None:
    """Perplexity of extended models by length; --methods are for the model before extension.

    Example: lococo eval extended --model MODEL --extensions longer/ --data heldout.jsonl
    """
    from lococo.data.texts import Cut, read_windows
    from lococo.evaluation.losses import ALL_DOMAINS
    from lococo.extension import evaluate
    from lococo.methods import plan_runs

    names, longer = names_of(methods), evaluate.ExtendedRun.of_all(extensions)
    runs = [*(plan_runs(names, [num_slots], block_size) if names or not longer else []), *longer]
    longest = max(lengths)
    cut = Cut(tuple(sorted(set(lengths))), first, documents, min_length=longest, sliding=True, most=longest)
    windows = read_windows(data, source.load_tokenizer(), cut, text_column)
    model, _ = source.load()
    rows = evaluate.evaluate_extended(model, windows, runs, first, output, context.obj)
    print_table([row for row in evaluate.by_length(rows) if row["domain"] == ALL_DOMAINS])
    print_written(output)


def tasks(
    context: typer.Context,
    source: options.ModelOptions,
    *,
    tasks: Annotated[
        list[str],
        option(
            TEXT,
            "Tasks, groups or tags of lm-eval, each with a number of examples, or else with its own.",
            metavar="NAME[:SHOTS]",
        ),
    ] = TASKS,
    include_path: Annotated[
        Path | None,
        option(TEXT, "Folder of task files in lm-eval's format, which may name local data.", metavar="FOLDER"),
    ] = None,
    metadata: Annotated[
        str | None,
        option(
            TEXT,
            """Passed to the tasks, such as '{"max_seq_lengths": [4096]}' for RULER; the tokenizer is added.""",
            metavar="JSON",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, option(TEXT, "Questions per task.", show_default="all", min=1)] = None,
    max_length: Annotated[
        int | None,
        option(
            TEXT,
            "Tokens of a prompt with its answer; longer prompts lose examples.",
            show_default="the model's",
            min=1,
        ),
    ] = None,
    truncate: Annotated[
        Literal["middle"] | None, option(TEXT, "Leave out the middle of questions that are too long by themselves.")
    ] = None,
    batch_size: Annotated[
        int,
        option(TEXT, "Prompts to generate answers to together; with 1, what prompts share is read only once.", min=1),
    ] = 1,
    chat: options.Chat = False,
    seed: options.Seed = 0,
    methods: options.MethodNames = "full,streaming,h2o,lococo-uncalibrated",
    heads: options.ComparedHeads = [],
    num_slots: options.SlotCounts = [],
    block_size: options.ComparedBlockSize = None,
    slot_bits: options.SlotBits = [],
    output: options.Output = Path("tasks"),
) -> None:
    """Scores in tasks of lm-eval by method, and differences from the full cache.

    Example: lococo eval tasks --model MODEL --tasks arc_easy:40 race:2 --heads heads/
    """
    from lococo.evaluation.few_shot import parse_metadata, read_tasks
    from lococo.evaluation.tasks import evaluate_tasks
    from lococo.methods import plan_runs

    runs = plan_runs(names_of(methods), num_slots, block_size, heads, slot_bits=slot_bits)
    read = read_tasks(tasks, include_path, seed, chat, parse_metadata(metadata), source.load_tokenizer)
    model, tokenizer = source.load()
    rows = evaluate_tasks(
        model,
        tokenizer,
        read,
        runs,
        output,
        context.obj,
        limit=limit,
        max_length=max_length,
        truncate=truncate,
        batch_size=batch_size,
        checkpoint=source.model,
        gguf_file=source.gguf_file,
        seed=seed,
    )
    print_table(rows)
    print_written(output)
