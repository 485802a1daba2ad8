"""The blends of a compression in one Triton kernel, without gradients. It equals ``Compressor.blend``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lococo.kernels.triton_attention import on_device_of, with_dense_channels

SLOTS = 32
MOST_FIGURES = 16  # the least number of columns in a product


@triton.jit(do_not_specialize=["slots", "entries"])
def _blend_kernel(
    logits_base,
    gate_base,
    anchor_base,
    rest_base,
    key_base,
    value_base,
    figure_base,
    key_blend_base,
    value_blend_base,
    figure_blend_base,
    slots,
    entries,
    kv_heads,
    row_sum_eps,
    smallest_weight,
    logits_batch,
    logits_head,
    logits_stride,
    gate_stride,
    key_batch,
    key_head,
    key_stride,
    value_batch,
    value_head,
    value_stride,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    FIGURES: tl.constexpr,
    MOST_FIGURES: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MASS: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    channel, figure = tl.arange(0, CHANNELS), tl.arange(0, MOST_FIGURES)
    is_slot, is_channel, is_figure = slot < slots, channel < HEAD_DIM, figure < FIGURES
    logits_row = logits_base + batch * logits_batch + kv_head * logits_head + slot.to(tl.int64) * logits_stride
    rest_base += pair * entries
    key_base += batch * key_batch + kv_head * key_head
    value_base += batch * value_batch + kv_head * value_head
    figure_base += pair * entries * FIGURES

    row_sum = tl.zeros([SLOTS], dtype=tl.float32)
    for first in range(0, entries, TILE):
        entry = first + tl.arange(0, TILE)
        is_entry = entry < entries
        is_rest = tl.load(rest_base + entry, mask=is_entry, other=0).to(tl.float32)
        is_logit = is_slot[:, None] & is_entry[None]
        logits = tl.load(logits_row[:, None] + entry[None], mask=is_logit, other=0.0).to(tl.float32)
        row_sum += tl.sum((tl.maximum(logits, 0.0) + row_sum_eps) * is_rest[None], 1)

    share = 1.0 / row_sum
    if HAS_GATE:
        gate = tl.load(gate_base + slot * gate_stride, mask=is_slot, other=0.0).to(tl.float32)
        anchor = tl.load(anchor_base + pair * slots + slot, mask=is_slot, other=-1)
        share = share * gate
    key_blend = tl.zeros([SLOTS, CHANNELS], dtype=tl.float32)
    value_blend = tl.zeros([SLOTS, CHANNELS], dtype=tl.float32)
    figure_blend = tl.zeros([SLOTS, MOST_FIGURES], dtype=tl.float32)
    entropy = tl.zeros([SLOTS], dtype=tl.float32)
    for first in range(0, entries, TILE):
        entry = first + tl.arange(0, TILE)
        is_entry = entry < entries
        is_rest = tl.load(rest_base + entry, mask=is_entry, other=0).to(tl.float32)
        is_logit = is_slot[:, None] & is_entry[None]
        logits = tl.load(logits_row[:, None] + entry[None], mask=is_logit, other=0.0).to(tl.float32)
        weights = (tl.maximum(logits, 0.0) + row_sum_eps) * is_rest[None] * share[:, None]
        if HAS_GATE:
            weights += tl.where(anchor[:, None] == entry[None], 1.0 - gate[:, None], 0.0)
        offsets = entry.to(tl.int64)[:, None]
        is_there = is_entry[:, None] & is_channel[None]
        key = tl.load(key_base + offsets * key_stride + channel[None], mask=is_there, other=0.0)
        value = tl.load(value_base + offsets * value_stride + channel[None], mask=is_there, other=0.0)
        mix = weights.to(key.dtype)
        key_blend = tl.dot(mix, key, key_blend, input_precision="ieee")
        value_blend = tl.dot(mix, value, value_blend, input_precision="ieee")
        if FIGURES > 0:
            is_known = is_entry[:, None] & is_figure[None]
            figures = tl.load(figure_base + offsets * FIGURES + figure[None], mask=is_known, other=0.0)
            figure_blend = tl.dot(weights, figures, figure_blend, input_precision="ieee")
        if HAS_MASS:
            entropy -= tl.sum(weights * tl.log(tl.where(weights > smallest_weight, weights, 1.0)), 1)

    place = (pair * slots + slot)[:, None]
    is_blend = is_slot[:, None] & is_channel[None]
    blend_dtype = key_blend_base.dtype.element_ty
    tl.store(key_blend_base + place * HEAD_DIM + channel[None], key_blend.to(blend_dtype), mask=is_blend)
    tl.store(value_blend_base + place * HEAD_DIM + channel[None], value_blend.to(blend_dtype), mask=is_blend)
    if HAS_MASS:
        figure_blend += tl.where(figure[None] == FIGURES - 1, entropy[:, None], 0.0)
    if FIGURES > 0:
        is_blend = is_slot[:, None] & is_figure[None]
        tl.store(figure_blend_base + place * FIGURES + figure[None], figure_blend, mask=is_blend)


def blend(
    keys: torch.Tensor,
    values: torch.Tensor,
    averaged: list[torch.Tensor],
    log_mass: torch.Tensor | None,
    logits: torch.Tensor,
    gates: torch.Tensor | None,
    anchors: torch.Tensor,
    rest: torch.Tensor,
    row_sum_eps: float,
    smallest_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Fused slots from the convolution's output, without their weights in memory.

    Parameters
    ----------
    keys, values : torch.Tensor
        (batch, kv_heads, entries, head_dim).
    averaged : list of torch.Tensor
        (batch, kv_heads, entries) each, mixed with the same weights.
    log_mass : torch.Tensor, optional
        (batch, kv_heads, entries), of the entries; to a blend's the entropy of its weights is added.
    logits : torch.Tensor
        (batch, kv_heads, slots, entries).
    gates : torch.Tensor, optional
        (slots or 1,), between 0 and 1.
    anchors : torch.Tensor
        (batch, kv_heads, slots), the entry each slot starts from.
    rest : torch.Tensor
        (batch, kv_heads, entries), True where an entry may be blended.
    row_sum_eps, smallest_weight : float
        Added to every weight before they are normalised; least weight that counts for the entropy.

    Returns
    -------
    tuple
        (batch, kv_heads, slots, head_dim) keys and values, and the averages, (batch, kv_heads, slots) each, the
        log-mass last.
    """
    (batch, kv_heads, slots, entries), head_dim = logits.shape, keys.shape[-1]
    figures = torch.empty(0, device=keys.device)
    columns = averaged if log_mass is None else [*averaged, log_mass]
    if columns:
        figures = torch.stack(columns, dim=-1).float()
    keys, values, logits = (with_dense_channels(tensor) for tensor in (keys, values, logits))
    key_blend, value_blend = keys.new_empty(2, batch, kv_heads, slots, head_dim).unbind()
    figure_blend = figures.new_empty(batch, kv_heads, slots, len(columns))
    channels = max(16, triton.next_power_of_2(head_dim))
    with on_device_of(keys):
        _blend_kernel[(triton.cdiv(slots, SLOTS), batch * kv_heads)](
            *(logits, gates, anchors.contiguous(), rest.contiguous().view(torch.uint8), keys, values, figures),
            *(key_blend, value_blend, figure_blend, slots, entries, kv_heads, row_sum_eps, smallest_weight),
            *(*logits.stride()[:3], 0 if gates is None or len(gates) == 1 else 1),
            *(*keys.stride()[:3], *values.stride()[:3]),
            HEAD_DIM=head_dim,
            CHANNELS=channels,
            FIGURES=len(columns),
            MOST_FIGURES=MOST_FIGURES,
            SLOTS=SLOTS,
            TILE=max(16, min(64, 16384 // (channels * keys.itemsize))),
            HAS_GATE=gates is not None,
            HAS_MASS=log_mass is not None,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return key_blend, value_blend, list(figure_blend.unbind(-1))
