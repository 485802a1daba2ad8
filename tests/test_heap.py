"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

# Many blocks of 100 KiB with a small one between each two, as tensors and what describes them lie.
PROGRAM = """
import sys, torch
from pathlib import Path
from lococo.heap import return_freed_blocks, trim_heap

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "returned":
    return_freed_blocks()
big = torch.ones(1 << 23)
del big  # glibc gives what it was told to give later from the heap now
before = resident()
blocks, pins = [], []
for _ in range(1000):
    blocks.append(torch.ones(25600))
    pins.append(torch.ones(16))
del blocks
kept = resident() - before
trim_heap()
print(kept, resident() - before)
"""


def kept(mode):
    """Bytes that stay in use after 100 MB were freed, and after a trim."""
    output = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True).stdout
    return [int(number) for number in output.split()]


def test_freed_blocks_are_returned():
    before_trim, after_trim = kept("kept")
    returned = max(kept("returned"))
    if platform.libc_ver()[0] == "glibc":  # others are told nothing
        assert before_trim > 80e6 > 20e6 > max(after_trim, returned)
