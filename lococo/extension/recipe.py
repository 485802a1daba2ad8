"""How a model is extended: what is trained, on which cache, and for how long."""

from __future__ import annotations

import dataclasses

from lococo.config import LoCoCoConfig
from lococo.extension.folder import METHODS, Extension
from lococo.extension.rope_scaling import RopeScaling
from lococo.training.objectives import NextToken
from lococo.training.recipes import TrainingRecipe, check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionRecipe(TrainingRecipe):
    """What a run of ``extend_context`` does.

    Parameters
    ----------
    method : {"lococo", "h2o", "streaming", "full", "longlora"}
        The cache that the model learns to read with. "longlora" trains on shifted sparse attention and reads, as
        "full", with the full cache.
    rope_scaling : RopeScaling
        Positions of the longer texts. A cache with positions of its own ("streaming", ``positions="slot"``) leaves
        them as they are.
    config : LoCoCoConfig, optional
        The compressed cache. None for "full" and "longlora".
    rank, alpha : int
        LoRA's r and alpha.
    learning_rate : float
        Of adapters, embeddings and norms.
    heads_learning_rate : float
        Of the heads' convolutions.
    depth : int, optional
        Compressions that back-propagation goes through at most: memory does not grow with the window. None: all.
    save_every : int
        Steps between two checkpoints.

    Raises
    ------
    ValueError
        If a value is out of range, or method and config do not fit.
    """

    method: str
    rope_scaling: RopeScaling
    config: LoCoCoConfig | None
    rank: int = 8
    alpha: int = 16
    steps: int = 1000
    windows_per_step: int = 8
    learning_rate: float = 5e-5
    heads_learning_rate: float = 1e-3
    depth: int | None = 2
    save_every: int = 100

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        reads_all = self.method in ("full", "longlora")
        if reads_all != (self.config is None):
            raise ValueError(f"method={self.method!r} needs {'no config' if reads_all else 'a config'}")
        super().__post_init__()
        least = dict.fromkeys(("rank", "alpha", "steps", "save_every", "depth"), 1)
        check_ranges(self, least, ("heads_learning_rate",))

    @property
    def extension(self) -> Extension:
        """What such a run makes."""
        keeps_positions = self.config is not None and self.config.positions == "slot"
        scaling = None if keeps_positions else self.rope_scaling
        return Extension(self.method, self.rope_scaling.length, scaling, self.config)

    @property
    def objective(self) -> NextToken:
        """The next token, back-propagation cut after ``depth`` compressions."""
        if self.config is None or self.depth is None:
            return NextToken()
        return NextToken(backprop_tokens=self.depth * self.config.block_size)


def extension_config(method: str, num_slots: int, block_size: int, positions: str = "absolute") -> LoCoCoConfig | None:
    """The compressed cache of a method: ours with low-rank heads whose gates start a little open; None for others."""
    if method == "lococo":
        return LoCoCoConfig(num_slots, block_size, head_rank=16, gate_init=0.05, positions=positions)  # type: ignore
    presets = {"h2o": LoCoCoConfig.h2o, "streaming": LoCoCoConfig.streaming_llm}
    return presets[method](num_slots, block_size=block_size) if method in presets else None
