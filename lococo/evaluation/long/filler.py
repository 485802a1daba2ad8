"""Text to hide things in, from files or generated."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from lococo.data.documents import documents

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
    paths : sequence of Path
        Files or folders, as in ``documents``; none: sentences are generated.
    """

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        texts = [document["text"] for document in documents(list(map(str, paths)), in_order=True)]
        self.words = [word for text in texts for word in text.split()] or _generated(random.Random(0), sentences=4000)
        self.starts = [0, *(place for place in range(1, len(self.words)) if _ends(self.words[place - 1]))]

    def take(self, count: int, start: int) -> list[str]:
        """So many words from a start on; after the last comes the first."""
        turns = 1 + (start + count) // len(self.words)
        return (self.words * turns)[start : start + count]

    def hide(self, sentences: Sequence[tuple[float, str]], count: int, rng: random.Random) -> str:
        """So many words with sentences between them, each at its depth (0 to 1), where one sentence ends."""
        words = self.take(count, rng.choice(self.starts))
        gaps = [0, *(place for place in range(1, count) if _ends(words[place - 1])), count]
        placed: dict[int, list[str]] = {}
        for depth, sentence in sorted(sentences, key=lambda each: each[0]):
            gap = min(gaps, key=lambda place: abs(place - depth * count))
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


def made_up_words(count: int, rng: random.Random) -> list[str]:
    """So many different words of three syllables that mean nothing."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    return [
        "".join(syllables[number // len(syllables) ** place % len(syllables)] for place in range(3))
        for number in rng.sample(range(len(syllables) ** 3), count)
    ]
