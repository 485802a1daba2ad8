"""Time taken, and memory in use."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Meter:
    """Durations and the peak of memory on a device.

    Memory is that of tensors on a GPU. On a CPU it is what the process holds in memory, weights and libraries
    included, and can only be told on Linux: elsewhere a process knows its peak since it began, but not that of the
    last cell.

    Parameters
    ----------
    device : torch.device
    watches_memory : bool
        Whether the peak is wanted. To tell it takes time, though not within a lap.
    """

    def __init__(self, device: torch.device, watches_memory: bool = False) -> None:
        self.device = device
        self.watches_memory = watches_memory
        self._laps: list[tuple[Any, Any]] = []
        self._knows_peak, self._earlier_peak = False, 0
        if watches_memory:
            gc.collect()
            self._reset_peak()

    @contextlib.contextmanager
    def lap(self) -> Iterator[None]:
        """Take the time of a ``with`` block, without waiting for a GPU at its end."""
        start = self._now()
        yield
        self._laps.append((start, self._now()))

    def seconds(self) -> list[float]:
        """Duration of every lap since the last call."""
        laps, self._laps = self._laps, []
        self.synchronize()
        if self.device.type == "cuda":
            return [start.elapsed_time(stop) / 1000 for start, stop in laps]
        return [stop - start for start, stop in laps]

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """A ``with`` block in which memory does not count, only what is left of it afterwards."""
        self._earlier_peak = self.peak() or 0
        yield
        self._reset_peak()

    def peak(self) -> int | None:
        """Most bytes in use since the meter was made; None where nobody watches or the system does not say."""
        if not self._knows_peak:
            return None
        if self.device.type == "cuda":
            return max(self._earlier_peak, torch.cuda.max_memory_allocated(self.device))
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        return max(self._earlier_peak, 1024 * int(found.group(1))) if found else None

    def _reset_peak(self) -> None:
        if not self.watches_memory:
            return
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._knows_peak = True
        elif sys.platform == "linux":
            trim_heap()
            with contextlib.suppress(OSError):  # not everywhere allowed
                Path("/proc/self/clear_refs").write_text("5")
                self._knows_peak = True


def release_memory(device: torch.device) -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def trim_heap() -> None:
    """Give what is free in the heap back to the system."""
    with contextlib.suppress(AttributeError):  # the C library is another than glibc
        ctypes.CDLL(None).malloc_trim(0)
