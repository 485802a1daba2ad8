"""Half precision and quantised weights: finite, and no further off than the unpatched model."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_llama
from wrapped import CONFIG, assert_equal, head_values, logits, patched

import lococo
from lococo.state import patch_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_follow_the_model_into_half_precision(dtype):
    model = patched(tiny_llama()).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    result = logits(model)
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert_equal(result, logits(patched(tiny_llama().to(dtype))), atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_more_than_the_unpatched_model(dtype, full):
    # Without heavy hitters, which a rounded score may choose otherwise.
    config = lococo.LoCoCoConfig.paper(16, block_size=8, kernel_size=5)
    exact = logits(patched(tiny_llama(), config))
    assert (exact - full)[:, config.capacity :].abs().max() > 1
    error = (logits(patched(tiny_llama(), config).to(dtype)) - exact).abs().max()
    assert error < 2 * (logits(tiny_llama().to(dtype)) - full).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", [lococo.LoCoCoConfig.paper, lococo.LoCoCoConfig.reference])
def test_rows_of_zeros_after_relu_stay_finite(dtype, preset, full):
    model = patched(tiny_llama(), preset(16, block_size=8, kernel_size=5)).to(dtype)
    with torch.no_grad():
        for head in patch_of(model).heads.values():
            head.conv.weight.zero_()
            head.conv.bias.fill_(-1)
    result = logits(model)
    assert result.isfinite().all()
    assert (result - full)[:, CONFIG.capacity :].abs().max() > 1


class EightBitLinear(torch.nn.Module):
    """Keeps its weights as bitsandbytes does: no parameter of it is a floating-point number."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax().item() / 127
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantised_attention_gets_heads_in_the_dtype_of_the_model(full):
    model = tiny_llama().bfloat16()
    for layer in model.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            layer.self_attn.set_submodule(name, EightBitLinear(linear))
    before = logits(model)
    assert (logits(patched(model)) - before)[:, CONFIG.capacity :].abs().max() > 1
    assert {value.dtype for value in head_values(model)} == {torch.bfloat16}
