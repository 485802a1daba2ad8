"""The command ``lococo generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lococo.cli.options import TEXT, MethodOptions, ModelOptions, option


def generate(
    source: ModelOptions,
    method: MethodOptions,
    *,
    prompt_file: Annotated[Path | None, option(TEXT, "Text file to read.")] = None,
    prompt: Annotated[str | None, option(TEXT, "Text to read.")] = None,
    question: Annotated[
        str | None, option(TEXT, "Asked after the text; with it the model's chat template is used.")
    ] = None,
    max_prompt_tokens: Annotated[int | None, option(TEXT, "Read at most so many tokens of the text.", min=1)] = None,
    max_new_tokens: Annotated[int, option(TEXT, "Answer with at most so many tokens.", min=1)] = 64,
) -> None:
    """Read a long prompt and answer.

    Example: lococo generate --model MODEL --prompt-file book.txt --question "Who is the narrator?" --num-slots 256
    """
    from transformers import TextStreamer

    from lococo.generation import prompt_ids, read_and_answer
    from lococo.methods import as_method

    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the text to read: either --prompt-file or --prompt")
    text = prompt_file.read_text(encoding="utf-8") if prompt_file else prompt or ""
    config = method.config()
    model, tokenizer = source.load()
    ids = prompt_ids(tokenizer, text, question, max_prompt_tokens).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with as_method(model, config, method.heads):
        reading = read_and_answer(model, ids, max_new_tokens=max_new_tokens, streamer=streamer, do_sample=False)
    print(f"\n{reading.summary()}")
