"""Kinds of slots by name, and the cells of an ablation: one thing at a time around a centre."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

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


@dataclasses.dataclass(frozen=True)
class Axes:
    """What is varied, and the centre from which it is.

    Parameters
    ----------
    base : LoCoCoConfig
        What all cells share; its number of slots, kernel and kinds of slots do not count.
    num_slots, kernel_size : int
        The centre.
    combination : str
        The centre's; numbers of slots in any combination are for the centre's ``num_slots``, and are in proportion
        elsewhere.
    slots, kernels, combinations : sequences
        Values to try in the place of the centre's.
    seeds : sequence of int
        The first is every cell's; the centre is calibrated again with the others, which tells what is chance.

    Raises
    ------
    ValueError
        If a value is out of range, or something is varied that has no effect.
    """

    base: LoCoCoConfig
    num_slots: int
    kernel_size: int
    combination: str
    slots: Sequence[int] = ()
    kernels: Sequence[int] = ()
    combinations: Sequence[str] = ()
    seeds: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must not be empty: the first is every cell's")
        learns = self.centre.config.num_fused
        if not learns and (len(self.seeds) > 1 or self.kernels):
            what = "kernel_size" if self.kernels else "seed"
            raise ValueError(f"varying {what} changes nothing where {self.combination!r}, the centre, fuses nothing")

    @property
    def centre(self) -> Cell:
        """The cell from which others differ in one thing."""
        return self._cell(CENTRE, self.num_slots, self.kernel_size, self.combination, self.seeds[0])

    def one_at_a_time(self) -> list[Cell]:
        """The centre, then the cells that differ from it in one thing."""
        slots, kernel, combination, seed = self.num_slots, self.kernel_size, self.combination, self.seeds[0]
        return _distinct(
            [
                self.centre,
                *(self._cell("num_slots", each, kernel, combination, seed) for each in self.slots),
                *(self._cell("kernel_size", slots, each, combination, seed) for each in self.kernels),
                *(self._cell("combine", slots, kernel, each, seed) for each in self.combinations),
                *(self._cell("seed", slots, kernel, combination, each) for each in self.seeds[1:]),
            ]
        )

    def product(self) -> list[Cell]:
        """The centre, then every number of slots with every kernel, every combination and every seed."""
        values: Iterator = itertools.product(
            self.slots or [self.num_slots],
            self.kernels or [self.kernel_size],
            self.combinations or [self.combination],
            self.seeds,
        )
        return _distinct([self.centre, *(self._cell("product", *each) for each in values)])

    def _cell(self, varied: str, num_slots: int, kernel_size: int, combination: str, seed: int) -> Cell:
        config = dataclasses.replace(
            self.base, num_slots=self.num_slots, num_sinks=0, num_heavy=0, num_recent=0, kernel_size=kernel_size
        )
        return Cell(varied, combined(combination, config).with_slots(num_slots), combination, seed)


def _distinct(cells: Sequence[Cell]) -> list[Cell]:
    """Without cells of which an earlier one is the same."""
    found: dict[tuple, Cell] = {}
    for cell in cells:
        learns = cell.config.num_fused > 0  # without a head neither kernel nor seed does anything
        config = cell.config if learns else dataclasses.replace(cell.config, kernel_size=1)
        found.setdefault((config, cell.seed if learns else None), cell)
    return list(found.values())
