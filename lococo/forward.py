"""What happens around a forward of the patched decoder: its cache, its plan, and long prompts in pieces."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lococo.attention import NAME, Call, lococo_attention
from lococo.cache.cache import LoCoCoCache
from lococo.cache.plan import RowState, plan_call
from lococo.chunks import columns, prefill_chunk
from lococo.compat import OLD_CACHE_NAME, OUTPUT_CACHE, Cache, argument_names, cache_argument
from lococo.config import LoCoCoConfig
from lococo.masks import PaddingMask
from lococo.models import base_shape
from lococo.models.chatglm.family import check_length, end_call, is_remote_chatglm, remote_arguments
from lococo.models.rotary import RotaryTable, rotary_tables
from lococo.state import Patch, patched_decoder

PATCH_AGAIN = "call lococo.unpatch_model, change what is to be changed, and patch again"


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


@torch.compiler.disable
def ask_for_last_logits(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model around the decoder: ``logits_to_keep`` tells what the decoder may forget."""
    keep = kwargs.get("logits_to_keep")
    wanted = isinstance(keep, int) and keep > 0 and kwargs.get("labels") is None
    if not wanted or patched_decoder(model).lococo_patch.is_suspended:
        return None
    kwargs["lococo"] = Request(keep=keep)
    return args, kwargs


@torch.compiler.disable
def before_forward(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the decoder: put a ``Call`` into its arguments, read a long prompt up to its last chunk.

    None while the patch is suspended.

    Raises
    ------
    ValueError
        For what a compressed cache cannot do: a foreign cache with content, a 4-D mask, packed sequences, attention
        matrices. If the patch is suspended or was bypassed.
    """
    patch: Patch = decoder.lococo_patch
    end_call(decoder)  # one that failed
    kwargs = _by_name(decoder, args, kwargs)
    if patch.is_suspended:
        name = cache_argument(decoder)
        if isinstance(kwargs.get(name), LoCoCoCache):
            raise ValueError(f"{name} is a LoCoCoCache; inside lococo.patch.suspended the cache is the full one")
        return None
    kwargs["attention_mask"] = _padding(kwargs.get("attention_mask"))
    request = kwargs.pop("lococo", None) or patch.request or Request()
    if request.call is not None:
        return (), {**kwargs, "lococo": _begun(patch, request.call)}
    if not request.is_chunk:
        patch.close_call()  # one that was interrupted
    _refuse_other_configs(decoder)
    _refuse_unsupported(decoder, kwargs)
    tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return (), kwargs  # the model's own error says what is missing
    _refuse_nothing(tokens)
    was_in_pieces = patch.last_position is not None
    try:
        call = _prepare(decoder, request, kwargs, tokens)
    except BaseException:
        if not was_in_pieces:
            patch.last_position = None
        raise
    call.ends_text = patch.last_position is not None and not was_in_pieces
    _begun(patch, call)
    if is_remote_chatglm(decoder):
        return (), remote_arguments(decoder, kwargs, functools.partial(lococo_attention, lococo=call))
    return (), {**kwargs, "lococo": call}


def _prepare(decoder: Any, request: Request, kwargs: dict[str, Any], tokens: torch.Tensor) -> Call:
    """The call for the last piece of some tokens, after the pieces before it have been read; changes ``kwargs``."""
    config: LoCoCoConfig = decoder.lococo_patch.config
    cache = request.cache or _cache_for(decoder, config, kwargs)
    _check_state(cache, tokens.shape[0])
    earlier: list[torch.Tensor] = []
    chunk = None if request.is_chunk else _chunk(decoder, config, kwargs, tokens)
    if chunk is not None and chunk < tokens.shape[1]:
        if cache is None:
            cache = new_cache(decoder)
        _show_last_position(decoder, cache, kwargs, tokens.shape[1])
        last = min(tokens.shape[1], max(request.keep or 0, tokens.shape[1] % chunk or chunk))
        before = cache.seen_tokens
        try:
            earlier = _read_up_to_last_chunk(decoder, chunk, last, cache, kwargs, tokens.shape[1], request.keep)
        finally:
            cache.is_reading = cache.is_reading or cache.seen_tokens > before  # until the last piece has been read
        tokens = tokens[:, -last:]
    batch, num_tokens = tokens.shape[:2]
    real = padded_columns(
        kwargs.get("attention_mask"), batch, num_tokens, cache, is_step=not (earlier or request.is_chunk)
    )
    rows = (RowState(),) if cache is None else cache.rows
    plan = plan_call(rows, num_tokens, config, real, tokens.device)
    if config.positions == "slot":
        _say_positions_are_ours(decoder, kwargs.get("position_ids"), real)
        kwargs["position_ids"] = plan.cache_positions
    elif kwargs.get("position_ids") is None:
        kwargs["position_ids"] = plan.positions
    tables = _rotary_tables(decoder, config, cache, tokens.device)
    if is_remote_chatglm(decoder):
        check_length(decoder, config.capacity if config.positions == "slot" else max(row.seen for row in plan.rows))
    hands_out = request.cache is None and kwargs.get("use_cache") is not False
    return Call(config, plan, cache, tables, rows, real, earlier, hands_out=hands_out)


def _say_positions_are_ours(decoder: Any, given: torch.Tensor | None, real: Sequence[Sequence[bool]] | None) -> None:
    """Tell of positions that are not one after another, which slot positions have no use for."""
    if given is None or given.shape[1] < 2:
        return
    follows = given.diff(dim=1) == 1
    if real is not None:
        tokens = torch.tensor(real, device=given.device)
        follows = follows | ~(tokens[:, 1:] & tokens[:, :-1])
    if not follows.all():
        decoder.lococo_patch.say_once(
            "position_ids that are not one after another are not used: with positions='slot' tokens have the "
            "positions of their places in the cache"
        )


def _begun(patch: Patch, call: Call) -> Call:
    if call.cache is not None:
        call.cache.is_open = True
    patch.open_call = call
    return call


@torch.compiler.disable
def after_forward(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the decoder: the cache has read the call; put the chunks' hidden states together.

    It is called after a forward that failed, too, then without output; not after one that was interrupted.

    Raises
    ------
    ValueError
        If layers were read by another attention than ours.
    """
    is_remote = is_remote_chatglm(decoder)
    attend = end_call(decoder)
    call = attend.keywords["lococo"] if attend else kwargs.get("lococo")
    if not isinstance(call, Call):
        return output
    decoder.lococo_patch.close_call()
    if output is None or call.is_recorded:
        return output
    _refuse_unread_layers(decoder.lococo_patch, call)
    if call.cache is not None:
        call.cache.advance(call.plan, call.plan.positions.shape[1])
        call.cache.is_reading = False
        if call.hands_out and (is_remote or getattr(output, OUTPUT_CACHE, call) is None):
            # ChatGLM's code knows nothing of it, others let go of it when they train with gradient checkpointing.
            output = _with_cache(output, call.cache)
    if not call.earlier:
        return output
    tokens_dim = 0 if is_remote else 1
    if isinstance(output, tuple):
        return (torch.cat([*call.earlier, output[0]], dim=tokens_dim), *output[1:])
    output.last_hidden_state = torch.cat([*call.earlier, output.last_hidden_state], dim=tokens_dim)
    return output


def _refuse_other_configs(decoder: Any) -> None:
    """Refuse a decoder in which an attention layer, or what makes its mask, no longer finds ours in its config."""
    if is_remote_chatglm(decoder):
        return
    modules = (decoder, *decoder.lococo_patch.layers.values())
    for module in {id(module.config): module for module in modules}.values():
        if module.config._attn_implementation != NAME:
            raise ValueError(
                f"the config of {type(module).__name__} was replaced after lococo.patch_model, by one with attention "
                f"{module.config._attn_implementation!r}; {PATCH_AGAIN}"
            )


def _refuse_unread_layers(patch: Patch, call: Call) -> None:
    """Refuse a forward in which attention layers were not read by ours: their output is not what was asked for."""
    missed = sorted(set(patch.layers) - call.read)
    if missed:
        layer = patch.layers[missed[0]]
        raise ValueError(
            f"{len(missed)} of {len(patch.layers)} attention layers did not go through LoCoCo, {type(layer).__name__} "
            f"{missed[0]} first: they were replaced or left out after lococo.patch_model; {PATCH_AGAIN}"
        )


def _refuse_nothing(tokens: torch.Tensor) -> None:
    if tokens.shape[1] == 0:
        raise ValueError(f"there is nothing to read: the input has shape {tuple(tokens.shape)}, 0 tokens")


def prepare_inputs(model: Any, *args, **kwargs) -> Any:
    """Stand in for the method by which ``generate`` finds its prompt, to refuse an empty one by name."""
    result = type(model)._prepare_model_inputs(model, *args, **kwargs)
    _refuse_nothing(result[0])
    return result


def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args, **kwargs) -> Any:
    """Stand in for the method by which ``generate`` makes its cache: a patched model gets its own from the start."""
    decoder, name = patched_decoder(model), cache_argument(model)
    is_ours = generation_config.use_cache is not False and not decoder.lococo_patch.is_suspended
    if is_ours and model_kwargs.get(name) is None:
        wanted, generation_config.cache_implementation = generation_config.cache_implementation, None
        if wanted is not None:
            decoder.lococo_patch.say_once(
                f"cache_implementation={wanted!r} is not used: a patched model keeps its slots in a LoCoCoCache"
            )
        model_kwargs[name] = new_cache(decoder)
    return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)


def _with_cache(output: Any, cache: LoCoCoCache) -> Any:
    if isinstance(output, tuple):
        return (output[0], cache, *output[1:])
    setattr(output, OUTPUT_CACHE, cache)
    return output


def new_cache(decoder: Any) -> LoCoCoCache:
    """An empty cache for a patched decoder."""
    return LoCoCoCache(decoder.lococo_patch.config, base_shape(decoder)["num_layers"])


def _padding(mask: Any) -> torch.Tensor | None:
    """The 2-D mask in what a decoder is given: itself, or as ``padding_mask`` made one for every type of layers."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    return mask.tokens if isinstance(mask, PaddingMask) else mask


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
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask must be a 2-D tensor (batch, tokens), got a {type(mask).__name__}")
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
        given.check_fits(config, base_shape(decoder), name)
    elif given is not None and (not isinstance(given, Cache) or given.get_seq_length() > 0):
        raise ValueError(
            f"{name} is a {type(given).__name__} that already holds tokens; a patched model reads only its own "
            "LoCoCoCache: start without one, or unpatch the model"
        )
    elif given is not None:
        decoder.lococo_patch.say_once(
            f"the empty {type(given).__name__} given as {name} stays empty: a patched model keeps its slots in a "
            f"LoCoCoCache; go on with the {OUTPUT_CACHE} of the output"
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


def _show_last_position(decoder: Any, cache: LoCoCoCache, kwargs: dict[str, Any], num_tokens: int) -> None:
    """Note the last position of a call before it is read in pieces, if none is noted; see ``lococo.whole_text``."""
    patch: Patch = decoder.lococo_patch
    if patch.last_position is not None:
        return
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None:
        patch.last_position = positions.amax()
        return
    counts = num_tokens if mask is None else mask[:, -num_tokens:].sum(dim=-1).cpu()
    patch.last_position = (torch.tensor([row.seen for row in cache.rows]) + counts - 1).amax()


def padded_columns(
    mask: torch.Tensor | None, batch: int, num_tokens: int, cache: LoCoCoCache | None, is_step: bool = True
) -> list[list[bool]] | None:
    """Which columns of a call are tokens (True) and which padding, row by row; None if all are tokens.

    Parameters
    ----------
    mask : torch.Tensor, optional
        (batch, tokens of the call, or of all calls), 0 for padding.
    is_step : bool
        One token is a step of decoding, not what is left of a longer text.

    Raises
    ------
    ValueError
        If the mask has another shape, or other values.
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
    if is_step and num_tokens == 1 and seen and real.is_cuda and cache is not None and not cache.ends_in_padding:
        # Decoding must not wait for the GPU; padding here would start in the middle of a text.
        torch._assert_async(real.all())
        return None
    has_padding = not bool(real.all())
    if has_padding or mask.dtype != torch.bool:
        _refuse_other_marks(mask[:, -num_tokens:])
    if cache is not None and seen and mask.shape[1] > num_tokens:
        _refuse_another_past(mask[:, :seen], cache.rows)
    if cache is not None:
        cache.ends_in_padding = has_padding and not bool(real[:, -1].all())
    return real.tolist() if has_padding else None


def _refuse_other_marks(mask: torch.Tensor) -> None:
    """Refuse masks that number the texts of packed rows, or are to be added to logits."""
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.numel():
        raise ValueError(
            f"attention_mask must be 1 for tokens and 0 for padding, got {strange[0].item()}: rows of several texts "
            "(packed sequences) and masks that are added to logits are not supported"
        )


def _refuse_another_past(mask: torch.Tensor, rows: Sequence[RowState]) -> None:
    """Refuse a mask in which tokens that were read are padding, or padding tokens: it would come too late."""
    said = mask.bool().sum(dim=-1).tolist()
    read = [row.seen for row in rows] * (len(said) // len(rows))
    for index, (now, before) in enumerate(zip(said, read, strict=True)):
        if now != before:
            raise ValueError(
                f"attention_mask names {now} tokens among the {mask.shape[1]} columns already read of row {index}, "
                f"{before} were read: what has been read cannot be masked later (generate takes pad tokens for "
                "padding where it is given no attention_mask)"
            )


def _chunk(decoder: Any, config: LoCoCoConfig, kwargs: dict[str, Any], tokens: torch.Tensor) -> int | None:
    """Tokens to read at once; None: all."""
    # Outputs of every layer, hidden states or a router's logits, are wanted of the whole text.
    outputs = {name for name in (*vars(decoder.config), *kwargs) if name.startswith("output_")}
    wanted = {name: kwargs.get(name) for name in outputs}
    wanted = {name: getattr(decoder.config, name, False) if value is None else value for name, value in wanted.items()}
    if torch.is_grad_enabled() or any(wanted.values()):
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
