"""What a device can do at most: measured copies and matrix products, and its memory."""

from __future__ import annotations

import dataclasses
import os

import torch

from lococo.bench.meter import Meter

ATTEMPTS = 10
# Bytes copied and side of the matrices, too large for any cache and fast to measure.
CPU_SIZES = (2**28, 2048)
GPU_SIZES = (2**31, 8192)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Best rates of a device, measured.

    Attributes
    ----------
    bytes_per_second : float
        Of a large copy, what is read and what is written both counted.
    flops_per_second : float
        Of a large matrix product in the dtype of the model.
    """

    bytes_per_second: float
    flops_per_second: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the limits of a device for a dtype."""
    copied, side = CPU_SIZES if device.type == "cpu" else GPU_SIZES
    return Limits(copy_rate(device, copied), product_rate(device, dtype, side))


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written per second by a copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best_time(device, lambda: target.copy_(source))


def product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of the product of two square matrices."""
    left, right = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    out = torch.empty_like(left)
    return 2 * side**3 / _best_time(device, lambda: torch.mm(left, right, out=out))


def _best_time(device: torch.device, function) -> float:
    meter = Meter(device)
    for _ in range(ATTEMPTS + 1):
        with meter.lap():
            function()
    return min(meter.seconds()[1:])


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU or of the machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
