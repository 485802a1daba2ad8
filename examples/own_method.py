"""A score of one's own: keep the tokens whose keys are smallest, and compare it with the others.

python examples/own_method.py

Small keys tend to receive much attention (Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV
Cache Compression"). A score says what it needs; reading, decoding and recorded steps do the rest.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lococo


@lococo.register_score("key-norm")
class KeyNormScore(lococo.Score):
    """Entries with small keys rank high."""

    needs = frozenset({"keys"})  # no attention is summed for it

    def rank(self, entries, age, config):
        return -entries.keys.norm(dim=-1)  # (batch, kv_heads, entries)


def main():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, initializer_range=0.3)).eval()
    text = torch.randint(3, 128, (1, 300))
    with torch.no_grad():
        full = model(text).logits.log_softmax(-1)
        for score in ("key-norm", "distant", "mean", "sum"):
            with lococo.patched(model, lococo.LoCoCoConfig(num_slots=32, block_size=16, score=score)):
                output = model(text, use_cache=True)
            cache, logits = output.past_key_values, output.logits.log_softmax(-1)
            divergence = (full.exp() * (full - logits)).sum(-1).mean()
            print(f"{score:10} {cache.nbytes / 1024:6.1f} KiB, KL to the full cache {divergence:.3f} nats per token")


if __name__ == "__main__":
    main()
