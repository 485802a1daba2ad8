"""Needles in a haystack: numbers that stand somewhere in a long text, and are asked for at its end.

RULER (Hsieh et al. 2024), which lm-eval has, hides them at chance; here length and depth are given, and drawn against
each other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from lococo.digest import model_digest
from lococo.evaluation.equal_bytes import bytes_per_head
from lococo.evaluation.losses import digest
from lococo.files import write_whole
from lococo.generation import read_and_answer
from lococo.methods import Run
from lococo.results.journal import Journal
from lococo.results.plots import HeatMap, picture
from lococo.results.tables import beside, label_of, write_result

T = TypeVar("T")
MAX_NEW_TOKENS = 32

_NOUNS = (
    "river garden teacher window market letter bridge kitchen farmer valley candle station meadow basket clock road"
)
_ADJECTIVES = "quiet green heavy early narrow bright old round plain distant gentle dusty northern warm broad simple"
_VERBS = "follows watches paints crosses remembers describes leaves visits repairs measures admires borrows"
NOUNS, ADJECTIVES, VERBS = (tuple(words.split()) for words in (_NOUNS, _ADJECTIVES, _VERBS))


class Filler:
    """Words that go on for ever.

    Parameters
    ----------
    texts : iterable of str
        None: sentences are generated.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.words = [word for text in texts for word in text.split()] or _generated(random.Random(0), sentences=4000)
        self.starts = [0, *(index for index in range(1, len(self.words)) if _ends(self.words[index - 1]))]

    def take(self, count: int, start: int) -> list[str]:
        """So many words from a start on; after the last comes the first."""
        turns = 1 + (start + count) // len(self.words)
        return (self.words * turns)[start : start + count]

    def hide(self, sentences: Sequence[tuple[float, str]], count: int, rng: random.Random) -> str:
        """So many words with sentences between them, each at its depth (0 to 1), where one sentence ends."""
        words = self.take(count, rng.choice(self.starts))
        gaps = [0, *(index for index in range(1, count) if _ends(words[index - 1])), count]
        placed: dict[int, list[str]] = {}
        for depth, sentence in sorted(sentences, key=lambda each: each[0]):
            gap = min(gaps, key=lambda index: abs(index - depth * count))
            placed.setdefault(gap, []).append(sentence)
        parts, last = [], 0
        for gap, hidden in placed.items():
            parts += [*words[last:gap], *hidden]
            last = gap
        return " ".join(parts + words[last:])


def _ends(word: str) -> bool:
    return re.search(r"[.!?][\"')\]]*$", word) is not None


def _generated(rng: random.Random, sentences: int) -> list[str]:
    words: list[str] = []
    for _ in range(sentences):
        subject, thing, place = rng.sample(NOUNS, 3)
        first, second = rng.sample(ADJECTIVES, 2)
        words += f"The {first} {subject} {rng.choice(VERBS)} the {second} {thing} near the {place}.".split()
    return words


@dataclasses.dataclass(frozen=True)
class Needle:
    """A question about a text that holds its answer.

    Attributes
    ----------
    ids : torch.Tensor
        (1, tokens) of text and question.
    answer : str
    length : int
        Tokens that prompt and answer may have together.
    depth : float
        Where the answer stands: 0 is the text's start, 1 its end.
    """

    ids: torch.Tensor
    answer: str
    length: int
    depth: float


def make_needles(
    tokenizer: Any,
    filler: Filler,
    lengths: Sequence[int],
    *,
    depths: int = 11,
    items: int = 1,
    distractors: int = 0,
    chat: bool = False,
    seed: int = 0,
) -> list[Needle]:
    """Questions of every length with the answer at every depth.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    lengths : sequence of int
        Tokens of prompt and answer; a prompt has that many or a few less.
    depths : int
        Places of the answer, evenly spaced from the text's start to its end.
    items : int
        Of each length and depth, with other numbers in other text.
    distractors : int
        Other numbers in the text that are not asked for.
    chat : bool
        Put prompts into the tokenizer's chat template.

    Raises
    ------
    ValueError
        If a length is too short, a number is not positive, or there is no chat template.
    """
    for name, value, least in (("depths", depths, 1), ("items", items, 1), ("distractors", distractors, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if chat and not tokenizer.chat_template:
        raise ValueError("--chat needs a tokenizer with a chat template, and this one has none")

    def needle(length: int, depth: float, index: int) -> Needle:
        def build(size: int) -> tuple[list[int], str]:
            rng = random.Random(f"{seed} {length} {depth} {index}")
            prompt, answer = _prompt(filler, size, depth, distractors, rng)
            if not chat:
                return tokenizer(prompt).input_ids, answer
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            return tokenizer(text, add_special_tokens=False).input_ids, answer

        ids, answer = largest(build, lambda built: len(built[0]) + MAX_NEW_TOKENS, 1, length)
        return Needle(torch.tensor([ids]), answer, length, depth)

    spaced = [index / max(depths - 1, 1) for index in range(depths)]
    places = itertools.product(dict.fromkeys(lengths), spaced, range(items))  # a length twice is no other needle
    return list(itertools.starmap(needle, places))


def _prompt(filler: Filler, size: int, depth: float, distractors: int, rng: random.Random) -> tuple[str, str]:
    numbers = [str(number) for number in rng.sample(range(10**6, 10**7), 1 + distractors)]
    every = range(len(ADJECTIVES) * len(NOUNS))
    names = [
        f"{ADJECTIVES[number % len(ADJECTIVES)]}-{NOUNS[number // len(ADJECTIVES)]}"
        for number in rng.sample(every, 1 + distractors)
    ]
    sentences = [f"The secret number of {name} is {number}." for name, number in zip(names, numbers, strict=True)]
    depths = [depth, *(rng.random() for _ in range(distractors))]
    text = filler.hide(list(zip(depths, sentences, strict=True)), size, rng)
    question = f"What is the secret number of {names[0]}, as the text above says?\nAnswer:"
    return f"Secret numbers are hidden in the text below. Remember them.\n\n{text}\n\n{question}", numbers[0]


def largest(build: Callable[[int], T], count: Callable[[T], int], least: int, limit: int) -> T:
    """The largest of things of growing size that counts at most ``limit`` tokens.

    Parameters
    ----------
    build : callable
        A thing from a size of at least ``least``.
    count : callable
        Tokens of a thing.

    Raises
    ------
    ValueError
        If the smallest has more.
    """
    low, high = least, max(2 * least, 64)
    if count(build(low)) > limit:
        raise ValueError(f"a length of {limit} tokens is too short: this task needs {count(build(low))}")
    while count(build(high)) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(build(middle)) <= limit else (low, middle)
    return build(low)


def evaluate_needles(
    model: Any, tokenizer: Any, needles: Sequence[Needle], runs: Sequence[Run], output: Path, command: str
) -> list[dict[str, Any]]:
    """Ask, write ``<output>.json``, ``.md`` and ``.png``, and return the rows. A killed run resumes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.

    Returns
    -------
    list of dict
        One row per method, length and depth; ``found`` is the share of answers that hold the number.
    """
    journal = Journal(beside(output, ".partial.jsonl"), of=model_digest(model))
    rows = []
    for run in tqdm(runs, desc="methods", disable=None):
        found: dict[tuple[int, float], list[bool]] = defaultdict(list)
        with run.applied(model):
            for needle in tqdm(needles, desc=f"{run.name} {run.num_slots or ''}", leave=False, disable=None):
                key = (model.name_or_path, run.name, run.identity(), digest(needle.ids))
                answer = journal.measure(key, functools.partial(_answer, model, tokenizer, needle))
                found[needle.length, needle.depth].append(needle.answer in answer)
        held = {length: bytes_per_head(model, run, length) for length in {length for length, _ in found}}
        rows += [
            {
                **run.columns,
                "bytes_per_head": held[length],
                "length": length,
                "depth": depth,
                "items": len(answers),
                "found": sum(answers) / len(answers),
            }
            for (length, depth), answers in found.items()
        ]
    facts: dict[str, Any] = {"seconds": journal.seconds, "commits": journal.commits}
    write_result(output, command, model.device, rows, table=by_length(rows), **facts)
    write_whole(beside(output, ".png"), _picture(rows))
    journal.finish()
    return rows


def _answer(model: Any, tokenizer: Any, needle: Needle) -> str:
    ids = needle.ids.to(model.device)
    reading = read_and_answer(model, ids, max_new_tokens=MAX_NEW_TOKENS, progress=False, do_sample=False)
    return tokenizer.decode(reading.answer, skip_special_tokens=True)


def by_length(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per method and length, over all depths, which have as many items each."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    names = ("method", "num_slots", "block_size", "bytes_per_head", "length")
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return [
        {
            **dict(zip(names, values, strict=True)),
            "items": sum(row["items"] for row in group),
            "found": statistics.fmean(row["found"] for row in group),
        }
        for values, group in groups.items()
    ]


def _picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """A map per method: what was found, by depth and length."""
    found = {(label_of(row), row["depth"], row["length"]): row["found"] for row in rows}
    methods, depths, lengths = (list(dict.fromkeys(key[place] for key in found)) for place in range(3))
    maps = [
        HeatMap(
            [[found[method, depth, length] for length in lengths] for depth in depths],
            method,
            xticks=list(map(str, lengths)),
            yticks=[f"{depth:.0%}" for depth in depths],
            limits=(0, 1),
            colors="RdYlGn",
        )
        for method in methods
    ]
    size = (1 + 2.6 * len(maps), 3.2)
    return picture([maps], size, title="share of needles found", xlabel="tokens", ylabel="depth of the needle")
