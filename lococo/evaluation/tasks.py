"""Tasks of lm-eval by method: its prompts and metrics, with the same examples before every question of a task."""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lococo.evaluation.equal_bytes import bytes_per_head
from lococo.files import write_whole
from lococo.methods import Run
from lococo.results.journal import Journal
from lococo.results.plots import GAP, Bars, Series, picture
from lococo.results.tables import beside, label_of, write_result

if TYPE_CHECKING:
    from lococo.evaluation.harness import PrefixLM

Outcome = dict[str, Any]


def parse_task(text: str) -> tuple[str, int]:
    """Name and shots of ``arc_easy:40``.

    Raises
    ------
    ValueError
        If shots are no number.
    """
    name, _, shots = text.partition(":")
    if not shots.isdecimal():
        raise ValueError(f"a task is NAME:SHOTS, {name}:4 for instance, got {text!r}")
    return name, int(shots)


def read_tasks(
    names: Sequence[str], include_path: Path | None = None, seed: int = 0, chat: bool = False
) -> list[FewShotTask]:
    """Tasks of lm-eval, named as ``arc_easy:40``; groups (``longbench:0``) are all of their tasks.

    Parameters
    ----------
    include_path : Path, optional
        Folder of task files in lm-eval's format, which come before lm-eval's own.
    seed : int
        Of the choice of examples.
    chat : bool
        Put prompts into the tokenizer's chat template.

    Raises
    ------
    ValueError, OSError, ImportError
        If a name is not known, data are missing or have too few examples, or lm-eval is not installed.
    """
    parsed = [parse_task(each) for each in names]
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"--include-path {include_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what every task here does
    return [
        FewShotTask(task, shots, seed, chat) for name, shots in parsed for task in _lm_eval_tasks(name, include_path)
    ]


def _lm_eval_tasks(name: str, include_path: Path | None) -> list[Any]:
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(f"tasks are measured with lm-eval ({error}): pip install lococo[eval]") from error

    # An index of all of lm-eval's tasks takes many seconds: a folder named like the task is looked into first.
    parts = name.split("_")
    guesses = [Path(lm_eval.tasks.__path__[0], "_".join(parts[:count])) for count in range(len(parts), 0, -1)]
    folders = [each for each in guesses if each.is_dir()][:1] + ([include_path] if include_path else [])
    manager = lm_eval.tasks.TaskManager(include_path=list(map(str, folders)), include_defaults=False)
    if name not in manager.all_tasks:
        manager = lm_eval.tasks.TaskManager(include_path=None if include_path is None else str(include_path))
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 5, cutoff=0.5)
        raise ValueError(f"unknown task {name!r}: lm-eval has {', '.join(near) or 'none like it'}")
    try:
        return list(manager.load(name)["tasks"].values())
    except OSError as error:
        raise OSError(
            f"{name} cannot be had from the Hub; task files of local data: --include-path ({error})"
        ) from error


class FixedExamples:
    """The same examples, in the same order, for every question: the first of the shuffled ones.

    It takes the place of lm-eval's sampler, which draws others for each question.

    Attributes
    ----------
    asked : dict, optional
        The question, which is not among its own examples.
    """

    def __init__(self, examples: Sequence[dict[str, Any]], seed: int) -> None:
        self.examples = list(examples)
        random.Random(seed).shuffle(self.examples)
        self.asked: dict[str, Any] | None = None

    def sample(self, n: int, eval_doc: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The first ``n`` examples that are not the question itself."""
        found: list[dict[str, Any]] = []
        for example in self.examples:
            if len(found) == n:
                break
            if example != self.asked:
                found.append(example)
        return found


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question with as many examples before it as fit.

    Attributes
    ----------
    requests : list
        lm-eval's instances: one per choice, or one to continue.
    shots : int
        Examples.
    tokens : int
    """

    requests: list[Any]
    shots: int
    tokens: int


class FewShotTask:
    """A task of lm-eval at a number of shots.

    Parameters
    ----------
    task : lm_eval.api.task.Task
    shots : int
    seed : int
        Of the choice of examples.
    chat : bool
        Put prompts into the tokenizer's chat template.

    Raises
    ------
    ValueError
        If there are too few examples, or nothing is asked.
    """

    def __init__(self, task: Any, shots: int, seed: int = 0, chat: bool = False) -> None:
        self.name: str = task.task_name
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise ValueError(f"{self.name} measures the perplexity of texts: lococo eval ppl does")
        self.task, self.shots, self.chat = task, shots, chat
        examples = list(self.task.fewshot_docs()) if shots else []
        if len(examples) < shots:
            raise ValueError(f"{self.name}: {shots} shots need as many examples, there are {len(examples)}")
        self.task.sampler = FixedExamples(examples, seed)

    @property
    def metric(self) -> str:
        """The metric's name in lm-eval; accuracy, or else the first, where it has several."""
        names = list(self.task.aggregation())
        return "acc" if "acc" in names else names[0]

    def questions(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The first ``limit`` questions."""
        return [doc for _, doc in self.task.doc_iterator(limit=limit)]

    def digest(self, question: dict[str, Any]) -> str:
        """The question with its right answer and all examples, in short."""
        asked = json.dumps([question, self.task.sampler.examples[: self.shots]], sort_keys=True, default=str)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]

    def prompt(self, lm: PrefixLM, question: dict[str, Any]) -> Prompt:
        """What is asked, with as many of the examples as fit into the model's length.

        Raises
        ------
        ValueError
            If the question alone is too long, and the model does not cut prompts.
        """
        shots = self.shots
        if self._tokens_read(lm, question, shots) > lm.max_length:
            fitting = bisect.bisect_right(
                range(self.shots), lm.max_length, key=lambda shots: self._tokens_read(lm, question, shots)
            )
            shots = fitting - 1
        if shots < 0 and lm.truncate is None:
            raise ValueError(
                f"{self.name}: a question alone has {self._tokens_read(lm, question, 0)} tokens, more than the "
                f"{lm.max_length} of the model; choose a larger --max-length, or --truncate middle"
            )
        requests = self._requests(lm, question, max(shots, 0))
        return Prompt(requests, max(shots, 0), min(lm.tokens_read(requests[0].args)[0], lm.max_length))

    def answer(self, lm: PrefixLM, question: dict[str, Any], prompt: Prompt) -> Any:
        """The figure that the task's metric gives the model's answer."""
        answers = getattr(lm, prompt.requests[0].request_type)(prompt.requests, disable_tqdm=True)
        for request, answer in zip(prompt.requests, answers, strict=True):
            request.resps = [answer]
        self.task._instances = prompt.requests
        self.task.apply_filters()
        filtered = [next(iter(request.filtered_resps.values())) for request in prompt.requests]
        return self.task.process_results(question, filtered)[self.metric]

    def score(self, figures: Sequence[Any]) -> tuple[float, float | None]:
        """Score over all answers by the task's own aggregation, and the standard error where figures are numbers."""
        error = None
        if all(isinstance(each, int | float) for each in figures):
            error = math.sqrt(statistics.pvariance(figures) / len(figures))
        return float(self.task.aggregation()[self.metric](figures)), error

    def _requests(self, lm: PrefixLM, doc: dict[str, Any], shots: int) -> list[Any]:
        self.task.sampler.asked = doc
        chat = dict(apply_chat_template=self.chat, chat_template=lm.apply_chat_template if self.chat else None)
        prompt = self.task.fewshot_context(doc, shots, **chat)
        requests = self.task.construct_requests(doc, prompt, metadata=(self.name, None, 1), **chat)
        return requests if isinstance(requests, list) else [requests]

    def _tokens_read(self, lm: PrefixLM, doc: dict[str, Any], shots: int) -> int:
        return max(lm.tokens_read(request.args)[1] for request in self._requests(lm, doc, shots))


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
    **facts
        What else the result says of all rows; a journal of other facts is not gone on with.

    Raises
    ------
    ValueError
        If a question is longer than ``max_length``.
    """
    from lococo.evaluation.harness import PrefixLM

    lm = PrefixLM(model, tokenizer=tokenizer, max_length=max_length, truncate=truncate)
    questions = [task.questions(limit) for task in tasks]
    journal = Journal(beside(output, ".partial.jsonl"))
    outcomes: dict[tuple[int, int], list[Outcome]] = {}
    for column, run in enumerate(tqdm(runs, desc="methods", disable=None)):
        with run.applied(model):
            lm.forget()
            for line, task in enumerate(tasks):
                how = (lm.max_length, truncate, task.chat, task.name, task.shots)
                same = (*facts.values(), *how, run.name, run.identity())
                outcomes[line, column] = [
                    journal.measure((*same, task.digest(question)), functools.partial(_ask, lm, task, question))
                    for question in tqdm(questions[line], desc=f"{run.name} {task.name}", leave=False, disable=None)
                ]
    rows = [_row(model, tasks[line], runs[column], outcomes[line, column]) for line, column in sorted(outcomes)]
    write_result(output, command, model.device, rows, **facts, max_length=lm.max_length)
    write_whole(beside(output, ".png"), picture_of(rows, ("task", "shots")))
    journal.finish()
    return rows


def _ask(lm: PrefixLM, task: FewShotTask, question: dict[str, Any]) -> Outcome:
    prompt = task.prompt(lm, question)
    return {"figure": task.answer(lm, question, prompt), "shots": prompt.shots, "tokens": prompt.tokens}


def _row(model: Any, task: FewShotTask, run: Run, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    tokens = statistics.fmean(outcome["tokens"] for outcome in outcomes)
    score, error = task.score([outcome["figure"] for outcome in outcomes])
    return {
        "task": task.name,
        "shots": task.shots,
        **run.columns,
        "items": len(outcomes),
        "metric": task.metric,
        "score": score,
        "stderr": error,
        "shots_that_fit": statistics.fmean(outcome["shots"] for outcome in outcomes),
        "prompt_tokens": tokens,
        "bytes_per_head": bytes_per_head(model, run, round(tokens)),
    }


def picture_of(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> bytes:
    """Scores by task, named by some columns, and method, with a standard error to both sides."""
    found = {(" ".join(str(row[name]) for name in names), label_of(row)): row for row in rows}
    tasks, methods = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    series = []
    for method in methods:
        shown = [found.get((task, method), {"score": GAP, "stderr": None}) for task in tasks]
        low, high = ([row["score"] + sign * (row["stderr"] or 0) for row in shown] for sign in (-1, 1))
        series.append(Series(method, [row["score"] for row in shown], low=low, high=high))
    panel = Bars(tasks, series, xlabel="score, with its standard error")
    return picture([[panel]], (8, panel.height))
