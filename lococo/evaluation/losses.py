"""Losses of methods over windows of text: measured once, grouped by length and domain, or by distance of repeats."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.data.texts import Window
from lococo.evaluation.repeats import by_distance
from lococo.methods import H2O, Run
from lococo.metrics import token_nlls
from lococo.results.journal import Journal

ALL_DOMAINS = "all"


class DocumentLosses:
    """Loss over some windows, document by document."""

    def __init__(self) -> None:
        self.by_document: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))  # nll, tokens
        self.length = 0

    def add(self, nll: float, tokens: int, window: Window) -> None:
        """Add the summed loss of some of a window's tokens."""
        self.by_document[window.domain, window.document] += nll, tokens
        self.length = max(self.length, window.ids.shape[1])

    @property
    def table(self) -> np.ndarray:
        """(2, documents): summed loss, tokens."""
        return np.stack(list(self.by_document.values()), axis=1)

    @property
    def mean(self) -> float:
        """Nats per token."""
        nll, tokens = self.table.sum(axis=1)
        return float(nll / tokens)


Losses = dict[Run, dict[tuple[int, str], DocumentLosses]]


def measure_losses(
    model: PreTrainedModel,
    windows: Sequence[Window],
    runs: Sequence[Run],
    first: int,
    journal: Journal,
    *,
    read_once: bool = False,
    by_repeat: bool = False,
) -> Losses:
    """Losses of every run by length and domain, and over all domains.

    Parameters
    ----------
    first : int
        First token of a window that counts.
    read_once : bool
        A window that another begins with is not read by itself: no token's loss depends on those after it.
    by_repeat : bool
        Count the tokens that repeat, as ``lococo.evaluation.repeats`` finds them, by their distance instead of length.
        Where windows of several lengths overlap, the longest count.
    """
    readings = together(windows) if read_once else [[window] for window in windows]
    readings = _apart(readings, first) if by_repeat else readings
    losses: Losses = {}
    for run in tqdm(runs, desc="methods", disable=None):
        groups = losses[run] = defaultdict(DocumentLosses)
        keys = [_key(model, run, parts, first) for parts in readings]
        is_measured = all(journal.recall(key) is not None for key in keys)
        with nullcontext(model) if is_measured else run.applied(model) as reader:
            shown = tqdm(readings, desc=f"{run.name} {run.num_slots or ''}", leave=False, disable=None)
            for key, parts in zip(keys, shown, strict=True):
                measured = journal.measure(key, functools.partial(_measure, reader, parts, first))
                counted = _of_repeats(measured, parts) if by_repeat else _of_parts(measured, parts, first)
                for group, nll, tokens, window in counted:
                    for domain in (window.domain, ALL_DOMAINS):
                        groups[group, domain].add(nll, tokens, window)
    return losses


def together(windows: Sequence[Window]) -> list[list[Window]]:
    """Windows by document and place where they begin."""
    places: dict[tuple[str, str, int], list[Window]] = {}
    for window in windows:
        places.setdefault((window.domain, window.document, window.start), []).append(window)
    return list(places.values())


def _apart(readings: Sequence[list[Window]], first: int) -> list[list[Window]]:
    """The longest of readings, in their order, so that no token counts in two."""
    counted: dict[tuple[str, str], list[range]] = defaultdict(list)
    chosen = set()
    for number in sorted(range(len(readings)), key=lambda number: -_longest(readings[number]).ids.shape[1]):
        window = _longest(readings[number])
        tokens = range(window.start + first, window.start + window.ids.shape[1])
        others = counted[window.domain, window.document]
        if all(tokens.stop <= each.start or each.stop <= tokens.start for each in others):
            others.append(tokens)
            chosen.add(number)
    return [readings[number] for number in sorted(chosen)]


def _longest(parts: Sequence[Window]) -> Window:
    return max(parts, key=lambda window: window.ids.shape[1])


def _key(model: PreTrainedModel, run: Run, parts: Sequence[Window], first: int) -> tuple[Any, ...]:
    lengths = [window.ids.shape[1] for window in parts]
    return model.name_or_path, str(model.dtype), run.name, run.identity(), digest(_longest(parts).ids), lengths, first


def _measure(model: PreTrainedModel, parts: Sequence[Window], first: int) -> dict[str, Any]:
    """Summed losses of windows, of which one begins with all others, and of its tokens that repeat, by distance."""
    ids = _longest(parts).ids
    nlls = token_nlls(model, ids, first).double()
    return {
        "nll": [nlls[: window.ids.shape[1] - first].sum().item() for window in parts],
        "repeats": by_distance(nlls, ids[0].tolist()),
    }


Counted = tuple[int, float, int, Window]


def _of_parts(measured: dict[str, Any], parts: Sequence[Window], first: int) -> Iterator[Counted]:
    for window, nll in zip(parts, measured["nll"], strict=True):
        yield window.length, nll, window.ids.shape[1] - first, window


def _of_repeats(measured: dict[str, Any], parts: Sequence[Window]) -> Iterator[Counted]:
    for distance, (nll, tokens) in measured["repeats"].items():
        yield int(distance), nll, tokens, _longest(parts)


def references(losses: Losses, run: Run, group: tuple[int, str]) -> tuple[DocumentLosses | None, list[DocumentLosses]]:
    """What a run's gap ratio compares with: the full cache, and the variants of H2O."""
    slots = run.num_slots if run.reference_slots is None else run.reference_slots
    full = next((groups[group] for other, groups in losses.items() if other.name == "full"), None)
    h2o = [groups[group] for other, groups in losses.items() if other.name in H2O and other.num_slots == slots]
    return full, h2o


def digest(ids: torch.Tensor) -> str:
    """Name of a text by its tokens."""
    return hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()
