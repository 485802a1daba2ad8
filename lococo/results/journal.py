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

    Attributes
    ----------
    seconds : float
        That all measurements took, of earlier runs too.

    Raises
    ------
    OSError
        If the file could not be written.
    """

    def __init__(self, path: Path, deadline: Deadline | None = None, of: str = "") -> None:
        self.path = check_output(path)
        self.deadline = deadline or Deadline()
        self.of = of
        self.rows: dict[str, Any] = {}
        self.seconds = 0.0
        self._commit = own_commit(PACKAGE)  # now: what is loaded measures, whatever is committed meanwhile
        self._commits: list[str | None] = []
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
            self.rows[entry["key"]] = entry["value"]
            self.seconds += entry.get("seconds", 0.0)
            self._commits += [entry["commit"]] if "commit" in entry else []

    @property
    def commits(self) -> list[str | None]:
        """Commits that rows were measured at, in order, those that are no clean one first; where is no row, now's."""
        found = dict.fromkeys(self._commits or [self._commit])
        return sorted(found, key=lambda commit: commit is not None and not commit.endswith("-dirty"))

    def measure(self, key: Iterable[Any], function: Callable[[], Any]) -> Any:
        """The value under a key, measured now if no earlier run has."""
        key = list(key)
        name = json.dumps(key)
        if name not in self.rows:
            self.deadline.check()
            started = time.monotonic()
            value = function()
            self.add(key, value, time.monotonic() - started)
        return self.rows[name]

    def add(self, key: Iterable[Any], value: Any, seconds: float) -> None:
        """Keep a value under a key, and how long it was measured."""
        name = json.dumps(list(key))
        self.rows[name] = value
        self.seconds += seconds
        self._commits.append(self._commit)
        entry = {"key": name, "value": value, "seconds": round(seconds, 3), "of": self.of, "commit": self._commit}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._is_cut else "") + json.dumps(entry) + "\n")
        self._is_cut = False

    def recall(self, key: Iterable[Any]) -> Any | None:
        """The value under a key, None if it has not been measured."""
        return self.rows.get(json.dumps(list(key)))

    def finish(self) -> None:
        """Remove the file: the result stands in its own."""
        self.path.unlink(missing_ok=True)
