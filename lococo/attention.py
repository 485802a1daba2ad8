"""One segment after another: compress what is full, write, attend, score (Algorithm 2)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from lococo.cache.buffers import KVBuffer, LayerModules, TokenStates
from lococo.cache.layer import LayerCache, heads_of
from lococo.cache.plan import Plan, RaggedSegment, Segment
from lococo.compat import AttentionInterface, AttentionMaskInterface
from lococo.compression.base import Compressor
from lococo.config import LoCoCoConfig
from lococo.context import ForwardContext
from lococo.kernels import scoring
from lococo.kernels.attention import LogitBias, lower_right, step_kernel
from lococo.masks import padding_mask, window_of

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
    layer = lococo.layer(module.layer_idx, window)
    head, rotary = getattr(module, "lococo_head", None), lococo.rotary_tables.get(module.layer_idx)
    # A sliding-window layer keeps what its window sees: nothing is fused, and nothing need be foreseen.
    modules = (None, None) if window is not None else (head, getattr(module, "lococo_score", None))
    reading = LayerReading(
        plan_for=functools.partial(lococo.plan_for, device=query.device),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        modules=LayerModules(*modules, rotary),
        dropout=dropout,
        softcap=softcap,
        kernel=lococo.attention,
    )
    dtype = query.dtype
    query, key, value = _of_one_kind(layer, query, key, value)
    # Under autocast places in the text, scores and weights of blends would be rounded to half precision.
    with scoring.without_autocast(query.device.type):
        output = read_layer(layer, reading, query, key, value)
        if head is not None and torch.is_grad_enabled():
            output = _with_zero_gradients(output, head)
    return output.to(dtype).transpose(1, 2).contiguous(), None


def _of_one_kind(layer: LayerCache, *states: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values in one dtype: that of what the layer holds, else the one autocast would attend in.

    What a layer holds is brought to their device, for a cache that was loaded or moved.
    """
    device, held = states[0].device, layer.entries
    if held is not None:
        if held.values.device != device:
            layer.to(device)
        return [tensor.to(layer.dtype) for tensor in states]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in states))
    if scoring.is_autocast(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    return [tensor.to(dtype) for tensor in states]


@dataclasses.dataclass(frozen=True)
class LayerReading:
    """How a layer reads a call.

    Attributes
    ----------
    plan_for : callable
        Plan of the call for heads with a config.
    scale : float
        Factor on ``query @ key``.
    modules : LayerModules
        What the layer computes its memory with.
    softcap : float, optional
        As in ``LogitBias``.
    kernel : str
        A name given to ``lococo.register_attention``.
    """

    plan_for: Callable[[LoCoCoConfig], Plan]
    scale: float
    modules: LayerModules = LayerModules()
    dropout: float = 0.0
    softcap: float | None = None
    kernel: str = "auto"


def read_layer(
    layer: LayerCache, reading: LayerReading, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attention of one layer over what it remembers, each group of heads over its own entries.

    Parameters
    ----------
    layer : LayerCache
        Holds the tokens afterwards.
    query : torch.Tensor
        (batch, heads, tokens, head_dim), rotated.
    key, value : torch.Tensor
        (batch, kv_heads, tokens, head_dim), keys rotated.

    Returns
    -------
    torch.Tensor
        (batch, heads, tokens, head_dim).
    """
    if layer.entries is None:
        layer.make_buffers(query, key, value, reading.modules.network)
    is_plain = reading.softcap is None and reading.dropout == 0.0
    if is_plain and not torch.is_grad_enabled() and reading.plan_for(layer.config).is_step:
        attend = step_kernel(reading.kernel)
        return layer.step(query, key, value, reading.plan_for, reading.modules, reading.scale, attend)
    plan = reading.plan_for(layer.config)
    buffers = layer.begin_call(plan, reading.modules)
    states = layer.states(key, value, plan, reading.modules)
    if len(buffers) == 1:
        output = _GroupReader(reading, buffers[0]).read(query, states)
    else:
        output = _read_groups(reading, buffers, query, states)
    layer.end_call(buffers)
    return output


def _read_groups(
    reading: LayerReading, buffers: Sequence[KVBuffer], query: torch.Tensor, states: TokenStates
) -> torch.Tensor:
    num_kv_heads = states.key.shape[1]
    grouped = query.unflatten(1, (num_kv_heads, -1))
    outputs: list[torch.Tensor] = [query] * num_kv_heads
    for buffer in buffers:
        heads = buffer.group.heads
        of_heads = functools.partial(heads_of, heads=heads)
        output = _GroupReader(reading, buffer).read(of_heads(grouped).flatten(1, 2), states.map(of_heads))
        for index, part in zip(heads, output.chunk(len(heads), dim=1), strict=True):
            outputs[index] = part
    return torch.cat(outputs, dim=1)


def _with_zero_gradients(output: torch.Tensor, head: Compressor) -> torch.Tensor:
    """Distributed training wants a gradient for every parameter, also where a text or a layer had nothing to fuse."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad and not parameter.is_meta]
    if not trained:
        return output
    # A sum of half-precision weights may overflow, and 0 * inf is no zero.
    nothing = torch.stack([0.0 * parameter.sum(dtype=torch.float32) for parameter in trained]).sum()
    return output + nothing.to(output.dtype)


class _GroupReader:
    """One segment after another over the entries of one group of heads."""

    def __init__(self, reading: LayerReading, buffer: KVBuffer) -> None:
        self.reading, self.buffer = reading, buffer
        self.plan = reading.plan_for(buffer.config)

    def read(self, query: torch.Tensor, states: TokenStates) -> torch.Tensor:
        """(batch, heads, tokens, head_dim) attention output of a call; the buffer holds its tokens afterwards."""
        tokens = self.buffer.tokens(query, states, self.plan)
        parts = []
        for segment in self.plan.segments:
            self.buffer.close_block(segment, self.reading.modules)
            self.buffer.write(segment, tokens)
            parts.append(self._attend(segment, segment.take(query)))
        return self.plan.assemble(parts, query)

    def _attend(self, segment: Segment, query: torch.Tensor) -> torch.Tensor:
        """(batch, heads, width, head_dim); the attention that entries receive is added to their scores."""
        reading, buffer, stop = self.reading, self.buffer, segment.stop
        keys, values = buffer.keys[:, :, :stop], buffer.values[:, :, :stop]
        bias = LogitBias(self._mask(segment), buffer.mass_bias(reading.modules.head, stop), reading.softcap)
        call = (query, keys, values, reading.scale, bias, reading.kernel, reading.dropout)
        if buffer.entries.scores is None:
            return scoring.attend(*call)
        counts, delay = self._counts(segment)
        squared = buffer.config.score_power == 2
        if scoring.computes_at_once(query, reading.dropout, reading.kernel):
            asked = (counts, squared, delay)
            output, received = scoring.attend_and_score(query, keys, values, reading.scale, bias, *asked)
        else:
            output, lse = scoring.attend_and_lse(*call)
            with torch.no_grad():
                received = scoring.attention_mass(query, keys, reading.scale, bias, counts, squared, lse, delay)
        with torch.no_grad():
            buffer.entries.scores[:, :, :stop] += received
        return output

    def _mask(self, segment: Segment) -> torch.Tensor | None:
        mask = segment.visible() if isinstance(segment, RaggedSegment) else None
        window = self.buffer.window
        if window is None or max(row.seen for row in self.plan.rows) <= window:
            return mask
        position = cast(torch.Tensor, self.buffer.entries.position)[:, :, None, : segment.stop]
        of_query = segment.take(self.plan.positions[:, None, :, None].expand(position.shape[0], 1, -1, 1))
        in_window = of_query - position < window  # (batch, kv_heads, width, stop)
        if mask is None:
            mask = lower_right(segment.width, segment.stop, 0, position.device)
        return mask & in_window

    def _counts(self, segment: Segment) -> tuple[torch.Tensor | None, int]:
        """Which attention counts for scores, as ``attention_mass`` takes it.

        Returns
        -------
        tuple
            (batch, 1, width, stop), True where a query's attention to an entry counts, or None; and a delay.
        """
        delay = self.buffer.config.score_delay
        if isinstance(segment, RaggedSegment):
            return segment.visible(delay) & segment.queries()[..., None], 0
        return None, delay


AttentionInterface.register(NAME, lococo_attention)
AttentionMaskInterface.register(NAME, padding_mask)
