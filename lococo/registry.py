"""Methods by name: what ``LoCoCoConfig`` can ask for, the library's and one's own alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from lococo.compression.base import Compressor
    from lococo.compression.scores import Score

Item = TypeVar("Item", bound=Callable)


class Registry(Generic[Item]):
    """Classes or functions of one kind, by name.

    Parameters
    ----------
    kind : str
        What a config calls them.
    *homes : str
        Modules that register the library's own, imported when a name is first looked up.
    """

    def __init__(self, kind: str, *homes: str) -> None:
        self.kind = kind
        self._homes = homes
        self._items: dict[str, Item] = {}

    def register(self, name: str, check: Callable[[Any], None]) -> Callable[[Item], Item]:
        """Decorator that gives a class or function a name.

        Parameters
        ----------
        check : callable
            Raises a TypeError or ValueError for what is none of the kind.

        Raises
        ------
        TypeError, ValueError
            If it is none of the kind, or the name is taken by another.
        """

        def register(item: Item) -> Item:
            check(item)
            self._import_homes()  # their names are taken first
            taken = self._items.get(name)
            # A module that is read again, in a notebook for one, may register its own again.
            if taken is not None and _name(taken) != _name(item):
                raise ValueError(f"{self.kind} {name!r} is registered already: {_name(taken)[1]}")
            self._items[name] = item
            return item

        return register

    def __getitem__(self, name: str) -> Item:
        """What has a name.

        Raises
        ------
        ValueError
            If nothing has it; lists the names there are.
        """
        if name not in self._items:
            self._import_homes()
        if name not in self._items:
            raise ValueError(f"{self.kind} must be one of {', '.join(self)}, got {name!r}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        """The library's own first, home by home, whatever was imported first."""
        self._import_homes()
        places = {home: place for place, home in enumerate(self._homes)}
        return iter(sorted(self._items, key=lambda name: places.get(self._items[name].__module__, len(places))))

    def _import_homes(self) -> None:
        for home in self._homes:
            importlib.import_module(home)


def _name(item: Any) -> tuple[str, str]:
    named = item if hasattr(item, "__qualname__") else type(item)  # a partial has no name of its own
    return named.__module__, named.__qualname__


SCORES: Registry[type[Score]] = Registry("score", "lococo.compression.scores")
COMPRESSORS: Registry[type[Compressor]] = Registry(
    "compressor", "lococo.compression.fusion", "lococo.compression.centroids"
)
ATTENTIONS: Registry[Callable] = Registry("attention", "lococo.kernels.attention")
