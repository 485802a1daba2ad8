"""Putting the compressed cache into a model and taking it out again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from lococo import whole_text
from lococo.attention import NAME
from lococo.compat import warn_if_untested
from lococo.config import LoCoCoConfig, check_count
from lococo.forward import after_forward, ask_for_last_states, before_forward
from lococo.generate_hooks import add_generate_hooks
from lococo.heads import load_heads, read_heads_config
from lococo.models import find_family
from lococo.models.family import Family, execution_device, models_around
from lococo.models.rotary import rotary_tables
from lococo.registry import ATTENTIONS, COMPRESSORS, SCORES
from lococo.state import HEAD, NETWORK, PATCH, Patch, is_ours, is_patched, patch_of


def patch_model(
    model: nn.Module,
    config: LoCoCoConfig | None = None,
    *,
    heads: str | os.PathLike | None = None,
    attention: str = "auto",
    prefill_chunk_size: int | None = None,
) -> nn.Module:
    """Make every attention layer of a model keep M key-value slots per KV head, however long the text.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers decoder (Llama, Mistral, Qwen, Gemma, Phi-3, GLM, ...) or ChatGLM in its own code, also inside
        PEFT. Changed in place. Pass the outermost model: ``save_pretrained`` of one around it would write heads, too.
    config : LoCoCoConfig, optional
        How many slots there are and how they are filled. None: the config of ``heads``, or the default preset.
    heads : str or path, optional
        Folder or Hub id of trained heads to load.
    attention : {"auto", "sdpa", "eager", "triton", "flash_attention_2", "flash_attention_4"} or str
        Attention kernel. "auto": torch's own; on CUDA, in half precision and without gradients, lococo's Triton
        kernel where slots that stand for several tokens bias the logits. What a kernel cannot do (masks, float32) is
        left to torch. With any of these names, steps of a single token use torch operations that a CUDA graph can
        record. A name given to ``lococo.register_attention`` is your own kernel, for reading and decoding.
    prefill_chunk_size : int, optional
        Tokens that go through the model at once when a long prompt is read without gradients. None: as many whole
        blocks as the device's free memory has room for, up to a size beyond which larger chunks are no faster.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        If the model, the config or the heads are of a wrong type.
    ValueError
        If the model is already patched, of an unsupported kind or wrapped for distributed training, if the heads do
        not fit it, or an option has an unknown value. The model is then as it was.
    """
    _check_config(config)
    if is_patched(model):
        raise ValueError(
            f"{type(model).__name__} is already patched (num_slots={patch_of(model).config.num_slots}); call "
            "lococo.unpatch_model first"
        )
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if prefill_chunk_size is not None:
        check_count("prefill_chunk_size", prefill_chunk_size, least=1)
    if config is None and heads is not None:
        config = read_heads_config(heads)
    config = config or LoCoCoConfig()
    warn_if_untested()
    family = find_family(model)
    _refuse_distributed(model)
    _check_slots_per_head(config, family)
    tables = rotary_tables(family, config)
    patch = Patch(config, family, attention, prefill_chunk_size, tables)
    setattr(family.decoder, PATCH, patch)
    try:
        _apply(patch, model)
        if heads is not None:
            load_heads(model, heads)
    except BaseException:
        patch.undo()
        raise
    return model


def _check_config(config: Any) -> None:
    if config is None or isinstance(config, LoCoCoConfig):
        return
    remedy = f"; heads are given by name, heads={config!r}" if isinstance(config, (str, os.PathLike)) else ""
    raise TypeError(f"config must be a LoCoCoConfig, got {config!r}{remedy}")


def _check_slots_per_head(config: LoCoCoConfig, family: Family) -> None:
    layers, shape = config.slots_per_head, family.shape
    if layers is None:
        return
    heads = {len(layer) for layer in layers if layer is not None}
    if len(layers) != shape["num_layers"] or heads != {shape["num_kv_heads"]}:
        raise ValueError(
            f"slots_per_head is for {len(layers)} layers with {', '.join(map(str, sorted(heads)))} KV heads, the "
            f"model has {shape['num_layers']} layers with {shape['num_kv_heads']}"
        )
    for index, (layer, window) in enumerate(zip(layers, family.windows, strict=True)):
        if layer is not None and config.keeps(window):
            raise ValueError(
                f"slots_per_head gives slots to layer {index}, {layer}, which keeps its sliding window of {window} "
                "tokens: give None in their place, or compress_windows=True"
            )
        if layer is None and not config.keeps(window):
            has = "no sliding window" if window is None else "a sliding window that is compressed"
            raise ValueError(
                f"slots_per_head gives None for layer {index}, which has {has}: give the slots of its "
                f"{shape['num_kv_heads']} KV heads"
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


def _apply(patch: Patch, model: nn.Module) -> None:
    decoder, changes = patch.decoder, patch.changes
    patch.family.install(changes, model, NAME)
    whole_text.add_hooks(patch)
    for index, layer in patch.layers.items():
        largest = max(patch.config.layer_configs(index), key=lambda config: config.num_fused)
        if largest.num_fused:
            head = COMPRESSORS[largest.compressor](largest, patch.family.head_dim(layer), **_factory(patch, layer))
            setattr(layer, HEAD, head.train(layer.training))
    if patch.config.has_features:
        _add_networks(patch)
    changes.hooks.append(decoder.register_forward_pre_hook(before_forward, with_kwargs=True))
    changes.hooks.append(decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True))
    for holder in models_around(model, decoder):
        add_generate_hooks(patch, holder)
        names = [name for name, _ in holder.named_parameters() if is_ours(name)]
        changes.set(holder, "_keys_to_ignore_on_save", [*(holder._keys_to_ignore_on_save or []), *names])
        if holder is not decoder and "logits_to_keep" in inspect.signature(type(holder).forward).parameters:
            ask = functools.partial(ask_for_last_states, patch)
            changes.hooks.append(holder.register_forward_pre_hook(ask, with_kwargs=True))


def _factory(patch: Patch, layer: Any) -> dict[str, Any]:
    return {"device": execution_device(layer), "dtype": patch.decoder.dtype}


def _add_networks(patch: Patch) -> None:
    """Put the network of a learned score into every layer; after all heads, whose weights do not depend on it."""
    score, num_kv_heads = SCORES[patch.config.score](), patch.family.shape["num_kv_heads"]
    for layer in patch.layers.values():
        network = score.network(num_kv_heads, patch.family.head_dim(layer), **_factory(patch, layer))
        if network is None or not hasattr(network, "num_features"):
            raise ValueError(
                f"score={patch.config.score!r} needs features, but {type(score).__name__}.network gives nothing that "
                "makes them: let it return a module with num_features"
            )
        # Which entries are kept has no gradient. Frozen, networks are nothing that DDP or an optimizer waits for.
        setattr(layer, NETWORK, network.train(layer.training).requires_grad_(False))


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give a model its full key-value cache back, with outputs as before, bit for bit. Returns the model.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    patch_of(model).undo()
    return model


@contextlib.contextmanager
def patched(
    model: nn.Module,
    config: LoCoCoConfig | None = None,
    *,
    heads: str | os.PathLike | None = None,
    attention: str = "auto",
    prefill_chunk_size: int | None = None,
) -> Iterator[nn.Module]:
    """A patched model inside a ``with`` block. Arguments as in ``patch_model``.

    A patch that has replaced this one inside the block stays.
    """
    patch_model(model, config, heads=heads, attention=attention, prefill_chunk_size=prefill_chunk_size)
    patch = patch_of(model)
    try:
        yield model
    finally:
        if patch.is_in_force:
            patch.undo()


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[nn.Module]:
    """The same patched model with its full cache inside a ``with`` block, bit for bit that of the unpatched model.

    It holds for all threads that read with the model. Heads stay where they are. Caches from inside the block are not
    for outside of it, nor the other way round.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    patch = patch_of(model)
    patch.close()
    was_suspended, patch.is_suspended = patch.is_suspended, True
    patch.changes.show_configs(through_views=False)
    try:
        yield model
    finally:
        if patch.is_in_force:
            patch.is_suspended = was_suspended
            patch.changes.show_configs(through_views=not was_suspended)
