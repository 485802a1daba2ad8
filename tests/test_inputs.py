"""Arguments that do not fit the tokens of a call are refused by name, before anything of it is read."""

import warnings

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from transformers import DynamicCache

import lococo
from lococo import LoCoCoConfig
from lococo.extension.adapters import checkpoint_layers
from lococo.state import patch_of

READ, LENGTH = 12, 61
IDS = tiny_ids(2, READ + LENGTH)
# One after another, or in chunks: 7 and 8 tokens, more than the text, or what memory and block size make of it.
every_chunk = pytest.mark.parametrize("chunk", [7, 8, 128, None])
every_position = pytest.mark.parametrize("positions", ["absolute", "slot"])


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def patch(chunk=None, positions="absolute"):
    torch.manual_seed(0)
    config = LoCoCoConfig(16, block_size=8, gate_init=0.5, positions=positions)
    return lococo.patch_model(tiny_llama(), config, prefill_chunk_size=chunk)


def marks(rows, width, value=1, column=-1):
    mask = torch.ones(rows, width)
    mask[:, column] = value
    return mask


WRONG = {
    "as wide as a chunk": ({"attention_mask": marks(2, 8)}, "attention_mask has shape (2, 8), expected (2, "),
    "of another width": ({"attention_mask": marks(2, 60)}, "attention_mask has shape (2, 60), expected (2, "),
    "too wide": ({"attention_mask": marks(2, 99)}, "attention_mask has shape (2, 99), expected (2, "),
    "of other rows": ({"attention_mask": marks(3, 61)}, "attention_mask has shape (3, 61), expected (2, "),
    "a late mark": ({"attention_mask": marks(2, 61, 2)}, "must be 1 for tokens and 0 for padding, got 2.0"),
    "added to logits": ({"attention_mask": marks(2, 61, -1e9, 40)}, "must be 1 for tokens and 0 for padding, got -1"),
    "positions": ({"position_ids": torch.arange(60)[None]}, "position_ids has shape (1, 60), expected (2, 61)"),
    "positions of a chunk": (
        {"position_ids": torch.arange(8)[None]},
        "position_ids has shape (1, 8), expected (2, 61",
    ),
    "positions of rows": (
        {"position_ids": torch.arange(61).expand(3, -1)},
        "position_ids has shape (3, 61), expected (2, 61): one for every token of this call",
    ),
    "a list of positions": ({"position_ids": [1, 2]}, "position_ids must be a 2-D tensor (batch, tokens), got a list"),
    "places": ({"cache_position": torch.arange(60)}, "cache_position has shape (60,), expected (61,)"),
}


@every_position
@every_chunk
@pytest.mark.parametrize("read", [0, READ])
@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_read(name, read, chunk, positions):
    arguments, message = WRONG[name]
    model = patch(chunk, positions)
    expected = model(IDS).logits
    cache = model(IDS[:, :read], use_cache=True).past_key_values if read else None
    rest = {"input_ids": IDS[:, read : read + LENGTH], "past_key_values": cache}
    with pytest.raises(ValueError) as raised:
        model(**rest, **arguments)
    assert message in str(raised.value)
    assert cache is None or (cache.seen_tokens == read and not cache.is_reading)
    logits = model(**rest).logits
    torch.testing.assert_close(logits, expected[:, read : read + LENGTH], rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [8, 16, 56])
def test_a_mask_of_one_chunk_is_not_taken_for_every_chunk(width):
    model = patch(8)
    with pytest.raises(ValueError, match=rf"attention_mask has shape \(2, {width}\), expected \(2, 64\)"):
        model(IDS[:, :64], attention_mask=marks(2, width, 0, slice(5)))


@every_chunk
def test_a_wide_and_a_narrow_mask_are_of_one_meaning(chunk):
    """After padding, too: a mask that leaves out what was read says nothing of it."""
    mask = torch.ones(2, IDS.shape[1], dtype=torch.long)
    mask[0, :3] = 0
    model = patch(chunk)
    logits = []
    for first in (0, READ):
        cache = model(IDS[:, :READ], attention_mask=mask[:, :READ], use_cache=True).past_key_values
        logits.append(model(IDS[:, READ:], attention_mask=mask[:, first:], past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)


@every_chunk
def test_zeros_hide_the_tokens_they_stand_for_and_no_others(chunk):
    """Not those at their places in later chunks."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[:, :8] = 0
    model, ids = patch(chunk), IDS[:, :LENGTH]
    expected = model(ids[:, 8:]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 8:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (2, 3)])
def test_positions_of_a_step_are_one_for_each_row(shape):
    model = patch()
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"position_ids has shape .*, expected \(2, 1\)"):
        model(IDS[:, :1], position_ids=torch.zeros(shape, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, None])
def test_in_training_mode_a_model_hands_its_cache_out_and_learns_through_it(use_cache):
    models = [patch().train(), patch()]
    with torch.enable_grad():
        outputs = [model(IDS[:, :50], use_cache=use_cache) for model in models]
        cache = outputs[0].past_key_values
        following = models[0](IDS[:, 50:], past_key_values=cache).logits
        torch.testing.assert_close(following, models[1](IDS).logits[:, 50:], atol=1e-5, rtol=0)
        assert cache.seen_tokens == IDS.shape[1] and torch.equal(outputs[0].logits, outputs[1].logits)
        models[0].zero_grad()
        following.square().sum().backward()
    assert all(head.gate.grad.abs().sum() > 0 for head in patch_of(models[0]).heads.values())


@pytest.mark.parametrize("options", [{"use_cache": True}, {"past_key_values": None}])
def test_with_gradient_checkpointing_nothing_is_cached_which_is_said(options):
    model = patch().train()
    checkpoint_layers(model)
    options = {"past_key_values": patch_of(model).new_cache()} if "past_key_values" in options else options
    with torch.enable_grad(), pytest.warns(UserWarning, match="gradient checkpointing runs layers twice: nothing is"):
        output = model(IDS, **options)
    assert output.past_key_values is None


def test_with_gradient_checkpointing_nothing_is_said_that_was_not_asked():
    model = patch().train()
    checkpoint_layers(model)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(IDS).past_key_values is None


@torch.no_grad()
def test_a_cache_that_is_given_is_read_into_whatever_use_cache_says():
    model = patch()
    cache = model(IDS[:, :50], use_cache=True).past_key_values
    logits = model(IDS[:, 50:], past_key_values=cache, use_cache=False).logits
    torch.testing.assert_close(logits, model(IDS).logits[:, 50:], atol=1e-5, rtol=0)
    assert cache.seen_tokens == IDS.shape[1]
    other = DynamicCache()
    with pytest.warns(UserWarning, match="the empty DynamicCache given as"):
        model(IDS, past_key_values=other, use_cache=False)
    assert other.get_seq_length() == 0
