"""What stands in for methods of a patched model that ``generate`` calls."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from lococo.cache.cache import CROP_ERROR, LoCoCoCache
from lococo.compat import cache_argument
from lococo.cuda_graphs import call_model
from lococo.inputs import check_not_empty, check_text_goes_on, usable_cache
from lococo.state import Patch

# Methods by which ``generate`` begins continuous batching, in one release or another.
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def add_generate_hooks(patch: Patch, model: PreTrainedModel) -> None:
    """Let ``generate`` of the decoder, or of a model around it, decode with slots, and refuse what cannot."""
    if hasattr(model, "_get_candidate_generator"):
        stand_in = functools.partial(refuse_assisted_decoding, patch, model)
        patch.changes.set(model, "_get_candidate_generator", stand_in)
    for name in CONTINUOUS_BATCHING:
        if hasattr(model, name):
            stand_in = functools.partial(refuse_continuous_batching, patch, model, name)
            patch.changes.set(model, name, stand_in)
    if patch.family.takes_cache and hasattr(model, "generate"):
        patch.changes.set(model, "__call__", functools.partial(call_model, patch, model))
        patch.changes.set(model, "_prepare_cache_for_generation", functools.partial(prepare_cache, patch, model))
        patch.changes.set(model, "_prepare_model_inputs", functools.partial(prepare_inputs, patch, model))


def prepare_inputs(patch: Patch, model: Any, *args, **kwargs) -> Any:
    """Stand in for the method by which ``generate`` finds its prompt, to refuse one that leaves nothing to read."""
    prompt, name, model_kwargs = type(model)._prepare_model_inputs(model, *args, **kwargs)
    if not patch.is_suspended:
        check_not_empty(prompt)
        cache = model_kwargs.get(cache_argument(model))
        if isinstance(cache, LoCoCoCache):
            check_text_goes_on(prompt, model_kwargs.get("attention_mask"), cache.seen_tokens)
    return prompt, name, model_kwargs


def prepare_cache(
    patch: Patch, model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args, **kwargs
) -> Any:
    """Stand in for the method by which ``generate`` makes its cache: a patched model gets its own from the start.

    Raises
    ------
    ValueError
        If there is a cache to go on with and ``use_cache`` is False: every token would be read again and again. If
        it is not the model's own.
    """
    name = cache_argument(model)
    given = model_kwargs.get(name)
    if isinstance(given, LoCoCoCache) and generation_config.use_cache is False:
        raise ValueError(
            f"use_cache=False, as an argument or in model.generation_config, does not go with a cache as {name}: "
            "say use_cache=True to go on with it"
        )
    if generation_config.use_cache is not False and not patch.is_suspended:
        given = usable_cache(patch, given, name)
        wanted, generation_config.cache_implementation = generation_config.cache_implementation, None
        if wanted is not None:
            patch.say_once(
                f"cache_implementation={wanted!r} is not used: a patched model keeps its slots in a LoCoCoCache"
            )
        model_kwargs[name] = patch.new_cache() if given is None else given
    return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)


def refuse_continuous_batching(patch: Patch, model: Any, name: str, *args, **kwargs) -> Any:
    """Stand in for Transformers' continuous batching, which keeps pages of a full cache.

    Raises
    ------
    ValueError
        If the patch is not suspended.
    """
    if patch.is_suspended:
        return getattr(type(model), name)(model, *args, **kwargs)
    raise ValueError(f"{name} keeps pages of a full cache, a patched model its slots: use lococo.unpatch_model(model)")


def refuse_assisted_decoding(patch: Patch, model: Any, *args, **kwargs) -> Any:
    """Stand in for the method that ``generate`` begins assisted and prompt-lookup decoding with.

    Raises
    ------
    ValueError
        If the patch is not suspended.
    """
    if patch.is_suspended:
        return type(model)._get_candidate_generator(model, *args, **kwargs)
    raise ValueError(CROP_ERROR)
