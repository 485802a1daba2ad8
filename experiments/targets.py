"""What was wanted of speed and memory beside what the result files say: ``docs/results/targets``.

python -m experiments.targets --results docs/results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.common import command_of
from lococo.results.tables import markdown_table, write_result

Row = dict[str, Any]
Content = dict[str, Any]
# None: the file does not say.
Figure = Callable[[Content, Sequence[Row]], float | None]


def chosen(rows: Sequence[Row], **where: Any) -> list[Row]:
    """The rows with these values in other columns."""
    return [row for row in rows if all(row.get(name) == value for name, value in where.items())]


def values(rows: Sequence[Row], column: str, **where: Any) -> list[float]:
    """What was measured of a column, in the rows with these values in other columns."""
    return [row[column] for row in chosen(rows, **where) if row.get(column) is not None]


def most(column: str, unit: float = 1, **where: Any) -> Figure:
    """The largest value of a column, in a unit."""
    return lambda content, rows: _of_all(max, [value / unit for value in values(rows, column, **where)], rows, where)


def least(column: str, since: int = 0, **where: Any) -> Figure:
    """The smallest value of a column, for texts of ``since`` tokens and more."""

    def figure(content: Content, rows: Sequence[Row]) -> float | None:
        rows = [row for row in rows if row["length"] >= since]
        return _of_all(min, values(rows, column, **where), rows, where)

    return figure


def _of_all(choose: Callable, found: list[float], rows: Sequence[Row], where: dict[str, Any]) -> float | None:
    """None where a row was left out, for want of memory: the others do not speak for it."""
    is_whole = not any(row.get("skipped") for row in chosen(rows, **where))
    return choose(found) if found and is_whole else None


def growth(column: str, short: int, long: int) -> Figure:
    """A column at one length over the same at a shorter one, batch 1; the largest if there are several objectives."""

    def figure(content: Content, rows: Sequence[Row]) -> float | None:
        before, after = (values(rows, column, length=length, batch=1) for length in (short, long))
        if len(before) != len(after):
            return None
        return max((late / early for early, late in zip(before, after, strict=True)), default=None)

    return figure


def over_full(column: str, length: int, full_length: int) -> Figure:
    """A column over the full cache's at another length, batch 1."""

    def figure(content: Content, rows: Sequence[Row]) -> float | None:
        ours = values(rows, column, length=length, batch=1)
        full = values(content["rows"], column, length=full_length, batch=1, method="full")
        return ours[0] / full[0] if ours and full else None

    return figure


def ceiling_share(*lengths: int) -> Figure:
    """How much was reached of the speed-up over the full cache that the device's limits allow; the worst length."""

    def figure(content: Content, rows: Sequence[Row]) -> float | None:
        shares = []
        for length in lengths:
            reached = values(rows, "speedup_over_full", length=length, batch=1)
            ours = values(rows, "limit_seconds", length=length, batch=1)
            full = values(content["rows"], "limit_seconds", length=length, batch=1, method="full")
            if not (reached and ours and full):
                return None
            shares.append(reached[0] * ours[0] / full[0])
        return min(shares)

    return figure


def score_tensor_share(content: Content, rows: Sequence[Row]) -> float | None:
    """The largest tensor of scoring over the block's attention as one matrix."""
    scored = [row for row in rows if row.get("score_largest_bytes")]
    return max((row["score_largest_bytes"] / row["matrix_bytes"] for row in scored), default=None)


def calibration_minutes(content: Content, rows: Sequence[Row]) -> float | None:
    """Minutes of a calibration that one process made from beginning to end."""
    usage = content.get("usage")
    return None if usage is None or usage["resumed"] else usage["seconds"] / 60


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table into the folder of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        parser.error(f"--results must be a folder of result files, got {options.results}")
    rows = target_rows(options.results)
    write_result(options.results / "targets", command_of("targets", arguments), "cpu", rows)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
