"""What a text's tokens look like when they are read, and how much each of them is looked up later."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from lococo.compression.entries import Entries
from lococo.config import LoCoCoConfig
from lococo.kernels.scoring import without_autocast
from lococo.models.rotary import Rotary
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
        (ends, 1, tokens), whether the score decides if a token stays: it is no sink, no recent, and was read.
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

    def entries(self, features: torch.Tensor | None) -> tuple[Entries, torch.Tensor]:
        """All tokens as entries, a row per end of a block, and their ages.

        Parameters
        ----------
        features : torch.Tensor, optional
            (1, kv_heads, tokens, num_features).
        """
        ends = self.scores.shape[0]
        keys, values = (each.expand(ends, -1, -1, -1) for each in (self.keys, self.values))
        features = None if features is None else features.expand(ends, -1, -1, -1)
        position = torch.arange(keys.shape[2], device=keys.device).expand(self.scores.shape)
        return Entries(keys, values, self.scores, position, features=features), self.seen - position


@torch.no_grad()
def record_lookups(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    config: LoCoCoConfig,
    rotary: Mapping[int, Rotary | None],
) -> dict[int, Lookups]:
    """Run a text through an unpatched model; its layers' tokens and what became of them.

    On a CPU that multiplies in bfloat16 a model in float32 does, too; what tokens receive is summed in float32.

    Parameters
    ----------
    input_ids : torch.Tensor
        (1, tokens), of at least two blocks.
    config : LoCoCoConfig
        Says what is summed and which tokens are candidates, alike for all KV heads.
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
                found[layer_idx] = _lookups(entry, config, rotary.get(layer_idx))

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


def _lookups(entry: LayerRecord, config: LoCoCoConfig, rotary: Rotary | None) -> Lookups:
    tokens, size, device = entry.key.shape[2], config.block_size, entry.key.device
    positions = torch.arange(tokens, device=device)[None]
    keys = entry.key if rotary is None else rotary.rotate(entry.key, positions, inverse=True)
    received, counted = _received_by_block(entry, size, config.score_delay, config.score_power)
    ends, fade = len(received) - 1, config.score_fade**size
    scores, later = torch.zeros_like(received[:ends]), torch.zeros_like(received[:ends])
    for end in range(ends):  # a block's attention is added when it is read, the sum fades when it is closed
        scores[end] = counted[end] if end == 0 else counted[end] + fade * scores[end - 1]
    for end in reversed(range(ends)):
        later[end] = received[end + 1] if end + 1 == ends else received[end + 1] + FUTURE_FADE * later[end + 1]
    seen = (size * torch.arange(1, ends + 1, device=device))[:, None, None]
    is_candidate = (positions >= config.num_sinks) & (positions < seen - config.num_recent)  # type: ignore[operator]
    kept = torch.float16 if entry.key.dtype == torch.float32 else entry.key.dtype
    return Lookups(keys.to(kept), entry.value.to(kept), scores, later, is_candidate, size)


def _received_by_block(
    entry: LayerRecord, block_size: int, delay: int, power: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that tokens receive from each whole block of queries: from all of them, and from those that count.

    Parameters
    ----------
    delay : int
        Tokens between a token and the first query that counts.

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
        counted[block, :, :stop] = of_queries.mul_(distance >= delay).sum(dim=1)
    return received, counted
