"""The least that a measurement takes: work and memory counted from the model's sizes, and what the device can do.

Layers with a sliding window are counted as if they saw everything.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lococo.bench.meter import Meter
from lococo.bench.speed import open_block
from lococo.config import LoCoCoConfig
from lococo.models import base_config, base_shape, find_family
from lococo.prefill import token_bytes

ATTEMPTS = 10
# Bytes copied and side of the matrices, too large for any cache and fast to measure.
CPU_SIZES = (2**28, 2048)
GPU_SIZES = (2**31, 8192)


class Work(NamedTuple):
    """Arithmetic and memory traffic that cannot be avoided."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Least time on a device: arithmetic and traffic go on side by side."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def over(self, parts: int) -> Work:
        """The share of one of so many parts."""
        return Work(self.flops / parts, self.bytes / parts)


class Least(NamedTuple):
    """What something takes at the least.

    Attributes
    ----------
    tokens : int, optional
        That it is for, of all rows. None where it is no number of tokens.
    work : Work
    memory : int
        Bytes in use at once.
    """

    tokens: int | None
    work: Work
    memory: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Attributes
    ----------
    linear_parameters : int
        Weights of the matrices in the layers: every token is multiplied by each of them once.
    logit_parameters : int
        Weights of the matrix that gives the logits.
    weight_bytes : int
        Bytes of all weights that a token reads: all but the input embeddings, unless they give the logits too.
    model_bytes : int
        Bytes of all weights.
    element_size : int
        Bytes of a number.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    linear_parameters: int
    logit_parameters: int
    weight_bytes: int
    model_bytes: int
    element_size: int

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Sizes of an unpatched causal language model."""
        config = base_config(model).get_text_config()
        embeddings, logits = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        matrices = [parameter for parameter in find_family(model).decoder.parameters() if parameter.dim() > 1]
        model_bytes = sum(parameter.nbytes for parameter in model.parameters())
        return cls(
            **base_shape(model),
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            linear_parameters=sum(matrix.numel() for matrix in matrices) - embeddings.numel(),
            logit_parameters=logits.numel(),
            weight_bytes=model_bytes - (0 if embeddings is logits else embeddings.nbytes),
            model_bytes=model_bytes,
            element_size=embeddings.element_size(),
        )

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return 2 * self.head_dim * self.element_size

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's activations while a text is read."""
        queries, keys = (heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads))
        return token_bytes(self.hidden_size, self.intermediate_size, queries, keys, self.element_size)


def read_pairs(tokens: int, num_slots: int | None, block_size: int = 1, past: int = 0) -> int:
    """Pairs of a query and an entry it sees while tokens are read.

    Parameters
    ----------
    num_slots : int, optional
        None: the full cache.
    past : int
        Tokens read before, whole blocks.
    """
    if num_slots is None:
        return tokens * past + tokens * (tokens + 1) // 2
    pairs = 0
    for start in range(past, past + tokens, block_size):
        width = min(block_size, past + tokens - start)
        pairs += width * min(start, num_slots) + width * (width + 1) // 2
    return pairs


def read_work(sizes: Sizes, config: LoCoCoConfig | None, tokens: int, batch: int = 1) -> Work:
    """Reading a text for the logits of its last token."""
    flops = 2 * sizes.linear_parameters * tokens + 2 * sizes.logit_parameters + _read_attention(sizes, config, tokens)
    return Work(batch * flops, sizes.weight_bytes)


def segment_work(sizes: Sizes, config: LoCoCoConfig | None, tokens: int, past: int, batch: int = 1) -> Work:
    """One layer reading a block of tokens."""
    flops = 2 * sizes.linear_parameters * tokens + _read_attention(sizes, config, tokens, past)
    logit_bytes = sizes.logit_parameters * sizes.element_size
    return Work(batch * flops / sizes.num_layers, (sizes.weight_bytes - logit_bytes) / sizes.num_layers)


def decode_work(sizes: Sizes, config: LoCoCoConfig | None, past: int, batch: int = 1) -> Work:
    """One decoded token after ``past`` others, on average over an open block."""

    def entries(num_slots: int | None) -> float:
        return (past if num_slots is None else min(past, num_slots)) + (open_block(config) + 1) / 2

    weights = sizes.linear_parameters + sizes.logit_parameters
    flops = 2 * weights + _over_query_heads(sizes, config, lambda slots: 4 * sizes.head_dim * entries(slots))
    kv_bytes = sizes.entry_bytes * _over_kv_heads(sizes, config, entries)
    return Work(batch * flops, sizes.weight_bytes + batch * kv_bytes)


def train_work(sizes: Sizes, config: LoCoCoConfig | None, tokens: int, batch: int = 1, distills: bool = False) -> Work:
    """A training step through frozen matrices: forward, and backward to the activations alone.

    Parameters
    ----------
    distills : bool
        The full cache's predictions are computed too.
    """
    linear = 2 * (sizes.linear_parameters + sizes.logit_parameters) * tokens
    flops = 2 * linear + 3 * _read_attention(sizes, config, tokens)
    if distills:
        flops += linear + _read_attention(sizes, None, tokens)
    return Work(batch * flops, 2 * sizes.weight_bytes)


def cache_size(sizes: Sizes, config: LoCoCoConfig | None, tokens: int, batch: int = 1) -> int:
    """Bytes of keys and values after some tokens; a compressed cache is made for slots and open block at once."""

    def entries(num_slots: int | None) -> int:
        return tokens if config is None or num_slots is None else num_slots + config.block_size

    return int(batch * sizes.entry_bytes * _over_kv_heads(sizes, config, entries))


def read_memory(sizes: Sizes, config: LoCoCoConfig | None, tokens: int, batch: int = 1) -> int:
    """Least bytes in use while a text is read: weights, cache, and the widest activations of one layer."""
    at_once = tokens if config is None else min(tokens, config.block_size)
    return sizes.model_bytes + cache_size(sizes, config, tokens, batch) + at_once * batch * sizes.token_bytes


def decode_memory(sizes: Sizes, config: LoCoCoConfig | None, past: int, batch: int = 1) -> int:
    """Least bytes in use while a token is decoded. A full cache is made anew, layer by layer, to grow."""
    held = cache_size(sizes, config, past, batch)
    return sizes.model_bytes + held + (held // sizes.num_layers if config is None else 0)


def train_memory(
    sizes: Sizes, config: LoCoCoConfig | None, tokens: int, batch: int = 1, backprop_tokens: int | None = None
) -> int:
    """Least bytes in use in a training step: weights, and what is kept of every token for the backward."""
    kept = min(tokens, backprop_tokens or tokens) * batch
    per_layer = 3 * sizes.intermediate_size + 4 * sizes.hidden_size
    per_token = sizes.element_size * sizes.num_layers * per_layer + (sizes.element_size + 4) * sizes.vocab_size
    return sizes.model_bytes + kept * per_token


def _read_attention(sizes: Sizes, config: LoCoCoConfig | None, tokens: int, past: int = 0) -> float:
    block_size = 1 if config is None else config.block_size
    return _over_query_heads(
        sizes, config, lambda slots: 4 * sizes.head_dim * read_pairs(tokens, slots, block_size, past)
    )


def _over_query_heads(sizes: Sizes, config: LoCoCoConfig | None, function: Callable[[int | None], float]) -> float:
    return sizes.num_heads / sizes.num_kv_heads * _over_kv_heads(sizes, config, function)


def _over_kv_heads(sizes: Sizes, config: LoCoCoConfig | None, function: Callable[[int | None], float]) -> float:
    """Sum of a function of a head's slots over the KV heads of all layers."""
    every = sizes.num_layers * sizes.num_kv_heads
    heads: Counter[int | None] = Counter({None if config is None else config.num_slots: every})
    if config is not None and config.slots_per_head is not None:
        heads = Counter(slots for layer in config.slots_per_head for slots in layer or ())
    return sum(count * function(slots) for slots, count in heads.items())


@dataclasses.dataclass(frozen=True)
class Limits:
    """Best rates of a device, measured.

    Attributes
    ----------
    bytes_per_second : float
        Of a large copy, what is read and what is written both counted.
    flops_per_second : float
        Of a large matrix product in the dtype of the model.
    """

    bytes_per_second: float
    flops_per_second: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the limits of a device for a dtype."""
    copied, side = CPU_SIZES if device.type == "cpu" else GPU_SIZES
    return Limits(copy_rate(device, copied), product_rate(device, dtype, side))


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best_time(device, lambda: target.copy_(source))


def product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of the product of two square matrices."""
    left, right = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    out = torch.empty_like(left)
    return 2 * side**3 / _best_time(device, lambda: torch.mm(left, right, out=out))


def _best_time(device: torch.device, function: Callable[[], Any]) -> float:
    meter = Meter(device)
    for _ in range(ATTEMPTS + 1):
        with meter.lap():
            function()
    return min(meter.seconds()[1:])


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU or of the machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
