"""What the families that go through Transformers' attention interface have in common."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lococo.compat import (
    CACHE_NAME,
    HAS_ATTENTION_INTERFACE,
    OLD_CACHE_NAME,
    OLDEST,
    argument_names,
    cache_argument,
)
from lococo.models.chatglm import (
    check_remote_chatglm,
    is_remote_attention,
    is_remote_chatglm,
    remote_apply_rotary,
    remote_attention_layers,
    remote_rotary,
    remote_shape,
)
from lococo.models.gemma3 import local_or_global_rotary

# These rotate by the longest text seen so far, so that a key's angle does not follow from its position alone.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def find_decoder(model: nn.Module) -> PreTrainedModel:
    """The innermost ``PreTrainedModel`` that holds the attention layers.

    Raises
    ------
    ValueError
        If there is none, or it is of a kind that cannot be patched; names the model and the reason.
    """
    name = type(model).__name__
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and is_remote_chatglm(module):
            check_remote_chatglm(module)
            return module
    if not HAS_ATTENTION_INTERFACE:
        raise ValueError(
            f"{name} needs transformers >= {OLDEST}, {transformers.__version__} is installed; with it only ChatGLM2 "
            "and ChatGLM3 in their own code can be patched"
        )
    holders = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and any(map(_is_decoder_attention, module.modules()))
    ]
    if not holders:
        raise ValueError(
            f"{name} is not supported: it has no Transformers decoder whose attention layers go through the attention "
            "interface (layer_idx, is_causal, num_key_value_groups)"
        )
    decoder = holders[-1]
    config = decoder.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is not supported: encoder-decoder models keep a second cache for the encoder")
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ValueError(
            f"{name} is not supported: its attention does not go through Transformers' attention interface"
        )
    if cache_argument(decoder) not in argument_names(type(decoder).forward):
        raise ValueError(
            f"{name} is not supported on transformers {transformers.__version__}: its decoder takes neither "
            f"{CACHE_NAME} nor {OLD_CACHE_NAME}"
        )
    layers = attention_layers(decoder)
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{name} is not supported: {len(layers)} of its {config.num_hidden_layers} layers are softmax attention, "
            "the others keep a state of their own"
        )
    if any(hasattr(layer, "sinks") for layer in layers.values()):
        raise ValueError(f"{name} is not supported: its attention has learned sinks (s_aux)")
    if any(hasattr(layer, "kv_lora_rank") for layer in layers.values()):
        raise ValueError(f"{name} is not supported: it caches latent vectors (multi-head latent attention)")
    if any(hasattr(layer, "lambda_q1") for layer in layers.values()):
        raise ValueError(f"{name} is not supported: its layers take the difference of two attentions")
    if not hasattr(sys.modules[type(layers[0]).__module__], "apply_rotary_pos_emb"):
        raise ValueError(f"{name} is not supported: its positions are not rotary")
    return decoder


def attention_layers(decoder: nn.Module) -> dict[int, Any]:
    """Attention modules by layer index."""
    if is_remote_chatglm(decoder):
        return remote_attention_layers(decoder)
    layers: list[Any] = [module for module in decoder.modules() if _is_decoder_attention(module)]
    return {module.layer_idx: module for module in sorted(layers, key=lambda module: module.layer_idx)}


def _is_decoder_attention(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
        and hasattr(module, "num_key_value_groups")
    )


def layer_head_dim(attention: Any) -> int:
    """Size of a key in an attention layer."""
    if is_remote_attention(attention):
        return attention.hidden_size_per_attention_head
    return attention.head_dim


def base_shape(model: nn.Module) -> dict[str, int]:
    """What heads must agree on with their base model: ``num_layers``, ``num_kv_heads`` and ``head_dim``.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model, patched or not, also inside PEFT or DDP.

    Returns
    -------
    dict
        The three sizes by name.

    Raises
    ------
    ValueError
        If there is no Transformers model in it.
    """
    config = base_config(model)
    if hasattr(config, "multi_query_group_num"):
        return remote_shape(config)
    config = config.get_text_config()
    return {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def base_config(model: nn.Module) -> Any:
    """Config of the outermost Transformers model in a module.

    Raises
    ------
    ValueError
        If there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.config
    raise ValueError(f"{type(model).__name__} must be, or hold, a Transformers model")


def uses_rotary(attention: Any) -> bool:
    """Whether this layer rotates its keys (SmolLM3 leaves some layers without positions).

    Raises
    ------
    ValueError
        If only the layer's own code can tell (Cohere 2, EXAONE 4, AFMoE).
    """
    if is_remote_attention(attention):
        return True
    if hasattr(attention, "use_rope"):
        return bool(attention.use_rope)
    if _rotates_on_condition(attention):
        raise ValueError(
            f"positions='slot' must know which layers rotate their keys, {type(attention).__name__} decides it in its "
            "own code; use positions='absolute'"
        )
    return True


def _rotates_on_condition(attention: Any) -> bool:
    source = textwrap.dedent(inspect.getsource(type(attention).forward))
    calls = [line for line in source.splitlines() if "apply_rotary_pos_emb(" in line]
    return any(len(line) - len(line.lstrip()) > 4 for line in calls)


def rotary_embedding(
    decoder: Any, attention: Any, like: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a layer's rotary embedding at some positions.

    Parameters
    ----------
    like : torch.Tensor
        Gives the dtype.
    positions : torch.Tensor
        (1, tokens).

    Returns
    -------
    tuple of torch.Tensor
        Each (1, tokens, rotary_dim), ChatGLM's own code (1, tokens, rotary_dim / 2), on the embedding's device.

    Raises
    ------
    ValueError
        If the model's rope type makes a key's angle depend on the length of the text.
    """
    if is_remote_chatglm(decoder):
        return remote_rotary(decoder, positions)
    rotary = local_or_global_rotary(decoder, attention) or decoder.rotary_emb
    extra, rope_type = {}, getattr(rotary, "rope_type", "default")
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        extra["layer_type"] = decoder.config.layer_types[attention.layer_idx]
        rope_type = rope_type[extra["layer_type"]]
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"positions='slot' needs angles that follow from the position alone, the model's rope type is "
            f"{rope_type!r}; use positions='absolute'"
        )
    device = next(rotary.buffers()).device
    return rotary(like.to(device), positions.to(device), **extra)


def apply_rotary(attention: Any) -> Callable:
    """The function that rotates a layer's queries and keys: (query, key, cos, sin), shapes as in Transformers."""
    if hasattr(attention, "core_attention"):
        return remote_apply_rotary(attention)
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb
