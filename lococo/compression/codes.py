"""Keys and values as codes of 8 or 4 bits: a scale and a least number for every few channels of a vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from lococo.compression.entries import Entries

# Channels that share a scale, at most.
GROUP = {8: 64, 4: 32}


def num_groups(size: int, bits: int) -> int:
    """Groups of channels of a vector; all of them are as large but for the last, which may be smaller."""
    return -(-size // GROUP[bits])


def measure_range(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., 2 * groups) in float16, of (..., d): the distances between two codes, then the numbers of code 0."""
    return _range(_grouped(vectors, bits), bits)


def _range(grouped: torch.Tensor, bits: int) -> torch.Tensor:
    least, most = grouped.aminmax(dim=-1)
    return torch.cat([(most - least) / (2**bits - 1), least], dim=-1).half()


def encode(vectors: torch.Tensor, span: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of (..., d) vectors whose ranges are known: what was decoded with a range has the codes it had.

    Returns
    -------
    torch.Tensor
        (..., d) in uint8, or (..., ceil(d / 2)), two codes in a byte. Numbers outside of a range get the code of the
        closest end, those that are no number any code: their range is no number, either.
    """
    return _encoded(_grouped(vectors, bits), span, bits, vectors.shape[-1])


def _encoded(grouped: torch.Tensor, span: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    codes = _steps(grouped, _scales(span, grouped.dtype), bits).to(torch.uint8).flatten(-2)[..., :size]
    return codes if bits == 8 else _packed(codes)


def decode(codes: torch.Tensor, span: torch.Tensor, bits: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., size) numbers that codes stand for."""
    codes = codes if bits == 8 else _unpacked(codes)[..., :size]
    steps = codes.to(torch.promote_types(dtype, torch.float32))
    return _numbers(_grouped(steps, bits), _scales(span, steps.dtype), size, dtype)


def products(query: torch.Tensor, codes: torch.Tensor, span: torch.Tensor, bits: int) -> torch.Tensor:
    """``query @ decode(codes).mT`` but for rounding, with nothing decoded: codes are numbers, scales come afterwards.

    Parameters
    ----------
    query : torch.Tensor
        (..., queries, d).
    codes, span : torch.Tensor
        (..., entries, ...), as of ``encode``.

    Returns
    -------
    torch.Tensor
        (..., queries, entries) in float32 or wider.
    """
    centred, step, middle = _centred(codes, span, bits, query.shape[-1], query.dtype)
    grouped = _in_groups(query, bits)  # (..., groups, queries, channels)
    found = (grouped @ centred.mT).to(step.dtype) * step
    return (found + grouped.sum(dim=-1, keepdim=True, dtype=step.dtype) * middle).sum(dim=-3)


def mixtures(
    weights: torch.Tensor, codes: torch.Tensor, span: torch.Tensor, bits: int, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """``weights @ decode(codes)`` but for rounding, with nothing decoded.

    Parameters
    ----------
    weights : torch.Tensor
        (..., queries, entries) in float32 or wider.
    codes, span : torch.Tensor
        (..., entries, ...), as of ``encode``.
    size : int
        d.
    dtype : torch.dtype
        Of what codes stand for.

    Returns
    -------
    torch.Tensor
        (..., queries, d).
    """
    centred, step, middle = _centred(codes, span, bits, size, dtype)
    weights = weights.unsqueeze(-3)
    found = ((weights * step).to(dtype) @ centred).to(step.dtype) + (weights * middle).sum(dim=-1, keepdim=True)
    return found.movedim(-3, -2).flatten(-2)[..., :size].to(dtype)


def _centred(
    codes: torch.Tensor, span: torch.Tensor, bits: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes about 0, so that half precision holds their products, with their scales and what they are about.

    Returns
    -------
    tuple
        (..., groups, entries, channels) in ``dtype``, then twice (..., groups, 1, entries) in float32 or wider.
    """
    middle = 2 ** (bits - 1)
    if bits == 8:
        numbers = (codes ^ middle).view(torch.int8).to(dtype)
    else:
        numbers = (_unpacked(codes)[..., :size].view(torch.int8) - middle).to(dtype)
    scales = span.mT.contiguous().to(torch.promote_types(dtype, torch.float32))  # entries side by side
    step, least = scales.unsqueeze(-2).chunk(2, dim=-3)
    return _in_groups(numbers, bits), step, least + middle * step


def _in_groups(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., n, d) as (..., groups, n, channels), zeros for what the last group lacks."""
    size, groups = vectors.shape[-1], num_groups(vectors.shape[-1], bits)
    channels = min(GROUP[bits], size)
    if missing := groups * channels - size:
        vectors = torch.nn.functional.pad(vectors, (0, missing))
    return vectors.unflatten(-1, (groups, channels)).movedim(-2, -3)


def round_to_codes(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., d) vectors as they will be decoded, and their ranges. The gradient passes through."""
    with torch.no_grad():
        grouped = _grouped(vectors, bits)
        span = _range(grouped, bits)
        scales = _scales(span, grouped.dtype)
        rounded = _numbers(_steps(grouped, scales, bits), scales, vectors.shape[-1], vectors.dtype)
    return (vectors + (rounded - vectors).detach() if vectors.requires_grad else rounded), span


def measure_and_encode(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of (..., d) vectors, and their ranges."""
    grouped = _grouped(vectors, bits)
    span = _range(grouped, bits)
    return _encoded(grouped, span, bits, vectors.shape[-1]), span


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a layer's keys and values are coded.

    Attributes
    ----------
    bits : tuple of int
        Of keys and of values: 8 or 4, or 16, where they stay as they are.
    sizes : tuple of int
        Numbers of a key and of a value.
    dtypes : tuple of torch.dtype
        Of a key and of a value that is no code.
    """

    bits: tuple[int, int]
    sizes: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]

    def with_ranges(self, entries: Entries) -> Entries:
        """Entries of zeros with ranges for what will be codes."""
        wanted = {}
        for name, which in (("keys", 0), ("values", 1), ("rotated", 0)):
            tensor = getattr(entries, name)
            if tensor is not None and self.bits[which] != 16:
                groups = num_groups(self.sizes[which], self.bits[which])
                wanted[f"{name}_range"] = torch.zeros(
                    *tensor.shape[:-1], 2 * groups, dtype=torch.float16, device=tensor.device
                )
        return dataclasses.replace(entries, **wanted)

    def rounded_keys(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys as they will be decoded, and their ranges; None where they stay as they are."""
        return (keys, None) if self.bits[0] == 16 else round_to_codes(keys, self.bits[0])

    def rounded(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor | None]]:
        """Keys as they will be decoded and their ranges, then the same of values."""
        return self._of_both(round_to_codes, keys, values)

    def coded(self, keys: torch.Tensor, values: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor | None]]:
        """Codes of keys and their ranges, then the same of values."""
        return self._of_both(measure_and_encode, keys.to(self.dtypes[0]), values.to(self.dtypes[1]))

    def _of_both(
        self, function: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]], *pair: torch.Tensor
    ) -> Sequence[tuple[torch.Tensor, torch.Tensor | None]]:
        keys, values = pair
        is_same = self.bits[0] == self.bits[1] and keys.shape == values.shape and keys.dtype == values.dtype
        if is_same and self.bits[0] != 16:
            tensors, spans = function(torch.stack(pair), self.bits[0])  # at once: half the operations
            return list(zip(tensors, spans, strict=True))
        return [
            (each, None) if bits == 16 else function(each, bits) for each, bits in zip(pair, self.bits, strict=True)
        ]

    def encoded(self, entries: Entries) -> Entries:
        """Entries with codes in the place of numbers whose ranges they have."""
        return self._map(entries, lambda tensor, span, which: encode(tensor, span, self.bits[which]))

    def decoded(self, entries: Entries) -> Entries:
        """Entries with numbers in the place of codes."""
        return self._map(
            entries,
            lambda codes, span, which: decode(codes, span, self.bits[which], self.sizes[which], self.dtypes[which]),
        )

    def blended(self, blend: Entries) -> Entries:
        """What a compressor made, as it will be decoded."""
        (keys, keys_range), (values, values_range) = self.rounded(blend.keys, blend.values)
        return dataclasses.replace(blend, keys=keys, values=values, keys_range=keys_range, values_range=values_range)

    def _map(self, entries: Entries, function: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> Entries:
        changes = {}
        for name, which in (("keys", 0), ("values", 1), ("rotated", 0)):
            tensor, span = getattr(entries, name), getattr(entries, f"{name}_range")
            if tensor is not None and span is not None:
                changes[name] = function(tensor, span, which)
        return dataclasses.replace(entries, **changes)


def _scales(span: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of two codes and number of code 0 of every group, (..., groups, 1)."""
    step, least = span.to(dtype)[..., None].chunk(2, dim=-2)
    return step, least


def _steps(grouped: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor], bits: int) -> torch.Tensor:
    """(..., groups, channels) whole numbers, the codes of as many."""
    step, least = scales
    # Codes of a group of equal numbers have no distance, nor those of numbers that are closer than float16 can tell.
    per_number = torch.where(step > 0, 1 / step, 0.0)
    return (grouped - least).mul_(per_number).round_().clamp_(0, 2**bits - 1)


def _numbers(
    steps: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor], size: int, dtype: torch.dtype
) -> torch.Tensor:
    """What whole numbers of (..., groups, channels) stand for, (..., size); they are written over."""
    step, least = scales
    # Not by addcmul, which is four times slower on a CPU where a scale is broadcast.
    return steps.mul_(step).add_(least).flatten(-2)[..., :size].to(dtype)


def _grouped(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., d) as (..., groups, channels), in float32 or wider; what the last group lacks repeats the last number."""
    size, groups = vectors.shape[-1], num_groups(vectors.shape[-1], bits)
    channels = min(GROUP[bits], size)
    missing = groups * channels - size
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if missing:
        vectors = torch.cat([vectors, vectors[..., -1:].expand(*vectors.shape[:-1], missing)], dim=-1)
    return vectors.unflatten(-1, (groups, channels))


def _packed(codes: torch.Tensor) -> torch.Tensor:
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
