"""Float32 models under autocast, and other mixtures of types: with and without gradients, every preset and kernel."""

import dataclasses

import pytest
import torch
from configs import CONFIGS
from tiny import patched_llama, tiny_ids, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM

import lococo
from lococo import LoCoCoConfig
from lococo.kernels.attention import ATTENTIONS

IDS = tiny_ids(2, 61)
HALVES = [torch.bfloat16, torch.float16]
KERNELS = [name for name in ATTENTIONS if not name.startswith("flash") and name != "triton"]


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_reading_rounds_as_the_unpatched_model_does(name, dtype):
    """Where selection is the same, what is left is the rounding of the model itself."""
    config = dataclasses.replace(
        CONFIGS[name], num_slots=80, slots_per_head=None, num_sinks=4, num_heavy=None, num_recent=None
    )
    full = tiny_llama()
    with torch.no_grad():
        exact = full(IDS).logits
        with torch.autocast("cpu", dtype=dtype):
            rounded = relative(full(IDS).logits, exact)
            assert relative(patched_llama(config)(IDS).logits, exact) < 2 * rounded
            padded = torch.ones_like(IDS)
            padded[0, :9] = 0
            assert patched_llama(config)(IDS, attention_mask=padded).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_steps_and_generate_agree(name, dtype):
    model = patched_llama(CONFIGS[name])
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        whole = model(IDS).logits
        cache, parts = None, []
        for part in IDS.split([29, *[1] * 20, 12], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert {tensor.dtype for layer in cache.layers for tensor in (layer.entries.values,)} == {dtype}
        assert relative(torch.cat(parts, dim=1)[:, :29], whole[:, :29]) < 0.02
        assert torch.cat(parts, dim=1).isfinite().all()
        assert model.generate(IDS, max_new_tokens=20, do_sample=False).shape == (2, 81)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_every_kernel(kernel, positions):
    model = patched_llama(LoCoCoConfig(16, block_size=8, gate_init=0.4, positions=positions), kernel)
    exact = model(IDS).logits.detach()
    for context in (torch.no_grad, torch.enable_grad):
        with context(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(IDS).logits
            assert logits.isfinite().all()
            # Before anything is chosen by rounded scores.
            assert relative(logits[:, :24], exact[:, :24]) < 0.05


def _gradient(model, ids, enabled):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.model.layers[0].mlp.parameters()])


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_round_as_those_of_the_unpatched_model(name):
    """Up to where a rounded score may choose other tokens; beyond it they are numbers."""
    ids = IDS[:, : CONFIGS[name].num_slots]
    exact = _gradient(patched_llama(CONFIGS[name]), ids, enabled=False)
    rounding = relative(_gradient(tiny_llama(), ids, enabled=True), _gradient(tiny_llama(), ids, enabled=False))
    assert relative(_gradient(patched_llama(CONFIGS[name]), ids, enabled=True), exact) < 2 * rounding
    assert _gradient(patched_llama(CONFIGS[name]), IDS, enabled=True).isfinite().all()


def test_places_in_the_text_are_not_rounded():
    """A blend's place is the mean of its tokens': of eight bits, 3001 would be 2992."""
    shares = dict(num_sinks=0, num_heavy=0, num_recent=0)
    model, cache = patched_llama(LoCoCoConfig(16, block_size=8, **shares, gate_init=1.0, score="mean")), None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for part in tiny_ids(1, 3001).split(500, dim=1):
            cache = model(part, past_key_values=cache, use_cache=True).past_key_values
            cache.detach()
    position = cache.layers[0].views()[0].entries.position[:, :, :16]  # all of them blends
    assert position.dtype == torch.float32 and position.min() > 256
    assert not torch.equal(position, position.bfloat16().float())


def test_windows_and_softcaps():
    torch.manual_seed(0)
    sizes = dict(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )
    config = Gemma2Config(**sizes, head_dim=8, vocab_size=64, sliding_window=9)
    model = lococo.patch_model(Gemma2ForCausalLM(config).eval(), LoCoCoConfig(16, block_size=8))
    for context in (torch.no_grad, torch.enable_grad):
        with context(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(IDS).logits.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(IDS, max_new_tokens=12, do_sample=False).shape == (2, 73)


def test_models_in_float64_are_left_in_it():
    model = patched_llama(CONFIGS["open"]).double()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(IDS, use_cache=True)
    assert output.past_key_values.layers[0].entries.values.dtype in (torch.float64, torch.bfloat16)
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("name", ["open", "open-slot", "slots-per-head"])
def test_a_cache_goes_from_autocast_to_without_and_back(name):
    model, cache, logits = patched_llama(CONFIGS[name]), None, []
    with torch.no_grad():
        for index, part in enumerate(IDS.split([20, 1, 1, 9, 1, 29], dim=1)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=index % 2 == 0):
                output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert torch.cat(logits, dim=1).isfinite().all()


def test_layers_in_different_types():
    """A model whose value projection alone is in half precision, as some quantisers leave it."""
    model, halves = patched_llama(CONFIGS["open"]), patched_llama(CONFIGS["open"])
    for layer in halves.model.layers:
        projection = layer.self_attn.v_proj.bfloat16()
        projection.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    with torch.no_grad():
        assert relative(halves(IDS).logits[:, :24], model(IDS).logits[:, :24]) < 0.05
        assert halves.generate(IDS, max_new_tokens=12, do_sample=False).shape == (2, 73)
