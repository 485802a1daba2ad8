"""Answers of a model to items about long documents, each document read once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from experiments.long.items import Item, Task
from experiments.long.metrics import METRICS
from experiments.long.prompts import Prompts, shared_start
from lococo.compat import with_cache
from lococo.generation import read_and_answer, read_tokens
from lococo.methods import Run
from lococo.results.journal import Journal


def answers(
    model: Any, prompts: Prompts, task: Task, items: Sequence[Item], run: Run, journal: Journal
) -> Iterator[list[float]]:
    """Figures of every item, in the order of the items.

    Questions about one document get copies of the state after what their prompts share.
    """
    metric = METRICS[task.metric]
    encoded = [_sequences(prompts, item, metric.by_likelihood) for item in items]
    keys = [_key(model, task, run, each) for each in encoded]
    states = _States(model, items, encoded, [journal.recall(key) is None for key in keys])
    for place, (item, sequences, key) in enumerate(zip(items, encoded, keys, strict=True)):

        def answer(place: int = place, item: Item = item, sequences: list[list[int]] = sequences) -> Any:
            cache = states.of(place)
            if metric.by_likelihood:
                return _likelihoods(model, sequences, item.options, cache)
            return _text(model, prompts, sequences[0], task.max_new_tokens, cache)

        given = journal.measure(key, answer)
        if task.first_line:
            given = given.lstrip("\n").split("\n")[0]
        yield metric.score(given, item)


def _sequences(prompts: Prompts, item: Item, with_options: bool) -> list[list[int]]:
    """The prompt, and where options are compared the prompt with each of them."""
    return [prompts.ids(item), *(prompts.ids(item, option) for option in item.options if with_options)]


def _key(model: Any, task: Task, run: Run, sequences: Sequence[Sequence[int]]) -> tuple[Any, ...]:
    digest = hashlib.sha256(repr((task.max_new_tokens, sequences)).encode()).hexdigest()
    return model.name_or_path, task.name, run.name, run.identity(), digest


class _States:
    """The state of the model after the start that prompts about one document share."""

    def __init__(
        self, model: Any, items: Sequence[Item], encoded: Sequence[list[list[int]]], pending: Sequence[bool]
    ) -> None:
        self.model = model
        self.encoded = encoded
        self.group_of: dict[int, list[int]] = {}
        groups: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            if pending[place]:
                self.group_of[place] = groups.setdefault(item.document, [])
                self.group_of[place].append(place)
        self.read: tuple[list[int], Any] = ([], None)

    def of(self, place: int) -> Any:
        """A cache for an item to write on; None for one that shares nothing."""
        group = self.group_of[place]
        if len(group) == 1:
            return None
        if self.read[0] is not group:
            sequences = [sequence for each in group for sequence in self.encoded[each]]
            # A prompt's last token is left to generate.
            start = min(shared_start(sequences), min(map(len, sequences)) - 1)
            self.read = (group, _read(self.model, sequences[0][:start]) if start else None)
        return copy.deepcopy(self.read[1])


def _read(model: Any, ids: Sequence[int], cache: Any = None) -> Any:
    start = 0 if cache is None else cache.get_seq_length()
    return read_tokens(model, torch.tensor([ids[start:]], device=model.device), cache, start)


def _text(model: Any, prompts: Prompts, ids: Sequence[int], max_new_tokens: int, cache: Any) -> str:
    reading = read_and_answer(
        model,
        torch.tensor([ids], device=model.device),
        max_new_tokens=max_new_tokens,
        progress=False,
        cache=cache,
        do_sample=False,
    )
    return prompts.tokenizer.decode(reading.answer, skip_special_tokens=True)


@torch.no_grad()
def _likelihoods(model: Any, sequences: Sequence[list[int]], options: Sequence[str], cache: Any) -> list[float]:
    prompt, *continued = sequences
    shared = shared_start(sequences) - 1  # the token before an option predicts its first
    held = _read(model, prompt[:shared], cache)
    likelihoods = []
    for sequence, option in zip(continued, options, strict=True):
        ids = torch.tensor([sequence], device=model.device)
        places = torch.arange(shared, len(sequence) - 1, device=ids.device)[None]
        output = model(
            ids[:, shared:-1], position_ids=places, **with_cache(model, copy.deepcopy(held)), use_cache=True
        )
        nlls = F.cross_entropy(output.logits[0].float(), ids[0, shared + 1 :], reduction="none")
        own = shared_start([prompt, sequence]) - shared - 1
        likelihoods.append(-nlls[own:].sum().item() / len(option))
    return likelihoods
