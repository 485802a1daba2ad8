"""What commands say on the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

WIDTH = 100  # columns of a table, at most


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Rows as a table of at most 100 columns of text; names and counts that are the same in all stand below it, once.

    Parameters
    ----------
    rows : sequence of dict
        All with the same keys.
    columns : sequence of str, optional
        Keys to show. None: all.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    shown = [name for name in columns or rows[0] if any(row[name] is not None for row in rows)]
    alike = [name for name in shown if len(rows) > 1 and _is_setting([row[name] for row in rows])]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (name for name in shown if name not in alike):
        is_number = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in shown if name not in alike))
    console = Console(width=min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns), highlight=False)
    console.print(table)
    if alike:
        console.print(", ".join(f"{name.replace('_', ' ')} {_cell(rows[0][name])}" for name in alike), markup=False)


def print_written(output: Path) -> None:
    """Where the files of a result are."""
    print(f"{output}.json: the result; its table (.md) and pictures (.png) lie beside it")


def print_progress(row: Mapping[str, Any]) -> None:
    """What a calibration has just measured: the gap ratio, and now and then the loss on its way."""
    if "gap_ratio" in row:
        place = f"step {row['step']}" if row["step"] else "before training"
        tqdm.write(f"{place}: gap ratio {ratio_text(row['gap_ratio'])}, held-out loss {row['heldout_nll']:.4f}")


def ratio_text(ratio: float | None) -> str:
    """A gap ratio; where H2O loses nothing there is none."""
    return "- (H2O loses nothing)" if ratio is None else f"{ratio:.3f}"


def _is_setting(values: Sequence[Any]) -> bool:
    """Whether values are the same name or count in all rows; what is measured is shown row by row."""
    return len(set(values)) == 1 and not isinstance(values[0], float)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
