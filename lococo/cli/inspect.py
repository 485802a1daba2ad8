"""The command ``lococo inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from lococo.cli.options import RUN, TEXT, MethodOptions, ModelOptions, option, writable


def inspect(
    source: ModelOptions,
    method: MethodOptions,
    *,
    data: Annotated[Path, option(TEXT, "Text file to read.")],
    max_tokens: Annotated[int, option(TEXT, "Maximum number of tokens of the text to read.", min=1)] = 4096,
    threshold: Annotated[float, option(RUN, "Smallest weight that is listed.", min=0.001, max=1)] = 0.01,
    output: Annotated[Path, option(RUN, "HTML file to write.", callback=writable)] = Path("slots.html"),
) -> None:
    """Write an HTML page that shows which tokens each slot holds.

    Example: lococo inspect --model MODEL --data book.txt --heads heads/
    """
    from lococo.data.documents import read_text
    from lococo.inspection.page import write_page

    if output.exists() and output.samefile(data):
        raise ValueError(f"--output would replace the text {data}: give another name")
    text = read_text(data)
    if not text:
        raise ValueError(f"{data}: the text is empty")
    config = method.config()
    if config is None:
        raise ValueError("--method full keeps every token: it has no slots to look into")
    title = f"{data.name} in {config.num_slots} slots, {method.name}"
    model, tokenizer = source.load()
    ids = tokenizer(text, return_tensors="pt").input_ids
    read = ids[:, :max_tokens]
    shown = write_page(model, tokenizer, read, output, config, heads=method.heads, title=title, threshold=threshold)
    left = "" if read.shape == ids.shape else f" of {ids.shape[1]:,} (--max-tokens reads more)"
    size = output.stat().st_size / 2**20
    print(f"{output}: {read.shape[1]:,} tokens{left}, {len(shown['heads'])} KV heads, {size:.1f} MiB")
