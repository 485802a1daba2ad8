"""Perplexity of a model as it is, full or patched."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lococo.compat import cache_of, with_cache

CHUNK = 2048


@torch.no_grad()
def token_nlls(model: PreTrainedModel, ids: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Negative log-likelihood of each token of a text given those before it.

    The text goes through the model in chunks, each with the cache of the last, so that no more than a chunk's logits
    are held.

    Parameters
    ----------
    ids : torch.Tensor
        (1, tokens).
    first : int
        First token that counts.

    Returns
    -------
    torch.Tensor
        (tokens - first,) in nats.

    Raises
    ------
    ValueError
        If no token is left to count.
    """
    tokens = ids.shape[1]
    if not 1 <= first < tokens:
        raise ValueError(f"first must lie between 1 and {tokens - 1} for a text of {tokens} tokens, got {first}")
    ids = ids.to(model.device)
    cache, nlls = None, []
    for start in range(0, tokens - 1, CHUNK):
        stop = min(start + CHUNK, tokens - 1)
        places = torch.arange(start, stop, device=ids.device)[None]  # ChatGLM's own code does not count on
        output = model(ids[:, start:stop], position_ids=places, **with_cache(model, cache), use_cache=True)
        cache = cache_of(output)
        nlls.append(F.cross_entropy(output.logits[0].float(), ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(nlls)[first - 1 :]


def perplexity(
    model: PreTrainedModel, texts: str | Sequence[str] | Sequence[torch.Tensor], tokenizer=None, *, first: int = 1
) -> float:
    """Perplexity over the tokens of some texts, each read from its start with an empty cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Patched or not.
    texts : str, sequence of str, or sequence of torch.Tensor
        Strings need ``tokenizer``; tensors are token ids (1, tokens).
    first : int
        First token of each text that counts.

    Raises
    ------
    ValueError
        If there is no text, a text is shorter than ``first + 1`` tokens, or strings come without a tokenizer.
    """
    if not len(texts):
        raise ValueError("texts is empty: perplexity needs at least one text")
    several = [texts] if isinstance(texts, str) else texts
    nlls = torch.cat([token_nlls(model, _ids(text, tokenizer), first) for text in several])
    return math.exp(nlls.double().mean().item())


def _ids(text: str | torch.Tensor, tokenizer) -> torch.Tensor:
    if isinstance(text, torch.Tensor):
        return text
    if tokenizer is None:
        raise ValueError("texts are strings: pass the model's tokenizer, or token ids as tensors")
    return tokenizer(text, return_tensors="pt").input_ids
