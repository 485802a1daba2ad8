"""Linear layers quantised by optimum-quanto."""

import pytest
from optimum.quanto import QTensor, freeze, qint8, quantize
from quantized import check_adapters, check_dequantized, check_heads, check_pieces, check_slots, small_model, tokens
from transformers import AutoModelForCausalLM, QuantoConfig
from wrapped import CONFIG, LEARNED, assert_equal, logits, patched


def quantized(model):
    quantize(model, weights=qint8)
    freeze(model)
    return model


def make():
    return quantized(small_model())


def test_slots():
    check_slots(make, atol=1e-4)


def test_pieces():
    check_pieces(patched(make()), atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, LEARNED], ids=["conv", "learned"])
def test_before_and_after_patching_is_the_same(config):
    after = patched(quantized(small_model()), config)
    before = quantized(patched(small_model(), config))
    assert_equal(logits(before), logits(after), atol=0)
    assert tokens(before) == tokens(after)


def test_logits_are_those_of_the_dequantized_weights():
    model = make()
    weights = {name: each.dequantize() for name, each in model.named_parameters() if isinstance(each, QTensor)}
    assert "model.layers.0.self_attn.q_proj.weight" in weights
    check_dequantized(patched(model), weights, atol=1e-4)


def test_heads(tmp_path):
    check_heads(make, tmp_path / "heads")


def test_adapters():
    check_adapters(make)


def test_a_model_quantized_when_it_is_loaded_is_like_one_quantized_later(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8")).eval()
    model.lm_head, later = make().lm_head, make()  # Transformers leaves it as it is
    assert_equal(logits(patched(model)), logits(patched(later)), atol=1e-4)
