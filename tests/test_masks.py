"""Masks that a model makes or is given: causal ones with padding and windows, and those that are refused."""

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from transformers import masking_utils as masks

import lococo
from lococo import LoCoCoConfig
from lococo.masks import PaddingMask, padding_mask, window_of

LENGTH = 12
CALL = dict(batch_size=2, q_length=LENGTH, kv_length=LENGTH, q_offset=0, kv_offset=0)
IDS = tiny_ids(2, LENGTH)
BLOCKS = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1], [-1] * LENGTH])


def blockwise(blocks):
    def block(batch, head, query, entry):
        return (blocks[batch, query] == blocks[batch, entry]) & (blocks[batch, query] >= 0)

    return block


def prefix(length):
    return lambda batch, head, query, entry: entry < length


def chunks(size):
    return lambda batch, head, query, entry: query // size == entry // size


KNOWN = {
    "causal": (masks.causal_mask_function, None),
    "window": (masks.sliding_window_causal_mask_function(4), 4),
    "padded": (masks.and_masks(masks.causal_mask_function, masks.padding_mask_function(BLOCKS > -2)), None),
    "packed": (masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function(BLOCKS)), None),
    "narrower-of-two": (
        masks.and_masks(masks.sliding_window_causal_mask_function(7), masks.sliding_window_overlay(3)),
        3,
    ),
}
EMPTY = {  # of kinds that are refused, but nothing of the kind is in this input
    "no-image": (masks.or_masks(masks.causal_mask_function, blockwise(torch.full_like(BLOCKS, -1))), None),
    "no-image-in-a-window": (
        masks.and_masks(
            masks.or_masks(masks.causal_mask_function, blockwise(torch.full_like(BLOCKS, -1))),
            masks.sliding_window_overlay(5),
        ),
        5,
    ),
    "one-token-of-prefix": (masks.or_masks(masks.causal_mask_function, prefix(1)), None),
    "one-chunk": (masks.and_masks(masks.causal_mask_function, chunks(LENGTH)), None),
}
REFUSED = {
    "image": masks.or_masks(masks.causal_mask_function, blockwise(BLOCKS)),
    "image-of-the-second-row": masks.or_masks(masks.causal_mask_function, blockwise(BLOCKS.flip(0))),
    "prefix": masks.or_masks(masks.causal_mask_function, prefix(3)),
    "chunks": masks.and_masks(masks.causal_mask_function, chunks(5)),
    "everything": lambda batch, head, query, entry: (query >= 0) & (entry >= 0),
    "one-number-at-a-time": lambda batch, head, query, entry: bool(entry <= query) and bool(query < 3),
    "not-itself": lambda batch, head, query, entry: entry < query,
    "every-second-token": masks.and_masks(
        masks.causal_mask_function, lambda b, h, query, entry: (entry % 2 == query % 2) | (query - entry < 2)
    ),
    "wider-window": masks.and_masks(masks.causal_mask_function, lambda b, h, query, entry: entry > query - 4),
}


@pytest.mark.parametrize("name", [*KNOWN, *EMPTY])
def test_causal_masks_are_taken_with_their_windows(name):
    function, window = {**KNOWN, **EMPTY}[name]
    given = torch.ones(2, LENGTH)
    for call in (CALL, {**CALL, "q_length": 1, "q_offset": LENGTH - 1}):
        made = padding_mask(attention_mask=given, mask_function=function, **call)
        assert made.tokens is given and made.window == window


def test_masks_of_older_releases_count_positions_in_a_tensor():
    positions = dict(batch_size=2, cache_position=torch.arange(4, LENGTH), kv_length=LENGTH, kv_offset=0)
    assert padding_mask(mask_function=EMPTY["no-image"][0], **positions).window is None
    with pytest.raises(ValueError, match="the model masks its attention by"):
        padding_mask(mask_function=REFUSED["image"], **positions)


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused_by_name(name):
    with pytest.raises(ValueError, match="the model masks its attention by .*: a patched model reads causally"):
        padding_mask(mask_function=REFUSED[name], **CALL)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("given", ["decoder", "model"])
def test_matrices_are_refused_by_shape_and_leave_the_cache_alone(given, with_gradients):
    model = lococo.patch_model(tiny_llama(), LoCoCoConfig(16, block_size=8))
    with torch.no_grad():
        expected = model(IDS).logits
        cache = model(IDS[:, :5], use_cache=True).past_key_values
    matrix = torch.ones(2, 1, 7, LENGTH, dtype=torch.bool).tril(5)
    part = model.model if given == "decoder" else model
    for mask in (matrix, {"full_attention": matrix}, {"full_attention": None, "sliding_attention": matrix}):
        with (
            torch.set_grad_enabled(with_gradients),
            pytest.raises(ValueError, match=r"2-D .* got shape \(2, 1, 7, 12\)"),
        ):
            part(IDS[:, 5:], attention_mask=mask, past_key_values=cache)
    with torch.no_grad():
        rest = model(IDS[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 5:], rtol=0, atol=1e-5)


def test_a_layer_that_is_given_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"Attention was given a mask of shape \(1, 1, 4, 4\)"):
        window_of(torch.ones(1, 1, 4, 4), None, "Attention")
    assert window_of(None, 5, "Attention") == window_of(torch.ones(1, 4), 5, "Attention") == 5
    assert window_of(PaddingMask(None, 3), 5, "Attention") == 3
    assert window_of(PaddingMask(None, None), 5, "Attention") is None


def test_a_model_with_a_mask_of_its_own_kind(monkeypatch):
    """A prefix that sees itself both ways, as in the decoders of some models for images."""
    import transformers.models.llama.modeling_llama as llama

    model = lococo.patch_model(tiny_llama(), LoCoCoConfig(16, block_size=8))
    made = llama.create_causal_mask
    monkeypatch.setattr(llama, "create_causal_mask", lambda **call: made(**call, or_mask_function=prefix(3)))
    with pytest.raises(ValueError, match="prefix"):
        model(IDS)
    with pytest.raises(ValueError, match="prefix"):
        model.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("tokens", [1, 4])
def test_what_was_read_cannot_be_masked_later(tokens):
    model = lococo.patch_model(tiny_llama(), LoCoCoConfig(16, block_size=8))
    padded = torch.ones(2, LENGTH, dtype=torch.long)
    padded[0, :3] = 0
    with torch.no_grad():
        for read, later, row in ((torch.ones_like(padded), padded, 0), (padded, torch.ones_like(padded), 0)):
            cache = model(IDS[:, :8], attention_mask=read[:, :8], use_cache=True).past_key_values
            part = IDS[:, 8 : 8 + tokens]
            with pytest.raises(ValueError, match=rf"among the 8 columns already read of row {row}, \d were read"):
                model(part, attention_mask=later[:, : 8 + tokens], past_key_values=cache)
            expected = model(IDS[:, : 8 + tokens], attention_mask=read[:, : 8 + tokens]).logits[:, 8:]
            got = model(part, attention_mask=read[:, : 8 + tokens], past_key_values=cache).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
