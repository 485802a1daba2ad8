"""Checkpoints in one or several files: found, mapped into memory, written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SAFETENSORS_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not JSON, or holds something other than an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def find_shards(folder: Path) -> list[Path]:
    """Weight files of a checkpoint, safetensors before torch files and one whole file before shards with an index.

    Raises
    ------
    FileNotFoundError
        If there are no weights, or the index names a file that is not there.
    ValueError
        If the index is not one.
    """
    for name in (SAFETENSORS_NAME, TORCH_NAME):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed_shards(folder / f"{name}.index.json")
    raise FileNotFoundError(f"{folder} has neither {SAFETENSORS_NAME} nor {TORCH_NAME}, whole or with an index")


def _indexed_shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must name the file of each tensor in weight_map, got {weight_map!r}")
    shards = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise ValueError(f"{index} must name files beside it, got {name!r}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} does not exist, but {index.name} names it")
        shards.append(index.parent / name)
    return shards


def map_tensors(shard: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors or torch file by name, mapped into memory: values are read when they are used.

    Raises
    ------
    ValueError
        If the file cannot be read, or holds anything but tensors by name.
    """
    try:
        if shard.suffix == ".safetensors":
            tensors = load_file(shard)
        else:
            tensors = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # for damaged files both libraries raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{shard} cannot be read: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{shard} must hold tensors by name and nothing else")
    return tensors


def read_layout(shard: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file by name on the meta device: shapes and dtypes, no values.

    Raises
    ------
    ValueError
        As `map_tensors`.
    """
    return {name: tensor.to("meta") for name, tensor in map_tensors(shard).items()}


def write_safetensors(
    path: Path, layout: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write a safetensors file with no more than one of its tensors in memory.

    ``safetensors.torch.save_file`` takes all tensors at once and up to version 0.7 copies them.

    Parameters
    ----------
    path : Path
        The file.
    layout : mapping of str to torch.Tensor
        Tensors of the shapes and dtypes to be written; they may be on the meta device.
    tensors : iterable of (str, torch.Tensor)
        The same names in the same order, with values.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in tensors:
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def shard_names(count: int) -> list[str]:
    """Names of the files of a safetensors checkpoint, as Transformers expects them."""
    if count == 1:
        return [SAFETENSORS_NAME]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def index_content(layouts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Content of ``model.safetensors.index.json`` for files by name and the layout of each."""
    tensors = [(file, name, tensor) for file, layout in layouts.items() for name, tensor in layout.items()]
    return {
        "metadata": {"total_size": sum(tensor.nbytes for _, _, tensor in tensors)},
        "weight_map": {name: file for file, name, _ in sorted(tensors, key=lambda entry: entry[1])},
    }
