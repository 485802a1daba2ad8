"""Texts to measure on: documents of files or of the Hub, cut into windows."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PROOF_PILE = "EleutherAI/proof-pile-2"
PROOF_PILE_DOMAINS = ("arxiv", "open-web-math", "algebraic-stack")
MOST_LOOKED_AT = 10_000  # documents of a domain of the Hub


@dataclasses.dataclass(frozen=True)
class Text:
    """A document as tokens."""

    domain: str
    name: str
    ids: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of one document.

    Attributes
    ----------
    start : int
        Its first token's place in the document.
    ids : torch.Tensor
        (1, tokens).
    length : int
        Tokens that were asked for; the document may have had fewer.
    """

    domain: str
    document: str
    start: int
    ids: torch.Tensor
    length: int

    @classmethod
    def of(cls, text: Text, start: int, length: int) -> Window:
        """As many tokens of a text as there are, ``length`` at most."""
        return cls(text.domain, text.name, start, torch.tensor([text.ids[start : start + length]]), length)


def windows(texts: Sequence[Text], length: int, limit: int | None = None) -> Iterator[Window]:
    """Windows of one length, no token in two: the first of every text, then the second of every text, ...

    Parameters
    ----------
    length : int
        Tokens per window; what is left of a text is not used.
    limit : int, optional
        At most so many windows.
    """
    starts = range(0, max((len(text.ids) for text in texts), default=0), length)
    found = (Window.of(text, start, length) for start in starts for text in texts if start + length <= len(text.ids))
    return itertools.islice(found, limit)


def sliding_windows(texts: Iterable[Text], length: int, first: int) -> Iterator[Window]:
    """Windows that overlap by ``first`` tokens, so that every token of a text from there on counts in one of them.

    The last window of a text ends with it and may be shorter. A text of no more than ``first`` tokens has none.
    """
    for text in texts:
        for start in range(0, len(text.ids) - first, length - first):
            yield Window.of(text, start, length)


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Documents of a ``.jsonl`` file (one object with ``text`` per line) or a ``.txt`` file (one document).

    Raises
    ------
    ValueError
        If the file has another ending, no documents, or a line without ``text``.
    """
    if path.suffix == ".txt":
        documents = [{"text": path.read_text(encoding="utf-8"), "id": path.stem, "domain": path.stem}]
    elif path.suffix == ".jsonl":
        documents = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    else:
        raise ValueError(f"{path}: expected a .jsonl or .txt file")
    if not documents or not all(document.get("text") for document in documents):
        raise ValueError(f"{path}: every document needs a non-empty 'text', and there must be at least one")
    return [
        {"domain": path.parent.name, "id": f"{path.stem}:{index}", **document}
        for index, document in enumerate(documents)
    ]


def read_file(path: Path, tokenizer) -> list[Text]:
    """Documents of a local file as tokens."""
    return [_as_tokens(document, tokenizer) for document in read_documents(path)]


def read_proof_pile(domain: str, tokenizer, tokens: int, limit: int) -> list[Text]:
    """The first ``limit`` documents with ``tokens`` tokens or more of a domain of Proof-Pile-2's test split, streamed.

    Raises
    ------
    ImportError
        If ``datasets`` is not installed.
    ValueError
        If the Hub cannot be read, or none of the first 10,000 documents is long enough.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError("texts of the Hub need the package datasets: pip install lococo[eval]") from error
    # The files themselves: `datasets` no longer runs the script that this dataset comes with.
    files = f"hf://datasets/{PROOF_PILE}/{domain}/test/*.jsonl.zst"
    try:
        records = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        found = []
        for index, record in enumerate(itertools.islice(records, MOST_LOOKED_AT)):
            if record["text"]:
                text = _as_tokens({"text": record["text"], "domain": domain, "id": str(index)}, tokenizer)
                found += [text] if len(text.ids) >= tokens else []
            if len(found) == limit:
                break
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{files}: cannot be read from the Hub; name local texts with --data ({error})") from error
    if not found:
        raise ValueError(f"{files}: no document of the first {MOST_LOOKED_AT} has {tokens} tokens")
    return found


def _as_tokens(document: Mapping[str, Any], tokenizer) -> Text:
    return Text(str(document["domain"]), str(document["id"]), tokenizer(document["text"]).input_ids)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How texts become windows.

    Attributes
    ----------
    lengths : tuple of int
        Tokens per window; every length gets windows of its own.
    first : int
        First token of a window that counts.
    limit : int
        Windows of a file at most, with ``sliding`` documents.
    min_length : int, optional
        A file without a document of a length gives windows of half, a quarter, ... of it, of this many tokens or
        more. With ``sliding`` documents of this many tokens or more are read whole. None: the length.
    sliding : bool
        Slide over whole documents.

    Raises
    ------
    ValueError
        If no token of a window would count, or the same windows would stand for several lengths.
    """

    lengths: tuple[int, ...]
    first: int
    limit: int
    min_length: int | None = None
    sliding: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.first < min(self.lengths):
            raise ValueError(
                f"--first must lie between 1 and {min(self.lengths) - 1} for windows of {min(self.lengths)} tokens, "
                f"got {self.first}"
            )
        if self.min_length is not None and len(self.lengths) > 1 and not self.sliding:
            raise ValueError(
                f"--min-length {self.min_length} would measure a file of short texts twice at several lengths: use "
                "one --length, or --sliding"
            )

    @property
    def least(self) -> int:
        """Tokens that a document needs to be of use at every length."""
        return max(self.min_length or max(self.lengths), self.first + 1)

    def windows(self, source: str | Path, texts: Sequence[Text]) -> list[Window]:
        """Windows of every length of the texts of one file or domain.

        Raises
        ------
        ValueError
            If none is long enough.
        """
        return [window for length in self.lengths for window in self._of_length(source, texts, length)]

    def _of_length(self, source: str | Path, texts: Sequence[Text], length: int) -> list[Window]:
        least, found, wanted = max(self.min_length or length, self.first + 1), [], length
        if self.sliding:
            long_enough = [text for text in texts if len(text.ids) >= least]
            found = list(sliding_windows(long_enough[: self.limit], length, self.first))
        while not self.sliding and not found and wanted >= least:
            found = [dataclasses.replace(each, length=length) for each in windows(texts, wanted, self.limit)]
            wanted //= 2
        if not found:
            raise ValueError(f"{source}: no document has {least} tokens; choose a smaller --length")
        return found


def read_windows(paths: Sequence[Path] | None, tokenizer, cut: Cut) -> list[Window]:
    """Windows of local files, or of the domains of Proof-Pile-2 for None."""
    if paths is None:
        sources: Iterable[tuple[str | Path, list[Text]]] = (
            (domain, read_proof_pile(domain, tokenizer, cut.least, cut.limit)) for domain in PROOF_PILE_DOMAINS
        )
    else:
        sources = ((path, read_file(path, tokenizer)) for path in paths)
    return [window for source, texts in sources for window in cut.windows(source, texts)]
