"""What a text's tokens look like when they are read, and how much each of them is looked up later."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from lococo.cache.buffers import HeadGroup
from lococo.compression.entries import Entries
from lococo.kernels.scoring import without_autocast
from lococo.models.rotary import Rotary
from lococo.registry import SCORES
from lococo.training.record import LayerRecord, recording

# What the attention of a block counts less than that of the block before, when it is asked what will be looked up.
FUTURE_FADE = 0.6


@dataclasses.dataclass
class Lookups:
    """One layer over one text, at the end of every block but the last.

    Attributes
    ----------
    keys, values : torch.Tensor
        (1, kv_heads, tokens, head_dim), keys not rotated.
    scores : torch.Tensor
        (ends, kv_heads, tokens), attention summed as the cache does for the score.
    later : torch.Tensor
        (ends, kv_heads, tokens), attention (in the score's power) that tokens will receive, later blocks fading.
    is_candidate : torch.Tensor
        (ends, kv_heads, tokens), whether the score decides if a token stays: it is no sink, no recent, and was read.
    block_size : int
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    later: torch.Tensor
    is_candidate: torch.Tensor
    block_size: int

    @property
    def seen(self) -> torch.Tensor:
        """(ends, 1, 1) tokens read at every end."""
        ends = torch.arange(1, self.scores.shape[0] + 1, device=self.scores.device)
        return (self.block_size * ends)[:, None, None]

    def entries(self, group: HeadGroup, features: torch.Tensor | None) -> tuple[Entries, torch.Tensor]:
        """All tokens as entries of a group's heads, a row per end of a block, and their ages.

        Parameters
        ----------
        features : torch.Tensor, optional
            (1, kv_heads, tokens, num_features).
        """
        heads, ends = list(group.heads), self.scores.shape[0]
        keys, values = (each[:, heads].expand(ends, -1, -1, -1) for each in (self.keys, self.values))
        of_heads = None if features is None else features[:, heads].expand(ends, -1, -1, -1)
        position = torch.arange(keys.shape[2], device=keys.device).expand(self.scores[:, heads].shape)
        entries = Entries(keys, values, self.scores[:, heads], position, features=of_heads)
        return entries, self.seen - position


@torch.no_grad()
def record_lookups(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    groups: Mapping[int, Sequence[HeadGroup]],
    rotary: Mapping[int, Rotary | None],
) -> dict[int, Lookups]:
    """Run a text through an unpatched model; its layers' tokens and what became of them.

    On a CPU that multiplies in bfloat16 a model in float32 does, too; what tokens receive is summed in float32.

    Parameters
    ----------
    input_ids : torch.Tensor
        (1, tokens), of at least two blocks.
    groups : mapping
        Groups of heads of every layer, whose configs say what is summed and which tokens are candidates.
    rotary : mapping
        What takes the rotation off a layer's keys; None where they have none.

    Returns
    -------
    dict of int to Lookups
        By layer index; none for layers with a sliding window.
    """
    found: dict[int, Lookups] = {}

    def keep(layer_idx: int, entry: LayerRecord) -> None:
        if entry.window is None:
            with without_autocast(entry.query.device.type):
                found[layer_idx] = _lookups(entry, groups[layer_idx], rotary.get(layer_idx))

    with recording(model, keep), fast_products(model):
        model(input_ids.to(model.device), use_cache=False, logits_to_keep=1)
    return found


@contextlib.contextmanager
def fast_products(model: PreTrainedModel):
    """Matrix products in bfloat16 inside a ``with`` block, where a model in float32 is on a CPU that has them."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    wanted = model.device.type == "cpu" and model.dtype == torch.float32 and bool(is_fast)
    with torch.autocast("cpu", torch.bfloat16, enabled=True) if wanted else contextlib.nullcontext():
        yield


def _lookups(entry: LayerRecord, groups: Sequence[HeadGroup], rotary: Rotary | None) -> Lookups:
    tokens, config = entry.key.shape[2], groups[0].config
    positions = torch.arange(tokens, device=entry.key.device)[None]
    keys = entry.key if rotary is None else rotary.rotate(entry.key, positions, inverse=True)
    score, size = SCORES[config.score](), config.block_size
    by_head = {head: group.config for group in groups for head in group.heads}
    configs = [by_head[head] for head in sorted(by_head)]
    delays = torch.tensor([score.delay(each) for each in configs], device=keys.device)
    fades = torch.tensor([score.fade(each) for each in configs], device=keys.device)[:, None] ** size
    received, counted = _received_by_block(entry, size, delays, score.power)
    ends = len(received) - 1
    scores, later = torch.zeros_like(received[:ends]), torch.zeros_like(received[:ends])
    for end in range(ends):  # a block's attention is added when it is read, the sum fades when it is closed
        scores[end] = counted[end] if end == 0 else counted[end] + fades * scores[end - 1]
    for end in reversed(range(ends)):
        later[end] = received[end + 1] if end + 1 == ends else received[end + 1] + FUTURE_FADE * later[end + 1]
    sinks = torch.tensor([each.num_sinks for each in configs], device=keys.device)[:, None]
    recent = torch.tensor([each.num_recent for each in configs], device=keys.device)[:, None]
    seen = (size * torch.arange(1, ends + 1, device=keys.device))[:, None, None]
    is_candidate = (positions >= sinks) & (positions < seen - recent)
    half = torch.promote_types(torch.bfloat16, entry.key.dtype) if entry.key.dtype != torch.float32 else torch.float16
    return Lookups(keys.to(half), entry.value.to(half), scores, later, is_candidate, size)


def _received_by_block(
    entry: LayerRecord, block_size: int, delays: torch.Tensor, power: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that tokens receive from each whole block of queries: from all of them, and from those that count.

    Parameters
    ----------
    delays : torch.Tensor
        (kv_heads,), entries between a token and the first query that counts.

    Returns
    -------
    tuple of torch.Tensor
        Each (blocks, kv_heads, tokens) in float32.
    """
    kv_heads, tokens = entry.key.shape[1:3]
    query, key = (entry.query[0].float() * entry.scale).unflatten(0, (kv_heads, -1)), entry.key[0].float()
    received = query.new_zeros(tokens // block_size, kv_heads, tokens)
    counted = torch.zeros_like(received)
    position = torch.arange(tokens, device=key.device)
    for block in range(tokens // block_size):
        start, stop = block * block_size, (block + 1) * block_size
        logits = query[:, :, start:stop].flatten(1, 2) @ key[:, :stop].transpose(1, 2)
        if entry.softcap is not None:
            logits.div_(entry.softcap).tanh_().mul_(entry.softcap)
        logits = logits.unflatten(1, (-1, block_size))  # (kv_heads, groups, queries, entries)
        distance = position[start:stop, None] - position[:stop]
        probs = logits.masked_fill_(distance < 0, float("-inf")).softmax(dim=-1)
        of_queries = (probs.square_() if power == 2 else probs).sum(dim=1)
        received[block, :, :stop] = of_queries.sum(dim=1)
        is_late = distance >= delays[:, None, None]
        counted[block, :, :stop] = of_queries.mul_(is_late).sum(dim=1)
    return received, counted
