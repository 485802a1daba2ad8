"""The cache keeps its size and its buffers, and its rows can be taken, repeated, forgotten and copied."""

import copy
import ctypes
import gc
import os

import pytest
import torch
from configs import CONFIGS, FEW
from families import build, fitting, gap, pad_left, patch, read
from tiny import tiny_ids, tiny_llama

import lococo

OPEN = CONFIGS["open"]
ROWS = [tiny_ids(1, length, seed=length)[0] for length in (31, 20, 8)]
NEXT = tiny_ids(3, 17, seed=5)
TOLERANCE = dict(rtol=0, atol=1e-5)


def read_on(model, ids, cache, **arguments):
    return model(ids, past_key_values=cache, use_cache=True, **arguments)


def stream(model, num_tokens, cache=None, call=512):
    """The cache after more tokens."""
    for start in range(0, num_tokens, call):
        cache = read_on(model, tiny_ids(1, min(call, num_tokens - start), seed=start), cache).past_key_values
    return cache


@torch.no_grad()
def test_bytes_do_not_grow_with_the_text():
    model = patch(tiny_llama(num_hidden_layers=1), OPEN, num_slots=64, block_size=128)
    cache, bytes_held = None, []
    for num_tokens in (1024, 3 * 1024, 28 * 1024):
        cache = stream(model, num_tokens, cache)
        bytes_held.append(cache.nbytes)
    assert cache.seen_tokens == 32 * 1024
    keys_and_values = 2 * (64 + 128) * 2 * 8 * 4  # entries * KV heads * head_dim * bytes
    assert len(set(bytes_held)) == 1 and keys_and_values < bytes_held[0] < 2 * keys_and_values


@pytest.mark.parametrize(
    "rows", [pytest.param(ROWS[:1], marks=pytest.mark.slow), ROWS], ids=["one-row", "padded-rows"]
)
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("name", [*FEW, "decode-block-1", "reference", "streaming"])
@torch.no_grad()
def test_decoding_makes_no_buffer_anew(name, family, rows):
    model = patch(build(family), fitting(family, CONFIGS[name]))
    ids, mask = pad_left(rows)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    before = [(buffer.data_ptr(), buffer.shape) for layer in cache.layers for buffer in layer.buffers()]
    content = [buffer.clone() for layer in cache.layers for buffer in layer.buffers()]
    held = cache.nbytes
    for token in tiny_ids(len(rows), 60).split(1, dim=1):
        read_on(model, token, cache)
    buffers = [buffer for layer in cache.layers for buffer in layer.buffers()]
    assert [(buffer.data_ptr(), buffer.shape) for buffer in buffers] == before
    assert not any(map(torch.equal, buffers[:2], content[:2]))
    assert cache.nbytes == held > sum(buffer.nbytes for buffer in buffers)  # and places of steps


@torch.no_grad()
def test_columns_are_counted_with_their_padding():
    model, (ids, mask) = patch(tiny_llama(), OPEN), pad_left(ROWS)
    cache = model(ids, attention_mask=mask).past_key_values
    assert (cache.seen_tokens, cache.get_seq_length(), cache.batch_size) == (31, 31, 3)
    read_on(model, NEXT, cache)
    assert (cache.seen_tokens, cache.get_seq_length()) == (48, 48)
    cache.reset()
    assert (cache.seen_tokens, cache.get_seq_length()) == (0, 0)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_reset_cache_is_a_fresh_one(name):
    model, (ids, mask) = patch(tiny_llama(), CONFIGS[name]), pad_left(ROWS)
    cache = model(ids, attention_mask=mask).past_key_values
    bytes_held, rows = cache.nbytes, tiny_ids(3, 31, seed=9)
    for layer in cache.layers:
        for buffer in layer.buffers():
            buffer.fill_(float("nan"))
    cache.reset()
    assert torch.equal(read_on(model, ids, cache, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    cache.reset()
    assert torch.equal(read_on(model, rows, cache).logits, model(rows).logits)
    assert torch.equal(read_on(model, NEXT, cache).logits, read(model, torch.cat([rows, NEXT], 1), [31, 17])[:, 31:])
    assert cache.nbytes == bytes_held


ROW_CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "reorder-to-equal-rows": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 1])), [1, 1, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select-one": (lambda cache: cache.batch_select_indices(torch.tensor([2])), [2]),
    "repeat-then-select": (
        lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([1, 2, 5]))),
        [0, 1, 2],
    ),
    "select-then-repeat": (
        lambda cache: (cache.batch_select_indices(torch.tensor([1])), cache.batch_repeat_interleave(3)),
        [1, 1, 1],
    ),
}


@pytest.mark.parametrize("rows", [[row[:8] for row in ROWS], ROWS], ids=["equal-rows", "padded-rows"])
@pytest.mark.parametrize("positions", ["absolute", "slot"])
@pytest.mark.parametrize("change", ROW_CHANGES)
@torch.no_grad()
def test_changes_of_rows_act_as_on_the_batch_that_was_read(change, positions, rows):
    model, (ids, mask) = patch(tiny_llama(), OPEN, positions=positions), pad_left(rows)
    change, chosen = ROW_CHANGES[change]
    cache = model(ids, attention_mask=mask).past_key_values
    change(cache)
    following = tiny_ids(len(chosen), 17, seed=5)
    expected = [
        read(model, torch.cat([rows[row], new])[None])[:, -17:] for row, new in zip(chosen, following, strict=True)
    ]
    got = torch.cat([read_on(model, part, cache).logits for part in following.split([3, 14], dim=1)], dim=1)
    torch.testing.assert_close(got, torch.cat(expected), **TOLERANCE)
    assert cache.batch_size == len(chosen)
    if len(set(chosen)) > 1:
        assert gap(got, torch.cat(expected[::-1])) > 1e-2


@torch.no_grad()
def test_a_copied_cache_goes_on_by_itself():
    model, (ids, mask) = patch(tiny_llama(), CONFIGS["open-slot"]), pad_left(ROWS)
    cache = model(ids, attention_mask=mask).past_key_values
    copied = copy.deepcopy(cache)
    expected = read_on(model, NEXT, cache).logits
    assert torch.equal(read_on(model, NEXT, copied).logits, expected)


@pytest.mark.parametrize("arguments", [(3,), (-1,), (0,)])
def test_cropping_is_refused(arguments):
    cache = patch(tiny_llama(), OPEN)(ROWS[0][None]).past_key_values
    for part in (cache, cache.layers[0]):
        with pytest.raises(ValueError, match="cannot be cropped.*unpatch_model"):
            part.crop(*arguments)


@pytest.mark.parametrize("trainable", ["", "q_proj", "layers.1.self_attn.k_proj", "layers.0.mlp", "lococo_head"])
@pytest.mark.parametrize("mass_bias", [True, False])
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_decoding_leaves_the_graph_of_the_prompt_alone(positions, mass_bias, trainable):
    model, prompt = patch(tiny_llama(), OPEN, positions=positions, mass_bias=mass_bias), ROWS[0][None]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)

    def gradients(decode):
        model.zero_grad()
        output = model(prompt, labels=prompt, use_cache=True)
        if decode:
            with torch.no_grad():
                answer = [read_on(model, token, output.past_key_values).logits for token in NEXT[:1].split(1, dim=1)]
            torch.testing.assert_close(torch.cat(answer, 1), expected, **TOLERANCE)
            output.past_key_values.reset()
        output.loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    with torch.no_grad():
        expected = read(model, torch.cat([prompt, NEXT[:1]], 1))[:, 31:]
    alone, decoded = gradients(decode=False), gradients(decode=True)
    assert alone and all(map(torch.equal, alone, decoded))


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("after", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["open", "reference"])
def test_a_cache_can_be_read_on_in_another_gradient_mode(name, before, after):
    model, ids = patch(tiny_llama(), CONFIGS[name]), torch.cat([ROWS[0][None], NEXT[:1]], 1)
    with torch.no_grad():
        expected = read(model, ids)
    with before():
        cache = model(ids[:, :31]).past_key_values
    for mode, part in ((after, slice(31, 40)), (before, slice(40, 48))):
        with mode():
            logits = read_on(model, ids[:, part], cache).logits
        torch.testing.assert_close(logits, expected[:, part], **TOLERANCE)
    with after():
        cache.reset()
        torch.testing.assert_close(read_on(model, ids, cache).logits, expected, **TOLERANCE)


WIDE = dict(num_hidden_layers=1, num_key_value_heads=4, head_dim=64)
MEGABYTES = 8


def resident_megabytes():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.no_grad()
def growth(model, num_tokens):
    """Megabytes by which the process grows at most, after the first tokens."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what other tests have freed would be taken first
    cache = stream(model, 2048)
    start = most = resident_megabytes()
    for _ in range(2048, num_tokens, 2048):
        cache = stream(model, 2048, cache)
        most = max(most, resident_megabytes())
    assert cache.get_seq_length() == num_tokens
    return most - start


@pytest.mark.slow
def test_the_process_does_not_grow_while_a_hundred_thousand_tokens_pass():
    model = patch(tiny_llama(**WIDE), OPEN, num_slots=64, block_size=128)
    assert growth(model, 49 * 2048) < MEGABYTES
    assert growth(lococo.unpatch_model(model), 8 * 2048) > MEGABYTES


@torch.no_grad()
@pytest.mark.parametrize("mask", [[True, True, True], [False, True, True], [True, False, False]])
def test_rows_can_be_named_by_a_mask(mask):
    model, (ids, padding) = patch(tiny_llama(), CONFIGS["open"]), pad_left(ROWS)
    caches = [model(ids, attention_mask=padding).past_key_values for _ in range(2)]
    caches[0].batch_select_indices(torch.tensor(mask))
    caches[1].batch_select_indices(torch.tensor(mask).nonzero()[:, 0])
    assert caches[0].rows == caches[1].rows and caches[0].batch_size == sum(mask)
    token = torch.ones(sum(mask), 1, dtype=torch.long)
    assert torch.equal(*(model(token, past_key_values=cache).logits for cache in caches))


@pytest.mark.parametrize("name", ["open", "open-slot", "slots-per-head"])
@pytest.mark.parametrize("then", ["read", "step", "reset", "reorder", "repeat"])
@pytest.mark.parametrize("length", [30, 32])  # at the end of a block of six tokens, and of one of eight
def test_what_comes_after_a_detach_leaves_the_graph_before_it_alone(name, length, then):
    model, ids = patch(tiny_llama(), CONFIGS[name]), tiny_ids(1, 40)

    def gradients(spoil):
        output = model(ids[:, :length], use_cache=True)
        loss, cache = output.logits.square().sum(), output.past_key_values
        if spoil:
            cache.detach()
            with torch.no_grad():
                if then in ("read", "step"):
                    model(ids[:, length : length + 1 if then == "step" else 40], past_key_values=cache)
                elif then == "reset":
                    cache.reset()
                elif then == "reorder":
                    cache.reorder_cache(torch.tensor([0]))
                else:
                    cache.batch_repeat_interleave(2)
        return torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]

    assert torch.equal(gradients(spoil=True), gradients(spoil=False))
