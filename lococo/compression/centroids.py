"""Fused slots that are means of what was evicted: similar tokens share one, and it weighs like all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import nn

from lococo.compression.base import Compressor, onloaded, register_compressor
from lococo.compression.entries import Choice, Entries

if TYPE_CHECKING:
    from lococo.config import LoCoCoConfig


@register_compressor("centroids")
class CentroidCompressor(Compressor):
    """Every evicted token joins the fused slot whose key is closest to its own; a slot is the mean of its tokens.

    A query sees n tokens as one, with the logit of their mean key plus ``log n``. Their exponentials sum up to more
    than that (Jensen), by a factor that depends on how far their logits are spread: a learned ``log_scale``, added to
    the logits of slots with several tokens.

    Parameters
    ----------
    config : LoCoCoConfig
        Without ``mass_bias`` every entry counts as one token, the slots of before included.
    head_dim : int
        d, size of a key and of a value.
    """

    is_running: ClassVar[bool] = True

    def __init__(self, config: LoCoCoConfig, head_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        # What calibrations find, on average.
        self.log_scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if config.has_mass else None

    def weights(self, entries: Entries, choice: Choice) -> torch.Tensor:
        """Every token alike: those that an entry stands for count for it."""
        return self._shares(entries, choice).softmax(dim=-1)

    def blend(self, entries: Entries, choice: Choice) -> Entries:
        """Means in float32 or wider: of thousands of tokens, a few new ones would be lost in rounding."""
        shares = self._shares(entries, choice)
        weights = shares.softmax(dim=-1)

        def mean(tensor: torch.Tensor) -> torch.Tensor:
            return (weights @ tensor.to(weights.dtype)).to(tensor.dtype)

        def average(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else mean(values[..., None]).squeeze(-1)

        return Entries(
            keys=mean(entries.keys),
            values=mean(entries.values),
            scores=average(entries.scores),
            position=average(entries.position),
            log_mass=None if entries.log_mass is None else shares.logsumexp(dim=-1).to(entries.log_mass.dtype),
        )

    def mass_bias(self, log_mass: torch.Tensor) -> torch.Tensor:
        """Log of the number of tokens, and ``log_scale`` where there are several."""
        with onloaded(self):
            return log_mass + cast(nn.Parameter, self.log_scale).to(log_mass.dtype) * (log_mass > 0)

    def _shares(self, entries: Entries, choice: Choice) -> torch.Tensor:
        """(batch, kv_heads, fused slots, entries), log of the number of tokens that an entry brings to a slot."""
        wide = torch.promote_types(entries.keys.dtype, torch.float32)
        anchors, rest = choice.blendable(len(entries))
        log_mass = entries.keys.new_zeros(rest.shape, dtype=wide) if entries.log_mass is None else entries.log_mass
        keys = entries.keys.detach().to(wide)
        closest = closest_centroid(keys, keys.gather(2, anchors[..., None].expand(*anchors.shape, keys.shape[-1])))
        slots = torch.arange(anchors.shape[-1], device=anchors.device)
        closest = closest.scatter(-1, anchors, slots.expand_as(anchors))  # also where two slots have the same key
        joins = (closest[:, :, None] == slots[:, None]) & rest[:, :, None]
        return log_mass.to(wide)[:, :, None].masked_fill(~joins, float("-inf"))


def closest_centroid(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """(..., entries) index of the closest of (..., centroids, head_dim) for (..., entries, head_dim) keys."""
    # Of the squared distance, |k|^2 is the same for all of them.
    distances = centroids.square().sum(dim=-1)[..., None, :] - 2 * keys @ centroids.transpose(-1, -2)
    return distances.argmin(dim=-1)
