"""What the attention layers of an unpatched model see: queries, keys and values, and how much their outputs matter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from lococo.attention import LayerReading, read_layer
from lococo.cache.buffers import LayerModules
from lococo.cache.layer import LayerCache
from lococo.cache.plan import Plan, RowState, plan_call
from lococo.compat import AttentionInterface, AttentionMaskInterface
from lococo.compression.base import Compressor
from lococo.config import LoCoCoConfig
from lococo.kernels import scoring as kernels
from lococo.masks import padding_mask
from lococo.models import Family, find_family
from lococo.models.changes import Changes
from lococo.state import is_patched
from lococo.training.frozen import modes_kept

NAME = "lococo_record"


@dataclasses.dataclass
class LayerRecord:
    """One attention layer over one text.

    Attributes
    ----------
    query : torch.Tensor
        (batch, heads, tokens, head_dim), rotated.
    key, value : torch.Tensor
        (batch, kv_heads, tokens, head_dim), keys rotated.
    output : torch.Tensor
        (batch, heads, tokens, head_dim), the full cache's, before the output projection.
    scale : float
        Factor on ``query @ key``.
    window : int, optional
        Tokens a query sees, where the model limits them.
    softcap : float, optional
        As in ``lococo.kernels.scoring.LogitBias``.
    gradient : torch.Tensor, optional
        Of the text's summed next-token loss, shaped like ``output``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None
    gradient: torch.Tensor | None = None


def record(model: PreTrainedModel, input_ids: torch.Tensor, *, gradients: bool = False) -> dict[int, LayerRecord]:
    """Run a text through an unpatched model and keep what every attention layer sees.

    Parameters
    ----------
    input_ids : torch.Tensor
        (batch, tokens), without padding.
    gradients : bool
        Also keep the gradient of the next-token loss, summed over tokens, at every layer's output.

    Returns
    -------
    dict of int to LayerRecord
        By layer index, detached.

    Raises
    ------
    ValueError
        If the model is patched, or of a kind that cannot be patched.
    """
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is patched: record reads the full cache, call unpatch_model first")
    records: dict[int, LayerRecord] = {}
    with recording(model, records.__setitem__), torch.set_grad_enabled(gradients):
        input_ids = input_ids.to(model.device)
        logits = model(input_ids, use_cache=False).logits
        if gradients:
            outputs = [entry.output for entry in records.values()]
            gradients_of = torch.autograd.grad(logits, outputs, _cross_entropy_gradient(logits, input_ids))
            for entry, gradient in zip(records.values(), gradients_of, strict=True):
                entry.gradient = gradient
    return {index: _detached(entry) for index, entry in records.items()}


@torch.no_grad()
def _cross_entropy_gradient(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed next-token loss at the logits: in one piece of their size, where autograd takes three."""
    gradient = logits.float().softmax(dim=-1)
    targets = input_ids[:, 1:, None]
    gradient[:, :-1].scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=gradient.dtype))
    gradient[:, -1] = 0  # nothing follows the last token
    return gradient.to(logits.dtype)


@contextlib.contextmanager
def recording(model: PreTrainedModel, keep: Callable[[int, LayerRecord], None]) -> Iterator[None]:
    """Forwards of an unpatched model inside a ``with`` block hand over what each layer sees, frozen and in eval mode.

    Parameters
    ----------
    keep : callable
        Called with a layer's index and record as soon as it has attended.
    """
    family, changes = find_family(model), Changes()
    attend = functools.partial(_recording_attention, lococo_keep=keep)
    try:
        family.install(changes, model, NAME)
        hand_over = functools.partial(_hand_over, family, attend)
        changes.hooks.append(family.decoder.register_forward_pre_hook(hand_over, with_kwargs=True))
        with modes_kept(model):
            model.requires_grad_(False).eval()
            yield
    finally:
        family.finish()
        changes.undo()


def _hand_over(
    family: Family, attend: functools.partial, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    return args, family.arguments(kwargs, attend)


def _recording_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    lococo_keep: Callable[[int, LayerRecord], None],
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Full attention, registered as ``"lococo_record"``, that hands its inputs and output over."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = full_attention(query, key, value, scale, sliding_window, softcap)
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()  # the first layer: nothing before it has a gradient
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    lococo_keep(layer_idx, LayerRecord(query, key, value, output, scale, sliding_window, softcap))
    return output.transpose(1, 2).contiguous(), None


def full_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention over all tokens, of a window of them where there is one. Shapes as in ``LayerRecord``."""
    tokens, mask = query.shape[2], None
    if window is not None and tokens > window:
        position = torch.arange(tokens, device=query.device)
        distance = position[:, None] - position
        mask = ((distance >= 0) & (distance < window))[None, None]
    elif softcap is None:
        # The kernel that knows causality by itself: with a mask, a CPU holds all probabilities for the backward.
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return kernels.attend(query, key, value, scale, kernels.LogitBias(mask, None, softcap))


class RecordedFeatures:
    """In the place of a score's network: the features that it made of the recorded tokens.

    Parameters
    ----------
    features : torch.Tensor
        (batch, kv_heads, tokens, num_features).
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.features, self.num_features = features, features.shape[-1]

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The same, whatever the keys and values."""
        return self.features


def compressed_output(
    entry: LayerRecord,
    config: LoCoCoConfig,
    layer_idx: int = 0,
    head: Compressor | None = None,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output of the recorded layer over a compressed cache, shaped like ``LayerRecord.output``; differentiable.

    Parameters
    ----------
    features : torch.Tensor, optional
        (batch, kv_heads, tokens, num_features), for a learned score. None: those of a new one.
    """

    @functools.cache
    def plan_for(head_config: LoCoCoConfig) -> Plan:
        return plan_call((RowState(),), entry.query.shape[2], head_config, device=entry.query.device)

    layer = LayerCache(config, layer_idx)
    layer.set_window(entry.window)
    modules = LayerModules()
    if entry.window is None:
        modules = LayerModules(head, None if features is None else RecordedFeatures(features))
    reading = LayerReading(plan_for, entry.scale, modules, softcap=entry.softcap)
    return read_layer(layer, reading, entry.query, entry.key, entry.value)


def fisher_error(output: torch.Tensor, entry: LayerRecord) -> torch.Tensor:
    """Error of an attention output in the metric of the loss' Fisher information: along the loss' gradient, squared.

    The sum over tokens and heads is twice the rise of the loss to second order, with the empirical Fisher information
    for the curvature and every head and token by itself.

    Parameters
    ----------
    output : torch.Tensor
        (batch, heads, tokens, head_dim), of a compressed cache.

    Returns
    -------
    torch.Tensor
        (batch, heads, tokens).
    """
    assert entry.gradient is not None, "record(..., gradients=True)"
    wide = torch.promote_types(output.dtype, torch.float32)  # squares of small numbers vanish in half precision
    return ((output - entry.output).to(wide) * entry.gradient.to(wide)).sum(dim=-1).square()


def _detached(entry: LayerRecord) -> LayerRecord:
    parts = {field: getattr(entry, field).detach() for field in ("query", "key", "value", "output")}
    return dataclasses.replace(entry, **parts)


AttentionInterface.register(NAME, _recording_attention)
AttentionMaskInterface.register(NAME, padding_mask)
