"""Operations, bytes held and bytes kept are counted; freed memory goes back to the system."""

import platform
import subprocess
import sys

import torch

from experiments.benchmarks.counters import HeldBytes, Operations, saved_bytes

# Many blocks of 1 MiB with one of 16 KiB between each two, as large and small tensors lie.
PROGRAM = """
import sys, torch
from pathlib import Path
from experiments.benchmarks.counters import freed_blocks_returned
from lococo.bench.meter import trim_heap

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

def kept():
    before = resident()
    blocks, pins = [], []
    for _ in range(400):
        blocks.append(torch.ones(262144))
        pins.append(torch.ones(4096))
    del blocks
    found = resident() - before
    trim_heap()
    return found, resident() - before

with freed_blocks_returned():
    print(*kept())
print(*kept())
"""


def test_freed_blocks_are_returned():
    """Bytes that stay in use after 400 MB were freed, and after a trim: inside and after the block."""
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    inside, after = ([int(number) for number in line.split()] for line in output.splitlines())
    if platform.libc_ver()[0] == "glibc":  # others are told nothing
        assert max(inside) < 100e6  # what lies free in the heap is still taken first
        assert after[0] > 300e6 > 100e6 > after[1]


def test_operations_are_counted_as_they_are_dispatched():
    with Operations() as operations:
        (torch.ones(3) + 1).view(1, 3).mul_(2)
    assert operations.count == 4


def test_bytes_are_counted_as_long_as_autograd_keeps_them():
    with saved_bytes() as saved:
        factor = torch.ones(5, requires_grad=True)
        product = factor * torch.ones(5)  # one of both is kept
        (product * product).sum().backward()  # twice the same
    assert (saved.now, saved.most) == (0, 3 * 5 * 4)


def test_held_bytes_are_those_alive_at_once():
    given = torch.ones(1000)
    with HeldBytes() as held:
        first = given + 1
        second = first.view(10, 100)[2:].clone()
        del first
        given.add_(1)
        third = torch.zeros(500)
    assert (held.peak, held.largest) == (4000 + 3200, 4000)
    assert second.shape[0] + third.shape[0] == 508
