"""What the families that go through Transformers' attention interface have in common."""

from __future__ import annotations

import dis
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
    Cache,
    argument_names,
    cache_argument,
)
from lococo.models.chatglm.family import (
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
LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


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
    decoder = _only_decoder(model, holders)
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
    if any(hasattr(holder, "_update_causal_mask") for holder in holders if holder is not decoder):
        raise ValueError(
            f"{name} is not supported: a model around its decoder makes (tokens x tokens) masks of its own"
        )
    layers = attention_layers(decoder)
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{name} is not supported: {len(layers)} of its {config.num_hidden_layers} layers are softmax attention, "
            "the others keep a state of their own"
        )
    _check_attention(name, decoder, layers)
    return decoder


def _check_attention(name: str, decoder: Any, layers: dict[int, Any]) -> None:
    """Refuse attention that is not softmax attention with rotary keys of one shape through Transformers' interface."""
    module = sys.modules[type(decoder).__module__]
    if not all("ALL_ATTENTION_FUNCTIONS" in _names_in_forward(layer) for layer in layers.values()):
        raise ValueError(
            f"{name} is not supported: {type(layers[0]).__name__} attends in its own code, not through Transformers' "
            "attention interface"
        )
    if not all(_hands_keywords_on(decoder, layer) for layer in layers.values()):
        raise ValueError(
            f"{name} is not supported: its decoder layers keep keyword arguments from {type(layers[0]).__name__}"
        )
    strange = sorted(set(getattr(decoder.config, "layer_types", None) or ()) - LAYER_TYPES)
    if strange or any(hasattr(layer, "indexer") for layer in layers.values()):
        raise ValueError(
            f"{name} is not supported: some of its layers choose what they attend to in a way of their own "
            f"({', '.join(strange) or 'indexer'})"
        )
    if any(hasattr(layer, "sinks") for layer in layers.values()):
        raise ValueError(f"{name} is not supported: its attention has learned sinks (s_aux)")
    if any(_is_cache_class(each, type(decoder).__module__) for each in vars(module).values()):
        raise ValueError(f"{name} is not supported: it reads a cache of its own kind alone")
    if hasattr(decoder.config, "cross_attention_layers"):
        raise ValueError(f"{name} is not supported: its cross-attention keeps keys and values of images in the cache")
    if any(hasattr(layer, "kv_lora_rank") for layer in layers.values()):
        raise ValueError(f"{name} is not supported: it caches latent vectors (multi-head latent attention)")
    if any(hasattr(layer, "lambda_q1") for layer in layers.values()):
        raise ValueError(f"{name} is not supported: its layers take the difference of two attentions")
    if not hasattr(sys.modules[type(layers[0]).__module__], "apply_rotary_pos_emb"):
        raise ValueError(f"{name} is not supported: its positions are not rotary")
    if _is_multimodal_rotary(decoder, layers[0]):
        raise ValueError(
            f"{name} is not supported: its rotary positions have three parts, of time, height and width (mrope)"
        )
    if any(getattr(layer, "is_kv_shared_layer", False) for layer in layers.values()):
        raise ValueError(f"{name} is not supported: some of its layers read the keys and values of others")
    sizes = {(layer.head_dim, layer.num_key_value_groups) for layer in layers.values()}
    if len(sizes) > 1:
        found = ", ".join(f"{head_dim} ({groups} query heads per KV head)" for head_dim, groups in sorted(sizes))
        raise ValueError(f"{name} is not supported: its layers differ in the size of their heads: {found}")
    (head_dim, groups), shape = sizes.pop(), base_shape(decoder)
    queries = decoder.config.get_text_config().num_attention_heads
    if (head_dim, groups * shape["num_kv_heads"]) != (shape["head_dim"], queries):
        raise ValueError(
            f"{name} is not supported: its config says {queries} query heads, {shape['num_kv_heads']} KV heads and "
            f"head_dim={shape['head_dim']}, its layers have head_dim={head_dim} and {groups} query heads per KV head"
        )


def _is_cache_class(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Cache) and value.__module__ == module


def _hands_keywords_on(decoder: nn.Module, attention: nn.Module) -> bool:
    """Whether the module around an attention layer calls something with keyword arguments that it does not know."""
    around = [module for module in decoder.modules() if any(child is attention for child in module.children())]
    codes = [getattr(inspect.unwrap(type(module).forward), "__code__", None) for module in around]
    return all(
        code is None or any(step.opname == "CALL_FUNCTION_EX" for step in dis.get_instructions(code)) for code in codes
    )


def _names_in_forward(layer: nn.Module) -> tuple[str, ...]:
    """Names that the forward of a layer's class looks up."""
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return () if code is None else code.co_names


def _is_multimodal_rotary(decoder: Any, attention: Any) -> bool:
    rope = getattr(decoder.config, "rope_parameters", None) or getattr(decoder.config, "rope_scaling", None) or {}
    has_sections = "mrope_section" in rope or any(hasattr(module, "mrope_section") for module in decoder.modules())
    return has_sections or "apply_multimodal_rotary_pos_emb" in _names_in_forward(attention)


def _only_decoder(model: nn.Module, holders: list[PreTrainedModel]) -> PreTrainedModel:
    """The innermost of some models that hold attention layers, if it is one."""
    innermost = [
        each for each in holders if not any(child in holders for child in each.modules() if child is not each)
    ]
    if len(innermost) > 1:
        names = {module: name for name, module in model.named_modules()}
        raise ValueError(
            f"{type(model).__name__} is not supported: it holds several decoders "
            f"({', '.join(names[each] for each in innermost)}); patch the one that is meant"
        )
    return innermost[0]


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


def length_dependent_rotaries(decoder: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a decoder whose tables depend on the longest position of a call."""
    return [module for module in decoder.modules() if _depends_on_length(getattr(module, "rope_type", None))]


def _depends_on_length(rope_type: str | dict[str, str] | None) -> bool:
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(each in LENGTH_DEPENDENT_ROPE for each in types)


def uses_rotary(attention: Any) -> bool:
    """Whether this layer rotates its keys (SmolLM3 leaves some layers without positions).

    Raises
    ------
    ValueError
        If only the layer's own code can tell (Cohere 2, EXAONE 4, AFMoE), or a key cannot be rotated any more
        (HunYuan).
    """
    if is_remote_attention(attention):
        return True
    if _norms_after_rotation(attention):
        raise ValueError(
            f"positions='slot' must rotate keys anew, those of {type(attention).__name__} are normed with weights "
            "after they were rotated; use positions='absolute'"
        )
    if hasattr(attention, "use_rope"):
        return bool(attention.use_rope)
    if _rotates_on_condition(attention):
        raise ValueError(
            f"positions='slot' must know which layers rotate their keys, {type(attention).__name__} decides it in its "
            "own code; use positions='absolute'"
        )
    return True


def _norms_after_rotation(attention: Any) -> bool:
    """Whether a layer's code turns to a norm with weights after it has rotated keys."""
    code = getattr(inspect.unwrap(type(attention).forward), "__code__", None)
    names = [] if code is None else [step.argval for step in dis.get_instructions(code)]
    if "apply_rotary_pos_emb" not in names:
        return False
    later = set(map(str, names[names.index("apply_rotary_pos_emb") :]))
    norms = [module for name, module in attention.named_children() if "norm" in name and name in later]
    return any(True for norm in norms for _ in norm.parameters())


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
