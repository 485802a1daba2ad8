"""LoCoCo and kvpress side by side: the same texts, the same M entries per layer and KV head, in one process.

python examples/kvpress_side_by_side.py --model folder --data texts.jsonl --heads calibrated-heads

Needs kvpress (``make side-by-side`` makes an environment for it). Every window of ``--length`` tokens is read; its
last block is predicted from M entries per layer and KV head whatever the method. What a method holds until then
differs and stands in the column ``reads``. Writes docs/results/side_by_side.{json,md,png}; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from kvpress_presses import BLOCK, DENSE, READING, PressRow, make_kvzip, nlls_of_presses, press_rows
from tqdm import tqdm

from lococo.evaluation.gap import CONFIDENCE, RESAMPLES, SEED, gap_interval, gap_ratio
from lococo.evaluation.likelihood import token_nlls
from lococo.evaluation.methods import Run, as_method, plan_runs
from lococo.evaluation.results import Journal, beside, markdown_table, write_result
from lococo.evaluation.texts import Cut, Window, read_windows
from lococo.loading import add_model_options, load

KVPRESS = "0.5.5"
BLOCK_SIZE = 128
METHODS = ("full", "streaming", "h2o", "lococo-uncalibrated")
FULL, REFERENCE, OURS = "full", "h2o", "lococo"

MEASURED = ("nll", "ppl", "gap_ratio", "gap_low", "gap_high", "minus_lococo", "low", "high", "tokens")

# By method and window: loss summed over its last block ("last") and, where every block was predicted from what is left
# of those before, over all tokens from the second block on ("all").
Nlls = dict[str, list[dict[str, float]]]


def one_after_another(windows: Sequence[Window]) -> list[Window]:
    """The first window of every domain, then the second of every domain, ..., so that a part of them is balanced."""
    places: dict[str, int] = {}
    ranked = []
    for window in windows:
        places[window.domain] = places.get(window.domain, -1) + 1
        ranked.append((places[window.domain], window))
    return [window for _, window in sorted(ranked, key=lambda pair: pair[0])]


def sums(nlls: torch.Tensor, block_size: int) -> dict[str, float]:
    """Loss of a window's last block, and with all tokens but the first given, of those from the second block on."""
    found = {"last": nlls[-block_size:].double().sum().item()}
    if len(nlls) > block_size:
        found["all"] = nlls[block_size:].double().sum().item()
    return found


def losses(model: Any, run: Run, ids: torch.Tensor) -> dict[str, float]:
    """Loss of a method of ours on one window."""
    torch.manual_seed(0)
    with as_method(model, run.config, run.heads):
        return sums(token_nlls(model, ids), BLOCK_SIZE)


def measure(
    model: Any,
    name_or_path: str,
    windows: Sequence[Window],
    runs: Sequence[Run],
    presses: Sequence[PressRow],
    kvzip: Any,
    journal: Journal,
) -> Nlls:
    """Loss of every method on every window, window by window."""
    num_slots = next(run.num_slots for run in runs if run.num_slots)
    found: Nlls = {}
    for window in tqdm(windows, disable=None):
        digest = hashlib.sha256(repr(window.ids.tolist()).encode()).hexdigest()
        for run in runs:
            key = (name_or_path, run.name, run.identity(), digest)
            row = journal.measure(key, functools.partial(losses, model, run, window.ids))
            found.setdefault(run.name, []).append(row)
        of_presses = functools.partial(losses_of_presses, model, presses, kvzip, window.ids, num_slots)
        for name, row in journal.measure((name_or_path, "kvpress", KVPRESS, num_slots, digest), of_presses).items():
            found.setdefault(name, []).append(row)
    return found


def losses_of_presses(
    model: Any, presses: Sequence[PressRow], kvzip: Any, ids: torch.Tensor, num_slots: int
) -> dict[str, dict[str, float]]:
    """Loss of every press on one window."""
    nlls = nlls_of_presses(model, presses, kvzip, ids, BLOCK_SIZE, num_slots)
    return {name: sums(each, BLOCK_SIZE) for name, each in nlls.items()}


def by_document(windows: Sequence[Window], values: Sequence[float]) -> np.ndarray:
    """(documents,) sums over the windows of each document."""
    documents: dict[tuple[str, str], float] = {}
    for window, value in zip(windows, values, strict=True):
        key = (window.domain, window.document)
        documents[key] = documents.get(key, 0.0) + value
    return np.array(list(documents.values()))


def difference_interval(mine: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Confidence interval of a difference in loss per token, by the percentile bootstrap over documents."""
    count = len(tokens)
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    differences = draws @ (mine - other) / (draws @ tokens)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def columns(windows: Sequence[Window], found: Nlls, name: str, part: str) -> dict[str, float | int | None]:
    """What is said of a method's loss on a part of every window: ``last`` or ``all``."""
    if part not in found[name][0]:
        return dict.fromkeys(
            ("nll", "ppl", "gap_ratio", "gap_low", "gap_high", "minus_lococo", "low", "high", "tokens")
        )
    per_window = {"last": BLOCK_SIZE, "all": windows[0].ids.shape[1] - 1 - BLOCK_SIZE}[part]
    tokens = by_document(windows, [per_window] * len(windows))
    mine, full, reference, ours = (
        by_document(windows, [each[part] for each in found[each_name]]) for each_name in (name, FULL, REFERENCE, OURS)
    )
    nll, full_nll, reference_nll = (each.sum() / tokens.sum() for each in (mine, full, reference))
    interval = gap_interval(mine, full, reference[None], tokens) or (None, None)
    low, high = difference_interval(mine, ours, tokens)
    return {
        "nll": float(nll),
        "ppl": math.exp(nll),
        "gap_ratio": gap_ratio(nll, full_nll, [reference_nll]),
        "gap_low": interval[0],
        "gap_high": interval[1],
        "minus_lococo": float((mine - ours).sum() / tokens.sum()),
        "low": low,
        "high": high,
        "tokens": int(tokens.sum()),
    }


def join(windows: Sequence[Window], found: Nlls, reads: Mapping[str, str], num_slots: int) -> list[dict[str, Any]]:
    """One row per method, in the order of how they read and, within that, of their loss on the last block."""
    rows = []
    for name in found:
        last, every = (columns(windows, found, name, part) for part in ("last", "all"))
        by_domain: dict[str, list[float]] = {}
        for window, each in zip(windows, found[name], strict=True):
            by_domain.setdefault(window.domain, []).append(each["last"] / BLOCK_SIZE)
        rows.append(
            {
                "method": name,
                "reads": reads[name],
                "num_slots": None if name == FULL else num_slots,
                **last,
                **{f"{column}_all": value for column, value in every.items()},
                "windows": len(windows),
                "tokens_read": sum(window.ids.shape[1] - 1 for window in windows),
                **{f"nll_{domain}": sum(values) / len(values) for domain, values in sorted(by_domain.items())},
            }
        )
    order = list(dict.fromkeys(reads.values()))
    return sorted(rows, key=lambda row: (order.index(row["reads"]), row["nll"]))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Gap ratio of the last block by method, with its interval, coloured by how the text was read."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["method"] != FULL and row["gap_ratio"] is not None]
    figure = Figure(figsize=(9, 0.3 * len(shown) + 1.6), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(row["reads"] for row in shown))
    for index, group in enumerate(groups):
        places = [place for place, row in enumerate(shown) if row["reads"] == group]
        ratios = [shown[place]["gap_ratio"] for place in places]
        axes.barh(places, ratios, color=f"C{index}", label=group)
        for place, ratio in zip(places, ratios, strict=True):
            axes.annotate(f"{ratio:.2f}", (ratio, place), xytext=(3, -3), textcoords="offset points", fontsize=7)
    for place, row in enumerate(shown):
        if row["gap_low"] is not None:
            axes.plot([row["gap_low"], row["gap_high"]], [place + 0.25] * 2, "k-", linewidth=1)
    limit = 2.2
    axes.set(xlim=(0, limit), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [row["method"] for row in shown], fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel(f"gap ratio: 0 is the full cache, 1 is {REFERENCE}; what is longer than {limit} is cut")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(groups))
    figure.savefig(path, dpi=110)


def how(length: int, num_slots: int, windows: Sequence[Window]) -> str:
    """How the figures came about."""
    versions = f"kvpress {KVPRESS}, transformers {transformers.__version__}, torch {torch.__version__}"
    return (
        f"{len(windows)} windows of {length + 1} tokens. The last {BLOCK_SIZE} of a window are predicted in one "
        f"forward from {num_slots} entries per layer and KV head and their own block; for lococo and KVzip that is "
        f"the average over heads. That a press keeps exactly so many is checked. `_all`: all tokens from the second "
        f"block on, where every block was predicted so. `reads` says what a method held until then, and so which rows "
        f"compare like with like. '{READING}': never more than {num_slots} + {BLOCK_SIZE} entries, everything read "
        f"through the compressed cache; kvpress does that with DecodingPress. '{DENSE}' and '{BLOCK}' are not like "
        f"for like in memory: one forward with full attention over all {length - BLOCK_SIZE} tokens (KVzip: twice), "
        f"compressed afterwards. kvpress's BlockPress is of that kind: only its selection goes block by block. "
        f"gap_ratio: (nll - full) / ({REFERENCE} - full), {REFERENCE} being lococo's with absolute positions. "
        f"minus_lococo: nll above that of the trained heads, positive where they are better. gap_low, gap_high and "
        f"low, high: {CONFIDENCE:.0%} intervals, {RESAMPLES} bootstrap resamples of the documents, seed {SEED}. "
        f"float32, {versions}, presses with kvpress's default settings, all methods in one process."
    )


def parse() -> argparse.Namespace:
    """The options, checked before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl or .txt files of held-out texts")
    parser.add_argument("--heads", required=True, help="folder or Hub id of trained heads; they say M")
    parser.add_argument("--length", type=int, default=2048, help="tokens read per window (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=9, help="windows per file (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="windows in all, for a try")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/results/side_by_side"), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    for name in ("documents", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    missing = [str(path) for path in options.data if not path.is_file()]
    if missing:
        parser.error(f"--data: no such file: {', '.join(missing)}")
    return options


def check_length(length: int, num_slots: int) -> None:
    """Make sure that windows end with a block and are compressed at all.

    Raises
    ------
    ValueError
        If not.
    """
    if length % BLOCK_SIZE or length < num_slots + 2 * BLOCK_SIZE:
        raise ValueError(
            f"--length must be a multiple of {BLOCK_SIZE}, the block, and at least {num_slots + 2 * BLOCK_SIZE}, so "
            f"that something is left out of {num_slots} slots; got {length}"
        )


def main() -> None:
    """Measure both sides and write the result."""
    options = parse()
    if importlib.util.find_spec("kvpress") is None or importlib.metadata.version("kvpress") != KVPRESS:
        raise SystemExit(f"this needs kvpress {KVPRESS} in an environment of its own: make side-by-side")
    trained = plan_runs([], [], BLOCK_SIZE, [options.heads])[0]
    num_slots = trained.num_slots
    assert num_slots is not None
    check_length(options.length, num_slots)
    runs = [*plan_runs(METHODS, [num_slots], BLOCK_SIZE), trained]
    model, tokenizer = load(options)
    cut = Cut((options.length + 1,), BLOCK_SIZE, options.documents)
    windows = one_after_another(read_windows(options.data, tokenizer, cut))[: options.limit]
    prompt = options.length - BLOCK_SIZE
    presses = press_rows(num_slots, BLOCK_SIZE, prompt)
    reads = {run.name: READING for run in runs} | {FULL: "whole"}
    reads |= {row.name: row.reads for row in sorted(presses, key=lambda row: row.reads != READING)}
    reads["kvpress-kvzip"] = DENSE
    journal = Journal(beside(options.output, ".partial.jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        kvzip = make_kvzip(model, tokenizer, num_slots, prompt, folder)
        found = measure(model, options.model, windows, runs, presses, kvzip, journal)
    rows = join(windows, found, reads, num_slots)
    command = shlex.join(["python", *sys.argv])
    shown = ["method", "reads", "nll", "ppl", "gap_ratio", "gap_low", "gap_high", "minus_lococo", "low", "high"]
    shown += ["ppl_all", "gap_ratio_all", "minus_lococo_all", "low_all", "high_all"]
    write_result(options.output, command, model.device, rows, shown, how(options.length, num_slots, windows))
    plot(rows, beside(options.output, ".png"))
    journal.finish()
    print(markdown_table([{name: row[name] for name in shown} for row in rows]))


if __name__ == "__main__":
    main()
