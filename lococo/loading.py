"""Models and tokenizers by the names that a command line gives them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

CONFIG_NAMES = ("config.json", "adapter_config.json")  # of a model, and of adapters that name theirs


def chosen_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:1, ..., got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"there is no CUDA device for --device {name}")
    return device


def chosen_dtype(name: str) -> torch.dtype | None:
    """The dtype of a name; None for ``auto``.

    Raises
    ------
    ValueError
        If there is no such dtype.
    """
    dtype = None if name == "auto" else getattr(torch, name, name)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype must be float32, bfloat16, ..., got {name!r}")
    return dtype


def load_model(
    name: str, *, gguf_file: str | None = None, device: str = "auto", dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model on a device, ready to read, and its tokenizer.

    Parameters
    ----------
    name : str
        Folder or Hub id.
    gguf_file : str, optional
        GGUF file in that folder.
    device : str
        ``auto``: CUDA where there is one.
    dtype : str
        ``auto``: the checkpoint's, and float32 on a CPU, where half precision is many times slower.

    Raises
    ------
    ValueError
        If there is no such device or dtype.
    OSError
        If there is no such model, or it cannot be loaded.
    """
    place, kind = chosen_device(device), chosen_dtype(dtype)
    if kind is None and place.type == "cpu":
        kind = torch.float32
    tokenizer = load_tokenizer(name, gguf_file)
    with _named(name, "model", gguf_file):
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind or "auto", **_file(gguf_file))
    return model.to(place).eval(), tokenizer


def load_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model.

    Raises
    ------
    OSError
        If there is no such model, or it cannot be loaded.
    """
    with _named(name, "tokenizer", gguf_file):
        return AutoTokenizer.from_pretrained(name, **_file(gguf_file))


def longest_text(name: str, gguf_file: str | None = None) -> int:
    """Tokens that a model was made for, from its config.

    Raises
    ------
    ValueError
        If the config does not say.
    OSError
        If there is no such model, or it cannot be loaded.
    """
    with _named(name, "config", gguf_file):
        config = AutoConfig.from_pretrained(name, **_file(gguf_file)).get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise ValueError(f"the config of {name} has no max_position_embeddings: say --max-length or --original-length")
    return config.max_position_embeddings


@contextlib.contextmanager
def _named(name: str, what: str, gguf_file: str | None) -> Iterator[None]:
    """Say in a line what is missing where: Transformers calls what it does not find no valid identifier of the Hub."""
    if not name:
        raise ValueError("the name of the model is empty: give a folder ('.' for this one) or a Hub id")
    if Path(name).is_dir():
        if not gguf_file and not any(Path(name, file).is_file() for file in CONFIG_NAMES):
            raise FileNotFoundError(f"{name}: no {CONFIG_NAMES[0]} in this folder, so it holds no model")
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            raise OSError(f"{name}: no {what} could be loaded from this folder: {_one_line(error)}") from error
        return
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).exists():
        raise FileNotFoundError(f"{name}: no such folder, and not a Hub id, written as 'org/name'")
    try:
        yield
    except OSError as error:
        raise OSError(f"{name}: no such folder, and not found on the Hub: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _file(gguf_file: str | None) -> dict[str, str]:
    if not gguf_file:
        return {}
    if not importlib.util.find_spec("gguf"):
        raise ImportError("a GGUF file is read with the package gguf: pip install lococo[gguf]")
    return {"gguf_file": gguf_file}
