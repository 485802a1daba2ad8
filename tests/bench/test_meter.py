"""The peak of memory."""

import torch

from lococo.bench.meter import Meter

CPU = torch.device("cpu")


def test_the_peak_of_memory_counts_from_the_first_to_what_is_set_apart():
    assert Meter(CPU).peak() is None
    meter = Meter(CPU, watches_memory=True)
    before = meter.peak()
    assert before is not None, "needs Linux, and to write to /proc/self/clear_refs"
    size = 2**28
    with meter.apart():
        held = [torch.ones(size // 4), torch.ones(size // 4)]
        del held[0]
    assert before + 0.9 * size <= meter.peak() < before + 1.5 * size
    held.append(torch.ones(size // 4))
    held.clear()
    assert meter.peak() >= before + 1.9 * size
    with meter.apart():
        pass
    assert meter.peak() >= before + 1.9 * size
    assert Meter(CPU, watches_memory=True).peak() < before + 0.5 * size
