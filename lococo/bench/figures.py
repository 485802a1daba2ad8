"""Figures of merit taken from the content of a result file and the rows of one method in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Content = dict[str, Any]
# None: the file does not say.
Figure = Callable[[Content, Sequence[Row]], float | None]


def values(rows: Sequence[Row], column: str, **where: Any) -> list[float]:
    """What was measured of a column, in the rows with these values in other columns."""
    chosen = [row for row in rows if all(row.get(name) == value for name, value in where.items())]
    return [row[column] for row in chosen if row.get(column) is not None]


def most(column: str, unit: float = 1, **where: Any) -> Figure:
    """The largest value of a column, in a unit."""
    return lambda content, rows: max((value / unit for value in values(rows, column, **where)), default=None)


def least(column: str, since: int = 0, **where: Any) -> Figure:
    """The smallest value of a column, for texts of ``since`` tokens and more."""

    def figure(content: Content, rows: Sequence[Row]) -> float | None:
        return min(values([row for row in rows if row["length"] >= since], column, **where), default=None)

    return figure


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
