"""Families that go through Transformers' attention interface."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lococo.compat import CACHE_NAME, HAS_ATTENTION_INTERFACE, OLD_CACHE_NAME, Cache, argument_names, cache_argument
from lococo.models.changes import Changes
from lococo.models.config_view import config_view, view_around
from lococo.models.family import ApplyRotary, Family, models_around, register_family

# These rotate by the longest text seen so far, so that a key's angle does not follow from its position alone.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
WINDOW_LAYER = "sliding_attention"
LAYER_TYPES = {"full_attention", WINDOW_LAYER, "attention"}
WINDOW_MASK = "create_sliding_window_causal_mask"
ROTATE = "apply_rotary_pos_emb"
# Bytecode that ends a function, or goes on elsewhere alone.
RETURNS = {"RETURN_VALUE", "RETURN_CONST"}
NEVER_GO_ON = {
    "RAISE_VARARGS",
    "RERAISE",
    "JUMP_ABSOLUTE",
    "JUMP_FORWARD",
    "JUMP_BACKWARD",
    "JUMP_BACKWARD_NO_INTERRUPT",
}


@register_family
class TransformersFamily(Family):
    """Decoders whose attention layers look their attention function up by a name in their config."""

    is_general = True  # most configs have its fields

    @staticmethod
    def matches(module: PreTrainedModel) -> bool:
        """Whether there are softmax attention layers of Transformers' kind in it."""
        return HAS_ATTENTION_INTERFACE and any(map(_is_decoder_attention, module.modules()))

    def check(self, model: nn.Module) -> None:
        """Refuse all but softmax attention with rotary keys of one shape through Transformers' interface."""
        for objection in self._objections(model):
            raise ValueError(f"{type(model).__name__} is not supported{objection}")

    def _objections(self, model: nn.Module) -> Iterator[str]:
        """Why the decoder cannot be patched; every objection takes for granted that there are none before it."""
        decoder, config, layers = self.decoder, self.decoder.config, self.layers
        module, around = sys.modules[type(decoder).__module__], models_around(model, decoder)[:-1]
        if config.is_encoder_decoder:
            yield ": encoder-decoder models keep a second cache for the encoder"
        if not getattr(decoder, "_supports_attention_backend", False):
            yield ": its attention does not go through Transformers' attention interface"
        if cache_argument(decoder) not in argument_names(type(decoder).forward):
            yield (
                f" on transformers {transformers.__version__}: its decoder takes neither {CACHE_NAME} nor "
                f"{OLD_CACHE_NAME}"
            )
        if any(hasattr(holder, "_update_causal_mask") for holder in around):
            yield ": a model around its decoder makes (tokens x tokens) masks of its own"
        if len(layers) != config.num_hidden_layers:
            yield (
                f": {len(layers)} of its {config.num_hidden_layers} layers are softmax attention, the others keep a "
                "state of their own"
            )
        kind = type(layers[0]).__name__
        if not all("ALL_ATTENTION_FUNCTIONS" in _names_in_forward(layer) for layer in layers.values()):
            yield f": {kind} attends in its own code, not through Transformers' attention interface"
        if not all(_hands_keywords_on(decoder, layer) for layer in layers.values()):
            yield f": its decoder layers keep keyword arguments from {kind}"
        strange = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
        if strange or _any_has(layers, "indexer"):
            yield (
                ": some of its layers choose what they attend to in a way of their own "
                f"({', '.join(strange) or 'indexer'})"
            )
        if _any_has(layers, "sinks"):
            yield ": its attention has learned sinks (s_aux)"
        if any(_is_cache_class(each, type(decoder).__module__) for each in vars(module).values()):
            yield ": it reads a cache of its own kind alone"
        if hasattr(config, "cross_attention_layers"):
            yield ": its cross-attention keeps keys and values of images in the cache"
        if _any_has(layers, "kv_lora_rank"):
            yield ": it caches latent vectors (multi-head latent attention)"
        if _any_has(layers, "lambda_q1"):
            yield ": its layers take the difference of two attentions"
        if not hasattr(sys.modules[type(layers[0]).__module__], ROTATE):
            yield ": its positions are not rotary"
        if _is_multimodal_rotary(decoder, layers[0]):
            yield ": its rotary positions have three parts, of time, height and width (mrope)"
        if any(getattr(layer, "is_kv_shared_layer", False) for layer in layers.values()):
            yield ": some of its layers read the keys and values of others"
        sizes = {(layer.head_dim, layer.num_key_value_groups) for layer in layers.values()}
        if len(sizes) > 1:
            found = ", ".join(f"{head_dim} ({groups} query heads per KV head)" for head_dim, groups in sorted(sizes))
            yield f": its layers differ in the size of their heads: {found}"
        (head_dim, groups), shape = sizes.pop(), self.shape
        kv_heads, queries = shape["num_kv_heads"], self.config.num_attention_heads
        if (head_dim, groups * kv_heads) != (shape["head_dim"], queries):
            yield (
                f": its config says {queries} query heads, {kv_heads} KV heads and head_dim={shape['head_dim']}, its "
                f"layers have head_dim={head_dim} and {groups} query heads per KV head"
            )

    @staticmethod
    def shape_of(config: Any) -> dict[str, int]:
        """Sizes of a text model, alone or inside a model of several parts."""
        config = config.get_text_config()
        return {
            "num_layers": config.num_hidden_layers,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        }

    @functools.cached_property
    def layers(self) -> dict[int, Any]:
        """Attention modules by the index that they have of themselves."""
        layers: list[Any] = [module for module in self.decoder.modules() if _is_decoder_attention(module)]
        return {module.layer_idx: module for module in sorted(layers, key=lambda module: module.layer_idx)}

    @property
    def config(self) -> Any:
        """The part of the decoder's config that is about text."""
        return self.decoder.config.get_text_config()

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """By the masks that the decoder makes: what counts is not what its layers ask for (OLMoE, PhiMoE)."""
        window = getattr(self.config, "sliding_window", None)
        if window is None or WINDOW_MASK not in _names_in_forward(self.decoder):
            return super().windows
        types = getattr(self.config, "layer_types", None)
        return tuple(window if types is None or types[index] == WINDOW_LAYER else None for index in self.layers)

    def head_dim(self, layer: Any) -> int:
        """Size of a key in an attention layer."""
        return layer.head_dim

    def uses_rotary(self, layer: Any) -> bool:
        """Whether a layer rotates its keys (SmolLM3 leaves some layers without positions).

        Raises
        ------
        ValueError
            If only the layer's own code can tell (Cohere 2, EXAONE 4, AFMoE), or a key cannot be rotated any more
            (HunYuan).
        """
        if _norms_after_rotation(layer):
            raise ValueError(f"those of {type(layer).__name__} are normed with weights after they were rotated")
        if hasattr(layer, "use_rope"):
            return bool(layer.use_rope)
        if _may_not_rotate(layer):
            raise ValueError(f"but which layers rotate theirs {type(layer).__name__} decides in its own code")
        return True

    def rotary(self, layer: Any, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a layer's rotary embedding, each (1, tokens, rotary_dim); see ``Family.rotary``."""
        rotary, extra = self.decoder.rotary_emb, {}
        if hasattr(self.decoder, "rotary_emb_local") and layer.is_sliding:  # Gemma 3 before Transformers 5
            rotary = self.decoder.rotary_emb_local
        rope_type = getattr(rotary, "rope_type", "default")
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            extra["layer_type"] = self.decoder.config.layer_types[layer.layer_idx]
            rope_type = rope_type[extra["layer_type"]]
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise ValueError(f"those of rope type {rope_type!r} have angles that depend on the length of the text")
        device = next(rotary.buffers()).device
        return rotary(like.to(device), positions.to(device), **extra)

    def apply_rotary(self, layer: Any) -> ApplyRotary:
        """The function of the layer's modeling file."""
        return getattr(sys.modules[type(layer).__module__], ROTATE)

    def install(self, changes: Changes, model: nn.Module, attention: str) -> None:
        """Let the decoder find the attention in its config, and no other model that shares the config."""
        config, views = self.decoder.config, {}
        for module in self.readers_of_configs:
            if id(module.config) not in views:
                views[id(module.config)] = config_view(module.config, attention)
            changes.view_config(module, views[id(module.config)])
        # Of a model of several parts the innermost around the decoder makes its masks; those around it show what
        # they had.
        seen = {id(config)}
        for holder in reversed(models_around(model, self.decoder)):
            if id(holder.config) not in seen:
                seen.add(id(holder.config))
                around = view_around(holder.config, config, views[id(config)])
                if around is not None:
                    changes.view_config(holder, around)

    @functools.cached_property
    def readers_of_configs(self) -> Sequence[Any]:
        """The decoder, which makes the mask, and the attention layers."""
        return (self.decoder, *self.layers.values())

    def arguments(self, kwargs: dict[str, Any], attend: functools.partial) -> dict[str, Any]:
        """With the keywords: decoders hand those they do not know on to the attention function."""
        return {**kwargs, **attend.keywords}


def _any_has(layers: dict[int, Any], attribute: str) -> bool:
    return any(hasattr(layer, attribute) for layer in layers.values())


def _is_cache_class(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Cache) and value.__module__ == module


def _steps(module: nn.Module) -> list[dis.Instruction]:
    """The bytecode of the forward of a module's class; none where it is not Python's."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return [] if code is None else list(dis.get_instructions(code))


def _names_in_forward(module: nn.Module) -> set[Any]:
    """Names, and constants, that the forward of a module's class looks up."""
    return {step.argval for step in _steps(module) if isinstance(step.argval, str)}


def _hands_keywords_on(decoder: nn.Module, attention: nn.Module) -> bool:
    """Whether the module around an attention layer calls something with keyword arguments that it does not know."""
    around = [module for module in decoder.modules() if any(child is attention for child in module.children())]
    return all(not steps or any(step.opname == "CALL_FUNCTION_EX" for step in steps) for steps in map(_steps, around))


def _is_multimodal_rotary(decoder: Any, attention: Any) -> bool:
    rope = getattr(decoder.config, "rope_parameters", None) or getattr(decoder.config, "rope_scaling", None) or {}
    has_sections = "mrope_section" in rope or any(hasattr(module, "mrope_section") for module in decoder.modules())
    return has_sections or "apply_multimodal_rotary_pos_emb" in _names_in_forward(attention)


def _is_decoder_attention(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False)
        and hasattr(module, "num_key_value_groups")
    )


def length_dependent_rotaries(decoder: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a decoder whose tables depend on the longest position of a call."""
    return [module for module in decoder.modules() if _depends_on_length(getattr(module, "rope_type", None))]


def _depends_on_length(rope_type: str | dict[str, str] | None) -> bool:
    types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(each in LENGTH_DEPENDENT_ROPE for each in types)


def _norms_after_rotation(layer: nn.Module) -> bool:
    """Whether a layer's code turns to a norm with weights after it has rotated keys."""
    names = [step.argval for step in _steps(layer)]
    later = set(map(str, names[names.index(ROTATE) :])) if ROTATE in names else set()
    norms = [module for name, module in layer.named_children() if "norm" in name and name in later]
    return any(True for norm in norms for _ in norm.parameters())


def _may_not_rotate(layer: nn.Module) -> bool:
    """Whether one way through a layer's code leads to its end past the rotation that is on another."""
    steps = _steps(layer)
    if all(step.argval != ROTATE for step in steps):
        return False
    at = {step.offset: index for index, step in enumerate(steps)}
    waiting, seen = [0], set()
    while waiting:
        index = waiting.pop()
        step = steps[index]
        if index in seen or step.argval == ROTATE:
            continue
        seen.add(index)
        if step.opname in RETURNS:
            return True
        if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            waiting.append(at[step.argval])
        if step.opname not in NEVER_GO_ON:
            waiting.append(index + 1)
    return False
