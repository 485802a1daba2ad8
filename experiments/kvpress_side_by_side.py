"""LoCoCo and kvpress side by side: the same texts, the same M entries per layer and KV head, in one process.

python -m experiments.kvpress_side_by_side --model folder --data texts.jsonl --heads calibrated-heads

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
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from experiments.common import add_model_options, command_of, load
from experiments.kvpress_presses import (
    BLOCK,
    DENSE,
    READING,
    PressRow,
    make_kvzip,
    nlls_after_prefill,
    nlls_while_reading,
    press_rows,
)
from experiments.kvpress_table import FULL, REFERENCE, Nlls, join, plot
from lococo.data.texts import Cut, Window, read_windows
from lococo.digest import model_digest
from lococo.methods import Run, plan_runs
from lococo.metrics import CONFIDENCE, RESAMPLES, SEED, token_nlls
from lococo.results.journal import Journal
from lococo.results.tables import beside, markdown_table, write_result

KVPRESS = "0.5.5"
BLOCK_SIZE = 128
METHODS = ("full", "streaming", "h2o", "lococo-uncalibrated")


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
    with run.applied(model):
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
        for name, row in measure_presses(
            model, (name_or_path, digest), window.ids, presses, kvzip, num_slots, journal
        ):
            found.setdefault(name, []).append(row)
    return found


def measure_presses(
    model: Any,
    source: tuple[str, str],
    ids: torch.Tensor,
    presses: Sequence[PressRow],
    kvzip: Any,
    num_slots: int,
    journal: Journal,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and losses of all presses on one window: those of one prefill together, each reading by itself."""
    key = (*source, "kvpress", KVPRESS, num_slots)

    def after_prefill() -> dict[str, dict[str, float]]:
        at_once = [row for row in presses if row.reads != READING]
        nlls = nlls_after_prefill(model, at_once, kvzip, ids, ids.shape[1] - 1 - BLOCK_SIZE, num_slots)
        return {name: sums(each, BLOCK_SIZE) for name, each in nlls.items()}

    def while_reading(row: PressRow) -> dict[str, float]:
        return sums(nlls_while_reading(model, row, ids, BLOCK_SIZE, num_slots), BLOCK_SIZE)

    yield from journal.measure((*key, DENSE), after_prefill).items()
    for row in presses:
        if row.reads == READING:
            yield row.name, journal.measure((*key, row.name), functools.partial(while_reading, row))


def how(length: int, num_slots: int, windows: Sequence[Window], dtype: str) -> str:
    """How the figures came about."""
    versions = f"kvpress {KVPRESS}, transformers {transformers.__version__}, torch {torch.__version__}"
    return (
        f"{len(windows)} windows of {length + 1} tokens, none of them special. The last {BLOCK_SIZE} of a window are "
        f"predicted in one forward from {num_slots} entries per layer and KV head and their own block; for lococo "
        f"and KVzip that is the average over heads. That a press keeps exactly so many is checked. `_all`: all "
        f"tokens from the second block on, where every block was predicted so. `reads` says what a method held until "
        f"then, and so which rows compare like with like. '{READING}': never more than {num_slots} + {BLOCK_SIZE} "
        f"entries, everything read through the compressed cache; kvpress does that with DecodingPress. '{DENSE}' and "
        f"'{BLOCK}' are not like for like in memory: one forward with full attention over all {length - BLOCK_SIZE} "
        f"tokens (KVzip: twice), compressed afterwards. kvpress's BlockPress is of that kind: only its selection "
        f"goes block by block. gap_ratio: (nll - full) / ({REFERENCE} - full), {REFERENCE} being lococo's with "
        f"absolute positions. minus_lococo: nll above that of the trained heads, positive where they are better. "
        f"gap_low, gap_high and low, high: {CONFIDENCE:.0%} intervals, {RESAMPLES} bootstrap resamples of the "
        f"documents, seed {SEED}. {dtype}, {versions}, presses with kvpress's default settings, all methods in one "
        f"environment."
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
    cut = Cut((options.length + 1,), BLOCK_SIZE, options.documents, per_document=1)
    # Releases of transformers differ in the first token that a tokenizer from GGUF puts before a text.
    as_tokens = functools.partial(tokenizer, add_special_tokens=False)
    windows = one_after_another(read_windows(options.data, as_tokens, cut))[: options.limit]
    prompt = options.length - BLOCK_SIZE
    presses = press_rows(num_slots, BLOCK_SIZE, prompt)
    reads = {run.name: READING for run in runs} | {FULL: "whole"}
    reads |= {row.name: row.reads for row in sorted(presses, key=lambda row: row.reads != READING)}
    reads["kvpress-kvzip"] = DENSE
    journal = Journal(beside(options.output, ".partial.jsonl"), of=model_digest(model))
    with tempfile.TemporaryDirectory() as folder:
        kvzip = make_kvzip(model, tokenizer, num_slots, prompt, folder)
        found = measure(model, options.model, windows, runs, presses, kvzip, journal)
    rows = join(windows, found, reads, num_slots, BLOCK_SIZE)
    command = command_of("kvpress_side_by_side")
    shown = ["method", "reads", "nll", "ppl", "gap_ratio", "gap_low", "gap_high", "minus_lococo", "low", "high"]
    shown += ["ppl_all", "gap_ratio_all", "minus_lococo_all", "low_all", "high_all"]
    how_measured = how(options.length, num_slots, windows, str(model.dtype)[6:])
    facts: dict[str, Any] = {"how": how_measured, "seconds": journal.seconds, "commits": journal.commits}
    write_result(options.output, command, model.device, rows, columns=shown, **facts)
    plot(rows, beside(options.output, ".png"))
    journal.finish()
    print(markdown_table([{name: row[name] for name in shown} for row in rows]))


if __name__ == "__main__":
    main()
