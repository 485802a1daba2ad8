import pytest
import torch

from lococo.config import LoCoCoConfig
from lococo.fusion import FusionHead

ENTRIES = 20


def head_input(config, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, 2, ENTRIES, dim, generator=generator).unbind()
    anchors = torch.stack([torch.randperm(ENTRIES, generator=generator)[: config.num_fused] for _ in range(6)])
    rest = torch.rand(3, 2, ENTRIES, generator=generator) < 0.5
    anchors = anchors.view(3, 2, -1)
    return keys, values, anchors, rest.scatter(-1, anchors, True)


def test_parameter_count_of_the_7b_shape():
    """All 128 slots of a 32-layer model with head dimension 128 fused: 32 * 128 * 256 * 21 = 22.0 M weights."""
    head = FusionHead(LoCoCoConfig.paper(128), head_dim=128, device="meta")
    weights = 32 * head.conv.weight.numel()
    assert weights == 32 * 128 * 256 * 21 == 22_020_096
    assert 32 * sum(parameter.numel() for parameter in head.parameters()) == weights + 32 * 128


def test_low_rank_head_is_smaller():
    full, low = (FusionHead(LoCoCoConfig.paper(128, head_rank=rank), 128, device="meta") for rank in (None, 16))
    count = [sum(parameter.numel() for parameter in head.parameters()) for head in (full, low)]
    assert count[1] == 16 * 256 * 21 + 128 * 16 + 128 < count[0] / 5


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
@pytest.mark.parametrize("residual", ["slot", "layer", "none"])
@pytest.mark.parametrize("rank", [None, 2])
def test_rows_are_weights_over_the_rest_and_the_anchor(normalization, residual, rank):
    config = LoCoCoConfig(16, normalization=normalization, residual=residual, head_rank=rank, gate_init=0.3)
    keys, values, anchors, rest = head_input(config)
    weights = FusionHead(config, 4)(keys, values, anchors, rest)
    assert weights.shape == (3, 2, config.num_fused, ENTRIES)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, config.num_fused))
    assert (weights.masked_fill(rest[:, :, None], 0) == 0).all(), "an entry that a slot already copied was blended"


def test_closed_gate_is_the_anchor_exactly():
    config = LoCoCoConfig(16)
    keys, values, anchors, rest = head_input(config)
    weights = FusionHead(config, 4)(keys, values, anchors, rest)
    assert torch.equal(weights, torch.nn.functional.one_hot(anchors, ENTRIES).float())


def test_row_of_zeros_becomes_the_mean_of_the_rest():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        config = LoCoCoConfig.paper(16)
        head = FusionHead(config, 4, dtype=dtype)
        torch.nn.init.constant_(head.conv.bias, -1e4)
        keys, values, anchors, rest = head_input(config)
        weights = head(keys.to(dtype), values.to(dtype), anchors, rest)
        expected = rest / rest.sum(-1, keepdim=True)
        torch.testing.assert_close(weights, expected[:, :, None].expand_as(weights).to(weights.dtype))


def test_all_kv_heads_share_one_convolution():
    config = LoCoCoConfig.paper(16)
    keys, values, anchors, rest = head_input(config)
    head = FusionHead(config, 4)
    whole = head(keys, values, anchors, rest)
    for kv_head in range(2):
        alone = (slice(None), slice(kv_head, kv_head + 1))
        torch.testing.assert_close(head(keys[alone], values[alone], anchors[alone], rest[alone]), whole[alone])


def test_reference_initialisation_is_standard_normal():
    torch.manual_seed(0)
    weight = FusionHead(LoCoCoConfig.reference(128), 64).conv.weight
    assert abs(weight.std().item() - 1) < 0.01


def test_closed_is_noticed_after_every_change_of_the_gates():
    head = FusionHead(LoCoCoConfig(16), 4)
    with torch.no_grad():
        assert head.is_closed
        head.gate[2] = 0.5
        assert not head.is_closed
        head.gate.zero_()
        assert head.is_closed
        head.load_state_dict({**head.state_dict(), "gate": torch.full_like(head.gate, 0.1)})
        assert not head.is_closed
    head.gate.data.zero_()
    assert not head.is_closed, "a gate that is being trained must stay in the graph"


def test_closed_gate_still_gets_a_gradient():
    config = LoCoCoConfig(16)
    keys, values, anchors, rest = head_input(config)
    head = FusionHead(config, 4)
    (head(keys, values, anchors, rest) @ values).square().sum().backward()
    assert head.gate.grad.abs().min() > 0
