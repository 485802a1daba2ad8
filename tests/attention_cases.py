"""Small queries, keys and masks, and what attention makes of them, written out by hand in float64."""

import torch

from lococo.kernels.scoring import LogitBias

CASES = ["causal", "one-query", "mask", "mask-per-head", "bias", "bias-and-mask", "softcap"]


def case(name, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, queries, entries, dim = 2, 6, 2, 1 if name == "one-query" else 5, 12, 8
    query = torch.randn(batch, heads, queries, dim, generator=generator, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, entries, dim, generator=generator, dtype=dtype).unbind()
    mask = bias = None
    if "mask" in name:
        mask = torch.rand(batch, kv_heads if "head" in name else 1, queries, entries, generator=generator) < 0.6
        mask[..., 0] = True
    if "bias" in name:
        bias = torch.randn(batch, kv_heads, entries, generator=generator, dtype=dtype)
    return query, key, value, LogitBias(mask, bias, 1.5 if name == "softcap" else None)


def by_hand(query, key, value, scale, visibility):
    """(output, probabilities (batch, heads, queries, entries)), one query at a time."""
    groups = query.shape[1] // key.shape[1]
    queries, entries = query.shape[2], key.shape[2]
    output, probabilities = torch.zeros_like(query), query.new_zeros(*query.shape[:3], entries)
    for row, head, index in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        kv_head = head // groups
        logits = key[row, kv_head] @ query[row, head, index] * scale
        if visibility.softcap:
            logits = visibility.softcap * (logits / visibility.softcap).tanh()
        if visibility.bias is not None:
            logits = logits + visibility.bias[row, kv_head]
        if visibility.mask is None:
            seen = torch.arange(entries) <= index + entries - queries
        else:
            seen = visibility.mask[row, kv_head % visibility.mask.shape[1], index]
        row_of_matrix = logits.where(seen, torch.tensor(float("-inf"), dtype=logits.dtype)).softmax(0)
        probabilities[row, head, index] = row_of_matrix.detach()
        output[row, head, index] = row_of_matrix @ value[row, kv_head]
    return output, probabilities
