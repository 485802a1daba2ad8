"""The model that a command line names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch


def add_model_options(parser: argparse.ArgumentParser, shapes: Sequence[str] = ()) -> None:
    """Options that name a model and where it runs; with ``shapes``, ``--shape`` may take the place of ``--model``."""
    source = parser.add_mutually_exclusive_group(required=True) if shapes else parser
    needed: dict[str, Any] = {} if shapes else {"required": True}
    source.add_argument("--model", help="folder or Hub id of a causal language model", **needed)
    if shapes:
        source.add_argument("--shape", choices=shapes, help="random weights of this shape: nothing is downloaded")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's, fp32 on CPU)"
    )


def chosen_device(name: str) -> torch.device:
    """The device of an option.

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
    """The dtype of an option; None for ``auto``.

    Raises
    ------
    ValueError
        If there is no such dtype.
    """
    dtype = None if name == "auto" else getattr(torch, name, name)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype must be float32, bfloat16, ..., got {name!r}")
    return dtype


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer named by the options."""
    from transformers import AutoModelForCausalLM

    device, dtype = chosen_device(options.device), chosen_dtype(options.dtype)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32  # half precision is many times slower there
    tokenizer = load_tokenizer(options)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype or "auto", **_extra(options))
    return model.to(device).eval(), tokenizer


def load_tokenizer(options: argparse.Namespace) -> Any:
    """Tokenizer named by the options, without the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(options.model, **_extra(options))


def longest_text(options: argparse.Namespace) -> int:
    """Tokens that the model named by the options was made for, from its config.

    Raises
    ------
    ValueError
        If the config does not say.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.model, **_extra(options)).get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        raise ValueError(f"the config of {options.model} has no max_position_embeddings: say --max-length")
    return config.max_position_embeddings


def _extra(options: argparse.Namespace) -> dict[str, str]:
    return {"gguf_file": options.gguf_file} if options.gguf_file else {}
