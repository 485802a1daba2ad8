"""The commands ``lococo eval ppl``, ``extended``, ``tasks`` and ``long``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo.cli.long import add_long_command
from lococo.data.texts import PROOF_PILE, Cut, read_file, read_windows
from lococo.evaluation.perplexity import ALL_DOMAINS, evaluate_perplexity
from lococo.loading import add_model_options, load
from lococo.methods import plan_runs
from lococo.results.tables import markdown_table

TASKS = ["race:2", "triviaqa:50", "hellaswag:10", "winogrande:70", "arc_easy:40", "arc_challenge:40"]


def add_eval_commands(commands: Any) -> None:
    """Add a parser for everything that can be measured."""
    _add_perplexity(commands.add_parser("ppl", help="perplexity by length, domain, method and number of slots"))
    _add_extended(commands.add_parser("extended", help="perplexity of extended models by length"))
    _add_tasks(commands.add_parser("tasks", help="accuracy by few-shot task and method"))
    add_long_command(commands.add_parser("long", help="answers about long documents by method"))


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--data", type=Path, nargs="+", help=f".jsonl or .txt files (default: {PROOF_PILE} on the Hub)"
    )
    parser.add_argument("--methods", default="full,streaming,h2o,h2o-slot,lococo-uncalibrated")
    parser.add_argument("--num-slots", type=int, nargs="+", default=[128], help="(default: 128)")
    parser.add_argument("--heads", nargs="+", default=[], help="folders or Hub ids of trained heads to compare")
    parser.add_argument("--block-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument(
        "--length", "--lengths", dest="lengths", type=int, nargs="+", default=[2048], help="tokens (default: 2048)"
    )
    parser.add_argument(
        "--min-length",
        type=int,
        help="a file without long texts is measured on shorter ones, down to this many tokens",
    )
    parser.add_argument("--first", type=int, default=512, help="first token that counts (default: %(default)s)")
    parser.add_argument(
        "--sliding",
        action="store_true",
        help="slide over whole documents: every token from --first on counts once, at every length the same tokens",
    )
    parser.add_argument(
        "--documents", type=int, default=6, help="texts per file, with --sliding documents (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/perplexity"), help="(default: %(default)s)")
    parser.set_defaults(run=_perplexity)


def _add_extended(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--extensions", type=Path, nargs="+", default=[], help="folders written by lococo extend; each names its row"
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl or .txt files")
    parser.add_argument(
        "--methods",
        default="full,lococo-uncalibrated-slot",
        help="of the model as it came (default: %(default)s)",
    )
    parser.add_argument("--num-slots", type=int, default=512, help="of these methods (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], help="tokens")
    parser.add_argument("--first", type=int, default=512, help="first token that counts (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=1, help="documents of each file (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/extension"), help="(default: %(default)s)")
    parser.set_defaults(run=_extended)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=TASKS,
        metavar="NAME:SHOTS",
        help=f"(default: {' '.join(TASKS)})",
    )
    parser.add_argument("--data-dir", type=Path, help="folder with a folder of files per task (default: the Hub)")
    parser.add_argument("--methods", default="full,streaming,h2o,lococo-uncalibrated", help="(default: %(default)s)")
    parser.add_argument("--num-slots", type=int, nargs="+", default=[128], help="(default: 128)")
    parser.add_argument("--heads", nargs="+", default=[], help="folders or Hub ids of trained heads to compare")
    parser.add_argument("--block-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="questions per task (default: all)")
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens of a prompt with its answer; longer ones lose examples (default: model's)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of examples (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/tasks"), help="(default: %(default)s)")
    parser.set_defaults(run=_tasks)


def _perplexity(options: argparse.Namespace) -> None:
    lengths = tuple(sorted(set(options.lengths)))
    cut = Cut(lengths, options.first, options.documents, options.min_length, options.sliding)
    heads = [str(folder) for folder in options.heads]
    runs = plan_runs(options.methods.split(","), options.num_slots, options.block_size, heads)
    _check_files(options.data or [])
    model, tokenizer = load(options)
    texts = read_windows(options.data, tokenizer, cut)
    rows = evaluate_perplexity(model, texts, runs, options.first, options.output, options.command_line)
    print(markdown_table([row for row in rows if row["domain"] == ALL_DOMAINS]))


def _extended(options: argparse.Namespace) -> None:
    from lococo.extension import evaluate as extended

    lengths = Cut(tuple(sorted(set(options.lengths))), options.first, options.documents, sliding=True).lengths
    methods = [name for name in options.methods.split(",") if name]
    readers = [extended.Reader(run) for run in plan_runs(methods, [options.num_slots], options.block_size)]
    folders = [extended.Reader.of(folder) for folder in options.extensions]
    names = [reader.run.name for reader in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"--extensions must have different names, got {', '.join(names)}")
    readers += folders
    _check_files(options.data)
    model, tokenizer = load(options)
    texts = [read_file(path, tokenizer) for path in options.data]
    windows = [
        each for found in texts for each in extended.cut_alike(found, lengths, options.first, options.documents)
    ]
    rows = extended.run(model, windows, readers, options.first, options.output, options.command_line)
    print(markdown_table([row for row in extended.by_length(rows) if row["domain"] == ALL_DOMAINS]))


def _check_files(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"--data {path}: no such file")


def _tasks(options: argparse.Namespace) -> None:
    from lococo.evaluation import task_table

    for name in ("limit", "max_length"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    heads = [str(folder) for folder in options.heads]
    runs = plan_runs(options.methods.split(","), options.num_slots, options.block_size, heads)
    tasks = task_table.read_tasks(options.tasks, options.data_dir, options.seed)
    model, tokenizer = load(options)
    rows = task_table.run(
        model,
        tokenizer,
        tasks,
        runs,
        options.output,
        options.command_line,
        limit=options.limit,
        max_length=options.max_length,
        checkpoint=options.model,
        seed=options.seed,
    )
    print(markdown_table(rows))
