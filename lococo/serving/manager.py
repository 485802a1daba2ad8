"""Transformers' generation manager with prompts that are read once, limits, and answers that end at stop strings."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import json
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from fastapi import HTTPException
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.cli.serving.utils import GenerateManager, _StreamError

from lococo.config import LoCoCoConfig
from lococo.models import base_config
from lococo.serving.asked import may_go_on
from lococo.serving.reader import PromptReader
from lococo.serving.requests import CURRENT, Request

MAX_TOKENS = 1024  # of an answer, where a request does not say, as in Transformers' server


class ReadingManager(GenerateManager):
    """Generates one answer after another on one thread, with a reader that has read beginnings before.

    Parameters
    ----------
    reader : PromptReader
    max_prompt_tokens : int, optional
        Longest prompt that is taken.
    positions : int, optional
        Longest text, answer included, that the model knows positions for.
    """

    def __init__(
        self, reader: PromptReader, max_prompt_tokens: int | None = None, positions: int | None = None
    ) -> None:
        super().__init__()
        self.reader, self.max_prompt_tokens, self.positions = reader, max_prompt_tokens, positions

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any):
        """Start a generation whose tokens are streamed."""
        self._fit(inputs["input_ids"].shape[1], gen_config)
        ids, request = {"input_ids": inputs["input_ids"]}, CURRENT.get()
        queue, streamer = super().generate_streaming(self._reading(), processor, ids, gen_config, *args, **kwargs)
        return _Stream(queue, request), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ):
        """Wait for a whole answer."""
        self._fit(inputs["input_ids"].shape[1], gen_config)
        ids = {"input_ids": inputs["input_ids"]}
        return await super().generate_non_streaming(self._reading(), processor, ids, gen_config, *args, **kwargs)

    def wait(self, seconds: float) -> None:
        """Wait until all that has been asked for is done, so long at most."""
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.submit(int).result(timeout=seconds)

    def _fit(self, tokens: int, config: GenerationConfig) -> None:
        """Refuse a prompt that is too long, and end the answer with the model's positions."""
        if tokens == 0:
            raise HTTPException(400, "the prompt is empty")
        if self.max_prompt_tokens is not None and tokens > self.max_prompt_tokens:
            raise HTTPException(
                400,
                f"the prompt has {tokens} tokens, this server takes {self.max_prompt_tokens} (--max-prompt-tokens)",
            )
        if self.positions is not None and tokens >= self.positions:
            raise HTTPException(400, f"the prompt has {tokens} tokens, the model {self.positions} positions")
        if config.max_new_tokens is None:
            config.max_new_tokens = MAX_TOKENS if config.max_length is None else config.max_length - tokens
        if config.max_new_tokens < 1:
            raise HTTPException(400, f"max_tokens must be at least 1, got {config.max_new_tokens}")
        if self.positions is not None:
            config.max_new_tokens = min(config.max_new_tokens, self.positions - tokens)

    def _reading(self) -> Any:
        """What stands for the model in one generation."""
        return SimpleNamespace(generate=functools.partial(self._generate, CURRENT.get()))

    def _generate(self, request: Request, input_ids: torch.Tensor, tokenizer: Any, **kwargs: Any) -> torch.Tensor:
        if request.stops:
            kwargs["stopping_criteria"] = [_Stops(request.stops, tokenizer, input_ids.shape[1])]
        with _seeded(request.seed, input_ids.device):
            return self.reader.generate(
                input_ids, check=request.check, on_reuse=request.note_reuse, tokenizer=tokenizer, **kwargs
            )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """What is drawn inside the block is what a seed says; what others draw afterwards is left to chance."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class _Stops(StoppingCriteria):
    """Ends an answer whose text has one of these strings in it."""

    def __init__(self, stops: Collection[str], tokenizer: Any, prompt_tokens: int) -> None:
        self._stops, self._tokenizer, self._prompt_tokens = stops, tokenizer, prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        """(rows,), which rows are complete."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :], skip_special_tokens=True)
        is_stopped = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(is_stopped, device=input_ids.device)


class _Stream:
    """The queue of an answer's pieces up to a stop string: what may begin one waits for the next piece."""

    def __init__(self, queue: asyncio.Queue, request: Request) -> None:
        self._queue, self._request = queue, request
        self._held: Any = ""
        self._ready: collections.deque[Any] = collections.deque()

    async def get(self) -> Any:
        """The next piece."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """The next piece, if it is there."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, piece: Any) -> None:
        if type(piece) is not type(self._held):  # text of another kind, an error, or the end
            self._ready.extend([self._held] if self._held else [])
            self._held = type(piece)() if isinstance(piece, str) else ""
        if isinstance(piece, _StreamError):
            piece = _StreamError(json.dumps(piece.msg)[1:-1])  # it is written between quotes
        if not isinstance(piece, str):
            self._ready.append(piece)
        elif not self._request.is_stopped:
            kind = type(piece)
            said = self._request.before_stop(self._held + piece)
            end = len(said) - (0 if self._request.is_stopped else may_go_on(said, self._request.stops))
            self._ready.extend([kind(said[:end])] if end else [])
            self._held = kind("" if self._request.is_stopped else said[end:])


def text_positions(model: PreTrainedModel, config: LoCoCoConfig | None) -> int | None:
    """Longest text, in tokens, that a model patched with a config knows positions for; None: any length."""
    if config is not None and config.positions == "slot":
        return None
    return getattr(base_config(model).get_text_config(), "max_position_embeddings", None)
