"""The methods compared, by the names used in result files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lococo.config import LoCoCoConfig
from lococo.heads import heads_digest, read_heads_config
from lococo.patch import patched

PRESETS: dict[str, Callable[..., LoCoCoConfig]] = {
    "streaming": LoCoCoConfig.streaming_llm,
    "streaming-absolute": partial(LoCoCoConfig.streaming_llm, positions="absolute"),
    "h2o": LoCoCoConfig.h2o,
    "h2o-slot": partial(LoCoCoConfig.h2o, positions="slot"),
    "lococo-uncalibrated": LoCoCoConfig,
    "lococo-uncalibrated-slot": partial(LoCoCoConfig, positions="slot"),
    "lococo-paper": LoCoCoConfig.paper,
    "lococo-reference": LoCoCoConfig.reference,
    # The default preset's gates are closed: blends are copies, and the convolution is never run. Open gates make it
    # run at every compression, as trained heads do: for measuring speed, as untrained blends are worth nothing.
    "lococo-open": partial(LoCoCoConfig, gate_init=0.5),
    "lococo-open-rank16": partial(LoCoCoConfig, gate_init=0.5, head_rank=16),
}
METHODS = ("full", *PRESETS)


def method_config(name: str, num_slots: int, block_size: int) -> LoCoCoConfig | None:
    """Config of a method, ``full`` or one of ``PRESETS``; None for ``full``.

    Raises
    ------
    ValueError
        If the method is not known.
    """
    if name == "full":
        return None
    if name not in PRESETS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return PRESETS[name](num_slots, block_size=block_size)


@dataclasses.dataclass(frozen=True)
class Run:
    """One column of a comparison: a method at a number of slots.

    Attributes
    ----------
    config : LoCoCoConfig, optional
        None for the full cache.
    heads : str, optional
        Folder or Hub id of trained heads.
    """

    name: str
    config: LoCoCoConfig | None
    heads: str | None = None

    @property
    def num_slots(self) -> int | None:
        """Slots per layer and KV head, on average; None: every token is kept."""
        return None if self.config is None else self.config.num_slots

    @property
    def columns(self) -> dict[str, Any]:
        """What a row of a result says of it."""
        block_size = None if self.config is None else self.config.block_size
        return {"method": self.name, "num_slots": self.num_slots, "block_size": block_size}

    def identity(self) -> dict[str, Any] | None:
        """What the outcome depends on, as plain JSON values: the config, and the trained weights by their digest."""
        if self.config is None:
            return None
        return {**self.config.to_dict(), **({"heads": heads_digest(self.heads)} if self.heads else {})}

    def applied(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The model with the method in force inside a ``with`` block."""
        return as_method(model, self.config, self.heads)


def plan_runs(
    methods: Sequence[str],
    budgets: Sequence[int],
    block_size: int,
    heads: Sequence[str] = (),
    *,
    name_heads: bool = False,
    slot_bits: Sequence[str] = ("16",),
) -> list[Run]:
    """The runs of a comparison: ``full`` once, other methods at every budget, trained heads as they were trained.

    Parameters
    ----------
    name_heads : bool
        Trained heads are called ``lococo-FOLDER``, not ``lococo``.
    slot_bits : sequence of str
        Every method but ``full`` is run with each of these, as ``parse_bits`` reads them; with codes it is called
        ``METHOD-BITS``.

    Raises
    ------
    ValueError, OSError
        If a method is not known, nothing is to be compared, or heads cannot be read or were trained with another block
        size.
    """
    formats = [parse_bits(each) for each in slot_bits]
    if not methods and not heads:
        raise ValueError(f"there is nothing to compare: name methods, of {', '.join(METHODS)}, or heads")
    full = [Run("full", None)] if "full" in methods else []
    runs = [
        Run(name, method_config(name, slots, block_size))
        for slots in dict.fromkeys(budgets)
        for name in methods
        if name != "full"
    ]
    for folder in heads:
        config = read_heads_config(folder)
        if config.block_size != block_size:
            raise ValueError(f"the heads in {folder} have block_size={config.block_size}, compare them at that size")
        runs.append(Run(f"lococo-{Path(folder).name}" if name_heads else "lococo", config, folder))
    return full + [run if bits == 16 else _coded(run, bits) for bits in formats for run in runs]


def parse_bits(text: str) -> int | tuple[int, int]:
    """``LoCoCoConfig.slot_bits`` from "8", or from "8-4", bits of keys and of values.

    Raises
    ------
    ValueError
        If it is neither, or there are no codes of so many bits.
    """
    words = text.split("-")
    if len(words) > 2 or not all(word.isdecimal() for word in words):
        raise ValueError(f"slot bits must be written as 8, or as 8-4 for keys and values, got {text!r}")
    bits = tuple(int(word) for word in words)
    chosen = bits[0] if len(bits) == 1 or bits[0] == bits[1] else bits
    LoCoCoConfig(slot_bits=chosen)  # type: ignore[arg-type]
    return chosen  # type: ignore[return-value]


def _coded(run: Run, bits: int | tuple[int, int]) -> Run:
    assert run.config is not None
    name = "-".join(map(str, bits)) if isinstance(bits, tuple) else str(bits)
    return dataclasses.replace(run, name=f"{run.name}-{name}", config=dataclasses.replace(run.config, slot_bits=bits))


@contextlib.contextmanager
def as_method(model: nn.Module, config: LoCoCoConfig | None, heads: str | None = None) -> Iterator[nn.Module]:
    """The model with a method in force: patched inside the block, or as it is for None."""
    if config is None:
        yield model
        return
    with patched(model, config, heads=heads):
        yield model
