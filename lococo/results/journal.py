"""Findings kept as they come, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lococo.files import check_output
from lococo.results.deadline import Deadline
from lococo.results.tables import PACKAGE, own_commit


class Journal:
    """Rows measured so far, one JSON line each, so that a killed run goes on where it stopped.

    Parameters
    ----------
    path : Path
        Made at the first row; removed by ``finish``.
    deadline : Deadline, optional
        No measurement begins after it: ``measure`` raises ``OutOfTime``.
    of : str
        What all keys are about, ``model_digest`` for instance: rows of something else are left aside.

    Raises
    ------
    OSError
        If the file could not be written.
    """

    def __init__(self, path: Path, deadline: Deadline | None = None, of: str = "") -> None:
        self.path = check_output(path)
        self.deadline = deadline or Deadline()
        self.of = of
        self._rows: dict[str, dict[str, Any]] = {}  # as the file has them
        self._asked: set[str] = set()  # runs with other options may have left rows that nobody asks for
        self._commit = own_commit(PACKAGE)  # now: what is loaded measures, whatever is committed meanwhile
        self._is_cut = False
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            self._is_cut = bool(text) and not text.endswith("\n")  # the run was killed while it wrote a line
            for line in text.splitlines():
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if entry.get("of", self.of) == self.of:  # older journals do not say
            self._rows[entry["key"]] = entry

    def _used(self) -> list[dict[str, Any]]:
        """Rows that this run asked for, in the order in which they were measured."""
        return [row for name, row in self._rows.items() if name in self._asked]

    @property
    def seconds(self) -> float:
        """That measuring took, of the rows that were asked for, by earlier runs too."""
        return sum(row.get("seconds", 0.0) for row in self._used())

    @property
    def commits(self) -> list[str | None]:
        """Commits that rows asked for were measured at, in order, those that are no clean one first; else now's."""
        found = dict.fromkeys([row["commit"] for row in self._used() if "commit" in row] or [self._commit])
        return sorted(found, key=lambda commit: commit is not None and not commit.endswith("-dirty"))

    def measure(self, key: Iterable[Any], function: Callable[[], Any]) -> Any:
        """The value under a key, measured now if no earlier run has."""
        key = list(key)
        name = json.dumps(key)
        if name not in self._rows:
            self.deadline.check()
            started = time.monotonic()
            value = function()
            self.add(key, value, time.monotonic() - started)
        return self.recall(key)

    def add(self, key: Iterable[Any], value: Any, seconds: float) -> None:
        """Keep a value under a key, and how long it was measured."""
        name = json.dumps(list(key))
        entry = {"key": name, "value": value, "seconds": round(seconds, 3), "of": self.of, "commit": self._commit}
        self._rows[name] = entry
        self._asked.add(name)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._is_cut else "") + json.dumps(entry) + "\n")
        self._is_cut = False

    def recall(self, key: Iterable[Any]) -> Any | None:
        """The value under a key, None if it has not been measured."""
        name = json.dumps(list(key))
        if name not in self._rows:
            return None
        self._asked.add(name)
        return self._rows[name]["value"]

    def finish(self) -> None:
        """Remove the file: the result stands in its own."""
        self.path.unlink(missing_ok=True)
