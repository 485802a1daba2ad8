"""A learned score: features of tokens have their place in the algorithm, and no other."""

import copy
import dataclasses
import io
import itertools

import pytest
import torch
from configs import CONFIGS, FORESEEN, LEARNED
from families import NARROW, build, patch
from naive_llama import naive_gradients, naive_logits
from peft import LoraConfig, get_peft_model
from tiny import patched_llama, tiny_ids, tiny_llama

import lococo
from lococo.compression.scores import SCORES, DistantScore
from lococo.patch import suspended
from lococo.state import NETWORK, patch_of

IDS = tiny_ids(2, 61)
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0


@torch.no_grad()
def read(model, ids=IDS, **arguments):
    return model(ids, **arguments).logits


def with_score(name, score):
    return dataclasses.replace(CONFIGS[name], score=score)


@pytest.mark.parametrize("name", ["open", "open-slot", "slots-per-head", "reference", "decode-block-1"])
@torch.no_grad()
def test_a_new_network_changes_no_bit(name, monkeypatch):
    """Of logits and caches, in calls and in steps, padded or not, of a distant score with its delay and fade."""
    monkeypatch.setattr(SCORES, "_items", dict(SCORES._items))

    @lococo.register_score("distant-alike")
    class DistantAlike(DistantScore):
        """With the same delay and fade in every head, whatever its slots."""

        def delay(self, config):
            return CONFIGS[name].block_size // 4

        def fade(self, config):
            return 0.8 ** (1 / 128)

    found = {}
    for score in ("learned", "distant-alike"):
        model, cache, logits = patched_llama(with_score(name, score)), None, []
        for start, stop in itertools.pairwise([0, 31, *range(32, 50), 61]):
            part = dict(attention_mask=MASK[:, :stop], past_key_values=cache, use_cache=True)
            output = model(IDS[:, start:stop], **part)
            cache = output.past_key_values
            logits.append(output.logits)
        entries = [dataclasses.replace(layer.entries, features=None) for layer in cache.layers]
        held = [tensor for each in entries for tensor in each.tensors() if tensor is not None]
        found[score] = [torch.cat(logits, dim=1), *held]
        has_features = [layer.entries.features is not None for layer in cache.layers]
        assert has_features == [score == "learned"] * 2
    learned, alike = found.values()
    assert len(learned) == len(alike) and all(map(torch.equal, learned, alike))


@pytest.mark.parametrize("name", ["learned", "learned-slot", "learned-per-head"])
def test_logits_and_gradients_equal_the_naive_reference(name):
    model = patched_llama(CONFIGS[name]).double()
    ids = IDS[:, :45]
    torch.testing.assert_close(read(model, ids), naive_logits(model, ids).detach(), rtol=0, atol=1e-5)
    expected = naive_gradients(model, ids)
    model(ids, labels=ids).loss.backward()
    found = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    assert any("lococo_head" in key for key in found) and not any(NETWORK in key for key in found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["absolute", "slot"])
@pytest.mark.parametrize(("family", "windows"), [("Mistral-window", [1, 1]), ("Qwen2-half-window", [0, 1])])
@torch.no_grad()
def test_layers_with_a_sliding_window_are_as_without(family, windows, positions):
    config = dataclasses.replace(CONFIGS["learned-selection"], positions=positions)
    models = [
        patch(build(family, sliding_window=NARROW), dataclasses.replace(config, score=score))
        for score in (FORESEEN, "distant")
    ]
    outputs = [model(IDS, use_cache=True) for model in models]
    layers = outputs[0].past_key_values.layers
    assert [layer.entries.features is None for layer in layers] == [layer.window is not None for layer in layers]
    assert [layer.window is not None for layer in layers] == list(map(bool, windows))
    assert torch.equal(outputs[0].logits, outputs[1].logits) == all(windows)


@pytest.mark.parametrize("name", ["learned", "learned-slot", "learned-per-head"])
@torch.no_grad()
def test_beams_are_those_of_texts_read_anew(name):
    """Beams change places with steps that are not finished."""
    model = patched_llama(CONFIGS[name])
    options = dict(num_beams=3, max_new_tokens=12, do_sample=False, attention_mask=MASK)
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["learned", "learned-slot"])
@pytest.mark.parametrize("make", [copy.deepcopy, by_torch])
def test_copies_of_a_model_have_networks_of_their_own(make, name):
    model = patched_llama(CONFIGS[name])
    expected, twin = read(model), make(model)
    assert torch.equal(read(twin), expected)
    with torch.no_grad():
        for network in patch_of(twin).networks.values():
            network.output.weight.zero_()
            network.output.bias.zero_()
    assert torch.equal(read(model), expected)
    assert torch.equal(read(twin), read(patched_llama(with_score(name, "learned"))))


@pytest.mark.parametrize("name", LEARNED)
def test_unpatched_and_suspended_models_are_the_full_ones(name):
    model, full = patched_llama(CONFIGS[name]), read(tiny_llama())
    expected, before = read(model), list(tiny_llama().state_dict())
    with suspended(model):
        assert torch.equal(read(model), full)
    assert torch.equal(read(model), expected)
    lococo.unpatch_model(model)
    assert torch.equal(read(model), full) and list(model.state_dict()) == before


def test_a_saved_model_has_no_networks(tmp_path):
    model = patched_llama(CONFIGS["learned"])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(read(loaded), read(tiny_llama()))


@pytest.mark.parametrize("copied", [[], [NETWORK, "lococo_head"], ["norm", "input_layernorm"]], ids=str)
@pytest.mark.parametrize("adapted", [["q_proj"], "all-linear"], ids=str)
def test_adapters_around_it_change_nothing(adapted, copied, tmp_path):
    """None are put into networks, which are no linear layers or norms of the model's own."""
    model = patched_llama(CONFIGS["learned"])
    expected = read(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=adapted, modules_to_save=copied, task_type="CAUSAL_LM"))
    assert torch.equal(read(tuned), expected)
    folder = lococo.save_heads(tuned, tmp_path / "heads")
    assert torch.equal(read(lococo.patch_model(tiny_llama(), heads=folder)), expected)


def test_networks_ask_for_no_gradient():
    model = patched_llama(CONFIGS["learned"])
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lococo_head" in name for name in learned) and not any(NETWORK in name for name in learned)


@torch.no_grad()
def test_bytes_of_features_are_counted():
    """Three numbers of two bytes for every entry of every KV head."""
    caches = [patched_llama(with_score("learned", score))(IDS).past_key_values for score in (FORESEEN, "distant")]
    entries = len(IDS) * 2 * 2 * CONFIGS["learned"].capacity  # layers, KV heads
    assert caches[0].nbytes - caches[1].nbytes == entries * 3 * 2
    assert caches[0].layers[0].bytes_per_token == caches[1].layers[0].bytes_per_token


def test_positions_that_are_not_places_in_the_text_are_told_of_once(recwarn):
    model, places = patched_llama(CONFIGS["learned"]), (MASK.cumsum(dim=1) - 1).clamp_min(0)
    read(model, attention_mask=MASK, position_ids=places)
    assert not recwarn
    for _ in range(2):
        read(model, attention_mask=MASK, position_ids=places + 5)
    assert len(recwarn) == 1 and "position_ids are not the places of tokens" in str(recwarn[0].message)
