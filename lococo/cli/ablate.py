"""The command ``lococo eval ablate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lococo.ablation.grid import Axes
from lococo.config import LoCoCoConfig
from lococo.data.texts import PROOF_PILE, Cut, read_windows
from lococo.loading import add_model_options, load
from lococo.methods import plan_runs
from lococo.results.deadline import Deadline
from lococo.results.tables import beside, markdown_table, write_result

NEEDED = ("full", "h2o")


def add_ablate_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model_options(parser)
    grid = parser.add_argument_group("what is varied, one thing at a time")
    grid.add_argument(
        "--centre",
        nargs=3,
        default=["128", "21", "sinks+heavy+recent+fused"],
        metavar=("SLOTS", "KERNEL", "KINDS"),
        help="what is not varied (default: 128 21 sinks+heavy+recent+fused)",
    )
    grid.add_argument("--num-slots", type=int, nargs="+", default=[], help="numbers of slots to try")
    grid.add_argument("--kernel-size", type=int, nargs="+", default=[], help="odd numbers to try")
    grid.add_argument(
        "--combine",
        nargs="+",
        default=[],
        metavar="KINDS",
        help="kinds of slots to try, sinks+heavy+fused for instance: each has its share in the default preset or, as "
        "in heavy:32, a number at the centre; fused, else heavy, else recent takes what is left",
    )
    grid.add_argument("--product", action="store_true", help="every value with every other")
    grid.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="the first is every cell's, the centre is calibrated with the others too: what is chance? (default: 0)",
    )
    how = parser.add_argument_group("how every cell is calibrated")
    how.add_argument(
        "--dataset", nargs="+", help="Hub ids, files or folders (default: togethercomputer/RedPajama-Data-1T-Sample)"
    )
    how.add_argument("--windows", type=int, help="training windows (default: as many as are read)")
    how.add_argument("--objective", choices=["distill", "next-token", "local"], default="distill")
    how.add_argument("--steps", type=int, default=50, help="with local: per layer (default: %(default)s)")
    how.add_argument("--windows-per-step", type=int, default=1, help="not with local (default: %(default)s)")
    how.add_argument("--learning-rate", type=float, help="not with local (default: as in lococo calibrate)")
    how.add_argument(
        "--budget-texts",
        type=int,
        default=0,
        help="texts for the slots of each KV head; 0: the same for all, as in the paper (default: %(default)s)",
    )
    text = parser.add_argument_group("how they are measured")
    text.add_argument("--data", type=Path, nargs="+", help=f".jsonl or .txt files (default: {PROOF_PILE} on the Hub)")
    text.add_argument("--methods", default="full,streaming,h2o,h2o-slot", help="of comparison (default: %(default)s)")
    text.add_argument("--block-size", type=int, default=128, help="of all cells and methods (default: %(default)s)")
    text.add_argument("--length", type=int, default=2048, help="tokens, in training too (default: %(default)s)")
    text.add_argument("--first", type=int, default=512, help="first token that counts (default: %(default)s)")
    text.add_argument("--documents", type=int, default=6, help="texts per file (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, help="seconds after which it ends; the same command goes on")
    parser.add_argument("--work-dir", type=Path, help="state of the run (default: OUTPUT.work)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/ablation"), help="(default: %(default)s)")
    parser.set_defaults(run=_ablate)


def _axes(options: argparse.Namespace, base: LoCoCoConfig) -> Axes:
    slots, kernel, combination = options.centre
    if not (slots.isdecimal() and kernel.isdecimal()):
        raise ValueError(f"--centre is a number of slots, a kernel size and kinds, got {' '.join(options.centre)}")
    return Axes(
        base,
        int(slots),
        int(kernel),
        combination,
        slots=options.num_slots,
        kernels=options.kernel_size,
        combinations=options.combine,
        seeds=options.seeds,
    )


def _check_texts(options: argparse.Namespace) -> None:
    from lococo.data.documents import local_files

    learned = {path.resolve() for source in options.dataset or [] for path in local_files(source) or []}
    for path in options.data or []:
        if not path.is_file():
            raise FileNotFoundError(f"--data {path}: no such file")
        if path.resolve() in learned:
            raise ValueError(f"{path} is in --data and in --dataset: heads are not measured on what they learn from")


def _recipe(options: argparse.Namespace) -> tuple[LoCoCoConfig, Any]:
    """What all cells have in common, and how they are calibrated."""
    from lococo.training.recipes import adjusted, default_recipe

    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    is_local = options.objective == "local"
    if is_local and options.learning_rate is not None:
        raise ValueError("--learning-rate is that of training from end to end, not of --objective local")
    base, recipe = default_recipe(1, options.block_size)
    changes: dict[str, Any] = dict(
        objective="none" if is_local else options.objective,
        steps=None if is_local else options.steps,
        local_steps=options.steps if is_local else None,
        local_texts=options.windows if is_local else None,
        measure_every=max(1, options.steps // 4),  # and as often the state is saved
        backprop_tokens=None,
        **{name: getattr(options, name) for name in ("windows_per_step", "learning_rate", "budget_texts")},
    )
    return base, adjusted(recipe, **changes)


def _plan(options: argparse.Namespace) -> Any:
    """The plan, checked before a model is loaded."""
    from lococo.ablation.run import Plan
    from lococo.data.windows import DEFAULT_DATASET, DataConfig

    base, recipe = _recipe(options)
    axes = _axes(options, base)
    cells = axes.product() if options.product else axes.one_at_a_time()
    if len(cells) < 2:
        raise ValueError("nothing is varied: give values for --num-slots, --kernel-size, --combine or --seeds")
    names = options.methods.split(",")
    if missing := [name for name in NEEDED if name not in names]:
        raise ValueError(f"--methods needs {' and '.join(NEEDED)} for the gap ratio, {', '.join(missing)} is missing")
    slots = sorted({cell.config.num_slots for cell in cells})
    data = DataConfig(
        sources=tuple(options.dataset or [DEFAULT_DATASET]),
        length=options.length,
        num_windows=recipe.windows_needed if options.windows is None else options.windows,
        num_heldout=1,  # calibration looks at it on its way; cells are measured on --data
    )
    return Plan(cells, plan_runs(names, slots, options.block_size), data, recipe, options.first)


def _ablate(options: argparse.Namespace) -> None:
    deadline = Deadline(options.time_limit)
    cut = Cut((options.length,), options.first, options.documents)
    _check_texts(options)
    plan = _plan(options)
    work_dir = options.work_dir or beside(options.output, ".work")
    plan.check(work_dir)

    from lococo.ablation.pictures import plot_rows
    from lococo.ablation.run import finish, run
    from lococo.ablation.table import COLUMNS, rows_of

    model, tokenizer = load(options)
    texts = read_windows(options.data, tokenizer, cut)
    losses, finished = run(model, tokenizer, plan, texts, work_dir, options.command_line, deadline)
    rows = rows_of(losses, plan.methods, finished, options.length)
    remaining = plan.cells[len(finished) :]
    if rows:
        how, left = _how(options, plan), [cell.name for cell in remaining]
        write_result(options.output, options.command_line, model.device, rows, COLUMNS, how=how, not_measured=left)
        plot_rows(rows, beside(options.output, ".png"))
        print(markdown_table([{name: row[name] for name in COLUMNS} for row in rows]))
    if remaining:
        print(f"{options.output}: no time for {len(remaining)} cells; the same command goes on", file=sys.stderr)
    else:
        finish(work_dir)


def _how(options: argparse.Namespace, plan: Any) -> str:
    slots, kernel, combination = options.centre
    budget = (
        f"slots per KV head found on {options.budget_texts} texts, on average as many as said"
        if options.budget_texts
        else "the same slots for every KV head"
    )
    return (
        f"The centre is M={slots}, kernel {kernel}, {combination}; `varied` says what differs from it. Every cell's "
        f"heads have been calibrated alike ({options.objective}, {options.steps} steps on at most "
        f"{plan.data.num_windows} windows of {options.length} tokens, {budget}), then measured on other texts. "
        "`change` is the gap ratio less the centre's, low and high bound 95 % of its bootstrap over documents, drawn "
        "for both alike. Where `varied` is seed the centre was calibrated once more: what chance adds to that."
    )
