"""Small ChatGLM checkpoints with random weights, in every form that the originals come in."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import import_protobuf

FIELDS = dict(
    num_layers=2,
    padded_vocab_size=300,
    hidden_size=32,
    ffn_hidden_size=48,
    kv_channels=8,
    num_attention_heads=4,
    seq_length=64,
    layernorm_epsilon=1e-5,
    multi_query_attention=True,
    multi_query_group_num=2,
    add_qkv_bias=True,
    add_bias_linear=False,
    rmsnorm=True,
    post_layer_norm=True,
    apply_residual_connection_post_layernorm=False,
)
GOLDEN = Path(__file__).parents[2] / "shared/data/weights/chatglm_golden"
LAYER = "transformer.encoder.layers.0"
EMBEDDING = "transformer.embedding.word_embeddings.weight"
FUSED = f"{LAYER}.self_attention.query_key_value.weight"
OUTPUT = "transformer.output_layer.weight"
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


def chatglm_fields(**overrides):
    """Fields of a ``config.json`` that shape a tiny model."""
    return {**FIELDS, **overrides}


def random_tensors(fields, seed=0, dtype=torch.float32):
    """Tensors of a checkpoint by their original names, written down independently of the converter."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, vocab = fields["hidden_size"], fields["ffn_hidden_size"], fields["padded_vocab_size"]
    query = fields["num_attention_heads"] * fields["kv_channels"]
    groups = fields["multi_query_group_num"] if fields["multi_query_attention"] else fields["num_attention_heads"]
    fused = query + 2 * groups * fields["kv_channels"]
    shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for index in range(fields["num_layers"]):
        layer = f"transformer.encoder.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attention.query_key_value.weight"] = (fused, hidden)
        if fields["add_qkv_bias"]:
            shapes[f"{layer}.self_attention.query_key_value.bias"] = (fused,)
        shapes[f"{layer}.self_attention.dense.weight"] = (hidden, query)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.dense_h_to_4h.weight"] = (2 * ffn, hidden)
        shapes[f"{layer}.mlp.dense_4h_to_h.weight"] = (hidden, ffn)
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    shapes["transformer.output_layer.weight"] = (vocab, hidden)
    # Large enough that logits are far apart and a swapped tensor shows.
    return {name: torch.randn(shape, generator=generator).mul(0.3).to(dtype) for name, shape in shapes.items()}


def original_model(implementation, fields, tensors, prefix=""):
    """A model of the original code, from ``remote_chatglm``, with a checkpoint's tensors."""
    config_class, model_class = implementation()
    model = model_class(config_class(**fields, torch_dtype=torch.float32), empty_init=False).eval()
    loaded = model.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items()}, strict=False)
    assert not loaded.unexpected_keys and [key.split(".")[-1] for key in loaded.missing_keys] == ["inv_freq"]
    return model


def write_checkpoint(folder, fields, tensors, *, shards=1, kind="safetensors", generation=3):
    """Write a folder as THUDM published them."""
    folder.mkdir()
    config = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "torch_dtype": "float16", **fields}
    (folder / "config.json").write_text(json.dumps(config))
    names = {"name_or_path": f"THUDM/chatglm{generation}-6b", "tokenizer_class": "ChatGLMTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer_model().SerializeToString())
    write_weights(folder, tensors, shards, kind)
    return folder


def write_weights(folder, tensors, shards, kind):
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    keys, weight_map = list(tensors), {}
    for index in range(shards):
        name = f"{stem}-{index + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        # The last shard takes what is left, so that shards differ in size.
        part = keys[
            index * (len(keys) // shards) : None if index == shards - 1 else (index + 1) * (len(keys) // shards)
        ]
        content = {key: tensors[key] for key in part}
        save_file(content, folder / name) if kind == "safetensors" else torch.save(content, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def read_golden(path, epsilon):
    """Config fields, tensors and three steps of (ids, last hidden state) of a one-layer model with five tokens."""
    values = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    position = 0

    def take(*shape):
        nonlocal position
        start, position = position, position + torch.Size(shape).numel()
        return values[start:position].view(shape)

    # The tokenizer has more tokens than the embedding; those get embeddings that are never looked up.
    tensors = {
        EMBEDDING: torch.cat([take(5, 32), torch.zeros(295, 32)]),
        f"{LAYER}.input_layernorm.weight": take(32),
        FUSED: take(48, 32),
        f"{LAYER}.self_attention.query_key_value.bias": take(48),
        f"{LAYER}.self_attention.dense.weight": take(32, 32),
        f"{LAYER}.post_attention_layernorm.weight": take(32),
        f"{LAYER}.mlp.dense_h_to_4h.weight": take(96, 32),
        f"{LAYER}.mlp.dense_4h_to_h.weight": take(32, 48),
        "transformer.encoder.final_layernorm.weight": take(32),
        OUTPUT: torch.zeros(300, 32),
    }
    steps = []
    for length in (3, 1, 1):
        ids = take(length).view(torch.int32).long()
        steps.append((ids, take(length, 32)))
    assert position == len(values) and [step[0].tolist() for step in steps] == [[0, 1, 2], [3], [4]]
    fields = chatglm_fields(num_layers=1, kv_channels=4, num_attention_heads=8, layernorm_epsilon=epsilon)
    return fields, tensors, steps


def tiny_tokenizer_model():
    """A SentencePiece model like ChatGLM's: byte-pair encoding over letters, with bytes to fall back on."""
    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    piece = model.SentencePiece
    for text, kind in (("<unk>", piece.UNKNOWN), ("<s>", piece.CONTROL), ("</s>", piece.CONTROL)):
        model.pieces.add(piece=text, score=0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=piece.BYTE)
    for rank, text in enumerate(["▁a", "ab", "▁ab", "▁▁", "▁", *"abcdefghij"]):
        model.pieces.add(piece=text, score=-rank, type=piece.NORMAL)
    return model
