"""A layer in pages of bytes, many texts side by side, against the same layer reading every text alone and whole."""

import dataclasses
import random

import pytest
import torch
from configs import CODED, CONFIGS
from tiny import patched_llama

import lococo
from lococo import LoCoCoConfig
from lococo.attention import LayerReading, read_layer
from lococo.cache.buffers import LayerModules
from lococo.cache.layer import LayerCache
from lococo.cache.plan import RowState, plan_call
from lococo.registry import COMPRESSORS
from lococo.state import patch_of
from lococo.vllm.pages import ALIGNMENT, PagedLayer, PageLayout, StepBatch, row_state

HEADS, KV_HEADS, HEAD_DIM, LAYER = 4, 2, 8, 1
EVERY = CONFIGS | {f"coded-{name}": config for name, config in CODED.items()}
ABSOLUTE = {name: config for name, config in EVERY.items() if config.positions == "absolute"}


def modules_of(config):
    patch = patch_of(patched_llama(config, num_attention_heads=HEADS).double())
    rotary = patch.rotary_tables.get(LAYER)
    return LayerModules(patch.heads.get(LAYER), patch.networks.get(LAYER), rotary)


def paged(config, modules, pages=7, dtype=torch.float64, softcap=None):
    configs = config.layer_configs(LAYER)
    configs = configs * KV_HEADS if len(configs) == 1 else configs
    layout = PageLayout.of(configs, HEADS, HEAD_DIM, dtype, modules.network)
    memory = torch.randint(0, 255, (pages, layout.nbytes), dtype=torch.uint8)  # whatever lay there
    return PagedLayer(config, LAYER, layout, HEADS, memory, modules, 0.4, softcap)


def alone(config, modules, states, softcap=None):
    """(tokens, heads, head_dim) of a text read whole."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in states)

    def plan_for(each):
        return plan_call([RowState()], query.shape[2], each)

    reading = LayerReading(plan_for, 0.4, modules, softcap=softcap)
    return read_layer(LayerCache(config, LAYER), reading, query, key, value)[0].transpose(0, 1)


def text(tokens, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def read_in_turns(layer, texts, pages, block_size, seed):
    """What every text gives, read in pieces of any length side by side with the others, some token by token."""
    draw = random.Random(seed)
    seen, parts = [0] * len(texts), [[] for _ in texts]
    while any(done < len(states[0]) for done, states in zip(seen, texts, strict=True)):
        stepping = []
        for index, states in enumerate(texts):
            left = len(states[0]) - seen[index]
            if left and draw.random() < 0.8:
                count = min(left, draw.choice([1, 1, 1, 1, 2, 5, 11, 30]))
                if count == 1:
                    stepping.append(index)
                else:
                    piece = [each[seen[index] : seen[index] + count] for each in states]
                    parts[index].append(layer.read(*piece, pages[index], seen[index]))
                    seen[index] += count
        if stepping:
            batch = StepBatch.of(torch.tensor([pages[i] for i in stepping]), [seen[i] for i in stepping], block_size)
            states = [torch.stack([texts[i][each][seen[i]] for i in stepping]) for each in range(3)]
            for index, output in zip(stepping, layer.step(*states, batch), strict=True):
                parts[index].append(output[None])
                seen[index] += 1
    return [torch.cat(each) for each in parts]


@pytest.mark.parametrize("name", ABSOLUTE)
@torch.inference_mode()
def test_texts_in_pages_are_read_as_each_alone(name):
    config = ABSOLUTE[name]
    with torch.inference_mode(False):
        modules = modules_of(config)
    texts = [text(tokens, tokens) for tokens in (1, 90, 41, 7, 64)]
    layer, pages = paged(config, modules), [3, 0, 6, 2, 5]
    outputs = read_in_turns(layer, texts, pages, config.block_size, seed=len(name))
    for states, output in zip(texts, outputs, strict=True):
        torch.testing.assert_close(output, alone(config, modules, states), rtol=0, atol=1e-9)
    # Pages serve other texts afterwards.
    again = read_in_turns(layer, texts[::-1], pages, config.block_size, seed=2)
    for first, second in zip(outputs, again[::-1], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


class Asked(lococo.Compressor):
    """Weighs what is left over by the attention of the queries that are kept."""

    needs_queries = True

    def weights(self, entries, choice):
        anchors, rest = choice.blendable(len(entries))
        queries = entries.queries.unflatten(-1, (-1, entries.keys.shape[-1])).flatten(2, 3)
        wanted = (entries.keys @ queries.transpose(-1, -2)).softmax(2).mean(-1) * rest
        return (wanted / wanted.sum(-1, keepdim=True))[:, :, None].expand(*anchors.shape, len(entries))


@torch.inference_mode()
def test_compressors_get_the_queries_of_all_tokens(monkeypatch):
    monkeypatch.setattr(COMPRESSORS, "_items", dict(COMPRESSORS._items))  # others do not see it
    lococo.register_compressor("asked-in-pages")(Asked)
    config = LoCoCoConfig(16, 8, 2, 4, 4, compressor="asked-in-pages")
    modules = LayerModules(Asked())
    states = text(70, 0)
    (output,) = read_in_turns(paged(config, modules), [states], [1], 8, seed=3)
    torch.testing.assert_close(output, alone(config, modules, states), rtol=0, atol=1e-9)


@torch.inference_mode()
def test_logits_are_capped():
    config = CONFIGS["default"]
    with torch.inference_mode(False):
        modules = modules_of(config)
    states = text(50, 0)
    (output,) = read_in_turns(paged(config, modules, softcap=0.5), [states], [1], 8, seed=0)
    expected = alone(config, modules, states, softcap=0.5)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    assert (expected - alone(config, modules, states)).abs().max() > 1e-2


@pytest.mark.parametrize("block_size", [1, 8])
def test_a_page_tells_how_far_its_text_was_read(block_size):
    config, rows = LoCoCoConfig(16, block_size=block_size), (RowState(),)
    for seen in range(60):
        assert row_state(seen, block_size) == rows[0]
        rows = plan_call(rows, 1, config).rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, (8, 4)])
def test_pages_hold_what_a_layer_holds_and_little_else(bits, dtype):
    config = dataclasses.replace(CONFIGS["learned-per-head"], slot_bits=bits)
    modules = modules_of(config)
    layer = LayerCache(config, LAYER)
    layer.make_buffers(*(tensor.transpose(0, 1)[None].to(dtype) for tensor in text(1, 0)), modules.network)
    held = [tensor for tensor in layer.entries.tensors() if tensor is not None]
    layout = PageLayout.of(config.layer_configs(LAYER), HEADS, HEAD_DIM, dtype, modules.network)
    assert sum(tensor.nbytes for tensor in held) <= layout.nbytes <= sum(tensor.nbytes + ALIGNMENT for tensor in held)
    views = [
        view for view in layout.entries(torch.zeros(3, layout.nbytes, dtype=torch.uint8)).tensors() if view is not None
    ]
    assert [(view.shape[1:], view.dtype) for view in views] == [(each.shape[1:], each.dtype) for each in held]
