"""RULER's tasks, generated at any length: needles, variables, common and frequent words; and BABILong's."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.long.items import Item, Task
from experiments.long.prompts import Prompts
from lococo.evaluation.needles import ADJECTIVES, NOUNS, Filler, largest

DEPTHS = 11  # from start to end in tenths
Builder = Callable[[int, random.Random, Filler, float], Item]


def _numbers(
    size: int, rng: random.Random, filler: Filler, depth: float, keys: int = 1, values: int = 1, asked: int = 1
) -> Item:
    names = [
        f"{ADJECTIVES[number % len(ADJECTIVES)]}-{NOUNS[number // len(ADJECTIVES)]}"
        for number in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), keys)
    ]
    numbers = [str(number) for number in rng.sample(range(10**6, 10**7), keys * values)]
    needles = [f"The secret number of {names[i // values]} is {number}." for i, number in enumerate(numbers)]
    one = values == asked == 1
    depths = [depth if one and not index else rng.random() for index in range(len(needles))]
    wanted = " and ".join(names[:asked])
    question = f"What is the secret number of {wanted}" if one else f"What are all the secret numbers of {wanted}"
    return Item(
        "Secret numbers are hidden in the text below. Remember them.\n\n",
        filler.hide(list(zip(depths, needles, strict=True)), size, rng),
        f"\n\n{question}, as the text above says?\nAnswer:",
        tuple(numbers[: asked * values]),
        depth=depth if one else None,
    )


def _variables(size: int, rng: random.Random, filler: Filler, depth: float, hops: int = 4) -> Item:
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(hops + 1)]
    number = rng.randrange(10**4, 10**5)
    chain = [f"VAR {name} = {before}." for name, before in zip(names, [str(number), *names], strict=False)]
    depths = sorted(rng.random() for _ in chain)
    return Item(
        "Variables are set in the text below, some to a number, some to another variable. Follow them.\n\n",
        filler.hide(list(zip(depths, chain, strict=True)), size, rng),
        f"\n\nWhich {len(names)} variables have the value {number} in the text above? Name all of them.\nAnswer:",
        tuple(names),
    )


def _common_words(size: int, rng: random.Random, filler: Filler, depth: float, common: int = 10) -> Item:
    often = min(30, size // (2 * common))  # up to half of the list; other words come three times at most
    others = size - often * common
    words = made_up_words(common + 3 + others // 3, rng)
    entries = words[:common] * often + [words[common + index // 3] for index in range(others)]
    rng.shuffle(entries)
    return Item(
        "Here is a numbered list of words. Some come much more often than the others.\n\n",
        " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1)),
        f"\n\nWhich {common} words come most often in the list above?\nAnswer:",
        tuple(words[:common]),
    )


def _frequent_words(size: int, rng: random.Random, filler: Filler, depth: float, asked: int = 3) -> Item:
    total = 1.6449  # zeta(2): the k-th word has the share k ** -2 / zeta(2)
    counts = [int(size / (total * rank**2)) for rank in range(1, int((size / total) ** 0.5) + 1)]
    counts += [1] * (size - sum(counts))
    words = made_up_words(len(counts), rng)
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return Item(
        "Here is a text in a made-up language. Count its words.\n\n",
        " ".join(text),
        f"\n\nWhich {asked} words come most often in the text above?\nAnswer:",
        tuple(words[:asked]),
    )


# Name: how it is built, the least size, and how many tokens an answer has.
RULER: dict[str, tuple[Builder, int, int]] = {
    "ruler-niah_single": (_numbers, 1, 32),
    "ruler-niah_multikey": (partial(_numbers, keys=4), 1, 32),
    "ruler-niah_multivalue": (partial(_numbers, values=4), 1, 96),
    "ruler-niah_multiquery": (partial(_numbers, keys=4, asked=4), 1, 96),
    "ruler-variable_tracking": (_variables, 1, 64),
    "ruler-common_words": (_common_words, 80, 120),
    "ruler-frequent_words": (_frequent_words, 60, 50),
}
BABILONG = tuple(f"babilong-qa{number}" for number in range(1, 6))


def generated_task(
    name: str, prompts: Prompts, filler: Filler, length: int, count: int, seed: int, data_dir: Path | None = None
) -> Task:
    """Items of one task and length: the prompt and the longest answer together have that many tokens, or a few less.

    Parameters
    ----------
    length : int
        Tokens of the model's tokenizer.
    count : int
        Items. Those with one needle put it at as many depths, evenly spaced, up to eleven.
    data_dir : Path, optional
        Holds ``babi`` for BABILong's tasks.

    Raises
    ------
    ValueError, FileNotFoundError
        If the length is too short, or there is no folder of bAbI's files.
    """
    if name in RULER:
        builder, least, max_new_tokens = RULER[name]
        metric = "share_found"
    else:
        stories = babi_stories(babi_file(name, data_dir))
        builder, least, max_new_tokens = partial(_story, stories=stories), 1, 16
        metric = "names_only"

    def count_tokens(item: Item) -> int:
        return len(prompts.ids(item)) + max_new_tokens

    spaced = min(count, DEPTHS)
    items = []
    for index in range(count):
        depth = index % spaced / max(spaced - 1, 1)

        def build(size: int, index: int = index, depth: float = depth) -> Item:
            return builder(size, random.Random(f"{seed} {name} {length} {index}"), filler, depth)

        items.append(largest(build, count_tokens, least, length))
    return Task(name, metric, max_new_tokens, tuple(items), length=length)


def babi_file(name: str, data_dir: Path | None) -> Path:
    """The file of bAbI that a task of BABILong needs.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    folder = Path("DATA_DIR" if data_dir is None else data_dir, "babi")
    found = sorted(folder.glob(f"{name.removeprefix('babilong-')}_*.txt"))
    if not found:
        raise FileNotFoundError(
            f"{name} needs bAbI's files {folder}/{name.removeprefix('babilong-')}_*.txt: --data-dir"
        )
    return found[0]


def babi_stories(path: Path) -> list[tuple[tuple[str, ...], str, str]]:
    """Facts so far, question and answer, for every question in a file of bAbI."""
    stories = []
    facts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            facts = []
        question, *answer = (part.strip() for part in re.split(r"[\t|]", rest))
        if answer:
            stories.append((tuple(facts), question, answer[0]))
        else:
            facts.append(question)
    return stories


def _story(
    size: int, rng: random.Random, filler: Filler, depth: float, stories: list[tuple[tuple[str, ...], str, str]]
) -> Item:
    facts, question, answer = rng.choice(stories)
    depths = sorted(rng.random() for _ in facts)
    return Item(
        "Facts about people, places and things are hidden in the text below. Later facts overrule earlier ones.\n\n",
        filler.hide(list(zip(depths, facts, strict=True)), size, rng),
        f"\n\nAnswer with one word from the facts in the text above.\nQuestion: {question}\nAnswer:",
        (answer,),
        options=tuple(sorted({each for _, _, each in stories})),
    )


def made_up_words(count: int, rng: random.Random) -> list[str]:
    """So many different words of three syllables that mean nothing."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    return [
        "".join(syllables[number // len(syllables) ** place % len(syllables)] for place in range(3))
        for number in rng.sample(range(len(syllables) ** 3), count)
    ]
