"""Models of a named shape with random weights: right for speed and memory, never for quality."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig, PreTrainedModel

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-2-7b": (
        LlamaConfig,
        dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        ),
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=LLAMA_3_ROPE,
        ),
    ),
    "chatglm3-6b": (
        GlmConfig,
        dict(
            vocab_size=65024,
            hidden_size=4096,
            intermediate_size=13696,
            num_hidden_layers=28,
            num_attention_heads=32,
            num_key_value_heads=2,
            head_dim=128,
            partial_rotary_factor=0.5,
            attention_bias=True,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            pad_token_id=0,
            eos_token_id=2,
        ),
    ),
    "smollm2-135m": (
        LlamaConfig,
        dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
        ),
    ),
    "tiny": (
        LlamaConfig,
        dict(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        ),
    ),
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
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config_class, sizes = SHAPES[name]
    with device:
        return AutoModelForCausalLM.from_config(config_class(**sizes), dtype=dtype).eval()
