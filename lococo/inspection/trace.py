"""Following tokens through every compression of a read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from lococo.cache.memory import Memory
from lococo.cache.plan import Compression
from lococo.compression.base import Compressor
from lococo.compression.select import Budget, mixing
from lococo.config import LoCoCoConfig
from lococo.context import ForwardRequest
from lococo.models.rotary import RotaryTable
from lococo.state import patch_of

KINDS = ("sink", "heavy", "recent", "fused", "open")


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one KV head holds after a text.

    Attributes
    ----------
    layer, head : int
    weights : torch.Tensor
        (entries, tokens) in float32: an entry is the sum of the tokens' keys and values so weighted.
    kinds : list of str
        What each entry is: ``sink``, ``heavy``, ``recent``, ``fused``, or ``open`` for the tokens of a block that is
        not complete, and of a text that fits into the slots.
    """

    layer: int
    head: int
    weights: torch.Tensor
    kinds: list[str]


class TracedMemory(Memory):
    """A memory that also holds every entry as weights over the tokens read, for one row without padding.

    Attributes
    ----------
    weights : torch.Tensor, optional
        (kv_heads, entries, tokens) after the last compression.
    fused : torch.Tensor, optional
        (kv_heads, slots), which the last compression blended.
    """

    def __init__(self, config: LoCoCoConfig, window: int | None = None) -> None:
        super().__init__(config, window)
        self.weights: torch.Tensor | None = None
        self.fused: torch.Tensor | None = None

    def compress(self, compression: Compression, head: Compressor | None, rotary: RotaryTable | None) -> None:
        """See ``Memory.compress``."""
        self._settle(rotary)
        before = self.entries.map(lambda tensor: tensor[:, :, : compression.entries])
        choice, mix = mixing(before, compression.now, self.config, head, self.window)
        self.weights = mix[0] @ self._over(int(compression.now), mix.device, mix.shape[1])
        slots = torch.zeros(mix.shape[1:3], dtype=torch.bool, device=mix.device)
        self.fused = slots.scatter(-1, choice.fused[0], True)
        super().compress(compression, head, rotary)

    def traces(self, tokens: int) -> list[tuple[torch.Tensor, list[str]]]:
        """Weights and kinds of every entry of each of its heads after so many tokens."""
        weights = self._over(tokens, self.keys.device, self.keys.shape[1]).cpu()
        held = 0 if self.fused is None else self.config.num_slots
        sinks, _, recent, _ = Budget.of(self.config, self.window)
        kinds = [["heavy"] * held + ["open"] * (weights.shape[1] - held) for _ in weights]
        for head, of_head in enumerate(kinds if held else []):
            of_head[:sinks] = ["sink"] * sinks
            of_head[held - recent : held] = ["recent"] * recent
            for slot in self.fused[head].nonzero()[:, 0].tolist():  # type: ignore[index]
                of_head[slot] = "fused"
        return list(zip(weights, kinds, strict=True))

    def _over(self, tokens: int, device: torch.device, kv_heads: int) -> torch.Tensor:
        """(kv_heads, entries, tokens) weights with the tokens since the last compression, each an entry of its own."""
        if self.weights is None:
            return torch.eye(tokens, device=device).expand(kv_heads, tokens, tokens)
        new = tokens - self.weights.shape[2]
        single = F.pad(torch.eye(new, device=device), (tokens - new, 0)).expand(kv_heads, new, tokens)
        return torch.cat([F.pad(self.weights, (0, new)), single], dim=1)


@torch.no_grad()
def trace(model: Any, input_ids: torch.Tensor) -> list[Trace]:
    """Read a text with a patched model and tell what every KV head of every layer holds afterwards.

    The weights of all compressions are multiplied, one after another; reading is otherwise as always. Takes
    4 bytes per layer, KV head, slot and token.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Patched.
    input_ids : torch.Tensor
        (1, tokens).

    Raises
    ------
    ValueError
        If the model is not patched, or ``input_ids`` is not one row with a token.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(f"input_ids must be one row (1, tokens), got {tuple(input_ids.shape)}")
    patch = patch_of(model)
    cache = patch.new_cache()
    for layer in cache.layers:
        layer.groups = [(TracedMemory(memory.config, layer.window), heads) for memory, heads in layer.groups]
    ids = input_ids.to(model.device)
    places = torch.arange(ids.shape[1], device=ids.device)[None]  # ChatGLM's own code does not count
    with patch.asking(ForwardRequest(cache=cache, keep=1)):
        model(ids, position_ids=places, use_cache=True)
    found = []
    for index, layer in enumerate(cache.layers):
        by_head: dict[int, tuple[torch.Tensor, list[str]]] = {}
        for memory, heads in layer.groups:
            traced = memory.traces(ids.shape[1])  # type: ignore[attr-defined]
            by_head.update(zip(heads if layer.is_split else range(len(traced)), traced, strict=True))
        found += [Trace(index, head, *by_head[head]) for head in sorted(by_head)]
    return found
