"""ChatGLM2 and ChatGLM3 in their own (remote) code, which knows neither the attention interface nor its caches.

There a hidden state is (tokens, batch, hidden_size), a key (tokens, batch, heads, head_dim), a cache a tuple of
tuples, and keyword arguments end at the decoder. While a call is read, ``Bridge`` takes the place of every layer's
core attention; the decoder itself is told that there is no cache and no padding.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lococo.compat import OUTPUT_CACHE
from lococo.models.changes import Changes
from lococo.models.family import ApplyRotary, Family, models_around, register_family

CONVERT = "convert the checkpoint with 'lococo convert-chatglm' and load it as GlmForCausalLM"


@register_family
class RemoteChatGLM(Family):
    """The ``ChatGLMModel`` of a checkpoint's own code."""

    instead = CONVERT
    tokens_dim = 0
    takes_cache = False

    @staticmethod
    def matches(module: PreTrainedModel) -> bool:
        """Whether it is a ``ChatGLMModel``."""
        return hasattr(module, "get_masks") and hasattr(module, "rotary_pos_emb") and hasattr(module, "encoder")

    def check(self, model: nn.Module) -> None:
        """Refuse prefix tuning."""
        length = getattr(self.decoder, "pre_seq_len", None)
        if length is not None:
            raise ValueError(
                f"{type(self.decoder).__name__} is not supported with prefix tuning (pre_seq_len={length}): its "
                "prefix is a cache of its own"
            )

    @staticmethod
    def shape_of(config: Any) -> dict[str, int]:
        """Sizes by the names that ChatGLM's config has for them."""
        kv_heads = config.multi_query_group_num if config.multi_query_attention else config.num_attention_heads
        return {"num_layers": config.num_layers, "num_kv_heads": kv_heads, "head_dim": config.kv_channels}

    @property
    def mlp_size(self) -> int:
        """Width of the MLP between its matrices."""
        return self.config.ffn_hidden_size

    @property
    def max_positions(self) -> int | None:
        """Length of the decoder's table of angles."""
        return self.decoder.seq_length

    @functools.cached_property
    def layers(self) -> dict[int, Any]:
        """``SelfAttention`` modules by their place."""
        return {index: block.self_attention for index, block in enumerate(self.decoder.encoder.layers)}

    def head_dim(self, layer: Any) -> int:
        """Size of a key in an attention layer."""
        return layer.hidden_size_per_attention_head

    def rotary(self, layer: Any, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each (1 or batch, tokens, rotary_dim / 2) in float32."""
        table = self._angles[positions.to(self._angles.device)].float()
        return table[..., 0], table[..., 1]

    @functools.cached_property
    def _angles(self) -> torch.Tensor:
        """(max_positions, rotary_dim / 2, 2): made anew for every call, one would wait for its last position."""
        return self.decoder.rotary_pos_emb(self.max_positions)

    def apply_rotary(self, layer: Any) -> ApplyRotary:
        """The code's own rotation, with the arguments and shapes of Transformers'."""
        rotate = sys.modules[type(layer).__module__].apply_rotary_pos_emb

        def apply(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
            table = torch.stack([cos, sin], dim=-1).transpose(0, 1)  # (tokens, batch, rotary_dim / 2, 2)
            if table.shape[1] != key.shape[0]:
                table = table.expand(-1, key.shape[0], -1, -1)
            rotated = (rotate(states.permute(2, 0, 1, 3), table.contiguous()) for states in (query, key))
            return tuple(states.permute(1, 2, 0, 3) for states in rotated)

        return apply

    def install(self, changes: Changes, model: nn.Module, attention: str) -> None:
        """Bridge every layer; say what to do where Transformers can no longer generate with this code."""
        for index, layer in self.layers.items():
            changes.set(layer, "layer_idx", index)
            changes.set(layer.core_attention, "forward", Bridge(self, layer))
        for holder in models_around(model, self.decoder):
            if holder is not self.decoder and not hasattr(holder, "generate"):
                changes.set(holder, "generate", refuse_generate)

    def arguments(self, kwargs: dict[str, Any], attend: functools.partial) -> dict[str, Any]:
        """Without cache and padding. Refuses gradient checkpointing, which would run the layers after the forward."""
        if kwargs.get("full_attention_mask") is not None:
            raise ValueError("full_attention_mask is not supported by a patched ChatGLM; pass a 2-D attention_mask")
        decoder = self.decoder
        if decoder.training and torch.is_grad_enabled() and decoder.encoder.gradient_checkpointing:
            raise ValueError(
                f"gradient checkpointing is not supported in {type(decoder).__name__}'s own code: {CONVERT}"
            )
        kwargs = super().arguments(kwargs, attend)
        return {**kwargs, "attention_mask": None, "past_key_values": None, "use_cache": False}

    def hand_out(self, output: Any, cache: Any) -> Any:
        """The cache in its place in an output, or after the hidden states of a tuple."""
        if isinstance(output, tuple):
            return (output[0], cache, *output[1:])
        setattr(output, OUTPUT_CACHE, cache)
        return output


@dataclasses.dataclass
class Bridge:
    """Stands in for ``CoreAttention.forward`` of a layer and hands what it gets on to our attention function."""

    family: RemoteChatGLM
    layer: Any

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention output of the layer.

        Parameters
        ----------
        query, key, value : torch.Tensor
            (tokens, batch, heads, head_dim), keys and values repeated for every query head.

        Returns
        -------
        torch.Tensor
            (tokens, batch, heads * head_dim).
        """
        attend = self.family.attending.attend
        if attend is None:  # suspended
            core = self.layer.core_attention
            return type(core).forward(core, query, key, value, attention_mask)
        kv_heads = self.family.shape["num_kv_heads"]
        key, value = (states.unflatten(2, (kv_heads, -1))[:, :, :, 0] for states in (key, value))
        states = (states.permute(1, 2, 0, 3) for states in (query, key, value))  # (batch, heads, tokens, head_dim)
        output, _ = attend(self.layer, *states)  # (batch, tokens, heads, head_dim)
        return output.transpose(0, 1).flatten(2)


def refuse_generate(*args, **kwargs) -> None:
    """Stand in for ``generate`` where the checkpoint's own code is too old for it."""
    raise ValueError(f"this Transformers release cannot generate with ChatGLM's own code: {CONVERT}")
