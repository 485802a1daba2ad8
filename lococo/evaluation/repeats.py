"""Tokens that a text repeats, and how far back they stood before."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NGRAM = 4
NEAREST = 64  # what is nearer is in every cache


def repeat_distances(ids: Sequence[int], ngram: int = NGRAM) -> torch.Tensor:
    """How far back the last tokens were read before, as they stand at each place of a text.

    Parameters
    ----------
    ids : sequence of int
        Tokens of a text.
    ngram : int
        Tokens that must be the same, the one at the place included.

    Returns
    -------
    torch.Tensor
        (tokens,) of int64; 0 where they stand for the first time.
    """
    distances = torch.zeros(len(ids), dtype=torch.long)
    last: dict[tuple[int, ...], int] = {}
    for place in range(ngram - 1, len(ids)):
        words = tuple(ids[place - ngram + 1 : place + 1])
        distances[place] = place - last.get(words, place)
        last[words] = place
    return distances


def by_distance(nlls: torch.Tensor, ids: Sequence[int]) -> dict[int, tuple[float, int]]:
    """Summed loss and number of the tokens that repeat, by the power of two that their distance reaches.

    Parameters
    ----------
    nlls : torch.Tensor
        Losses of the last tokens of a text in nats.
    ids : sequence of int
        All tokens of the text.
    """
    distances = repeat_distances(ids)[-len(nlls) :]
    edges = 2 ** distances.clamp(min=1).log2().floor().long()
    edges[distances < NEAREST] = 0
    return {
        int(edge): (nlls[edges == edge].double().sum().item(), int((edges == edge).sum()))
        for edge in edges.unique()
        if edge
    }
