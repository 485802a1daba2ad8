"""Prompts that come one after another, unannounced: what they have in common is read once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from lococo.compat import with_cache
from lococo.evaluation.prefixes import WORTH_KEEPING, shared_length
from lococo.generation import cache_bytes, read_tokens
from lococo.models import length_dependent_rotaries
from lococo.state import is_patched, patch_of

KEPT_CACHES = 8
# A prompt often ends in a question about what comes before it, of unknown length: a cache of everything but so many
# last tokens serves the next question, of which no more than about as many are read again.
BEFORE_THE_END = (1024, 256, 64)
PIECE = 512  # tokens read between two looks at whether the request still stands


class PromptReader:
    """Generates after prompts with a model, full or patched, and keeps caches of what it has read.

    Slots cannot be taken back, so a cache serves only prompts that begin with all that it has read. Kept are those
    before the last tokens of a prompt, at the place where a prompt parts from what was read before, and at the end of
    an answer. Every request goes on with a copy.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        It must stay patched as it is, or not patched, for as long as the reader is used.
    kept_caches : int
        How many caches are kept at most; the one that was used longest ago goes first. 0: none.

    Raises
    ------
    ValueError
        If ``kept_caches`` is negative.
    """

    def __init__(self, model: PreTrainedModel, kept_caches: int = KEPT_CACHES) -> None:
        if kept_caches < 0:
            raise ValueError(f"the number of caches to keep must be at least 0, got {kept_caches}")
        self.model: Any = model
        self.kept_caches = kept_caches
        self.kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the caches that are kept."""
        return sum(map(cache_bytes, self.kept.values()))

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        check: Callable[[], None] = lambda: None,
        on_reuse: Callable[[int], None] = lambda tokens: None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What ``model.generate`` returns.

        Parameters
        ----------
        input_ids : torch.Tensor
            (1, tokens).
        check : callable
            Called before every piece of the prompt and after every new token. What it raises ends the generation.
        on_reuse : callable
            Called before the first new token with the number of tokens of the prompt that did not have to be read.
        **kwargs
            Of ``model.generate``, with a ``generation_config`` that asks for the tokens alone.
        """
        check()
        kwargs["stopping_criteria"] = StoppingCriteriaList([*kwargs.get("stopping_criteria", ()), _Check(check)])
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        ids = tuple(input_ids[0].tolist())
        if len(ids) < 2 or not self._can_go_on(kwargs["generation_config"]):
            return self.model.generate(input_ids=input_ids, **kwargs)
        cache, reused = self._read(ids[:-1], check)
        on_reuse(reused)
        output = self.model.generate(input_ids=input_ids, **with_cache(self.model, cache), **kwargs)
        self._keep(tuple(output[0, : cache.get_seq_length()].tolist()), cache)
        return output

    def _can_go_on(self, config: GenerationConfig) -> bool:
        """Whether a generation may begin with a cache of one row that has read a prompt piece by piece."""
        rows = (config.num_beams or 1) * (config.num_return_sequences or 1)
        is_any_cache = is_patched(self.model) or config.cache_implementation in (None, "hybrid")
        return config.use_cache is not False and rows == 1 and is_any_cache and self._pieces_are_alike

    @property
    def _pieces_are_alike(self) -> bool:
        """Whether a text leaves the same behind however it is cut, and whatever comes after it.

        Not where single tokens are compressed in blocks of their own, nor with rotary tables that depend on the length
        of the whole text.
        """
        by_token = is_patched(self.model) and patch_of(self.model).config.decode_block_size is not None
        return not by_token and not length_dependent_rotaries(self.model)

    def _read(self, ids: tuple[int, ...], check: Callable[[], None]) -> tuple[Any, int]:
        """A cache of its own that has read these tokens, at least one, and how many it had read before."""
        known = max((each for each in self.kept if ids[: len(each)] == each), key=len, default=())
        cache, start = None, len(known)
        if known:
            self.kept.move_to_end(known)
            cache = copy.deepcopy(self.kept[known])
        for end in [*self._places(ids, start), len(ids)]:
            cache = self._go_on(ids[:end], start, cache, check)
            start = end
            if end < len(ids):
                self._keep(ids[:end], cache)
        return cache, len(known)

    def _places(self, ids: tuple[int, ...], start: int) -> list[int]:
        """Where to keep a cache on the way from ``start`` to the end of a prompt."""
        parting = max((shared_length(ids, each) for each in self.kept), default=0)
        wanted = {parting, *(len(ids) - tail for tail in BEFORE_THE_END)}
        return sorted(place for place in wanted if max(parting, start + 1) <= place < len(ids))

    def _go_on(self, ids: Sequence[int], start: int, cache: Any, check: Callable[[], None]) -> Any:
        for first in range(start, len(ids), PIECE):
            check()
            piece = torch.tensor([ids[first : first + PIECE]], device=self.model.device)
            cache = read_tokens(self.model, piece, cache, first)
        return cache

    def _keep(self, ids: tuple[int, ...], cache: Any) -> None:
        read_before = max((len(each) for each in self.kept if ids[: len(each)] == each), default=0)
        if not self.kept_caches or len(ids) < read_before + WORTH_KEEPING:
            return
        self.kept[ids] = copy.deepcopy(cache)
        if len(self.kept) > self.kept_caches:
            self.kept.popitem(last=False)


class _Check(StoppingCriteria):
    """Lets a generation end in an error from outside."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        """(rows,), that no row is complete."""
        self._check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
