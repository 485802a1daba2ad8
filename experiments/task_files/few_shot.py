"""Few-shot tasks, from files of their items and of their examples."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.task_files.common import Row, write_task_file

LETTERS = "ABCDEFGHIJ"


def _one_of(choices: Sequence[Any], index: Any) -> int:
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise ValueError(f"the answer is {index!r} of {len(choices)} choices")
    return index


def _arc(row: Row) -> Row:
    if "query" in row:  # the question in its prompt form
        question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        texts, labels = row["choices"], list(LETTERS[: len(row["choices"])])
        key = labels[_one_of(texts, row["gold"])]
    else:
        question, key = row["question"], row["answerKey"]
        texts, labels = row["choices"]["text"], row["choices"]["label"]
    if key not in labels:
        raise ValueError(f"the answer is {key!r}, the choices are {', '.join(labels)}")
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def _hellaswag(row: Row) -> Row:
    if "query" in row:
        label, _, context = row["query"].partition(": ")
        parts, endings, gold = (context, ""), row["choices"], row["gold"]
    else:
        label, parts, endings = row["activity_label"], (row["ctx_a"], row["ctx_b"]), row["endings"]
        gold = int(row["label"]) if str(row["label"]).isdigit() else row["label"]
    gold = str(_one_of(endings, gold))
    return {"activity_label": label, "ctx_a": parts[0], "ctx_b": parts[1], "endings": endings, "label": gold}


def _winogrande(row: Row) -> Row:
    kept = {name: row[name] for name in ("sentence", "option1", "option2", "answer")}
    if kept["answer"] not in ("1", "2"):
        raise ValueError(f"the answer is {kept['answer']!r}, expected '1' or '2'")
    if "_" not in kept["sentence"]:
        raise ValueError("the sentence has no gap '_'")
    return kept


def _race(row: Row) -> Row:
    problems = [
        {"question": question, "answer": answer, "options": options}
        for question, answer, options in zip(row["questions"], row["answers"], row["options"], strict=True)
    ]
    for problem in problems:
        if len(problem["options"]) != 4 or problem["answer"] not in ("A", "B", "C", "D"):
            raise ValueError(
                f"the answer is {problem['answer']!r} of {len(problem['options'])} options, expected A to D"
            )
    if not problems:
        raise ValueError("there is no question")
    return {"article": row["article"], "problems": repr(problems)}


def _every_question(row: Row) -> list[Row]:
    """Of an article of RACE, whose last question lm-eval asks, one row for each of its questions."""
    problems = ast.literal_eval(row["problems"])
    return [{**row, "problems": repr(problems[: count + 1])} for count in range(len(problems))]


def _triviaqa(row: Row) -> Row:
    aliases = row["answer"]["aliases"]
    if not aliases or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(f"the answer's aliases are {aliases!r}, expected a list of texts")
    return {"question": row["question"], "answer": {"aliases": aliases}}


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """Where a task's items and examples lie in the data folder.

    Attributes
    ----------
    scored : str
        Pattern of the file whose items are scored.
    split : str
        Name of the split that lm-eval's task scores.
    convert : callable
        Makes a line a row in the Hub's form; raises if it cannot be scored.
    own : str
        lm-eval's own task file, in its folder of tasks.
    examples : str, optional
        Pattern of the file with examples. None: the last items of the scored one, which are then not scored.
    items : callable, optional
        Makes a converted row of the scored file several items.
    folder : str, optional
        In the data folder. None: that of the task's name.
    """

    scored: str
    split: str
    convert: Callable[[Row], Row]
    own: str
    examples: str | None = "train*.json*"
    items: Callable[[Row], list[Row]] = lambda row: [row]
    folder: str | None = None


FILES = {
    "arc_easy": TaskFiles("test*.json*", "test", _arc, "arc/arc_easy.yaml"),
    "arc_challenge": TaskFiles("test*.json*", "test", _arc, "arc/arc_challenge.yaml"),
    "hellaswag": TaskFiles("validation*.json*", "validation", _hellaswag, "hellaswag/hellaswag.yaml"),
    "winogrande": TaskFiles("validation*.json*", "validation", _winogrande, "winogrande/default.yaml"),
    "race": TaskFiles("dev_high*.json*", "test", _race, "race/race.yaml", "train_high*.json*"),
    "race_questions": TaskFiles(
        "dev_high*.json*", "test", _race, "race/race.yaml", "train_high*.json*", items=_every_question, folder="race"
    ),
    "triviaqa": TaskFiles("validation*.json*", "validation", _triviaqa, "triviaqa/default.yaml", None),
}


def local_splits(name: str, shots: int, data_dir: Path) -> dict[str, list[Row]]:
    """Rows of a task: the split that is scored, and ``train`` with the examples.

    Raises
    ------
    FileNotFoundError
        If there is not just one file for a split.
    ValueError
        If a line cannot be scored, or no item is left.
    """
    files = FILES[name]
    folder = data_dir / (files.folder or name)
    rows = _read_rows(_only_file(folder, files.scored), files.convert)
    items = [item for row in rows for item in files.items(row)]
    if files.examples is not None:
        examples = _read_rows(_only_file(folder, files.examples), files.convert)
    else:
        if len(items) <= shots:
            raise ValueError(f"{name}: {shots} shots leave none of the {len(items)} items in {folder} to score")
        items, examples = items[: len(items) - shots], items[len(items) - shots :]
    return {files.split: items, "train": examples}


def write_task(name: str, data_dir: Path, output: Path, shots: int = 50) -> None:
    """Write a task file, and its data beside it.

    Parameters
    ----------
    shots : int
        Examples of a task that has no file with them.

    Raises
    ------
    FileNotFoundError, ValueError
        As ``local_splits``.
    """
    splits = local_splits(name, shots, data_dir)
    write_task_file(name, FILES[name].own, splits, output, {"training_split": "train", "fewshot_split": "train"})


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder} needs just one file {pattern}, found {names}")
    return found[0]


def _read_rows(path: Path, convert: Callable[[Row], Row]) -> list[Row]:
    """Rows of a file with one object per line, or one list of objects."""
    text = path.read_text(encoding="utf-8")
    rows = []
    try:
        lines = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(convert(line))
        except KeyError as error:
            raise ValueError(f"{path}, row {number} cannot be scored: it has no {error}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, row {number} cannot be scored: {error}") from error
    if not rows:
        raise ValueError(f"{path}: there is no row")
    return rows
