"""Attention of a segment's queries over slots and segment, and the attention each entry received."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

SCORE_TILE = 128


class Visibility(NamedTuple):
    """What a query sees besides itself, and how its logits are changed.

    Attributes
    ----------
    mask : torch.Tensor, optional
        (batch, 1 or kv_heads, queries, entries), True where visible. None: lower-right causal, the last query sees
        every entry, the one before it all but the last, and so on.
    bias : torch.Tensor, optional
        (batch, kv_heads, entries), added to the logits of an entry.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)`` before mask and bias.
    """

    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    softcap: float | None = None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    visibility: Visibility,
    backend: str = "sdpa",
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention with grouped queries.

    Parameters
    ----------
    query : torch.Tensor
        (batch, heads, queries, head_dim).
    key, value : torch.Tensor
        (batch, kv_heads, entries, head_dim).

    Returns
    -------
    torch.Tensor
        (batch, heads, queries, head_dim).

    Raises
    ------
    ImportError
        If ``backend`` is a package that is not installed.
    ValueError
        If ``backend`` cannot do what ``visibility`` asks for.
    """
    return BACKENDS[backend](query, key, value, scale, visibility, dropout)


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    visibility: Visibility,
    counts: torch.Tensor | None = None,
    squared: bool = False,
) -> torch.Tensor:
    """Attention probability each entry receives, summed over queries and the query heads of its group.

    Works through tiles of queries, so no (queries x entries) matrix of the whole segment is held.

    Parameters
    ----------
    query : torch.Tensor
        (batch, heads, queries, head_dim).
    key : torch.Tensor
        (batch, kv_heads, entries, head_dim).
    counts : torch.Tensor, optional
        (1 or batch, 1, queries, entries), False where a query's attention to an entry counts for nothing.
    squared : bool
        Sum the squares of the probabilities.

    Returns
    -------
    torch.Tensor
        (batch, kv_heads, entries) in float32 or wider.
    """
    queries, entries = query.shape[2], key.shape[2]
    mass = query.new_zeros(*key.shape[:3], dtype=_wide(query.dtype))
    for start in range(0, queries, SCORE_TILE):
        stop = min(start + SCORE_TILE, queries)
        logits = _logits(query[:, :, start:stop], key, scale, visibility, slice(start, stop), queries, entries)
        probabilities = logits.softmax(dim=-1, dtype=mass.dtype)  # (batch, kv_heads, groups, tile, entries)
        if counts is not None:
            probabilities = probabilities * counts[:, :, None, start:stop]
        if squared:
            probabilities = probabilities.square()
        mass += probabilities.sum(dim=(2, 3))
    return mass


def _logits(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    visibility: Visibility,
    rows: slice,
    queries: int,
    entries: int,
) -> torch.Tensor:
    """(batch, kv_heads, groups, rows, entries) logits of a slice of the queries, everything applied."""
    batch, kv_heads = key.shape[:2]
    grouped = query.reshape(batch, kv_heads, -1, *query.shape[-1:])  # (batch, kv_heads, groups * rows, head_dim)
    logits = (grouped @ key.transpose(-1, -2)) * scale
    if visibility.softcap is not None:
        logits = visibility.softcap * torch.tanh(logits / visibility.softcap)
    if visibility.bias is not None:
        logits = logits + visibility.bias[:, :, None].to(logits.dtype)
    logits = logits.unflatten(2, (-1, rows.stop - rows.start))
    if visibility.mask is not None:
        hidden = ~visibility.mask[:, :, None, rows]
    elif queries == 1:
        return logits
    else:
        hidden = ~lower_right(queries, entries, 0, query.device)[rows]
    return logits.masked_fill(hidden, float("-inf"))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@functools.lru_cache(maxsize=32)
def lower_right(queries: int, entries: int, delay: int, device: torch.device) -> torch.Tensor:
    """(queries, entries), True where the query is at least ``delay`` after the entry when both end together."""
    return torch.ones(queries, entries, dtype=torch.bool, device=device).tril(entries - queries - delay)


def _eager(query, key, value, scale, visibility, dropout):
    queries, entries = query.shape[2], key.shape[2]
    logits = _logits(query, key, scale, visibility, slice(0, queries), queries, entries)
    probabilities = F.dropout(logits.softmax(dim=-1, dtype=_wide(query.dtype)), dropout).to(value.dtype)
    return (probabilities @ value[:, :, None]).flatten(1, 2)


def _sdpa(query, key, value, scale, visibility, dropout):
    if visibility.softcap is not None:
        return _eager(query, key, value, scale, visibility, dropout)
    head_dim, queries, entries = query.shape[-1], query.shape[2], key.shape[2]
    if visibility.bias is not None:
        query, key, value = _with_bias_channel(query, key, value, visibility.bias, scale)
    mask = visibility.mask
    groups = query.shape[1] // key.shape[1]
    if mask is not None:
        mask = mask.repeat_interleave(groups, dim=1) if mask.shape[1] > 1 else mask
    elif queries > 1:
        # Kernels other than CUDA's take lower-right causality only as a mask; ours is kept, not rebuilt each call.
        on_cuda = query.device.type == "cuda"
        mask = causal_lower_right(queries, entries) if on_cuda else lower_right(queries, entries, 0, query.device)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
    )
    return output[..., :head_dim]


def _with_bias_channel(query, key, value, bias, scale):
    """A bias on the logits as one more channel of q (constant) and k (the bias), padded to a multiple of 8."""
    channels = 8
    constant = query.new_ones(*query.shape[:-1], 1)
    query = F.pad(torch.cat([query, constant], dim=-1), (0, channels - 1))
    key = F.pad(torch.cat([key, (bias / scale).to(key.dtype)[..., None]], dim=-1), (0, channels - 1))
    return query, key, F.pad(value, (0, channels))


def _flex(query, key, value, scale, visibility, dropout):
    if dropout:
        raise ValueError(f"attention='flex' has no dropout, the model asks for {dropout}; use 'sdpa'")
    from torch.nn.attention.flex_attention import flex_attention

    offset, groups = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    mask, bias, softcap = visibility

    def change(score, batch, head, query_index, entry):
        kv_head = head // groups
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[batch, kv_head, entry].to(score.dtype)
        if mask is None:
            seen = entry <= query_index + offset
        else:
            seen = mask[batch, kv_head if mask.shape[1] > 1 else 0, query_index, entry]
        return torch.where(seen, score, float("-inf"))

    return flex_attention(query, key, value, score_mod=change, scale=scale, enable_gqa=groups > 1)


def _flash_attention_2(query, key, value, scale, visibility, dropout):
    if importlib.util.find_spec("flash_attn") is None:
        raise ImportError("attention='flash_attention_2' needs the package flash-attn: pip install lococo[flash]")
    if visibility.mask is not None:
        return _sdpa(query, key, value, scale, visibility, dropout)
    from flash_attn import flash_attn_func

    head_dim = query.shape[-1]
    if visibility.bias is not None:
        query, key, value = _with_bias_channel(query, key, value, visibility.bias, scale)
    output = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        softcap=visibility.softcap or 0.0,
    )
    return output.transpose(1, 2)[..., :head_dim]


BACKENDS: dict[str, Callable] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flex": _flex,
    "flash_attention_2": _flash_attention_2,
}
