"""The attention kernels a segment can run in, and the choice between them."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from lococo.kernels.trials import TRITON, AttendTrial
from lococo.registry import ATTENTIONS

HALF_TYPES = (torch.bfloat16, torch.float16)
# In float32 a program's tiles do not fit into registers.
TRITON_DTYPES = HALF_TYPES
TRITON_HEAD_DIM = 256
BIAS_CHANNELS = 8
# Earlier CPU kernels were not read for what they make of grouped queries.
HAS_GROUPED_LSE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


class LogitBias(NamedTuple):
    """What a query sees besides itself, and how its logits are changed.

    Attributes
    ----------
    mask : torch.Tensor, optional
        (batch, 1 or kv_heads, queries, entries), True where visible. None: lower-right causal, the last query sees
        every entry, the one before it all but the last, and so on.
    bias : torch.Tensor, optional
        (batch, kv_heads, entries), added to the logits of an entry.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)`` before mask and bias.
    """

    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    softcap: float | None = None


class KernelRequest(NamedTuple):
    """What decides which backend serves a call."""

    device: str
    dtype: torch.dtype
    head_dim: int
    is_masked: bool = False
    is_biased: bool = False
    is_softcapped: bool = False
    has_dropout: bool = False
    needs_gradient: bool = False


def best_backend(request: KernelRequest, has_triton: bool) -> str:
    """Backend of ``attention="auto"``.

    Torch's flash attention is as fast as any and gives its log-sum-exp away; a bias on the entries' logits is what
    Triton's kernel has over it on CUDA.
    """
    if not (has_triton and request.device == "cuda" and _is_for_triton(request.dtype, request.head_dim)):
        return "sdpa"
    if request.is_masked or request.is_softcapped or request.has_dropout or request.needs_gradient:
        return "sdpa"
    return "triton" if request.is_biased else "sdpa"


def triton_takes(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels without gradients run on a tensor of (batch, heads, tokens, head_dim)."""
    return _is_for_triton(tensor.dtype, tensor.shape[-1]) and _has_triton(tensor.device)


def _is_for_triton(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in TRITON_DTYPES and head_dim <= TRITON_HEAD_DIM


def _has_triton(device: torch.device) -> bool:
    # A compiled model is fused by torch.
    return TRITON.is_on and device.type == "cuda" and not torch.compiler.is_compiling() and _is_for_tiles(device)


@functools.cache
def _is_for_tiles(device: torch.device) -> bool:
    # Before Ampere the kernels' tiles do not fit.
    is_there = _is_installed("triton") and torch.version.cuda is not None
    return is_there and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.lru_cache(maxsize=8)
def lower_right(queries: int, entries: int, delay: int, device: torch.device) -> torch.Tensor:
    """(queries, entries), True where the query is at least ``delay`` after the entry when both end together."""
    return torch.ones(queries, entries, dtype=torch.bool, device=device).tril(entries - queries - delay)


@functools.lru_cache(maxsize=8)
def _lower_right_bias(queries: int, entries: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return _as_bias(lower_right(queries, entries, 0, device), dtype)


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that probabilities are summed in."""
    return torch.promote_types(dtype, torch.float32)


def _auto(query, key, value, scale, logit_bias, dropout, wants_lse):
    request = KernelRequest(
        device=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        is_masked=logit_bias.mask is not None,
        is_biased=logit_bias.bias is not None,
        is_softcapped=logit_bias.softcap is not None,
        has_dropout=dropout > 0,
        needs_gradient=_needs_gradient(query, key, value, logit_bias.bias),
    )
    backend = ATTENTIONS[best_backend(request, _has_triton(query.device))]
    return backend(query, key, value, scale, logit_bias, dropout, wants_lse)


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _eager(query, key, value, scale, logit_bias, dropout, wants_lse):
    queries, entries = query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (batch, kv_heads, groups * queries, head_dim)
    logits = (grouped @ key.transpose(-1, -2)) * scale
    if logit_bias.softcap is not None:
        logits = logit_bias.softcap * torch.tanh(logits / logit_bias.softcap)
    if logit_bias.bias is not None:
        logits = logits + logit_bias.bias[:, :, None].to(logits.dtype)
    logits = logits.unflatten(2, (-1, queries))
    if logit_bias.mask is not None:
        logits = logits.masked_fill(~logit_bias.mask[:, :, None], float("-inf"))
    elif queries > 1:
        logits = logits.masked_fill(~lower_right(queries, entries, 0, query.device), float("-inf"))
    probabilities = F.dropout(logits.softmax(dim=-1, dtype=wide(query.dtype)), dropout).to(value.dtype)
    return (probabilities @ value[:, :, None]).flatten(1, 2), None


def _sdpa(query, key, value, scale, logit_bias, dropout, wants_lse):
    if logit_bias.softcap is not None:
        return _eager(query, key, value, scale, logit_bias, dropout, wants_lse)
    head_dim, queries, entries = query.shape[-1], query.shape[2], key.shape[2]
    if logit_bias.bias is not None:
        query, key, value = _with_bias_channel(query, key, value, logit_bias.bias, scale)
    mask = logit_bias.mask
    groups = query.shape[1] // key.shape[1]
    if mask is not None:
        mask = mask.repeat_interleave(groups, dim=1) if mask.shape[1] > 1 else mask
    if wants_lse and not dropout and not torch.is_grad_enabled():
        output, lse = _flash_with_lse(query, key, value, scale, mask)
        if output is not None:
            return output[..., :head_dim], lse
    if mask is None and queries > 1:
        mask = _causality(queries, entries, query.device)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=groups > 1
    )
    return output[..., :head_dim], None


def _causality(queries: int, entries: int, device: torch.device) -> torch.Tensor:
    """Lower-right causality as ``F.scaled_dot_product_attention`` takes it on a device."""
    # Kernels other than CUDA's take it only as a mask; ours is kept, not rebuilt each call.
    if device.type == "cuda":
        try:
            return causal_lower_right(queries, entries)
        except RuntimeError:  # torch cannot make one while a dispatch mode (a counter of operations) is on
            pass
    return lower_right(queries, entries, 0, device)


def _flash_with_lse(query, key, value, scale, mask):
    """Output and log-sum-exp of torch's own flash kernels; (None, None) where they do not take the call."""
    queries, entries, is_grouped = query.shape[2], key.shape[2], query.shape[1] != key.shape[1]
    # One query: the few operations of a softmax cost less than they would save.
    in_order = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    if queries == 1 or not in_order or (is_grouped and not HAS_GROUPED_LSE):
        return None, None
    if query.device.type == "cpu":
        if mask is None:
            bias = _lower_right_bias(queries, entries, query.device, query.dtype)
        else:
            bias = _as_bias(mask, query.dtype)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, attn_mask=bias, scale=scale)
    if query.device.type == "cuda" and mask is None and query.shape[-1] % 8 == 0:
        from torch.backends.cuda import SDPAParams, can_use_flash_attention

        # Asked about is_causal, torch answers for the upper-left causality of F.scaled_dot_product_attention; that of
        # the operator below is lower-right.
        if can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, is_grouped)):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, True, scale=scale)[:2]
    return None, None


def _with_bias_channel(query, key, value, bias, scale):
    """A bias on the logits as one more channel of q (constant) and k (the bias), padded to a multiple of 8."""
    constant = query.new_ones(*query.shape[:-1], 1)
    query = F.pad(torch.cat([query, constant], dim=-1), (0, BIAS_CHANNELS - 1))
    key = F.pad(torch.cat([key, (bias / scale).to(key.dtype)[..., None]], dim=-1), (0, BIAS_CHANNELS - 1))
    return query, key, F.pad(value, (0, BIAS_CHANNELS))


def _flash_attention_2(query, key, value, scale, logit_bias, dropout, wants_lse):
    _check_installed("flash_attention_2", "flash_attn.flash_attn_interface", "flash-attn", "lococo[flash]")
    if not _is_for_flash(query, logit_bias, most_channels=256):
        return _sdpa(query, key, value, scale, logit_bias, dropout, wants_lse)
    from flash_attn import flash_attn_func

    head_dim = query.shape[-1]
    if logit_bias.bias is not None:
        query, key, value = _with_bias_channel(query, key, value, logit_bias.bias, scale)
    with_lse = wants_lse and not dropout
    result = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        softcap=logit_bias.softcap or 0.0,
        return_attn_probs=with_lse,
    )
    output, lse = result[:2] if with_lse else (result, None)
    return output.transpose(1, 2)[..., :head_dim], lse


def _is_for_flash(query: torch.Tensor, logit_bias: LogitBias, most_channels: int) -> bool:
    channels = query.shape[-1] + (0 if logit_bias.bias is None else BIAS_CHANNELS)
    return logit_bias.mask is None and query.dtype in HALF_TYPES and channels <= most_channels


def _flash_attention_4(query, key, value, scale, logit_bias, dropout, wants_lse):
    _check_installed("flash_attention_4", "flash_attn.cute", "flash-attn-4", "--pre flash-attn-4")
    _refuse_dropout("flash_attention_4", dropout)
    if not _is_for_flash(query, logit_bias, most_channels=128):  # where Blackwell's kernels end
        return _sdpa(query, key, value, scale, logit_bias, dropout, wants_lse)
    from flash_attn.cute import flash_attn_func

    head_dim = query.shape[-1]
    if logit_bias.bias is not None:
        query, key, value = _with_bias_channel(query, key, value, logit_bias.bias, scale)
    result = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        softmax_scale=scale,
        causal=True,
        softcap=logit_bias.softcap or 0.0,
        return_lse=wants_lse,
    )
    output, lse = result if isinstance(result, tuple) else (result, None)
    return output.transpose(1, 2)[..., :head_dim], lse


def _triton(query, key, value, scale, logit_bias, dropout, wants_lse):
    _check_installed("triton", "triton", "triton", "triton")
    if query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("attention='triton' needs a GPU, the model is on cpu; use 'auto' or 'sdpa'")
    mask, bias, softcap = logit_bias
    is_for_torch = mask is not None or softcap is not None or dropout or _needs_gradient(query, key, value, bias)
    result = None
    if not is_for_torch and _is_for_triton(query.dtype, query.shape[-1]) and not torch.compiler.is_compiling():
        groups = query.shape[1] // key.shape[1]
        trial = AttendTrial(query.device, query.dtype, query.shape[-1], groups, is_biased=bias is not None)
        result = TRITON.run(trial, query, key, value, scale, bias)
    return _sdpa(query, key, value, scale, logit_bias, dropout, wants_lse) if result is None else result


@functools.cache
def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_installed(backend: str, module: str, package: str, requirement: str) -> None:
    if not _is_installed(module):
        raise ImportError(f"attention='{backend}' needs the package {package}: pip install {requirement}")


def _refuse_dropout(backend: str, dropout: float) -> None:
    if dropout:
        raise ValueError(f"attention='{backend}' has no dropout, the model asks for {dropout}; use 'sdpa'")


def _check(attention: Any) -> None:
    if not callable(attention):
        raise TypeError(f"an attention must be a function, got {attention!r}")


def register_attention(name: str) -> Callable[[Callable], Callable]:
    """Decorator that registers an attention kernel for ``patch_model(model, attention=name)``.

    The function takes query (batch, heads, queries, head_dim), key and value (batch, kv_heads, entries, head_dim), all
    of one dtype, scale, a ``LogitBias``, dropout, and whether the log-sum-exp is wanted. It returns the output, shaped
    like the query, and the (batch, heads, queries) log-sum-exp of the logits, or None if that is not wanted or not
    known. A step of decoding is a call with one query per row.

    Raises
    ------
    TypeError
        If it is not a function.
    ValueError
        If the name is taken by another kernel.
    """
    return ATTENTIONS.register(name, _check)


_LIBRARY: dict[str, Callable] = {
    "auto": _auto,
    "sdpa": _sdpa,
    "eager": _eager,
    "triton": _triton,
    "flash_attention_2": _flash_attention_2,
    "flash_attention_4": _flash_attention_4,
}
for _name, _function in _LIBRARY.items():
    register_attention(_name)(_function)


def step_kernel(name: str) -> Callable | None:
    """The kernel for tokens that come one by one; None for the library's own names.

    Those leave a step to torch operations that a CUDA graph can record, in ``DecodeBuffers``.
    """
    return None if name in _LIBRARY else ATTENTIONS[name]
