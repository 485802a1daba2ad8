"""``lococo eval extended``: perplexity of extended models by length, as in Table 2 of Cai et al. 2024."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lococo.data.texts import Window
from lococo.digest import model_digest
from lococo.evaluation.losses import Losses, measure_losses
from lococo.evaluation.perplexity import loss_row, plot_by_length
from lococo.extension.adapters import restored
from lococo.extension.folder import extension_digest, load_extended, read_extension
from lococo.methods import Run
from lococo.results.journal import Journal
from lococo.results.tables import beside, write_result

HOW = (
    "The same tokens count at every length: windows slide over the first {longest} tokens of each document, overlap "
    "by {first} tokens, each token from the {first}th on counts in one of them. trained: tokens of the windows that "
    "an extension was trained on; without it, the model is as it came."
)


@dataclasses.dataclass(frozen=True)
class ExtendedRun(Run):
    """An extended model: a row of the table.

    Attributes
    ----------
    folder : Path
        Of the extension.
    trained : int
        Tokens of the windows that it was trained on.
    """

    folder: Path = Path()
    trained: int = 0

    @classmethod
    def of_all(cls, folders: Sequence[Path]) -> list[ExtendedRun]:
        """The runs of extensions, called after their folders.

        Raises
        ------
        ValueError
            If two have the same name, which would be that of both rows.
        """
        extensions = [read_extension(folder)[0] for folder in folders]
        names = [folder.resolve().name for folder in folders]
        if len(set(names)) < len(names):
            raise ValueError(f"--extensions must have different names, got {', '.join(names)}")
        return [
            cls(name, extension.config, folder=folder, trained=extension.length)
            for name, extension, folder in zip(names, extensions, folders, strict=True)
        ]

    def identity(self) -> dict[str, Any]:
        """The config, and the weights by their digest."""
        return {**(super().identity() or {}), "extension": extension_digest(self.folder)}

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        """The model, extended, inside a ``with`` block; afterwards it is as it was."""
        with restored(model):
            yield load_extended(model, self.folder)


def extended_rows(losses: Losses) -> list[dict[str, Any]]:
    """One row per run, length and domain (and one for all domains)."""
    rows = []
    for run, groups in losses.items():
        trained = run.trained if isinstance(run, ExtendedRun) else None
        for group in groups:
            row = loss_row(losses, run, group)
            row = {"domain": row.pop("domain"), "trained": trained, **row, "length": group[0]}
            rows.append({name: value for name, value in row.items() if not name.startswith("gap_")})
    return rows


def by_length(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the paper: a row per domain and model, a column of perplexities per length."""
    lines: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        names = ("domain", "trained", "method", "num_slots")
        line = lines.setdefault(tuple(row[name] for name in names), {name: row[name] for name in names})
        line[str(row["length"])] = row["ppl"]
    return list(lines.values())


def evaluate_extended(
    model: PreTrainedModel,
    windows: Sequence[Window],
    runs: Sequence[Run],
    first: int,
    output: Path,
    command: str,
) -> list[dict[str, Any]]:
    """Measure, write ``<output>.json``, ``.md`` and ``.png``, and return the rows. A killed run resumes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As it came, neither patched nor extended.
    runs : sequence of Run
        Methods, and extensions as ``ExtendedRun``.
    first : int
        First token of a window that counts.
    """
    journal = Journal(beside(output, ".partial.jsonl"), of=model_digest(model))
    rows = extended_rows(measure_losses(model, windows, runs, first, journal))
    how = HOW.format(longest=max(window.length for window in windows), first=first)
    facts: dict[str, Any] = {"how": how, "seconds": journal.seconds, "commits": journal.commits}
    facts["dtype"] = str(model.dtype)
    write_result(output, command, model.device, rows, table=by_length(rows), **facts)
    plot_by_length([{**row, "method": _label(row)} for row in rows], beside(output, ".png"), cut=1.25)
    journal.finish()
    return rows


def _label(row: dict[str, Any]) -> str:
    return row["method"] if row["trained"] is None else f"{row['method']}, trained at {row['trained']}"
