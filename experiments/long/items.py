"""What is asked of a model: items of tasks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt, in three parts, and what is a good answer.

    Attributes
    ----------
    before, document, after : str
        They follow each other in the prompt; only the document may be cut.
    references : tuple of str
        Good answers.
    options : tuple of str
        Answers to choose from, or classes.
    depth : float, optional
        Where in the document the answer stands: 0 is its start, 1 its end.
    is_continued : bool
        The answer goes on with the prompt's text, examples or code: no turn of a chat.
    """

    before: str
    document: str
    after: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    depth: float | None = None
    is_continued: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """Items that are answered and scored alike.

    Attributes
    ----------
    metric : str
        A name in ``experiments.long.metrics.METRICS``.
    first_line : bool
        Only the first line of an answer counts: after examples models answer in a line and write more examples.
    length : int, optional
        Tokens of prompt and answer that generated items were made for.
    source : str
        Where the items are from.
    """

    name: str
    metric: str
    max_new_tokens: int
    items: tuple[Item, ...]
    first_line: bool = False
    length: int | None = None
    source: str = "generated"
