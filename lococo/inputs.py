"""What a decoder is given, by name, and what of it a compressed cache cannot do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lococo.attention import NAME
from lococo.cache.cache import LoCoCoCache
from lococo.cache.plan import RowState
from lococo.compat import OLD_CACHE_NAME, OUTPUT_CACHE, Cache, argument_names, cache_argument
from lococo.masks import PaddingMask
from lococo.models import Family
from lococo.state import Patch

PATCH_AGAIN = "call lococo.unpatch_model, change what is to be changed, and patch again"


def arguments_by_name(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the decoder's forward as keywords, the cache under the name that this release has for it."""
    named = {**dict(zip(argument_names(type(decoder).forward), args, strict=False)), **kwargs}
    name = cache_argument(decoder)
    if OLD_CACHE_NAME in named and name not in named:
        named[name] = named.pop(OLD_CACHE_NAME)
    return named


def padding_of(mask: Any) -> Any:
    """The 2-D mask in what a decoder is given: itself, or as ``padding_mask`` made one for every type of layers.

    Of several the one with the most dimensions: a matrix that is for some layers alone must be seen, to be refused.
    """
    masks = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    tokens = [each.tokens if isinstance(each, PaddingMask) else each for each in masks]
    return max(tokens, key=lambda each: -1 if each is None else getattr(each, "ndim", 0), default=None)


def check_arguments(decoder: Any, kwargs: dict[str, Any]) -> None:
    """Refuse attention matrices, masks and positions that are not (batch, tokens) and packed sequences.

    Raises
    ------
    ValueError
        Names the argument.
    """
    if kwargs.get("output_attentions") or (
        kwargs.get("output_attentions") is None and getattr(decoder.config, "output_attentions", False)
    ):
        raise ValueError("output_attentions=True: a patched model never makes attention matrices; unpatch it for them")
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    for name, given in (("attention_mask", mask), ("position_ids", position_ids)):
        if given is not None and not isinstance(given, torch.Tensor):
            raise ValueError(f"{name} must be a 2-D tensor (batch, tokens), got a {type(given).__name__}")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            "attention_mask must be 2-D (batch, tokens) with 1 for tokens and 0 for padding, got shape "
            f"{tuple(mask.shape)}"
        )
    if position_ids is not None and position_ids.dim() != 2:
        raise ValueError(f"position_ids must be 2-D (batch, tokens), got shape {tuple(position_ids.shape)}")
    is_first = mask is None and kwargs.get(cache_argument(decoder)) is None
    if position_ids is not None and is_first and (position_ids.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids that start again inside a row (packed sequences) are not supported: give each text a row "
            "and pad it with an attention_mask"
        )


def check_shapes(kwargs: dict[str, Any], batch: int, num_tokens: int, seen: int) -> None:
    """Refuse a mask or positions of other tokens than a call's.

    Parameters
    ----------
    batch, num_tokens : int
        Rows and columns that are to be read.
    seen : int
        Columns already read, which a mask may have in front.

    Raises
    ------
    ValueError
        Names the argument, its shape and the one expected.
    """
    if kwargs.get("attention_mask") is not None:
        _check_mask_shape(kwargs["attention_mask"], batch, num_tokens, seen)
    positions, places = kwargs.get("position_ids"), kwargs.get("cache_position")
    if positions is not None and positions.shape not in ((1, num_tokens), (batch, num_tokens)):
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}, expected ({batch}, {num_tokens}): one for every token "
            "of this call"
        )
    if places is not None and places.shape[-1] != num_tokens:
        raise ValueError(f"cache_position has shape {tuple(places.shape)}, expected ({num_tokens},)")


def _check_mask_shape(mask: torch.Tensor, batch: int, num_tokens: int, seen: int) -> None:
    if mask.shape not in ((batch, num_tokens), (batch, seen + num_tokens)):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {seen + num_tokens}): "
            f"{seen} columns already read and {num_tokens} new ones"
        )


def check_configs(family: Family) -> None:
    """Refuse a decoder in which a layer, or what makes its mask, no longer finds our attention in its config.

    Raises
    ------
    ValueError
        Names the module and the attention that it finds.
    """
    checked = None
    for module in family.readers_of_configs:
        if module.config is checked:  # mostly they share one
            continue
        checked = module.config
        if checked._attn_implementation != NAME:
            raise ValueError(
                f"the config of {type(module).__name__} was replaced after lococo.patch_model, by one with attention "
                f"{checked._attn_implementation!r}; {PATCH_AGAIN}"
            )


def check_positions(family: Family, count: int) -> None:
    """Refuse positions that the decoder has no angles for.

    Raises
    ------
    ValueError
        If there are more than that.
    """
    if family.max_positions is not None and count > family.max_positions:
        raise ValueError(
            f"{count} positions are more than the {family.max_positions} of this model (seq_length): read less, or "
            "use positions='slot', which needs num_slots + block_size of them"
        )


def check_not_empty(tokens: torch.Tensor) -> None:
    """Refuse an input without tokens.

    Raises
    ------
    ValueError
        Gives its shape.
    """
    if tokens.shape[1] == 0:
        raise ValueError(f"there is nothing to read: the input has shape {tuple(tokens.shape)}, 0 tokens")


def usable_cache(patch: Patch, given: Any, name: str) -> LoCoCoCache | None:
    """The cache that a patched model was given, if it is one of its own; None for none, or an empty one that is not.

    Parameters
    ----------
    name : str
        What the model calls its cache.

    Raises
    ------
    ValueError
        For a cache of another kind that holds tokens, or of another model or method.
    """
    if given is None:
        return None
    if isinstance(given, LoCoCoCache):
        given.check_fits(patch.config, patch.family.shape, name)
        return given
    if not isinstance(given, Cache) or given.get_seq_length() > 0:
        raise ValueError(
            f"{name} is a {type(given).__name__} that already holds tokens; a patched model reads only its own "
            "LoCoCoCache: start without one, or unpatch the model"
        )
    patch.say_once(
        f"the empty {type(given).__name__} given as {name} stays empty: a patched model keeps its slots in a "
        f"LoCoCoCache; go on with the {OUTPUT_CACHE} of the output"
    )
    return None


def check_text_goes_on(prompt: torch.Tensor, mask: torch.Tensor | None, seen: int) -> None:
    """Refuse a prompt for ``generate`` of which its cache has left nothing to read.

    Parameters
    ----------
    prompt : torch.Tensor
        (batch, tokens, ...), what has been read included, unless a longer ``mask`` says that it is not.
    seen : int
        Columns that the cache has read.

    Raises
    ------
    ValueError
        Gives both lengths. Transformers would read some of the text, or all of it, once more.
    """
    tokens = prompt.shape[1]
    if 0 < seen >= tokens and (mask is None or mask.shape[1] == tokens):
        raise ValueError(
            f"the cache has read {seen} tokens and the prompt has {tokens}: it must begin with what was read, and go "
            "on with at least one token"
        )


def cache_for(patch: Patch, kwargs: dict[str, Any]) -> LoCoCoCache | None:
    """The cache that a forward reads into, which is put into its arguments; None: nothing is remembered after it.

    Raises
    ------
    ValueError
        For a cache of another kind, model or method, or with gradient checkpointing.
    """
    decoder = patch.decoder
    name = cache_argument(decoder)
    given = usable_cache(patch, kwargs.get(name), name)
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
    if _runs_layers_twice(decoder):
        if given is not None and given.seen_tokens:
            raise ValueError(f"{name} cannot be used with gradient checkpointing: its layers run twice")
        if given is not None or kwargs.get("use_cache"):
            patch.say_once("gradient checkpointing runs layers twice: nothing is kept in a cache in training mode")
        kwargs.update({"use_cache": False, name: None})
        return None
    if kwargs.get(name) is None and not use_cache:
        return None
    kwargs[name] = patch.new_cache() if given is None else given
    return kwargs[name]


def _runs_layers_twice(decoder: Any) -> bool:
    """Whether a forward is one of training with gradient checkpointing."""
    if not decoder.training or not torch.is_grad_enabled():
        return False
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def check_cache(cache: LoCoCoCache, batch: int) -> None:
    """Refuse a cache that holds half of a forward, or other rows.

    Raises
    ------
    ValueError
        Says which.
    """
    if cache.is_reading:
        raise ValueError("the last forward with this LoCoCoCache did not finish: call cache.reset() and start again")
    if cache.batch_size not in (-1, batch):
        raise ValueError(f"the cache holds {cache.batch_size} rows, the input has {batch}")


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
    _check_mask_shape(mask, batch, num_tokens, seen)
    real = mask[:, -num_tokens:].bool()
    if is_step and num_tokens == 1 and seen and real.is_cuda and cache is not None and not cache.ends_in_padding:
        # Decoding must not wait for the GPU; padding here would start in the middle of a text.
        torch._assert_async(real.all())
        return None
    has_padding = not bool(real.all())
    if has_padding or mask.dtype != torch.bool:
        check_marks(mask[:, -num_tokens:])
    if cache is not None and seen and mask.shape[1] > num_tokens:
        _refuse_another_past(mask[:, :seen], cache.rows)
    return real.tolist() if has_padding else None


def check_marks(mask: torch.Tensor) -> None:
    """Refuse masks that number the texts of packed rows, or are to be added to logits.

    Raises
    ------
    ValueError
        Gives the first value that is neither 0 nor 1.
    """
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.numel():
        raise ValueError(
            f"attention_mask must be 1 for tokens and 0 for padding, got {strange[0].item()}: rows of several texts "
            "(packed sequences) and masks that are added to logits are not supported"
        )


def length_after(rows: Sequence[RowState], mask: torch.Tensor | None, num_tokens: int) -> int:
    """Tokens of the longest row when a call has been read, padding not counted."""
    counts = num_tokens if mask is None else mask[:, -num_tokens:].sum(dim=-1).cpu()
    return int((torch.tensor([row.seen for row in rows]) + counts).amax())


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
