"""Attention of one query per head to entries that are held as codes, in Triton: nothing is decoded in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lococo.compression.codes import GROUP, Codec, num_groups
from lococo.kernels.triton_attention import on_device_of, with_dense_channels

LOG2_E = tl.constexpr(1.4426950408889634)
TILE = 32  # entries


@triton.jit
def _decoded(
    base, range_base, entry, is_entry, dtype: tl.constexpr,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, SHARED: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """(entries, CHANNELS) numbers of dense (entries, HEAD_DIM) vectors, or of their codes."""
    channel = tl.arange(0, CHANNELS)
    is_there = is_entry[:, None] & (channel < HEAD_DIM)[None]
    at = entry.to(tl.int64)[:, None]
    if BITS == 16:
        numbers = tl.load(base + at * HEAD_DIM + channel[None], mask=is_there, other=0.0)
    else:
        if BITS == 8:
            codes = tl.load(base + at * HEAD_DIM + channel[None], mask=is_there, other=0).to(tl.int32)
        else:
            both = tl.load(base + at * ((HEAD_DIM + 1) // 2) + (channel // 2)[None], mask=is_there, other=0)
            codes = (both.to(tl.int32) >> (channel % 2 * 4)[None]) & 15
        scale = range_base + at * (2 * SCALES) + (channel // SHARED)[None]
        step = tl.load(scale, mask=is_there, other=0.0).to(tl.float32)
        least = tl.load(scale + SCALES, mask=is_there, other=0.0).to(tl.float32)
        numbers = codes.to(tl.float32) * step + least
    return numbers.to(dtype)


@triton.jit
def _logits(
    query, keys_base, keys_range, bias_base, entry, is_entry, scale,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, SHARED: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """(rows, entries), in units of log 2."""
    key = _decoded(keys_base, keys_range, entry, is_entry, query.dtype, BITS, HEAD_DIM, CHANNELS, SHARED, SCALES)
    bias = tl.load(bias_base + entry, mask=is_entry, other=float("-inf")).to(tl.float32)
    return tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E) + bias[None] * LOG2_E


@triton.jit(do_not_specialize=["entries"])
def _decode_kernel(
    query_base, keys_base, keys_range, values_base, values_range, bias_base,
    pages_base, first_base, at_base, output_base, received_base,
    scale, entries, kv_heads, query_row, query_head, keys_row, keys_range_row, values_row, values_range_row,
    KEY_BITS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_CHANNELS: tl.constexpr,
    KEY_SHARED: tl.constexpr, KEY_SCALES: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    VALUE_SHARED: tl.constexpr, VALUE_SCALES: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HAS_PAGES: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_RECEIVED: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """One KV head of a text: its entries up to the one just written, for all queries of its group."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(first_base + kv_head).to(tl.int32) if HAS_FIRST else 0
    stop = tl.load(at_base + row * kv_heads + kv_head).to(tl.int32) + 1
    head = tl.arange(0, ROWS)
    channel = tl.arange(0, KEY_CHANNELS)
    is_head = head < GROUPS
    query_at = query_base + row * query_row + (kv_head * GROUPS + head)[:, None] * query_head + channel[None]
    query = tl.load(query_at, mask=is_head[:, None] & (channel < KEY_DIM)[None], other=0.0)
    start = row * entries
    bias_base += start
    page = tl.load(pages_base + row).to(tl.int64) if HAS_PAGES else row
    keys_base += page * keys_row
    values_base += page * values_row
    if KEY_BITS != 16:
        keys_range += page * keys_range_row
    if VALUE_BITS != 16:
        values_range += page * values_range_row

    total = tl.zeros([ROWS, VALUE_CHANNELS], dtype=tl.float32)
    norm = tl.zeros([ROWS], dtype=tl.float32)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for begin in range(first, stop, TILE):
        entry = begin + tl.arange(0, TILE)
        is_entry = entry < stop
        logits = _logits(
            query, keys_base, keys_range, bias_base, entry, is_entry, scale,
            KEY_BITS, KEY_DIM, KEY_CHANNELS, KEY_SHARED, KEY_SCALES,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(logits, 1))
        reached = tl.where(higher == float("-inf"), 0.0, higher)  # all that came so far may be hidden
        probs = tl.exp2(logits - reached[:, None])
        fade = tl.exp2(peak - reached)
        value = _decoded(
            values_base, values_range, entry, is_entry, query.dtype,
            VALUE_BITS, VALUE_DIM, VALUE_CHANNELS, VALUE_SHARED, VALUE_SCALES,
        )  # fmt: skip
        total = tl.dot(probs.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
        norm = norm * fade + tl.sum(probs, 1)
        peak = higher

    value_channel = tl.arange(0, VALUE_CHANNELS)
    output_at = output_base + ((row * kv_heads + kv_head) * GROUPS + head)[:, None] * VALUE_DIM + value_channel[None]
    is_there = is_head[:, None] & (value_channel < VALUE_DIM)[None]
    tl.store(output_at, (total / norm[:, None]).to(output_base.dtype.element_ty), mask=is_there)

    if HAS_RECEIVED:
        lse = peak + tl.log2(norm)
        for begin in range(first, stop, TILE):
            entry = begin + tl.arange(0, TILE)
            is_entry = entry < stop
            logits = _logits(
                query, keys_base, keys_range, bias_base, entry, is_entry, scale,
                KEY_BITS, KEY_DIM, KEY_CHANNELS, KEY_SHARED, KEY_SCALES,
            )  # fmt: skip
            probs = tl.exp2(logits - lse[:, None])
            if SQUARED:
                probs = probs * probs
            received = tl.sum(tl.where(is_head[:, None], probs, 0.0), 0)
            tl.store(received_base + start + entry, received, mask=is_entry)


def attend_codes(
    query: torch.Tensor,
    keys: torch.Tensor,
    keys_range: torch.Tensor | None,
    values: torch.Tensor,
    values_range: torch.Tensor | None,
    codec: Codec,
    bias: torch.Tensor,
    at: torch.Tensor,
    scale: float,
    first: torch.Tensor | None = None,
    wants_received: bool = False,
    squared: bool = False,
    pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one query per head, and the attention that entries receive.

    Equals what ``DecodeBuffers`` and ``PagedLayer`` do with decoded entries. Every KV head reads its own entries, up
    to the last written.

    Parameters
    ----------
    query : torch.Tensor
        (rows, heads, head_dim).
    keys, values : torch.Tensor
        (rows, entries, d) codes or numbers, each row contiguous, with (rows, entries, 2 * groups) ranges of what is
        coded: see ``lococo.compression.codes``.
    codec : Codec
        Bits and sizes.
    bias : torch.Tensor
        (rows, entries), added to the logits.
    at : torch.Tensor
        (rows, kv_heads), the last entry of each head.
    first : torch.Tensor, optional
        (kv_heads,), the first entry of each head. None: there is one head.
    wants_received : bool
        Whether the attention received is wanted.
    squared : bool
        Sum the squares of the attention.
    pages : torch.Tensor, optional
        (rows,), where keys and values of a row lie among those of others.

    Returns
    -------
    tuple
        (rows, heads, head_dim of values) output; (rows, entries) attention received in float32, summed over the
        queries of an entry's head, None if it is not wanted.
    """
    (rows, heads, _), kv_heads = query.shape, at.shape[1]
    query, groups = with_dense_channels(query), heads // kv_heads
    output = query.new_empty(rows, heads, codec.sizes[1])
    received = query.new_zeros(bias.shape, dtype=torch.float32) if wants_received else None
    sizes: dict[str, int] = {}
    for name, size, bits in zip(("KEY", "VALUE"), codec.sizes, codec.bits, strict=True):
        sizes[f"{name}_BITS"], sizes[f"{name}_DIM"] = bits, size
        sizes[f"{name}_CHANNELS"] = max(16, triton.next_power_of_2(size))
        sizes[f"{name}_SHARED"] = min(GROUP.get(bits, size), size)
        sizes[f"{name}_SCALES"] = num_groups(size, bits) if bits in GROUP else 1
    with on_device_of(query):
        _decode_kernel[(rows, kv_heads)](
            *(query, keys, keys_range, values, values_range, bias, pages, first, at, output, received),
            *(scale, keys.shape[1], kv_heads, query.stride(0), query.stride(1)),
            *(0 if each is None else each.stride(0) for each in (keys, keys_range, values, values_range)),
            **sizes,
            GROUPS=groups,
            ROWS=max(16, triton.next_power_of_2(groups)),
            TILE=TILE,
            HAS_PAGES=pages is not None,
            HAS_FIRST=first is not None,
            HAS_RECEIVED=wants_received,
            SQUARED=squared,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return output, received
