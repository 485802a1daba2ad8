"""The configurations that every law of the library is tested with.

Each feature of a configuration is in one of them, alone where that can be. All of them compress a text of 45 tokens;
``slots_per_head`` is for two layers of two KV heads, as ``tiny.tiny_llama`` has them.
"""

import pytest
import torch

from lococo import LoCoCoConfig, register_score
from lococo.compression.scores import LearnedScore

FORESEEN = "foreseen"


@register_score(FORESEEN)
class Foreseen(LearnedScore):
    """The learned score as if it had been learned: a new network's features are zero, these choose otherwise."""

    def network(self, num_kv_heads, head_dim, **factory):
        network, generator = super().network(num_kv_heads, head_dim, **factory), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                inputs = parameter.shape[-1] if parameter.dim() > 1 else 1
                numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(numbers / inputs**0.5)
        return network


def opened(**changes):
    """Gates that let blends through, which those of new heads do not."""
    return LoCoCoConfig(**{"num_slots": 16, "block_size": 8, "gate_init": 0.4, **changes})


CONFIGS = {
    "default": LoCoCoConfig(16, block_size=8),
    "default-slot": LoCoCoConfig(16, block_size=8, positions="slot"),
    "paper": LoCoCoConfig.paper(12, block_size=8),
    "paper-slot": LoCoCoConfig.paper(12, block_size=8, positions="slot"),
    "reference": LoCoCoConfig.reference(12, block_size=5),
    "h2o": LoCoCoConfig.h2o(12, block_size=8),
    "h2o-slot": LoCoCoConfig.h2o(12, block_size=8, positions="slot"),
    "streaming": LoCoCoConfig.streaming_llm(12, block_size=8),
    "streaming-absolute": LoCoCoConfig.streaming_llm(12, block_size=8, positions="absolute"),
    "open": opened(),
    "open-slot": opened(num_slots=14, block_size=6, positions="slot"),
    "slots-per-head": opened(slots_per_head=((24, 8), (6, 26))),
    "slots-per-head-low-rank": opened(slots_per_head=((9, 23), (21, 11)), head_rank=3),
    "low-rank": opened(head_rank=3),
    "small-kernel": opened(kernel_size=3),
    "softmax": opened(normalization="softmax"),
    "layer-gate": opened(residual="layer"),
    "no-mass": opened(mass_bias=False),
    "score-mean": opened(score="mean"),
    "score-sum": opened(score="sum"),
    "score-last": opened(score="last"),
    "learned": opened(score=FORESEEN),
    "learned-new": opened(score="learned"),
    "learned-slot": opened(score=FORESEEN, num_slots=14, block_size=6, positions="slot"),
    "learned-per-head": opened(score=FORESEEN, slots_per_head=((24, 8), (6, 26))),
    "learned-selection": LoCoCoConfig(12, block_size=5, num_sinks=1, num_heavy=7, num_recent=4, score=FORESEEN),
    "centroids": LoCoCoConfig(16, block_size=8, num_heavy=4, compressor="centroids"),
    "centroids-slot": LoCoCoConfig(14, block_size=6, num_heavy=4, compressor="centroids", positions="slot"),
    "centroids-no-mass": LoCoCoConfig(16, block_size=8, num_heavy=4, compressor="centroids", mass_bias=False),
    "centroids-per-head": LoCoCoConfig(
        *(16, 8, 1, 7, 5),
        score=FORESEEN,
        compressor="centroids",
        scaling="count",
        slots_per_head=((24, 8), (6, 26)),
    ),
    "slots-no-multiple-of-block": opened(num_slots=13, num_sinks=2),
    "block-larger-than-slots": opened(num_slots=6, block_size=11, num_sinks=1, num_recent=2, num_heavy=1),
    "one-token-blocks": opened(block_size=1),
    "decode-block-1": opened(decode_block_size=1),
    "windows-kept": opened(compress_windows=False),
    "windows-compressed": opened(compress_windows=True),
}
# Slots that are codes: laws hold in float64, where no rounding of what is coded decides between two of them.
CODED = {
    "8": opened(slot_bits=8),
    "8-4": opened(slot_bits=(8, 4)),
    "values": opened(slot_bits=(16, 8)),
    "keys": opened(slot_bits=(4, 16)),
    "slot": opened(num_slots=14, block_size=6, slot_bits=8, positions="slot"),
    "per-head": opened(slot_bits=8, slots_per_head=((24, 8), (6, 26))),
    "learned-slot": opened(slot_bits=8, score=FORESEEN, positions="slot"),
    "h2o": LoCoCoConfig.h2o(12, block_size=8, slot_bits=8),
    "centroids": LoCoCoConfig(
        *(16, 8, 1, 7, 5),
        score=FORESEEN,
        compressor="centroids",
        scaling="count",
        slots_per_head=((24, 8), (6, 26)),
        slot_bits=8,
    ),
}
# For tests that are dear, or do not touch what the others differ in: one of each way through the code.
FEW = ("open", "open-slot", "slots-per-head", "h2o", "learned")
LEARNED = tuple(name for name, config in CONFIGS.items() if config.score == FORESEEN)
# What is read does not depend on the lengths of the calls.
ANY_SPLIT = tuple(name for name, config in CONFIGS.items() if config.decode_block_size is None)
BLENDED = tuple(name for name, config in CONFIGS.items() if config.num_fused)


def few_quick(names=CONFIGS):
    """Parameters of a dear test: all but ``FEW`` of these configurations are left to ``make test-all``."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]
