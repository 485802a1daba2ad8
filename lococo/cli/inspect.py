"""The command ``lococo inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import lococo
from lococo.config import LoCoCoConfig
from lococo.files import write_whole
from lococo.heads import read_heads_config
from lococo.inspection.page import page, page_data
from lococo.inspection.trace import trace
from lococo.loading import add_model_options, load
from lococo.methods import PRESETS, method_config


def add_inspect_command(parser: argparse.ArgumentParser) -> None:
    """Options of ``lococo inspect``."""
    add_model_options(parser)
    parser.add_argument("--data", type=Path, required=True, help="text file to read")
    parser.add_argument("--method", default="lococo-uncalibrated", choices=PRESETS, help="(default: %(default)s)")
    parser.add_argument("--heads", help="folder or Hub id of trained heads; sets method, slots and block")
    parser.add_argument("--num-slots", type=int, default=LoCoCoConfig.num_slots, help="(default: %(default)s)")
    parser.add_argument("--block-size", type=int, help="(default: as many as slots, at most 512)")
    parser.add_argument(
        "--max-tokens", type=int, default=4096, help="read at most so many tokens of the text (default: %(default)s)"
    )
    parser.add_argument("--threshold", type=float, default=0.01, help="smallest weight listed (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("slots.html"), help="(default: %(default)s)")
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, got {options.max_tokens}")
    if not 0.001 <= options.threshold <= 1:
        raise ValueError(f"--threshold must lie between 0.001 and 1, got {options.threshold}")
    text = options.data.read_text(encoding="utf-8")
    if not text:
        raise ValueError(f"{options.data}: the text is empty")
    block_size = options.block_size or min(options.num_slots, 512)
    chosen = cast(LoCoCoConfig, method_config(options.method, options.num_slots, block_size))  # not of "full"
    config = read_heads_config(options.heads) if options.heads else chosen
    model, tokenizer = load(options)
    ids = tokenizer(text, return_tensors="pt").input_ids
    read = ids[:, : options.max_tokens]
    with lococo.patched(model, None if options.heads else config, heads=options.heads):
        traces = trace(model, read)
    name = Path(options.heads).name if options.heads else options.method
    title = f"{options.data.name} in {config.num_slots} slots, {name}"
    tokens = [tokenizer.decode([token]) for token in read[0].tolist()]
    write_whole(options.output, page(page_data(traces, tokens, title, options.threshold)))
    size = options.output.stat().st_size / 2**20
    left = "" if read.shape == ids.shape else f" of {ids.shape[1]:,} (--max-tokens reads more)"
    print(f"{options.output}: {read.shape[1]:,} tokens{left}, {len(traces)} KV heads, {size:.1f} MiB")
