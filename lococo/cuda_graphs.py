"""A decoding step recorded once and replayed: on a GPU the host no longer launches every kernel of every step."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lococo.cache.buffers import LayerModules, is_locked
from lococo.cache.cache import LoCoCoCache
from lococo.cache.plan import Plan, plan_call
from lococo.compat import CACHE_NAME, OLD_CACHE_NAME, OUTPUT_CACHE, cache_argument, with_cache
from lococo.context import ForwardContext, ForwardRequest
from lococo.forward import after_forward, ask_for_last_states, before_forward
from lococo.inputs import padded_columns
from lococo.state import Patch, is_ours
from lococo.whole_text import is_in_pieces

# A recording costs about as much as a few steps, so a cache has to show first that it is there to stay.
STEPS_BEFORE_RECORDING = 8
ARGUMENTS = {
    "input_ids",
    CACHE_NAME,
    OLD_CACHE_NAME,
    "attention_mask",
    "position_ids",
    "cache_position",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
# Transformers leaves its own on modules whose outputs were asked for once; they do nothing in other calls.
IDLE_HOOKS = {"transformers.utils.output_capturing"}

Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]


class CudaGraphReplay:
    """Replays a CUDA graph.

    Newer torch releases free, with a graph, the workspace of the matrix products that were captured on its stream. A
    stream has other graphs, too: streams come from a pool.
    """

    _freed: collections.Counter[int] = collections.Counter()  # graphs by stream

    def __init__(self, graph: torch.cuda.CUDAGraph, stream: int) -> None:
        self._graph, self._stream = graph, stream
        self._freed_before = self._freed[stream]
        weakref.finalize(graph, self._freed.update, [stream])

    def __call__(self) -> None:
        """Repeat what was captured."""
        self._graph.replay()

    @property
    def is_intact(self) -> bool:
        """Whether no other graph of the same stream has been freed since."""
        return self._freed[self._stream] == self._freed_before


def record_cuda_graph(function: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Capture a function in a CUDA graph: what replays it, and the output that every replay overwrites.

    After an error streams, allocator and random generator of the current device are as they were.
    """
    device = torch.cuda.current_device()
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    generator = torch.cuda.default_generators[device]
    random_state = generator.clone_state()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            output = function()
            graph.capture_end()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what it says follows from the error
                graph.capture_end()
            with contextlib.suppress(RuntimeError):  # where capture_end has done it, there is nothing to end
                torch._C._cuda_endAllocateToPool(device, pool)
            generator.graphsafe_set_state(random_state)
            raise
    return CudaGraphReplay(graph, stream.cuda_stream), output


RECORDERS: dict[str, Recorder] = {"cuda": record_cuda_graph}

_graphs: weakref.WeakKeyDictionary[LoCoCoCache, DecodeGraph | None] = weakref.WeakKeyDictionary()


class EmptyRecordingError(RuntimeError):
    """Operations went elsewhere while they were recorded."""


class Snapshot:
    """All that Python would look at in the forward of a model, for a recording that no longer looks.

    Parts, weights, hooks, flags and numbers of every module, and its config; adapters are switched by such flags. Not
    the values of tensors, which a recording reads where they lie, and not the heads, which take no part in steps.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for name, module in model.named_modules() if not is_ours(name)]
        configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
        self._kept = [(vars(each), _copied(vars(each))) for each in (*modules, *configs.values())]
        tensors = (
            tensor
            for module in modules
            for held in (module._parameters, module._buffers)
            for tensor in held.values()
            if tensor is not None
        )
        self._addresses = [(tensor, tensor.data_ptr()) for tensor in tensors]

    def is_current(self) -> bool:
        """Whether everything is as it was."""
        try:
            # Dictionaries compare what they hold by identity first, so that no tensor is looked into.
            is_same = all(attributes == before for attributes, before in self._kept)
        except RuntimeError:  # two tensors of several numbers have been compared: one has been replaced
            return False
        return is_same and all(tensor.data_ptr() == address for tensor, address in self._addresses)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy whose containers are copies, too: what is added to the ones there are shows."""
    containers = (dict, list, set)
    return {name: copy.copy(value) if isinstance(value, containers) else value for name, value in attributes.items()}


class DecodeGraph:
    """The forward of one token of every row with one cache, for replays with other tokens.

    Whatever changes from step to step lies in the buffers of the cache and in two inputs here. Bookkeeping, and the
    compressions at the end of a block, stay outside.

    Parameters
    ----------
    patch : Patch
    model : torch.nn.Module
        The patched causal language model.
    cache : LoCoCoCache
        All of its layers ready for a step.
    arguments : dict
        Keyword arguments of a step.
    record : callable
        See ``record_cuda_graph``.
    """

    def __init__(
        self, patch: Patch, model: nn.Module, cache: LoCoCoCache, arguments: dict[str, Any], record: Recorder
    ) -> None:
        self.model = weakref.ref(model)
        self.buffers = [layer.decode for layer in cache.layers]
        self.modules = layer_modules(patch)
        self.input_ids = arguments["input_ids"].clone()
        self.position_ids = torch.zeros_like(self.input_ids)
        plan = Plan((), cache.rows, self.position_ids, self.position_ids, is_step=True)
        context = ForwardContext(cache.config, plan, cache, {}, is_recorded=True)

        def forward() -> Any:
            with patch.asking(ForwardRequest(context=context)):
                return type(model).__call__(
                    model, self.input_ids, position_ids=self.position_ids, **with_cache(model, cache), use_cache=True
                )

        with _on_device(self.input_ids.device):
            self._replay, output = record(forward)
        self._output_type, self._logits = type(output), output.logits
        # Logits, and what a config asks for. Not the cache: what a graph holds is never freed before the graph.
        self._output = {name: value for name, value in output.items() if name != OUTPUT_CACHE}
        self._is_tried = False
        self._snapshot = Snapshot(model)

    def is_current(self) -> bool:
        """Whether the model is as it was, and nothing that the recording needs was freed."""
        return getattr(self._replay, "is_intact", True) and self._snapshot.is_current()

    def is_of(self, model: nn.Module) -> bool:
        """Whether this model was recorded: another may go on with the same cache."""
        return self.model() is model

    def fits(self, cache: LoCoCoCache) -> bool:
        """Whether the cache's buffers are where they were, and the inputs can be written to."""
        is_same = all(mine is layer.decode for mine, layer in zip(self.buffers, cache.layers, strict=True))
        return is_same and not is_locked(self.input_ids)

    def step(self, cache: LoCoCoCache, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Read one token of every row, (batch, 1) each.

        Raises
        ------
        EmptyRecordingError
            If the first replay writes nothing. Nothing has been read then.
        """
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids.expand_as(self.position_ids))
        nothing = torch.finfo(self._logits.dtype).max
        if not self._is_tried:
            self._logits.fill_(nothing)
        with _on_device(self.input_ids.device):
            self._replay()
        if not self._is_tried and bool((self._logits == nothing).all()):
            raise EmptyRecordingError("the recording is empty")
        self._is_tried = True
        output = tree_map_only(torch.Tensor, torch.clone, self._output)
        return self._output_type(**output, **{OUTPUT_CACHE: cache})


def call_model(patch: Patch, model: nn.Module, *args, **kwargs) -> Any:
    """Call a patched model as ``model(...)`` does, a step of decoding from a recording where there can be one.

    ``generate`` decodes through the attribute ``__call__`` of the model, in whose place ``patch_model`` puts this.
    """
    call = functools.partial(type(model).__call__, model)
    if torch.compiler.is_compiling():
        return call(*args, **kwargs)
    cache = kwargs.get(cache_argument(model), kwargs.get(OLD_CACHE_NAME))
    if args or not isinstance(cache, LoCoCoCache) or not _can_replay(patch, model, cache, kwargs):
        return call(*args, **kwargs)
    input_ids = kwargs["input_ids"]
    plan = plan_call(cache.rows, 1, cache.config, None, input_ids.device)
    if not plan.is_step:
        return call(**kwargs)
    step = ForwardContext(cache.config, plan, cache, patch.rotary_tables, cache.rows)
    plan_for = functools.partial(step.plan_for, device=input_ids.device)
    graph = _graphs.get(cache)
    if graph is not None and not (graph.is_of(model) and graph.is_current()):
        graph = None
        del _graphs[cache]
    if graph is None and not _can_record(patch, model):
        _graphs[cache] = None
        return call(**kwargs)
    cache.make_ready(plan_for, layer_modules(patch) if graph is None else graph.modules)

    def without_graph(error: Exception) -> Any:
        _graphs[cache] = None
        patch.can_record = False
        patch.say_once(f"{type(model).__name__} decodes without a CUDA graph: {error}")
        return call(**kwargs)

    position_ids = kwargs.get("position_ids")
    if cache.config.positions == "slot" or position_ids is None:
        position_ids = plan.cache_positions if cache.config.positions == "slot" else plan.positions
    if graph is None or not graph.fits(cache):
        graph = None
        _graphs.pop(cache, None)  # its memory is free before the next one takes some
        try:
            graph = _graphs[cache] = DecodeGraph(patch, model, cache, kwargs, RECORDERS[input_ids.device.type])
        except Exception as error:  # compilers, allocators and libraries raise what they like
            return without_graph(error)
    try:
        output = graph.step(cache, input_ids, position_ids)
    except EmptyRecordingError as error:
        return without_graph(error)
    cache.advance(plan, 1)
    return output


def layer_modules(patch: Patch) -> list[LayerModules]:
    """What a patched model's layers compute their memory with, in order. It takes too long for every step."""
    heads, networks, rotary = patch.heads, patch.networks, patch.rotary_tables
    return [LayerModules(heads.get(index), networks.get(index), rotary.get(index)) for index in patch.layers]


def _can_replay(patch: Patch, model: nn.Module, cache: LoCoCoCache, arguments: dict[str, Any]) -> bool:
    input_ids = arguments.get("input_ids")
    if input_ids is None or input_ids.shape[1] != 1 or input_ids.device.type not in RECORDERS:
        return False
    wanted = {name for name, value in arguments.items() if value is not None and value is not False}
    seen = max(row.seen for row in cache.rows)
    positions = arguments.get("position_ids")
    return (
        wanted <= ARGUMENTS
        and arguments.get("return_dict") is not False
        and cache.num_steps >= STEPS_BEFORE_RECORDING
        and not cache.is_reading
        and cache.config == patch.config
        and cache.batch_size == input_ids.shape[0]
        and (positions is None or positions.shape in ((1, 1), input_ids.shape))
        and (cache not in _graphs or _graphs[cache] is not None)
        and all(layer.has_stepped and (layer.window is None or seen > layer.window) for layer in cache.layers)
        and not patch.is_suspended
        and not is_in_pieces(patch)
        and not torch.is_grad_enabled()
        and not model.training
        and not torch.is_autocast_enabled(input_ids.device.type)
        and padded_columns(arguments.get("attention_mask"), input_ids.shape[0], 1, cache) is None
    )


def _can_record(patch: Patch, model: nn.Module) -> bool:
    """Whether there can be a recording: foreign hooks would not run in it, other devices not be seen.

    Rotary embeddings that ask the host for the length of the text have hooks of their own, see ``whole_text``.
    """
    devices = {parameter.device for parameter in model.parameters()}
    return patch.can_record and len(devices) == 1 and not _has_foreign_hooks(model)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _has_foreign_hooks(model: nn.Module) -> bool:
    ours = {before_forward, after_forward, ask_for_last_states}
    return any(
        getattr(hook, "func", hook) not in ours and getattr(hook, "__module__", None) not in IDLE_HOOKS
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
    )
