"""``lococo eval extended``: perplexity of extended models by length, as in Table 2 of Cai et al. 2024."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.data.documents import single_files
from lococo.data.texts import Cut, Text, Window, read_texts, sliding_windows
from lococo.evaluation.perplexity import ALL_DOMAINS, DocumentLosses, digest, plot_by_length
from lococo.extension.adapters import restored
from lococo.extension.folder import extension_digest, load_extended, read_extension
from lococo.methods import Run, as_method
from lococo.metrics import mean_nll
from lococo.results.journal import Journal
from lococo.results.tables import beside, write_result

HOW = (
    "The same tokens count at every length: windows slide over the first {longest} tokens of each document, overlap "
    "by {first} tokens, each token from the {first}th on counts in one of them. trained: tokens of the windows that "
    "an extension was trained on; without it, the model is as it came."
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """The base model with a method, or extended: a row of the table.

    Attributes
    ----------
    run : Run
        Without a config where an extension says how it reads.
    folder : Path, optional
        Of an extension.
    trained : int, optional
        Tokens of the windows that it was trained on.
    """

    run: Run
    folder: Path | None = None
    trained: int | None = None

    @classmethod
    def of(cls, folder: Path) -> Reader:
        """The reader of an extension's folder, called after it."""
        extension, _ = read_extension(folder)
        return cls(Run(folder.resolve().name, extension.config), folder, extension.length)

    @classmethod
    def of_all(cls, folders: Sequence[Path]) -> list[Reader]:
        """The readers of several extensions.

        Raises
        ------
        ValueError
            If two have the same name, which would be that of both rows.
        """
        readers = [cls.of(folder) for folder in folders]
        names = [reader.run.name for reader in readers]
        if len(set(names)) < len(names):
            raise ValueError(f"--extensions must have different names, got {', '.join(names)}")
        return readers

    def identity(self) -> list[Any]:
        """What its losses depend on besides the model, as plain JSON values."""
        weights = None if self.folder is None else extension_digest(self.folder)
        return [self.run.name, self.run.identity(), weights]

    @contextmanager
    def reading(self, model: PreTrainedModel) -> Iterator[Any]:
        """The model as this reader inside a ``with`` block; afterwards it is as it was."""
        if self.folder is None:
            with as_method(model, self.run.config, self.run.heads):
                yield model
        else:
            with restored(model):
                yield load_extended(model, self.folder)


def read_alike(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    first: int,
    limit: int,
    text_column: str = "text",
) -> list[Window]:
    """Windows of every length over the same tokens of some documents of every file, as in ``cut_alike``.

    Raises
    ------
    ValueError, OSError, ImportError
        If a source holds no text, or none that is as long as the longest window.
    """
    cut = Cut(tuple(sorted(set(lengths))), first, limit, sliding=True)
    texts = [read_texts(file, tokenizer, cut, text_column) for file in single_files(sources)]
    return [window for found in texts for window in cut_alike(found, cut.lengths, first, limit)]


def cut_alike(texts: Sequence[Text], lengths: Sequence[int], first: int, limit: int) -> list[Window]:
    """Windows of every length over the same tokens of the first ``limit`` texts that are long enough.

    Raises
    ------
    ValueError
        If no text is as long as the longest window.
    """
    longest = max(lengths)
    long_enough = [text for text in texts if len(text.ids) >= longest][:limit]
    if not long_enough:
        raise ValueError(
            f"no document of {texts[0].domain} has {longest} tokens, the longest has "
            f"{max(len(text.ids) for text in texts)}; choose smaller --lengths"
        )
    cut = [dataclasses.replace(text, ids=text.ids[:longest]) for text in long_enough]
    return [window for length in lengths for window in sliding_windows(cut, length, first)]


def extended_rows(
    model: PreTrainedModel, windows: Sequence[Window], readers: Sequence[Reader], first: int, journal: Journal
) -> list[dict[str, Any]]:
    """One row per reader, length and domain (and one for all domains)."""
    rows = []
    for reader in tqdm(readers, desc="models", disable=None):
        losses: dict[tuple[str, int], DocumentLosses] = defaultdict(DocumentLosses)
        keys = [
            (model.name_or_path, str(model.dtype), *reader.identity(), digest(each.ids), first) for each in windows
        ]
        unread = any(journal.recall(key) is None for key in keys)
        reading: Any
        with reader.reading(model) if unread else nullcontext(model) as reading:
            for key, window in zip(keys, tqdm(windows, desc=reader.run.name, leave=False, disable=None), strict=True):
                nll = journal.measure(key, functools.partial(mean_nll, reading, window.ids, first))
                for domain in (ALL_DOMAINS, window.domain):
                    losses[domain, window.length].add(nll, window, first)
        rows += [_row(reader, *group, measured) for group, measured in losses.items()]
    return rows


def _row(reader: Reader, domain: str, length: int, losses: DocumentLosses) -> dict[str, Any]:
    config = reader.run.config
    return {
        "domain": domain,
        "trained": reader.trained,
        "method": reader.run.name,
        "num_slots": reader.run.num_slots,
        "block_size": None if config is None else config.block_size,
        "length": length,
        "nll": losses.mean,
        "ppl": math.exp(losses.mean),
        "documents": len(losses.by_document),
        "tokens": int(losses.table[1].sum()),
    }


def by_length(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the paper: a row per domain and model, a column of perplexities per length."""
    lines: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        names = ("domain", "trained", "method", "num_slots")
        line = lines.setdefault(tuple(row[name] for name in names), {name: row[name] for name in names})
        line[str(row["length"])] = row["ppl"]
    return list(lines.values())


def run(
    model: PreTrainedModel,
    windows: Sequence[Window],
    readers: Sequence[Reader],
    first: int,
    output: Path,
    command: str,
) -> list[dict[str, Any]]:
    """Measure, write ``<output>.json``, ``.md`` and ``.png``, and return the rows. A killed run resumes."""
    journal = Journal(beside(output, ".partial.jsonl"))
    rows = extended_rows(model, windows, readers, first, journal)
    how = HOW.format(longest=max(window.length for window in windows), first=first)
    write_result(output, command, model.device, rows, table=by_length(rows), how=how, dtype=str(model.dtype))
    plot_by_length([{**row, "method": _label(row)} for row in rows], beside(output, ".png"), cut=1.25)
    journal.finish()
    return rows


def _label(row: dict[str, Any]) -> str:
    return row["method"] if row["trained"] is None else f"{row['method']}, trained at {row['trained']}"
