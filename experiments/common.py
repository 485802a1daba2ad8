"""What several experiments need: the model that a command line names, and a picture of before and after."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lococo.files import write_whole
from lococo.results.plots import Bars, Series, picture


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that name a model and where it runs."""
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")


def load_tokenizer(options: argparse.Namespace) -> Any:
    """Tokenizer named by the options."""
    return AutoTokenizer.from_pretrained(options.model, gguf_file=options.gguf_file)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer named by the options."""
    dtype = getattr(torch, options.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, gguf_file=options.gguf_file, dtype=dtype)
    return model.to(options.device).eval(), load_tokenizer(options)


def command_of(name: str, arguments: Sequence[str] | None = None) -> str:
    """An experiment's command as a user would type it."""
    return shlex.join(["python", "-m", f"experiments.{name}", *(sys.argv[1:] if arguments is None else arguments)])


def plot_before_and_after(
    labels: Sequence[str], before: Sequence[float], after: Sequence[float], label: str, path: Path
) -> None:
    """A bar for what training reached, a mark for where it began, one row per label from top to bottom."""
    longest = 1.2 * sorted(after)[len(after) * 9 // 10]
    marks = Series("not trained", before)
    bars = Bars(
        labels, [Series("trained", after)], xlabel=f"{label}; what is longer is cut", marks=marks, limits=(0, longest)
    )
    write_whole(path, picture([[bars]], (8, 0.22 * len(labels) + 1.2)))
