"""``lococo bench memory``: bytes of the cache against tokens read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.compat import cache_of, with_cache
from lococo.files import write_whole
from lococo.generation import cache_bytes
from lococo.methods import Run
from lococo.models import base_shape
from lococo.results.plots import Lines, Series, picture
from lococo.results.tables import beside, peak_memory, write_result


@torch.no_grad()
def cache_growth(
    model: PreTrainedModel,
    runs: Sequence[Run],
    tokens: int,
    step: int,
    output: Path,
    command: str,
) -> list[dict[str, Any]]:
    """Read random tokens step by step and note the bytes of the cache; writes ``<output>.json``, ``.md``, ``.png``.

    Cache bytes do not depend on what is read, so random tokens show what a text would. ``peak_bytes`` are the most in
    use at once since this process began, of the GPU or of the process on a CPU.

    Raises
    ------
    ValueError
        If a step is longer than what is read.
    """
    if not 1 <= step <= tokens:
        raise ValueError(f"step must lie between 1 and tokens={tokens}, got {step}")
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    shape = base_shape(model)
    held_by = shape["num_layers"] * shape["num_kv_heads"]
    rows = []
    for run in runs:
        name, slots, cache = run.name, run.num_slots, None
        with run.applied(model):
            for stop in tqdm(range(step, tokens + 1, step), desc=name, unit_scale=step, unit="token", disable=None):
                part = ids[:, stop - step : stop].to(model.device)
                cache = cache_of(model(part, **with_cache(model, cache), use_cache=True, logits_to_keep=1))
                held = cache_bytes(cache)
                sizes = {"cache_bytes": held, "bytes_per_head": round(held / held_by)}
                peak = peak_memory(model.device)
                rows.append({"method": name, "num_slots": slots, "tokens": stop, **sizes, "peak_bytes": peak})
    write_result(output, command, model.device, rows)
    write_whole(beside(output, ".png"), _picture(rows))
    return rows


def _picture(rows: Sequence[dict[str, Any]]) -> bytes:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        slots = "" if row["num_slots"] is None else f", {row['num_slots']} slots"
        lines.setdefault(row["method"] + slots, []).append(row)
    series = [
        Series(
            name,
            [row["cache_bytes"] / 2**20 for row in line],
            [row["tokens"] for row in line],
            style={"marker": "", "linestyle": "-" if line[0]["num_slots"] is None else "--"},
        )
        for name, line in lines.items()
    ]
    top = 1.05 * max(row["cache_bytes"] for row in rows) / 2**20
    return picture([[Lines(series, "", "tokens read", "cache (MiB)", bottom=0, top=top)]], (7, 4))
