"""Tasks of lm-eval by method, compared with the full cache item by item."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lococo.digest import model_digest
from lococo.evaluation.equal_bytes import bytes_per_head
from lococo.evaluation.few_shot import FewShotTask, Figures, Prompt, document_of, is_mean
from lococo.files import write_whole
from lococo.methods import Run
from lococo.metrics import mean_of_items_interval
from lococo.results.journal import Journal
from lococo.results.plots import GAP, Bars, Series, in_rows, lines_over, method_styles, picture
from lococo.results.tables import beside, label_of, write_result

if TYPE_CHECKING:
    from lococo.evaluation.harness import PrefixLM


class _Remembered:
    """What lm-eval calls at every answer: it goes into the journal, with the tokens of prompts read for it."""

    def __init__(self, lm: PrefixLM, journal: Journal, key: Callable[[str, Any], list[Any]]) -> None:
        self.lm, self.journal, self.key, self.since = lm, journal, key, time.monotonic()

    def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
        tokens, self.lm.reader.tokens_read = self.lm.reader.tokens_read, 0
        before, self.since = self.since, time.monotonic()
        self.journal.add(self.key(kind, arguments), {"answer": answer, "tokens_read": tokens}, self.since - before)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a method makes of a task.

    Attributes
    ----------
    tokens_read : sequence of int
        Tokens that went through the model to read each item's prompts; what several share counts for one of them.
    """

    figures: Figures
    tokens_read: Sequence[int]


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[FewShotTask],
    runs: Sequence[Run],
    output: Path,
    command: str,
    *,
    limit: int | None = None,
    max_length: int | None = None,
    truncate: str | None = None,
    batch_size: int = 1,
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
    truncate : "middle", optional
        Leave out the middle of a question that is too long even without examples. None: refuse it.
    batch_size : int
        Prompts that are answered together, padded. With 1, what prompts share is read once.
    **facts
        What else the result says of all rows; a journal of other facts is not gone on with.

    Raises
    ------
    ValueError
        If a question is longer than ``max_length``.
    """
    from lococo.evaluation.harness import PrefixLM

    lm = PrefixLM(model, tokenizer=tokenizer, max_length=max_length, truncate=truncate, batch_size=batch_size)
    dtype = str(model.dtype).removeprefix("torch.")
    facts = {"lm_eval": version("lm_eval"), "dtype": dtype, "batch_size": batch_size, **facts}
    prompts = [[task.prompt(lm, question) for question in task.questions(limit)] for task in tasks]
    journal = Journal(beside(output, ".partial.jsonl"), of=model_digest(model))
    outcomes: dict[tuple[int, int], Outcome] = {}
    for column, run in enumerate(tqdm(runs, desc="methods", disable=None)):
        with run.applied(model):
            lm.forget()
            how = (model.name_or_path, *facts.values(), lm.max_length, truncate, run.identity())
            for line, task in enumerate(tasks):
                outcomes[line, column] = _outcome(lm, task, prompts[line], journal, how)
    rows = [
        row
        for line, task in enumerate(tasks)
        for column, run in enumerate(runs)
        for row in _rows(model, task, prompts[line], run, outcomes[line, column], _full(runs, outcomes, line))
    ]
    facts |= {"max_length": lm.max_length, "seconds": journal.seconds, "commits": journal.commits}
    write_result(output, command, model.device, rows, **facts)
    write_whole(beside(output, ".png"), picture_of(rows))
    journal.finish()
    return rows


def _outcome(
    lm: PrefixLM, task: FewShotTask, prompts: Sequence[Prompt], journal: Journal, how: Sequence[Any]
) -> Outcome:
    def key(kind: str, arguments: Any) -> list[Any]:
        asked = hashlib.sha256(json.dumps(list(arguments), sort_keys=True).encode()).hexdigest()[:32]
        return [*how, task.name, task.revision, task.chat, kind, asked]

    lm.set_cache_hook(_Remembered(lm, journal, key))
    unasked = defaultdict(list)
    keys = [[key(request.request_type, request.args) for request in prompt.requests] for prompt in prompts]
    for prompt, names in zip(prompts, keys, strict=True):
        for request, name in zip(prompt.requests, names, strict=True):
            if journal.recall(name) is None:
                unasked[request.request_type].append(request)
    for kind, requests in unasked.items():
        getattr(lm, kind)(requests, disable_tqdm=not sys.stderr.isatty())
    answers, tokens_read = [], []
    counted: set[str] = set()
    for names in keys:
        entries = {json.dumps(name): _recalled(journal, name) for name in names}
        answers += [_as_lm_eval_has_it(entries[json.dumps(name)]["answer"]) for name in names]
        tokens_read.append(sum(entry["tokens_read"] for name, entry in entries.items() if name not in counted))
        counted |= entries.keys()
    return Outcome(task.figures(prompts, answers), tokens_read)


def _recalled(journal: Journal, key: Sequence[Any]) -> dict[str, Any]:
    entry = journal.recall(key)
    assert entry is not None  # lm-eval tells of every answer
    return entry


def _as_lm_eval_has_it(answer: Any) -> Any:
    return tuple(answer) if isinstance(answer, list) else answer  # JSON knows no tuples


def _full(runs: Sequence[Run], outcomes: Mapping[tuple[int, int], Outcome], line: int) -> Figures | None:
    """Figures of the full cache, if it was measured."""
    return next((outcomes[line, column].figures for column, run in enumerate(runs) if run.config is None), None)


def _rows(
    model: Any, task: FewShotTask, prompts: Sequence[Prompt], run: Run, outcome: Outcome, full: Figures | None
) -> list[dict[str, Any]]:
    """A row for every metric and filter, over the items that have it."""
    size = functools.cache(functools.partial(bytes_per_head, model, run))
    rows = []
    for (metric, name), figures in outcome.figures.items():
        measured = [prompts[number] for number in figures]
        read = sum(outcome.tokens_read[number] for number in figures)
        tokens = statistics.fmean(prompt.tokens for prompt in measured)
        documents = {number: document_of(prompts[number].question, number) for number in figures}
        reference = {} if full is None or run.config is None else full.get((metric, name), {})
        score, error = task.score(metric, list(figures.values()))
        rows.append(
            {
                "task": task.name,
                "shots": task.shots,
                **run.columns,
                "metric": metric,
                "filter": name,
                "better": task.better(metric),
                "score": score,
                "stderr": error,
                **_difference(functools.partial(task.score, metric), figures, reference, documents),
                "items": len(figures),
                "documents": len(set(documents.values())),
                "shots_that_fit": statistics.fmean(prompt.shots for prompt in measured),
                "prompt_tokens": tokens,
                "read_tokens": read / sum(prompt.texts for prompt in measured),
                "bytes_per_head": size(round(tokens)),
            }
        )
    return rows


def _difference(
    score: Callable[[Sequence[Any]], tuple[float, float | None]],
    figures: Mapping[int, Any],
    full: Mapping[int, Any],
    documents: Mapping[int, Hashable],
) -> dict[str, float | None]:
    """Score less that of the full cache over the items that both have a figure of.

    Where scores are means, it is the mean difference item by item, with a 95 % interval by bootstrap over documents.
    """
    difference, interval = None, None
    both = [number for number in figures if number in full]
    if both:
        own, others = ([each[number] for number in both] for each in (figures, full))
        (here, _), (there, _) = score(own), score(others)
        difference = here - there
        if is_mean(here, own) and is_mean(there, others):
            differences = [float(one) - float(other) for one, other in zip(own, others, strict=True)]
            difference = statistics.fmean(differences)
            interval = mean_of_items_interval(differences, [documents[number] for number in both])
    low, high = interval or (None, None)
    return {"difference": difference, "difference_low": low, "difference_high": high}


def picture_of(rows: Sequence[dict[str, Any]]) -> bytes:
    """Differences to the full cache by task, metric and method, with their intervals; without it scores.

    With several numbers of slots: scores against these, a panel for every task and metric.
    """
    if len({row["num_slots"] for row in rows} - {None}) > 1:
        return _by_slots(rows)
    compared = [row for row in rows if row["difference"] is not None]
    found = {(_name_of(row), label_of(row)): row for row in compared or rows}
    names, methods = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    series = []
    for method in methods:
        ends = [_ends(found.get((name, method)), bool(compared)) for name in names]
        low, value, high = (list(each) for each in zip(*ends, strict=True))
        series.append(Series(method, value, low=low, high=high))
    shown = (
        "score minus that of the full cache, with its 95 % interval" if compared else "score, with its standard error"
    )
    panel = Bars(names, series, xlabel=shown)
    return picture([[panel]], (8, panel.height))


def _by_slots(rows: Sequence[dict[str, Any]]) -> bytes:
    """Scores, shaded by their standard errors; without slots a level."""
    method, panels = itemgetter("method"), []
    styles = method_styles(rows, "num_slots", method)
    for name in dict.fromkeys(map(_name_of, rows)):
        found = [row for row in rows if _name_of(row) == name]
        panels.append(lines_over(found, "num_slots", "score", styles, method, "stderr", title=name, bottom=0))
    columns = min(len(panels), 3)
    grid = in_rows(panels, columns)
    size = (3.2 * columns, 2.6 * len(grid) + 0.8)
    return picture(grid, size, xlabel="slots", ylabel="score, with its standard error")


def _name_of(row: dict[str, Any]) -> str:
    parts = [row["task"], row["shots"], row["metric"], "" if row["filter"] == "none" else row["filter"]]
    parts += ["(lower is better)"] if row["better"] == "lower" else []
    return " ".join(str(part) for part in parts if part != "")


def _ends(row: dict[str, Any] | None, is_difference: bool) -> tuple[float, float, float]:
    """A bar's value between the ends of its error bar."""
    if row is None:
        return GAP, GAP, GAP
    if is_difference:
        low, value, high = row["difference_low"], row["difference"], row["difference_high"]
        return (value, value, value) if low is None else (low, value, high)
    error = row["stderr"] or 0
    return row["score"] - error, row["score"], row["score"] + error
