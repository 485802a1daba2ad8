"""A cache in one file: its buffers as safetensors, all else as JSON in the file's metadata. Never pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from lococo.cache.cache import LoCoCoCache
from lococo.cache.memory import Memory
from lococo.cache.plan import Row
from lococo.compression.entries import Entries
from lococo.config import LoCoCoConfig
from lococo.files import write_whole

KEY = "lococo_cache"
FORMAT_VERSION = 1
FIELDS = [field.name for field in dataclasses.fields(Entries)]


def save_cache(cache: LoCoCoCache, path: str | os.PathLike) -> Path:
    """Write a cache, whole or not at all; see ``LoCoCoCache.save``."""
    if cache.batch_size < 0:
        raise ValueError("nothing has been read into this cache yet: there is nothing to save")
    if cache.is_reading:
        raise ValueError("the last forward with this LoCoCoCache did not finish: call cache.reset() and start again")
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        late = []
        for group, (memory, _) in enumerate(layer.groups):
            state = memory.__getstate__()  # with nothing put off
            late.append(state["_rotated_from"])
            for field, tensor in zip(FIELDS, state["entries"].tensors(), strict=True):
                if tensor is not None:
                    tensors[f"layers.{index}.{group}.{field}"] = tensor.cpu().contiguous()
        layers.append({"window": layer.window, "num_heads": layer.num_heads, "rotated_from": late})
    content = {
        "format_version": FORMAT_VERSION,
        "config": cache.config.to_dict(),
        "layers": layers,
        "columns": cache.seen_tokens,
        "rows": [[row.closed, row.pending] for row in cache.rows],
        "ends_in_padding": cache.ends_in_padding,
    }
    path = Path(path)
    write_whole(path, safetensors_bytes(tensors, metadata={"format": "pt", KEY: json.dumps(content)}))
    return path


def load_cache(path: str | os.PathLike, device: torch.device | str) -> LoCoCoCache:
    """Read a cache; see ``LoCoCoCache.load``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no file written by LoCoCoCache.save")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            content = json.loads((file.metadata() or {})[KEY])
            # Copies, aligned as torch's own: operators round otherwise where a tensor begins elsewhere.
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no whole file written by LoCoCoCache.save: {error!r}") from error
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={content.get('format_version')!r}, this version of lococo reads "
            f"{FORMAT_VERSION}"
        )
    try:
        return _cache(content, tensors)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no whole file written by LoCoCoCache.save: {error!r}") from error


def _cache(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LoCoCoCache:
    config = LoCoCoConfig.from_dict(content["config"])
    cache = LoCoCoCache(config, len(content["layers"]))
    for index, (layer, saved) in enumerate(zip(cache.layers, content["layers"], strict=True)):
        layer.look_back(saved["window"])
        for group, (memory, _) in enumerate(layer.groups):
            _fill(memory, f"layers.{index}.{group}", tensors, saved["rotated_from"][group])
        layer.columns, layer.num_heads = content["columns"], saved["num_heads"]
        layer.renew_steps()
    if tensors:
        raise KeyError(f"surplus tensors: {', '.join(sorted(tensors))}")
    cache.rows = tuple(Row(closed, pending) for closed, pending in content["rows"])
    cache.ends_in_padding = content["ends_in_padding"]
    return cache


def _fill(memory: Memory, prefix: str, tensors: dict[str, torch.Tensor], rotated_from: int | None) -> None:
    found = {field: tensors.pop(f"{prefix}.{field}", None) for field in FIELDS}
    keys, values = found["keys"], found["values"]
    if keys is None or values is None:
        raise KeyError(f"{prefix} has no keys or no values")
    for field, tensor in found.items():
        if tensor is not None and tensor.shape[:3] != (*keys.shape[:2], memory.config.capacity):
            raise KeyError(f"{prefix}.{field} has shape {tuple(tensor.shape)}")
    memory.hold(Entries(**found))  # type: ignore[arg-type]
    memory.is_initialized, memory._rotated_from = True, rotated_from
