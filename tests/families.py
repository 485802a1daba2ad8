"""Tiny models of every family that goes through the attention interface, and of those that are refused."""

import dataclasses

import torch
import transformers
from tiny import SIZES, tiny_llama
from torch import nn

import lococo
from lococo.config import LoCoCoConfig

LENGTH = 41
WINDOW = 20
NARROW = 9  # than all the slots
SMALL = LoCoCoConfig(num_slots=12, block_size=6, kernel_size=5, gate_init=0.5)
LARGE = LoCoCoConfig(num_slots=48, block_size=16, kernel_size=5, gate_init=0.5)
SPLITS = {
    "one-by-one": [1] * LENGTH,
    "sevens": [7] * 5 + [6],
    "eights": [8] * 5 + [1],
    "mixed": [1, 7, 8, 25],
}
PARTIAL = dict(head_dim=8, partial_rotary_factor=0.5)
FAMILIES = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "Mistral-window": ("Mistral", dict(sliding_window=WINDOW)),
    "Qwen2": ("Qwen2", {}),
    "Qwen2-half-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "Qwen2-half-narrow": ("Qwen2", dict(use_sliding_window=True, sliding_window=NARROW, max_window_layers=1)),
    "Qwen3": ("Qwen3", dict(head_dim=8)),
    "Gemma2": (
        "Gemma2",
        dict(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=5, attn_logit_softcapping=2.0),
    ),
    "Gemma3": (
        "Gemma3",
        dict(
            head_dim=8,
            sliding_window=WINDOW,
            query_pre_attn_scalar=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "Phi3": ("Phi3", {}),
    "Phi3-partial": ("Phi3", dict(partial_rotary_factor=0.5)),
    "Olmo2": ("Olmo2", {}),
    "Granite": (
        "Granite",
        dict(embedding_multiplier=2.0, attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=2.0),
    ),
    "SmolLM3": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "Glm": ("Glm", PARTIAL),
    "Glm4": ("Glm4", PARTIAL),
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
HALF_HEAD = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
LENGTH_DEPENDENT_ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3][:HALF_HEAD],
        "long_factor": [2.0, 3.0, 4.0, 5.0][:HALF_HEAD],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


# In hybrid models, which of the two layers keeps its window.
KEPT = {"Qwen2-half-window": 1, "Qwen2-half-narrow": 1, "Gemma2": 0, "Gemma3": 0}


def fitting(family, config):
    """A config with slots for every KV head, without those of a layer that keeps its window."""
    if config.slots_per_head is None or config.compress_windows or family not in KEPT:
        return config
    rows = list(config.slots_per_head)
    rows[KEPT[family]] = None
    average = max(config.num_slots, *(sum(row) / len(row) for row in rows if row))
    return dataclasses.replace(config, num_slots=round(average), slots_per_head=tuple(rows))


def build(family, **overrides):
    """The unpatched model of a family, with Transformers' own eager attention."""
    name, features = FAMILIES[family]
    names = [f"{name}Text", name] if name == "Gemma3" else [name]
    config_class = next(getattr(transformers, f"{n}Config") for n in names if hasattr(transformers, f"{n}Config"))
    config = config_class(**{**SIZES, **features, **overrides}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if name.startswith("Gemma") and parameter_name.endswith("norm.weight"):
            parameter.data.zero_()  # 1 at first in Transformers 4.56, which doubles the logits and their rounding
    return model


def patch(model, config, **changes):
    """Patch with heads that are the same for the same config."""
    chunk = changes.pop("prefill_chunk_size", None)
    torch.manual_seed(1)
    return lococo.patch_model(model, dataclasses.replace(config, **changes), prefill_chunk_size=chunk)


def read(model, ids, split=None, mask=None):
    """Logits of ``ids``, read in calls of the given lengths."""
    if split is None:
        return model(ids, attention_mask=mask).logits
    cache, logits, stop = None, [], 0
    for part in ids.split(split, dim=1):
        stop += part.shape[1]
        seen_mask = None if mask is None else mask[:, :stop]
        output = model(part, attention_mask=seen_mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def pad_left(rows, padding=0):
    """(batch, longest row) ids with their mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0), value=padding) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


def greedy(model, ids, num_tokens):
    """The answer token by token, the whole text read again for each."""
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def anatomy(model):
    """All that a patch could leave behind: names, types, hooks and configuration of every module."""
    modules = {}
    for name, module in model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if "_hooks" in key and value is not None}
        modules[name] = (type(module), set(vars(module)), hooks)
    configs = {id(module.config): dict(vars(module.config)) for module in model.modules() if hasattr(module, "config")}
    return modules, configs, list(model.state_dict())


def assert_close(left, right):
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def gap(left, right):
    return (left - right).abs().max().item()


UNSUPPORTED = {
    "not-rotary": lambda: causal_lm("GPT2", n_embd=32, n_layer=2, n_head=4),
    "encoder-decoder": lambda: conditional("T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "encoder-decoder-through-the-interface": lambda: conditional(
        "Bart",
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 32),
    ),
    "state-space": lambda: causal_lm("Mamba", state_size=4, expand=2),
    "hybrid": lambda: causal_lm(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False, mamba_d_state=4
    ),
    "sinks": lambda: causal_lm("GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "latent": lambda: causal_lm(
        "DeepseekV3",
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=4,
        first_k_dense_replace=2,
    ),
    "difference-of-attentions": lambda: causal_lm("DiffLlama"),
    "keywords-kept": lambda: causal_lm("Nemotron"),
    "keywords-kept-in-one-layer": lambda: with_attention_of_its_own("keeps"),
    "own-attention": lambda: with_attention_of_its_own("attends"),
    "multimodal-rotary": lambda: vision_language("Qwen2_5_VL", rope_scaling=SECTIONS),
    "multimodal-rotary-interleaved": lambda: vision_language("Qwen3VL", head_dim=8, rope_scaling=SECTIONS),
    "two-head-sizes": lambda: with_head_dims(8, 16),
    "head-size-of-no-config": lambda: with_head_dims(16, 16),
    "more-kv-heads-than-the-config-says": lambda: causal_lm("JetMoe", kv_channels=8, num_local_experts=4),
    "cross-attention": lambda: transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**MLLAMA)),
    "shared-keys": lambda: transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**GEMMA3N)),
    "tensor-parallel": lambda: with_tensor_parallelism(),
    "layers-of-another-kind": lambda: with_layer_types("sparse_attention"),
    "cache-of-its-own": lambda: causal_lm(
        "MiniMax", head_dim=8, layer_types=["full_attention"] * 2, num_local_experts=2
    ),
    "several-decoders": lambda: nn.ModuleDict({"policy": tiny_llama(), "reference": tiny_llama(num_hidden_layers=3)}),
    "no-model": lambda: nn.Linear(4, 4),
}


for kind, config in {"multimodal-rotary-interleaved": "Qwen3VLConfig", "cross-attention": "MllamaTextConfig"}.items():
    if not hasattr(transformers, config):  # not yet there in the oldest release
        del UNSUPPORTED[kind]

SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2]}
MLLAMA = {**SIZES, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}}
GEMMA3N = {
    **SIZES,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [48] * 4,
}


def vision_language(name, **features):
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[]
    )
    config = getattr(transformers, f"{name}Config")(text_config={**SIZES, **features}, vision_config=vision)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def with_attention_of_its_own(kind):
    """A Llama in whose last layer somebody has put code of their own, a class with the same name."""
    model = tiny_llama()
    layer = model.model.layers[1]
    owner = layer if kind == "keeps" else layer.self_attn

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        if kind == "attends":
            return torch.nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states), None
        return self.self_attn(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)

    owner.__class__ = type(type(owner).__name__, (type(owner),), {"forward": forward})
    return model


def with_head_dims(*head_dims):
    model = tiny_llama()
    for layer, head_dim in zip(model.model.layers, head_dims, strict=True):
        layer.self_attn.head_dim = head_dim
    return model


def with_layer_types(name):
    model = tiny_llama()
    model.config.layer_types = ["full_attention", name]
    return model


def with_tensor_parallelism():
    model = tiny_llama()
    model._tp_size = 2
    return model


def causal_lm(name, **features):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **features})
    return getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config).eval()


def conditional(name, **features):
    config = getattr(transformers, f"{name}Config")(vocab_size=64, **features)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)
