"""Tokens that come one by one: the same as any other way to read them, in buffers that are never made anew."""

import copy
import gc

import pytest
import torch
from configs import ANY_SPLIT, CONFIGS, FEW
from tiny import SIZES, patched_llama, tiny_ids
from transformers import MistralConfig, MistralForCausalLM

import lococo
from lococo.cache.layer import LayerCache
from lococo.config import LoCoCoConfig

PREFIX, STEPS = 27, 40
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def step(model, ids, cache, **arguments):
    return model(ids, past_key_values=cache, use_cache=True, **arguments)


def read_one_by_one(model, ids, prefix=PREFIX, mask=None):
    """(logits of the tokens after the prefix, cache)."""
    output = model(ids[:, :prefix], attention_mask=None if mask is None else mask[:, :prefix], use_cache=True)
    cache, logits = output.past_key_values, []
    for column in range(prefix, ids.shape[1]):
        part = None if mask is None else mask[:, : column + 1]
        logits.append(step(model, ids[:, column : column + 1], cache, attention_mask=part).logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize(("name", "batch"), [*((name, 3) for name in ANY_SPLIT), *((name, 1) for name in FEW)])
def test_steps_equal_reading_at_once(name, batch):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(batch, PREFIX + STEPS)
    logits, _ = read_one_by_one(model, ids)
    torch.testing.assert_close(logits, model(ids).logits[:, PREFIX:], **TOLERANCE)


@pytest.mark.parametrize("name", ANY_SPLIT)
def test_steps_of_padded_rows_equal_each_row_alone(name):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(3, PREFIX + STEPS)
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[2, :3] = 0
    logits, _ = read_one_by_one(model, ids, mask=mask)
    for row, padding in enumerate((11, 0, 3)):
        alone = model(ids[row : row + 1, padding:]).logits[0, PREFIX - padding :]
        torch.testing.assert_close(logits[row], alone, **TOLERANCE)


@pytest.mark.parametrize("name", FEW)
def test_steps_from_an_empty_cache_and_between_longer_calls(name):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(2, 70)
    cache, logits = None, []
    for part in ids.split([1, 1, 5, 1, 1, 1, 17, 1, 2, 1, 9, 1, 1, 1, 27], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("window", [5, 20])
@pytest.mark.parametrize("name", ["open", "h2o", "streaming"])
def test_steps_of_sliding_window_layers(name, window):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()
    lococo.patch_model(model, CONFIGS[name])
    ids = tiny_ids(2, PREFIX + STEPS)
    logits, _ = read_one_by_one(model, ids, prefix=3)
    torch.testing.assert_close(logits, model(ids).logits[:, 3:], **TOLERANCE)


@pytest.mark.parametrize("name", ["open", "slots-per-head"])
def test_steps_in_half_precision_are_close_to_float32(name):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(2, PREFIX + STEPS)
    exact, _ = read_one_by_one(model, ids)
    half, _ = read_one_by_one(model.to(torch.bfloat16), ids)
    # Heavy hitters that lie close may swap places; on average the logits must not move.
    assert (half.float() - exact).abs().mean() < 0.03 * exact.abs().mean() + 0.03


@pytest.mark.parametrize("name", ["open", "open-slot", "slots-per-head"])
def test_rows_can_change_between_steps(name):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(3, PREFIX + 21)
    _, cache = read_one_by_one(model, ids[:, : PREFIX + 10])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    ids = torch.cat([ids[[2, 0, 0], : PREFIX + 10], ids[:, PREFIX + 10 :]], dim=1)
    logits = [step(model, ids[:, [column]], cache).logits for column in range(PREFIX + 10, PREFIX + 15)]
    cache.batch_select_indices(torch.tensor([1]))
    logits = torch.cat([part[1:2] for part in logits], dim=1)
    logits = torch.cat(
        [logits, *(step(model, ids[1:2, [c]], cache).logits for c in range(PREFIX + 15, ids.shape[1]))], 1
    )
    torch.testing.assert_close(logits, model(ids[1:2]).logits[:, PREFIX + 10 :], **TOLERANCE)


@pytest.mark.parametrize("name", ["open", "slots-per-head"])
def test_a_copied_cache_goes_its_own_way(name):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(1, PREFIX + STEPS)
    _, cache = read_one_by_one(model, ids[:, : PREFIX + 5])
    twin = copy.deepcopy(cache)
    for column in range(20):
        step(model, torch.tensor([[column + 1]]), twin)
    rest = [step(model, ids[:, [column]], cache).logits for column in range(PREFIX + 5, ids.shape[1])]
    torch.testing.assert_close(torch.cat(rest, dim=1), model(ids).logits[:, PREFIX + 5 :], **TOLERANCE)


@pytest.mark.parametrize("name", ["open", "open-slot", "slots-per-head"])
def test_steps_go_on_after_gradients_and_inference_mode(name):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(1, PREFIX + 12)
    expected = model(ids).logits[:, PREFIX:]
    with torch.enable_grad():
        output = model(ids[:, :PREFIX], use_cache=True)
        loss = output.logits.sum()
    cache = output.past_key_values
    logits = [step(model, ids[:, [column]], cache).logits for column in range(PREFIX, PREFIX + 4)]
    loss.backward()  # steps have not written to what the graph needs
    with torch.inference_mode():
        logits += [step(model, ids[:, [column]], cache).logits.clone() for column in range(PREFIX + 4, PREFIX + 8)]
    logits += [step(model, ids[:, [column]], cache).logits for column in range(PREFIX + 8, PREFIX + 12)]
    torch.testing.assert_close(torch.cat([part.clone() for part in logits], dim=1), expected, **TOLERANCE)


def addresses(cache):
    return [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers()]


@pytest.mark.parametrize("name", CONFIGS)
def test_buffers_stay_where_they_are_for_many_blocks(name):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(2, PREFIX + STEPS)
    cache = model(ids[:, :PREFIX], use_cache=True).past_key_values
    size = cache.nbytes
    step(model, ids[:, [PREFIX]], cache)
    before = addresses(cache)
    for column in range(PREFIX + 1, PREFIX + STEPS):
        step(model, ids[:, [column]], cache)
    assert addresses(cache) == before
    assert cache.nbytes == size


def test_no_tensor_stays_behind():
    token, readers = tiny_ids(1, 1), []
    for name in ("open", "open-slot", "slots-per-head"):
        model = patched_llama(CONFIGS[name])
        readers.append((model, model(tiny_ids(1, PREFIX), use_cache=True).past_key_values))

    def alive(steps):
        for model, cache in readers:
            for _ in range(steps):
                step(model, token, cache)
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    assert alive(24) == alive(24) == alive(48)


def test_views_of_groups_lie_one_behind_the_other_in_one_buffer():
    config = LoCoCoConfig(12, block_size=4, slots_per_head=((8, 20, 5, 8),))
    layer = LayerCache(config, 0)
    layer.make_buffers(torch.randn(3, 8, 1, 6), *torch.randn(2, 3, 4, 1, 6))
    assert layer.entries.keys.shape == (3, 2 * 12 + 24 + 9, 6)
    assert [view.group.heads for view in layer.views()] == [(0, 3), (1,), (2,)]
    layer.views()[1].keys.fill_(7.0)
    assert (layer.entries.keys == 7.0).all(dim=-1).sum() == 3 * 24
    assert (layer.decode.entries.keys == 7.0).all(dim=-1).sum() == 3 * 24


@pytest.mark.parametrize("num_slots", [100, 20_000])
def test_where_scores_begin_to_count_fits_into_its_type(num_slots):
    layer = LayerCache(LoCoCoConfig(num_slots, block_size=100), 0)
    layer.make_buffers(torch.randn(1, 4, 1, 2), *torch.randn(2, 1, 2, 1, 2))
    held = layer.decode._scored_until
    assert torch.iinfo(held.dtype).max >= 2 * held.shape[1] + layer.config.score_delay > 2**7
    assert held.dtype == (torch.int16 if num_slots == 100 else torch.int32)
