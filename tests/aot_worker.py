"""Compile lococo's Triton kernels for GPUs that are not here, and print what ptxas says of each as a line of JSON."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lococo.compression.codes import Codec
from lococo.kernels import triton_attention as triton_kernels
from lococo.kernels import triton_blend, triton_decode

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KV_HEADS, GROUPS, QUERIES, ENTRIES, SLOTS = 2, 4, 512, 1024, 192
BF16, FP16 = torch.bfloat16, torch.float16


class Driver:
    """Says that a GPU of some architecture is there; nothing is launched on it."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_device(self):
        return self.architecture  # what is compiled is kept by device

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def attend(dim, dtype, is_biased):
    query, key, value, bias, _ = attention(dim, dtype, is_biased)
    triton_kernels.attend(query, key, value, 0.1, bias)


def mass(dim, dtype, is_biased, squared):
    query, key, _, bias, lse = attention(dim, dtype, is_biased)
    triton_kernels.attention_mass(query, key, 0.1, lse, bias, 100, squared)


def attention(dim, dtype, is_biased):
    query = torch.zeros(1, QUERIES, KV_HEADS * GROUPS, dim, dtype=dtype).transpose(1, 2)
    key, value = torch.zeros(2, 1, KV_HEADS, ENTRIES, dim, dtype=dtype).unbind()
    bias = torch.zeros(1, KV_HEADS, ENTRIES) if is_biased else None
    return query, key, value, bias, torch.zeros(1, KV_HEADS * GROUPS, QUERIES)


def blend(dim, dtype, is_gated, has_mass):
    keys, values = torch.zeros(2, 1, KV_HEADS, ENTRIES, dim, dtype=dtype).unbind()
    averaged = list(torch.zeros(2, 1, KV_HEADS, ENTRIES))
    triton_blend.blend(
        *(keys, values, averaged, torch.zeros(1, KV_HEADS, ENTRIES) if has_mass else None),
        torch.zeros(1, KV_HEADS, SLOTS, ENTRIES, dtype=dtype),
        torch.zeros(SLOTS) if is_gated else None,
        torch.zeros(1, KV_HEADS, SLOTS, dtype=torch.long),
        torch.ones(1, KV_HEADS, ENTRIES, dtype=torch.bool),
        1e-6,
        1e-9,
    )


def decode(dim, dtype, bits, is_split):
    codec = Codec(bits, (dim, dim), (dtype, dtype))
    numbers = torch.zeros(2, 1, ENTRIES, dim, dtype=dtype).unbind()
    held = [each if each is None else each.contiguous() for pair in codec.coded(*numbers) for each in pair]
    kv_heads = KV_HEADS if is_split else 1
    query, places = torch.zeros(1, kv_heads * GROUPS, dim, dtype=dtype), torch.zeros(kv_heads, dtype=torch.long)
    first = places if is_split else None
    more = (codec, torch.zeros(1, ENTRIES, dtype=dtype), places[None], 0.1, first, is_split, False, first)
    triton_decode.attend_codes(query, *held, *more)


CASES = [
    (attend, 64, FP16, False),
    (attend, 128, BF16, True),
    (attend, 256, BF16, True),
    (mass, 64, BF16, False, False),
    (mass, 128, BF16, True, True),
    (mass, 256, FP16, True, True),
    (blend, 64, BF16, False, False),
    (blend, 128, BF16, True, True),
    (blend, 256, FP16, True, True),
    (decode, 64, BF16, (8, 8), True),
    (decode, 128, BF16, (8, 4), True),
    (decode, 128, BF16, (16, 16), True),
    (decode, 256, FP16, (4, 16), False),
]


def spilled_bytes(ptx):
    """What one thread of a kernel spills, stores and loads together."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = ["-v", f"--gpu-name={re.search(r'.target (sm_[0-9a-z]+)', ptx)[1]}", source, "-o", f"{folder}/out"]
        for name in ("ptxas", "ptxas-blackwell"):  # the second is the later release, for later GPUs and language
            result = subprocess.run([BIN / name, *options], capture_output=True, text=True)
            if result.returncode == 0:
                break
    assert result.returncode == 0, result.stderr
    return sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr).groups()))


def main(architectures):
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    for architecture in architectures:
        driver.set_active(Driver(architecture))
        for function, dim, dtype, *flags in CASES:
            compiled.clear()
            function(dim, dtype, *flags)
            for name, kernel in compiled:
                print(
                    json.dumps(
                        {
                            "kernel": f"{name} for sm_{architecture}, {dim} channels, {dtype}, {flags}",
                            "architecture": architecture,
                            "spilled": spilled_bytes(kernel.asm["ptx"]),
                            "shared": kernel.metadata.shared,
                        }
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main(list(map(int, sys.argv[1:])))
