"""``lococo eval tasks``: accuracy by few-shot task and method."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lococo.evaluation.harness import PrefixLM
from lococo.evaluation.tasks import FewShotTask, parse_tasks
from lococo.methods import Run, as_method
from lococo.results.journal import Journal
from lococo.results.tables import beside, write_result

Outcome = dict[str, Any]


def read_tasks(names: Sequence[str], data_dir: Path | None, seed: int) -> list[FewShotTask]:
    """Tasks named as ``arc_easy:40``.

    Raises
    ------
    ValueError, OSError
        If a name is wrong, or data are missing or cannot be scored.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what every task here does
    return [FewShotTask(name, shots, data_dir, seed) for name, shots in parse_tasks(names)]


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[FewShotTask],
    runs: Sequence[Run],
    output: Path,
    command: str,
    *,
    limit: int | None = None,
    max_length: int | None = None,
    **facts: Any,
) -> list[dict[str, Any]]:
    """Measure, write ``<output>.json``, ``.md`` and ``.png``, and return the rows. A killed run resumes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    limit : int, optional
        Questions per task. None: all.
    max_length : int, optional
        Tokens of a prompt with its answer. None: as many as the model was made for.
    **facts
        What else the result says of all rows; a journal of other facts is not gone on with.

    Raises
    ------
    ValueError
        If a question is longer than ``max_length``.
    """
    lm = PrefixLM(model, tokenizer=tokenizer, max_length=max_length)
    questions = [task.questions(limit) for task in tasks]
    journal = Journal(beside(output, ".partial.jsonl"))
    outcomes: dict[tuple[int, int], list[Outcome]] = {}
    for column, each in enumerate(tqdm(runs, desc="methods", disable=None)):
        with as_method(model, each.config, each.heads):
            lm.forget()
            for line, task in enumerate(tasks):
                same = (*facts.values(), lm.max_length, task.name, task.shots, each.name, each.identity())
                outcomes[line, column] = [
                    journal.measure((*same, task.digest(question)), functools.partial(ask, lm, task, question))
                    for question in tqdm(questions[line], desc=f"{each.name} {task.name}", leave=False, disable=None)
                ]
    rows = [_row(tasks[line], runs[column], outcomes[line, column]) for line, column in sorted(outcomes)]
    write_result(output, command, model.device, rows, **facts, max_length=lm.max_length)
    plot_rows(rows, beside(output, ".png"))
    journal.finish()
    return rows


def ask(lm: PrefixLM, task: FewShotTask, question: dict[str, Any]) -> Outcome:
    """One question to the model as it is."""
    prompt = task.prompt(lm, question)
    return {"right": task.is_right(lm, question, prompt), "shots": prompt.shots, "tokens": prompt.tokens}


def _row(task: FewShotTask, run: Run, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    count = len(outcomes)
    accuracy = sum(outcome["right"] for outcome in outcomes) / count
    return {
        "task": task.name,
        "shots": task.shots,
        "method": run.name,
        "num_slots": run.num_slots,
        "block_size": None if run.config is None else run.config.block_size,
        "items": count,
        "metric": task.metric,
        "accuracy": accuracy,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / count),
        "shots_that_fit": sum(outcome["shots"] for outcome in outcomes) / count,
        "prompt_tokens": sum(outcome["tokens"] for outcome in outcomes) / count,
    }


def plot_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy by task and method, with a standard error to both sides."""
    from matplotlib.figure import Figure

    bars: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        label = row["method"] if row["num_slots"] is None else f"{row['method']} {row['num_slots']}"
        bars.setdefault(label, {})[f"{row['task']}\n{row['shots']} shots"] = row
    tasks = list(dict.fromkeys(name for by_task in bars.values() for name in by_task))
    figure = Figure(figsize=(max(5, 1.7 * len(tasks)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(bars)
    for index, (label, by_task) in enumerate(bars.items()):
        places = [tasks.index(name) + (index - (len(bars) - 1) / 2) * width for name in by_task]
        errors = [row["stderr"] for row in by_task.values()]
        axes.bar(places, [row["accuracy"] for row in by_task.values()], width, yerr=errors, capsize=2, label=label)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("accuracy")
    figure.legend(frameon=False, loc="outside upper center", ncols=len(bars))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
