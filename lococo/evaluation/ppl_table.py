"""``lococo eval ppl``: perplexity by domain and method, with the gap ratio."""

from __future__ import annotations

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
from lococo.evaluation.methods import as_method, method_config
from lococo.evaluation.results import Journal, write_result

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


def perplexity_rows(
    model: PreTrainedModel,
    texts: Sequence[Window],
    methods: Sequence[str],
    budgets: Sequence[int],
    block_size: int,
    first: int,
    journal: Journal,
) -> list[dict[str, Any]]:
    """One row per domain (and one for all), method and number of slots.

    The gap ratio is (nll - nll of full) / (nll of H2O - nll of full), H2O with the better of its two position modes in
    that domain: 0 is the full cache, 1 is H2O.
    """
    runs: list[tuple[str, int | None]] = [("full", None)] if "full" in methods else []
    runs += [(name, slots) for slots in budgets for name in methods if name != "full"]
    nlls: dict[tuple, dict[str, list[float]]] = {}
    for name, slots in tqdm(runs, desc="methods", disable=None):
        config = None if slots is None else method_config(name, slots, block_size)
        settings = None if config is None else config.to_dict()
        by_domain: dict[str, list[float]] = defaultdict(list)
        with as_method(model, config):
            for window in tqdm(texts, desc=f"{name} {slots or ''}", leave=False, disable=None):
                key = (name, settings, window.domain, window.document, window.ids.shape[1], first)
                nll = journal.measure(key, functools.partial(_mean_nll, model, window.ids, first))
                by_domain[window.domain].append(nll)
        everything = [nll for values in by_domain.values() for nll in values]
        nlls[name, slots] = {**by_domain, ALL_DOMAINS: everything}
    length = texts[0].ids.shape[1]
    return [
        {
            "domain": domain,
            "method": name,
            "num_slots": slots,
            "block_size": None if slots is None else block_size,
            "length": length,
            "nll": _mean(values),
            "ppl": math.exp(_mean(values)),
            "gap_ratio": _gap_ratio(nlls, domain, slots, _mean(values)),
            "tokens": len(values) * (length - first),
        }
        for (name, slots), by_domain in nlls.items()
        for domain, values in by_domain.items()
    ]


def _mean_nll(model: PreTrainedModel, ids: torch.Tensor, first: int) -> float:
    return token_nlls(model, ids, first).mean().item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _gap_ratio(nlls: dict, domain: str, slots: int | None, nll: float) -> float | None:
    h2o = [_mean(nlls[name, slots][domain]) for name in ("h2o", "h2o-slot") if (name, slots) in nlls]
    if ("full", None) not in nlls or not h2o:
        return None
    full = _mean(nlls["full", None][domain])
    return (nll - full) / (min(h2o) - full)


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


def run(
    model: PreTrainedModel,
    tokenizer,
    paths: Sequence[Path],
    methods: Sequence[str],
    budgets: Sequence[int],
    block_size: int,
    length: int,
    first: int,
    limit: int,
    output: Path,
    command: str,
) -> list[dict[str, Any]]:
    """Measure, write ``<output>.json``, ``.md`` and ``.png``, and return the rows. A killed run resumes.

    Raises
    ------
    ValueError
        If a method is unknown, or a file holds no window of ``length`` tokens.
    """
    for name in methods:
        method_config(name, budgets[0], block_size)
    texts: list[Window] = []
    for path in paths:
        found = list(windows(read_documents(path), tokenizer, length, limit))
        if not found:
            raise ValueError(f"{path}: no document has {length} tokens; choose a smaller --length")
        texts += found
    journal = Journal(output.with_suffix(".partial.jsonl"))
    rows = perplexity_rows(model, texts, methods, budgets, block_size, first, journal)
    write_result(output, command, model.device, rows)
    if "full" in methods and len(methods) > 1:
        plot_rows(rows, output.with_suffix(".png"))
    journal.finish()
    return rows
