"""The command ``lococo serve``."""

from __future__ import annotations

from typing import Annotated

from lococo.cli.options import RUN, MethodOptions, ModelOptions, option

SERVER = "Server"


def serve(
    source: ModelOptions,
    method: MethodOptions,
    *,
    served_model_name: Annotated[
        str | None, option(SERVER, "What clients call the model.", metavar="NAME", show_default="as --model")
    ] = None,
    host: Annotated[
        str, option(SERVER, "Address to listen on; 0.0.0.0: all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, option(SERVER, "Port to listen on.", min=1, max=65535)] = 8000,
    max_prompt_tokens: Annotated[
        int | None, option(RUN, "Refuse longer prompts.", min=1, show_default="the model's positions")
    ] = None,
    kept_caches: Annotated[
        int, option(RUN, "Maximum number of caches to keep, for prompts that begin alike; 0: none.", min=0)
    ] = 8,
) -> None:
    """Serve OpenAI's chat completions and completions from this machine.

    Example: lococo serve --model MODEL --num-slots 512 --port 8000
    """
    from lococo.serving import check_available

    check_available()

    from transformers.utils import logging

    from lococo.methods import as_method
    from lococo.serving.manager import ReadingManager, text_positions
    from lococo.serving.reader import PromptReader
    from lococo.serving.server import Server

    logging.set_verbosity_error()  # Transformers' server warns of every request, which uvicorn lists
    config = method.config()
    model, tokenizer = source.load()
    with as_method(model, config, method.heads):
        manager = ReadingManager(PromptReader(model, kept_caches), max_prompt_tokens, text_positions(model, config))
        Server(served_model_name or source.model, model, tokenizer, manager, host, port).serve_until_interrupted()
