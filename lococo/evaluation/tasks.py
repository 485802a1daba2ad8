"""Few-shot tasks: lm-eval's own prompts and metrics, with the same examples before every question of a task."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lococo.evaluation.task_files import FILES, local_splits

if TYPE_CHECKING:
    from lococo.evaluation.harness import PrefixLM


def parse_tasks(names: Sequence[str]) -> list[tuple[str, int]]:
    """Names and shots of ``arc_easy:40``.

    Raises
    ------
    ValueError
        If a name is not known, or shots are no number.
    """
    parsed = []
    for each in names:
        name, _, shots = each.partition(":")
        if name not in FILES:
            raise ValueError(f"unknown task {name!r}: choose from {', '.join(FILES)}")
        if not shots.isdecimal():
            raise ValueError(f"a task is NAME:SHOTS, {name}:4 for instance, got {each!r}")
        parsed.append((name, int(shots)))
    return parsed


class FixedExamples:
    """The same examples, in the same order, for every question: the first of the shuffled ones.

    It takes the place of lm-eval's sampler, which draws others for each question.
    """

    def __init__(self, examples: Sequence[dict[str, Any]], seed: int) -> None:
        self.examples = list(examples)
        random.Random(seed).shuffle(self.examples)

    def sample(self, n: int, eval_doc: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The first ``n`` examples that are not the question itself."""
        found: list[dict[str, Any]] = []
        for example in self.examples:
            if len(found) == n:
                break
            if example != eval_doc:
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
    name : str
    shots : int
    data_dir : Path, optional
        Folder of local files, as ``FILES`` names them. None: from the Hub.
    seed : int
        Of the choice of examples.

    Raises
    ------
    ValueError, OSError
        If data are missing, cannot be scored, or have too few examples.
    """

    def __init__(self, name: str, shots: int, data_dir: Path | None = None, seed: int = 0) -> None:
        self.name = name
        self.shots = shots
        self.task = _local_task(name, shots, data_dir) if data_dir else _hub_task(name)
        examples = list(self.task.fewshot_docs())
        if len(examples) < shots:
            raise ValueError(f"{name}: {shots} shots need as many examples, there are {len(examples)}")
        self.task.sampler = FixedExamples(examples, seed)

    @property
    def metric(self) -> str:
        """The metric's name in lm-eval; accuracy where it has several."""
        return "exact_match" if self.task.OUTPUT_TYPE == "generate_until" else "acc"

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
            If the question alone is too long.
        """
        shots = self.shots
        if self._tokens_read(lm, question, shots) > lm.max_length:
            fitting = bisect.bisect_right(
                range(self.shots), lm.max_length, key=lambda shots: self._tokens_read(lm, question, shots)
            )
            shots = fitting - 1
        if shots < 0:
            raise ValueError(
                f"{self.name}: a question alone has {self._tokens_read(lm, question, 0)} tokens, more than the "
                f"{lm.max_length} of the model; choose a larger --max-length"
            )
        requests = self._requests(question, shots)
        return Prompt(requests, shots, lm.tokens_read(requests[0].args)[0])

    def is_right(self, lm: PrefixLM, question: dict[str, Any], prompt: Prompt) -> bool:
        """Whether the model's answer is right by the task's metric."""
        answers = getattr(lm, prompt.requests[0].request_type)(prompt.requests, disable_tqdm=True)
        for request, answer in zip(prompt.requests, answers, strict=True):
            request.resps = [answer]
        self.task._instances = prompt.requests
        self.task.apply_filters()
        filtered = [next(iter(request.filtered_resps.values())) for request in prompt.requests]
        return bool(self.task.process_results(question, filtered)[self.metric])

    def _requests(self, doc: dict[str, Any], shots: int) -> list[Any]:
        prompt = self.task.fewshot_context(doc, shots)
        requests = self.task.construct_requests(doc, prompt, metadata=(self.name, None, 1))
        return requests if isinstance(requests, list) else [requests]

    def _tokens_read(self, lm: PrefixLM, doc: dict[str, Any], shots: int) -> int:
        return max(lm.tokens_read(request.args)[1] for request in self._requests(doc, shots))


def _local_task(name: str, shots: int, data_dir: Path) -> Any:
    from datasets import Dataset

    splits = {split: Dataset.from_list(rows) for split, rows in local_splits(name, shots, data_dir).items()}
    return _lm_eval_task(name, training_split="train", custom_dataset=lambda **_: splits)


def _hub_task(name: str) -> Any:
    # RACE comes without other texts than those that are scored: a question is not among its own examples.
    changes = {"fewshot_split": "test"} if name == "race" else {}
    try:
        return _lm_eval_task(name, **changes)
    except OSError as error:
        raise OSError(f"{name} cannot be had from the Hub; local files: --data-dir ({error})") from error


def _lm_eval_task(name: str, **changes: Any) -> Any:
    import lm_eval.tasks

    # Only this folder: an index of all of lm-eval's tasks takes many seconds.
    folder = Path(lm_eval.tasks.__path__[0], "arc" if name.startswith("arc_") else name)
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    # A task as the member of a group takes changes to what its file says.
    (task,) = manager.load({"group": "lococo", "task": [{"task": name, **changes}]})["tasks"].values()
    return task
