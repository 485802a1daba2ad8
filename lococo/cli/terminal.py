"""What commands say on the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100  # columns of text of a table, at most
WIDEST = 30  # and of one of its columns, at least, where there are longer words
GAP = 2  # between two columns
PLACES = {"start": "with these scores and slots", "saved": "as saved"}  # where a gap ratio was measured, by stage


def print_table(rows: Sequence[dict[str, Any]], columns: Iterable[str] | None = None) -> None:
    """Rows as a table of at most 100 columns of text; names and counts that are the same in all stand below it, once.

    Parameters
    ----------
    rows : sequence of dict
        All with the same keys.
    columns : iterable of str, optional
        Keys to show, the most important first. None: all. What finds no room is left to the files.
    """
    from rich.console import Console

    if not rows:
        return
    console = Console(width=min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns), highlight=False)
    shown = [name for name in columns or rows[0] if any(row.get(name) is not None for row in rows)]
    alike = [name for name in shown if len(rows) > 1 and _is_setting([row[name] for row in rows])]
    names = [name for name in shown if name not in alike]
    while sum(_width(rows, name) + GAP for name in names) > console.width:
        names.pop()
    console.print(_table(rows, names))
    if alike:
        console.print(", ".join(f"{_words(name)} {_cell(name, rows[0][name])}" for name in alike), markup=False)


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        if _is_number(rows, name):  # in one piece
            table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True, vertical="bottom")
        else:
            table.add_column(_words(name), overflow="fold", min_width=_width(rows, name))
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in names))
    return table


def _is_number(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return all(isinstance(row[name], int | float | None) for row in rows)


def _width(rows: Sequence[dict[str, Any]], name: str) -> int:
    """Columns of text that a column of a table needs."""
    cells = [_cell(name, row[name]) for row in rows]
    pieces = cells if _is_number(rows, name) else [word for cell in cells for word in cell.split()]
    return min(WIDEST, max(len(piece) for piece in [*pieces, *name.split("_")]))


def print_written(output: Path) -> None:
    """Where the files of a result are."""
    print(f"{output}.json: the result; its table (.md) and what is drawn of it (.png) lie beside it")


def print_progress(row: Mapping[str, Any]) -> None:
    """What a calibration has just measured: the gap ratio, or how far its scores are."""
    from tqdm import tqdm

    if "gap_ratio" in row:
        place = PLACES.get(row["stage"]) or f"{row['stage']}, step {row['step']}"
        tqdm.write(f"{place}: gap ratio {ratio_text(row['gap_ratio'])}, held-out loss {row['heldout_nll']:.4f}")
    elif "closed" in row:
        place = f"{row['stage']}, step {row['step']} of {row['steps']}"
        closed = f"{row['closed']:.0%} of the way from the distant score to an oracle's"
        tqdm.write(f"{place}: loss {row['loss']:.3f}, {closed}")


def ratio_text(ratio: float | None) -> str:
    """A gap ratio; where H2O loses nothing there is none."""
    return "- (H2O loses nothing)" if ratio is None else f"{ratio:.3f}"


def _is_setting(values: Sequence[Any]) -> bool:
    """Whether values are the same name or count in all rows; what is measured is shown row by row."""
    return len(set(values)) == 1 and not isinstance(values[0], float)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
