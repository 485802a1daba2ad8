"""The gap ratio, and how sure of it a measurement on some documents can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
NOTHING = 1e-5  # nats per token by which losses differ that are the same but for rounding
SEED = 0


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
    documents = len(tokens)
    if documents < 2:
        return None
    draws = np.random.default_rng(SEED).multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    measured = draws @ np.vstack([nll, full, baselines]).T / (draws @ tokens)[:, None]  # (resamples, 2 + variants)
    ratios = _gap_ratios(measured)
    if ratios is None:
        return None
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _gap_ratios(losses: np.ndarray) -> np.ndarray | None:
    """Gap ratios of (measurements, 2 + variants) losses: of a method, of the full cache, of H2O's variants.

    None if H2O loses nothing in one of them.
    """
    lost = losses[:, 2:].min(axis=1) - losses[:, 1]
    return (losses[:, 0] - losses[:, 1]) / lost if (lost > NOTHING).all() else None
