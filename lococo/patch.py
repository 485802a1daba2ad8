"""Putting the compressed cache into a model and taking it out again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from lococo import whole_text
from lococo.attention import NAME
from lococo.cache.cache import CROP_ERROR
from lococo.compat import warn_if_untested
from lococo.compression.base import get_compressor
from lococo.config import LoCoCoConfig
from lococo.cuda_graphs import call_model
from lococo.forward import after_forward, ask_for_last_logits, before_forward, prepare_cache, prepare_inputs
from lococo.heads import load_heads, read_heads_config
from lococo.models import attention_layers, base_shape, find_decoder, layer_head_dim
from lococo.models.chatglm.family import bridges, is_remote_chatglm, refuse_generate
from lococo.models.config_view import config_view, view_around
from lococo.models.rotary import execution_device, rotary_tables
from lococo.state import HEAD, Patch, is_patched, lococo_config, patched_decoder

# Methods by which ``generate`` begins continuous batching, in one release or another.
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def patch_model(
    model: nn.Module,
    config: LoCoCoConfig | None = None,
    *,
    heads: str | os.PathLike | None = None,
) -> nn.Module:
    """Make every attention layer of a model keep M key-value slots, however long the text.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers decoder (Llama, Mistral, Qwen, Gemma, Phi-3, GLM, ...) or ChatGLM in its own code, also inside
        PEFT. Changed in place. The outermost one: around it, ``save_pretrained`` would write heads, too.
    config : LoCoCoConfig, optional
        The slot budget. None: that of ``heads``, or our default preset.
    heads : str or path, optional
        Folder or Hub id of trained heads to load.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        If the model is already patched, of an unsupported kind or wrapped for distributed training, or the heads do
        not fit it. The model is then as it was.
    """
    if is_patched(model):
        raise ValueError(
            f"{type(model).__name__} is already patched (num_slots={lococo_config(model).num_slots}); call "
            "lococo.unpatch_model first"
        )
    if config is None and heads is not None:
        config = read_heads_config(heads)
    config = config or LoCoCoConfig()
    warn_if_untested()
    decoder: Any = find_decoder(model)
    _refuse_distributed(model)
    _check_slots_per_head(config, base_shape(model))
    if config.positions == "slot":
        rotary_tables(decoder, config, torch.device("cpu"))  # a rope type that cannot be used says so here
    patch = Patch(config, attention_layers(decoder))
    decoder.lococo_patch = patch
    try:
        _apply(patch, model, decoder)
        if heads is not None:
            load_heads(model, heads)
    except BaseException:
        patch.undo(decoder)
        raise
    return model


def _check_slots_per_head(config: LoCoCoConfig, shape: dict[str, int]) -> None:
    if config.slots_per_head is None:
        return
    heads = [len(layer) for layer in config.slots_per_head]
    if heads != [shape["num_kv_heads"]] * shape["num_layers"]:
        raise ValueError(
            f"slots_per_head is for {len(heads)} layers with {', '.join(map(str, sorted(set(heads))))} KV heads, the "
            f"model has {shape['num_layers']} layers with {shape['num_kv_heads']}"
        )


def _refuse_distributed(model: nn.Module) -> None:
    # Heads put in after wrapping would be trained by every process on its own.
    if getattr(model, "tp_size", None) or getattr(model, "_tp_size", None):
        raise ValueError(
            f"{type(model).__name__} is split over processes by tensor parallelism, which is not supported: load it "
            "without tp_plan (device_map spreads its layers over devices instead)"
        )
    replicated = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
    if replicated or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is already wrapped for distributed training: patch it first, then wrap"
        )


def _apply(patch: Patch, model: nn.Module, decoder: Any) -> None:
    is_remote = is_remote_chatglm(decoder)
    if is_remote:
        for module, name, value in bridges(decoder):
            patch.set(module, name, value)
    else:
        _view_configs(patch, model, decoder)
        whole_text.add_hooks(patch, decoder)
    for index, layer in patch.layers.items():
        largest = max(patch.config.layer_configs(index), key=lambda config: config.num_fused)
        if largest.num_fused:
            head = get_compressor(largest.compressor)(
                largest, layer_head_dim(layer), device=execution_device(layer), dtype=decoder.dtype
            )
            setattr(layer, HEAD, head.train(layer.training))
    patch.hooks.append(decoder.register_forward_pre_hook(before_forward, with_kwargs=True))
    patch.hooks.append(decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True))
    for holder in _holders(model, decoder):
        if hasattr(holder, "_get_candidate_generator"):
            patch.set(holder, "_get_candidate_generator", refuse_assisted_decoding)
        for name in CONTINUOUS_BATCHING:
            if hasattr(holder, name):
                patch.set(holder, name, functools.partial(refuse_continuous_batching, holder, name))
        if is_remote and holder is not decoder and not hasattr(holder, "generate"):
            patch.set(holder, "generate", refuse_generate)
        if not is_remote and hasattr(holder, "generate"):
            patch.set(holder, "__call__", functools.partial(call_model, holder))
            patch.set(holder, "_prepare_cache_for_generation", functools.partial(prepare_cache, holder))
            patch.set(holder, "_prepare_model_inputs", functools.partial(prepare_inputs, holder))
        names = [name for name, _ in holder.named_parameters() if f".{HEAD}." in name]
        patch.set(holder, "_keys_to_ignore_on_save", [*(holder._keys_to_ignore_on_save or []), *names])
        if holder is not decoder and "logits_to_keep" in inspect.signature(type(holder).forward).parameters:
            patch.hooks.append(holder.register_forward_pre_hook(ask_for_last_logits, with_kwargs=True))


def _view_configs(patch: Patch, model: nn.Module, decoder: Any) -> None:
    """Let the decoder find our attention in its config, and no other model that shares the config."""
    config, views = decoder.config, {}
    for module in (decoder, *patch.layers.values()):
        if id(module.config) not in views:
            views[id(module.config)] = config_view(module.config, NAME)
        patch.view_config(module, views[id(module.config)])
    # Of a model of several parts the innermost around the decoder makes its masks; those around it show what they had.
    seen = {id(config)}
    for holder in reversed(_holders(model, decoder)):
        if id(holder.config) not in seen:
            seen.add(id(holder.config))
            around = view_around(holder.config, config, views[id(config)])
            if around is not None:
                patch.view_config(holder, around)


def refuse_continuous_batching(model: Any, name: str, *args, **kwargs) -> Any:
    """Stand in for Transformers' continuous batching, which keeps pages of a full cache.

    Raises
    ------
    ValueError
        If the patch is not suspended.
    """
    if patched_decoder(model).lococo_patch.is_suspended:
        return getattr(type(model), name)(model, *args, **kwargs)
    raise ValueError(f"{name} keeps pages of a full cache, a patched model its slots: use lococo.unpatch_model(model)")


def refuse_assisted_decoding(*args, **kwargs) -> NoReturn:
    """Stand in for the method that ``generate`` begins assisted and prompt-lookup decoding with."""
    raise ValueError(CROP_ERROR)


def _holders(model: nn.Module, decoder: nn.Module) -> list[PreTrainedModel]:
    """The decoder and the Transformers models around it."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module for module in models if any(child is decoder for child in module.modules())]


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give a model its full key-value cache back, bit for bit. Returns the model.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    decoder = patched_decoder(model)
    decoder.lococo_patch.undo(decoder)
    return model


@contextlib.contextmanager
def patched(
    model: nn.Module, config: LoCoCoConfig | None = None, *, heads: str | os.PathLike | None = None
) -> Iterator[nn.Module]:
    """A patched model inside a ``with`` block. Arguments as in ``patch_model``."""
    patch_model(model, config, heads=heads)
    try:
        yield model
    finally:
        if is_patched(model):  # not taken out inside the block
            unpatch_model(model)


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[nn.Module]:
    """The same patched model with its full cache inside a ``with`` block, bit for bit that of the unpatched model.

    Heads stay where they are. Caches from inside the block are not for outside of it, nor the other way round.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    decoder = patched_decoder(model)
    patch: Patch = decoder.lococo_patch
    patch.close_call()
    was_suspended, patch.is_suspended = patch.is_suspended, True
    patch.show_configs(through_views=False)
    try:
        yield model
    finally:
        if vars(decoder).get("lococo_patch") is patch:  # not taken out inside the block
            patch.is_suspended = was_suspended
            patch.show_configs(through_views=not was_suspended)
