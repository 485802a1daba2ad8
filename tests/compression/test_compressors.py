"""Compressors of one's own: one class each, through reading, decoding, recorded steps, training, copies and heads."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recorded import assert_recorded_as_launched
from tiny import patched_llama, tiny_ids, tiny_llama
from torch import nn

import lococo
from lococo import Compressor, LoCoCoConfig, register_compressor
from lococo.compression import base as compressors
from lococo.compression.entries import by_group
from lococo.state import patch_of

IDS = tiny_ids(2, 61)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(compressors.COMPRESSORS, "_items", dict(compressors.COMPRESSORS._items))


class Plain(Compressor):
    def __init__(self, config, head_dim, device=None, dtype=None):
        super().__init__()


class Mean(Plain):
    """All that is left over, in equal parts, in every fused slot."""

    def weights(self, entries, choice):
        anchors, rest = choice.blendable(len(entries))
        return (rest / rest.sum(-1, keepdim=True))[:, :, None].expand(*anchors.shape, len(entries))


class Copies(Plain):
    """What a fused slot begins with: token selection."""

    def weights(self, entries, choice):
        anchors, _ = choice.blendable(len(entries))
        return nn.functional.one_hot(anchors, len(entries)).float()


class Learned(Compressor):
    """A linear layer on the keys, with a gate to be kept in bounds."""

    def __init__(self, config, head_dim, device=None, dtype=None):
        super().__init__()
        self.to_slots = nn.Linear(head_dim, config.num_fused, device=device, dtype=dtype)
        self.gate = nn.Parameter(torch.full((1,), 0.5, device=device, dtype=dtype))

    def weights(self, entries, choice):
        anchors, rest = choice.blendable(len(entries))
        logits = self.to_slots(entries.keys)[..., : anchors.shape[-1]].transpose(-1, -2)
        mixed = logits.masked_fill(~rest[:, :, None], float("-inf")).softmax(-1)
        return self.gate * mixed + (1 - self.gate) * nn.functional.one_hot(anchors, len(entries))

    def after_step(self):
        with torch.no_grad():
            self.gate.clamp_(0, 1)
        return [self.gate]


class Asked(Plain):
    """Weighs what is left over by the attention of all queries that are kept, the block's among them."""

    needs_queries = True

    def weights(self, entries, choice):
        anchors, rest = choice.blendable(len(entries))
        size = entries.keys.shape[-1]
        queries = entries.queries.unflatten(-1, (-1, size)).flatten(2, 3)  # (batch, kv_heads, entries * groups, d)
        wanted = (entries.keys @ queries.transpose(-1, -2)).float().softmax(2).mean(-1)
        wanted = (wanted + 1e-6) * rest
        return (wanted / wanted.sum(-1, keepdim=True))[:, :, None].expand(*anchors.shape, len(entries))


class Slots(Plain):
    """Slots that are no mixture: the keys they begin with, values of nothing."""

    def weights(self, entries, choice):
        raise AssertionError("blend is all that is asked for")

    def blend(self, entries, choice):
        at = choice.blendable(len(entries))[0][..., None].expand(*choice.fused.shape, entries.keys.shape[-1])
        keys, values = entries.keys.gather(2, at), entries.values.gather(2, at)
        return lococo.compression.entries.Entries(keys, torch.zeros_like(values))


OWN = {"mean": Mean, "learned": Learned, "asked": Asked, "slots": Slots}
CHANGES = [{}, {"positions": "slot"}, {"slots_per_head": ((24, 8), (6, 26))}]


def config_of(compressor, **changes):
    name = compressor.__name__.lower()
    register_compressor(name)(compressor)
    shares = dict(num_sinks=2, num_heavy=4, num_recent=4)
    return LoCoCoConfig(16, block_size=8, compressor=name, **{**shares, **changes})


@torch.no_grad()
def read(config, ids=IDS, **arguments):
    return patched_llama(config)(ids, **arguments).logits


def assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_laws_hold(name, changes):
    config = config_of(OWN[name], **changes)
    whole, selected = read(config), read(dataclasses.replace(config, compressor="conv"))
    assert (whole - selected).abs().max() > 1e-2
    cache, parts, model = None, [], patched_llama(config)
    with torch.no_grad():
        for part in IDS.split([1, 7, 20, *[1] * 20, 13], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = pickle.loads(pickle.dumps(output.past_key_values))
            parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), whole)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    ids = torch.stack([nn.functional.pad(IDS[0], (9, 0)), nn.functional.pad(IDS[1], (0, 9))])
    mask[1, 61:] = 0
    padded = read(config, ids, attention_mask=mask)
    assert_close(padded[0, 9:], whole[0])
    assert_close(padded[1, :61], whole[1])
    with torch.enable_grad():
        assert_close(patched_llama(config)(IDS).logits.detach(), whole)


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_enough_slots_give_the_full_model(name):
    register_compressor("own")(OWN[name])
    assert_close(read(LoCoCoConfig(64, block_size=8, compressor="own")), tiny_llama()(IDS).logits)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_recorded_steps_are_launched_ones(name, changes):
    assert_recorded_as_launched(patched_llama(config_of(OWN[name], **changes)), IDS)


def test_copies_are_token_selection():
    config = config_of(Copies)
    assert_close(read(config), read(dataclasses.replace(config, compressor="conv")))


@torch.no_grad()
def test_queries_that_are_kept_are_those_of_their_tokens():
    """In the prompt and in steps, in the order of the text; of what was dropped there is nothing left."""
    seen = []

    class Watched(Asked):
        def weights(self, entries, choice):
            seen.append((entries.keys.clone(), entries.queries.clone()))
            return super().weights(entries, choice)

    model = patched_llama(config_of(Watched))
    asked = {}
    attention = model.model.layers[0].self_attn
    original = lococo.attention.read_layer

    def watch(layer, reading, query, key, value):
        if layer is cache_layer[0]:
            for at in range(key.shape[2]):
                for row in range(2):
                    for head in range(2):
                        asked[tuple(key[row, head, at].tolist())] = by_group(query, 2)[row, head, at]
        return original(layer, reading, query, key, value)

    cache = lococo.state.patch_of(model).new_cache()
    cache_layer = [cache.layers[0]]
    lococo.attention.read_layer = watch
    try:
        for part in IDS.split([20, *[1] * 20, 21], dim=1):
            model(part, past_key_values=cache, use_cache=True)
    finally:
        lococo.attention.read_layer = original
    assert attention.layer_idx == 0 and len(seen) > 6
    checked = 0
    for keys, queries in seen[::2]:  # of the first layer
        for row in range(2):
            for head in range(2):
                for key, query in zip(keys[row, head], queries[row, head], strict=True):
                    expected = asked.get(tuple(key.tolist()))
                    if expected is not None:  # a blend has no token's key
                        torch.testing.assert_close(query, expected, rtol=0, atol=0)
                        checked += 1
    assert checked > 100


def test_queries_are_kept_for_those_that_ask_alone():
    for compressor in (Mean, Asked):
        with torch.no_grad():
            cache = patched_llama(config_of(compressor))(IDS, use_cache=True).past_key_values
        assert (cache.layers[0].entries.queries is not None) == compressor.needs_queries


def test_it_learns_is_saved_loaded_and_kept_in_bounds(tmp_path):
    config = config_of(Learned)
    model = patched_llama(config)
    heads = patch_of(model).heads
    assert all(type(head) is Learned for head in heads.values()) and len(heads) == 2
    optimizer = torch.optim.SGD([parameter for head in heads.values() for parameter in head.parameters()], lr=50.0)
    before = copy.deepcopy({index: head.state_dict() for index, head in heads.items()})
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in heads[0].parameters())
    optimizer.step()
    for head in heads.values():
        assert head.after_step() == [head.gate] and 0 <= head.gate <= 1
    assert not torch.equal(before[0]["to_slots.weight"], heads[0].state_dict()["to_slots.weight"])
    lococo.save_heads(model, tmp_path / "heads")
    with torch.no_grad():
        expected = model(IDS).logits
        again = lococo.patch_model(tiny_llama(), heads=tmp_path / "heads")
        assert torch.equal(again(IDS).logits, expected)
    with pytest.raises(ValueError, match="trained with compressor='learned', but .* with compressor='conv'"):
        lococo.load_heads(patched_llama(dataclasses.replace(config, compressor="conv")), tmp_path / "heads")


def test_gradients_are_those_of_the_weights():
    """Against a finite difference, as fine as the model's norms allow, which compute in float32."""
    config = config_of(Learned)
    model = patched_llama(config).double()
    gate = patch_of(model).heads[0].gate

    def loss():
        return model(IDS[:, :40]).logits.square().mean()

    (slope,) = torch.autograd.grad(loss(), gate)
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            gate += step
            values.append(loss())
            gate -= step
    torch.testing.assert_close(slope.squeeze(), (values[0] - values[1]) / 2e-3, rtol=1e-3, atol=0)


def test_what_is_no_compressor_is_refused():
    with pytest.raises(ValueError, match="compressor must be one of conv, centroids, got 'none'"):
        LoCoCoConfig(16, compressor="none")
    with pytest.raises(TypeError, match="must be a class derived from lococo.Compressor"):
        register_compressor("linear")(nn.Linear)
    with pytest.raises(ValueError, match="compressor 'conv' is registered already: FusionHead"):
        register_compressor("conv")(Mean)
    register_compressor("mean")(Mean)
    register_compressor("mean")(Mean)  # a cell of a notebook, run again
    assert list(compressors.COMPRESSORS) == ["conv", "centroids", "mean"]


def test_the_example_runs():
    script = Path(__file__).parents[2] / "examples" / "own_method.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "key-norm" in result.stdout and "nearest-mean" in result.stdout
