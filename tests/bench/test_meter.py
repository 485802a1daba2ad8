"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

# Many blocks of 1 MiB with one of 16 KiB between each two, as large and small tensors lie.
PROGRAM = """
import sys, torch
from pathlib import Path
from lococo.bench.meter import freed_blocks_returned, trim_heap

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
