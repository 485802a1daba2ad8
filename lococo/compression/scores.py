"""How heavy hitters are ranked: one class per score, found by its name in ``LoCoCoConfig.score``.

A score of your own is one class; prefill, decoding, recorded steps and Triton read what it says of itself::

    @lococo.register_score("key-norm")
    class KeyNormScore(lococo.Score):
        needs = frozenset({"keys"})

        def rank(self, entries, age, config):
            return -entries.keys.norm(dim=-1)
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from lococo.compression.network import ScoreNetwork
from lococo.registry import SCORES

if TYPE_CHECKING:
    from lococo.compression.entries import Entries
    from lococo.config import LoCoCoConfig

# What is left of a distant score's old part while as many tokens are read as there are slots.
DISTANT_FADE = 0.8
# Queries that a new token is credited with, so that the attention of one or two does not decide.
SCORE_PRIOR = 8

NEEDS = frozenset({"attention", "position", "keys", "values", "features"})

# Queries closer to a token than this do not count for a learned score, nor those in the same quarter of a block.
LEARNED_DELAY = 32
# What is left of its sum per token read.
LEARNED_FADE = DISTANT_FADE ** (1 / 128)

# Attention below which a learned score takes a token's statistic for noise.
SCORE_FLOOR = 1e-5
# Logarithm of the largest factor that a learned score changes it by.
LARGEST_CHANGE = 60.0


class Score(abc.ABC):
    """Ranks a layer's entries: the best become heavy hitters, and fused slots begin with the next best.

    Attributes
    ----------
    needs : frozenset of str
        What ``rank`` looks at: "attention" that entries received (``entries.scores``), their "position" in the text
        (``age``), "keys", "values", "features" of its own network. Only what a score needs is computed and kept.
    power : {1, 2}
        Power of the attention probabilities that are summed for it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    power: ClassVar[Literal[1, 2]] = 1

    def network(self, num_kv_heads: int, head_dim: int, **factory: Any) -> nn.Module | None:
        """The module that computes features of a layer's tokens, for scores that need "features"; None for others.

        Parameters
        ----------
        num_kv_heads, head_dim : int
            Sizes of the layer.
        **factory
            ``device`` and ``dtype``.

        Returns
        -------
        torch.nn.Module, optional
            With an attribute ``num_features``. It is called with the un-rotated keys and the values of all KV heads of
            the layer, each (batch, kv_heads, tokens, head_dim), and returns (batch, kv_heads, tokens, num_features)
            for ``entries.features``.
        """
        return None

    def delay(self, config: LoCoCoConfig) -> int:
        """Number of entries between a token and the first query whose attention counts for it."""
        return 0

    def fade(self, config: LoCoCoConfig) -> float:
        """Factor by which summed attention fades per token read; 1: not at all, 0: only the current block counts."""
        return 1.0

    @abc.abstractmethod
    def rank(self, entries: Entries, age: Any, config: LoCoCoConfig) -> torch.Tensor:
        """Rank of every entry; higher is better.

        Parameters
        ----------
        entries : Entries
            With ``scores`` if the score needs attention, and with ``features`` if it needs those and the layer has no
            sliding window.
        age : torch.Tensor, optional
            (batch, kv_heads, entries), number of tokens read since the entry's own, 1 for the last token. Given if
            ``needs`` has "position", and in layers with a sliding window.

        Returns
        -------
        torch.Tensor
            (batch, kv_heads, entries).
        """

    def parts(self, entries: Entries, age: Any, config: LoCoCoConfig) -> dict[str, torch.Tensor]:
        """What ``rank`` is made of, by name, for ``lococo inspect``; empty if it is a single number.

        Arguments and shapes as of ``rank``.
        """
        return {}

    def logits(self, entries: Entries, age: Any, config: LoCoCoConfig) -> torch.Tensor:
        """Logits of being looked up, in the order of ``rank``: what a network is trained by.

        Arguments and shapes as of ``rank``; differentiable in ``entries.features``.
        """
        return self.rank(entries, age, config)


def _check(score: Any) -> None:
    if not (isinstance(score, type) and issubclass(score, Score)):
        raise TypeError(f"a score must be a class derived from lococo.Score, got {score!r}")
    unknown = sorted(score.needs - NEEDS)
    if unknown:
        raise ValueError(f"{score.__name__}.needs must be of {', '.join(sorted(NEEDS))}; got {', '.join(unknown)}")
    if score.power not in (1, 2):
        raise ValueError(f"{score.__name__}.power must be 1 or 2, got {score.power!r}")


def register_score(name: str) -> Callable[[type[Score]], type[Score]]:
    """Class decorator that registers a score for ``LoCoCoConfig(score=name)``.

    Raises
    ------
    TypeError
        If the class is not a ``Score``.
    ValueError
        If its ``needs`` or ``power`` are unknown values, or the name is taken by another class.
    """
    return SCORES.register(name, _check)


@register_score("distant")
class DistantScore(Score):
    """Mean square of the attention from queries so much later that the token is a recent no more, old ones fading."""

    needs = frozenset({"attention", "position"})
    power = 2

    def delay(self, config: LoCoCoConfig) -> int:
        """As many as there are recents."""
        return config.num_recent  # type: ignore[return-value]

    def fade(self, config: LoCoCoConfig) -> float:
        """``DISTANT_FADE`` while as many tokens are read as there are slots."""
        return DISTANT_FADE ** (1 / config.num_slots)

    def rank(self, entries: Entries, age: Any, config: LoCoCoConfig) -> torch.Tensor:
        """Per query that counts, each faded as its attention was."""
        assert entries.scores is not None  # it needs attention
        queries = (age - self.delay(config)).clamp_min(0)
        return entries.scores / (_faded_count(queries, self.fade(config)) + SCORE_PRIOR)


@register_score("learned")
class LearnedScore(DistantScore):
    """The distant score times a factor learned for every token: what will be looked up is foreseen when it is read.

    The logarithm of a token's statistic S, above a floor, gets a sum that is linear in it and in the logarithm of the
    token's age, with the token's three features u, a, c for coefficients: ``u + a s + c t``, where s and t are these
    logarithms brought to numbers near zero. Features of zero, a new network's, leave the statistic as it is: a distant
    score. Its delay and fade are the same for all numbers of slots, so that one network serves them all. In layers
    with a sliding window there are no features.
    """

    needs = DistantScore.needs | {"features"}

    def delay(self, config: LoCoCoConfig) -> int:
        """A quarter of a block, ``LEARNED_DELAY`` at most: the network learns one statistic, whatever the slots."""
        return min(config.block_size // 4, LEARNED_DELAY)

    def fade(self, config: LoCoCoConfig) -> float:
        """``LEARNED_FADE``."""
        return LEARNED_FADE

    def network(self, num_kv_heads: int, head_dim: int, **factory: Any) -> nn.Module:
        """Of three features."""
        return ScoreNetwork(num_kv_heads, head_dim, 3, **factory)

    def rank(self, entries: Entries, age: Any, config: LoCoCoConfig) -> torch.Tensor:
        """``(S + floor) factor - floor``, which is S itself, to the last bit, where the factor is 1."""
        statistic = super().rank(entries, age, config)
        if entries.features is None:
            return statistic
        change = self._limited_change(statistic, entries.features, age)
        return statistic * change.exp() + SCORE_FLOOR * change.expm1()

    def parts(self, entries: Entries, age: Any, config: LoCoCoConfig) -> dict[str, torch.Tensor]:
        """The ``distant`` score, the ``factor`` that was foreseen, and ``foreseen``, their product above the floor."""
        if entries.features is None:
            return {}
        statistic = super().rank(entries, age, config)
        factor = self._limited_change(statistic, entries.features, age).exp()
        return {"distant": statistic, "factor": factor, "foreseen": (statistic + SCORE_FLOOR) * factor}

    def logits(self, entries: Entries, age: Any, config: LoCoCoConfig) -> torch.Tensor:
        """Logarithm of ``(S + floor) factor``."""
        statistic = super().rank(entries, age, config)
        assert entries.features is not None
        return (statistic + SCORE_FLOOR).log() + self._change(statistic, entries.features, age)

    def _limited_change(self, statistic: torch.Tensor, features: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
        """Beyond what float32 holds a factor would be infinite, and no number where S is 0."""
        return self._change(statistic, features, age).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)

    def _change(self, statistic: torch.Tensor, features: torch.Tensor, age: torch.Tensor) -> torch.Tensor:
        """Logarithm of the factor."""
        bias, trust, decay = features.to(statistic.dtype).unbind(-1)
        centred = ((statistic + SCORE_FLOOR).log() + 8) / 4  # from 1e-5 to 1
        age = (age.clamp_min(1).log() - 6) / 1.5  # of hundreds of tokens
        return bias + trust * centred + decay * age


@register_score("mean")
class MeanScore(Score):
    """Attention per query that could see the token."""

    needs = frozenset({"attention", "position"})

    def rank(self, entries: Entries, age: Any, config: LoCoCoConfig) -> torch.Tensor:
        """Per token read since."""
        assert entries.scores is not None  # it needs attention
        return entries.scores / age


@register_score("sum")
class SumScore(Score):
    """Attention in total (H2O, Zhang et al. 2023)."""

    def rank(self, entries: Entries, age: Any, config: LoCoCoConfig) -> torch.Tensor:
        """As it was summed."""
        assert entries.scores is not None  # it needs attention
        return entries.scores


@register_score("last")
class LastScore(SumScore):
    """Attention from the current block alone (the authors' released code)."""

    def fade(self, config: LoCoCoConfig) -> float:
        """To nothing, at the end of a block."""
        return 0.0


def _faded_count(queries: torch.Tensor, fade: float) -> torch.Tensor:
    """Sum of ``fade ** i`` over so many queries."""
    return torch.expm1(queries * math.log(fade)) / (fade - 1)
