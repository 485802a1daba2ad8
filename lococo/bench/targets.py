"""``lococo bench targets``: what was wanted beside what the result files say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from lococo.bench.figures import (
    Figure,
    Row,
    calibration_minutes,
    ceiling_share,
    growth,
    least,
    most,
    over_full,
    score_tensor_share,
)

# The default preset, and what trained heads cost: a low-rank convolution, or slots of their own for each head.
PRESET, OPEN, SHIPPED = "lococo-uncalibrated", "lococo-open-rank16", "lococo-smollm2-135m-128"
PREFILL_8B, PREFILL_7B = "bench_prefill_cuda_llama-3.1-8b", "bench_prefill_cuda_llama-2-7b"
DECODE_8B, TRAIN_8B, EXTEND_8B, SCORE_8B = (
    f"bench_{topic}_cuda_llama-3.1-8b" for topic in ("decode", "train", "extend", "score")
)
# Where the long grid has not been measured, that of a short visit to a GPU stands in.
STAND_INS = {PREFILL_8B: "gpu_prefill", DECODE_8B: "gpu_decode", SCORE_8B: "gpu_score"}
DECODE_CPU, EXTEND_CPU, SCORE_CPU = "bench_decode_cpu", "bench_extend_cpu", "bench_score_cpu"


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure that is wanted.

    Attributes
    ----------
    source : str
        Result file in the folder of results, without its suffix.
    figure : callable
        Takes the figure from the file's content and the rows of a method.
    methods : tuple of str or None
        The methods that are to reach it. None: rows are of no method.
    """

    what: str
    comparison: Literal["<=", ">="]
    bound: float
    source: str
    figure: Figure
    methods: tuple[str | None, ...] = (PRESET, OPEN)

    def is_met(self, measured: float) -> bool:
        """Whether a figure is good enough."""
        return measured <= self.bound if self.comparison == "<=" else measured >= self.bound

    def rows(self, results: Path) -> list[Row]:
        """What a folder of results says, method by method."""
        for source in filter(None, (self.source, STAND_INS.get(self.source))):
            path = results / f"{source}.json"
            if path.is_file():
                content = json.loads(path.read_text(encoding="utf-8"))
                return [self._row(method, content, source) for method in self.methods]
        return [self._row(method, {"rows": []}, self.source) for method in self.methods]

    def _row(self, method: str | None, content: dict, source: str) -> Row:
        measured = self.figure(content, [row for row in content["rows"] if row.get("method") == method])
        return {
            "what": self.what,
            "method": method,
            "target": f"{self.comparison} {self.bound:g}",
            "measured": measured,
            "outcome": "not measured" if measured is None else "met" if self.is_met(measured) else "missed",
            "device": None if measured is None else content["device"],
            "commit": None if measured is None else content["commit"],
            "source": f"{source}.json",
        }


TARGETS = (
    Target(
        "prefill, 8B shape: peak memory at 128K over 4K", "<=", 1.02, PREFILL_8B, growth("peak_bytes", 4096, 131072)
    ),
    Target(
        "prefill, 8B shape: peak GB at 128K", "<=", 17, PREFILL_8B, most("peak_bytes", 1e9, length=131072, batch=1)
    ),
    Target(
        "prefill, 8B shape: share of the speed-up possible over full, 32K and 128K",
        ">=",
        0.9,
        PREFILL_8B,
        ceiling_share(32768, 131072),
    ),
    Target(
        "prefill, 8B shape: speed over full from 8K on", ">=", 1, PREFILL_8B, least("speedup_over_full", since=8192)
    ),
    Target("prefill, 8B shape: time over the sliding window's", "<=", 1.1, PREFILL_8B, most("time_over_streaming")),
    Target("prefill, 7B shape: time over the sliding window's", "<=", 1.25, PREFILL_7B, most("time_over_streaming")),
    Target(
        "decoding, 8B shape, batch 1: tokens per second", ">=", 200, DECODE_8B, least("tokens_per_second", batch=1)
    ),
    Target("decoding, 8B shape, batch 1: share of the limit", ">=", 0.8, DECODE_8B, least("limit_share", batch=1)),
    Target(
        "decoding, 8B shape, batch 16 after 32K: speed over full",
        ">=",
        4,
        DECODE_8B,
        least("speedup_over_full", length=32768, batch=16),
    ),
    Target(
        "layer-local calibration, 7B shape, M = 512: minutes",
        "<=",
        30,
        "heads/llama-2-7b-512/calibration",
        calibration_minutes,
        (None,),
    ),
    Target(
        "calibration, 135M model, M = 128: minutes",
        "<=",
        3,
        "heads/smollm2-135m-128/calibration",
        calibration_minutes,
        (None,),
    ),
    Target(
        "training of heads, 8B shape: peak memory at 32K over 4K",
        "<=",
        1.05,
        TRAIN_8B,
        growth("peak_bytes", 4096, 32768),
        (OPEN,),
    ),
    Target(
        "extension, 8B shape: peak memory at 32K over 4K",
        "<=",
        1.05,
        EXTEND_8B,
        growth("peak_bytes", 4096, 32768),
        (OPEN,),
    ),
    Target(
        "extension, CPU, 135M model: memory in use at 32K over 4K",
        "<=",
        1.05,
        EXTEND_CPU,
        growth("peak_bytes", 4096, 32768),
        (OPEN,),
    ),
    Target(
        "CPU, 135M model, M = 128: time of a token after 8192 over full after 512",
        "<=",
        1,
        DECODE_CPU,
        over_full("median", 8192, 512),
        (PRESET, SHIPPED),
    ),
    Target(
        "CPU, 135M model, M = 128: KV bytes after 8192 over 512",
        "<=",
        1,
        DECODE_CPU,
        growth("cache_bytes", 512, 8192),
        (PRESET, SHIPPED),
    ),
    Target("scores, 8B shape: share of a block's time", "<=", 0.15, SCORE_8B, most("score_share"), (PRESET,)),
    Target("scores, CPU, 135M model: share of a block's time", "<=", 0.15, SCORE_CPU, most("score_share"), (PRESET,)),
    # Never the whole matrix: blocks of 512 are scored in tiles.
    Target(
        "scores, 8B shape: largest tensor over the attention matrix",
        "<=",
        0.5,
        SCORE_8B,
        score_tensor_share,
        (PRESET,),
    ),
)


def target_rows(results: Path) -> list[Row]:
    """Every target with what the result files in a folder say of it."""
    return [row for target in TARGETS for row in target.rows(results)]
