"""Reading a long prompt and answering, with what it took."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from lococo.cache.cache import LoCoCoCache
from lococo.compat import OUTPUT_CACHE, cache_of, with_cache
from lococo.models import base_shape
from lococo.whole_text import pieces

# Where layers of Transformers' caches hold keys and values, quantised or not.
LAYER_STATES = ("keys", "values", "_quantized_keys", "_quantized_values")
ONE_ANSWER = {
    "use_cache": True,
    "cache_implementation": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What reading and answering took; that of several is added up.

    Attributes
    ----------
    tokens_read, new_tokens : int
        Tokens of prompts that went through the model, and of answers.
    prefill_seconds, decode_seconds : float
        Of each.
    slots : int, optional
        KV slots per layer. None: every token.
    cache_bytes : int
        Bytes of the cache at the end, of the largest if there were several.
    full_cache_bytes : int
        Bytes that keys and values of every token in it take.
    """

    tokens_read: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    slots: int | None
    cache_bytes: int
    full_cache_bytes: int

    def __add__(self, other: Usage) -> Usage:
        larger = max(self, other, key=lambda usage: usage.full_cache_bytes)
        return Usage(
            self.tokens_read + other.tokens_read,
            self.new_tokens + other.new_tokens,
            self.prefill_seconds + other.prefill_seconds,
            self.decode_seconds + other.decode_seconds,
            larger.slots,
            larger.cache_bytes,
            larger.full_cache_bytes,
        )

    def summary(self) -> str:
        """Four lines for a person to read."""
        slots = "every token kept" if self.slots is None else f"{self.slots} slots per layer"
        share = self.cache_bytes / self.full_cache_bytes
        return "\n".join(
            [
                f"tokens read     {self.tokens_read:,} ({slots})",
                f"cache           {_mib(self.cache_bytes)}, full cache {_mib(self.full_cache_bytes)} ({share:.1%})",
                f"reading         {_pace(self.tokens_read, self.prefill_seconds)}",
                f"answering       {_pace(self.new_tokens, self.decode_seconds)} ({self.new_tokens} tokens)",
            ]
        )


@dataclasses.dataclass(frozen=True)
class Generated:
    """An answer, and what it took.

    Attributes
    ----------
    answer : torch.Tensor
        (new_tokens,) token ids.
    usage : Usage
    """

    answer: torch.Tensor
    usage: Usage


def read_and_answer(
    model: Any,
    input_ids: torch.Tensor,
    cache: Any = None,
    *,
    max_new_tokens: int = 64,
    chunk: int = 512,
    progress: bool = True,
    streamer=None,
    **generate_kwargs,
) -> Generated:
    """Read a prompt piece by piece, then generate; for patched models and others alike.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    input_ids : torch.Tensor
        (1, tokens).
    cache : optional
        That has read the first of these tokens, to go on with.
    chunk : int
        Tokens between two movements of the progress bar.
    progress : bool
        Whether to show it on a terminal.
    streamer : transformers streamer, optional
        Gets the answer token by token.

    Raises
    ------
    ValueError
        If the prompt has fewer than two tokens, or none that the cache has not read, or ``max_new_tokens`` is no
        positive number.
    """
    tokens = input_ids.shape[1]
    start = 0 if cache is None else cache.get_seq_length()
    if tokens < 2:
        raise ValueError(f"the prompt needs at least 2 tokens, got {tokens}")
    if start >= tokens:
        raise ValueError(f"the cache has read {start} tokens, the prompt has {tokens}: there is nothing to answer")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    started = time.perf_counter()
    cache = read_tokens(model, input_ids[:, start:-1], cache, start, chunk=chunk, progress=progress, length=tokens)
    prefill_ended = _now(input_ids)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **with_cache(model, cache),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **{**_one_answer(model), **generate_kwargs},
    )
    answer = output[0, tokens:]
    seconds = prefill_ended - started, time.perf_counter() - prefill_ended
    usage = _usage(cache, output.shape[1] - 1, tokens - start, len(answer), *seconds)
    return Generated(answer, usage)


def _one_answer(model: Any) -> dict[str, Any]:
    """What ``generate`` is told where a model's generation config would not go on with the cache of one row."""
    own = getattr(model, "generation_config", None)
    return {name: value for name, value in ONE_ANSWER.items() if getattr(own, name, None) not in (None, value)}


def read_beginning(
    model: Any, input_ids: torch.Tensor, *, length: int | None = None, progress: bool = True
) -> tuple[Any, Usage]:
    """Read what several prompts begin with; each goes on with a copy of the cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Patched or not.
    input_ids : torch.Tensor
        (1, tokens).
    length : int, optional
        Tokens of the longest prompt, for rotary tables that depend on it. None: not known yet.
    progress : bool
        Whether to show a bar on a terminal.

    Returns
    -------
    tuple
        The cache, and what it took.
    """
    started, tokens = time.perf_counter(), input_ids.shape[1]
    cache = read_tokens(model, input_ids, progress=progress, length=length)
    return cache, _usage(cache, tokens, tokens, 0, _now(input_ids) - started, 0.0)


def _usage(cache: Any, held: int, tokens_read: int, new_tokens: int, prefill: float, decode: float) -> Usage:
    """Of a cache that has read so many tokens in all."""
    slots = cache.config.num_slots if isinstance(cache, LoCoCoCache) else None
    return Usage(tokens_read, new_tokens, prefill, decode, slots, cache_bytes(cache), held * bytes_per_token(cache))


def _now(on: torch.Tensor) -> float:
    """Seconds, when all that was asked of a tensor's device is done."""
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


@torch.no_grad()
def read_tokens(
    model: Any,
    input_ids: torch.Tensor,
    cache: Any = None,
    start: int = 0,
    chunk: int = 512,
    progress: bool = False,
    length: int | None = None,
) -> Any:
    """Read tokens piece by piece, without keeping logits. Returns the cache, None if there was neither it nor a token.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Patched or not.
    input_ids : torch.Tensor
        (1, tokens).
    cache : optional
        To go on with.
    start : int
        Tokens that the cache has read.
    chunk : int
        Tokens at a time.
    progress : bool
        Whether to show a bar on a terminal.
    length : int, optional
        Tokens of the whole text, for rotary tables that depend on it. None: it ends here.
    """
    tokens = input_ids.shape[1]
    last = {"logits_to_keep": 1} if _accepts(model, "logits_to_keep") else {}
    in_pieces, chunk = pieces(model, tokens, chunk, start + tokens if length is None else length)
    with in_pieces, tqdm(total=tokens, unit="token", desc="reading", disable=None if progress else True) as bar:
        for first in range(0, tokens, chunk):
            part = input_ids[:, first : first + chunk]
            # ChatGLM's own code does not count them on.
            positions = torch.arange(start + first, start + first + part.shape[1], device=part.device)[None]
            output = model(part, position_ids=positions, **with_cache(model, cache), use_cache=True, **last)
            cache = cache_of(output)
            bar.update(part.shape[1])
    return cache


def _accepts(model: Any, argument: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return argument in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds, a ``LoCoCoCache`` or one of Transformers'.

    Parameters
    ----------
    cache : Cache or transformers.utils.ModelOutput
        The cache, or the output of a model that returned one.

    Raises
    ------
    ValueError
        If the output has no cache.
    """
    if isinstance(cache, ModelOutput):
        cache = getattr(cache, OUTPUT_CACHE, None)
        if cache is None:
            raise ValueError("the output has no cache: call the model with use_cache=True")
    if isinstance(cache, LoCoCoCache):
        return cache.nbytes
    states = (getattr(layer, name, None) for layer in cache.layers for name in LAYER_STATES)
    return sum(tensor.nbytes for each in states for tensor in _plain_tensors(each))


def _plain_tensors(held: Any) -> Iterator[torch.Tensor]:
    """What a state is made of: itself, or where a backend has quantised it its codes and their scales."""
    if hasattr(held, "__tensor_flatten__"):
        held = [getattr(held, name) for name in held.__tensor_flatten__()[0]]
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _plain_tensors(part)


def random_full_cache(model: PreTrainedModel, length: int, batch: int) -> DynamicCache:
    """The full cache after a text, filled with random numbers."""
    shape = base_shape(model)
    cache = DynamicCache(config=model.config)
    size = (batch, shape["num_kv_heads"], length, shape["head_dim"])
    for layer in range(shape["num_layers"]):
        key = torch.randn(size, device=model.device, dtype=model.dtype)
        cache.update(key, torch.randn_like(key), layer)
    return cache


def bytes_per_token(cache: Any) -> int:
    """Bytes of one token's keys and values over all layers of one row."""
    if isinstance(cache, LoCoCoCache):
        return sum(layer.bytes_per_token for layer in cache.layers)
    return sum(
        states.shape[1] * states.shape[3] * states.element_size()
        for layer in cache.layers
        for states in (layer.keys, layer.values)
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _pace(tokens: int, seconds: float) -> str:
    return f"{seconds:,.1f} s, {tokens / seconds:,.1f} tokens/s" if tokens else "-"
