"""Loss, perplexity and the gap ratio: of a model as it is, full or patched."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lococo.compat import cache_of, with_cache
from lococo.whole_text import pieces

CHUNK = 2048
CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
NOTHING = 1e-5  # nats per token by which losses differ that are the same but for rounding


@torch.no_grad()
def token_nlls(model: PreTrainedModel, ids: torch.Tensor, first: int = 1) -> torch.Tensor:
    """Negative log-likelihood of each token of a text given those before it.

    The text goes through the model in chunks, each with the cache of the last, so that no more than a chunk's logits
    are held; at once, where an unpatched model's rotary tables depend on the length of the text.

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
        If it is not one text, or no token is left to count.
    """
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"a text must be token ids of shape (1, tokens), got {tuple(ids.shape)}")
    tokens = ids.shape[1]
    if not 1 <= first < tokens:
        raise ValueError(f"first must lie between 1 and {tokens - 1} for a text of {tokens} tokens, got {first}")
    ids = ids.to(model.device)
    cache, nlls = None, []
    in_pieces, chunk = pieces(model, tokens - 1, CHUNK, tokens - 1)
    with in_pieces:
        for start in range(0, tokens - 1, chunk):
            stop = min(start + chunk, tokens - 1)
            positions = torch.arange(start, stop, device=ids.device)[None]  # ChatGLM's own code does not count on
            output = model(ids[:, start:stop], position_ids=positions, **with_cache(model, cache), use_cache=True)
            cache = cache_of(output)
            nlls.append(F.cross_entropy(output.logits[0].float(), ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(nlls)[first - 1 :]


def mean_nll(model: PreTrainedModel, ids: torch.Tensor, first: int = 1) -> float:
    """Nats per token over the tokens of (texts, tokens) ids of equal length, from token ``first`` on."""
    return torch.stack([token_nlls(model, each[None].long(), first).double().mean() for each in ids]).mean().item()


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
        If there is no text, a text is shorter than ``first + 1`` tokens, a tensor is not one text, or strings come
        without a tokenizer.
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


def gap_ratio(nll: float, full: float, baselines: Sequence[float]) -> float | None:
    """(nll - nll of full) / (nll of H2O - nll of full): 0 is the full cache, 1 is H2O with its best variant.

    None where H2O loses nothing.
    """
    ratios = _gap_ratios(np.array([[nll, full, *baselines]]))
    return None if ratios is None else float(ratios[0])


def gap_interval(
    nll: np.ndarray, full: np.ndarray, baselines: np.ndarray, tokens: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Confidence interval of the gap ratio by the percentile bootstrap over documents.

    Every measurement sees the same resampled documents, as they are read by all methods alike.

    Parameters
    ----------
    nll, full : np.ndarray
        (documents,) summed over the tokens of each document, of a method and of the full cache.
    baselines : np.ndarray
        (variants, documents) the same of H2O; the best in a resample counts.
    tokens : np.ndarray
        (documents,).

    Returns
    -------
    tuple or None
        None where there is one document, or H2O loses nothing in a resample: the interval has no end then.
    """
    if len(tokens) < 2:
        return None
    draws = _resampled(len(tokens), resamples)
    measured = draws @ np.vstack([nll, full, baselines]).T / (draws @ tokens)[:, None]  # (resamples, 2 + variants)
    ratios = _gap_ratios(measured)
    return None if ratios is None else _percentiles(ratios)


def mean_interval(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """Confidence interval of ``sums.sum() / counts.sum()`` by the percentile bootstrap over documents.

    Parameters
    ----------
    sums, counts : np.ndarray
        (documents,) summed values of a document's tokens or questions, and how many they are.

    Returns
    -------
    tuple or None
        None where there is one document, or a resample holds nothing to count.
    """
    if len(counts) < 2:
        return None
    draws = _resampled(len(counts), resamples)
    drawn = draws @ counts
    return _percentiles(draws @ sums / drawn) if drawn.all() else None


def mean_of_items_interval(
    values: Sequence[float], documents: Sequence[Hashable], resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Confidence interval of a mean over items by the percentile bootstrap over documents, which stay whole.

    Parameters
    ----------
    values : sequence of float
        One per item.
    documents : sequence
        The document of each item.

    Returns
    -------
    tuple or None
        None where there is one document.
    """
    numbers: dict[Hashable, int] = {}
    of_items = [numbers.setdefault(document, len(numbers)) for document in documents]
    return mean_interval(np.bincount(of_items, weights=values), np.bincount(of_items), resamples)


def _resampled(documents: int, resamples: int) -> np.ndarray:
    """(resamples, documents) how often each document is drawn."""
    return np.random.default_rng(SEED).multinomial(documents, np.full(documents, 1 / documents), size=resamples)


def _percentiles(figures: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(figures, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _gap_ratios(losses: np.ndarray) -> np.ndarray | None:
    """Gap ratios of (measurements, 2 + variants) losses: of a method, of the full cache, of H2O's variants.

    None if H2O loses nothing in one of them.
    """
    lost = losses[:, 2:].min(axis=1) - losses[:, 1]
    return (losses[:, 0] - losses[:, 1]) / lost if (lost > NOTHING).all() else None
