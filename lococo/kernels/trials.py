"""Lococo's Triton kernels on trial: none is used before it gave what torch gives, and none after a fault."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

from lococo.compression.codes import Codec

# Errors allowed, as shares of the largest number of a result, by its type.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-3}

# Several tiles and a part of one, and multiples of 16, as most real sizes are: what is compiled here serves there.
KV_HEADS, QUERIES, ENTRIES, SLOTS = 2, 144, 208, 48
DELAY = 37
ROW_SUM_EPS, SMALLEST_WEIGHT = 1e-6, 1e-9

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Trial(abc.ABC):
    """A kernel as a model calls it: equal trials are of the same compiled code.

    Attributes
    ----------
    kernel : str
        Module and function in ``lococo.kernels``.
    device, dtype, head_dim
        Of the keys.
    """

    kernel: ClassVar[str]

    device: torch.device
    dtype: torch.dtype
    head_dim: int

    @abc.abstractmethod
    def results(self, kernel: Callable[..., Any]) -> Pairs:
        """What the kernel makes of small random tensors, each beside the same by torch in float64."""

    def _generator(self) -> Callable[..., torch.Tensor]:
        """Function that makes normal tensors of a shape; what is drawn elsewhere does not change by it."""
        generator = torch.Generator(device="cpu").manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            sample = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            return sample.to(self.device, dtype)

        return normal


@dataclasses.dataclass(frozen=True)
class _AttentionTrial(Trial):
    groups: int
    is_biased: bool

    def _samples(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None]:
        normal = self._generator()
        query = normal(1, KV_HEADS * self.groups, QUERIES, self.head_dim)
        key, value = normal(2, 1, KV_HEADS, ENTRIES, self.head_dim).unbind()
        bias = normal(1, KV_HEADS, ENTRIES, dtype=torch.float32) if self.is_biased else None
        return query, key, value, self.head_dim**-0.5, bias

    @staticmethod
    def _logits(query, key, scale, bias):
        """(1, kv_heads, groups, queries, entries) in float64."""
        logits = query.double().unflatten(1, (KV_HEADS, -1)) @ key.double().transpose(-1, -2)[:, :, None] * scale
        if bias is not None:
            logits = logits + bias.double()[:, :, None, None]
        return logits.masked_fill(~_lower_right(0, query.device), float("-inf"))


@dataclasses.dataclass(frozen=True)
class AttendTrial(_AttentionTrial):
    """Of ``triton_attention.attend``."""

    kernel = "triton_attention.attend"

    def results(self, kernel: Callable[..., Any]) -> Pairs:
        """Output and log-sum-exp."""
        query, key, value, scale, bias = self._samples()
        output, lse = kernel(query, key, value, scale, bias)
        logits = self._logits(query, key, scale, bias)
        yield output, (logits.softmax(-1) @ value.double()[:, :, None]).flatten(1, 2)
        yield lse, logits.logsumexp(-1).flatten(1, 2)


@dataclasses.dataclass(frozen=True)
class MassTrial(_AttentionTrial):
    """Of ``triton_attention.attention_mass``."""

    kernel = "triton_attention.attention_mass"

    squared: bool

    def results(self, kernel: Callable[..., Any]) -> Pairs:
        """The attention received."""
        query, key, _, scale, bias = self._samples()
        logits = self._logits(query, key, scale, bias)
        lse = logits.logsumexp(-1).flatten(1, 2).float()
        probs = logits.softmax(-1) * _lower_right(DELAY, query.device)
        expected = (probs.square() if self.squared else probs).sum(dim=(2, 3))
        yield kernel(query, key, scale, lse, bias, DELAY, self.squared), expected


@dataclasses.dataclass(frozen=True)
class DecodeTrial(Trial):
    """Of ``triton_decode.attend_codes``."""

    kernel = "triton_decode.attend_codes"

    codec: Codec
    groups: int
    is_split: bool
    wants_received: bool
    squared: bool
    is_paged: bool = False

    def results(self, kernel: Callable[..., Any]) -> Pairs:
        """Output and attention received."""
        normal = self._generator()
        heads = KV_HEADS if self.is_split else 1
        query = normal(KV_HEADS, heads * self.groups, self.codec.sizes[0])
        numbers = [normal(KV_HEADS, ENTRIES, size) for size in self.codec.sizes]
        held = [each if each is None else each.contiguous() for pair in self.codec.coded(*numbers) for each in pair]
        (wide_keys, _), (wide_values, _) = self.codec.rounded(*numbers)
        bias = normal(KV_HEADS, ENTRIES)
        first = torch.tensor([0, ENTRIES // 2][:heads], device=self.device)
        at = first + torch.tensor([[DELAY], [2 * DELAY]], device=self.device)

        def is_of(head: int) -> torch.Tensor:
            entry = torch.arange(ENTRIES, device=self.device)
            return (entry >= first[head]) & (entry <= at[:, head, None])

        owned = torch.stack([is_of(head) for head in range(heads)], dim=1).repeat_interleave(self.groups, dim=1)
        scale = self.head_dim**-0.5
        logits = query.double() @ wide_keys.double().mT * scale + bias.double()[:, None]
        probs = logits.masked_fill(~owned, float("-inf")).softmax(-1)
        pages = torch.arange(KV_HEADS, device=self.device).flip(0) if self.is_paged else None
        if pages is not None:
            held = [each if each is None else each[pages] for each in held]
        output, received = kernel(
            *(query, *held, self.codec, bias, at, scale),
            *(first if self.is_split else None, self.wants_received, self.squared, pages),
        )
        yield output, probs @ wide_values.double()
        if received is not None:
            yield received, (probs.square() if self.squared else probs).sum(1)


@dataclasses.dataclass(frozen=True)
class BlendTrial(Trial):
    """Of ``triton_blend.blend``."""

    kernel = "triton_blend.blend"

    logits_dtype: torch.dtype
    num_averaged: int
    has_mass: bool
    has_gates: bool

    def results(self, kernel: Callable[..., Any]) -> Pairs:
        """Keys, values, averages and the log-mass."""
        normal = self._generator()
        keys, values = normal(2, 1, KV_HEADS, ENTRIES, self.head_dim).unbind()
        logits = normal(1, KV_HEADS, SLOTS, ENTRIES, dtype=self.logits_dtype)
        carried, *averaged = normal(1 + self.num_averaged, 1, KV_HEADS, ENTRIES, dtype=torch.float32).unbind()
        gates = normal(SLOTS, dtype=torch.float32).sigmoid() if self.has_gates else None
        anchors = normal(1, KV_HEADS, ENTRIES).argsort(-1)[..., :SLOTS]
        rest = (normal(1, KV_HEADS, ENTRIES) > 0).scatter(-1, anchors, True)
        got = kernel(
            *(keys, values, list(averaged), carried if self.has_mass else None, logits, gates, anchors, rest),
            ROW_SUM_EPS,
            SMALLEST_WEIGHT,
        )
        weights = (logits.double().relu() + ROW_SUM_EPS) * rest[:, :, None]
        weights = weights / weights.sum(-1, keepdim=True)
        if gates is not None:
            opened = gates.double()[:, None]
            weights = (opened * weights).scatter_add(-1, anchors[..., None], (1 - opened).expand(1, KV_HEADS, -1, 1))
        averages = [(weights @ column.double()[..., None]).squeeze(-1) for column in (*averaged, carried)]
        averages[-1] += torch.special.entr(weights).sum(-1)
        yield got[0], weights @ keys.double()
        yield got[1], weights @ values.double()
        yield from zip(got[2], averages[: self.num_averaged + self.has_mass], strict=True)


def _lower_right(delay: int, device: torch.device) -> torch.Tensor:
    return torch.ones(QUERIES, ENTRIES, dtype=torch.bool, device=device).tril(ENTRIES - QUERIES - delay)


class TritonSwitch:
    """Whether this process uses lococo's Triton kernels.

    Attributes
    ----------
    is_on : bool
        Until the first error, wrong numbers among them. What a machine lacks (a C compiler, shared memory) shows only
        when a kernel is compiled or launched, as an exception of any type.
    """

    def __init__(self) -> None:
        self.is_on = True
        self._passed: set[Trial] = set()

    def run(self, trial: Trial, *arguments: Any) -> Any:
        """What a kernel makes of the arguments, or None where torch has to do its work.

        The first call of a kind runs its trial. While a CUDA graph is recorded there is none, and no such kernel.

        Raises
        ------
        torch.OutOfMemoryError
            If the GPU's memory is full: no fault of a kernel.
        """
        if not self.is_on or (trial not in self._passed and _is_recorded(trial.device)):
            return None
        try:
            module, name = trial.kernel.split(".")
            kernel = getattr(importlib.import_module(f"lococo.kernels.{module}"), name)
            if trial not in self._passed:
                _compare(trial, kernel)
                self._passed.add(trial)
            return kernel(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.is_on = False
            warnings.warn(
                f"lococo's Triton kernels are not used from here on, torch does their work; {trial.kernel} failed: "
                f"{type(error).__name__}: {error}",
                stacklevel=3,
            )
            return None


TRITON = TritonSwitch()


def _is_recorded(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _compare(trial: Trial, kernel: Callable[..., Any]) -> None:
    for got, expected in trial.results(kernel):
        allowed = TOLERANCES[got.dtype]
        error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
        if not error <= allowed:  # not a number is none that is right
            raise ArithmeticError(
                f"wrong by {error:.2g} of the largest number, {allowed} is allowed "
                f"({trial.dtype}, head size {trial.head_dim}, {trial.device})"
            )
