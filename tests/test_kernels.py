"""Every kernel against a float64 softmax written out by hand."""

import pytest
import torch

from lococo import kernels
from lococo.kernels import Visibility, attend, attention_mass

BACKENDS = ["sdpa", "eager", "flex"]
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
    return query, key, value, Visibility(mask, bias, 1.5 if name == "softcap" else None)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_softmax_by_hand(backend, name):
    query, key, value, visibility = case(name)
    with torch.no_grad():
        output = attend(query, key, value, 0.3, visibility, backend)
    expected, _ = by_hand(query, key, value, 0.3, visibility)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [1, 2, 128])
def test_received_attention_equals_column_sums(name, tile, monkeypatch):
    monkeypatch.setattr(kernels, "SCORE_TILE", tile)
    query, key, value, visibility = case(name)
    _, probabilities = by_hand(query, key, value, 0.3, visibility)
    expected = probabilities.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    torch.testing.assert_close(attention_mass(query, key, 0.3, visibility), expected, rtol=0, atol=1e-12)


def test_padding_queries_do_not_vote():
    query, key, value, visibility = case("mask")
    counts = torch.tensor([[[1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0]]], dtype=torch.bool)[..., None]
    _, probabilities = by_hand(query, key, value, 0.3, visibility)
    expected = (probabilities * counts).unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    torch.testing.assert_close(attention_mass(query, key, 0.3, visibility, counts), expected, rtol=0, atol=1e-12)


def test_received_squares_equal_column_sums_of_squares():
    query, key, value, visibility = case("mask")
    _, probabilities = by_hand(query, key, value, 0.3, visibility)
    expected = probabilities.square().unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    got = attention_mass(query, key, 0.3, visibility, squared=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_by_hand(name):
    query, key, value, visibility = case(name)
    variables = [query, key, value] + ([] if visibility.bias is None else [visibility.bias])
    for variable in variables:
        variable.requires_grad_()
    weights = torch.randn(query.shape, dtype=query.dtype, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((attend(query, key, value, 0.3, visibility) * weights).sum(), variables)
    expected = torch.autograd.grad((by_hand(query, key, value, 0.3, visibility)[0] * weights).sum(), variables)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-11)


def test_no_matrix_over_the_whole_segment_is_made_for_scores():
    """Tracked at the dispatcher: no tensor of a long segment's scores has more elements than a tile's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    queries, entries = 1024, 1536
    query, key = torch.randn(1, 2, queries, 8), torch.randn(1, 1, entries, 8)
    mask = torch.ones(1, 1, queries, entries, dtype=torch.bool)
    with Sizes():
        attention_mass(query, key, 0.3, Visibility(mask))
    assert largest <= max(2 * kernels.SCORE_TILE * entries, mask.numel())
    assert largest < 2 * queries * entries


def test_flash_attention_2_says_what_is_missing():
    query, key, value, visibility = case("causal")
    with pytest.raises(ImportError, match="flash-attn"):
        attend(query, key, value, 0.3, visibility, "flash_attention_2")


def test_flex_refuses_dropout():
    with pytest.raises(ValueError, match="dropout, the model asks for 0.1"):
        attend(*case("causal")[:3], 0.3, Visibility(), "flex", dropout=0.1)
