"""Models whose slots are codes: laws in float64, where no rounding of what is coded decides between two codes."""

import copy
import dataclasses

import pytest
import torch
from configs import CODED as CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_llama import naive_gradients, naive_logits
from recorded import assert_recorded_as_launched
from tiny import patched_llama, tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig

LENGTH, BATCH = 61, 3
EXACT = dict(rtol=0, atol=1e-10)


every_config = pytest.mark.parametrize("name", CONFIGS)


def model_of(name, **changes):
    return patched_llama(dataclasses.replace(CONFIGS[name], **changes)).double()


@torch.no_grad()
def read(model, ids, cuts=(), mask=None):
    cache, parts, start = None, [], 0
    for stop in (*cuts, ids.shape[1]):
        seen = {} if mask is None else {"attention_mask": mask[:, :stop]}
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **seen)
        cache, start = output.past_key_values, stop
        parts.append(output.logits)
    return torch.cat(parts, dim=1), cache


@every_config
def test_codes_change_something_and_not_much(name):
    ids = tiny_ids(BATCH, LENGTH)
    coded, exact = (read(model_of(name, **changes), ids)[0] for changes in ({}, {"slot_bits": 16}))
    assert 1e-4 < (coded - exact)[:, :16].abs().max() < (1 if 4 in CONFIGS[name].bits else 0.1)


@every_config
def test_what_is_held_are_codes_in_fewer_bytes(name):
    ids = tiny_ids(BATCH, LENGTH)
    _, cache = read(model_of(name), ids, cuts=(21, 22, 23))
    _, exact = read(model_of(name, slot_bits=16), ids, cuts=(21, 22, 23))
    bits = CONFIGS[name].bits
    for layer in cache.layers:
        held = layer.entries
        assert [held.keys.dtype == torch.uint8, held.values.dtype == torch.uint8] == [each != 16 for each in bits]
        assert (held.keys_range is None, held.values_range is None) == tuple(each == 16 for each in bits)
        assert held.keys_range is None or held.keys_range.dtype == torch.float16
        assert layer.head_dim == 8 and layer.dtype == torch.float64
        assert layer._decoded is None, "numbers are kept beside the codes"
    assert cache.nbytes < exact.nbytes
    assert cache.layers[0].bytes_per_token == exact.layers[0].bytes_per_token


@every_config
@given(cuts=st.lists(st.integers(1, LENGTH - 1), unique=True, max_size=8).map(sorted))
@settings(max_examples=5)
def test_any_split_gives_the_same(name, cuts):
    ids, model = tiny_ids(BATCH, LENGTH), model_of(name)
    (expected, held), (logits, other) = read(model, ids), read(model, ids, cuts)
    torch.testing.assert_close(logits, expected, **EXACT)
    for one, two in zip(held.layers, other.layers, strict=True):
        if two.finished_columns is None:  # codes, bit for bit
            pairs = zip(one.entries.tensors(), two.entries.tensors(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs if pair[0] is not None and pair[0].dtype == torch.uint8)


@every_config
def test_tokens_one_by_one_are_those_at_once(name):
    ids, model = tiny_ids(BATCH, LENGTH), model_of(name)
    torch.testing.assert_close(read(model, ids, range(1, LENGTH))[0], read(model, ids)[0], **EXACT)


@every_config
@given(padding=st.lists(st.integers(0, 30), min_size=BATCH, max_size=BATCH), cut=st.integers(1, LENGTH - 1))
@settings(max_examples=3)
def test_padding_changes_nothing(name, padding, cut):
    model = model_of(name)
    rows = [tiny_ids(1, LENGTH - amount, seed=row) for row, amount in enumerate(padding)]
    ids, mask = torch.zeros(BATCH, LENGTH, dtype=torch.long), torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row, (amount, tokens) in enumerate(zip(padding, rows, strict=True)):
        ids[row, amount:], mask[row, amount:] = tokens, 1
    together, _ = read(model, ids, range(cut, LENGTH), mask)
    for row, amount in enumerate(padding):
        torch.testing.assert_close(together[row, amount:], read(model, rows[row])[0][0], **EXACT)


@every_config
def test_with_and_without_gradients_agree(name):
    ids, model = tiny_ids(BATCH, LENGTH), model_of(name)
    logits, cache = read(model, ids, (33,))
    output = model(ids[:, :33], use_cache=True)
    parts = [output.logits, (output := model(ids[:, 33:], past_key_values=output.past_key_values)).logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, **EXACT)
    # What a graph held are codes again when the next call needs none.
    after = tiny_ids(BATCH, 9, seed=4)
    caches = (cache, output.past_key_values)
    with torch.no_grad():
        one, two = (model(after, past_key_values=each, use_cache=True).logits for each in caches)
    torch.testing.assert_close(one, two, **EXACT)
    assert all(layer.is_coded for each in caches for layer in each.layers)


@every_config
def test_logits_and_gradients_equal_the_naive_reference(name):
    model, ids = model_of(name), tiny_ids(1, 45)
    torch.testing.assert_close(read(model, ids)[0], naive_logits(model, ids).detach(), rtol=0, atol=1e-8)
    expected = naive_gradients(model, ids)
    model(ids, labels=ids).loss.backward()
    found = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@every_config
def test_a_recorded_step_is_a_launched_one(name):
    assert_recorded_as_launched(model_of(name))


@every_config
@torch.no_grad()
def test_beams_saved_and_copied_caches_go_on_alike(name, tmp_path):
    model, ids = model_of(name), tiny_ids(BATCH, LENGTH)
    options = dict(num_beams=3, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    _, cache = read(model, ids, (40, 41, 42))
    loaded = lococo.LoCoCoCache.load(cache.save(tmp_path / "cache"))
    assert (tmp_path / "cache").stat().st_size < 2 * cache.nbytes + 20000
    after = tiny_ids(BATCH, 20, seed=7)
    logits = [model(after, past_key_values=each).logits for each in (copy.deepcopy(cache), loaded, cache)]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])


def test_a_model_is_as_it_was_after_unpatching():
    model, ids = model_of("8"), tiny_ids(1, LENGTH)
    read(model, ids)
    lococo.unpatch_model(model)
    assert torch.equal(read(model, ids)[0], read(tiny_llama().double(), ids)[0])


def test_heads_trained_in_the_models_type_read_codes(tmp_path):
    ids = tiny_ids(1, LENGTH)
    heads = lococo.save_heads(model_of("centroids", slot_bits=16), tmp_path / "heads")
    config = dataclasses.replace(LoCoCoConfig.from_pretrained(heads), slot_bits=8)
    model = lococo.patch_model(tiny_llama(), config, heads=heads).double()
    assert torch.equal(read(model, ids)[0], read(model_of("centroids"), ids)[0])


def test_caches_of_other_bits_are_refused():
    ids = tiny_ids(1, LENGTH)
    _, cache = read(model_of("8"), ids)
    with pytest.raises(ValueError, match="filled with slot_bits=8, the model is patched with slot_bits=16"):
        read(model_of("8", slot_bits=16), ids)[0], model_of("8", slot_bits=16)(ids, past_key_values=cache)
