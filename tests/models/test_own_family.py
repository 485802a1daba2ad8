"""A family with attention code of its own is one class: nothing else in the library knows of it."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from families import LARGE, LENGTH, SMALL, SPLITS, anatomy, assert_close, gap, pad_left, patch, read
from tiny import tiny_ids, tiny_llama
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import lococo
from lococo.models import Family, TransformersFamily, family, find_family, register_family
from lococo.patch import suspended
from lococo.state import patch_of
from lococo.training.record import record

HEADS, HEAD_DIM, LAYERS = 4, 8, 2
SIZE = HEADS * HEAD_DIM


def turn(states, angles):
    """(batch, tokens, heads, head_dim), every pair of neighbours turned by angles (1 or batch, tokens, pairs)."""
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    even, odd = states[..., ::2], states[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class ToyAttention(nn.Module):
    """Attends by itself, knows no cache and no mask, and has a name of its own for everything."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.to_output = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, hidden, angles):
        query, key, value = self.to_qkv(hidden).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        return self.to_output(self.mix(turn(query, angles), turn(key, angles), value).flatten(2))

    def mix(self, query, key, value):
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


class ToyDecoder(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(64, SIZE)
        self.blocks = nn.ModuleList(ToyAttention() for _ in range(LAYERS))

    def angles(self, positions):
        return positions[..., None] * 0.3 ** torch.arange(HEAD_DIM // 2)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **unused
    ):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = hidden + block(F.layer_norm(hidden, (SIZE,)), self.angles(position_ids))
        return BaseModelOutputWithPast(last_hidden_state=hidden)


class ToyForCausalLM(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyDecoder(config)

    def forward(self, input_ids=None, **arguments):
        output = self.toy(input_ids, **arguments)
        return CausalLMOutputWithPast(
            logits=output.last_hidden_state @ self.toy.embed.weight.T, past_key_values=output.past_key_values
        )


class ToyFamily(Family):
    """All that a new family needs."""

    takes_cache = False

    @staticmethod
    def matches(module):
        return isinstance(module, ToyDecoder)

    def check(self, model):
        if self.decoder.embed.weight.dtype == torch.float16:
            raise ValueError(f"{type(model).__name__} is not supported in float16")

    @staticmethod
    def shape_of(config):
        return {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM}

    @functools.cached_property
    def layers(self):
        return dict(enumerate(self.decoder.blocks))

    def head_dim(self, layer):
        return HEAD_DIM

    def rotary(self, layer, like, positions):
        angles = self.decoder.angles(positions).to(like)
        return angles.cos(), angles.sin()

    def apply_rotary(self, layer):
        def apply(query, key, cos, sin):
            angles = torch.atan2(sin, cos)
            return tuple(turn(states.transpose(1, 2), angles).transpose(1, 2) for states in (query, key))

        return apply

    def install(self, changes, model, attention):
        for index, layer in self.layers.items():
            changes.set(layer, "layer_idx", index)
            changes.set(layer, "mix", Bridge(self, layer))


@dataclasses.dataclass
class Bridge:
    family: ToyFamily
    layer: ToyAttention

    def __call__(self, *states):
        attend = self.family.attending.attend
        if attend is None:
            return ToyAttention.mix(self.layer, *states)
        return attend(self.layer, *(each.transpose(1, 2) for each in states))[0]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(family, "FAMILIES", list(family.FAMILIES))
    register_family(ToyFamily)
    with torch.no_grad():
        yield


def toy(dtype=torch.float32):
    torch.manual_seed(0)
    config = PretrainedConfig(
        hidden_size=SIZE, num_attention_heads=HEADS, vocab_size=64, use_cache=True, initializer_range=0.2
    )
    return ToyForCausalLM(config).eval().to(dtype)


every_position = pytest.mark.parametrize("positions", ["absolute", "slot"])


@every_position
def test_a_text_that_fits_the_slots_is_read_as_by_the_unpatched_model(positions):
    model, ids = toy(), tiny_ids(2, LENGTH)
    full = read(model, ids)
    patch(model, LARGE, positions=positions)
    for split in (None, *SPLITS.values()):
        assert_close(read(model, ids, split), full)


@every_position
def test_what_is_compressed_depends_on_neither_split_nor_chunks_nor_padding(positions):
    model, rows = toy(), [tiny_ids(1, n)[0] for n in (LENGTH, 38)]
    full = read(model, rows[0][None])
    patch(model, SMALL, positions=positions)
    alone = [read(model, row[None])[0] for row in rows]
    assert gap(alone[0], full[0]) > 1e-2
    ids, mask = pad_left(rows)
    chunked = patch(toy(), SMALL, positions=positions, prefill_chunk_size=7)
    for reader, split in ((model, SPLITS["mixed"]), (model, SPLITS["one-by-one"]), (chunked, None)):
        for row, logits in zip(read(reader, ids, split, mask), alone, strict=True):
            assert_close(row[-len(logits) :], logits)


def test_unpatching_suspending_and_failing_leave_no_trace():
    model, ids = toy(), tiny_ids(1, LENGTH)
    full, before = read(model, ids), anatomy(model)
    patch(model, SMALL)
    assert anatomy(model) != before
    with pytest.raises(IndexError):  # in the embedding, after the forward began
        model(torch.full_like(ids, 64))
    with suspended(model):
        assert torch.equal(read(model, ids), full)
    lococo.unpatch_model(model)
    assert anatomy(model) == before and torch.equal(read(model, ids), full)
    with pytest.raises(ValueError, match="ToyForCausalLM is not supported in float16"):
        lococo.patch_model(toy(torch.float16))


def test_a_copy_of_a_patched_model_is_one_of_its_own():
    model, ids = patch(toy(), SMALL), tiny_ids(1, LENGTH)
    expected, duplicate = read(model, ids), copy.deepcopy(model)
    assert patch_of(duplicate).decoder is duplicate.toy and patch_of(model).decoder is model.toy
    lococo.unpatch_model(model)
    assert torch.equal(read(duplicate, ids), expected)
    assert gap(read(model, ids), expected) > 1e-2


def test_its_layers_are_recorded_for_calibration():
    model, ids = toy(), tiny_ids(1, LENGTH)
    before, records = anatomy(model), record(model, ids, gradients=True)
    assert anatomy(model) == before and list(records) == [0, 1]
    assert all(each.query.shape == each.gradient.shape == (1, HEADS, LENGTH, HEAD_DIM) for each in records.values())


def test_it_is_found_inside_other_models_and_others_beside_it():
    assert type(find_family(nn.Sequential(toy()))) is ToyFamily
    with pytest.raises(ValueError, match=r"holds several decoders \(0.toy, 1.toy\)"):
        find_family(nn.ModuleList([toy(), toy()]))


def test_the_general_family_is_asked_last_in_whatever_order_they_are_registered(monkeypatch):
    for order in (family.FAMILIES, family.FAMILIES[::-1]):
        monkeypatch.setattr(family, "FAMILIES", order)
        assert type(find_family(toy())) is ToyFamily
        assert family.base_shape(toy()) == ToyFamily.shape_of(toy().config)
        assert family.base_shape(tiny_llama()) == {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
        assert type(find_family(tiny_llama())) is TransformersFamily
