"""The Triton kernels compiled for GPUs that need not be here: they fit the registers and the shared memory there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that one block may have.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MOST_SPILLED = 1 << 10

pytestmark = pytest.mark.slow


def test_kernels_fit_registers_and_shared_memory(tmp_path):
    """In a process of its own: in this one Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "aot_worker.py", *map(str, SHARED)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["architecture"] for kernel in kernels} == set(SHARED) and len(kernels) == 13 * len(SHARED)
    too_large = [
        kernel
        for kernel in kernels
        if kernel["spilled"] > MOST_SPILLED or kernel["shared"] > SHARED[kernel["architecture"]]
    ]
    assert not too_large
