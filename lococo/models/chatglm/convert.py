"""ChatGLM2 and ChatGLM3 checkpoints as native ``GlmForCausalLM``: ``lococo convert-chatglm``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from lococo.files import new_folder
from lococo.models.chatglm.config import ChatGLMConfig
from lococo.models.chatglm.shards import (
    DTYPES,
    SAFETENSORS_NAME,
    find_shards,
    index_content,
    map_tensors,
    read_json,
    read_layout,
    shard_names,
    write_safetensors,
)
from lococo.models.chatglm.tokenizer import end_ids, fast_tokenizer, tokenizer_config

EMBEDDING = "transformer.embedding.word_embeddings.weight"
# Computed from the config; some checkpoints hold it all the same.
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
NATIVE_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "transformer.encoder.layers": "model.layers",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
FUSED = "self_attention.query_key_value"
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def convert_chatglm(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Write a ChatGLM2 or ChatGLM3 checkpoint as a checkpoint of Transformers' own ``GlmForCausalLM``.

    Weights are renamed and the fused ones split; no value and no dtype changes. In float32 the logits are those of the
    original code; in half precision Transformers rounds in other places. Every file becomes one file, and no more than
    one is mapped into memory at a time. All are checked before the first is converted.

    Parameters
    ----------
    source : path
        Folder with ``config.json``, ``tokenizer.model``, ``tokenizer_config.json`` and weights in safetensors or torch
        files, whole or in shards with an index.
    destination : path
        Folder to write. It appears when it is complete; after an error nothing is left of it.

    Raises
    ------
    FileNotFoundError
        If ``source`` or one of its files does not exist.
    FileExistsError
        If ``destination`` exists.
    ValueError
        If ``source`` is no ChatGLM2 or ChatGLM3 checkpoint, a file is damaged, a tensor is missing, surplus, or of
        another shape or dtype than the config says, or the config asks for what ``GlmForCausalLM`` cannot express.
    ImportError
        If protobuf, which reads ``tokenizer.model``, is not installed.
    """
    source, destination = Path(source), Path(destination).absolute()
    if os.path.lexists(destination):
        raise FileExistsError(f"{destination} exists; give a new folder")
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder; expected a ChatGLM2 or ChatGLM3 checkpoint")
    config = ChatGLMConfig.from_file(source / "config.json")
    layouts = {shard: read_layout(shard) for shard in find_shards(source)}
    _check_layouts(source, layouts, config)
    dtype = next(layout[EMBEDDING].dtype for layout in layouts.values() if EMBEDDING in layout)
    small_files = _small_files(source, config, dtype)
    with new_folder(destination) as folder:
        _write_weights(folder, layouts, config)
        for name, content in small_files.items():
            (folder / name).write_text(content, encoding="utf-8")


def _small_files(source: Path, config: ChatGLMConfig, dtype: torch.dtype) -> dict[str, str]:
    """Configs and tokenizer by file name."""
    generation = _generation(source)
    tokenizer = fast_tokenizer(source / "tokenizer.model", generation)
    if tokenizer.get_vocab_size() > config.padded_vocab_size:
        raise ValueError(
            f"{source / 'tokenizer.model'} has {tokenizer.get_vocab_size()} tokens with the control tokens, "
            f"but padded_vocab_size in config.json is {config.padded_vocab_size}; one of them is of another model"
        )
    token_ids = {"pad_token_id": tokenizer.token_to_id("<unk>"), "eos_token_id": end_ids(tokenizer)}
    contents = {
        "config.json": config.native(generation) | token_ids | {"torch_dtype": str(dtype).removeprefix("torch.")},
        "generation_config.json": token_ids,
        "tokenizer_config.json": tokenizer_config(generation),
    }
    files = {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in contents.items()}
    return files | {"tokenizer.json": tokenizer.to_str()}


def _generation(source: Path) -> int:
    """2 or 3: ChatGLM3 has tokens for roles, which only its own code and the names in the configs show."""
    code = source / "tokenization_chatglm.py"
    if code.is_file():
        return 3 if "<|assistant|>" in code.read_text(encoding="utf-8") else 2
    names = [
        read_json(source / "tokenizer_config.json").get("name_or_path"),
        read_json(source / "config.json").get("_name_or_path"),
        source.resolve().name,
    ]
    for name in names:
        if found := re.search(r"chatglm-?([23])", str(name).lower()):
            return int(found.group(1))
    raise ValueError(
        f"neither the name of {source} nor name_or_path in its tokenizer_config.json says whether it is ChatGLM2 or "
        'ChatGLM3, which have different tokens; write "name_or_path": "THUDM/chatglm3-6b" there, or chatglm2-6b'
    )


def _check_layouts(source: Path, layouts: Mapping[Path, Mapping[str, torch.Tensor]], config: ChatGLMConfig) -> None:
    """Refuse a checkpoint that does not hold exactly the tensors of its config, each once."""
    expected, found = config.shapes(), dict[str, Path]()
    for shard, layout in layouts.items():
        for key, tensor in layout.items():
            if key == INV_FREQ:
                continue
            if key in found:
                raise ValueError(f"{shard} holds {key}, and so does {found[key].name}")
            _check_tensor(shard, key, tensor, expected.get(key))
            found[key] = shard
    missing = [key for key in expected if key not in found]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ValueError(f"{source} lacks {missing[0]} of shape {expected[missing[0]]}{more}")


def _check_tensor(shard: Path, key: str, tensor: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise ValueError(f"{shard} holds {key}, which no ChatGLM2 or ChatGLM3 of this config.json has")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{shard}: {key} has shape {tuple(tensor.shape)}, but config.json says {shape}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{shard}: {key} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")


def _write_weights(folder: Path, layouts: Mapping[Path, Mapping[str, torch.Tensor]], config: ChatGLMConfig) -> None:
    native = {shard: dict(_native_tensors(layout, config)) for shard, layout in layouts.items()}
    native = {shard: layout for shard, layout in native.items() if layout}
    names = shard_names(len(native))
    for (shard, layout), name in zip(tqdm(native.items(), desc="shards", disable=None), names, strict=True):
        write_safetensors(folder / name, layout, _native_tensors(map_tensors(shard), config))
    if len(names) > 1:
        content = index_content(dict(zip(names, native.values(), strict=True)))
        (folder / f"{SAFETENSORS_NAME}.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _native_tensors(tensors: Mapping[str, torch.Tensor], config: ChatGLMConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a shard with the names that ``GlmForCausalLM`` has, always in the same order."""
    for key in sorted(tensors):
        if key == INV_FREQ:
            continue
        name = key
        for original, native in NATIVE_NAMES.items():
            name = name.replace(original, native)
        if FUSED in name:
            for part, tensor in zip(SPLIT, _split_query_key_value(tensors[key], config), strict=True):
                yield name.replace(FUSED, part), tensor
        else:
            yield name, tensors[key]


def _split_query_key_value(fused: torch.Tensor, config: ChatGLMConfig) -> Iterable[torch.Tensor]:
    """Weight (rows, hidden) or bias (rows,) of the fused projection as those of queries, keys and values."""
    head_dim = config.kv_channels
    if config.multi_query_attention:
        kv_rows = config.multi_query_group_num * head_dim
        return fused.split([config.num_attention_heads * head_dim, kv_rows, kv_rows])
    # Without groups the query, key and value of a head stand together.
    per_head = fused.unflatten(0, (config.num_attention_heads, 3, head_dim))
    return (part.flatten(0, 1) for part in per_head.unbind(1))
