import pytest
import torch

from lococo.compression.fusion import FusionHead
from lococo.config import LoCoCoConfig

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


def test_a_thread_that_trains_does_not_disturb_one_that_reads():
    class Interrupted(FusionHead):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_closed" and value is not None:
                with torch.enable_grad():
                    assert not self.is_closed

    with torch.no_grad():
        assert Interrupted(LoCoCoConfig(16), 4).is_closed


def opened_by(gates, weigh, **options):
    """A head in float64 whose gates have these values, and a loss that is linear in its weights."""
    config = LoCoCoConfig(16, **options)
    keys, values, anchors, rest = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in head_input(config)
    )
    torch.manual_seed(3)
    head = FusionHead(config, 4, dtype=torch.float64)
    with torch.no_grad():
        head.gate.copy_(torch.tensor(gates, dtype=torch.float64))
    return head, lambda: weigh * (head(keys, values, anchors, rest) @ values).sum(dim=(0, 1, 3)).cumsum(0).sum()


@pytest.mark.parametrize("normalization", ["sum", "softmax"])
@pytest.mark.parametrize("residual", ["slot", "layer"])
@pytest.mark.parametrize("bound, inside", [(0.0, 0.25), (1.0, 0.75)])
def test_gradient_at_a_bound_is_the_slope_from_inside(bound, inside, residual, normalization):
    """In any torch, whatever its ``clamp`` has for a gradient there. The loss is linear: any step gives its slope."""
    head, loss = opened_by(bound, 1.0, residual=residual, normalization=normalization)
    loss().backward()
    for place in range(len(head.gate)):
        with torch.no_grad():
            at_bound = loss()
            head.gate[place] = inside
            slope = (loss() - at_bound) / (inside - bound)
            head.gate[place] = bound
        assert slope.abs() > 1e-2
        torch.testing.assert_close(head.gate.grad[place], slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beyond, bound", [(-0.3, 0.0), (-1e-7, 0.0), (1.0 + 1e-7, 1.0), (2.0, 1.0)])
def test_beyond_a_bound_only_what_leads_back_is_left_of_the_gradient(beyond, bound):
    for weigh in (1.0, -1.0):
        head, loss = opened_by(bound, weigh)
        loss().backward()
        slopes = head.gate.grad
        assert (slopes > 0).any() and (slopes < 0).any()
        leads_back = slopes < 0 if bound == 0 else slopes > 0
        head, loss = opened_by(beyond, weigh)
        loss().backward()
        assert torch.equal(head.gate.grad, torch.where(leads_back, slopes, 0.0))


def test_a_gate_that_a_step_took_below_zero_comes_back():
    head, loss = opened_by(-0.2, 1.0)
    optimizer = torch.optim.SGD([head.gate], lr=0.1)
    rising = None
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        rising = head.gate.grad < 0 if rising is None else rising
        optimizer.step()
    assert 0 < rising.sum() < len(rising)
    assert (head.gate[rising] > 0).all() and (head.gate[~rising] == -0.2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_closed_gate_gets_a_gradient_in_every_precision(dtype):
    config = LoCoCoConfig(16)
    keys, values, anchors, rest = head_input(config)
    head = FusionHead(config, 4, dtype=dtype)
    (
        head(keys.to(dtype), values.to(dtype), anchors, rest)
        @ values.double().to(torch.promote_types(dtype, torch.float32))
    ).square().sum().backward()
    assert head.gate.grad.dtype == dtype and head.gate.grad.abs().min() > 0


def test_a_compiled_head_has_the_same_gradients():
    found = []
    for compiled in (False, True):
        head, loss = opened_by([0.0, 1.0, -0.5, 1.5, 0.3, 0.0], 1.0)
        if compiled:
            head.forward = torch.compile(head.forward, backend="aot_eager", fullgraph=True)
        value = loss()
        value.backward()
        found.append(
            {
                "loss": value.detach(),
                **{name: each.grad for name, each in head.named_parameters() if each.grad is not None},
            }
        )
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert found[0]["gate"].abs().max() > 1e-2


def test_a_channel_that_is_zero_everywhere_leaves_the_learning_to_its_gate():
    """The slope of the paper's ReLU at 0 is 0, by torch's rule of the slope of least norm."""
    for bias in (0.0, -1e3):
        head, loss = opened_by(0.5, 1.0)
        with torch.no_grad():
            head.conv.weight[2] = 0
            head.conv.bias[2] = bias
        loss().backward()
        is_learning = head.conv.weight.grad.flatten(1).abs().amax(dim=1) > 0
        assert is_learning.tolist() == [True, True, False, True, True, True]
        assert head.gate.grad[2].abs() > 1e-2
