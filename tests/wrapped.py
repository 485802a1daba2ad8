"""A patched model in other libraries' hands: the same random heads every time, and what it says."""

import dataclasses
import os
from pathlib import Path

import torch
from configs import FORESEEN
from tiny import tiny_ids

import lococo
from lococo.state import patch_of

CONFIG = lococo.LoCoCoConfig(
    num_slots=16, block_size=8, num_sinks=2, num_heavy=4, num_recent=4, kernel_size=5, gate_init=0.3
)
LEARNED = dataclasses.replace(CONFIG, score=FORESEEN)
SLOT_POSITIONS = dataclasses.replace(CONFIG, positions="slot")
IDS = tiny_ids(2, 64, seed=1)


def patched(model, config=CONFIG):
    """A model patched in place, with the same random heads every time."""
    lococo.patch_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for head in patch_of(model).heads.values():
            for parameter in head.conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def assert_equal(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def environment():
    """Environment of a process that imports the same lococo as this one."""
    path = [str(Path(lococo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}


def head_values(model):
    return [parameter.detach().clone() for head in patch_of(model).heads.values() for parameter in head.parameters()]
