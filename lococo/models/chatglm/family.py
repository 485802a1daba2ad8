"""ChatGLM2 and ChatGLM3 in their own (remote) code, which knows neither the attention interface nor its caches.

There a hidden state is (tokens, batch, hidden_size), a key (tokens, batch, heads, head_dim), a cache a tuple of
tuples, and keyword arguments end at the decoder. While a call is read, ``Bridge`` takes the place of every layer's
core attention; the decoder itself is told that there is no cache and no padding.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Attribute of the decoder that holds the attention function of the call being read.
ATTEND = "lococo_attend"

CONVERT = "convert the checkpoint with 'lococo convert-chatglm' and load it as GlmForCausalLM"


def is_remote_chatglm(decoder: nn.Module) -> bool:
    """Whether a module is the ``ChatGLMModel`` of a checkpoint's own code."""
    return hasattr(decoder, "get_masks") and hasattr(decoder, "rotary_pos_emb") and hasattr(decoder, "encoder")


def is_remote_attention(layer: nn.Module) -> bool:
    """Whether a module is the ``SelfAttention`` of that code."""
    return hasattr(layer, "core_attention")


def check_remote_chatglm(decoder: Any) -> None:
    """Refuse what its code can do and ours cannot.

    Raises
    ------
    ValueError
        For prefix tuning.
    """
    if getattr(decoder, "pre_seq_len", None) is not None:
        raise ValueError(
            f"{type(decoder).__name__} is not supported with prefix tuning (pre_seq_len={decoder.pre_seq_len}): its "
            "prefix is a cache of its own"
        )


def remote_attention_layers(decoder: Any) -> dict[int, Any]:
    """``SelfAttention`` modules by layer index."""
    return {index: block.self_attention for index, block in enumerate(decoder.encoder.layers)}


def remote_shape(config: Any) -> dict[str, int]:
    """Sizes as in ``base_shape``."""
    kv_heads = config.multi_query_group_num if config.multi_query_attention else config.num_attention_heads
    return {"num_layers": config.num_layers, "num_kv_heads": kv_heads, "head_dim": config.kv_channels}


@dataclasses.dataclass
class Bridge:
    """Stands in for ``CoreAttention.forward`` of a layer and hands what it gets to the call's attention function."""

    decoder: Any
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
        attend = vars(self.decoder).get(ATTEND)
        if attend is None:  # suspended
            core = self.layer.core_attention
            return type(core).forward(core, query, key, value, attention_mask)
        kv_heads = remote_shape(self.decoder.config)["num_kv_heads"]
        key, value = (states.unflatten(2, (kv_heads, -1))[:, :, :, 0] for states in (key, value))
        states = (states.permute(1, 2, 0, 3) for states in (query, key, value))  # (batch, heads, tokens, head_dim)
        output, _ = attend(self.layer, *states)  # (batch, tokens, heads, head_dim)
        return output.transpose(0, 1).flatten(2)


def bridges(decoder: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Attributes, as (module, name, value), that make the layers look like those of other families."""
    for index, layer in remote_attention_layers(decoder).items():
        yield layer, "layer_idx", index
        yield layer.core_attention, "forward", Bridge(decoder, layer)


def check_length(decoder: Any, tokens: int) -> None:
    """Refuse positions beyond the decoder's table of angles.

    Raises
    ------
    ValueError
        If there are more positions than the table has.
    """
    if tokens > decoder.seq_length:
        raise ValueError(
            f"{tokens} positions are more than the {decoder.seq_length} of this model (seq_length): read less, or use "
            "positions='slot', which needs num_slots + block_size of them"
        )


def remote_arguments(decoder: Any, kwargs: dict[str, Any], attend: Callable) -> dict[str, Any]:
    """Arguments of the decoder's forward for a call that ``attend`` reads.

    Raises
    ------
    ValueError
        For a mask that is not 2-D, and with gradient checkpointing, which would run the layers once more after the
        call.
    """
    if kwargs.get("full_attention_mask") is not None:
        raise ValueError("full_attention_mask is not supported by a patched ChatGLM; pass a 2-D attention_mask")
    if decoder.training and torch.is_grad_enabled() and decoder.encoder.gradient_checkpointing:
        raise ValueError(f"gradient checkpointing is not supported in {type(decoder).__name__}'s own code: {CONVERT}")
    setattr(decoder, ATTEND, attend)
    return {**kwargs, "attention_mask": None, "past_key_values": None, "use_cache": False}


def end_call(decoder: Any) -> Any:
    """Forget the call's attention function and return it; None if there is none."""
    return vars(decoder).pop(ATTEND, None)


def remote_rotary(decoder: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines at (1, tokens) positions, each (1, tokens, rotary_dim / 2) in float32."""
    table = decoder.rotary_pos_emb(int(positions.max()) + 1)[positions].float()  # (1, tokens, rotary_dim / 2, 2)
    return table[..., 0], table[..., 1]


def remote_apply_rotary(attention: Any) -> Callable:
    """The code's own rotation, with the arguments and shapes of Transformers' ``apply_rotary_pos_emb``."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def apply(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        table = torch.stack([cos, sin], dim=-1).transpose(0, 1)  # (tokens, batch, rotary_dim / 2, 2)
        if table.shape[1] != key.shape[0]:
            table = table.expand(-1, key.shape[0], -1, -1)
        rotated = (rotate(states.permute(2, 0, 1, 3), table.contiguous()) for states in (query, key))
        return tuple(states.permute(1, 2, 0, 3) for states in rotated)

    return apply


def refuse_generate(*args, **kwargs) -> None:
    """Stand in for ``generate`` where the checkpoint's own code is too old for it."""
    raise ValueError(f"this Transformers release cannot generate with ChatGLM's own code: {CONVERT}")
