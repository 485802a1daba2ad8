"""Texts to measure on: documents, and windows cut from them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lococo.data.documents import documents, local_files, single_files

# Files of the test split: `datasets` no longer runs the script that this dataset comes with.
PROOF_PILE = {
    domain: f"hf://datasets/EleutherAI/proof-pile-2/{domain}/test/*.jsonl.zst"
    for domain in ("arxiv", "open-web-math", "algebraic-stack")
}
MOST_LOOKED_AT = 10_000  # documents of a source of the Hub


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


def windows(
    texts: Sequence[Text], length: int, limit: int | None = None, per_text: int | None = None
) -> Iterator[Window]:
    """Windows of one length, no token in two: the first of every text, then the second of every text, ...

    Parameters
    ----------
    length : int
        Tokens per window; what is left of a text is not used.
    limit, per_text : int, optional
        At most so many windows in all, and of each text.
    """
    starts = range(0, max((len(text.ids) for text in texts), default=0), length)[:per_text]
    found = (Window.of(text, start, length) for start in starts for text in texts if start + length <= len(text.ids))
    return itertools.islice(found, limit)


def sliding_windows(texts: Iterable[Text], length: int, first: int) -> Iterator[Window]:
    """Windows that overlap by ``first`` tokens, so that every token of a text from there on counts in one of them.

    The last window of a text ends with it and may be shorter. A text of no more than ``first`` tokens has none.
    """
    for text in texts:
        for start in range(0, len(text.ids) - first, length - first):
            yield Window.of(text, start, length)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How texts become windows.

    Attributes
    ----------
    lengths : tuple of int
        Tokens per window; every length gets windows of its own, those of the longest documents first, so that they
        begin alike.
    first : int
        First token of a window that counts.
    limit : int
        Windows of a file (or source of the Hub) at most, with ``sliding`` documents.
    min_length : int, optional
        A file without a document of a length gives windows of half, a quarter, ... of it, of this many tokens or
        more. With ``sliding`` documents of this many tokens or more are read whole. None: the length.
    sliding : bool
        Slide over whole documents.
    most : int, optional
        Tokens of a document that are used, its first. None: all.
    per_document : int, optional
        Windows of a document at most; not with ``sliding``, which reads whole ones.

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
    most: int | None = None
    per_document: int | None = None

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"--documents must be at least 1, got {self.limit}")
        if self.per_document is not None and (self.per_document < 1 or self.sliding):
            raise ValueError(
                "--windows-per-document must be at least 1, and goes without --sliding, which reads whole documents; "
                f"got {self.per_document}"
            )
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
    def enough(self) -> int:
        """Tokens of a document that is used whatever the length: no more than ``limit`` of such are looked for."""
        return self._least(max(self.lengths)) if self.sliding else max(self.lengths)

    def windows(self, source: str, texts: Sequence[Text]) -> list[Window]:
        """Windows of every length of the texts of one file, or of one source of the Hub.

        Raises
        ------
        ValueError
            If none is long enough.
        """
        used = [dataclasses.replace(text, ids=text.ids[: self.most]) for text in texts]
        if not self.sliding:
            used.sort(key=lambda text: -sum(len(text.ids) >= length for length in self.lengths))
        return [window for length in self.lengths for window in self._of_length(source, used, length)]

    def _least(self, length: int) -> int:
        return max(self.min_length or length, self.first + 1)

    def _of_length(self, source: str, texts: Sequence[Text], length: int) -> list[Window]:
        least, found, wanted = self._least(length), [], length
        if self.sliding:
            long_enough = [text for text in texts if len(text.ids) >= least]
            found = list(sliding_windows(long_enough[: self.limit], length, self.first))
        while not self.sliding and not found and wanted >= least:
            cut = windows(texts, wanted, self.limit, self.per_document)
            found = [dataclasses.replace(each, length=length) for each in cut]
            wanted //= 2
        if not found:
            raise ValueError(
                f"{source}: no document has {least} tokens, the longest of {len(texts)} has "
                f"{max(len(text.ids) for text in texts)}; choose a smaller --length"
            )
        return found


def read_texts(source: str, tokenizer: PreTrainedTokenizerBase, cut: Cut, text_column: str = "text") -> list[Text]:
    """Documents of a file, or of a source of the Hub, until there are enough long ones.

    Of a source of the Hub no more than its first 10,000 documents are looked at.

    Raises
    ------
    ValueError, OSError, ImportError
        As in ``lococo.data.documents.documents``.
    """
    texts: list[Text] = []
    long_ones = 0
    most = MOST_LOOKED_AT if local_files(source) is None else None
    for document in itertools.islice(documents([source], text_column, in_order=True), most):
        ids = tokenizer(document["text"]).input_ids
        texts.append(Text(document["domain"], document["id"], ids))
        long_ones += len(ids) >= cut.enough
        if long_ones == cut.limit:
            break
    return texts


def read_windows(
    sources: Sequence[str | Path] | None, tokenizer: PreTrainedTokenizerBase, cut: Cut, text_column: str = "text"
) -> list[Window]:
    """Windows of every file of some sources, or of the domains of Proof-Pile-2 for None.

    Raises
    ------
    ValueError, OSError, ImportError
        If a source holds no text, or none that is long enough.
    """
    found: list[Window] = []
    times: Counter[tuple[str, str]] = Counter()
    if sources is None:
        for domain, source in PROOF_PILE.items():
            texts = [dataclasses.replace(text, domain=domain) for text in read_texts(source, tokenizer, cut)]
            found += cut.windows(source, _told_apart(texts, times))
    for file in dict.fromkeys(single_files(sources or ())):
        found += cut.windows(file, _told_apart(read_texts(file, tokenizer, cut, text_column), times))
    return found


def _told_apart(texts: Iterable[Text], times: Counter[tuple[str, str]]) -> list[Text]:
    """Texts with names of their own: those of two files, and ids that are none, may be the same."""
    named = []
    for text in texts:
        name = text.name
        while (text.domain, name) in times:  # also one of a document that is called "name (2)" itself
            times[text.domain, text.name] += 1
            name = f"{text.name} ({times[text.domain, text.name]})"
        times[text.domain, name] += 1
        named.append(dataclasses.replace(text, name=name))
    return named
