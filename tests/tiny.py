"""The smallest Llama that has everything a patch meets: two layers, grouped queries, random weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lococo

SIZES = dict(
    num_hidden_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    initializer_range=0.2,  # logits far enough apart that a wrong cache shows
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)


def tiny_llama(seed=0, **overrides):
    """An unpatched model in evaluation mode, the same one for the same arguments; ``overrides`` go to its config."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides})).eval()


def tiny_ids(batch=1, length=64, seed=0):
    """(batch, length) random token ids without the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=generator)


def patched_llama(config, attention="auto", prefill_chunk_size=None, **overrides):
    """A patched one, with the same heads for the same arguments."""
    torch.manual_seed(0)
    model = tiny_llama(**overrides)
    return lococo.patch_model(model, config, attention=attention, prefill_chunk_size=prefill_chunk_size)
