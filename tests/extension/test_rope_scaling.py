"""Stretched positions are those of the formulas, and nothing else of a model changes."""

import copy
import math

import pytest
import torch
from families import FAMILIES, build
from tiny import tiny_ids, tiny_llama

import lococo
from lococo.compat import RELEASE
from lococo.extension.rope_scaling import RopeScaling, scale_positions

IDS = tiny_ids(2, 48, seed=1)
HEAD_DIM, THETA = 8, 10000.0


def angles(model, positions):
    """(tokens, head_dim / 2) angles of a model's rotary embedding, cosines and sines each."""
    cos, sin = model.model.rotary_emb(torch.zeros((), dtype=torch.float64), positions[None])
    return cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]


def plain_frequencies():
    return torch.tensor([THETA ** (-2 * pair / HEAD_DIM) for pair in range(HEAD_DIM // 2)])


def assert_rotates_by(model, positions, frequencies, scaling=1.0):
    turned = positions[:, None] * frequencies
    for found, expected in zip(angles(model, positions), (turned.cos(), turned.sin()), strict=True):
        torch.testing.assert_close(found, (scaling * expected).double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("factor", [1, 1.5, 8])
def test_linear_divides_positions_by_the_factor(factor):
    model = scale_positions(tiny_llama(), RopeScaling(factor, 32))
    assert_rotates_by(model, torch.arange(0, 400, 7), plain_frequencies() / factor)
    assert model.config.max_position_embeddings == round(32 * factor)


def test_linear_on_linear_multiplies():
    model = scale_positions(scale_positions(tiny_llama(), RopeScaling(2, 32)), RopeScaling(3, 64))
    assert_rotates_by(model, torch.arange(100), plain_frequencies() / 6)
    assert model.config.max_position_embeddings == 192


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    factor, length = 4, 32
    model = scale_positions(tiny_llama(), RopeScaling(factor, length, "yarn"))

    def pair_that_turns(rotations):
        return HEAD_DIM * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), HEAD_DIM - 1)
    plain = plain_frequencies()
    slow = ((torch.arange(HEAD_DIM // 2) - low) / (high - low)).clamp(0, 1)
    expected = plain / factor * slow + plain * (1 - slow)
    assert expected[0] == plain[0]
    assert expected[-1] == plain[-1] / factor
    assert_rotates_by(model, torch.arange(100), expected, scaling=0.1 * math.log(factor) + 1)


def test_dynamic_grows_with_the_text():
    factor, length = 4, 32
    model = scale_positions(tiny_llama(), RopeScaling(factor, length, "dynamic"))
    assert_rotates_by(model, torch.arange(length), plain_frequencies())
    base = THETA * (factor * 100 / length - (factor - 1)) ** (HEAD_DIM / (HEAD_DIM - 2))
    grown = torch.tensor([base ** (-2 * pair / HEAD_DIM) for pair in range(HEAD_DIM // 2)])
    assert_rotates_by(model, torch.arange(100), grown)


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["linear", "yarn", "dynamic"])
def test_a_stretched_model_is_the_one_its_config_makes(rope_type, tmp_path):
    model = scale_positions(tiny_llama(), RopeScaling(4, 16, rope_type))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


@torch.no_grad()
def test_factor_one_changes_nothing():
    torch.testing.assert_close(
        scale_positions(tiny_llama(), RopeScaling(1, 2048))(IDS).logits, tiny_llama()(IDS).logits
    )


@torch.no_grad()
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_slots_for_the_whole_text_equal_the_stretched_full_model(positions):
    model = scale_positions(tiny_llama(), RopeScaling(4, 16, "yarn"))
    expected = model(IDS).logits
    with lococo.patched(model, lococo.LoCoCoConfig(48, block_size=16, positions=positions)):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-5)


GEMMA3 = [name for name in FAMILIES if name.startswith("Gemma3")]
# Their configs know the rope types that they were made with, OLMo 2's before Transformers 5 the old names of them.
OTHERS = ["Phi3", "Phi3-partial", *([] if RELEASE >= (5, 0) else ["Olmo2"])]


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in GEMMA3 + OTHERS])
def test_families_rotate_by_interpolated_positions(family):
    model = build(family)
    ids = torch.arange(1, 41)[None]
    stretched = scale_positions(copy.deepcopy(model), RopeScaling(2, 64))
    plain = [model.model.rotary_emb(torch.zeros(()), torch.arange(0, 20)[None])]
    longer = [stretched.model.rotary_emb(torch.zeros(()), torch.arange(0, 40, 2)[None])]
    torch.testing.assert_close(longer, plain)
    assert not torch.equal(stretched(ids).logits, model(ids).logits)


def test_what_cannot_be_stretched_is_refused_before_anything_changes():
    with pytest.raises(ValueError, match="factor must be at least 1.*got 0.5"):
        RopeScaling(0.5, 2048)
    with pytest.raises(ValueError, match="original_length.*got 0"):
        RopeScaling(2, 0)
    with pytest.raises(ValueError, match="rope_type must be one of linear, yarn, dynamic, got 'ntk'"):
        RopeScaling(2, 2048, "ntk")
    model = scale_positions(tiny_llama(), RopeScaling(2, 32, "yarn"))
    before, rotary = model.config.to_dict(), model.model.rotary_emb
    with pytest.raises(ValueError, match="LlamaForCausalLM.*'linear'.*already stretched with 'yarn'"):
        scale_positions(model, RopeScaling(2, 32))
    assert model.config.to_dict() == before
    assert model.model.rotary_emb is rotary


@pytest.mark.parametrize("family", GEMMA3 + OTHERS)
def test_families_whose_positions_are_of_another_kind_are_refused(family):
    model = build(family)
    before, config = model(IDS).logits, model.config.to_dict()
    reason = "its layers do not share one rotary embedding" if family in GEMMA3 else "its config does not take it"
    with pytest.raises(ValueError, match=f"cannot be extended.*{reason}"):
        scale_positions(model, RopeScaling(2, 64))
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == config
