"""The whole algorithm on one layer against the naive float64 reference, gradients included."""

import inspect

import pytest
import torch
from configs import BLENDED, CONFIGS
from one_layer import DIM, HEADS, LENGTH, random_head, random_network, random_qkv, read
from reference import naive_h2o, naive_head, naive_lococo, naive_network, naive_streaming_llm, rope_rotate
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lococo.attention import lococo_attention
from lococo.compression.fusion import FusionHead
from lococo.config import LoCoCoConfig


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["in-place", "out-of-place"])
def test_equals_naive_reference(name, with_gradients):
    config = CONFIGS[name]
    q, k, v = random_qkv()
    head, network = random_head(config), random_network(config)
    with torch.set_grad_enabled(with_gradients):
        output = read(config, q, k, v, head, network=network)
    expected, _ = naive_lococo(q, k, v, config, naive_head(head), rope_rotate(DIM), network=naive_network(network))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    full, _ = naive_lococo(q, k, v, LoCoCoConfig.h2o(LENGTH))
    assert (output - full).abs().max() > 1e-2, "nothing was compressed"


@pytest.mark.parametrize("name", BLENDED)
def test_gradients_equal_naive_reference(name):
    config = CONFIGS[name]
    head, network = random_head(config), random_network(config)
    inputs = [tensor.requires_grad_() for tensor in random_qkv()]
    variables = [*inputs, *head.parameters()]
    weights = torch.randn(HEADS, LENGTH, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    output = read(config, *inputs, head, network=network)
    expected, _ = naive_lococo(*inputs, config, naive_head(head), rope_rotate(DIM), network=naive_network(network))
    got = torch.autograd.grad((output * weights).sum(), variables)
    wanted = torch.autograd.grad((expected * weights).sum(), variables)
    for gradient, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-7, atol=1e-8)
    learns = len(got) > 3  # centroids without mass have nothing to learn
    assert any(gradient.abs().max() > 1e-3 for gradient in got[3:]) == learns, "the head has no influence"


@pytest.mark.parametrize("places", [[0.0], [1.0], [0.0, 1.0, -0.4, 1.7, 0.5]], ids=["closed", "open", "all"])
@pytest.mark.parametrize("name", ["default", "no-mass", "layer-gate", "low-rank"])
def test_gradients_of_gates_at_and_beyond_their_bounds_equal_naive_reference(name, places):
    head = random_head(CONFIGS[name])
    with torch.no_grad():
        head.gate.copy_(torch.tensor(places).repeat(len(head.gate))[: len(head.gate)])
    q, k, v = (tensor[: min(len(tensor), 1)] for tensor in random_qkv())  # one KV head: a gate's uses are the same
    found = []
    for output in (read(CONFIGS[name], q, k, v, head), naive_lococo(q, k, v, CONFIGS[name], naive_head(head))[0]):
        (output * torch.linspace(-1, 1, LENGTH, dtype=torch.float64)[:, None]).sum().backward()
        found.append({key: each.grad.clone() for key, each in head.named_parameters()})
        head.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-10)
    is_within = (head.gate >= 0) & (head.gate <= 1)
    assert (found[0]["gate"][is_within] != 0).all()


@pytest.mark.parametrize("block_size", [1, 7, 8, 20])
@pytest.mark.parametrize("num_slots", [12, 13])
def test_h2o_preset_is_h2o(block_size, num_slots):
    q, k, v = random_qkv(seed=2)
    output = read(LoCoCoConfig.h2o(num_slots, block_size=block_size), q, k, v)
    expected, _ = naive_h2o(q, k, v, num_slots, block_size, DIM**-0.5)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 7, 8, 20])
@pytest.mark.parametrize("positions", ["slot", "absolute"])
def test_streaming_preset_is_streaming_llm(block_size, positions):
    q, k, v = random_qkv(seed=3)
    config = LoCoCoConfig.streaming_llm(12, block_size=block_size, positions=positions)
    output = read(config, q, k, v)
    rotate = rope_rotate(DIM) if positions == "slot" else None
    expected, _ = naive_streaming_llm(q, k, v, 12, 4, block_size, DIM**-0.5, rotate)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["absolute", "slot"])
@pytest.mark.parametrize("score", ["distant", "mean", "sum", "last"])
def test_closed_gate_is_selection_with_the_same_budget(positions, score):
    q, k, v = random_qkv(seed=4)
    fused = LoCoCoConfig(16, 8, positions=positions, score=score)
    copies = LoCoCoConfig(
        16,
        8,
        num_sinks=4,
        num_recent=fused.num_recent,
        num_heavy=12 - fused.num_recent,
        positions=positions,
        score=score,
    )
    assert fused.num_fused and not copies.num_fused
    with torch.no_grad():
        expected = read(copies, q, k, v)
        assert torch.equal(read(fused, q, k, v, random_head(fused)), expected)
    blended = read(fused, q, k, v, random_head(fused))  # with gradients the closed gate takes the long way
    for output in (blended, read(copies, q, k, v)):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_scores_never_carry_gradient_but_keys_and_values_do():
    config = CONFIGS["open"]
    q, k, v = (tensor.requires_grad_() for tensor in random_qkv(seed=5))
    output = read(config, q, k, v, random_head(config))
    first_block = torch.autograd.grad(output[:, -1].sum(), (k, v))
    assert all(gradient[:, :8].abs().sum() > 0 for gradient in first_block), "no gradient through the slots"


def test_zero_rows_are_safe_in_half_precision():
    for dtype in (torch.float16, torch.bfloat16):
        config = LoCoCoConfig.paper(12, block_size=8)
        head = FusionHead(config, DIM, dtype=dtype)
        torch.nn.init.constant_(head.conv.bias, -100.0)
        q, k, v = (tensor.to(dtype) for tensor in random_qkv(seed=6))
        output = read(config, q, k, v, head)
        assert output.isfinite().all()


def test_attention_outside_a_patched_model_says_so():
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="outside the forward of the model"):
        lococo_attention(torch.nn.Identity(), q[None], k[None], v[None])


def test_positional_arguments_are_those_of_transformers_own_functions():
    # kvpress wraps every registered function and hands dropout on by its place.
    ours, theirs = (inspect.signature(each).parameters for each in (lococo_attention, sdpa_attention_forward))
    assert list(ours)[:7] == list(theirs)[:7]
