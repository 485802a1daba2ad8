"""One attention layer through the library's own call, with random tensors and weights in float64."""

import types

import torch
from reference import rope_rotate

from lococo.attention import lococo_attention
from lococo.cache.plan import RowState, plan_call
from lococo.context import ForwardContext
from lococo.registry import COMPRESSORS, SCORES

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 45


class ReferenceRotary:
    """What ``RotaryTable`` does, by the reference's rotation."""

    def __init__(self):
        self.by_position = rope_rotate(DIM)

    def rotate(self, keys, positions, inverse=False):
        return self.by_position(keys, -positions[0] if inverse else positions[0])


def random_qkv(seed=0, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(heads, length, DIM, generator=generator, dtype=torch.float64) for heads in shapes]


def random_head(config, seed=0):
    if not config.num_fused:
        return None
    torch.manual_seed(seed)
    largest = max(config.layer_configs(0), key=lambda config: config.num_fused)
    return COMPRESSORS[config.compressor](largest, DIM, dtype=torch.float64)


def random_network(config, seed=0):
    """Of the config's score; None for one that has no features."""
    torch.manual_seed(seed)
    return SCORES[config.score]().network(KV_HEADS, DIM, dtype=torch.float64)


def read(config, q, k, v, head=None, scale=DIM**-0.5, network=None):
    """One layer over a batch of one, as the model calls it: keys and queries rotated at the positions it was given."""
    plan = plan_call([RowState()], q.shape[1], config)
    rotary = {0: ReferenceRotary()}
    if config.positions == "slot":
        q, k = (rotary[0].rotate(tensor, plan.cache_positions) for tensor in (q, k))
    module = types.SimpleNamespace(layer_idx=0, lococo_head=head, lococo_score=network)
    call = ForwardContext(config, plan, cache=None, rotary_tables=rotary)
    output, _ = lococo_attention(module, q[None], k[None], v[None], scaling=scale, lococo=call)
    return output[0].transpose(0, 1)
