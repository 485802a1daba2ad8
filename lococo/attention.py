"""One segment after another: attend, score, compress (Algorithm 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from lococo.cache.cache import LayerCache
from lococo.cache.memory import Memory
from lococo.cache.plan import Plan, RaggedSegment, Segment
from lococo.compat import AttentionInterface, AttentionMaskInterface
from lococo.compression.base import Compressor
from lococo.config import LoCoCoConfig
from lococo.context import ForwardContext
from lococo.kernels import scoring as kernels
from lococo.masks import padding_mask, window_of
from lococo.models.rotary import RotaryTable

NAME = "lococo"


@torch.compiler.disable
def lococo_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    lococo: ForwardContext | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of patched models, registered as ``"lococo"``.

    Positional arguments come in the order of Transformers' own functions: libraries wrap whatever is registered. A
    compiled model calls it between its graphs: segments differ from call to call, and would each be compiled anew.

    Parameters
    ----------
    query : torch.Tensor
        (batch, heads, tokens, head_dim), rotated.
    key, value : torch.Tensor
        (batch, kv_heads, tokens, head_dim), keys rotated.
    lococo : ForwardContext
        Put in by the hook on the decoder.

    Returns
    -------
    tuple
        (batch, tokens, heads, head_dim), and None for the attention matrix that is never made.
    """
    if lococo is None:
        raise ValueError(
            f"{type(module).__name__} was called outside the forward of the model that lococo.patch_model patched: a "
            f"model that asks for attention {NAME!r}, or was made from the config of a patched decoder, must be "
            "patched itself, or be given another attn_implementation"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError(f"{type(module).__name__} was called with is_causal=False: a patched model reads causally")
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks (s_aux), which lococo does not support")
    window = window_of(attention_mask, sliding_window, type(module).__name__)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    head = getattr(module, "lococo_head", None)
    rotary = lococo.rotary_tables.get(module.layer_idx)
    # A sliding-window layer keeps what its window sees and has nothing to fuse.
    fusing = head if window is None else None
    layer = lococo.layer(module.layer_idx, window)
    plan_for = functools.partial(lococo.plan_for, device=query.device)
    dtype, kernel = query.dtype, lococo.attention
    query, key, value = _of_one_kind(layer, query, key, value)
    # Under autocast places in the text, scores and weights of blends would be rounded to half precision.
    with kernels.without_autocast(query.device.type):
        output = read_layer(layer, plan_for, query, key, value, scale, fusing, rotary, dropout, softcap, kernel)
        if head is not None and torch.is_grad_enabled():
            output = _with_zero_gradients(output, head)
    return output.to(dtype).transpose(1, 2).contiguous(), None


def _of_one_kind(layer: LayerCache, *states: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values in one dtype: that of what the layer holds, else the one autocast would attend in.

    What a layer holds is brought to their device, for a cache that was loaded or moved.
    """
    device, held = states[0].device, layer.held
    if held is not None:
        if held.device != device:
            layer.to(device)
        return [tensor.to(held.dtype) for tensor in states]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in states))
    if kernels.is_autocast(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    return [tensor.to(dtype) for tensor in states]


def read_layer(
    layer: LayerCache,
    plan_for: Callable[[LoCoCoConfig], Plan],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    head: Compressor | None = None,
    rotary: RotaryTable | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    kernel: str = "auto",
) -> torch.Tensor:
    """Attention of one layer over what it remembers, each group of heads over its own memory.

    Parameters
    ----------
    layer : LayerCache
        Holds the tokens afterwards.
    plan_for : callable
        Plan of the call for heads with a config.
    query : torch.Tensor
        (batch, heads, tokens, head_dim), rotated.
    key, value : torch.Tensor
        (batch, kv_heads, tokens, head_dim), keys rotated.
    kernel : str
        Name of the attention kernel.

    Returns
    -------
    torch.Tensor
        (batch, heads, tokens, head_dim).
    """

    def reader(memory: Memory) -> _Reader:
        return _Reader(memory.config, plan_for(memory.config), memory, head, rotary, scale, dropout, softcap, kernel)

    is_in_place = not torch.is_grad_enabled()
    if is_in_place and not layer.buffers():
        layer.make_buffers(query, key, value)
    plan = plan_for(layer.config)
    if is_in_place and plan.is_step and softcap is None and dropout == 0.0:
        output = layer.read_step(query, key, value, plan_for, head, scale)
        if plan.ends_block:
            layer.close(plan_for, head, rotary)
        return output
    if not layer.is_split:
        return reader(layer.groups[0][0]).read(query, key, value)
    # Slices, so that no index is uploaded.
    by_head = [tensor.chunk(key.shape[1], dim=1) for tensor in (query, key, value)]
    outputs: list[torch.Tensor] = [query] * key.shape[1]
    for memory, heads in layer.groups:
        output = reader(memory).read(*(_of_heads(parts, heads) for parts in by_head))
        for index, part in zip(heads, output.chunk(len(heads), dim=1) if len(heads) > 1 else [output], strict=True):
            outputs[index] = part
    return torch.cat(outputs, dim=1)


def _of_heads(parts: Sequence[torch.Tensor], heads: Sequence[int]) -> torch.Tensor:
    return parts[heads[0]] if len(heads) == 1 else torch.cat([parts[head] for head in heads], dim=1)


def _with_zero_gradients(output: torch.Tensor, head: Compressor) -> torch.Tensor:
    """Distributed training wants a gradient for every parameter, also where a text or a layer had nothing to fuse."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad and not parameter.is_meta]
    if not trained:
        return output
    # A sum of half-precision weights may overflow, and 0 * inf is no zero.
    nothing = torch.stack([0.0 * parameter.sum(dtype=torch.float32) for parameter in trained]).sum()
    return output + nothing.to(output.dtype)


@dataclasses.dataclass
class _Reader:
    config: LoCoCoConfig
    plan: Plan
    memory: Memory
    head: Compressor | None
    rotary: RotaryTable | None
    scale: float
    dropout: float
    softcap: float | None
    kernel: str

    def read(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) attention output of a call; the memory holds its tokens afterwards."""
        tokens = self.memory.tokens(query, key, value, self.plan, self.rotary)
        parts = []
        for segment in self.plan.segments:
            self.memory.append(segment, tokens)
            parts.append(self._attend(segment, segment.take(query)))
            self.memory.close(segment, self.head, self.rotary)
        return self.plan.assemble(parts, query)

    def _attend(self, segment: Segment, query: torch.Tensor) -> torch.Tensor:
        keys, values = self.memory.keys[:, :, : segment.stop], self.memory.values[:, :, : segment.stop]
        visibility = kernels.Visibility(
            self._mask(segment), self.memory.mass_bias(self.head, segment.stop), self.softcap
        )
        if self.memory.entries.scores is None:
            return kernels.attend(query, keys, values, self.scale, visibility, self.kernel, self.dropout)
        output, lse = kernels.attend_and_lse(query, keys, values, self.scale, visibility, self.kernel, self.dropout)
        with torch.no_grad():
            counts, delay = self._counts(segment)
            squared = self.config.score_power == 2
            received = kernels.attention_mass(query, keys, self.scale, visibility, counts, squared, lse, delay)
            self.memory.entries.scores[:, :, : segment.stop] += received
        return output

    def _mask(self, segment: Segment) -> torch.Tensor | None:
        mask = segment.visible() if isinstance(segment, RaggedSegment) else None
        window = self.memory.window
        if window is None or max(row.seen for row in self.plan.rows) <= window:
            return mask
        born = cast(torch.Tensor, self.memory.entries.born)[:, :, None, : segment.stop]
        births = segment.take(self.plan.places[:, None, :, None].expand(born.shape[0], 1, -1, 1))
        in_window = births - born < window  # (batch, kv_heads, width, stop)
        if mask is None:
            mask = kernels.lower_right(segment.width, segment.stop, 0, born.device)
        return mask & in_window

    def _counts(self, segment: Segment) -> tuple[torch.Tensor | None, int]:
        """Which attention counts for scores, as ``kernels.attention_mass`` takes it.

        Returns
        -------
        tuple
            (batch, 1, width, stop), True where a query's attention to an entry counts, or None; and a delay.
        """
        delay = self.config.score_delay
        if isinstance(segment, RaggedSegment):
            return segment.visible(delay) & segment.queries()[..., None], 0
        return None, delay


AttentionInterface.register(NAME, lococo_attention)
AttentionMaskInterface.register(NAME, padding_mask)
