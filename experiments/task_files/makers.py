"""Data of RULER's and BABILong's tasks by lm-eval's own generators, with texts from a local file.

A copy of this file lies beside the task files that name its functions. lm-eval calls them with a task's metadata, that
of ``--metadata`` among it: ``max_seq_lengths``, ``num_samples``, and the ``tokenizer`` that lengths are counted with.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import nltk

SENTENCES = "nltk_data"
nltk.data.path.append(str(Path(__file__).parent / SENTENCES))  # behind nltk's own, if it is installed

LENGTHS = (4096,)  # RULER's, where none are said
QUESTION = "\nWhat are all the special magic numbers for "
NEEDLE = re.compile(r"One of the special magic numbers for (\S+) is: (\d+)\.")


def niah_single_1(**told: Any) -> dict[str, datasets.Dataset]:
    """RULER's needle in a repeated sentence."""
    return _needles("repeat", **told)


def niah_single_2(**told: Any) -> dict[str, datasets.Dataset]:
    """RULER's needle in a text."""
    return _needles("essay", **told)


def niah_multikey_1(**told: Any) -> dict[str, datasets.Dataset]:
    """RULER's needle in a text, among three others."""
    return _needles("essay", num_needle_k=4, **told)


def niah_questions(questions: int = 4, **told: Any) -> dict[str, datasets.Dataset]:
    """Several needles in a text, and a question about each of them: the text is the same up to the question.

    Parameters
    ----------
    questions : int
        Needles, and questions, of each of ``num_samples`` texts.
    """
    asked = _needles("essay", num_needle_k=questions, num_needle_q=questions, **told)["test"]
    return _test([item for sample in asked for item in _one_by_one(sample)])


def _one_by_one(sample: dict[str, Any]) -> Iterable[dict[str, Any]]:
    text, _, _ = sample["input"].rpartition(QUESTION)
    for key, number in NEEDLE.findall(text):
        yield {
            **sample,
            "input": f"{text}\nWhat is the special magic number for {key} mentioned in the provided text?",
            "outputs": [number],
            "gen_prefix": f"The special magic number for {key} mentioned in the provided text is",
            "document_id": f"{sample['max_length']} {sample['index']}",
        }


def ruler_vt(num_samples: int, max_seq_lengths: Sequence[int] = LENGTHS, **told: Any) -> dict[str, datasets.Dataset]:
    """RULER's variables that are set to one another."""
    from lm_eval.tasks.ruler.vt_utils import sys_vartrack_w_noise_random

    tokenizer = _tokenizer(**told)
    (example,) = sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)
    return _test(
        item
        for length in max_seq_lengths
        for item in sys_vartrack_w_noise_random(tokenizer, num_samples, length, icl_example=dict(example))
    )


def _needles(
    kind: str,
    *,
    haystack: str,
    num_samples: int,
    max_seq_lengths: Sequence[int] = LENGTHS,
    num_needle_k: int = 1,
    num_needle_q: int = 1,
    **told: Any,
) -> dict[str, datasets.Dataset]:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    tokenizer = _tokenizer(**told)
    return _test(
        item
        for length in max_seq_lengths
        for item in generate_samples(
            _words(haystack) if kind == "essay" else get_haystack(type_haystack=kind),
            max_seq_length=length,
            template=TEMPLATE,
            type_haystack=kind,
            type_needle_k="words",
            type_needle_v="numbers",
            num_needle_k=num_needle_k,
            num_needle_q=num_needle_q,
            num_samples=num_samples,
            TOKENIZER=tokenizer,
        )
    )


def babilong(
    qa_split: str,
    haystack: str,
    stories: str,
    num_samples: int,
    max_seq_lengths: str | Sequence[int] = "0k",
    **told: Any,
) -> dict[str, datasets.Dataset]:
    """Facts of bAbI among the sentences of a text, in their order, and a question about them.

    Parameters
    ----------
    max_seq_lengths : str or sequence of int
        As BABILong calls its lengths, ``0k``, ``1k``, ..., or tokens; ``0k`` is the facts alone.
    """
    tokenizer = _tokenizer(**told)
    lengths = [1024 * int(max_seq_lengths.removesuffix("k"))] if isinstance(max_seq_lengths, str) else max_seq_lengths
    drawn = random.Random(f"{qa_split} {max_seq_lengths}")
    items = []
    for length in lengths:
        for facts, question, target in drawn.sample(read_stories(Path(stories)), num_samples):
            room = length - sum(len(tokenizer(fact).input_ids) for fact in facts)
            text = hide(facts, _passage(haystack, room, tokenizer, drawn), drawn)
            items.append({"input": text, "question": question, "target": target})
    return {qa_split: datasets.Dataset.from_list(items)}


def hide(facts: Sequence[str], sentences: Sequence[str], drawn: random.Random) -> str:
    """A text with facts, in their order, at random places between its sentences."""
    places = sorted(drawn.randint(0, len(sentences)) for _ in facts)
    text = list(sentences)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        text.insert(place, fact)
    return " ".join(text)


def read_stories(path: Path) -> list[tuple[tuple[str, ...], str, str]]:
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


def learn_sentences(haystack: Path, folder: Path) -> None:
    """Let nltk learn where sentences end, for machines that cannot load what its makers learned."""
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    trainer = PunktTrainer()
    trainer.train(" ".join(_words(str(haystack))))
    model = folder / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True, exist_ok=True)
    nltk.data.path.append(str(folder))  # nltk writes nowhere else
    save_punkt_params(trainer.get_params(), dir=str(model))


@cache
def _words(haystack: str) -> list[str]:
    """All words of a file's texts."""
    lines = Path(haystack).read_text(encoding="utf-8").split("\n")
    return " ".join(json.loads(line)["text"] for line in lines if line.strip()).split()


@cache
def _sentences(haystack: str) -> list[str]:
    return nltk.sent_tokenize(" ".join(_words(haystack)))


def _passage(haystack: str, room: int, tokenizer: Any, drawn: random.Random) -> list[str]:
    """Sentences in a row, from anywhere in the text, of at most ``room`` tokens."""
    sentences = _sentences(haystack)
    start, passage = drawn.randrange(len(sentences)), []
    for place in range(len(sentences)):
        sentence = sentences[(start + place) % len(sentences)]
        room -= len(tokenizer(sentence).input_ids)
        if room < 0:
            break
        passage.append(sentence)
    return passage


def _tokenizer(tokenizer: str, **others: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=True)


def _test(items: Iterable[dict[str, Any]]) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(list(items))}
