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
    """

    before: str
    document: str
    after: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    depth: float | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Items that are answered and scored alike.

    Attributes
    ----------
    metric : str
        A name in ``lococo.evaluation.long.metrics.METRICS``.
    first_line : bool
        Only the first line of an answer counts: after examples models answer in a line and write more examples.
    length : int, optional
        Tokens of prompt and answer that generated items were made for.
    """

    name: str
    metric: str
    max_new_tokens: int
    items: tuple[Item, ...]
    first_line: bool = False
    length: int | None = None
