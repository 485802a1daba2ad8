"""Attention of a segment's queries over slots and segment, and the attention each entry received."""

from __future__ import annotations

import contextlib
import functools

import torch

from lococo.kernels.attention import ATTENTIONS, LogitBias, triton_takes, wide
from lococo.kernels.trials import TRITON, MassTrial

SCORE_TILE = 64


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a type of devices; some have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Context in which autocast is off for a type of devices."""
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else contextlib.nullcontext()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    logit_bias: LogitBias,
    backend: str = "auto",
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention with grouped queries.

    Parameters
    ----------
    query : torch.Tensor
        (batch, heads, queries, head_dim).
    key, value : torch.Tensor
        (batch, kv_heads, entries, head_dim). Where types differ, all three are taken in the widest.

    Returns
    -------
    torch.Tensor
        (batch, heads, queries, head_dim).

    Raises
    ------
    ImportError
        If ``backend`` is a package that is not installed.
    ValueError
        If ``backend`` cannot do what ``logit_bias`` asks for.
    """
    return _attend(query, key, value, scale, logit_bias, backend, dropout, wants_lse=False)[0]


def attend_and_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    logit_bias: LogitBias,
    backend: str = "auto",
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``attend``, and what ``attention_mass`` is cheaper with.

    Returns
    -------
    tuple
        (batch, heads, queries, head_dim) output, and the (batch, heads, queries) log-sum-exp of the logits, or None
        where the kernel does not give it away.
    """
    return _attend(query, key, value, scale, logit_bias, backend, dropout, wants_lse=True)


def _attend(query, key, value, scale, logit_bias, backend, dropout, wants_lse):
    same = _of_one_type(query, key, value)
    output, lse = ATTENTIONS[backend](*same, scale, logit_bias, dropout, wants_lse)
    return output if same[0] is query else output.to(query.dtype), lse


def _of_one_type(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the widest of their types: operators and kernels read one."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return tuple(tensor.to(dtype) for tensor in tensors)


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    logit_bias: LogitBias,
    counts: torch.Tensor | None = None,
    squared: bool = False,
    lse: torch.Tensor | None = None,
    delay: int = 0,
) -> torch.Tensor:
    """Attention probability each entry receives, summed over queries and the query heads of its group.

    Works through tiles of queries, so no (queries x entries) matrix of the whole segment is held.

    Parameters
    ----------
    query : torch.Tensor
        (batch, heads, queries, head_dim).
    key : torch.Tensor
        (batch, kv_heads, entries, head_dim).
    counts : torch.Tensor, optional
        (1 or batch, 1, queries, entries), False where a query's attention to an entry counts for nothing.
    squared : bool
        Sum the squares of the probabilities.
    lse : torch.Tensor, optional
        (batch, heads, queries), log-sum-exp of the logits, from ``attend_and_lse``.
    delay : int
        A query counts for entries at least so many before it, where both end together.

    Returns
    -------
    torch.Tensor
        (batch, kv_heads, entries) in float32 or wider.
    """
    query, key = _of_one_type(query, key)
    is_plain = counts is None and logit_bias.mask is None and logit_bias.softcap is None
    if lse is not None and is_plain and triton_takes(query):
        mass = _mass_in_triton(query, key, scale, lse, logit_bias.bias, delay, squared)
        if mass is not None:
            return mass
    with without_autocast(query.device.type):  # exponentials of rounded logits are far off
        return _MassInTorch(query, key, scale, logit_bias, counts, squared, lse, delay).sum()


def computes_at_once(query: torch.Tensor, dropout: float, backend: str) -> bool:
    """Whether attention and what entries receive of it are best made from the same probabilities.

    Torch's fused attention gives the log-sum-exp away on GPUs alone; on a CPU everything would be computed twice.
    """
    if query.device.type != "cpu" or backend != "auto" or dropout or torch.is_grad_enabled():
        return False
    return query.dtype in (torch.float32, torch.float64)  # half precision would be slower than fused


def attend_and_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    logit_bias: LogitBias,
    counts: torch.Tensor | None = None,
    squared: bool = False,
    delay: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attend`` and ``attention_mass`` from the same probabilities, a tile of queries after the other.

    Arguments as of those two, without gradients.

    Returns
    -------
    tuple of torch.Tensor
        (batch, heads, queries, head_dim) output, in the queries' dtype; (batch, kv_heads, entries) mass in float32 or
        wider.
    """
    dtype = query.dtype
    query, key, value = _of_one_type(query, key, value)
    with without_autocast(query.device.type):
        tiles = _MassInTorch(query, key, scale, logit_bias, counts, squared, None, delay, value)
        received = tiles.sum()
    return torch.cat(tiles.outputs, dim=3).flatten(1, 2).to(dtype), received


def _mass_in_triton(query, key, scale, lse, bias, delay, squared):
    """(batch, kv_heads, entries), or None where Triton does not run."""
    groups = query.shape[1] // key.shape[1]
    trial = MassTrial(query.device, query.dtype, query.shape[-1], groups, is_biased=bias is not None, squared=squared)
    return TRITON.run(trial, query, key, scale, lse, bias, delay, squared)


class _MassInTorch:
    """``attention_mass`` in torch, a tile of queries after the other; with values the attention's output, too."""

    def __init__(self, query, key, scale, logit_bias, counts, squared, lse, delay, value=None):
        self.dtype = wide(query.dtype)
        self.query, self.keys = query, key.to(self.dtype).transpose(-1, -2)  # (batch, kv_heads, head_dim, entries)
        self.scale, self.logit_bias, self.counts = scale, logit_bias, counts
        self.squared, self.lse, self.delay = squared, lse, delay
        self.num_queries, self.num_entries = query.shape[2], key.shape[2]
        self.value, self.outputs = value, []  # (batch, kv_heads, groups, queries of a tile, head_dim)

    def sum(self) -> torch.Tensor:
        """(batch, kv_heads, entries)."""
        if self.num_queries == 1:
            return self._received(slice(0, 1), self.num_entries)
        mass = self.keys.new_zeros(*self.keys.shape[:2], self.num_entries)
        for start in range(0, self.num_queries, SCORE_TILE):
            tile = slice(start, min(start + SCORE_TILE, self.num_queries))
            # Lower-right causal: no query of the tile sees, or given the log-sum-exp counts for, an entry after these.
            seen = self.num_entries
            if self.logit_bias.mask is None:
                seen -= self.num_queries - tile.stop + (0 if self.lse is None else self.delay)
            if seen > 0:
                mass[..., :seen] += self._received(tile, seen)
        return mass

    def _received(self, tile: slice, seen: int) -> torch.Tensor:
        """(batch, kv_heads, seen) sums over a tile; nothing of its size is left when the next one begins."""
        probs = self._probs(tile, seen)
        if self.value is not None:
            output = probs.flatten(2, 3) @ self.value[:, :, :seen]
            self.outputs.append(output.unflatten(2, probs.shape[2:4]))
        if self.delay:
            last = self._own_entry(tile) - self.delay  # that counts the first query of the tile
            near = probs[..., max(last + 1, 0) :]
            near.tril_(last - max(last + 1, 0))
        if self.counts is not None:
            probs.mul_(self.counts[:, :, None, tile, :seen])
        if self.squared:
            probs.square_()
        return probs.sum(dim=(2, 3))

    def _probs(self, tile: slice, seen: int) -> torch.Tensor:
        """(batch, kv_heads, groups, queries of the tile, seen) attention probabilities."""
        _, bias, softcap = self.logit_bias
        query, keys = self.query[:, :, tile].to(self.dtype), self.keys[..., :seen]
        grouped = (query * self.scale).reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
        logits = grouped @ keys  # (batch, kv_heads, groups * queries, seen)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            logits.add_(bias[:, :, None, :seen])
        logits = logits.unflatten(2, (-1, query.shape[2]))
        if self.lse is None:
            self._hide(logits, tile, float("-inf"))
            return logits.softmax(dim=-1)
        probs = logits.sub_(self.lse[:, :, tile].unflatten(1, (keys.shape[1], -1))[..., None]).exp_()
        self._hide(probs, tile, 0.0)
        return probs

    def _hide(self, tensor: torch.Tensor, tile: slice, value: float) -> None:
        """Fill (batch, kv_heads, groups, queries of the tile, seen) where a query does not see an entry."""
        if self.logit_bias.mask is not None:
            tensor.masked_fill_(~self.logit_bias.mask[:, :, None, tile], value)
            return
        later = tensor[..., self._own_entry(tile) + 1 :]  # all else is seen by every query of the tile
        if later.shape[-1]:
            later.masked_fill_(torch.ones(later.shape[-2:], dtype=torch.bool, device=later.device).triu(), value)

    def _own_entry(self, tile: slice) -> int:
        """That of the first query of a tile."""
        return self.num_entries - self.num_queries + tile.start
