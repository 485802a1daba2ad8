"""Prompts that begin alike: what they share goes through the model once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lococo.compat import with_cache
from lococo.generation import read_tokens
from lococo.models import length_dependent_rotaries

# A copy of a cache costs about as much as reading some tokens, and stays in memory.
WORTH_KEEPING = 32
KEPT = 3


class PrefixReader:
    """Reads one prompt after another with a model, full or patched, and keeps the caches of shared beginnings.

    Told beforehand which prompts come in which order (``expect``), it keeps the cache at every place where one of them
    parts from a later one: examples before all questions, and a document before some, are read once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It must stay patched as it is, or not patched, for as long as the reader is used.

    Attributes
    ----------
    reads_whole_texts : bool
        Whether no text begins like a longer one, because the model's rotary tables depend on their length.
    tokens_read : int
        Tokens of prompts that went through the model so far.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.reads_whole_texts = bool(length_dependent_rotaries(model))
        self.tokens_read = 0
        self.kept: dict[tuple[int, ...], Any] = {}
        self._partings: dict[tuple[int, ...], list[int]] = {}

    def expect(self, prompts: Iterable[Sequence[int]]) -> None:
        """Be told of the prompts that will be read, in their order; best if those that begin alike are neighbours."""
        ordered = [tuple(ids) for ids in prompts]
        self._partings = {}
        shared: list[int] = []  # lengths of the beginnings that a prompt has in common with later ones
        for ids, following in zip(reversed(ordered[:-1]), reversed(ordered[1:]), strict=True):
            parting = shared_length(ids, following)
            shared = sorted({parting, *(min(parting, length) for length in shared)})
            self._partings[ids] = shared

    def read(self, ids: Sequence[int]) -> Any:
        """A cache, for the caller to go on with, that has read these tokens; None for no tokens."""
        ids = tuple(ids)
        partings = self._partings.get(ids, [])
        known = max((prefix for prefix in self.kept if ids[: len(prefix)] == prefix), key=len, default=())
        cache, start = copy.deepcopy(self.kept.get(known)), len(known)
        for end in partings:
            if end >= start + WORTH_KEEPING:
                cache = self._go_on(ids[:end], start, cache)
                self._keep(ids[:end], copy.deepcopy(cache))
                start = end
        self.kept = {prefix: kept for prefix, kept in self.kept.items() if len(prefix) <= max(partings, default=0)}
        return self._go_on(ids, start, cache)

    @torch.no_grad()
    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would say.

        Parameters
        ----------
        context : sequence of int
            At least one token.
        continuations : sequence of sequences of int
            Each at least one token.
        """
        if self.reads_whole_texts:
            return [self._score_whole(context, ids) for ids in continuations]
        start = len(context) - 1
        cache = self.read(context[:-1])
        self.tokens_read += 1
        if cache is not None and len(continuations) > 1:
            cache.batch_repeat_interleave(len(continuations))
        longest = max(map(len, continuations))
        # What pads a row comes after all of its tokens, which do not see it.
        rows = [[context[-1], *ids[:-1], *[0] * (longest - len(ids))] for ids in continuations]
        positions = torch.arange(start, start + longest, device=self.model.device).expand(len(rows), -1)
        inputs = torch.tensor(rows, device=self.model.device)
        output = self.model(inputs, position_ids=positions, **with_cache(self.model, cache), use_cache=True)
        return [_score(logits[: len(ids)], ids) for logits, ids in zip(output.logits, continuations, strict=True)]

    def _score_whole(self, context: Sequence[int], ids: Sequence[int]) -> tuple[float, bool]:
        self.tokens_read += len(context)
        output = self.model(torch.tensor([[*context, *ids[:-1]]], device=self.model.device))
        return _score(output.logits[0, -len(ids) :], ids)

    def _keep(self, ids: tuple[int, ...], cache: Any) -> None:
        self.kept[ids] = cache
        if len(self.kept) > KEPT:  # the shortest serves most prompts, the longest the next ones
            del self.kept[sorted(self.kept, key=len)[1]]

    def _go_on(self, ids: Sequence[int], start: int, cache: Any) -> Any:
        self.tokens_read += len(ids) - start
        unread = torch.tensor([ids[start:]], dtype=torch.long, device=self.model.device)
        return read_tokens(self.model, unread, cache, start)


def shared_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _score(logits: torch.Tensor, ids: Sequence[int]) -> tuple[float, bool]:
    wanted = torch.tensor(ids, device=logits.device)
    likelihoods = logits.float().log_softmax(dim=-1).gather(-1, wanted[:, None])
    return likelihoods.sum().item(), bool((logits.argmax(dim=-1) == wanted).all())
