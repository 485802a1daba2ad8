"""A cache in one file: its buffers as safetensors, all else as JSON in the file's metadata. Never pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from lococo.cache.cache import LoCoCoCache
from lococo.cache.layer import LayerCache
from lococo.cache.plan import RowState
from lococo.compression.codes import Codec
from lococo.compression.entries import ENTRY_FIELDS, Entries
from lococo.config import LoCoCoConfig
from lococo.files import write_whole

KEY = "lococo_cache"
FORMAT_VERSION = 3
LAYER_FIELDS = ("window", "num_heads", "finished_columns")


def save_cache(cache: LoCoCoCache, path: str | os.PathLike, notes: Mapping[str, str] | None = None) -> Path:
    """Write a cache, whole or not at all; see ``LoCoCoCache.save``. Notes are for ``load_notes``."""
    if cache.batch_size < 0:
        raise ValueError("nothing has been read into this cache yet: there is nothing to save")
    if cache.is_reading:
        raise ValueError("the last forward with this LoCoCoCache did not finish: call cache.reset() and start again")
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        state = layer.__getstate__()  # outside of any graph
        for field, tensor in zip(ENTRY_FIELDS, state["entries"].tensors(), strict=True):
            if tensor is not None:
                tensors[f"layers.{index}.{field}"] = tensor.cpu().contiguous()
        layers.append({name: state[name] for name in LAYER_FIELDS})
        if layer.codec is not None:
            layers[-1] |= {"sizes": layer.codec.sizes, "dtypes": [str(each)[6:] for each in layer.codec.dtypes]}
    content = {
        "format_version": FORMAT_VERSION,
        "config": cache.config.to_dict(),
        "layers": layers,
        "columns": cache.seen_tokens,
        "rows": [dataclasses.astuple(row) for row in cache.rows],
        "ends_in_padding": cache.ends_in_padding,
    }
    path = Path(path)
    metadata = {"format": "pt", KEY: json.dumps(content), **(notes or {})}
    write_whole(path, safetensors_bytes(tensors, metadata=metadata))
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


def is_cache_file(path: str | os.PathLike) -> bool:
    """Whether a file was written by ``LoCoCoCache.save``, in this format or an older one."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_notes(path: str | os.PathLike) -> dict[str, str]:
    """What ``save_cache`` was given to note, beside what else the file's metadata have."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def _cache(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LoCoCoCache:
    config = LoCoCoConfig.from_dict(content["config"])
    cache = LoCoCoCache(config, len(content["layers"]))
    for index, (layer, saved) in enumerate(zip(cache.layers, content["layers"], strict=True)):
        prefix = f"layers.{index}"
        layer.set_window(saved["window"])
        held = {field: tensors.pop(f"{prefix}.{field}", None) for field in ENTRY_FIELDS}
        state = {name: saved[name] for name in LAYER_FIELDS}
        if config.bits != (16, 16):
            dtypes = [getattr(torch, name) for name in saved["dtypes"]]
            state["codec"] = Codec(config.bits, tuple(saved["sizes"]), tuple(dtypes))
        _restore(layer, prefix, held, state)
        layer.columns = content["columns"]
    if tensors:
        raise KeyError(f"surplus tensors: {', '.join(sorted(tensors))}")
    cache.rows = tuple(RowState(*row) for row in content["rows"])
    if len(cache.rows) not in (1, cache.batch_size):
        raise KeyError(f"{len(cache.rows)} rows for a batch of {cache.batch_size}")
    cache.ends_in_padding = content["ends_in_padding"]
    return cache


def _restore(layer: LayerCache, prefix: str, held: dict[str, torch.Tensor | None], state: dict[str, Any]) -> None:
    keys, values = held["keys"], held["values"]
    if keys is None or values is None:
        raise KeyError(f"{prefix} has no keys or no values")
    num_kv_heads = keys.shape[1] // layer.config.capacity  # of no account where heads have budgets of their own
    groups = layer.group_heads(num_kv_heads)
    for field, tensor in held.items():
        if tensor is not None and tensor.shape[:2] != (keys.shape[0], groups[-1].stop if groups else 0):
            raise KeyError(f"{prefix}.{field} has shape {tuple(tensor.shape)}")
    layer.__setstate__({**state, "groups": groups, "entries": Entries(**held)})  # type: ignore[arg-type]
