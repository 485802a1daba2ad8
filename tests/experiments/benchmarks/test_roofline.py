"""Counts behind the limits, against naive formulas, torch's own counter, and real caches."""

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks.roofline import (
    Sizes,
    cache_size,
    decode_memory,
    decode_work,
    read_memory,
    read_pairs,
    read_work,
    segment_work,
    train_memory,
    train_work,
)
from experiments.benchmarks.shapes import SHAPES, build
from experiments.benchmarks.train import learning
from lococo import LoCoCoConfig, patched

M, B = 16, 8
WINDOW = LoCoCoConfig.streaming_llm(M, block_size=B, positions="absolute")
SPLIT = LoCoCoConfig(M, block_size=B, slots_per_head=((20, 12), (9, 16)))
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "chatglm3-6b": 6_243_584_000,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_parameters_of_the_real_models(name):
    model = build(name, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.dtype == torch.bfloat16 and not model.training


def test_a_shape_is_a_model_that_predicts():
    assert set(SHAPES) == {*PARAMETERS, "tiny"}
    model = build("tiny", "cpu")
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert model(tiny_ids()).logits.isfinite().all()
    assert build("tiny", "cpu", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("is_tied", [False, True])
def test_sizes_of_a_model(is_tied):
    model = tiny_llama(tie_word_embeddings=is_tied)
    sizes = Sizes.of(model)
    embeddings = 64 * 32
    per_layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48
    norms = (2 * 2 + 1) * 32
    assert sizes.linear_parameters == 2 * per_layer
    assert sizes.logit_parameters == embeddings
    assert sizes.model_bytes == 4 * (2 * per_layer + norms + (1 if is_tied else 2) * embeddings)
    assert sizes.weight_bytes == 4 * (2 * per_layer + norms + embeddings)
    assert sizes.entry_bytes == 2 * 8 * 4


def naive_pairs(tokens, num_slots, block_size, past):
    slots, block, pairs = past if num_slots is None else min(past, num_slots), 0, 0
    for _ in range(tokens):
        block += 1
        pairs += slots + block
        if num_slots is not None and block == block_size:
            slots, block = min(slots + block, num_slots), 0
    return pairs


@pytest.mark.parametrize("num_slots", [None, 1, 8, 16, 21, 1000])
@pytest.mark.parametrize(
    ("tokens", "block_size", "past"), [(1, 8, 0), (8, 8, 0), (93, 8, 0), (50, 7, 21), (5, 16, 64)]
)
def test_pairs_equal_those_counted_one_by_one(tokens, num_slots, block_size, past):
    assert read_pairs(tokens, num_slots, block_size, past) == naive_pairs(tokens, num_slots, block_size, past)


def counted(call):
    """Operations of the matrix products while a function runs: all of a model's with ``eager`` attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def rotary(model, tokens):
    """The angles of the rotary embedding may be a product too; ours are counted without it."""
    return counted(lambda: model.model.rotary_emb(torch.zeros(1), torch.arange(tokens)[None]))


@pytest.mark.parametrize(("config", "length"), [(None, 40), (WINDOW, 40), (WINDOW, 45)])
def test_reading_takes_what_torch_counts(config, length):
    model, ids = tiny_llama(attn_implementation="eager"), tiny_ids(3, length)
    sizes = Sizes.of(model)
    with torch.no_grad():
        if config is None:
            total = counted(lambda: model(ids, logits_to_keep=1))
            unseen = length * (length - 1) // 2
        else:
            with patched(model, config, attention="eager"):
                total = counted(lambda: model(ids, logits_to_keep=1))
            widths = [B] * (length // B) + [length % B]
            unseen = sum(width * (width - 1) // 2 for width in widths)
    hidden = 3 * 2 * 4 * 4 * 8 * unseen  # batch, layers, heads; what causality hides is computed by eager attention
    work = read_work(sizes, config, length, batch=3)
    assert work.flops == total - hidden - rotary(model, length)
    assert work.bytes == sizes.weight_bytes


@pytest.mark.parametrize("config", [None, WINDOW])
def test_decoding_takes_what_torch_counts_on_average_over_a_block(config):
    model, ids = tiny_llama(attn_implementation="eager"), tiny_ids(2, 40)
    sizes, steps = Sizes.of(model), 1 if config is None else B
    with torch.no_grad():
        if config is None:
            cache = model(ids).past_key_values
            total = counted(lambda: model(ids[:, :1], past_key_values=cache))
        else:
            with patched(model, config, attention="eager"):
                cache = model(ids).past_key_values
                total = counted(lambda: [model(ids[:, :1], past_key_values=cache) for _ in range(B)])
    work = decode_work(sizes, config, past=40, batch=2)
    entries = 41 if config is None else M + (B + 1) / 2
    # A step of ours attends to the whole buffer.
    unused = 0 if config is None else 2 * 2 * 4 * 4 * 8 * (M + B - entries)  # batch, layers, heads
    assert work.flops == (total - steps * rotary(model, 1)) / steps - unused
    assert work.bytes == sizes.weight_bytes + 2 * 2 * 2 * entries * sizes.entry_bytes  # batch, layers, KV heads


def test_training_takes_what_torch_counts():
    model, ids = tiny_llama(attn_implementation="eager"), tiny_ids(2, 24)
    sizes = Sizes.of(model)
    with learning(model):
        total = counted(lambda: model(input_ids=ids, labels=ids).loss.backward())
    hidden = 3 * 2 * 2 * 4 * 4 * 8 * (24 * 23 // 2)
    work = train_work(sizes, None, 24, batch=2)
    assert work.flops == total - hidden - rotary(model, 24)
    with torch.no_grad():
        teacher = counted(lambda: model(input_ids=ids)) - hidden / 3 - rotary(model, 24)
    assert train_work(sizes, None, 24, batch=2, distills=True).flops == work.flops + teacher


def test_a_layers_share_of_a_segment():
    sizes = Sizes.of(tiny_llama())
    linear = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48
    expected = 2 * linear * B + 4 * 4 * 8 * naive_pairs(B, M, B, past=M)
    assert segment_work(sizes, WINDOW, B, past=M, batch=5).flops == 5 * expected


@pytest.mark.parametrize("config", [None, WINDOW, LoCoCoConfig.h2o(M, block_size=B), SPLIT])
def test_cache_size_is_that_of_a_real_one(config):
    model, ids = tiny_llama(), tiny_ids(3, 48)
    sizes = Sizes.of(model)
    with torch.no_grad():
        if config is None:
            cache = model(ids).past_key_values
            held = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        else:
            with patched(model, config, attention="eager"):
                cache = model(ids, use_cache=True).past_key_values
            held = [states for layer in cache.layers for states in (layer.entries.keys, layer.entries.values)]
    assert cache_size(sizes, config, 48, batch=3) == sum(states.nbytes for states in held)


def test_heads_with_slots_of_their_own_are_counted_one_by_one():
    sizes = Sizes.of(tiny_llama())
    slots = [20, 12, 9, 16]
    attention = sum(2 * 4 * 8 * naive_pairs(40, each, B, past=0) for each in slots)  # two query heads each
    assert read_work(sizes, SPLIT, 40).flops == 2 * sizes.linear_parameters * 40 + 2 * 64 * 32 + attention
    entries = sum(each + (B + 1) / 2 for each in slots)
    assert decode_work(sizes, SPLIT, past=40).bytes == sizes.weight_bytes + entries * sizes.entry_bytes


def test_least_memory():
    sizes = Sizes.of(tiny_llama())
    weights, per_token = sizes.model_bytes, 2 * 2 * sizes.entry_bytes
    widest = 3 * 32 + 32 + 3 * 48  # embeddings, input and normed input; between attention and MLP; products
    assert read_memory(sizes, None, 1000, 2) == weights + 2 * 1000 * (per_token + widest * 4)
    by_block = weights + 2 * ((M + B) * per_token + B * widest * 4)
    assert read_memory(sizes, LoCoCoConfig(M, block_size=B), 1000, 2) == by_block
    flat = LoCoCoConfig(M, block_size=B)
    assert read_memory(sizes, flat, 1000) == read_memory(sizes, flat, 10**6)
    assert decode_memory(sizes, None, 1000, 2) == weights + 3 * 1000 * per_token  # one of two layers twice
    assert decode_memory(sizes, flat, 1000, 2) == weights + 2 * (M + B) * per_token
    assert train_memory(sizes, flat, 10**6, backprop_tokens=100) == train_memory(sizes, None, 100)
    assert train_memory(sizes, None, 200) - weights == 2 * (train_memory(sizes, None, 100) - weights)


def test_the_limit_is_the_slower_of_arithmetic_and_traffic():
    work = decode_work(Sizes.of(tiny_llama()), None, past=10)
    assert work.seconds(work.flops, 2 * work.bytes) == 1
    assert work.seconds(2 * work.flops, work.bytes) == 1
