"""Findings kept as they come, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lococo.files import check_output
from lococo.results.deadline import Deadline


class Journal:
    """Rows measured so far, one JSON line each, so that a killed run goes on where it stopped.

    Parameters
    ----------
    path : Path
        Made at the first row; removed by ``finish``.
    deadline : Deadline, optional
        No measurement begins after it: ``measure`` raises ``OutOfTime``.

    Raises
    ------
    OSError
        If the file could not be written.
    """

    def __init__(self, path: Path, deadline: Deadline | None = None) -> None:
        self.path = check_output(path)
        self.deadline = deadline or Deadline()
        self.rows: dict[str, Any] = {}
        self.seconds = 0.0  # that all measurements took, of earlier runs too
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the run was killed while it wrote this line
                self.rows[entry["key"]] = entry["value"]
                self.seconds += entry.get("seconds", 0.0)

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": name, "value": value, "seconds": round(seconds, 3)}) + "\n")

    def recall(self, key: Iterable[Any]) -> Any | None:
        """The value under a key, None if it has not been measured."""
        return self.rows.get(json.dumps(list(key)))

    def finish(self) -> None:
        """Remove the file: the result stands in its own."""
        self.path.unlink(missing_ok=True)
