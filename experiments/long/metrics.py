"""Scores of answers, each from 0 to 1, by the definitions the sets were published with."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from experiments.long.items import Item


def normalized_words(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, without punctuation and articles."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def characters(text: str) -> list[str]:
    """Characters of a Chinese text in lower case, without punctuation and spaces.

    LongBench compares words found by jieba; characters need no dictionary and give figures of the same order, not the
    same figures.
    """
    return [each for each in text.lower() if unicodedata.category(each)[0] not in "PZCS"]


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of tokens, counted as often as they occur on both sides."""
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0


class _Characters:
    """Tokenizer of Chinese texts for the package rouge-score, whose own knows Latin letters only."""

    def tokenize(self, text: str) -> list[str]:
        return characters(text)


def rouge(answer: str, references: Sequence[str], types: Sequence[str], stem: bool = False, chinese: bool = False):
    """F-measures of the package rouge-score, for each type that of the best reference.

    LongBench takes ROUGE-L from the package rouge, which cuts texts at spaces; rouge-score drops punctuation, too.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(types), use_stemmer=stem, tokenizer=_Characters() if chinese else None)
    scores = scorer.score_multi(list(references), answer)
    return [scores[each].fmeasure for each in types]


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes an answer names, if the right one is among them.

    A class whose name is a part of the right one's does not count as named.
    """
    named = [each for each in classes if each in answer]
    named = [each for each in named if each == reference or each not in reference]
    return 1 / len(named) if reference in named else 0.0


def number_share(answer: str, reference: str) -> float:
    """Share of the numbers in an answer that are the reference's."""
    right = re.findall(r"\d+", reference)[0]
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def edit_similarity(answer: str, reference: str) -> float:
    """Similarity of a line of code to the first line of an answer that is neither a comment nor a fence."""
    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), answer)
    return round(100 * difflib.SequenceMatcher(None, code, reference).ratio()) / 100


def share_found(answer: str, references: Sequence[str]) -> float:
    """Share of the references that an answer contains, in any case: RULER's score."""
    return sum(each.lower() in answer.lower() for each in references) / len(references)


def names_only(answer: str, reference: str, labels: Sequence[str]) -> float:
    """1 if the first sentence of an answer names the reference and no other label: BABILong's score."""
    words = re.findall(r"\w+", re.split(r"[.\n]", answer.strip().lower())[0])
    named = {label for label in labels if label.lower() in words}
    return float(named == {reference})


def right_choice(likelihoods: Sequence[float], item: Item) -> float:
    """1 if the reference is the option with the highest log-likelihood per character."""
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return float(item.options[best] in item.references)


def _best(score: Callable[[str, str], float]) -> Callable[[Any, Item], list[float]]:
    return lambda answer, item: [max(score(answer, reference) for reference in item.references)]


def _f1(answer: str, reference: str) -> float:
    return token_f1(normalized_words(answer), normalized_words(reference))


def _f1_zh(answer: str, reference: str) -> float:
    return token_f1(characters(answer), characters(reference))


@dataclasses.dataclass(frozen=True)
class Metric:
    """How an answer is scored.

    Attributes
    ----------
    score : callable
        Figures of one answer. Of several, the score of a set is the geometric mean of their means.
    by_likelihood : bool
        The answer is the log-likelihood per character of every option, not a text.
    """

    score: Callable[[Any, Item], list[float]]
    by_likelihood: bool = False


METRICS = {
    "f1": Metric(_best(_f1)),
    "f1_zh": Metric(_best(_f1_zh)),
    "rouge_l": Metric(lambda answer, item: rouge(answer, item.references, ["rougeL"])),
    "rouge_l_zh": Metric(lambda answer, item: rouge(answer, item.references, ["rougeL"], chinese=True)),
    "rouge_geometric": Metric(
        lambda answer, item: rouge(answer, item.references, ["rouge1", "rouge2", "rougeL"], stem=True)
    ),
    "accuracy": Metric(lambda answer, item: [right_choice(answer, item)], by_likelihood=True),
    "classification": Metric(
        lambda answer, item: [max(classification(answer, each, item.options) for each in item.references)]
    ),
    "count": Metric(_best(number_share)),
    "retrieval": Metric(_best(number_share)),
    "edit_similarity": Metric(_best(edit_similarity)),
    "share_found": Metric(lambda answer, item: [share_found(answer, item.references)]),
    "names_only": Metric(lambda answer, item: [names_only(answer, item.references[0], item.options)]),
}


def aggregate(figures: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Score of a set and its standard error by the jackknife: for plain means, the usual one. None for one item."""
    totals = [sum(each) for each in zip(*figures, strict=True)]
    count = len(figures)
    if count == 1:
        return _geometric(totals, 1), None
    without = [
        _geometric([total - each for total, each in zip(totals, row, strict=True)], count - 1) for row in figures
    ]
    middle = sum(without) / count
    variance = (count - 1) / count * sum((each - middle) ** 2 for each in without)
    return _geometric(totals, count), math.sqrt(variance)


def _geometric(totals: Sequence[float], count: int) -> float:
    if len(totals) == 1:
        return totals[0] / count
    return math.prod(max(total, 0.0) / count for total in totals) ** (1 / len(totals))
