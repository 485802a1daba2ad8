"""What happens around a forward of the patched decoder: its cache, its plan, and long prompts in pieces."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lococo.attention import Call, lococo_attention
from lococo.cache import LoCoCoCache
from lococo.chunks import columns, prefill_chunk
from lococo.compat import OLD_CACHE_NAME, OUTPUT_CACHE, Cache, argument_names, cache_argument
from lococo.config import LoCoCoConfig
from lococo.models import base_shape
from lococo.models.chatglm import check_length, end_call, is_remote_chatglm, remote_arguments
from lococo.positions import RotaryTable, rotary_tables
from lococo.segments import Row, plan_call
from lococo.state import patched_decoder


@dataclasses.dataclass(frozen=True)
class Request:
    """What a caller inside the library asks of the decoder's hook.

    Attributes
    ----------
    cache : LoCoCoCache, optional
        Cache to read into, without the model handing it out.
    keep : int, optional
        Hidden states needed at the end of the text. None: all.
    call : Call, optional
        A call made already, for arguments that need no more preparation.
    is_chunk : bool
        Read at once, whatever the length.
    """

    cache: LoCoCoCache | None = None
    keep: int | None = None
    call: Call | None = None
    is_chunk: bool = False


@contextlib.contextmanager
def asking(model: nn.Module, request: Request) -> Iterator[None]:
    """Calls of a patched model inside a ``with`` block come with a request."""
    patch = patched_decoder(model).lococo_patch
    patch.request = request
    try:
        yield
    finally:
        patch.request = None


def ask_for_last_logits(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model around the decoder: ``logits_to_keep`` tells what the decoder may forget."""
    keep = kwargs.get("logits_to_keep")
    wanted = isinstance(keep, int) and keep > 0 and kwargs.get("labels") is None
    if not wanted or patched_decoder(model).lococo_patch.is_suspended:
        return None
    kwargs["lococo"] = Request(keep=keep)
    return args, kwargs


def before_forward(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the decoder: put a ``Call`` into its arguments, read a long prompt up to its last chunk.

    None while the patch is suspended.

    Raises
    ------
    ValueError
        For what a compressed cache cannot do: a foreign cache with content, a 4-D mask, packed sequences, attention
        matrices. For a compressed cache while the patch is suspended.
    """
    config: LoCoCoConfig = decoder.lococo_patch.config
    end_call(decoder)  # one that failed
    kwargs = _by_name(decoder, args, kwargs)
    if decoder.lococo_patch.is_suspended:
        name = cache_argument(decoder)
        if isinstance(kwargs.get(name), LoCoCoCache):
            raise ValueError(f"{name} is a LoCoCoCache; inside lococo.patch.suspended the cache is the full one")
        return None
    if isinstance(kwargs.get("attention_mask"), Mapping):  # one per type of layers, all as padding_mask made them
        kwargs["attention_mask"] = next(iter(kwargs["attention_mask"].values()), None)
    request = kwargs.pop("lococo", None) or decoder.lococo_patch.request or Request()
    if request.call is not None:
        return (), {**kwargs, "lococo": request.call}
    _refuse_unsupported(decoder, kwargs)
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return (), kwargs  # the model's own error says what is missing
    cache = request.cache or _cache_for(decoder, config, kwargs)
    earlier: list[torch.Tensor] = []
    chunk = None if request.is_chunk else _chunk(decoder, config, kwargs, tokens)
    if chunk is not None and chunk < tokens.shape[1]:
        if cache is None:
            cache = new_cache(decoder)
        last = min(tokens.shape[1], max(request.keep or 0, tokens.shape[1] % chunk or chunk))
        earlier = _read_up_to_last_chunk(decoder, chunk, last, cache, kwargs, tokens.shape[1], request.keep)
        tokens = tokens[:, -last:]
    batch, num_tokens = tokens.shape[:2]
    real = padded_columns(kwargs.get("attention_mask"), batch, num_tokens, cache)
    _check_state(cache, batch)
    rows = (Row(),) if cache is None else cache.rows
    plan = plan_call(rows, num_tokens, config, real, tokens.device)
    if config.positions == "slot":
        kwargs["position_ids"] = plan.entries
    elif kwargs.get("position_ids") is None:
        kwargs["position_ids"] = plan.places
    if cache is not None:
        cache.is_reading = True
    tables = _rotary_tables(decoder, config, cache, tokens.device)
    call = Call(config, plan, cache, tables, rows, real, earlier)
    if is_remote_chatglm(decoder):
        check_length(decoder, config.capacity if config.positions == "slot" else max(row.seen for row in plan.rows))
        return (), remote_arguments(decoder, kwargs, functools.partial(lococo_attention, lococo=call))
    return (), {**kwargs, "lococo": call}


def after_forward(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the decoder: the cache has read the call; put the chunks' hidden states together."""
    is_remote = is_remote_chatglm(decoder)
    attend = end_call(decoder)
    call = attend.keywords["lococo"] if attend else kwargs.get("lococo")
    if not isinstance(call, Call) or call.is_recorded:
        return output
    if call.cache is not None:
        call.cache.advance(call.plan, call.plan.places.shape[1])
        call.cache.is_reading = False
    if is_remote and call.cache is not None:  # which its code knows nothing of
        output = _with_cache(output, call.cache)
    if not call.earlier:
        return output
    tokens_dim = 0 if is_remote else 1
    if isinstance(output, tuple):
        return (torch.cat([*call.earlier, output[0]], dim=tokens_dim), *output[1:])
    output.last_hidden_state = torch.cat([*call.earlier, output.last_hidden_state], dim=tokens_dim)
    return output


def _with_cache(output: Any, cache: LoCoCoCache) -> Any:
    if isinstance(output, tuple):
        return (output[0], cache, *output[1:])
    setattr(output, OUTPUT_CACHE, cache)
    return output


def new_cache(decoder: Any) -> LoCoCoCache:
    """An empty cache for a patched decoder."""
    return LoCoCoCache(decoder.lococo_patch.config, base_shape(decoder)["num_layers"])


def _by_name(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    named = {**dict(zip(argument_names(type(decoder).forward), args, strict=False)), **kwargs}
    name = cache_argument(decoder)
    if OLD_CACHE_NAME in named and name not in named:
        named[name] = named.pop(OLD_CACHE_NAME)
    return named


def _refuse_unsupported(decoder: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or (
        kwargs.get("output_attentions") is None and getattr(decoder.config, "output_attentions", False)
    ):
        raise ValueError("output_attentions=True: a patched model never makes attention matrices; unpatch it for them")
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            "attention_mask must be 2-D (batch, tokens) with 1 for tokens and 0 for padding, got shape "
            f"{tuple(mask.shape)}"
        )
    position_ids, past = kwargs.get("position_ids"), kwargs.get(cache_argument(decoder))
    if position_ids is not None and position_ids.dim() != 2:
        raise ValueError(f"position_ids must be 2-D (batch, tokens), got shape {tuple(position_ids.shape)}")
    if position_ids is not None and mask is None and past is None and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids that start again inside a row (packed sequences) are not supported: give each text a row "
            "and pad it with an attention_mask"
        )


def _cache_for(decoder: Any, config: LoCoCoConfig, kwargs: dict[str, Any]) -> LoCoCoCache | None:
    name = cache_argument(decoder)
    given = kwargs.get(name)
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
    if isinstance(given, LoCoCoCache):
        num_layers = base_shape(decoder)["num_layers"]
        if given.config != config or len(given.layers) != num_layers:
            raise ValueError(
                f"{name} was made for {given.config} and {len(given.layers)} layers, the model is patched "
                f"with {config} and has {num_layers} layers"
            )
    elif given is not None and (not isinstance(given, Cache) or given.get_seq_length() > 0):
        raise ValueError(
            f"{name} is a {type(given).__name__} that already holds tokens; a patched model reads only its own "
            "LoCoCoCache: start without one, or unpatch the model"
        )
    if decoder.training and torch.is_grad_enabled():
        # The model would otherwise build a cache of its own, and checkpointing would run twice over ours.
        kwargs["use_cache"] = False
        if any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
            if isinstance(given, LoCoCoCache) and given.seen_tokens:
                raise ValueError(f"{name} cannot be used with gradient checkpointing: its layers run twice")
            kwargs[name] = None
            return None
        use_cache = False
    if given is None and not use_cache:
        return None
    cache = given if isinstance(given, LoCoCoCache) else new_cache(decoder)
    kwargs[name] = cache
    return cache


def _check_state(cache: LoCoCoCache | None, batch: int) -> None:
    if cache is None:
        return
    if cache.is_reading:
        raise ValueError("the last forward with this LoCoCoCache did not finish: call cache.reset() and start again")
    if cache.batch_size not in (-1, batch):
        raise ValueError(f"the cache holds {cache.batch_size} rows, the input has {batch}")


def padded_columns(
    mask: torch.Tensor | None, batch: int, num_tokens: int, cache: LoCoCoCache | None
) -> list[list[bool]] | None:
    """Which columns of a call are tokens (True) and which padding, row by row; None if all are tokens.

    Parameters
    ----------
    mask : torch.Tensor, optional
        (batch, tokens of the call, or of all calls), 0 for padding.

    Raises
    ------
    ValueError
        If the mask has another shape.
    """
    if mask is None:
        return None
    seen = 0 if cache is None else cache.seen_tokens
    if mask.shape[0] != batch or mask.shape[1] not in (num_tokens, seen + num_tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {seen + num_tokens}): "
            f"{seen} columns already read and {num_tokens} new ones"
        )
    real = mask[:, -num_tokens:].bool()
    if num_tokens == 1 and seen and real.is_cuda and cache is not None and not cache.ends_in_padding:
        # Decoding must not wait for the GPU; padding here would start in the middle of a text.
        torch._assert_async(real.all())
        return None
    has_padding = not bool(real.all())
    if cache is not None:
        cache.ends_in_padding = has_padding and not bool(real[:, -1].all())
    return real.tolist() if has_padding else None


def _chunk(decoder: Any, config: LoCoCoConfig, kwargs: dict[str, Any], tokens: torch.Tensor) -> int | None:
    """Tokens to read at once; None: all."""
    wants_hidden = kwargs.get("output_hidden_states")
    wants_hidden = decoder.config.output_hidden_states if wants_hidden is None else wants_hidden
    if torch.is_grad_enabled() or wants_hidden:
        return None
    if config.prefill_chunk_size is None and tokens.shape[1] > config.block_size:
        return prefill_chunk(decoder, config.block_size, tokens)
    return config.prefill_chunk_size


def _read_up_to_last_chunk(
    decoder: Any,
    chunk: int,
    last: int,
    cache: LoCoCoCache,
    kwargs: dict[str, Any],
    num_tokens: int,
    keep: int | None,
) -> list[torch.Tensor]:
    """Read all chunks but the last into the cache and leave ``kwargs`` with the last. Returns their hidden states."""
    stop = num_tokens - last
    seen, mask = cache.seen_tokens, kwargs.get("attention_mask")
    if mask is not None and mask.shape[1] == num_tokens:
        mask = torch.cat([mask.new_ones(mask.shape[0], seen), mask], dim=1)
    hidden = []
    for start in range(0, stop, chunk):
        end = min(start + chunk, stop)
        output = decoder(
            **{
                **kwargs,
                **columns(kwargs, slice(start, end)),
                "attention_mask": None if mask is None else mask[:, : seen + end],
                "return_dict": True,
                "lococo": Request(cache, is_chunk=True),
            }
        )
        if keep is None:
            hidden.append(output.last_hidden_state)
    kwargs.update(columns(kwargs, slice(stop, num_tokens)))
    if mask is not None:
        kwargs["attention_mask"] = mask
    return hidden


def _rotary_tables(
    decoder: Any, config: LoCoCoConfig, cache: LoCoCoCache | None, device: torch.device
) -> dict[int, RotaryTable | None]:
    if config.positions == "absolute":
        return {}
    tables = {} if cache is None else cache.rotary_tables
    if not tables:
        tables.update(rotary_tables(decoder, config, device))
    return tables
