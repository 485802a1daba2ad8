"""Linear layers quantised by torchao."""

import pytest
import torch
from quantized import check_adapters, check_dequantized, check_heads, check_pieces, check_slots, small_model, tokens
from safetensors.torch import load_file
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig
from wrapped import CONFIG, LEARNED, assert_equal, logits, patched

import lococo

INT8 = Int8WeightOnlyConfig


def quantized(model, config=INT8):
    quantize_(model, config())
    return model


def make():
    return quantized(small_model())


def test_slots():
    check_slots(make, atol=1e-4)


def test_pieces():
    check_pieces(patched(make()), atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, LEARNED], ids=["conv", "learned"])
@pytest.mark.parametrize("method", [INT8, Int8DynamicActivationInt8WeightConfig])
def test_before_and_after_patching_is_the_same(method, config):
    after = patched(quantized(small_model(), method), config)
    before = quantized(patched(small_model(), config), method)
    assert_equal(logits(before), logits(after), atol=0)
    assert tokens(before) == tokens(after)


def test_logits_are_those_of_the_dequantized_weights():
    model = make()
    weights = {
        name: parameter.dequantize()
        for name, parameter in model.named_parameters()
        if type(parameter) is not torch.nn.Parameter
    }
    assert "model.layers.0.self_attn.q_proj.weight" in weights
    check_dequantized(patched(model), weights, atol=1e-4)


def test_heads(tmp_path):
    check_heads(make, tmp_path / "heads")


def test_adapters():
    check_adapters(make)


def test_a_model_quantized_when_it_is_loaded_is_saved_without_heads(tmp_path):
    small_model().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=TorchAoConfig(INT8())).eval()
    full, compressed = logits(model), logits(patched(model))
    assert (compressed - full).abs().max() > 1
    model.save_pretrained(tmp_path / "quantized")
    assert not any("lococo" in name for name in load_file(tmp_path / "quantized" / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    assert_equal(logits(loaded), full, atol=0)
    assert_equal(logits(patched(loaded)), compressed, atol=0)
    assert_equal(logits(lococo.unpatch_model(model)), full, atol=0)
