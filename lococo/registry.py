"""Methods by name: what ``LoCoCoConfig`` can ask for, the library's and one's own alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item", bound=Callable)


class Registry(Generic[Item]):
    """Classes or functions of one kind, by name.

    Parameters
    ----------
    kind : str
        What a config calls them.
    check : callable
        Raises a TypeError or ValueError for what is none of the kind.
    """

    def __init__(self, kind: str, check: Callable[[Any], None]) -> None:
        self.kind = kind
        self._check = check
        self._items: dict[str, Item] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """Decorator that gives a class or function a name.

        Raises
        ------
        TypeError, ValueError
            If it is none of the kind, or the name is taken by another.
        """

        def register(item: Item) -> Item:
            self._check(item)
            taken = self._items.get(name)
            # A module that is read again, in a notebook for one, may register its own again.
            if taken is not None and taken.__qualname__ != item.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered already: {taken.__qualname__}")
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
            raise ValueError(f"{self.kind} must be one of {', '.join(self._items)}, got {name!r}")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
