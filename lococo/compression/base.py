"""What blends entries into fused slots: one class per method, found by its name in ``LoCoCoConfig.compressor``.

A compressor of your own is a module that gives mixing weights, or whole slots; reading, decoding, recorded steps,
training and inspection go through it alike::

    @lococo.register_compressor("mean")
    class MeanCompressor(lococo.Compressor):
        def weights(self, entries, choice):
            anchors, rest = choice.blendable(len(entries))
            return (rest / rest.sum(-1, keepdim=True))[:, :, None].expand(*anchors.shape, len(entries))
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from lococo.compression.entries import Choice, Entries
from lococo.registry import COMPRESSORS

# Weights below it count as nothing for the number of tokens that a blend stands for.
SMALLEST_WEIGHT = 1e-9


class Compressor(nn.Module, abc.ABC):
    """Makes the fused slots of a layer from entries that no slot holds a copy of; one for all KV heads of the layer.

    Constructed as ``Compressor(config, head_dim, device=..., dtype=...)`` for the largest budget of the layer's KV
    heads; KV heads with smaller budgets have fewer fused slots.

    Attributes
    ----------
    needs_queries : bool
        Whether it needs the tokens' queries, which are then kept in ``entries.queries``.
    is_running : bool
        Whether fused slots are carried on from one compression to the next: they lie after the sinks, and begin with
        the tokens there. Otherwise each compression makes new ones, from the best entries that are not heavy hitters.
    """

    needs_queries: ClassVar[bool] = False
    is_running: ClassVar[bool] = False

    @property
    def is_closed(self) -> bool:
        """Whether its blends are copies of the entries they begin with, so that nothing has to be computed."""
        return False

    @abc.abstractmethod
    def weights(self, entries: Entries, choice: Choice) -> torch.Tensor:
        """Mixing weights of every fused slot over the entries; see ``Choice.blendable`` for what may be mixed.

        Returns
        -------
        torch.Tensor
            (batch, kv_heads, fused slots, entries) in float32 or wider; rows sum to 1.
        """

    def blend(self, entries: Entries, choice: Choice) -> Entries:
        """The fused slots, with the same weights for keys, values, scores and positions.

        Returns
        -------
        Entries
            (batch, kv_heads, fused slots, ...) for every field of the entries; None for a field that a slot keeps from
            the entry that it begins with.
        """
        weights = self.weights(entries, choice)
        mix, fixed = weights.to(entries.keys.dtype), weights.detach()
        return Entries(
            keys=mix @ entries.keys,
            values=mix @ entries.values,
            scores=_average(fixed, entries.scores),
            position=_average(fixed, entries.position),
            log_mass=None if entries.log_mass is None else log_mass(weights, entries.log_mass),
        )

    def mass_bias(self, log_mass: torch.Tensor) -> torch.Tensor:
        """Bias on the logits of entries that stand for several tokens, from the log of their number."""
        return log_mass

    def after_step(self) -> list[nn.Parameter]:
        """Put parameters back into bounds after an optimizer's step, without gradients. Returns the changed ones."""
        return []


def _check(compressor: Any) -> None:
    if not (isinstance(compressor, type) and issubclass(compressor, Compressor)):
        raise TypeError(f"a compressor must be a class derived from lococo.Compressor, got {compressor!r}")


def register_compressor(name: str) -> Callable[[type[Compressor]], type[Compressor]]:
    """Class decorator that registers a compressor for ``LoCoCoConfig(compressor=name)``.

    Raises
    ------
    TypeError
        If the class is not a ``Compressor``.
    ValueError
        If the name is taken by another class.
    """
    return COMPRESSORS.register(name, _check)


def log_mass(weights: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
    """Log of the number of tokens a blend stands for: entropy of its weights plus the log-mass it inherits.

    A copy keeps its mass; the even blend of n tokens has mass n.

    Parameters
    ----------
    weights : torch.Tensor
        (batch, kv_heads, num_fused, entries), rows sum to 1.
    carried : torch.Tensor
        (batch, kv_heads, entries).
    """
    # The entropy's slope at 0 is infinite, so weights that are (almost) nothing count as nothing.
    entropy = torch.special.entr(torch.where(weights > SMALLEST_WEIGHT, weights, 1.0)).sum(dim=-1)
    return entropy + _average(weights, carried)


def onloaded(head: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which weights that accelerate offloads between the forwards of their module are there."""
    if not hasattr(head, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(head)


def _average(weights: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else (weights.to(values.dtype) @ values[..., None]).squeeze(-1)
