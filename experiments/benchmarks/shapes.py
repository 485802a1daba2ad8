"""Models of a named shape with random weights: right for speed and memory, never for quality."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig, PreTrainedModel

_LLAMA_3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def _sizes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, positions: int) -> dict:
    return dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
    )


SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-2-7b": (LlamaConfig, _sizes(32000, 4096, 11008, 32, 32, 32, 4096)),
    "llama-3.1-8b": (
        LlamaConfig,
        _sizes(128256, 4096, 14336, 32, 32, 8, 131072)
        | dict(rope_theta=500000.0, rope_scaling={**_LLAMA_3, "original_max_position_embeddings": 8192}),
    ),
    "chatglm3-6b": (
        GlmConfig,
        _sizes(65024, 4096, 13696, 28, 32, 2, 8192)
        | dict(head_dim=128, partial_rotary_factor=0.5, attention_bias=True, pad_token_id=0, eos_token_id=2),
    ),
    "smollm2-135m": (
        LlamaConfig,
        _sizes(49152, 576, 1536, 30, 9, 3, 8192) | dict(rope_theta=100000.0, tie_word_embeddings=True),
    ),
    "tiny": (LlamaConfig, _sizes(256, 64, 128, 2, 4, 2, 8192)),
}


def build(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of a shape, made where it will run.

    Parameters
    ----------
    name : str
        One of ``SHAPES``.
    dtype : torch.dtype, optional
        None: bfloat16, on a CPU float32.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    ValueError
        If there is no such shape.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}: choose from {', '.join(SHAPES)}")
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config_class, sizes = SHAPES[name]
    with device:
        return AutoModelForCausalLM.from_config(config_class(**sizes), dtype=dtype).eval()
