"""``lococo bench memory``: bytes of the cache against tokens read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.compat import cache_of, with_cache
from lococo.generation import cache_bytes
from lococo.methods import as_method, method_config
from lococo.results.tables import beside, write_result


@torch.no_grad()
def cache_growth(
    model: PreTrainedModel,
    methods: Sequence[str],
    num_slots: int,
    block_size: int,
    tokens: int,
    step: int,
    output: Path,
    command: str,
) -> list[dict[str, Any]]:
    """Read random tokens step by step and note the bytes of the cache; writes ``<output>.json``, ``.md``, ``.png``.

    Cache bytes do not depend on what is read, so random tokens show what a text would.
    """
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    rows = []
    for name in methods:
        config, cache = method_config(name, num_slots, block_size), None
        slots = None if config is None else num_slots
        with as_method(model, config):
            for stop in tqdm(range(step, tokens + 1, step), desc=name, unit_scale=step, unit="token", disable=None):
                part = ids[:, stop - step : stop].to(model.device)
                cache = cache_of(model(part, **with_cache(model, cache), use_cache=True, logits_to_keep=1))
                rows.append({"method": name, "num_slots": slots, "tokens": stop, "cache_bytes": cache_bytes(cache)})
    write_result(output, command, model.device, rows)
    _plot(rows, beside(output, ".png"))
    return rows


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [row for row in rows if row["method"] == method]
        slots = line[0]["num_slots"]
        axes.plot(
            [row["tokens"] for row in line],
            [row["cache_bytes"] / 2**20 for row in line],
            label=method if slots is None else f"{method}, {slots} slots",
            linestyle="-" if slots is None else "--",
        )
    axes.set_xlabel("tokens read")
    axes.set_ylabel("cache (MiB)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
