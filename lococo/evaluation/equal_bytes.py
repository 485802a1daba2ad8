"""Bytes that caches take by layer and KV head, and methods with as many slots as fit into the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from lococo.config import LoCoCoConfig
from lococo.generation import cache_bytes, random_full_cache, read_tokens
from lococo.methods import H2O, Run, heads_runs, in_format, method_config, parse_formats
from lococo.models import base_shape


def bytes_per_head(model: PreTrainedModel, run: Run, length: int = 1) -> int:
    """Bytes of a run's cache by layer and KV head, measured on one text: all that is held, in the model's type.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    length : int
        Tokens of the text. The full cache grows with it; others are made whole at the first token.
    """
    if run.config is None:
        cache = random_full_cache(model, length, 1)
    else:
        with run.applied(model):
            cache = read_tokens(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
    shape = base_shape(model)
    return round(cache_bytes(cache) / (shape["num_layers"] * shape["num_kv_heads"]))


def plan_equal_bytes(
    model: PreTrainedModel,
    reference: str,
    methods: Sequence[str],
    block_sizes: Sequence[int],
    heads: Sequence[str] = (),
    slot_bits: Sequence[str] = (),
) -> list[Run]:
    """The runs of a comparison at equal bytes: each with the most slots whose cache takes no more than a reference's.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    reference : str
        METHOD:M, read in blocks of the first of ``block_sizes``, nothing coded.
    block_sizes : sequence of int
        Empty: M, at most 512.
    methods : sequence of str
        Every one but ``full`` is run at each block size and in each format, and called METHOD-bSIZE-BITS, without what
        is as in the reference. H2O's position modes are there with the reference's slots: the gap ratio relates to
        them.
    heads : sequence of str
        Folders or Hub ids of trained heads, run with their slots and blocks in each format in which they fit.
    slot_bits : sequence of str
        As ``parse_bits`` reads them. Empty: heads as they were trained, others with 16.

    Raises
    ------
    ValueError, OSError
        If a name is not known, heads cannot be read, or something does not fit.
    """
    name, num_slots = _parse_reference(reference)
    formats = parse_formats(slot_bits)
    block_sizes = block_sizes or [min(num_slots, LoCoCoConfig().block_size)]
    first, *_ = block_sizes
    most = bytes_per_head(model, Run(name, method_config(name, num_slots, first)))
    runs = [Run(each, method_config(each, num_slots, first)) for each in ("full", *H2O) if each in methods]
    for bits, block_size, method in itertools.product(formats, block_sizes, methods):
        is_reference = method in H2O and block_size == first and bits in (16, None)
        if method != "full" and not is_reference:
            label = method if block_size == first else f"{method}-b{block_size}"
            runs.append(_fitted(model, label, method, block_size, bits, most))
    for trained in heads_runs(heads):
        every = [in_format(trained, bits) for bits in formats]
        taken = [bytes_per_head(model, run) for run in every]
        fitting = [run for run, size in zip(every, taken, strict=True) if size <= most]
        if not fitting:
            raise ValueError(f"{reference} takes {most:,} bytes by layer and KV head, {trained.heads} {min(taken):,}")
        runs += fitting
    return [dataclasses.replace(run, reference_slots=num_slots) for run in runs]


def _parse_reference(text: str) -> tuple[str, int]:
    name, _, slots = text.partition(":")
    if name == "full" or not slots.isdecimal() or not int(slots):
        raise ValueError(f"a cache of as many bytes is METHOD:M, h2o:128 for instance, got {text!r}")
    return name, int(slots)


def _fitted(
    model: PreTrainedModel, label: str, method: str, block_size: int, bits: int | tuple[int, int] | None, most: int
) -> Run:
    """A method with the most slots whose cache takes ``most`` bytes by layer and KV head."""

    def run(num_slots: int) -> Run:
        return in_format(Run(label, method_config(method, num_slots, block_size)), bits)

    def size(num_slots: int) -> int:
        return bytes_per_head(model, run(num_slots))

    def fits(num_slots: int) -> bool:
        return size(num_slots) <= most

    low, high = 0, 64
    while fits(high):
        if size(2 * high) == size(high):  # every layer keeps its sliding window: more slots would never be used
            return run(high)
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise ValueError(
            f"{run(1).name} does not fit into {most:,} bytes by layer and KV head with blocks of {block_size}: "
            "choose smaller blocks, or a reference with more slots"
        )
    return run(low)
