"""Every cell calibrated alike, then measured on the same texts; its rows and its picture."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.ablation.grid import CENTRE, Cell
from lococo.config import CONFIG_NAME
from lococo.data.texts import Window
from lococo.data.windows import DataConfig
from lococo.evaluation.losses import ALL_DOMAINS, Losses, measure_losses, references
from lococo.evaluation.perplexity import loss_row
from lococo.files import write_whole
from lococo.heads import read_heads_config
from lococo.methods import Run
from lococo.metrics import gap_interval, gap_ratio
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.journal import Journal
from lococo.results.plots import GAP, Band, Bars, Lines, Panel, Series, picture
from lococo.training.calibrate import Calibration
from lococo.training.recipes import Recipe
from lococo.training.runs import check_same_run, plain, weights_identity

Row = dict[str, Any]
RUN_NAME = "ablation.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an ablation does.

    Parameters
    ----------
    cells : sequence of Cell
        The centre first.
    methods : sequence of Run
        What they are compared with: the full cache, H2O and others, at every number of slots.
    data : DataConfig
        Text to calibrate on; each cell has a seed of its own.
    recipe : Recipe
        How cells are calibrated. One that fuses nothing has no head to train and is given its slots per head alone.
    first : int
        First token of a text that counts.
    """

    cells: Sequence[Cell]
    methods: Sequence[Run]
    data: DataConfig
    recipe: Recipe
    first: int

    def check(self, work_dir: Path) -> None:
        """Refuse what cannot be done, before a model is there.

        Raises
        ------
        ValueError, OSError, ImportError
            As in ``lococo.training.calibrate.calibrate``, or if ``work_dir`` is something else.
        """
        if work_dir.exists() and any(work_dir.iterdir()) and not (work_dir / RUN_NAME).is_file():
            raise FileExistsError(
                f"{work_dir} has no {RUN_NAME}, so it is no run to go on with: give a new --work-dir"
            )
        for cell in self.cells:
            self.calibration_of(cell, work_dir).check()

    def calibration_of(self, cell: Cell, work_dir: Path, **more: Any) -> Calibration:
        """How a cell is calibrated; more fields of ``Calibration`` may be said."""
        recipe = self.recipe
        if not cell.config.num_fused:  # no head to train
            recipe = dataclasses.replace(recipe, local=None, objective=None)
        return Calibration(
            config=cell.config,
            data=dataclasses.replace(self.data, seed=cell.seed),
            recipe=recipe,
            output=_heads(work_dir, cell),
            work_dir=work_dir / "unfinished" / cell.name,
            cache_dir=work_dir / "cache",
            recordings_dir=work_dir / f"recordings-{cell.seed}",
            resume=True,
            first=self.first,
            dtype=None,
            **more,
        )

    def description(self, model: PreTrainedModel) -> dict[str, Any]:
        """What all cells share, as plain JSON values; the grid may grow."""
        recipe = {"recipe": self.recipe, "objective": self.recipe.objective_name}
        return plain({"model": weights_identity(model), "data": self.data, **recipe, "first": self.first})


@dataclasses.dataclass(frozen=True)
class Measured:
    """A cell with its losses.

    Attributes
    ----------
    trained, untrained : Run
        With the heads that were calibrated, and as they were before; the same where nothing is fused.
    """

    cell: Cell
    trained: Run
    untrained: Run


def evaluate_ablation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    texts: Sequence[Window],
    work_dir: Path,
    command: str,
    deadline: Deadline | None = None,
) -> tuple[Losses, list[Measured]]:
    """Calibrate and measure every cell. A killed run goes on where it stopped, within a cell too.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    texts : sequence of Window
        To measure on; none of them is calibrated on.
    work_dir : Path
        Heads, figures and unfinished calibrations.

    Returns
    -------
    tuple
        Losses of the methods and of the finished cells, and these cells, all of them unless the deadline came before.

    Raises
    ------
    ValueError
        If ``work_dir`` holds a run with other settings than the grid's.
    """
    deadline = deadline or Deadline()
    description = plan.description(model)
    check_same_run(work_dir / RUN_NAME, description)
    write_whole(work_dir / RUN_NAME, json.dumps(description, indent=1))
    journal = Journal(work_dir / "measured.jsonl", deadline)
    losses: Losses = {}
    finished: list[Measured] = []
    try:
        losses |= measure_losses(model, texts, plan.methods, plan.first, journal)
        for cell in tqdm(plan.cells, desc="cells", disable=None):
            done = _calibrated(model, tokenizer, plan, cell, work_dir, command, deadline)
            torch.manual_seed(cell.seed)  # the weights that its calibration began with
            losses |= measure_losses(model, texts, [done.untrained, done.trained], plan.first, journal)
            finished.append(done)
    except OutOfTime:
        pass
    return losses, finished


def _calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    cell: Cell,
    work_dir: Path,
    command: str,
    deadline: Deadline,
) -> Measured:
    heads = _heads(work_dir, cell)
    if not (heads / CONFIG_NAME).is_file():
        plan.calibration_of(cell, work_dir, command=command, deadline=deadline).run(model, tokenizer)
    config = read_heads_config(heads)
    trained = Run("lococo", config, str(heads))
    if not config.num_fused:
        return Measured(cell, trained, trained)
    return Measured(cell, trained, Run(f"lococo-untrained-{cell.seed}", config))


def _heads(work_dir: Path, cell: Cell) -> Path:
    return work_dir / "heads" / cell.name


def finish(work_dir: Path) -> None:
    """Remove the state of a run that is complete."""
    shutil.rmtree(work_dir, ignore_errors=True)


BASELINE = "baseline"

# What the Markdown table shows; the JSON has all.
COLUMNS = (
    "varied",
    "method",
    "combination",
    "num_slots",
    "kernel_size",
    "num_sinks",
    "num_heavy",
    "num_recent",
    "num_fused",
    "seed",
    "ppl",
    "gap_ratio",
    "gap_low",
    "gap_high",
    "untrained_gap_ratio",
    "change",
    "change_low",
    "change_high",
)
MEASURES = ("nll", "ppl", "gap_ratio", "gap_low", "gap_high")


def rows_of(losses: Losses, methods: Sequence[Run], finished: Sequence[Measured], length: int) -> list[Row]:
    """One row per method and number of slots, then one per finished cell, over all texts.

    ``change`` is the gap ratio less that of the centre, at as many slots, with its interval in ``change_low`` and
    ``change_high``; ``untrained_gap_ratio`` is what the cell had before its heads learned.
    """
    if not finished:
        return []
    group = (length, ALL_DOMAINS)
    centre = finished[0].trained
    rows = [
        _row(loss_row(losses, method, group), BASELINE, method.name, method.config, None, None) for method in methods
    ]
    for each in finished:
        cell = each.cell
        measured = loss_row(losses, each.trained, group)
        row = _row(measured, cell.varied, "lococo", cell.config, cell.combination, cell.seed)
        row["untrained_gap_ratio"] = loss_row(losses, each.untrained, group)["gap_ratio"]
        if each.trained != centre and each.trained.num_slots == centre.num_slots:
            changes = gap_change(losses, each.trained, centre, group)
            row["change"], row["change_low"], row["change_high"] = changes
        rows.append(row)
    return rows


def gap_change(
    losses: Losses, run: Run, other: Run, group: tuple[int, str]
) -> tuple[float | None, float | None, float | None]:
    """How much larger a run's gap ratio is than another's at as many slots, and the interval of that.

    Both are drawn together in a resample, so that what documents do to both alike is left out. None where there is no
    gap ratio, or no interval.
    """
    full, h2o = references(losses, run, group)
    if full is None or not h2o:
        return None, None, None
    mine, theirs = losses[run][group], losses[other][group]
    change = mine.table[0] - theirs.table[0] + full.table[0]  # its gap ratio is the difference of both
    ratio = gap_ratio(mine.mean - theirs.mean + full.mean, full.mean, [each.mean for each in h2o])
    interval = gap_interval(change, full.table[0], np.stack([each.table[0] for each in h2o]), full.table[1])
    low, high = interval or (None, None)
    return ratio, low, high


def _row(measured: Row, varied: str, method: str, config: Any, combination: str | None, seed: int | None) -> Row:
    learns = config is not None and config.num_fused > 0 and combination is not None
    shares = ("num_slots", "block_size", "num_sinks", "num_heavy", "num_recent", "num_fused")
    return {
        "varied": varied,
        "method": method,
        "combination": combination,
        **{name: None if config is None else getattr(config, name) for name in shares},
        "kernel_size": config.kernel_size if learns else None,
        "seed": seed if learns else None,
        "length": measured["length"],
        **{name: measured[name] for name in MEASURES},
        "untrained_gap_ratio": None,
        **dict.fromkeys(("change", "change_low", "change_high")),
        "documents": measured["documents"],
        "tokens": measured["tokens"],
    }


OURS, TRAINED = "lococo", "#4c72b0"


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """A panel per thing that was varied: perplexity by number of slots, else the gap ratio by variant.

    Error bars are those of the difference to the centre; the band is what other seeds make of the centre.
    """
    varied = {row["varied"] for row in rows}
    panels = [_by_slots(rows)] if "num_slots" in varied else []
    if "kernel_size" in varied:
        cells = sorted(_of(rows, "kernel_size"), key=lambda row: row["kernel_size"])
        panels.append(_by_variant(rows, cells, [str(row["kernel_size"]) for row in cells], "kernel size"))
    if "combine" in varied:
        cells = sorted(_of(rows, "combine"), key=lambda row: row["num_fused"], reverse=True)
        labels = [row["combination"].replace("+", " + ") for row in cells]
        panels.append(_by_variant(rows, cells, labels, "kinds of slots"))
    if not panels:
        cells = [row for row in rows if row["varied"] != BASELINE]
        names = [f"{row['combination']}, M {row['num_slots']}, kernel {row['kernel_size']}" for row in cells]
        panels.append(_by_variant(rows, cells, names, ""))
    size = (4.6 * len(panels) + 0.4, max(panel.height if isinstance(panel, Bars) else 3.6 for panel in panels))
    write_whole(path, picture([panels], size))


def _of(rows: Sequence[Row], varied: str) -> list[Row]:
    """The centre and what differs from it in one thing."""
    return [row for row in rows if row["varied"] in (CENTRE, varied)]


def _by_slots(rows: Sequence[Row]) -> Panel:
    cells = _of(rows, "num_slots")
    ticks = {slots: str(slots) for slots in sorted({row["num_slots"] for row in cells})}
    full = [row for row in rows if row["num_slots"] is None]
    series = [Series(row["method"], [row["ppl"]], style={"color": "#333333"}) for row in full]
    for name in dict.fromkeys(row["method"] for row in rows if row["num_slots"] in ticks):
        points = [row for row in (cells if name == OURS else rows) if row["method"] == name]
        points = sorted((row for row in points if row["num_slots"] in ticks), key=lambda row: row["num_slots"])
        style = {"color": TRAINED, "linewidth": 2} if name == OURS else {"color": f"C{len(series)}", "linewidth": 1}
        series.append(Series(name, [row["ppl"] for row in points], [row["num_slots"] for row in points], style=style))
    return Lines(series, "memory size", "slots per layer and KV head (M)", "perplexity", "x", ticks)


def _by_variant(rows: Sequence[Row], cells: Sequence[Row], labels: Sequence[str], title: str) -> Panel:
    trained, untrained = (
        [GAP if row[name] is None else row[name] for row in cells] for name in ("gap_ratio", "untrained_gap_ratio")
    )
    pairs = list(zip(trained, cells, strict=True))
    low, high = (
        [value if row[end] is None else value + row[end] - row["change"] for value, row in pairs]
        for end in ("change_low", "change_high")
    )
    bars = Series("trained", trained, low=low, high=high, style={"color": TRAINED})
    found = [row["gap_ratio"] for row in _of(rows, "seed") if row["gap_ratio"] is not None]
    chance = Band(f"centre, {len(found)} seeds", min(found), max(found)) if len(found) > 1 else None
    label = "gap ratio (1 is H2O, 0 the full cache)"
    return Bars(labels, [bars], title, label, marks=Series("not trained", untrained), band=chance)
