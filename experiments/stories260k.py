"""A very small real model with texts of its own: llama2.c's stories260K as a checkpoint folder.

python -m experiments.stories260k folder-of-stories260K.bin-and-tok512.bin --output .demo/stories260k

The model (5 layers, 8 heads, 4 KV heads, 512 tokens) tells stories. They are written beside it, to calibrate on
(train.jsonl) and to measure on (heldout.jsonl).
"""

import argparse
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"


def load_llama2c(path: Path) -> LlamaForCausalLM:
    """The model in a llama2.c checkpoint (version 0, tied embeddings)."""
    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", content[:28])
    weights = torch.from_numpy(np.frombuffer(content, dtype=np.float32, offset=28).copy())
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    state, kv_dim, offset = model.state_dict(), dim // heads * kv_heads, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        start, offset = offset, offset + int(np.prod(shape))
        return weights[start:offset].view(shape)

    def halves(projection: torch.Tensor) -> torch.Tensor:
        """Rows from pairs that rotate together, side by side, to one half of a head against the other."""
        pairs = projection.unflatten(0, (-1, dim // heads // 2, 2))  # (heads, pairs, 2, dim)
        return pairs.transpose(1, 2).flatten(0, 2)

    state["model.embed_tokens.weight"].copy_(take(vocabulary, dim))
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for name, parts in stacked.items():
        for layer, part in enumerate(parts):
            rotated = name.endswith(("q_proj", "k_proj"))
            state[f"model.layers.{layer}.{name}.weight"].copy_(halves(part) if rotated else part)
    state["model.norm.weight"].copy_(take(dim))
    return model


def load_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer in a llama2.c file: pieces with scores, of which the best pair of neighbours merges first."""
    content, pieces, offset = path.read_bytes(), [], 4  # the length of the longest piece comes first
    for _ in range(vocabulary):
        score, length = struct.unpack_from("fi", content, offset)
        pieces.append((content[offset + 8 : offset + 8 + length].decode().replace(" ", "▁"), score))
        offset += 8 + length
    pieces[:3] = [(UNKNOWN, 0.0), (BOS, 0.0), (EOS, 0.0)]
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in pieces[3:]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: -merge[0])
    pairs = [(left, right) for _, left, right in merges]
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)


@torch.no_grad()
def tell(model: LlamaForCausalLM, texts: int, seed: int) -> torch.Tensor:
    """(texts, tokens) ids of stories the model tells, as many tokens as it was made for."""
    torch.manual_seed(seed)
    begin = torch.full((texts, 1), model.config.bos_token_id)
    length = model.config.max_position_embeddings
    options = dict(max_new_tokens=length - 1, do_sample=True, top_p=0.95, top_k=0)
    return model.generate(begin, attention_mask=torch.ones_like(begin), **options)


def as_text(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Stories as text, with the token that begins each between them."""
    groups = itertools.groupby(ids, key=lambda token: token == tokenizer.bos_token_id)
    return BOS.join(tokenizer.decode(list(story)) for is_bos, story in groups if not is_bos)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with stories260K.bin and tok512.bin of llama2.c")
    parser.add_argument("--train", type=int, default=256, help="texts to calibrate on (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=64, help="texts to measure on (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(".demo/stories260k"), help="(default: %(default)s)")
    options = parser.parse_args()

    model = load_llama2c(options.source / "stories260K.bin")
    tokenizer = load_tokenizer(options.source / "tok512.bin", model.config.vocab_size)
    texts = [as_text(ids, tokenizer) for ids in tell(model, options.train + options.heldout, seed=0).tolist()]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", texts[: options.heldout]), ("train", texts[options.heldout :])):
        lines = [json.dumps({"domain": "stories", "text": text}, ensure_ascii=False) + "\n" for text in part]
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer.save_pretrained(options.output)
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
