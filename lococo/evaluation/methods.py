"""The methods compared, by the names used in result files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

from lococo.config import LoCoCoConfig
from lococo.patch import patched

PRESETS: dict[str, Callable[..., LoCoCoConfig]] = {
    "streaming": LoCoCoConfig.streaming_llm,
    "streaming-absolute": partial(LoCoCoConfig.streaming_llm, positions="absolute"),
    "h2o": LoCoCoConfig.h2o,
    "h2o-slot": partial(LoCoCoConfig.h2o, positions="slot"),
    "lococo-uncalibrated": LoCoCoConfig,
    "lococo-uncalibrated-slot": partial(LoCoCoConfig, positions="slot"),
    "lococo-paper": LoCoCoConfig.paper,
    "lococo-reference": LoCoCoConfig.reference,
}
METHODS = ("full", *PRESETS)


def method_config(name: str, num_slots: int, block_size: int) -> LoCoCoConfig | None:
    """Config of a method; None for ``full``.

    Raises
    ------
    ValueError
        If the method is not known.
    """
    if name == "full":
        return None
    if name not in PRESETS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return PRESETS[name](num_slots, block_size=block_size)


@contextlib.contextmanager
def as_method(model: nn.Module, config: LoCoCoConfig | None) -> Iterator[nn.Module]:
    """The model with a method in force: patched inside the block, or as it is for None."""
    if config is None:
        yield model
        return
    with patched(model, config):
        yield model
