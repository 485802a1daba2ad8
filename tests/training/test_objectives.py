"""Losses and their gradients, through one chunk after another, are those of the mathematics."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_llama import naive_gradients
from tiny import tiny_llama
from training_worker import CONFIG, IDS, assert_same, heads, logits, patched_tiny

import lococo
from lococo.patch import suspended
from lococo.state import patch_of
from lococo.training.objectives import Caches, Distill, NextToken, WindowLoss

OBJECTIVES = [NextToken(), Distill(), Distill(temperature=2.0, next_token_weight=0.25)]


def in_spans(objective, **options):
    return dataclasses.replace(objective, **options)


def span_losses(model, objective, ids=IDS):
    """Losses of one span after another, none of which knows the graph of those before."""
    loss, caches = WindowLoss(model, objective), Caches(model)
    for start, stop in objective.spans(ids.shape[1] - 1):
        yield loss(ids, caches, start, stop)
        caches.detach()


def head_gradients(model):
    found = {
        f"{index}.{name}": parameter.grad.clone()
        for index, head in patch_of(model).heads.items()
        for name, parameter in head.named_parameters()
    }
    model.zero_grad()
    return found


# The full cache for a while


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, positions="slot")], ids=["absolute", "slot"])
def test_suspended_model_is_the_unpatched_one_bit_for_bit(config):
    full, model = tiny_llama().double(), patched_tiny(config)
    compressed = logits(model)
    assert (compressed - logits(full)).abs().max() > 1
    with suspended(model) as same:
        assert same is model
        assert torch.equal(logits(model), logits(full))
        assert torch.equal(logits(model, logits_to_keep=3), logits(full, logits_to_keep=3))
        assert torch.equal(logits(model, output_attentions=True), logits(full, output_attentions=True))
        cache, parts = None, []
        for ids in IDS.split(20, dim=1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert cache.get_seq_length() == 64
        assert not isinstance(cache, lococo.LoCoCoCache)
        torch.testing.assert_close(torch.cat(parts, dim=1), logits(full))
        options = dict(max_new_tokens=8, do_sample=False)
        assert model.generate(IDS, **options).tolist() == full.generate(IDS, **options).tolist()
    assert torch.equal(logits(model), compressed)


def test_suspension_nests_and_ends_with_an_error():
    full, model = logits(tiny_llama().double()), patched_tiny()
    compressed = logits(model)
    with suspended(model):
        with pytest.raises(KeyError), suspended(model):
            raise KeyError
        assert torch.equal(logits(model), full)
    assert torch.equal(logits(model), compressed)
    with pytest.raises(ZeroDivisionError), suspended(model):
        _ = 1 // 0
    assert torch.equal(logits(model), compressed)
    assert torch.equal(logits(lococo.unpatch_model(model)), full)


def test_suspended_model_refuses_a_compressed_cache():
    model = patched_tiny()
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with suspended(model), pytest.raises(ValueError, match="LoCoCoCache.*suspended"):
        logits(model, past_key_values=cache)
    with pytest.raises(ValueError, match="not patched"), suspended(tiny_llama()):
        pass


# Objectives


@pytest.mark.parametrize("training", [False, True])
def test_next_token_is_the_loss_of_the_patched_model(training):
    model = patched_tiny().train(training)
    losses = WindowLoss(model, NextToken())(IDS)
    assert losses.shape == (2, 63)
    assert losses.mean().item() == pytest.approx(model(input_ids=IDS, labels=IDS).loss.item(), abs=1e-5)


def naive_divergence(temperature=1.0):
    full = (logits(tiny_llama().double()) / temperature).softmax(dim=-1)[:, :-1]
    compressed = (logits(patched_tiny()) / temperature).softmax(dim=-1)[:, :-1]
    return temperature**2 * (full * (full.log() - compressed.log())).sum(dim=-1)


def test_distill_is_the_divergence_of_the_compressed_model_from_the_full_one():
    model = patched_tiny()
    divergence = WindowLoss(model, Distill())(IDS)
    torch.testing.assert_close(divergence, naive_divergence())
    assert divergence.mean() > 0.1
    torch.testing.assert_close(WindowLoss(model, Distill(temperature=3.0))(IDS), naive_divergence(3.0))
    mixed = WindowLoss(model, Distill(next_token_weight=0.25))(IDS)
    torch.testing.assert_close(mixed, 0.75 * divergence + 0.25 * WindowLoss(model, NextToken())(IDS))


def test_divergence_is_zero_where_everything_fits_into_the_slots():
    model = patched_tiny(lococo.LoCoCoConfig(64, block_size=8, gate_init=0.3))
    assert WindowLoss(model, Distill())(IDS).abs().max() < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=12)
@given(tokens=st.integers(1, 70), chunk=st.integers(1, 70))
def test_no_token_is_lost_between_chunks(objective, tokens, chunk):
    whole = WindowLoss(patched_tiny(), objective)(IDS)
    model = patched_tiny(prefill_chunk_size=chunk)
    with torch.no_grad():
        parts = list(span_losses(model, in_spans(objective, backprop_tokens=tokens)))
    assert len(parts) == math.ceil(63 / tokens)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-9)


@functools.cache
def naive_head_gradients(cuts, distills):
    """Gradients of heads by the naive reference, whose graph is cut before some tokens."""
    model = patched_tiny()
    found = naive_gradients(model, IDS, cuts, naive_targets() if distills else None)
    return {name: found[f"model.layers.{name[0]}.self_attn.lococo_head{name[1:]}"] for name in heads(model)}


def naive_targets():
    return logits(tiny_llama().double()).log_softmax(dim=-1)[:, :-1]


@pytest.mark.parametrize("objective", [NextToken(), Distill()])
@pytest.mark.parametrize("tokens", [None, 8, 16, 20, 63, 100])
def test_gradients_equal_the_naive_reference(objective, tokens):
    cuts = tuple(range(tokens or 64, 63, tokens or 64))
    expected = naive_head_gradients(cuts, isinstance(objective, Distill))
    assert all(gradient.abs().max() > 1e-6 for gradient in expected.values())
    model = patched_tiny()
    for losses in span_losses(model, in_spans(objective, backprop_tokens=tokens)):
        (losses.sum() / 126).backward()
    assert_same(head_gradients(model), expected, atol=1e-9)


@pytest.mark.parametrize("tokens", [20, 63])
def test_gradients_do_not_depend_on_how_much_is_read_at_once(tokens):
    found = []
    for chunk in (13, 100):
        model = patched_tiny(prefill_chunk_size=chunk)
        for losses in span_losses(model, NextToken(backprop_tokens=tokens)):
            losses.sum().backward()
        found.append(head_gradients(model))
    assert_same(*found, atol=1e-9)


def test_reading_on_without_gradients_leaves_those_of_what_was_read():
    found = []
    for reads_on in (False, True):
        model, cache = patched_tiny(), lococo.LoCoCoCache(CONFIG, 2)
        output = model(input_ids=IDS[:, :40], past_key_values=cache).logits  # its last block is not compressed yet
        if reads_on:
            late = logits(model, IDS[:, 40:], past_key_values=cache)
            torch.testing.assert_close(late, logits(model)[:, 40:], rtol=0, atol=1e-9)
        output.square().sum().backward()
        found.append(head_gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("tokens", [0, -4, 2.5, "8"])
def test_backprop_tokens_must_be_a_count(tokens):
    with pytest.raises(ValueError, match=f"at least 1.*got {tokens!r}"):
        NextToken(backprop_tokens=tokens)


def test_objectives_refuse_values_out_of_range():
    with pytest.raises(ValueError, match="temperature.*got 0"):
        Distill(temperature=0)
    with pytest.raises(ValueError, match="next_token_weight.*got 1.5"):
        Distill(next_token_weight=1.5)
    with pytest.raises(ValueError, match="at least 2 tokens.*got 1"):
        WindowLoss(patched_tiny(), NextToken())(IDS[:, :1])
