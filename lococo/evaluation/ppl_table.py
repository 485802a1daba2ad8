"""``lococo eval ppl``: perplexity by domain and method, with the gap ratio."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.evaluation.likelihood import Window, token_nlls, windows
from lococo.evaluation.methods import Run, as_method
from lococo.evaluation.results import Journal, beside, write_result

ALL_DOMAINS = "all"


def read_documents(path: Path) -> list[dict[str, str]]:
    """Documents of a ``.jsonl`` file (one object with ``text`` per line) or a ``.txt`` file (one document).

    Raises
    ------
    ValueError
        If the file has another ending, no documents, or a line without ``text``.
    """
    if path.suffix == ".txt":
        documents = [{"text": path.read_text(encoding="utf-8"), "id": path.stem, "domain": path.stem}]
    elif path.suffix == ".jsonl":
        documents = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    else:
        raise ValueError(f"{path}: expected a .jsonl or .txt file")
    if not documents or not all(document.get("text") for document in documents):
        raise ValueError(f"{path}: every document needs a non-empty 'text', and there must be at least one")
    return [{"domain": path.parent.name, **document} for document in documents]


@dataclasses.dataclass
class _Sum:
    """Loss over some windows."""

    nll: float = 0.0
    tokens: int = 0
    length: int = 0

    def add(self, nll: float, window: Window, first: int) -> None:
        self.nll += nll * (window.ids.shape[1] - first)
        self.tokens += window.ids.shape[1] - first
        self.length = max(self.length, window.ids.shape[1])

    @property
    def mean(self) -> float:
        return self.nll / self.tokens


def perplexity_rows(
    model: PreTrainedModel, texts: Sequence[Window], runs: Sequence[Run], first: int, journal: Journal
) -> list[dict[str, Any]]:
    """One row per domain (and one for all) and run.

    The gap ratio is (nll - nll of full) / (nll of H2O - nll of full), H2O at the same number of slots and with the
    better of its two position modes in that domain: 0 is the full cache, 1 is H2O.
    """
    sums: dict[Run, dict[str, _Sum]] = {}
    for run in tqdm(runs, desc="methods", disable=None):
        by_domain = sums[run] = defaultdict(_Sum)
        with as_method(model, run.config, run.heads):
            for window in tqdm(texts, desc=f"{run.name} {run.num_slots or ''}", leave=False, disable=None):
                key = (run.name, run.identity(), window.domain, window.document, window.ids.shape[1], first)
                nll = journal.measure(key, functools.partial(_mean_nll, model, window.ids, first))
                by_domain[window.domain].add(nll, window, first)
                by_domain[ALL_DOMAINS].add(nll, window, first)
    return [
        {
            "domain": domain,
            "method": run.name,
            "num_slots": run.num_slots,
            "block_size": None if run.config is None else run.config.block_size,
            "length": total.length,
            "nll": total.mean,
            "ppl": math.exp(total.mean),
            "gap_ratio": _gap_ratio(sums, domain, run.num_slots, total.mean),
            "tokens": total.tokens,
        }
        for run, by_domain in sums.items()
        for domain, total in by_domain.items()
    ]


def _mean_nll(model: PreTrainedModel, ids: torch.Tensor, first: int) -> float:
    return token_nlls(model, ids, first).mean().item()


def _gap_ratio(sums: dict[Run, dict[str, _Sum]], domain: str, slots: int | None, nll: float) -> float | None:
    full = [by_domain[domain].mean for run, by_domain in sums.items() if run.name == "full"]
    h2o = [
        by_domain[domain].mean
        for run, by_domain in sums.items()
        if run.name in ("h2o", "h2o-slot") and run.num_slots == slots
    ]
    return (nll - full[0]) / (min(h2o) - full[0]) if full and h2o else None


def plot_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over the full cache by domain and method, at the smallest number of slots."""
    from matplotlib.figure import Figure

    slots = min(row["num_slots"] for row in rows if row["num_slots"])
    shown = [row for row in rows if row["num_slots"] == slots]
    full = {row["domain"]: row["nll"] for row in rows if row["method"] == "full"}
    domains = sorted(dict.fromkeys(row["domain"] for row in shown), key=lambda domain: domain == ALL_DOMAINS)
    methods = list(dict.fromkeys(row["method"] for row in shown))
    nll = {(row["domain"], row["method"]): row["nll"] for row in shown}
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        places = [place + (index - (len(methods) - 1) / 2) * width for place in range(len(domains))]
        axes.bar(places, [nll[domain, method] - full[domain] for domain in domains], width, label=method)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("loss over the full cache (nats per token)")
    axes.set_title(f"{slots} slots, texts of {shown[0]['length']} tokens; lower is better, 0 is the full cache")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def read_windows(
    paths: Sequence[Path], tokenizer, length: int, limit: int, first: int, min_length: int | None = None
) -> list[Window]:
    """At most ``limit`` windows of every file.

    A file without a document of ``length`` tokens gives windows of half, a quarter, ... of it, of ``min_length`` or
    more.

    Raises
    ------
    ValueError
        If a file has no window that is long enough.
    """
    texts: list[Window] = []
    for path in paths:
        documents, wanted = read_documents(path), length
        found: list[Window] = []
        while not found and wanted >= max(min_length or length, first + 1):
            found = list(windows(documents, tokenizer, wanted, limit))
            wanted //= 2
        if not found:
            raise ValueError(f"{path}: no document has {min_length or length} tokens; choose a smaller --length")
        texts += found
    return texts


def run(
    model: PreTrainedModel,
    texts: Sequence[Window],
    runs: Sequence[Run],
    first: int,
    output: Path,
    command: str,
) -> list[dict[str, Any]]:
    """Measure, write ``<output>.json``, ``.md`` and ``.png``, and return the rows. A killed run resumes."""
    journal = Journal(beside(output, ".partial.jsonl"))
    rows = perplexity_rows(model, texts, runs, first, journal)
    write_result(output, command, model.device, rows)
    if any(each.name == "full" for each in runs) and len(runs) > 1:
        plot_rows(rows, beside(output, ".png"))
    journal.finish()
    return rows
