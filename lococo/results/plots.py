"""Pictures of results: panels of lines, bars and heat maps. Nothing else in the library draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

GAP = math.nan  # in a line, or a bar that is left out
DASHES = ("-", "--", ":", "-.")
THIN = {"marker": "", "linewidth": 1}  # a line of many points


@dataclasses.dataclass(frozen=True)
class Series:
    """Values that are drawn alike.

    Attributes
    ----------
    label : str
        In the legend; empty: not there.
    y : sequence of float
    x : sequence of float, optional
        Of a line's points. None in a panel of lines: the first of ``y`` is a level.
    low, high : sequence of float, optional
        Ends of a line's band, or of error bars.
    style : mapping
        What matplotlib is told besides.
    """

    label: str
    y: Sequence[float]
    x: Sequence[float] | None = None
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def errors(self) -> list[list[float]] | None:
        """Distance to the ends, below and above."""
        if self.low is None or self.high is None:
            return None
        below = [max(value - end, 0) for value, end in zip(self.y, self.low, strict=True)]
        return [below, [max(end - value, 0) for value, end in zip(self.y, self.high, strict=True)]]


@dataclasses.dataclass(frozen=True)
class Band:
    """A range of values that is shaded across a panel."""

    label: str
    low: float
    high: float


class Panel(Protocol):
    """A part of a picture."""

    def draw(self, figure: Any, axes: Any) -> None:
        """Draw into matplotlib's axes."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines over x, with bands between their ends.

    Attributes
    ----------
    log : str
        Which axes are logarithmic: ``x``, ``y``, ``xy``; x to the base 2.
    ticks : mapping of float to str, optional
        Where x is named, and how.
    bottom, top : float, optional
        Ends of y.
    """

    series: Sequence[Series]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    log: str = ""
    ticks: Mapping[float, str] | None = None
    bottom: float | None = None
    top: float | None = None

    def draw(self, figure: Any, axes: Any) -> None:
        """Draw into matplotlib's axes."""
        from matplotlib.ticker import NullLocator

        for index, each in enumerate(self.series):
            style = {"color": f"C{index}", "marker": "o", "markersize": 4, **each.style, "label": each.label or None}
            if each.x is None:
                axes.axhline(each.y[0], **{"linestyle": "--", **style, "marker": None})
            else:
                axes.plot(each.x, each.y, **style)
                if each.low is not None and each.high is not None:
                    axes.fill_between(each.x, each.low, each.high, color=style["color"], alpha=0.2, linewidth=0)
        if "x" in self.log:
            axes.set_xscale("log", base=2)
        if "y" in self.log:
            axes.set_yscale("log")
        if self.ticks is not None:
            axes.set_xticks(list(self.ticks), list(self.ticks.values()))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        axes.set_title(self.title, fontsize=10)
        axes.set_ylim(bottom=self.bottom, top=self.top)
        axes.spines[["top", "right"]].set_visible(False)


@dataclasses.dataclass(frozen=True)
class Bars:
    """From top to bottom a group of bars for every label, a bar of it for every series.

    Attributes
    ----------
    labels : sequence of str
        Of the groups; every series has as many values.
    marks : Series, optional
        A value per label that is marked by a stroke across its bars.
    limits : tuple of float, optional
        Ends of the axis of values.
    """

    labels: Sequence[str]
    series: Sequence[Series]
    title: str = ""
    xlabel: str = ""
    marks: Series | None = None
    limits: tuple[float, float] | None = None
    band: Band | None = None

    @property
    def height(self) -> float:
        """Inches in which all labels can be read."""
        return 1.2 + 0.18 * len(self.labels) * (len(self.series) + 1)

    def draw(self, figure: Any, axes: Any) -> None:
        """Draw into matplotlib's axes."""
        places, height = range(len(self.labels)), 0.8 / len(self.series)
        if self.band is not None:
            axes.axvspan(
                self.band.low, self.band.high, label=self.band.label, color="#dd8452", alpha=0.35, linewidth=0
            )
        for index, each in enumerate(self.series):
            shifted = [place + (index - (len(self.series) - 1) / 2) * height for place in places]
            style = {"label": each.label or None, "capsize": 2, "error_kw": {"linewidth": 0.8}, **each.style}
            axes.barh(shifted, each.y, height, xerr=each.errors, **style)
        if self.marks is not None:
            axes.plot(self.marks.y, places, "|", color="#333333", markersize=12, label=self.marks.label)
        axes.set_yticks(places, self.labels, fontsize=8)
        axes.set(xlabel=self.xlabel, xlim=self.limits, ylim=(len(self.labels) - 0.4, -0.6))
        axes.set_title(self.title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Colours for a table of values.

    Attributes
    ----------
    values : sequence of sequences of float
        (rows, columns); the first row is at the top.
    xticks, yticks : sequence of str, optional
        Names of the columns and rows.
    limits : tuple of float, optional
        Values of the first and the last colour.
    log : bool
        Colours by the logarithm.
    """

    values: Sequence[Sequence[float]]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    xticks: Sequence[str] | None = None
    yticks: Sequence[str] | None = None
    limits: tuple[float | None, float | None] = (None, None)
    colors: str = "viridis"
    log: bool = False

    def draw(self, figure: Any, axes: Any) -> None:
        """Draw into matplotlib's axes."""
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.ticker import LogLocator, NullLocator

        norm = (LogNorm if self.log else Normalize)(*self.limits)
        image = axes.imshow(self.values, norm=norm, cmap=self.colors, aspect="auto")
        for axis, names in ((axes.xaxis, self.xticks), (axes.yaxis, self.yticks)):
            axis.get_major_locator().set_params(integer=True)
            if names is not None:
                axis.set_ticks(range(len(names)), names, fontsize=7)
        bar = figure.colorbar(image, ax=axes)
        if self.log:
            is_wide = bar.vmax > 20 * bar.vmin  # too many labels would lie on each other
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_wide else range(1, 10)))
            bar.ax.yaxis.set_minor_locator(NullLocator())
            bar.ax.yaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        axes.set_title(self.title, fontsize=9)


def lines_over(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    styles: Mapping[str, Mapping[str, Any]],
    name: Callable[[Any], str],
    error: str | None = None,
    **panel: Any,
) -> Lines:
    """A panel with a line for every name that rows of a table have, over one of their columns.

    Parameters
    ----------
    x, y, error : str
        Columns; ``error`` is drawn above and below ``y``. Where ``x`` is None a row is a level.
    styles : mapping of str to mapping
        What matplotlib is told of each name, the same in all panels of a picture.
    name : callable
        Name of a row.
    **panel
        Fields of ``Lines``.
    """
    lines = []
    for each, style in styles.items():
        points = sorted((row for row in rows if name(row) == each), key=lambda row: row[x] or 0)
        if points:
            places = None if points[0][x] is None else [row[x] for row in points]
            low, high = (
                None if error is None else [row[y] + sign * (row[error] or 0) for row in points] for sign in (-1, 1)
            )
            lines.append(Series(each, [row[y] for row in points], places, low, high, style))
    ticks = {tick: str(tick) for tick in sorted({row[x] for row in rows} - {None})}
    return Lines(lines, log="x", ticks=ticks, **panel)


def method_styles(rows: Sequence[Mapping[str, Any]], x: str, name: Callable[[Any], str]) -> dict[str, dict[str, Any]]:
    """Styles for ``lines_over``: a colour for every ``method``, and dashes for the larger of its ``num_slots``."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    slots = sorted({row["num_slots"] for row in rows} - {None})
    styles = {}
    for row in sorted(rows, key=lambda row: row["num_slots"] or 0):
        style = styles[name(row)] = {"color": f"C{methods.index(row['method'])}"}
        if x != "num_slots" and row["num_slots"]:
            style["linestyle"] = DASHES[slots.index(row["num_slots"]) % len(DASHES)]
    return styles


def in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel | None]]:
    """Panels as a grid for ``picture``, whose last row may have empty places."""
    filled = [*panels, *[None] * (-len(panels) % columns)]
    return [filled[first : first + columns] for first in range(0, len(filled), columns)]


def picture(
    grid: Sequence[Sequence[Panel | None]],
    size: tuple[float, float],
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    share: bool = False,
) -> bytes:
    """Panels in rows and columns as a PNG file, with one legend for all of them.

    Parameters
    ----------
    grid : sequence of sequences of Panel or None
        Rows of equal length; None leaves a place empty.
    size : tuple of float
        Width and height in inches.
    title, xlabel, ylabel : str
        Of all panels together.
    share : bool
        Columns have one axis x, rows one axis y.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    import io

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures are drawn with matplotlib ({error}): pip install lococo[eval]") from error
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(
        len(grid), len(grid[0]), squeeze=False, sharex="col" if share else False, sharey="row" if share else False
    )
    named: dict[str, Any] = {}
    for panels, line in zip(grid, places, strict=True):
        for panel, axes in zip(panels, line, strict=True):
            if panel is None:
                axes.set_visible(False)
                continue
            panel.draw(figure, axes)
            named |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        columns = max(1, min(len(named), int(size[0] / (0.075 * max(map(len, named)) + 0.5))))
        figure.legend(
            list(named.values()),
            list(named),
            frameon=False,
            loc="outside lower center" if title else "outside upper center",
            ncols=columns,
            fontsize=9,
        )
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def thousands(length: float) -> str:
    """A length as people write it: 4K for 4096."""
    return f"{length / 1024:g}K" if length % 1024 == 0 else str(length)
