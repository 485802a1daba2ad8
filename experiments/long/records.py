"""Records of published sets, from the forms their files have."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Record:
    """A question about a document.

    Attributes
    ----------
    is_prompt : bool
        The document is a prompt as it is, question and all.
    """

    document: str
    question: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    is_prompt: bool = False


Reader = Callable[[str], Iterator[Record]]
_OPTION = re.compile(r"\n\s*\([A-D]\)\s*")


def longbench(text: str) -> Iterator[Record]:
    """LongBench's lines: ``context``, ``input``, ``answers``, ``all_classes``."""
    for line in _lines(text):
        yield Record(line["context"], line["input"], tuple(line["answers"]), tuple(line["all_classes"] or ()))


def minilongbench(text: str) -> Iterator[Record]:
    """MiniLongBench's numbered prompts, ``origin_prompt`` and ``gold``."""
    for entry in json.loads(text).values():
        gold = entry["gold"] if isinstance(entry["gold"], dict) else {"answers": entry["gold"], "all_classes": ()}
        yield Record(entry["origin_prompt"], "", tuple(gold["answers"]), tuple(gold["all_classes"]), is_prompt=True)


def leval(text: str) -> Iterator[Record]:
    """L-Eval's lines: a document as ``input``, several ``instructions`` with their ``outputs``."""
    for line in _lines(text):
        for question, answer in zip(line["instructions"], line["outputs"], strict=True):
            yield Record(line["input"], question, (answer.strip(),))


def leval_choice(text: str) -> Iterator[Record]:
    """The same, questions with their options (A) to (D)."""
    for record in leval(text):
        question, *options = (part.strip() for part in _OPTION.split(record.question))
        right = re.sub(r"^\([A-D]\)\s*", "", record.references[0])
        yield dataclasses.replace(record, question=question, references=(right,), options=tuple(options))


def scrolls_summary(text: str) -> Iterator[Record]:
    """SCROLLS' lines without a question: ``input`` and ``output``, a line for every reference."""
    return _scrolls(text, lambda source: (source, "", ()))


def scrolls_question(text: str) -> Iterator[Record]:
    """SCROLLS' lines with the question before the document, an empty line between them."""

    def split(source: str) -> tuple[str, str, tuple[str, ...]]:
        question, _, document = source.partition("\n\n")
        return document, question, ()

    return _scrolls(text, split)


def scrolls_choice(text: str) -> Iterator[Record]:
    """SCROLLS' lines with question, options (A) to (D) and document, empty lines between them."""

    def split(source: str) -> tuple[str, str, tuple[str, ...]]:
        question, first, second, third, rest = _OPTION.split(source, maxsplit=4)
        fourth, _, document = rest.partition("\n\n")
        return document, question.strip(), tuple(each.strip() for each in (first, second, third, fourth))

    return _scrolls(text, split)


def _scrolls(text: str, split: Callable[[str], tuple[str, str, tuple[str, ...]]]) -> Iterator[Record]:
    references: dict[str, list[str]] = {}
    sources = {}
    for line in _lines(text):
        sources[line["id"]] = line["input"]
        references.setdefault(line["id"], []).append(line["output"].strip())
    for name, source in sources.items():
        document, question, options = split(source)
        yield Record(document, question, tuple(references[name]), options)


def zero_scrolls(text: str) -> Iterator[Record]:
    """ZeroSCROLLS' lines, which say where in ``input`` the document and the question stand."""
    for line in _lines(text):
        document, question = (
            line["input"][line[f"{part}_start_index"] : line[f"{part}_end_index"]] for part in ("document", "query")
        )
        yield Record(document.strip(), question.strip(), (line["output"].strip(),))


def qmsum(text: str) -> Iterator[Record]:
    """QMSum's own lines: a meeting's turns, and queries about all of it or parts."""
    for line in _lines(text):
        meeting = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in line["meeting_transcripts"])
        for query in (*line["general_query_list"], *line["specific_query_list"]):
            yield Record(meeting, query["query"], (query["answer"].strip(),))


def squality(text: str) -> Iterator[Record]:
    """SQuALITY's own lines: a story, and questions with four answers each."""
    for line in _lines(text):
        for question in line["questions"]:
            answers = tuple(each["response_text"].strip() for each in question["responses"])
            yield Record(line["document"], question["question_text"], answers)


def _lines(text: str) -> Iterator[dict]:
    return (json.loads(line) for line in text.split("\n") if line.strip())
