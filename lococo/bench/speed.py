"""Time and memory of reading a text and of decoding, method beside method."""

from __future__ import annotations

import abc
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.bench.meter import Meter, is_out_of_memory, release_memory
from lococo.compat import cache_of, with_cache
from lococo.config import LoCoCoConfig
from lococo.generation import cache_bytes, random_full_cache
from lococo.methods import Run
from lococo.models import base_shape
from lococo.state import patch_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method at a length of text and a batch size."""

    run: Run
    length: int
    batch: int


class Measurement(abc.ABC):
    """What is timed.

    Attributes
    ----------
    name : str
        As on the command line.
    unit : str
        What the seconds of a row are for.
    """

    name: ClassVar[str]
    unit: ClassVar[str]

    def check(self, cell: Cell) -> None:
        """Refuse a cell that cannot be measured, before any work.

        Raises
        ------
        ValueError
            If the text is too short, or there is none.
        """
        if cell.length < 1:
            raise ValueError(f"lengths must be at least 1, got {cell.length}")
        if cell.batch < 1:
            raise ValueError(f"batches must be at least 1, got {cell.batch}")

    @abc.abstractmethod
    def take(self, model: PreTrainedModel, cell: Cell, meter: Meter) -> dict[str, float | None]:
        """Measure a cell once on a model with the cell's method in force.

        Returns
        -------
        dict
            ``seconds`` of a unit, ``cache_bytes``, and what else there is to tell; the same keys for every cell.
        """


class Prefill(Measurement):
    """Reading ``length`` tokens in one call, as ``generate`` does, for the logits of the last.

    Patched models cut such a call into pieces of ``prefill_chunk_size`` themselves.
    """

    name = "prefill"
    unit = "text"

    @torch.no_grad()
    def take(self, model: PreTrainedModel, cell: Cell, meter: Meter) -> dict[str, float | None]:
        """Read the text once."""
        ids = random_ids(model, cell.batch, cell.length)
        with meter.lap():
            output = model(ids, use_cache=True, logits_to_keep=1)
        return {"seconds": meter.seconds()[0], "cache_bytes": cache_bytes(cache_of(output))}


class Decode(Measurement):
    """A greedy token after ``length`` others, through the model's forward alone.

    The full cache is the one that ``generate`` makes, ``DynamicCache``, which copies itself at every step to grow; it
    is filled with random numbers. A compressed cache reads until it is full, which is the same at every length. It
    compresses once in every block of B tokens: ordinary steps are timed in the middle of the open block and the step
    that compresses at its end, and a token's time is their mean over a block, ``((B - 1) step + compressing) / B``.

    Parameters
    ----------
    steps : int
        Tokens timed, at least; of ordinary steps the median counts.
    """

    name = "decode"
    unit = "step"

    def __init__(self, steps: int = 32) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps

    def check(self, cell: Cell) -> None:
        """Refuse a text shorter than a block: a compressed cache is filled with whole ones."""
        super().check(cell)
        block_size = 1 if cell.run.config is None else cell.run.config.block_size
        if cell.length < block_size:
            raise ValueError(f"lengths must be at least one block of {block_size} tokens, got {cell.length}")

    @torch.no_grad()
    def take(self, model: PreTrainedModel, cell: Cell, meter: Meter) -> dict[str, float | None]:
        """Decode whole blocks, or steps of the full cache."""
        config = cell.run.config
        with meter.apart():
            cache = filled_cache(model, cell)
        held, block = cache_bytes(cache), open_block(config)
        reader = Reader(model, cache, random_ids(model, cell.batch, 1), meter)
        if block == 1:
            step = compressing = statistics.median(reader.decode(self.steps))
        else:
            step, compressing = self._whole_blocks(reader, block)
        return {
            "seconds": ((block - 1) * step + compressing) / block,
            "cache_bytes": held,
            "step_seconds": step,
            "compressing_seconds": None if config is None else compressing,
        }

    def _whole_blocks(self, reader: Reader, block: int) -> tuple[float, float]:
        """Seconds of an ordinary step and of one that compresses, in as many blocks as it takes."""
        timed = min(self.steps, block - 1)
        before = (block - 1 - timed) // 2
        steps, compressing = [], []
        for _ in range(-(-self.steps // block)):
            compressing += reader.decode(1)  # the block before this one, which is complete
            reader.read(before)
            steps += reader.decode(timed)
            reader.read(block - 1 - before - timed)
        return statistics.median(steps), statistics.median(compressing)


class Reader:
    """A model that goes on reading after what a cache holds."""

    def __init__(self, model: PreTrainedModel, cache: Any, token: torch.Tensor, meter: Meter) -> None:
        self.model, self.held, self.token, self.meter = model, with_cache(model, cache), token, meter
        self.call = model.__call__  # as generate does: steps may be replayed

    def read(self, tokens: int) -> None:
        """Read tokens in one go, for which neither time nor memory counts."""
        if tokens:
            ids = random_ids(self.model, self.token.shape[0], tokens)
            with self.meter.apart():
                self.model(ids, **self.held, use_cache=True, logits_to_keep=1)

    def decode(self, steps: int) -> list[float]:
        """Read the most probable token, so many times. Returns the seconds of each."""
        for _ in range(steps):
            with self.meter.lap():
                output = self.call(input_ids=self.token, **self.held, use_cache=True, logits_to_keep=1)
                self.token = output.logits[:, -1:].argmax(dim=-1)
        return self.meter.seconds()


def open_block(config: LoCoCoConfig | None) -> int:
    """Tokens between two compressions while tokens come one by one; 1 where nothing is compressed."""
    return 1 if config is None else config.decode_block_size or config.block_size


def random_ids(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    """(batch, tokens) ids where the model is, the same ones at every call."""
    generator = torch.Generator(model.device).manual_seed(0)
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (batch, tokens), generator=generator, device=model.device)


def filled_cache(model: PreTrainedModel, cell: Cell) -> Any:
    """The cache after a cell's text, without reading all of it."""
    if cell.run.config is None:
        return random_full_cache(model, cell.length, cell.batch)
    return compressed_cache(model, cell.run.config, cell.batch, cell.length)


def compressed_cache(model: PreTrainedModel, config: LoCoCoConfig, batch: int, length: int | None = None) -> Any:
    """The cache of a patched model after a text, without reading all of it.

    Whole blocks are read until the slots are full and a block is complete: more text changes what the cache holds,
    not how much it holds nor how long the next token takes.

    Parameters
    ----------
    length : int, optional
        Tokens of the text, a block or more, where they may be too few to fill the slots.
    """
    blocks = -(-most_slots(model) // config.block_size) + 1
    if length is not None:
        blocks = min(blocks, length // config.block_size)
    ids = random_ids(model, batch, blocks * config.block_size)
    return cache_of(model(ids, use_cache=True, logits_to_keep=1))


def most_slots(model: PreTrainedModel) -> int:
    """Slots of the KV head of a patched model that has most of them."""
    patch = patch_of(model)
    layers = [patch.config.for_window(window) for window in patch.family.windows]
    return max(head.num_slots for index, layer in enumerate(layers) for head in layer.layer_configs(index))


def compare_speed(
    model: PreTrainedModel, measurement: Measurement, groups: Sequence[Sequence[Cell]], repeats: int
) -> list[dict[str, Any]]:
    """Measure the cells of each group in turn, so that what changes on the machine meets all of them alike.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    groups : sequence of sequences of Cell
        Each at one length and batch.
    repeats : int
        Measurements of each cell, after one to warm up, which tells the peak of memory.

    Returns
    -------
    list of dict
        A row per cell: ``median``, ``min`` and ``max`` in seconds per ``unit``; ``speedup_over_full`` is the full
        cache's median over this one. A cell for which the device has no memory says so in ``skipped``.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    rows: list[dict[str, Any]] = []
    count = (repeats + 1) * sum(map(len, groups))
    with tqdm(total=count, desc=measurement.name, disable=None) as bar:
        for group in groups:
            release_memory(model.device)
            found: dict[Cell, list[dict[str, Any]]] = {cell: [] for cell in group}
            for turn in range(repeats + 1):
                for cell, taken in found.items():
                    if not (taken and taken[-1]["skipped"]):
                        taken.append(_take(model, measurement, cell, Meter(model.device, watches_memory=not turn)))
                    bar.update()
            rows += _rows(model, measurement, found)
    return rows


def _take(model: PreTrainedModel, measurement: Measurement, cell: Cell, meter: Meter) -> dict[str, Any]:
    try:
        with cell.run.applied(model):
            return {**measurement.take(model, cell, meter), "peak_bytes": meter.peak(), "skipped": None}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    release_memory(model.device)  # here the error, and what its traceback held, is gone
    return {"seconds": None, "cache_bytes": None, "peak_bytes": None, "skipped": f"out of memory: {reason}"}


def _rows(
    model: PreTrainedModel, measurement: Measurement, found: dict[Cell, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    shape = base_shape(model)
    seconds = {
        cell: [] if taken[-1]["skipped"] else [each["seconds"] for each in taken[1:]] for cell, taken in found.items()
    }
    medians = {cell: statistics.median(each) if each else None for cell, each in seconds.items()}
    full = next((median for cell, median in medians.items() if cell.run.config is None), None)
    rows = []
    for cell, median in medians.items():
        held, last = found[cell][0], found[cell][-1]
        tokens = cell.batch * (cell.length if measurement.unit == "text" else 1)
        held_by = cell.batch * shape["num_layers"] * shape["num_kv_heads"]
        rows.append(
            {
                **cell.run.columns,
                "length": cell.length,
                "batch": cell.batch,
                "unit": measurement.unit,
                "repeats": len(seconds[cell]),
                "median": median,
                "min": min(seconds[cell], default=None),
                "max": max(seconds[cell], default=None),
                "tokens_per_second": tokens / median if median else None,
                "speedup_over_full": full / median if full and median else None,
                "peak_bytes": held["peak_bytes"],
                "cache_bytes": held["cache_bytes"],
                "bytes_per_head": round(held["cache_bytes"] / held_by) if held["cache_bytes"] else None,
                "skipped": last["skipped"],
            }
        )
    return rows
