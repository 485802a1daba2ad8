"""LongBench's tasks, from its own lines or from MiniLongBench's prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from lm_eval.utils import apply_template, ignore_constructor

from experiments.task_files.common import Row, own_file, write_task_file

NAMES = tuple(
    f"longbench_{path.stem}"
    for path in sorted(own_file("longbench").glob("[!_]*.yaml"))
    if not path.stem.endswith("_e")  # of equal lengths, in files of their own
)


class OtherPrompt(ValueError):
    """A prompt that is not what lm-eval's template makes."""


def write_task(name: str, data_dir: Path, output: Path) -> None:
    """Write a task file and its rows.

    Raises
    ------
    FileNotFoundError
        If ``data_dir`` has the set in neither form.
    OtherPrompt
        If MiniLongBench's prompts have another form than lm-eval's.
    """
    own = f"longbench/{name.removeprefix('longbench_')}.yaml"
    rows = local_rows(name, template_of(own), data_dir)
    write_task_file(name, own, {"test": rows}, output, {})


def local_rows(name: str, template: str, data_dir: Path) -> list[Row]:
    """Rows in the Hub's form."""
    short = name.removeprefix("longbench_")
    lines = data_dir / "longbench" / f"{short}.jsonl"
    if lines.is_file():
        return [_row_of_line(json.loads(line)) for line in lines.read_text(encoding="utf-8").split("\n") if line]
    prompts = data_dir / "minilongbench" / f"MiniLongBench_{short}.json"
    if not prompts.is_file():
        raise FileNotFoundError(f"{data_dir} has neither {lines.relative_to(data_dir)} nor {prompts.name}")
    return [_row_of_prompt(entry, template) for entry in json.loads(prompts.read_text(encoding="utf-8")).values()]


def template_of(own: str) -> str:
    """The prompt of a task file of lm-eval, with ``{{context}}`` and ``{{question}}``."""

    class Loader(yaml.SafeLoader):
        """Reads task files without the functions that they name."""

    Loader.add_constructor("!function", ignore_constructor)
    return yaml.load(own_file(own).read_text(encoding="utf-8"), Loader)["doc_to_text"]


def _row_of_line(line: Row) -> Row:
    return {"question": line["input"], **{name: line[name] for name in ("context", "answers", "all_classes")}}


def _row_of_prompt(entry: dict[str, Any], template: str) -> Row:
    gold = entry["gold"] if isinstance(entry["gold"], dict) else {"answers": entry["gold"], "all_classes": None}
    return {**undo(template, entry["origin_prompt"]), "answers": gold["answers"], "all_classes": gold["all_classes"]}


def undo(template: str, prompt: str) -> dict[str, str]:
    """Context and question that a template makes just this prompt of.

    Raises
    ------
    OtherPrompt
        If there are none.
    """
    before, _, middle, *rest = re.split(r"{{(context|question)}}", template)
    after = rest[1] if rest else middle
    context, question = prompt[len(before) : len(prompt) - len(after)], ""
    if rest and middle:
        context, _, question = context.rpartition(middle)
    found = {"context": context, "question": question}
    if apply_template(template, found) != prompt:
        raise OtherPrompt(f"the prompt is not lm-eval's: it begins {prompt[:60]!r} and ends {prompt[-40:]!r}")
    return found
