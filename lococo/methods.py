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
DEFAULT_METHOD = "lococo-uncalibrated"
H2O = ("h2o", "h2o-slot")  # its position modes: the better one is what a gap ratio relates to


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


def chosen_config(
    method: str | None = None,
    num_slots: int | None = None,
    block_size: int | None = None,
    heads: str | None = None,
    slot_bits: str | None = None,
    spelled: Callable[[str], str] = str,
) -> LoCoCoConfig | None:
    """Config of one method as a user chose it, or of trained heads; None for ``full``, which has no slots.

    Parameters
    ----------
    method : str, optional
        None: ``lococo-uncalibrated``.
    num_slots : int, optional
        None: 512.
    block_size : int, optional
        None: ``num_slots``, at most 512.
    heads : str, optional
        Folder or Hub id.
    slot_bits : str, optional
        As ``parse_bits`` reads it. None: 16, or those of the heads.
    spelled : callable
        From a name of these to what the user calls it.

    Raises
    ------
    ValueError, OSError
        If the method is not known, heads cannot be read, or something is chosen that leaves no choice with another.
    """

    def refuse(why: str, **others: object) -> None:
        given = [spelled(name) for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"{why}: leave out {', '.join(given)}")

    config: LoCoCoConfig | None
    if heads:
        own = {"method": method, "num_slots": num_slots, "block_size": block_size}
        refuse("trained heads have a method, slots and a block size", **own)
        config = read_heads_config(heads)
    elif method == "full":
        refuse("the full cache has no codes", slot_bits=slot_bits)
        return None
    else:
        slots = LoCoCoConfig.num_slots if num_slots is None else num_slots
        block = min(slots, LoCoCoConfig.block_size) if block_size is None else block_size
        config = method_config(method or DEFAULT_METHOD, slots, block)
    if config is None or slot_bits is None:
        return config
    return dataclasses.replace(config, slot_bits=parse_bits(slot_bits))


@dataclasses.dataclass(frozen=True)
class Run:
    """One column of a comparison: a method at a number of slots.

    Attributes
    ----------
    config : LoCoCoConfig, optional
        None for the full cache.
    heads : str, optional
        Folder or Hub id of trained heads.
    reference_slots : int, optional
        Slots of the H2O that its gap ratio relates to. None: as many as its own.
    """

    name: str
    config: LoCoCoConfig | None
    heads: str | None = None
    reference_slots: int | None = None

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
    budgets: Sequence[int] = (),
    block_size: int | None = None,
    heads: Sequence[str] = (),
    *,
    name_heads: bool = False,
    any_block_size: bool = False,
    slot_bits: Sequence[str] = (),
) -> list[Run]:
    """The runs of a comparison: ``full`` once, other methods at every budget, trained heads as they were trained.

    Parameters
    ----------
    budgets : sequence of int
        Numbers of slots. Empty: those of the heads, or 512.
    block_size : int, optional
        None: that of the heads, or the smallest of the budgets and 512.
    name_heads : bool
        Trained heads are called ``lococo-FOLDER``, not ``lococo``.
    any_block_size : bool
        Whether heads may read in blocks of another size.
    slot_bits : sequence of str
        Every method but ``full`` is run with each of these, as ``parse_bits`` reads them; with codes it is called
        ``METHOD-BITS``. Empty: heads as they were trained, others with 16.

    Raises
    ------
    ValueError, OSError
        If a method is not known, nothing is to be compared, or heads cannot be read or were trained with another block
        size.
    """
    formats = parse_formats(slot_bits)
    if not methods and not heads:
        raise ValueError(f"there is nothing to compare: name methods, of {', '.join(METHODS)}, or heads")
    trained = heads_runs(heads, name_heads)
    configs = [run.config for run in trained if run.config is not None]
    budgets = budgets or [config.num_slots for config in configs] or [LoCoCoConfig().num_slots]
    if block_size is None:
        block_size = configs[0].block_size if configs else min(*budgets, LoCoCoConfig().block_size)
    for folder, config in zip(dict.fromkeys(heads), configs, strict=True):
        if config.block_size != block_size and not any_block_size:
            raise ValueError(f"the heads in {folder} have block_size={config.block_size}, compare them at that size")
    full = [Run("full", None)] if "full" in methods else []
    runs = [
        Run(name, method_config(name, slots, block_size))
        for slots in dict.fromkeys(budgets)
        for name in methods
        if name != "full"
    ]
    return full + [in_format(run, bits) for bits in formats for run in (*runs, *trained)]


def heads_runs(folders: Sequence[str], is_named: bool = False) -> list[Run]:
    """Trained heads as they were trained, called ``lococo``, or ``lococo-FOLDER``.

    Those of equal slots are told apart by as much of their folders' names as it takes.

    Raises
    ------
    ValueError, OSError
        If they cannot be read.
    """
    runs = [Run("lococo", read_heads_config(folder), folder) for folder in dict.fromkeys(folders)]
    deepest = max((len(Path(folder).parts) for folder in folders), default=0)
    for depth in range(is_named, deepest + 1):
        runs = [dataclasses.replace(run, name=_heads_name(run.heads, depth)) for run in runs]
        if len({(run.name, run.num_slots) for run in runs}) == len(runs):
            break
    return runs


def _heads_name(folder: str | None, depth: int) -> str:
    parts = Path(folder or "").parts
    return "-".join(["lococo", *(["/".join(parts[-depth:])] if depth else [])])


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


def parse_formats(texts: Sequence[str]) -> list[int | tuple[int, int] | None]:
    """``parse_bits`` of each, or None alone where there are none: as a config has it."""
    return [parse_bits(each) for each in texts] or [None]


def in_format(run: Run, bits: int | tuple[int, int] | None) -> Run:
    """A run whose keys and values have so many bits, called ``METHOD-BITS`` where they are codes.

    None: as many as its config says.
    """
    assert run.config is not None
    config = run.config if bits is None else dataclasses.replace(run.config, slot_bits=bits)
    name = run.name if config.bits == (16, 16) else f"{run.name}-{bits_name(config)}"
    return dataclasses.replace(run, name=name, config=config)


def bits_name(config: LoCoCoConfig) -> str:
    """Bits of keys and values as ``parse_bits`` reads them: ``8``, or ``8-4`` where they differ."""
    return "-".join(map(str, dict.fromkeys(config.bits)))


@contextlib.contextmanager
def as_method(model: nn.Module, config: LoCoCoConfig | None, heads: str | None = None) -> Iterator[nn.Module]:
    """The model with a method in force: patched inside the block, or as it is for None."""
    if config is None:
        yield model
        return
    with patched(model, config, heads=heads):
        yield model
