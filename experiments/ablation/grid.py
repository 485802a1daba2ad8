"""Kinds of slots by name, and the cells of an ablation: one thing at a time around a centre."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lococo.config import LoCoCoConfig

KINDS = ("sinks", "heavy", "recent", "fused")
FILLING = ("fused", "heavy", "recent")  # the first of these that has no number takes what is left
CENTRE = "centre"


def combined(name: str, config: LoCoCoConfig) -> LoCoCoConfig:
    """A config whose slots are of the named kinds alone.

    ``sinks+heavy:32+fused``: a kind has the number of slots it is given, or its share in the default preset; the first
    of ``fused``, ``heavy`` and ``recent`` that has no number takes all that is left.

    Parameters
    ----------
    name : str
    config : LoCoCoConfig
        Gives the number of slots and all else.

    Raises
    ------
    ValueError
        If a kind is not known or named twice, a number is none, or the budget does not add up.
    """
    default = LoCoCoConfig(config.num_slots)
    counts, numbered = dict.fromkeys(KINDS, 0), set()
    named = [part.partition(":") for part in name.split("+")]
    kinds = [kind for kind, _, _ in named]
    for kind, colon, number in named:
        if kind not in KINDS or kinds.count(kind) > 1:
            raise ValueError(f"unknown combination {name!r}: join {', '.join(KINDS)} by +, each once at most")
        if colon and not number.isdecimal():
            raise ValueError(f"in the combination {name!r} the slots of {kind} must be a number, got {number!r}")
        if colon:
            numbered.add(kind)
        counts[kind] = int(number) if colon else getattr(default, f"num_{kind}")
    filling = next((kind for kind in FILLING if kind in kinds and kind not in numbered), None)
    others = sum(count for kind, count in counts.items() if kind != filling)
    if filling:
        counts[filling] = config.num_slots - others
    if sum(counts.values()) != config.num_slots or (filling and counts[filling] < 1):
        budget = " + ".join(f"{counts[kind]} {kind}" for kind in kinds if kind != filling)
        left = f" leave nothing for {filling}" if filling else f" are {others}, and no kind takes what is left"
        raise ValueError(f"the combination {name!r} does not add up to {config.num_slots} slots: {budget}{left}")
    sinks, heavy, recent = (counts[kind] for kind in ("sinks", "heavy", "recent"))
    return dataclasses.replace(config, num_sinks=sinks, num_heavy=heavy, num_recent=recent)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A config to calibrate and measure.

    Attributes
    ----------
    varied : str
        What differs from the centre: ``num_slots``, ``kernel_size``, ``combine``, ``seed``; ``centre`` for itself and
        ``product`` in a full grid.
    combination : str
    seed : int
        Of the initial weights and of the choice and order of the training texts.
    """

    varied: str
    config: LoCoCoConfig
    combination: str
    seed: int

    @property
    def name(self) -> str:
        """Name of a folder."""
        kinds = self.combination.replace(":", "")
        return f"m{self.config.num_slots}-k{self.config.kernel_size}-{kinds}-seed{self.seed}"


def grid_cells(
    base: LoCoCoConfig,
    centre: tuple[int, int, str],
    *,
    slots: Sequence[int] = (),
    kernels: Sequence[int] = (),
    combinations: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    product: bool = False,
) -> list[Cell]:
    """The centre, then the cells that differ from it in one thing.

    Parameters
    ----------
    base : LoCoCoConfig
        What all cells share; its number of slots, kernel and kinds of slots do not count.
    centre : tuple
        Number of slots, kernel size and combination. Numbers of slots in any combination are for the centre's, and
        are in proportion elsewhere.
    slots, kernels, combinations : sequences
        Values to try in the place of the centre's.
    seeds : sequence of int
        The first is every cell's; the centre is calibrated again with the others, which tells what is chance.
    product : bool
        After the centre every value with every other, and every seed.

    Raises
    ------
    ValueError
        If a value is out of range, or something is varied that has no effect.
    """
    if not seeds:
        raise ValueError("seeds must not be empty: the first is every cell's")

    def cell(varied: str, num_slots: int, kernel_size: int, combination: str, seed: int) -> Cell:
        config = dataclasses.replace(
            base, num_slots=centre[0], num_sinks=0, num_heavy=0, num_recent=0, kernel_size=kernel_size
        )
        return Cell(varied, combined(combination, config).with_slots(num_slots), combination, seed)

    start: dict[str, Any] = dict(zip(("num_slots", "kernel_size", "combination"), centre, strict=True), seed=seeds[0])
    cells = [cell(CENTRE, **start)]
    if not cells[0].config.num_fused and (len(seeds) > 1 or kernels):
        what = "kernel_size" if kernels else "seed"
        raise ValueError(f"varying {what} changes nothing where {centre[2]!r}, the centre, fuses nothing")
    if product:
        values = itertools.product(slots or centre[:1], kernels or centre[1:2], combinations or centre[2:], seeds)
        return _distinct([*cells, *(cell("product", *each) for each in values)])
    axes: dict[str, Sequence[Any]] = dict(
        num_slots=slots, kernel_size=kernels, combination=combinations, seed=seeds[1:]
    )
    for name, given in axes.items():
        varied = "combine" if name == "combination" else name
        cells += [cell(varied, **{**start, name: value}) for value in given]
    return _distinct(cells)


def _distinct(cells: Sequence[Cell]) -> list[Cell]:
    """Without cells of which an earlier one is the same."""
    found: dict[tuple, Cell] = {}
    for cell in cells:
        learns = cell.config.num_fused > 0  # without a head neither kernel nor seed does anything
        config = cell.config if learns else dataclasses.replace(cell.config, kernel_size=1)
        found.setdefault((config, cell.seed if learns else None), cell)
    return list(found.values())
