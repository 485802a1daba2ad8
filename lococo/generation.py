"""Reading a long prompt and answering, with what it took."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from lococo.cache.cache import LoCoCoCache
from lococo.compat import cache_of, with_cache
from lococo.models import base_shape, length_dependent_rotaries
from lococo.state import is_patched
from lococo.whole_text import reading_pieces


@dataclasses.dataclass(frozen=True)
class Generated:
    """What a prompt and its answer took.

    Attributes
    ----------
    answer : torch.Tensor
        (new_tokens,) token ids.
    slots : int, optional
        KV slots per layer. None: every token.
    cache_bytes : int
        Bytes of the cache at the end.
    full_cache_bytes : int
        Bytes that keys and values of every token read take.
    prefill_seconds, decode_seconds : float
    """

    prompt_tokens: int
    answer: torch.Tensor
    slots: int | None
    cache_bytes: int
    full_cache_bytes: int
    prefill_seconds: float
    decode_seconds: float

    def summary(self) -> str:
        """Four lines for a person to read."""
        slots = "every token kept" if self.slots is None else f"{self.slots} slots per layer"
        share = self.cache_bytes / self.full_cache_bytes
        new_tokens = self.answer.numel()
        return "\n".join(
            [
                f"tokens read     {self.prompt_tokens:,} ({slots})",
                f"cache           {_mib(self.cache_bytes)}, full cache {_mib(self.full_cache_bytes)} ({share:.1%})",
                f"reading         {self.prompt_tokens / self.prefill_seconds:,.0f} tokens/s",
                f"answering       {new_tokens / self.decode_seconds:,.1f} tokens/s ({new_tokens} tokens)",
            ]
        )


def read_and_answer(
    model: Any,
    input_ids: torch.Tensor,
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
    chunk : int
        Tokens between two movements of the progress bar.
    streamer : transformers streamer, optional
        Gets the answer token by token.

    Raises
    ------
    ValueError
        If the prompt has fewer than two tokens, or ``max_new_tokens`` is no positive number.
    """
    tokens = input_ids.shape[1]
    if tokens < 2:
        raise ValueError(f"the prompt needs at least 2 tokens, got {tokens}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    started = time.perf_counter()
    cache = read_tokens(model, input_ids[:, :-1], chunk=chunk, progress=progress, length=tokens)
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
    prefill_ended = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        **with_cache(model, cache),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **generate_kwargs,
    )
    answered = time.perf_counter()
    held = cache_bytes(cache)
    return Generated(
        prompt_tokens=tokens,
        answer=output[0, tokens:],
        slots=cache.config.num_slots if isinstance(cache, LoCoCoCache) else None,
        cache_bytes=held,
        full_cache_bytes=(output.shape[1] - 1) * bytes_per_token(cache),
        prefill_seconds=prefill_ended - started,
        decode_seconds=answered - prefill_ended,
    )


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
    pieces: contextlib.AbstractContextManager = contextlib.nullcontext()
    if is_patched(model):
        pieces = reading_pieces(model, (start + tokens if length is None else length) - 1)
    elif length_dependent_rotaries(model):
        chunk = max(tokens, 1)
    with pieces, tqdm(total=tokens, unit="token", desc="reading", disable=None if progress else True) as bar:
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
    """Bytes that the tensors of a cache hold, ours or one of Transformers'."""
    if isinstance(cache, LoCoCoCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


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


def prompt_ids(tokenizer: Any, text: str, question: str | None = None, max_tokens: int | None = None) -> torch.Tensor:
    """(1, tokens) ids of a text, cut to its first tokens, with the question after it in the model's chat format.

    Raises
    ------
    ValueError
        If there is a question and the tokenizer has no chat template, or the text is empty.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens]
    if not ids.shape[1]:
        raise ValueError("the prompt is empty")
    if question is None:
        return ids
    if not tokenizer.chat_template:
        raise ValueError("a question needs a model with a chat template; put the question into the prompt instead")
    content = f"{tokenizer.decode(ids[0], skip_special_tokens=True)}\n\n{question}"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return chat["input_ids"]
