"""Prompts that begin alike: what they share goes through the model once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from lococo.compat import with_cache
from lococo.generation import read_tokens

# A copy of a cache costs about as much as reading some tokens, and stays in memory.
WORTH_KEEPING = 32
KEPT = 2


class PrefixReader:
    """Reads one prompt after another with a model, full or patched, and keeps the caches of shared beginnings.

    Where a prompt goes on as the one before it did, past what is kept already, the cache at the place where they part
    is kept: the examples before a question are read two or three times, however many questions follow.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It must stay patched as it is, or not patched, for as long as the reader is used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.kept: dict[tuple[int, ...], Any] = {}  # the last used at the end
        self.previous: tuple[int, ...] = ()

    def read(self, ids: Sequence[int]) -> Any:
        """A cache, for the caller to go on with, that has read these tokens; None for no tokens."""
        ids = tuple(ids)
        known = max((prefix for prefix in self.kept if ids[: len(prefix)] == prefix), key=len, default=())
        cache = None
        if known:
            self.kept[known] = self.kept.pop(known)
            cache = copy.deepcopy(self.kept[known])
        parting = _shared(ids, self.previous)
        self.previous = ids
        if parting < len(known) + WORTH_KEEPING:
            return self._go_on(ids, len(known), cache)
        cache = self._go_on(ids[:parting], len(known), cache)
        self.kept[ids[:parting]] = copy.deepcopy(cache)
        if len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return self._go_on(ids, parting, cache)

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
        start = len(context) - 1
        cache = self.read(context[:-1])
        if cache is not None and len(continuations) > 1:
            cache.batch_repeat_interleave(len(continuations))
        longest = max(map(len, continuations))
        # What pads a row comes after all of its tokens, which do not see it.
        rows = [[context[-1], *ids[:-1], *[0] * (longest - len(ids))] for ids in continuations]
        positions = torch.arange(start, start + longest, device=self.model.device).expand(len(rows), -1)
        inputs = torch.tensor(rows, device=self.model.device)
        output = self.model(inputs, position_ids=positions, **with_cache(self.model, cache), use_cache=True)
        return [_score(logits[: len(ids)], ids) for logits, ids in zip(output.logits, continuations, strict=True)]

    def _go_on(self, ids: Sequence[int], start: int, cache: Any) -> Any:
        unread = torch.tensor([ids[start:]], dtype=torch.long, device=self.model.device)
        return read_tokens(self.model, unread, cache, start)


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _score(logits: torch.Tensor, ids: Sequence[int]) -> tuple[float, bool]:
    wanted = torch.tensor(ids, device=logits.device)
    likelihoods = logits.float().log_softmax(dim=-1).gather(-1, wanted[:, None])
    return likelihoods.sum().item(), bool((logits.argmax(dim=-1) == wanted).all())
