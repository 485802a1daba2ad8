"""A recorder for steps on the CPU, with the rules of a CUDA graph.

Python runs once, while recording. What it wrote to is then put back, as if nothing had been computed, and what it made
holds garbage until the first replay. A replay repeats the operations with the recording's own arguments: numbers and
shapes are frozen, and tensors are known by their addresses. A tensor from outside the recording is not kept alive by
it: whoever owned it may have let go of its memory, and a replay that would read it says so. What would make the host
wait for the device, or upload from the host, is an error.

The project's recorders are in ``lococo.cuda_graphs.RECORDERS``; ``TapeRecorder()`` is one more of them, for ``"cpu"``.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lococo

PACKAGE = Path(lococo.__file__).parent

# Operations whose result, or its shape, the host has to know.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "bincount", "one_hot", "_unique2", "unique_consecutive", "unique_dim"),
}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
HOST_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class FreedMemory(RuntimeError):
    """A recording was replayed after memory that it reads or writes had been freed or had moved."""


def not_permitted(reason: str) -> RuntimeError:
    return RuntimeError(f"not permitted while recording: {reason}, at {library_line()}")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operation's arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """An operation's arguments or results with a function of everything in them."""
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(function, item) for item in value])
    return function(value)


def operation_name(function: Any) -> str:
    """``index_put_`` of ``aten.index_put_.default``."""
    return function._schema.name.split("::")[-1]


def why_it_waits(function: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """What makes the host wait for the device in an operation there; None: nothing."""
    name = operation_name(function)
    if name in WAITING or (name == "where" and len(args) == 1):
        return str(function)
    if name in INDEXING and any(is_mask(index) for index in args[1]):
        return f"{function} with a boolean mask"
    counts = function._overloadname in ("Tensor", "self_Tensor")
    if name == "repeat_interleave" and counts and kwargs.get("output_size") is None:
        return f"{function} without output_size"
    return None


def is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def written_arguments(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    schema = function._schema.arguments
    given = [*zip(schema, args, strict=False), *((each, kwargs[each.name]) for each in schema if each.name in kwargs)]
    written = [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]
    return list(tensors_in(written))


def library_line() -> str:
    """File and line of the library's innermost call."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"lococo/{file.relative_to(PACKAGE).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the library"


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Outside:
    """A tensor that was there before the recording: an address, and how to read what lies there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storage, self._at = StorageWeakRef(storage), storage.data_ptr()
        self._dtype, self._offset = tensor.dtype, tensor.storage_offset()
        self._shape, self._strides = tensor.shape, tensor.stride()
        self._used_by = library_line()

    def tensor(self) -> torch.Tensor:
        if self._storage.expired():
            raise FreedMemory(self._message("freed"))
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage.data_ptr() != self._at:
            raise FreedMemory(self._message("moved"))
        return torch.empty(0, dtype=self._dtype).set_(storage, self._offset, self._shape, self._strides)

    def _message(self, what: str) -> str:
        return f"a replay uses {what} memory: {self._dtype} {tuple(self._shape)}, recorded at {self._used_by}"


def _there(value: Any) -> Any:
    return value.tensor() if isinstance(value, Outside) else value


@dataclasses.dataclass
class Operation:
    """A call that is repeated, and the tensors of the recording that its results go to."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    results: list[torch.Tensor | None]

    def repeat(self) -> None:
        args, kwargs = mapped(_there, (self.args, self.kwargs))
        again = tensors_in(self.function(*args, **kwargs))
        for result, new in zip(self.results, again, strict=True):
            if result is not None and result.data_ptr() != new.data_ptr():
                result.copy_(new)


class Tape(TorchDispatchMode):
    """Records the operations of a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Operation] = []
        self._made: dict[int, torch.Tensor] = {}  # by address, kept alive as the memory pool of a graph is
        self._numbers: dict[int, torch.Tensor] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation_name(function) == "lift_fresh":
            return self._number(args[0])
        reason = why_it_waits(function, args, kwargs)
        if reason is not None:
            raise not_permitted(reason)
        written = written_arguments(function, args, kwargs)
        for tensor in written:
            self._remember(tensor)
        frozen = mapped(self._freeze, (args, kwargs))
        given = set(map(address, tensors_in((args, kwargs))))
        output = function(*args, **kwargs)
        new = [result if address(result) not in given else None for result in tensors_in(output)]
        self._made.update({address(result): result for result in new if result is not None})
        # A view needs no repetition: it is taken anew wherever it is used.
        if written or any(result is not None for result in new):
            self._operations.append(Operation(function, *frozen, new))
        return output

    def finish(self) -> None:
        """Leave the memory as a graph leaves it that has been recorded and not replayed."""
        for storage, copy in self._before.values():
            storage.copy_(copy)
        self._before.clear()
        for tensor in self._made.values():
            garbage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            garbage.fill_(255)  # NaN in every floating-point type, -1 in integers

    @torch.inference_mode()
    def replay(self) -> None:
        for operation in self._operations:
            operation.repeat()

    def _number(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor made by Python. A single number is handed to kernels by value; more of them would be uploaded."""
        if tensor.dim() > 0:
            raise not_permitted(f"upload of {tuple(tensor.shape)} from the host")
        self._numbers[address(tensor)] = tensor
        return tensor

    def _remember(self, tensor: torch.Tensor) -> None:
        at, storage = address(tensor), tensor.untyped_storage()
        if at not in self._made and at not in self._before:
            self._before[at] = storage, storage.clone()

    def _freeze(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or address(value) in self._made or address(value) in self._numbers:
            return value
        return Outside(value)


class NoHostReads(TorchFunctionMode):
    """What the host reads from a tensor on the CPU without any operation would wait for a device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in HOST_READS:
            raise not_permitted(f"Tensor.{function.__name__}")
        return function(*args, **(kwargs or {}))


class TapeRecorder:
    """One of ``lococo.cuda_graphs.RECORDERS``. It counts recordings, those that failed too, and replays."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recordings += 1
        tape = Tape()
        try:
            with torch.no_grad(), NoHostReads(), tape:
                output = function()
        finally:
            tape.finish()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay, output
