"""What the processes of a distributed training have to agree on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from lococo.results.deadline import Deadline, OutOfTime


def summed(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Over all processes, which all have to call it."""
    processes = PartialState()
    return tensors if processes.num_processes == 1 else reduce([each.to(processes.device) for each in tensors], "sum")


def is_over_anywhere(deadline: Deadline) -> bool:
    """Whether a deadline has come in one process at least, so that all end at the same step; all have to ask."""
    return _in_any_process(deadline.is_over)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The main process goes through a ``with`` block before the others; where it ran out of time, so do they."""
    is_main = PartialState().is_main_process
    if not is_main and _in_any_process(False):
        raise OutOfTime
    try:
        yield
    except OutOfTime:
        if is_main:
            _in_any_process(True)
        raise
    if is_main:
        _in_any_process(False)


def _in_any_process(fact: bool) -> bool:
    return bool(summed([torch.tensor(float(fact))])[0])
