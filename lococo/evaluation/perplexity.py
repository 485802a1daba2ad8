"""Perplexity by length, domain and method, with the gap ratio: its rows, its files and its pictures."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from lococo.data.texts import Window
from lococo.digest import model_digest
from lococo.evaluation.equal_bytes import bytes_per_head
from lococo.evaluation.losses import ALL_DOMAINS, Losses, measure_losses, references
from lococo.evaluation.recall import write_recall
from lococo.files import write_whole
from lococo.methods import Run
from lococo.metrics import CONFIDENCE, RESAMPLES, SEED, gap_interval, gap_ratio
from lococo.results.journal import Journal
from lococo.results.plots import Bars, Lines, Series, in_rows, lines_over, method_styles, picture
from lococo.results.tables import beside, label_of, write_result

Row = dict[str, Any]


def perplexity_rows(
    model: PreTrainedModel, windows: Sequence[Window], runs: Sequence[Run], first: int, journal: Journal
) -> list[Row]:
    """One row per run, length and domain (and one for all domains).

    The gap ratio compares with H2O at the same number of slots, or at ``Run.reference_slots``, and with the better of
    its two position modes in that domain; ``gap_low`` and ``gap_high`` bound it.
    """
    losses = measure_losses(model, windows, runs, first, journal, read_once=True)
    rows = []
    for run, groups in losses.items():
        size = functools.cache(functools.partial(bytes_per_head, model, run))
        rows += [{**loss_row(losses, run, group), "bytes_per_head": size(groups[group].length)} for group in groups]
    return rows


def loss_row(losses: Losses, run: Run, group: tuple[int, str]) -> Row:
    """Perplexity and gap ratio of a run, as a row of a result."""
    measured = losses[run][group]
    nll, tokens = measured.table
    full, h2o = references(losses, run, group)
    gap, interval = None, None
    if full and h2o:
        gap = gap_ratio(measured.mean, full.mean, [each.mean for each in h2o])
        if gap is not None:
            interval = gap_interval(nll, full.table[0], np.stack([each.table[0] for each in h2o]), tokens)
    gap_low, gap_high = interval or (None, None)
    return {
        "domain": group[1],
        **run.columns,
        "length": measured.length,
        "nll": measured.mean,
        "ppl": math.exp(measured.mean),
        "gap_ratio": gap,
        "gap_low": gap_low,
        "gap_high": gap_high,
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
    }


def evaluate_perplexity(
    model: PreTrainedModel,
    windows: Sequence[Window],
    runs: Sequence[Run],
    first: int,
    output: Path,
    command: str,
) -> list[Row]:
    """Measure, write ``<output>.json``, ``.md`` and pictures, and return the rows. A killed run resumes.

    ``<output>.png`` shows domains, or methods at equal bytes if there is a gap ratio; ``<output>_slots.png`` budgets
    and ``<output>_length.png`` lengths, where there are several. ``<output>_recall`` holds what is lost on text that
    repeats from further back.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    first : int
        First token of a window that counts.
    command : str
        What made the result, as a user would type it.
    """
    journal = Journal(beside(output, ".partial.jsonl"), of=model_digest(model))
    rows = perplexity_rows(model, windows, runs, first, journal)
    how = (
        f"Each window is read from its start with an empty cache, its tokens from the {first}th on count. gap_low and "
        f"gap_high: {CONFIDENCE:.0%} interval of gap_ratio, {RESAMPLES} bootstrap resamples of the documents, seed "
        f"{SEED}. bytes_per_head: bytes of all that the cache holds by layer and KV head, in {str(model.dtype)[6:]}."
    )
    at_equal_bytes = any(each.reference_slots for each in runs)
    write_result(output, command, model.device, rows, how=how, seconds=journal.seconds, commits=journal.commits)
    if at_equal_bytes and any(row["gap_ratio"] is not None for row in rows):
        plot_at_equal_bytes(rows, beside(output, ".png"))
    elif not at_equal_bytes and any(each.name == "full" for each in runs) and len(runs) > 1:
        plot_by_domain(rows, beside(output, ".png"))
    if not at_equal_bytes and len({each.num_slots for each in runs if each.num_slots}) > 1:
        plot_by_slots(rows, beside(output, "_slots.png"))
    if len({window.length for window in windows}) > 1:
        plot_by_length(rows, beside(output, "_length.png"))
    repeats = measure_losses(model, windows, runs, first, journal, read_once=True, by_repeat=True)
    write_recall(repeats, beside(output, "_recall"), command, model.device, journal.commits)
    journal.finish()
    return rows


def plot_by_domain(rows: Sequence[Row], path: Path) -> None:
    """Loss over the full cache by domain and method, at the smallest number of slots and the largest length."""
    rows = _longest(rows)
    slots = min(row["num_slots"] for row in rows if row["num_slots"])
    shown = [row for row in rows if row["num_slots"] == slots]
    nll = {(row["domain"], row["method"]): row["nll"] for row in rows if row["num_slots"] in (None, slots)}
    domains = _domains(shown)
    lost = [
        Series(method, [nll[domain, method] - nll[domain, "full"] for domain in domains])
        for method in dict.fromkeys(row["method"] for row in shown)
    ]
    title = (
        f"{slots} slots, texts of {max(row['length'] for row in shown)} tokens; lower is better, 0 is the full cache"
    )
    panel = Bars(domains, lost, title, "loss over the full cache (nats per token)")
    write_whole(path, picture([[panel]], (8, panel.height)))


def plot_at_equal_bytes(rows: Sequence[Row], path: Path) -> None:
    """Gap ratio of every method over all domains, with its interval, at the largest length."""
    shown = [row for row in _longest(rows) if row["domain"] == ALL_DOMAINS and row["gap_ratio"] is not None]
    labels = [f"{label_of(row)}: {row['bytes_per_head'] / 1024:.1f} KiB" for row in shown]
    low, high = (
        [row["gap_ratio"] if row[name] is None else row[name] for row in shown] for name in ("gap_low", "gap_high")
    )
    ratios = Series("", [row["gap_ratio"] for row in shown], low=low, high=high)
    panel = Bars(labels, [ratios], "bytes by layer and KV head; 0 is the full cache, 1 is H2O", "gap ratio")
    write_whole(path, picture([[panel]], (8, panel.height)))


def plot_by_slots(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against the number of slots, a panel per domain and a line per method, at the largest length."""
    _plot_by(_longest(rows), "num_slots", "slots per layer and KV head (M)", _method, path)


def plot_by_length(rows: Sequence[Row], path: Path, cut: float = math.inf) -> None:
    """Perplexity against the length, a panel per domain and a line per method and number of slots.

    A panel ends at ``cut`` times its median, and says so, so that one line that goes far off hides no others.
    """
    several = len({row["num_slots"] for row in rows if row["num_slots"]}) > 1
    _plot_by(rows, "length", "tokens in a text", label_of if several else _method, path, cut)


def _method(row: Row) -> str:
    return row["method"]


def _plot_by(
    rows: Sequence[Row], x: str, label: str, name: Callable[[Row], str], path: Path, cut: float = math.inf
) -> None:
    domains, styles = _domains(rows), method_styles(rows, x, name)

    def panel(domain: str) -> Lines:
        found = [row for row in rows if row["domain"] == domain]
        top = cut * statistics.median(row["ppl"] for row in found)
        is_cut = max(row["ppl"] for row in found) > top
        title = f"{domain}, cut at the top" if is_cut else domain
        return lines_over(found, x, "ppl", styles, name, title=title, top=top if is_cut else None)

    columns = min(len(domains), 4)
    grid = in_rows(list(map(panel, domains)), columns)
    size = (max(6, 3.2 * columns), 2.8 * len(grid) + 0.8)
    write_whole(path, picture(grid, size, xlabel=label, ylabel="perplexity (lower is better)"))


def _domains(rows: Sequence[Row]) -> list[str]:
    """In order, the one for all of them last."""
    return sorted(dict.fromkeys(row["domain"] for row in rows), key=lambda domain: domain == ALL_DOMAINS)


def _longest(rows: Sequence[Row]) -> list[Row]:
    """The rows of every domain's largest length."""
    largest = {domain: max(row["length"] for row in rows if row["domain"] == domain) for domain in _domains(rows)}
    return [row for row in rows if row["length"] == largest[row["domain"]]]
