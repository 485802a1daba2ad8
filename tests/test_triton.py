"""Triton kernels against their twins in float64: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch
import triton.language as tl
from tiny import tiny_ids, tiny_llama
from triton.runtime.interpreter import InterpreterBuilder

from lococo import LoCoCoConfig, kernels, patched, slots, triton_kernels
from lococo.backends import Visibility
from lococo.fusion import FusionHead

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# batch, heads, kv_heads, queries, entries, head_dim
SHAPES = {
    "grouped": (2, 6, 2, 37, 101, 64),
    "ungrouped": (1, 2, 2, 67, 67, 80),
    "several-blocks": (1, 3, 1, 50, 150, 128),
    "one-query": (2, 4, 2, 1, 75, 80),
}


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """NumPy has no bfloat16, and the interpreter multiplies its bits as if they were integers."""
    create_dot = InterpreterBuilder.create_dot

    def in_float32(builder, a, b, total, precision, imprecise):
        widened = [
            builder.create_fp_ext(operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand
            for operand in (a, b)
        ]
        return create_dot(builder, *widened, total, precision, imprecise)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", in_float32)


def tensors(shape, dtype, seed=0):
    """(query, key, value, bias) as a model's views and a cache's slices are: no two with the same strides."""
    batch, heads, kv_heads, queries, entries, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, queries, heads, dim, generator=generator).transpose(1, 2)
    key = torch.randn(batch, kv_heads, entries + 9, dim, generator=generator)[:, :, :entries]
    value = torch.randn(batch, entries, kv_heads, dim, generator=generator).transpose(1, 2)
    bias = torch.randn(batch, kv_heads, entries + 3, generator=generator)[:, :, :entries]
    return *(tensor.to(DEVICE, dtype) for tensor in (query, key, value)), bias.to(DEVICE)


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_and_its_log_sum_exp(shape, biased, dtype):
    query, key, value, bias = tensors(shape, dtype)
    bias = bias if biased else None
    output, lse = triton_kernels.attend(query, key, value, 0.2, bias)
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = kernels.attend(*wide, 0.2, Visibility(bias=bias), "eager")
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(output, expected) < TOLERANCES[dtype]
    logits = wide[0].unflatten(1, (key.shape[1], -1)) @ wide[1].transpose(-1, -2)[:, :, None] * 0.2
    logits = logits if bias is None else logits + bias[:, :, None, None]
    hidden = ~kernels.lower_right(query.shape[2], key.shape[2], 0, logits.device)
    expected = logits.masked_fill(hidden, float("-inf")).logsumexp(-1).flatten(1, 2)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("delay", [0, 23])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_mass(shape, delay, squared, dtype):
    query, key, value, bias = tensors(shape, dtype)
    bias = None if squared else bias
    _, lse = triton_kernels.attend(query, key, value, 0.2, bias)
    mass = triton_kernels.attention_mass(query, key, 0.2, lse, bias, delay, squared)
    seen, delayed = Visibility(bias=bias), {"squared": squared, "delay": delay}
    expected = kernels.attention_mass(query.double(), key.double(), 0.2, seen, **delayed)
    assert mass.dtype == torch.float32
    assert relative_error(mass, expected) < 1e-4
    # The log-sum-exp of another kernel has other strides.
    other = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(triton_kernels.attention_mass(query, key, 0.2, other, bias, delay, squared), mass)


def test_mass_without_a_late_query_is_nothing():
    query, key, value, _ = tensors(SHAPES["ungrouped"], torch.float32)
    _, lse = triton_kernels.attend(query, key, value, 0.2)
    assert not triton_kernels.attention_mass(query, key, 0.2, lse, delay=67).any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("values", "dim"),
    [
        ({"gate_init": 0.3}, 64),
        ({"gate_init": 0.7, "residual": "layer", "head_rank": 3}, 80),
        ({"residual": "none", "mass_bias": False, "score": "sum"}, 128),
        ({"gate_init": 1.0, "num_heavy": 0}, 64),
    ],
)
def test_blend(values, dim, dtype):
    config = LoCoCoConfig(100, block_size=50, num_sinks=4, **values)
    torch.manual_seed(0)
    head = FusionHead(config, dim).to(DEVICE)
    shape, entries = (2, 2, 147), 147
    everything = slots.Entries(
        keys=torch.randn(2, 2, 160, dim, device=DEVICE).to(dtype)[:, :, :entries],
        values=torch.randn(2, entries, 2, dim, device=DEVICE).to(dtype).transpose(1, 2),
        scores=torch.rand(shape, device=DEVICE) if config.num_heavy else None,
        born=torch.arange(entries, device=DEVICE).expand(shape).float(),
        log_mass=torch.rand(2, 2, 160, device=DEVICE)[:, :, :entries] if config.has_mass else None,
    )
    choice = slots.choose(slots.rank(everything, 200, config), entries, slots.Budget.of(config), everything.keys)
    anchors = choice.anchors.gather(-1, choice.fused)
    rest = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    rest = rest.scatter(-1, choice.anchors, False).scatter(-1, anchors, True)
    with torch.no_grad():
        got = slots.blend_in_triton(everything, anchors, rest, head)
        weights = head(everything.keys, everything.values, anchors, rest).double()
    wide = everything.map(lambda tensor: tensor.double())
    expected = slots.Entries(
        keys=weights @ wide.keys,
        values=weights @ wide.values,
        scores=None if wide.scores is None else (weights @ wide.scores[..., None])[..., 0],
        born=(weights @ wide.born[..., None])[..., 0],
        log_mass=None if wide.log_mass is None else slots.log_mass(weights, wide.log_mass),
    )
    for name in ("keys", "values", "scores", "born", "log_mass"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            tolerance = TOLERANCES[dtype] if name in ("keys", "values") else 1e-5
            assert relative_error(mine, theirs) < tolerance, name
            assert mine.dtype == getattr(everything, name).dtype


def test_backend_leaves_masks_caps_and_gradients_to_torch():
    query, key, value, bias = tensors((1, 2, 1, 5, 20, 16), torch.float32)
    mask = torch.rand(1, 1, 5, 20, device=DEVICE) < 0.5
    mask[..., 0] = True
    for seen in (Visibility(mask, bias), Visibility(softcap=2.0), Visibility(bias=bias)):
        query.requires_grad_(seen.bias is not None)
        output = kernels.attend(query, key, value, 0.3, seen, "triton")
        assert relative_error(output, kernels.attend(query, key, value, 0.3, seen, "eager").double()) < 1e-6
        assert output.requires_grad == query.requires_grad


@pytest.mark.parametrize("padded", [False, True])
def test_model_reads_and_generates_the_same(padded, monkeypatch):
    """Attention, scores and blends of a whole model, those that only torch can do among them."""
    ids, mask = tiny_ids(2, 45).to(DEVICE), torch.ones(2, 45, dtype=torch.long, device=DEVICE)
    if padded:
        mask[0, :13] = 0
    logits = {}
    for attention in ("sdpa", "triton"):
        for module in (kernels, slots):
            monkeypatch.setattr(module, "triton_takes", lambda tensor, attention=attention: attention == "triton")
        model = tiny_llama().to(DEVICE)
        torch.manual_seed(0)
        config = LoCoCoConfig(16, block_size=8, gate_init=0.4, attention=attention)
        with patched(model, config), torch.no_grad():
            read = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True)
            steps = [read.logits]
            for step in range(40, 45):
                call = {"attention_mask": mask[:, : step + 1], "past_key_values": read.past_key_values}
                steps.append(model(ids[:, step : step + 1], **call).logits)
        logits[attention] = torch.cat(steps, dim=1)[mask.bool()]
    torch.testing.assert_close(logits["triton"], logits["sdpa"], rtol=0, atol=1e-4)
