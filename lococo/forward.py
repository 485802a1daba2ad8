"""What happens around a forward of the patched decoder: its cache, its plan, and long prompts in chunks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from lococo import whole_text
from lococo.attention import lococo_attention
from lococo.cache.cache import LoCoCoCache
from lococo.cache.plan import Plan, RowState, plan_call
from lococo.compat import cache_argument
from lococo.context import ForwardContext, ForwardRequest
from lococo.inputs import (
    PATCH_AGAIN,
    arguments_by_name,
    cache_for,
    check_arguments,
    check_cache,
    check_configs,
    check_marks,
    check_not_empty,
    check_positions,
    check_shapes,
    length_after,
    padded_columns,
    padding_of,
)
from lococo.prefill import chunk_for, read_but_last_chunk
from lococo.state import Patch

# Keyword by which a model around the decoder says how many hidden states at the end of the text it needs.
KEEP = "lococo_states_to_keep"


@torch.compiler.disable
def ask_for_last_states(
    patch: Patch, model: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model around the decoder: ``logits_to_keep`` tells what the decoder may forget."""
    keep = kwargs.get("logits_to_keep")
    is_wanted = isinstance(keep, int) and keep > 0 and kwargs.get("labels") is None
    if not is_wanted or patch.is_suspended:
        return None
    return args, {**kwargs, KEEP: keep}


@torch.compiler.disable
def before_forward(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the decoder: make the forward's context, after reading a long prompt up to its last chunk.

    None while the patch is suspended.

    Raises
    ------
    ValueError
        For what a compressed cache cannot do: a foreign cache with content, a 4-D mask, packed sequences, attention
        matrices. If the patch is suspended or was bypassed.
    """
    patch: Patch = decoder.lococo_patch
    patch.close()  # a forward that was interrupted
    kwargs = arguments_by_name(decoder, args, kwargs)
    if patch.is_suspended:
        name = cache_argument(decoder)
        if isinstance(kwargs.get(name), LoCoCoCache):
            raise ValueError(f"{name} is a LoCoCoCache; inside lococo.patch.suspended the cache is the full one")
        return None
    kwargs["attention_mask"] = padding_of(kwargs.get("attention_mask"))
    request = patch.thread.request or ForwardRequest()
    keep, context = kwargs.pop(KEEP, request.keep), request.context
    if context is None:
        check_configs(patch.family)
        check_arguments(decoder, kwargs)
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs  # the model's own error says what is missing
        check_not_empty(tokens)
        with whole_text.forgotten_on_failure(patch):
            context = _context(patch, request, kwargs, tokens, keep)
    patch.open(context)
    return (), patch.family.arguments(kwargs, functools.partial(lococo_attention, lococo=context))


def _context(
    patch: Patch, request: ForwardRequest, kwargs: dict[str, Any], tokens: torch.Tensor, keep: int | None
) -> ForwardContext:
    """The context of the last chunk of some tokens, after those before it have been read; changes ``kwargs``."""
    config = patch.config
    cache = cache_for(patch, kwargs) if request.cache is None else request.cache
    if cache is not None:
        check_cache(cache, tokens.shape[0])
    batch, num_tokens = tokens.shape[:2]
    check_shapes(kwargs, batch, num_tokens, seen=0 if cache is None else cache.seen_tokens)
    earlier: list[torch.Tensor] = []
    is_piece, ends_text = request.is_chunk or whole_text.is_in_pieces(patch), False
    chunk = None if request.is_chunk else chunk_for(patch, kwargs, tokens)
    if chunk is not None and chunk < num_tokens:
        cache = patch.new_cache() if cache is None else cache
        length = _check_whole(patch, cache, kwargs.get("attention_mask"), num_tokens)
        ends_text = whole_text.note_last_position(patch, kwargs.get("position_ids"), length)
        earlier, tokens = read_but_last_chunk(patch, cache, kwargs, tokens, chunk, keep)
        num_tokens, is_piece = tokens.shape[1], True
    real = padded_columns(kwargs.get("attention_mask"), batch, num_tokens, cache, is_step=not is_piece)
    rows = (RowState(),) if cache is None else cache.rows
    plan = plan_call(rows, num_tokens, config, real, tokens.device, is_piece)
    if config.positions == "slot":
        _say_positions_are_ours(patch, kwargs.get("position_ids"), real)
        kwargs["position_ids"] = plan.cache_positions
    elif kwargs.get("position_ids") is None:
        kwargs["position_ids"] = plan.positions
    elif config.has_features and not request.is_chunk:  # once a text: a GPU is waited for
        _say_keys_are_rotated_elsewhere(patch, kwargs["position_ids"], plan, real)
    seen = max(row.seen for row in plan.rows)
    check_positions(patch.family, config.capacity if config.positions == "slot" else seen)
    return ForwardContext(
        config,
        plan,
        cache,
        patch.rotary_tables,
        rows,
        real,
        is_piece,
        patch.attention,
        earlier,
        hands_out=request.cache is None and kwargs.get("use_cache") is not False,
        ends_text=ends_text,
    )


def _check_whole(patch: Patch, cache: LoCoCoCache, mask: torch.Tensor | None, num_tokens: int) -> int:
    """Refuse what the last chunk would be refused for, before the first one is read; the text's length after it."""
    if mask is not None:
        check_marks(mask[:, -num_tokens:])
    length = length_after(cache.rows, mask, num_tokens)
    if patch.config.positions == "absolute":
        check_positions(patch.family, length)
    return length


def _say_positions_are_ours(patch: Patch, given: torch.Tensor | None, real: Sequence[Sequence[bool]] | None) -> None:
    """Tell of positions that are not one after another, which slot positions have no use for."""
    if given is None or given.shape[1] < 2:
        return
    follows = given.diff(dim=1) == 1
    if real is not None:
        tokens = torch.tensor(real, device=given.device)
        follows = follows | ~(tokens[:, 1:] & tokens[:, :-1])
    if not follows.all():
        patch.say_once(
            "position_ids that are not one after another are not used: with positions='slot' tokens have the "
            "positions of their places in the cache"
        )


def _say_keys_are_rotated_elsewhere(
    patch: Patch, given: torch.Tensor, plan: Plan, real: Sequence[Sequence[bool]] | None
) -> None:
    """Tell of positions other than the tokens' places in their texts, which a score's network cannot know of."""
    if given.shape[1] < 2:  # a step, which must not wait for a GPU
        return
    differs = given != plan.positions
    if real is not None:
        differs = differs & torch.tensor(real, device=given.device)
    if differs.any():
        patch.say_once(
            f"position_ids are not the places of tokens in their text: score={patch.config.score!r} looks at keys as "
            "they were before they were rotated, and takes them for rotated at those places"
        )


@torch.compiler.disable
def after_forward(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the decoder: the cache has read its tokens; put the chunks' hidden states together.

    It is called after a forward that failed, too, then without output; not after one that was interrupted.

    Raises
    ------
    ValueError
        If layers were read by another attention than ours.
    """
    patch: Patch = decoder.lococo_patch
    context = patch.close()
    if context is None or output is None or context.is_recorded:
        return output
    _check_all_read(patch, context)
    if context.cache is not None:
        ends_in_padding = context.real is not None and not all(row[-1] for row in context.real)
        context.cache.advance(context.plan, context.plan.positions.shape[1], ends_in_padding)
        context.cache.is_reading = False
        if context.hands_out:
            output = patch.family.hand_out(output, context.cache)
    if not context.earlier:
        return output
    dim = patch.family.tokens_dim
    if isinstance(output, tuple):
        return (torch.cat([*context.earlier, output[0]], dim=dim), *output[1:])
    output.last_hidden_state = torch.cat([*context.earlier, output.last_hidden_state], dim=dim)
    return output


def _check_all_read(patch: Patch, context: ForwardContext) -> None:
    """Refuse a forward in which attention layers were not read by ours: their output is not what was asked for."""
    missed = sorted(set(patch.layers) - context.read)
    if missed:
        kind, count = type(patch.layers[missed[0]]).__name__, len(patch.layers)
        raise ValueError(
            f"{len(missed)} of {count} attention layers did not go through LoCoCo, {kind} {missed[0]} first: they "
            f"were replaced or left out after lococo.patch_model; {PATCH_AGAIN}"
        )
