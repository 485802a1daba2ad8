"""Tasks of lm-eval as they are asked: its prompts, filters and metrics, the same examples before all questions."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import json
import logging
import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lococo.evaluation.harness import PrefixLM

# Where a question says which document it is about, the first that it has.
DOCUMENT_FIELDS = ("document_id", "context", "article", "passage", "text", "story")
NUMPY_SEED = 1234  # lm-eval's own, where its seed of random is 0


def parse_task(text: str) -> tuple[str, int | None]:
    """Name and shots of ``arc_easy:40``; None where there are no shots.

    Raises
    ------
    ValueError
        If shots are no number.
    """
    name, colon, shots = text.partition(":")
    if not name or (colon and not shots.isdecimal()):
        raise ValueError(f"a task is NAME or NAME:SHOTS, {name or 'arc_easy'}:4 for instance, got {text!r}")
    return name, int(shots) if colon else None


def parse_metadata(text: str | None) -> dict[str, Any]:
    """What is said to tasks, from a JSON object.

    Raises
    ------
    ValueError
        If it is none.
    """
    try:
        metadata = json.loads(text or "{}")
    except json.JSONDecodeError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(
            f"""--metadata must be a JSON object, '{{"max_seq_lengths": [4096]}}' for instance, got {text!r}"""
        )
    return metadata


def read_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    seed: int = 0,
    chat: bool = False,
    metadata: Mapping[str, Any] | None = None,
    load_tokenizer: Callable[[], Any] | None = None,
) -> list[FewShotTask]:
    """Tasks of lm-eval, named as ``arc_easy`` or ``arc_easy:40``; groups and tags are all of their tasks.

    Parameters
    ----------
    include_path : Path, optional
        Folder of task files in lm-eval's format, which come before lm-eval's own.
    seed : int
        Of the choice of examples, and of tasks that generate their data, which get the seeds of ``lm_eval`` for 0.
    chat : bool
        Put prompts into the tokenizer's chat template, every example a turn of its own, as ``lm_eval`` does.
    metadata : mapping, optional
        Goes to the tasks, as that of ``lm_eval``: RULER's ``max_seq_lengths``, for instance.
    load_tokenizer : callable, optional
        Gives the tokenizer of the model, for tasks that generate texts of a length.

    Raises
    ------
    ValueError, OSError, ImportError
        If a name is not known, data are missing or have too few examples, or lm-eval is not installed.
    """
    parsed = [parse_task(each) for each in names]
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"--include-path {include_path}: no such folder")
    _check_lm_eval()
    with _tokenizer_folder(load_tokenizer) as folder:
        told = {**({"tokenizer": folder, "pretrained": folder} if folder else {}), **(metadata or {})}
        return [
            FewShotTask(task, shots, seed, chat)
            for name, shots in parsed
            for task in _lm_eval_tasks(name, include_path, told, seed)
        ]


def _check_lm_eval() -> None:
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise ImportError(f"tasks are measured with lm-eval ({error}): pip install lococo[eval]") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what every task here does


@contextlib.contextmanager
def _tokenizer_folder(load_tokenizer: Callable[[], Any] | None) -> Iterator[str | None]:
    """A folder that ``AutoTokenizer`` reads, as lm-eval's tasks do, even if the tokenizer came from a GGUF file."""
    if load_tokenizer is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer().save_pretrained(folder)
        yield folder


def _lm_eval_tasks(name: str, include_path: Path | None, metadata: dict[str, Any], seed: int) -> list[Any]:
    import lm_eval.tasks

    # An index of all of lm-eval's tasks takes many seconds: a folder named like the task is looked into first.
    parts = name.split("_")
    guesses = [Path(lm_eval.tasks.__path__[0], "_".join(parts[:count])) for count in range(len(parts), 0, -1)]
    folders = [each for each in guesses if each.is_dir()][:1] + ([include_path] if include_path else [])
    manager = lm_eval.tasks.TaskManager(
        include_path=list(map(str, folders)), include_defaults=False, metadata=metadata
    )
    if name not in manager.all_tasks:
        manager = lm_eval.tasks.TaskManager(
            include_path=None if include_path is None else str(include_path), metadata=metadata
        )
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 5, cutoff=0.5)
        raise ValueError(f"unknown task {name!r}: lm-eval has {', '.join(near) or 'none like it'}")
    try:
        with _seeded(seed):
            return list(manager.load(name)["tasks"].values())
    except OSError as error:
        raise OSError(
            f"{name} cannot be had from the Hub; task files of local data: --include-path ({error})"
        ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of tasks that generate their data."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(NUMPY_SEED + seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


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
    question : dict
        The item as the task has it.
    requests : list
        lm-eval's instances: one per choice, or one to continue.
    shots : int
        Examples.
    tokens : int
    """

    question: dict[str, Any]
    requests: list[Any]
    shots: int
    tokens: int

    @property
    def texts(self) -> int:
        """Different prompts among the requests."""
        return len({request.args[0] for request in self.requests})


Figures = dict[tuple[str, str], dict[int, Any]]  # by metric and filter: what each item gets, by its number


class FewShotTask:
    """A task of lm-eval at a number of shots.

    Parameters
    ----------
    task : lm_eval.api.task.Task
    shots : int, optional
        None: as many as the task says itself.
    seed : int
        Of the choice of examples, where the task has not chosen them itself.
    chat : bool
        Put prompts into the tokenizer's chat template.

    Raises
    ------
    ValueError
        If there are too few examples, or it asks for what a language model alone cannot do.
    """

    def __init__(self, task: Any, shots: int | None = None, seed: int = 0, chat: bool = False) -> None:
        self.name: str = task.task_name
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise ValueError(f"{self.name} measures the perplexity of texts: lococo eval ppl does")
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"{self.name} asks about pictures or sounds: only texts are read")
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(f"{self.name} runs code that the model writes: this command does not")
        if (repeats := task.get_config("repeats") or 1) > 1:
            raise ValueError(f"{self.name} is answered {repeats} times by chance: here every question is asked once")
        self.task, self.chat = task, chat
        self.shots: int = (task.get_config("num_fewshot") or 0) if shots is None else shots
        self.task.set_fewshot_seed(seed)
        examples = list(self.task.fewshot_docs()) if self.shots else []
        if len(examples) < self.shots:
            raise ValueError(f"{self.name}: {self.shots} shots need as many examples, there are {len(examples)}")
        self._sampler = FixedExamples(examples, seed)
        if _draws_examples(task):
            self.task.sampler = self._sampler

    @property
    def revision(self) -> str:
        """Version of the task's definition."""
        return str(self.task.VERSION)

    def questions(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The first ``limit`` questions."""
        return [doc for _, doc in self.task.doc_iterator(limit=limit)]

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
        return Prompt(question, requests, max(shots, 0), min(lm.tokens_read(requests[0].args)[0], lm.max_length))

    def figures(self, prompts: Sequence[Prompt], answers: Sequence[Any]) -> Figures:
        """What the task's filters and metrics make of the answers to all requests of these prompts.

        RULER's metrics are lengths, and an item has -1 for all but its own: those are left out.
        """
        requests = [request for prompt in prompts for request in prompt.requests]
        for request, answer in zip(requests, answers, strict=True):
            request.resps, request.filtered_resps = [answer], {}
        self.task._instances = requests
        self.task.apply_filters()
        found: Figures = defaultdict(dict)
        for name in requests[0].filtered_resps:
            for number, prompt in enumerate(prompts):
                filtered = [request.filtered_resps[name] for request in prompt.requests]
                for metric, figure in self.task.process_results(prompt.question, filtered).items():
                    if not (metric.isdecimal() and figure == -1):
                        found[metric, name][number] = figure
        return dict(found)

    def score(self, metric: str, figures: Sequence[Any]) -> tuple[float, float | None]:
        """Score over items by the task's own aggregation, and its standard error where it is a mean."""
        from lm_eval.api.metrics import mean, mean_stderr

        score = float(self.task.aggregation().get(metric, mean)(figures))
        return score, mean_stderr(figures) if len(figures) > 1 and is_mean(score, figures) else None

    def better(self, metric: str) -> str | None:
        """Whether a ``higher`` or a ``lower`` score is better; None where the task does not say."""
        return {True: "higher", False: "lower"}.get(self.task.higher_is_better().get(metric))

    def _requests(self, lm: PrefixLM, doc: dict[str, Any], shots: int) -> list[Any]:
        self._sampler.asked = doc
        chat = dict(apply_chat_template=self.chat, chat_template=lm.apply_chat_template if self.chat else None)
        prompt = self.task.fewshot_context(
            doc, shots, gen_prefix=self.task.doc_to_prefix(doc), fewshot_as_multiturn=self.chat, **chat
        )
        requests = self.task.construct_requests(doc, prompt, metadata=(self.name, None, 1), **chat)
        return requests if isinstance(requests, list) else [requests]

    def _tokens_read(self, lm: PrefixLM, doc: dict[str, Any], shots: int) -> int:
        return max(lm.tokens_read(request.args)[1] for request in self._requests(lm, doc, shots))


def _draws_examples(task: Any) -> bool:
    """Whether lm-eval would draw examples by chance, others for each question; some tasks choose them themselves."""
    return getattr(getattr(task, "fewshot_cfg", None), "sampler", "default") == "default"


def document_of(question: dict[str, Any], number: int) -> Hashable:
    """The document that an item is about; items without one are documents of their own."""
    name = next((name for name in DOCUMENT_FIELDS if question.get(name) not in (None, "")), None)
    return number if name is None else json.dumps(question[name], sort_keys=True, default=str)


def is_mean(score: float, figures: Sequence[Any]) -> bool:
    """Whether a score is the mean of figures: some metrics make it of pairs, or a perplexity of likelihoods."""
    are_numbers = all(isinstance(each, int | float | np.number | np.bool_) for each in figures)
    return are_numbers and math.isclose(score, np.mean(figures), rel_tol=1e-6, abs_tol=1e-9)
