"""Tensors that say they are on a GPU and compute on the CPU.

Inside ``with FakeCuda() as gpu:`` tensors are made on and moved to ``"cuda:0"`` and ``"cuda:1"`` as on a machine with
two GPUs. An operation on tensors of several devices is an error, as it is there. What would make the host wait for a
GPU is listed in ``gpu.waits``: a result that the host has to know, a download, an upload from memory that is not
pinned. Devices need a build of torch for CUDA, since others have no such device type; no GPU, and no driver.

Kernels are not simulated: Triton counts as missing, and attention is what the CPU makes of it.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from step_tape import INDEXING, library_line, mapped, operation_name, tensors_in, why_it_waits
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lococo.kernels.attention

CPU = torch.device("cpu")
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class DeviceMismatch(RuntimeError):
    """Tensors of one operation were on several devices."""


class DeviceAssert(RuntimeError):
    """``torch._assert_async`` failed: on a GPU nothing can be computed in this process any more."""


class Wait(NamedTuple):
    """What the host waited for, and where in the library."""

    reason: str
    line: str


class FakeTensor(torch.Tensor):
    """A tensor on a device, computed in ``inner`` on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: torch.Tensor, device: torch.device) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"FakeTensor({self.inner}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} on a simulated tensor outside of FakeCuda")


def inner(value: Any) -> Any:
    """What is computed on the CPU in the place of a value."""
    return value.inner if isinstance(value, FakeTensor) else value


class FakeCuda(TorchDispatchMode):
    """Two simulated GPUs inside a ``with`` block; ``waits`` lists what the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_StandIns(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self._stack.__exit__(*error)

    def note(self, reason: str) -> None:
        self.waits.append(Wait(reason, library_line()))

    def put(self, tensor: torch.Tensor, device: str | torch.device = "cuda:0") -> torch.Tensor:
        """A copy of a tensor on a device, without a wait."""
        return FakeTensor(tensor.detach().clone(), with_index(device))

    def put_model(self, model: torch.nn.Module, device_of: Callable[[str], str] = lambda name: "cuda:0") -> None:
        """Move the weights and buffers of a model in place; ``device_of`` tells the device of a submodule's name."""
        moved: dict[Any, torch.Tensor] = {}  # tied weights stay tied

        def move(tensor: torch.Tensor, device: str) -> torch.Tensor:
            return moved.setdefault((id(tensor), device), self.put(tensor, device))

        for name, module in model.named_modules():
            device = device_of(name)
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    there = torch.nn.Parameter(move(parameter, device), parameter.requires_grad)
                    module._parameters[key] = there
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = move(buffer, device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wanted = with_index(kwargs["device"]) if kwargs.get("device") is not None else None
        given = list(tensors_in((args, kwargs)))
        fakes = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
        if not fakes and (wanted is None or wanted == CPU):
            return function(*args, **kwargs)
        device = self._device(function, args, kwargs, wanted)
        self._look_at(function, args, kwargs)
        if wanted is not None:
            kwargs["device"] = CPU
        output = function(*mapped(inner, args), **mapped(inner, kwargs))
        if device == CPU:
            return output
        # An operation that writes hands out what it was given.
        by_inner = {id(tensor.inner): tensor for tensor in fakes}
        return mapped(lambda value: by_inner[id(value)] if id(value) in by_inner else _on(value, device), output)

    def _device(self, function, args, kwargs, wanted: torch.device | None) -> torch.device:
        """Where the result is; raises where tensors cannot go together."""
        if function in COPIES:
            return args[0].device if wanted is None else wanted
        first, others = args, ()
        if operation_name(function) in INDEXING:  # indices may be on the CPU
            first, others = [args[0], *args[2:]], [index for index in tensors_in(args[1]) if index.device != CPU]
        # As in torch, a single number on the CPU goes with any device.
        devices = {tensor.device for tensor in tensors_in((first, kwargs)) if tensor.dim() > 0 or tensor.device != CPU}
        devices |= {tensor.device for tensor in others}
        if len(devices) > 1:
            raise DeviceMismatch(f"{function} of tensors on {sorted(map(str, devices))}, at {library_line()}")
        if wanted is not None:
            return wanted
        return next(iter(devices), CPU)

    def _look_at(self, function, args, kwargs) -> None:
        reason = why_it_waits(function, args, kwargs)
        if reason is not None:
            self.note(reason)
        if operation_name(function) in INDEXING and any(index.device == CPU for index in tensors_in(args[1])):
            self.note("an index on the CPU")
        if function in COPIES:
            self._look_at_copy(function, args, kwargs)
        if operation_name(function) == "_assert_async" and not args[0].inner.all():
            raise DeviceAssert(f"device-side assert, at {library_line()}")

    def _look_at_copy(self, function, args, kwargs) -> None:
        is_in_place = function is torch.ops.aten.copy_.default
        source, target = (args[1], args[0].device) if is_in_place else (args[0], kwargs.get("device"))
        target = source.device if target is None else with_index(target)
        if source.device.type == target.type:
            return
        is_async = args[2] if is_in_place and len(args) > 2 else kwargs.get("non_blocking", False)
        if not (is_async and getattr(source, "is_fake_pinned", False)):
            self.note(f"copy from {source.device} to {target}")


def _on(value: Any, device: torch.device) -> Any:
    return FakeTensor(value, device) if isinstance(value, torch.Tensor) else value


def with_index(device: str | torch.device) -> torch.device:
    """``"cuda"`` is the current device, here always the first."""
    device = torch.device(device)
    return torch.device("cuda:0") if device.type == "cuda" and device.index is None else device


def lower_right_bias(queries: int, entries: int) -> torch.Tensor:
    """For ``causal_lower_right`` of torch, which cannot be called under a dispatch mode; it too is on no device."""
    bias = torch.ones(queries, entries, dtype=torch.bool).tril(entries - queries)
    bias.is_on_no_device = True
    return bias


class _StandIns(TorchFunctionMode):
    """What Python and C++ would ask of a driver, answered here; all of it is put back at the end."""

    def __init__(self, gpu: FakeCuda) -> None:
        super().__init__()
        self._gpu = gpu

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()
        self._stack = contextlib.ExitStack()
        for owner, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "mem_get_info", lambda device=None: (10**9, 2 * 10**9)),
            (torch.cuda, "memory_reserved", lambda device=None: 0),
            (torch.cuda, "memory_allocated", lambda device=None: 0),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "device", contextlib.nullcontext),
            (torch.backends.cuda, "SDPAParams", lambda *args: None),
            (torch.backends.cuda, "can_use_flash_attention", lambda *args: False),
            (lococo.kernels.attention, "_has_triton", lambda device: False),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, value))
        self._stack.enter_context(
            mock.patch.object(lococo.kernels.attention, "causal_lower_right", lower_right_bias, create=True)
        )
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self._stack.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_fake_pinned = True
            return pinned
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return function(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if args and isinstance(args[0], FakeTensor):
            if function in (torch.Tensor.tolist, torch.Tensor.numpy):
                self._gpu.note(f"Tensor.{function.__name__}")
                return function(args[0].inner)
            if function is torch.Tensor.data_ptr:
                return args[0].inner.data_ptr()
            if function is F.scaled_dot_product_attention:
                return self._attend(*args, **kwargs)
        return function(*args, **kwargs)

    def _attend(self, query, key, value, attn_mask=None, **options) -> FakeTensor:
        given = tensors_in((query, key, value, attn_mask))
        devices = {tensor.device for tensor in given if not hasattr(tensor, "is_on_no_device")}
        if len(devices) > 1:
            raise DeviceMismatch(f"attention of tensors on {sorted(map(str, devices))}, at {library_line()}")
        output = F.scaled_dot_product_attention(
            *map(inner, (query, key, value)), attn_mask=inner(attn_mask), **options
        )
        return FakeTensor(output, query.device)
