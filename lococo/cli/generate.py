"""The command ``lococo generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lococo.cli.options import (
    NUM_SLOTS,
    TEXT,
    Heads,
    MethodName,
    ModelOptions,
    NumSlots,
    OwnBlockSize,
    block_of,
    option,
)


def generate(
    source: ModelOptions,
    *,
    prompt_file: Annotated[Path | None, option(TEXT, "Text file to read.")] = None,
    prompt: Annotated[str | None, option(TEXT, "Text to read.")] = None,
    question: Annotated[
        str | None, option(TEXT, "Asked after the text; with it the model's chat template is used.")
    ] = None,
    max_prompt_tokens: Annotated[int | None, option(TEXT, "Read at most so many tokens of the text.", min=1)] = None,
    max_new_tokens: Annotated[int, option(TEXT, "Answer with at most so many tokens.", min=1)] = 64,
    method: MethodName = "lococo-uncalibrated",
    heads: Heads = None,
    num_slots: NumSlots = NUM_SLOTS,
    block_size: OwnBlockSize = None,
) -> None:
    """Read a long prompt and answer.

    Example: lococo generate --model MODEL --prompt-file book.txt --question "Who is the narrator?" --num-slots 256
    """
    from transformers import TextStreamer

    from lococo.generation import prompt_ids, read_and_answer
    from lococo.heads import read_heads_config
    from lococo.methods import as_method, method_config

    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the text to read: either --prompt-file or --prompt")
    text = prompt_file.read_text(encoding="utf-8") if prompt_file else prompt or ""
    config = read_heads_config(heads) if heads else method_config(method, num_slots, block_of(num_slots, block_size))
    model, tokenizer = source.load()
    ids = prompt_ids(tokenizer, text, question, max_prompt_tokens).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with as_method(model, config, heads):
        reading = read_and_answer(model, ids, max_new_tokens=max_new_tokens, streamer=streamer, do_sample=False)
    print(f"\n{reading.summary()}")
