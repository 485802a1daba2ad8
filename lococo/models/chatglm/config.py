"""The config of ChatGLM2 and ChatGLM3: read, checked, and expressed as ``GlmConfig``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lococo.models.chatglm.shards import read_json

# All that GlmForCausalLM can express; also what the original code takes for a field that is not given.
ONLY_VALUES = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "pre_seq_len": None,
    "quantization_bit": 0,
}
KINDS = {"int": "an integer of at least 1", "float": "a number above 0", "bool": "true or false"}


@dataclass(frozen=True)
class ChatGLMConfig:
    """Fields of a ChatGLM ``config.json`` that shape the model, with the original code's defaults.

    Parameters
    ----------
    num_layers, padded_vocab_size, hidden_size, ffn_hidden_size, kv_channels, num_attention_heads, seq_length : int
        Sizes; ``kv_channels`` is the head dimension, ``seq_length`` the longest text.
    layernorm_epsilon : float
        Of every RMS norm.
    multi_query_attention : bool
        Whether heads share keys and values, in ``multi_query_group_num`` groups.
    add_qkv_bias : bool
        Whether the fused projection of queries, keys and values has a bias.
    rope_ratio : float
        ChatGLM3 multiplies the base of its rotary embedding, 10000, with it; ChatGLM2 divides positions by it.
    """

    num_layers: int
    padded_vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int
    num_attention_heads: int
    seq_length: int
    layernorm_epsilon: float = 1e-5
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    add_qkv_bias: bool = False
    rope_ratio: float = 1.0

    @classmethod
    def from_file(cls, path: Path) -> ChatGLMConfig:
        """The config in a ``config.json``.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is not of ChatGLM2 or ChatGLM3, a field is missing or has a wrong value, or it asks for what
            ``GlmForCausalLM`` cannot express.
        """
        content = read_json(path)
        if content.get("model_type") != "chatglm":
            raise ValueError(f"{path}: model_type must be 'chatglm', got {content.get('model_type')!r}")
        for field in dataclasses.fields(cls):
            _check_field(field, content, path)
        for name, right in ONLY_VALUES.items():
            if content.get(name, right) != right:
                raise ValueError(
                    f"{path}: {name} must be {right!r}, since GlmForCausalLM has no other, got {content[name]!r}"
                )
        config = cls(**{field.name: content[field.name] for field in dataclasses.fields(cls) if field.name in content})
        if config.num_attention_heads % config.num_kv_heads:
            raise ValueError(
                f"{path}: multi_query_group_num must divide num_attention_heads={config.num_attention_heads}, "
                f"got {config.num_kv_heads}"
            )
        return config

    @property
    def num_kv_heads(self) -> int:
        """Heads that have keys and values of their own."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a checkpoint by its original name."""
        hidden, ffn, query = self.hidden_size, self.ffn_hidden_size, self.num_attention_heads * self.kv_channels
        fused = query + 2 * self.num_kv_heads * self.kv_channels
        layer = {
            "input_layernorm.weight": (hidden,),
            "self_attention.query_key_value.weight": (fused, hidden),
            "self_attention.dense.weight": (hidden, query),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            "mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
        if self.add_qkv_bias:
            layer["self_attention.query_key_value.bias"] = (fused,)
        return {
            "transformer.embedding.word_embeddings.weight": (self.padded_vocab_size, hidden),
            **{
                f"transformer.encoder.layers.{index}.{name}": shape
                for index in range(self.num_layers)
                for name, shape in layer.items()
            },
            "transformer.encoder.final_layernorm.weight": (hidden,),
            "transformer.output_layer.weight": (self.padded_vocab_size, hidden),
        }

    def native(self, generation: int) -> dict[str, Any]:
        """Content of ``config.json`` for the same model as ``GlmForCausalLM``, without token ids and dtype.

        Rotary parameters stand where Transformers 4 expects them; Transformers 5 moves them into ``rope_parameters``.

        Parameters
        ----------
        generation : int
            2 for ChatGLM2, 3 for ChatGLM3.

        Returns
        -------
        dict
            Plain JSON values.
        """
        scales_positions = generation == 2 and self.rope_ratio != 1
        return {
            "architectures": ["GlmForCausalLM"],
            "model_type": "glm",
            "vocab_size": self.padded_vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.kv_channels,
            "hidden_act": "silu",
            "attention_bias": self.add_qkv_bias,
            "attention_dropout": 0.0,
            "max_position_embeddings": self.seq_length,
            "rms_norm_eps": self.layernorm_epsilon,
            "rope_theta": 10000.0 * (1 if scales_positions else self.rope_ratio),
            "rope_scaling": {"rope_type": "linear", "factor": float(self.rope_ratio)} if scales_positions else None,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "bos_token_id": None,
        }


def _check_field(field: dataclasses.Field, content: dict[str, Any], path: Path) -> None:
    if field.name not in content:
        if field.default is dataclasses.MISSING:
            raise ValueError(f"{path} has no {field.name}, which every ChatGLM2 and ChatGLM3 config has")
        return
    value, kind = content[field.name], str(field.type)
    if kind == "bool":
        valid = isinstance(value, bool)
    else:
        valid = not isinstance(value, bool) and isinstance(value, int if kind == "int" else int | float) and value > 0
    if not valid:
        raise ValueError(f"{path}: {field.name} must be {KINDS[kind]}, got {value!r}")
