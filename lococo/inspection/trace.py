"""Following tokens through every compression of a read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F

from lococo.cache.buffers import HeadGroup, KVBuffer
from lococo.compression.base import Compressor
from lococo.compression.entries import Entries
from lococo.compression.select import Budget, mixing
from lococo.context import ForwardRequest
from lococo.inspection.decisions import DecisionLog, Decisions
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
        What each entry is: ``sink``, ``heavy``, ``recent``, ``fused``, or ``open`` for the tokens of a block that has
        not been compressed yet, and of a text that fits into the slots.
    decisions : Decisions
        Why each token was kept or dropped.
    """

    layer: int
    head: int
    weights: torch.Tensor
    kinds: list[str]
    decisions: Decisions


class TokenWeights:
    """What the entries of a group of heads are made of, for one row without padding.

    Attributes
    ----------
    weights : torch.Tensor, optional
        (kv_heads, entries, tokens) after the last compression.
    fused : torch.Tensor, optional
        (kv_heads, slots), which the last compression blended.
    """

    def __init__(self, group: HeadGroup, window: int | None) -> None:
        self.group, self.window = group, window
        self.weights: torch.Tensor | None = None
        self.fused: torch.Tensor | None = None
        self.log = DecisionLog(group.config, window)

    def follow(self, before: Entries, seen: int | torch.Tensor, head: Compressor | None) -> None:
        """Mix the weights as a compression is about to mix the entries."""
        choice, mix = mixing(before, seen, self.group.config, head, self.window)
        self.weights = mix[0] @ self._over(int(seen), mix.device)
        slots = torch.zeros(mix.shape[1:3], dtype=torch.bool, device=mix.device)
        self.fused = slots.scatter(-1, choice.fused[0], True)
        self.log.note(before, int(seen), head, choice, mix[0])

    def traces(self, tokens: int, device: torch.device) -> list[tuple[torch.Tensor, list[str], Decisions]]:
        """Weights and kinds of every entry, and decisions, of each of its heads after so many tokens."""
        weights = self._over(tokens, device).cpu()
        held = 0 if self.fused is None else self.group.config.num_slots
        sinks, _, recent, _ = Budget.of(self.group.config, self.window)
        kinds = [["heavy"] * held + ["open"] * (weights.shape[1] - held) for _ in weights]
        for head, of_head in enumerate(kinds if held else []):
            of_head[:sinks] = ["sink"] * sinks
            of_head[held - recent : held] = ["recent"] * recent
            for slot in self.fused[head].nonzero()[:, 0].tolist():  # type: ignore[index]
                of_head[slot] = "fused"
        decisions = [self.log.decisions(place, tokens) for place in range(len(kinds))]
        return list(zip(weights, kinds, decisions, strict=True))

    def _over(self, tokens: int, device: torch.device) -> torch.Tensor:
        """(kv_heads, entries, tokens) weights with the tokens since the last compression, each an entry of its own."""
        if self.weights is None:
            return torch.eye(tokens, device=device).expand(len(self.group.heads), tokens, tokens)
        new = tokens - self.weights.shape[2]
        single = F.pad(torch.eye(new, device=device), (tokens - new, 0)).expand(self.weights.shape[0], new, tokens)
        return torch.cat([F.pad(self.weights, (0, new)), single], dim=1)


@torch.no_grad()
def trace(model: Any, input_ids: torch.Tensor) -> list[Trace]:
    """Read a text with a patched model and tell what every KV head of every layer holds afterwards.

    The weights of all compressions are multiplied, one after another; reading is otherwise as always. Takes
    4 bytes per layer, KV head, slot and token, and 28 to 36 per layer, KV head and token.

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
    followed: list[dict[HeadGroup, TokenWeights]] = [{} for _ in cache.layers]
    for layer, groups in zip(cache.layers, followed, strict=True):
        layer.observer = functools.partial(_follow, groups)
    ids = input_ids.to(model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]  # ChatGLM's own code does not count
    with patch.asking(ForwardRequest(cache=cache, keep=1)):
        model(ids, position_ids=positions, use_cache=True)
    found = []
    for index, (layer, groups) in enumerate(zip(cache.layers, followed, strict=True)):
        by_head: dict[int, tuple[torch.Tensor, list[str], Decisions]] = {}
        for group in layer.groups:
            weights = groups.get(group) or TokenWeights(group, layer.window)
            by_head.update(zip(group.heads, weights.traces(ids.shape[1], ids.device), strict=True))
        found += [Trace(index, head, *by_head[head]) for head in sorted(by_head)]
    return found


def _follow(
    groups: dict[HeadGroup, TokenWeights],
    buffer: KVBuffer,
    before: Entries,
    seen: int | torch.Tensor,
    head: Compressor | None,
) -> None:
    groups.setdefault(buffer.group, TokenWeights(buffer.group, buffer.window)).follow(before, seen, head)
