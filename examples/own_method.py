"""A score and a compressor of one's own, compared with the library's on a model with random weights.

python examples/own_method.py

The score keeps tokens whose keys are small: they tend to receive much attention (Devoto et al. 2024). The compressor
fills a fused slot with the mean of its token and of those that are dropped between it and the next kept one.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lococo


@lococo.register_score("key-norm")
class KeyNormScore(lococo.Score):
    needs = frozenset({"keys"})  # no attention is summed for it

    def rank(self, entries, age, config):
        return -entries.keys.norm(dim=-1)  # (batch, kv_heads, entries)


@lococo.register_compressor("nearest-mean")
class NearestMean(lococo.Compressor):
    def __init__(self, config, head_dim, device=None, dtype=None):
        super().__init__()  # nothing to learn

    def weights(self, entries, choice):
        anchors, rest = choice.blendable(len(entries))  # (batch, kv_heads, fused), (batch, kv_heads, entries)
        place = torch.arange(len(entries), device=rest.device)
        slot = torch.searchsorted(choice.anchors.contiguous(), place.expand(rest.shape).contiguous(), right=True) - 1
        owner = choice.anchors.gather(-1, slot.clamp_min(0))  # the kept entry before each
        mine = (owner[:, :, None] == anchors[..., None]) & (rest[:, :, None] | (place == anchors[..., None]))
        return mine.float() / mine.sum(-1, keepdim=True)


def main():
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, initializer_range=0.3)).eval()
    text = torch.randint(3, 128, (1, 300))
    with torch.no_grad():
        full = model(text).logits.log_softmax(-1)
        for score, compressor in (("key-norm", "conv"), ("key-norm", "nearest-mean"), ("distant", "conv")):
            config = lococo.LoCoCoConfig(num_slots=32, block_size=16, score=score, compressor=compressor)
            with lococo.patched(model, config):
                logits = model(text).logits.log_softmax(-1)
            divergence = (full.exp() * (full - logits)).sum(-1).mean()
            print(f"{score:10} {compressor:14} KL to the full cache {divergence:.3f} nats per token")


if __name__ == "__main__":
    main()
