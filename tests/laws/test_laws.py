"""Laws of a patched model: what must not change its output."""

import dataclasses
import functools

import pytest
import torch
from configs import ANY_SPLIT, CONFIGS, FORESEEN, LEARNED
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig

TOLERANCE = dict(rtol=0, atol=1e-5)
LENGTH = 61
LEARNED_PRESET = functools.partial(LoCoCoConfig, score=FORESEEN)
PRESETS = [LoCoCoConfig, LEARNED_PRESET, LoCoCoConfig.paper, LoCoCoConfig.h2o, LoCoCoConfig.streaming_llm]
BATCH = 4


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def read(model, ids, config, **kwargs):
    torch.manual_seed(0)  # the heads' initial weights
    with lococo.patched(model, config), torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_compression_changes_something(model, name):
    """Without this, every law below would hold of a patch that does nothing."""
    ids = tiny_ids(BATCH, LENGTH)
    with torch.no_grad():
        full = model(ids).logits
    assert (read(model, ids, CONFIGS[name]) - full).abs().max() > 1e-2


@pytest.mark.parametrize("name", LEARNED)
def test_features_choose_otherwise(model, name):
    """Without this, the laws would hold of features that are zero, lost or never looked at."""
    ids, config = tiny_ids(BATCH, LENGTH), CONFIGS[name]
    learned, distant = (read(model, ids, dataclasses.replace(config, score=score)) for score in (FORESEEN, "distant"))
    assert (learned - distant)[:, config.capacity :].abs().max() > 1e-1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("positions", ["absolute", "slot"])
@pytest.mark.parametrize("block_size", [1, 8, 100])
def test_enough_slots_give_the_full_model(model, preset, positions, block_size):
    ids = tiny_ids(2, LENGTH)
    with torch.no_grad():
        full = model(ids).logits
    for num_slots in (LENGTH, LENGTH + 20):
        compressed = read(model, ids, preset(num_slots, block_size=block_size, positions=positions))
        torch.testing.assert_close(compressed, full, **TOLERANCE)


@pytest.mark.parametrize("name", ANY_SPLIT)
@given(cuts=st.lists(st.integers(1, LENGTH - 1), unique=True, max_size=8).map(sorted))
@settings(max_examples=5)
def test_any_split_of_the_input_gives_the_same_logits(model, name, cuts):
    ids = tiny_ids(2, LENGTH)
    expected = read(model, ids, CONFIGS[name])
    torch.manual_seed(0)
    with lococo.patched(model, CONFIGS[name]), torch.no_grad():
        cache, parts = None, []
        for part in torch.tensor_split(ids, cuts, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ANY_SPLIT)
@given(padding=st.lists(st.integers(0, 30), min_size=BATCH, max_size=BATCH), cut=st.integers(1, LENGTH - 1))
@settings(max_examples=3)
def test_left_padding_changes_nothing_in_prefill_and_decode(model, name, padding, cut):
    rows = [tiny_ids(1, LENGTH - amount, seed=row) for row, amount in enumerate(padding)]
    ids, mask = torch.zeros(BATCH, LENGTH, dtype=torch.long), torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row, (amount, tokens) in enumerate(zip(padding, rows, strict=True)):
        ids[row, amount:], mask[row, amount:] = tokens, 1
    alone = [read(model, tokens, CONFIGS[name]) for tokens in rows]
    torch.manual_seed(0)
    with lococo.patched(model, CONFIGS[name]), torch.no_grad():
        output = model(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
        together = [output.logits]
        for stop in range(cut + 1, LENGTH + 1):
            output = model(
                ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past_key_values=output.past_key_values
            )
            together.append(output.logits)
    together = torch.cat(together, dim=1)
    for row, amount in enumerate(padding):
        torch.testing.assert_close(together[row, amount:], alone[row][0], **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_right_padding_changes_nothing_before_it(model, name):
    ids, mask = tiny_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 40:] = 0
    padded = read(model, ids, CONFIGS[name], attention_mask=mask)
    torch.testing.assert_close(padded[1:, :40], read(model, ids[1:, :40], CONFIGS[name]), **TOLERANCE)
    torch.testing.assert_close(padded[:1], read(model, ids[:1], CONFIGS[name]), **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_future_changes_nothing(model, name):
    ids = tiny_ids(1, LENGTH)
    changed = ids.clone()
    changed[0, 50:] = changed[0, 50:] % 63 + 1
    first, second = (read(model, tokens, CONFIGS[name])[:, :50] for tokens in (ids, changed))
    torch.testing.assert_close(first, second, **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_and_without_gradients_agree(model, name):
    ids = tiny_ids(2, LENGTH)
    expected = read(model, ids, CONFIGS[name])
    torch.manual_seed(0)
    with lococo.patched(model, CONFIGS[name]):
        torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernel_changes_nothing(model, name):
    ids = tiny_ids(2, LENGTH)
    torch.manual_seed(0)
    with lococo.patched(model, CONFIGS[name], attention="eager"), torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, read(model, ids, CONFIGS[name]), **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_default_dtype_changes_nothing(model, name):
    """Scripts set it while they load a model in half precision."""
    ids = tiny_ids(2, LENGTH)
    torch.manual_seed(0)
    with lococo.patched(model, CONFIGS[name]), torch.no_grad():
        expected = model(ids).logits
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(model(ids).logits, expected)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(read(model, ids, CONFIGS[name]), expected)
    finally:
        torch.set_default_dtype(torch.float32)
