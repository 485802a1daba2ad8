"""Attention with its log-sum-exp, and attention mass, in Triton, without gradients.

They equal ``attend_and_lse`` and ``attention_mass`` of ``lococo.kernels.scoring``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_tiles(
    total,
    norm,
    peak,
    query,
    key_base,
    value_base,
    bias_base,
    start,
    stop,
    last_seen,
    entries,
    scale,
    key_stride,
    value_stride,
    bias_stride,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    channel = tl.arange(0, CHANNELS)
    for first in range(start, stop, TILE):
        entry = first + tl.arange(0, TILE)
        is_there = (entry < entries)[:, None] & (channel < HEAD_DIM)[None]
        offsets = entry.to(tl.int64)[:, None]
        key = tl.load(key_base + offsets * key_stride + channel[None], mask=is_there, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
        if HAS_BIAS:
            bias = tl.load(bias_base + entry * bias_stride, mask=entry < entries, other=0.0)
            logits += bias.to(tl.float32)[None] * LOG2_E
        if IS_MASKED:
            logits = tl.where(entry[None] <= last_seen[:, None], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        probs = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(peak - higher)
        value = tl.load(value_base + offsets * value_stride + channel[None], mask=is_there, other=0.0)
        total = tl.dot(probs.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
        norm = norm * fade + tl.sum(probs, 1)
        peak = higher
    return total, norm, peak


@triton.jit(do_not_specialize=["queries", "entries"])
def _attention_kernel(
    query_base,
    key_base,
    value_base,
    bias_base,
    output_base,
    lse_base,
    scale,
    queries,
    entries,
    kv_heads,
    query_batch,
    query_head,
    query_stride,
    key_batch,
    key_head,
    key_stride,
    value_batch,
    value_head,
    value_stride,
    bias_batch,
    bias_head,
    bias_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Rows are the queries of all heads of a group, query by query, so that a group reads its keys once."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    index, head = row // GROUPS, kv_head * GROUPS + row % GROUPS
    channel = tl.arange(0, CHANNELS)
    is_row = index < queries
    is_there = is_row[:, None] & (channel < HEAD_DIM)[None]
    query_row = query_base + batch * query_batch + head * query_head + index.to(tl.int64) * query_stride
    query = tl.load(query_row[:, None] + channel[None], mask=is_there, other=0.0)
    key_base += batch * key_batch + kv_head * key_head
    value_base += batch * value_batch + kv_head * value_head
    if HAS_BIAS:
        bias_base += batch * bias_batch + kv_head * bias_head

    last_seen = tl.minimum(index + entries - queries, entries - 1)
    seen_by_all = first_row // GROUPS + entries - queries + 1
    seen_by_any = tl.minimum((first_row + ROWS - 1) // GROUPS + entries - queries + 1, entries)
    whole = tl.minimum(seen_by_all, entries) // TILE * TILE
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    norm = tl.zeros([ROWS], dtype=tl.float32)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    # fmt: off
    total, norm, peak = _attend_tiles(
        total, norm, peak, query, key_base, value_base, bias_base, 0, whole, last_seen, entries, scale,
        key_stride, value_stride, bias_stride, HEAD_DIM, CHANNELS, TILE, HAS_BIAS, False,
    )
    total, norm, peak = _attend_tiles(
        total, norm, peak, query, key_base, value_base, bias_base, whole, seen_by_any, last_seen, entries, scale,
        key_stride, value_stride, bias_stride, HEAD_DIM, CHANNELS, TILE, HAS_BIAS, True,
    )
    # fmt: on

    place = (batch * kv_heads * GROUPS + head) * queries + index
    output = total / norm[:, None]
    output_at = output_base + place[:, None] * HEAD_DIM + channel[None]
    tl.store(output_at, output.to(output_base.dtype.element_ty), mask=is_there)
    tl.store(lse_base + place, (peak + tl.log2(norm)) / LOG2_E, mask=is_row)


@triton.jit(do_not_specialize=["queries", "entries", "delay"])
def _mass_kernel(
    query_base,
    key_base,
    bias_base,
    lse_base,
    mass_base,
    scale,
    queries,
    entries,
    delay,
    kv_heads,
    query_batch,
    query_head,
    query_stride,
    key_batch,
    key_head,
    key_stride,
    bias_batch,
    bias_head,
    bias_stride,
    lse_batch,
    lse_head,
    lse_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SQUARED: tl.constexpr,
):
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(1) % kv_heads).to(tl.int64)
    first_entry = tl.program_id(0) * TILE
    entry = first_entry + tl.arange(0, TILE)
    is_entry = entry < entries
    channel = tl.arange(0, CHANNELS)
    is_channel = channel < HEAD_DIM
    key_row = key_base + batch * key_batch + kv_head * key_head + entry.to(tl.int64) * key_stride
    key = tl.load(key_row[:, None] + channel[None], mask=is_entry[:, None] & is_channel[None], other=0.0)
    mass = tl.zeros([TILE], dtype=tl.float32)
    bias = tl.zeros([TILE], dtype=tl.float32)
    if HAS_BIAS:
        bias_at = bias_base + batch * bias_batch + kv_head * bias_head + entry * bias_stride
        bias = tl.load(bias_at, mask=is_entry, other=0.0).to(tl.float32) * LOG2_E

    query_base += batch * query_batch + kv_head * GROUPS * query_head
    lse_base += batch * lse_batch + kv_head * GROUPS * lse_head
    first_index = tl.maximum(first_entry + delay - (entries - queries), 0)
    for first_row in range(first_index * GROUPS, queries * GROUPS, ROWS):
        row = first_row + tl.arange(0, ROWS)
        index, head = (row // GROUPS).to(tl.int64), (row % GROUPS).to(tl.int64)
        is_row = index < queries
        query_row = query_base + head * query_head + index * query_stride
        query = tl.load(query_row[:, None] + channel[None], mask=is_row[:, None] & is_channel[None], other=0.0)
        lse = tl.load(lse_base + head * lse_head + index * lse_stride, mask=is_row, other=float("inf"))
        logits = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E) + bias[:, None]
        probs = tl.exp2(logits - lse.to(tl.float32)[None] * LOG2_E)
        if SQUARED:
            probs = probs * probs
        is_counted = entry[:, None] + delay <= (index + (entries - queries))[None]
        mass += tl.sum(tl.where(is_counted, probs, 0.0), 1)
    tl.store(mass_base + (batch * kv_heads + kv_head) * entries + entry, mass, mask=is_entry)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower-right causal attention with grouped queries, and the log-sum-exp of its logits.

    Parameters
    ----------
    query : torch.Tensor
        (batch, heads, queries, head_dim).
    key, value : torch.Tensor
        (batch, kv_heads, entries, head_dim).
    bias : torch.Tensor, optional
        (batch, kv_heads, entries), added to the logits of an entry.

    Returns
    -------
    tuple
        (batch, heads, queries, head_dim) output and (batch, heads, queries) log-sum-exp in float32.
    """
    (batch, heads, queries, head_dim), (kv_heads, entries) = query.shape, key.shape[1:3]
    query, key, value = (with_dense_channels(tensor) for tensor in (query, key, value))
    output, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)
    groups = heads // kv_heads
    channels, rows, tile = _tiles(head_dim, queries * groups, query.dtype)
    grid = (triton.cdiv(queries * groups, rows), batch * kv_heads)
    with on_device_of(query):
        _attention_kernel[grid](
            *(query, key, value, bias, output, lse, scale, queries, entries, kv_heads),
            *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *_strides(bias)),
            GROUPS=groups,
            HEAD_DIM=head_dim,
            CHANNELS=channels,
            ROWS=rows,
            TILE=tile,
            HAS_BIAS=bias is not None,
            num_warps=8 if rows == 128 else 4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return output, lse


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    lse: torch.Tensor,
    bias: torch.Tensor | None = None,
    delay: int = 0,
    squared: bool = False,
) -> torch.Tensor:
    """Attention probability each entry receives from the queries that are at least ``delay`` later.

    Parameters
    ----------
    query, key, bias
        As for ``attend``, which gives the ``lse``.
    lse : torch.Tensor
        (batch, heads, queries).
    delay : int
        Entries from an entry to the first query that counts for it, where both end together.
    squared : bool
        Sum the squares of the probabilities.

    Returns
    -------
    torch.Tensor
        (batch, kv_heads, entries) in float32, summed over the query heads of a group.
    """
    (batch, heads, queries, head_dim), (kv_heads, entries) = query.shape, key.shape[1:3]
    query, key = with_dense_channels(query), with_dense_channels(key)
    mass = query.new_empty(batch, kv_heads, entries, dtype=torch.float32)
    groups = heads // kv_heads
    channels, rows, tile = _tiles(head_dim, queries * groups, query.dtype)
    grid = (triton.cdiv(entries, tile), batch * kv_heads)
    with on_device_of(query):
        _mass_kernel[grid](
            *(query, key, bias, lse, mass, scale, queries, entries, delay, kv_heads),
            *(*query.stride()[:3], *key.stride()[:3], *_strides(bias), *lse.stride()),
            GROUPS=groups,
            HEAD_DIM=head_dim,
            CHANNELS=channels,
            ROWS=min(rows, 64),
            TILE=tile,
            HAS_BIAS=bias is not None,
            SQUARED=squared,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return mass


def _tiles(head_dim: int, rows: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Channels, rows and entries a program works on, powers of two of at least 16; fewer where they are wide."""
    channels = max(16, triton.next_power_of_2(head_dim))
    row_bytes = channels * dtype.itemsize
    most_rows, entries = max(32, min(128, 32768 // row_bytes)), max(16, min(64, 16384 // row_bytes))
    return channels, max(16, min(triton.next_power_of_2(rows), most_rows)), entries


def _strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()


def with_dense_channels(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if the elements of its last dimension are apart."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def on_device_of(tensor: torch.Tensor) -> torch.cuda.device:
    """Context in which kernels start on the GPU that holds a tensor, for models spread over several."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
