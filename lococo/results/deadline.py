"""An end in time for long runs."""

from __future__ import annotations

import time


class OutOfTime(Exception):
    """The time limit of a run is over: what was measured is kept, the same command goes on."""


class Deadline:
    """A moment after which nothing new begins.

    Parameters
    ----------
    seconds : float, optional
        From now. None: there is no limit.

    Raises
    ------
    ValueError
        If ``seconds`` is not positive.
    """

    def __init__(self, seconds: float | None = None) -> None:
        if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise ValueError(f"a time limit must be more than 0 seconds, got {seconds!r}")
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether the moment has passed."""
        return self._end is not None and time.monotonic() > self._end

    def check(self) -> None:
        """Raise ``OutOfTime`` if the moment has passed."""
        if self.is_over:
            raise OutOfTime
