"""The slot budget of a compressed cache and how its slots are filled."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import os
import warnings
from pathlib import Path
from typing import Any, Literal

from lococo.files import write_whole
from lococo.registry import COMPRESSORS, SCORES

CONFIG_NAME = "lococo_config.json"

NORMALIZATIONS = ("sum", "softmax")
RESIDUALS = ("slot", "layer", "none")
POSITIONS = ("absolute", "slot")
SCALINGS = ("share", "count")
SLOT_BITS = (16, 8, 4)
# They say how something is computed, not what; files of earlier versions have them in their config.
PATCH_OPTIONS = {"attention", "prefill_chunk_size"}


@dataclasses.dataclass(frozen=True)
class LoCoCoConfig:
    """How many key-value slots a layer keeps, and what goes into them.

    The budget is ``num_slots = num_sinks + num_heavy + num_recent + num_fused``. The first three are selections of
    tokens; the slots that they leave hold blends (``num_fused`` is derived). A selection that is not given takes its
    share of the default preset: 4 sinks, 5/16 recents, 3/8 fused slots, and heavy hitters in the rest.

    Parameters
    ----------
    num_slots : int
        M, slots kept per layer and KV head, whatever the length of the text.
    block_size : int
        B, tokens read between two compressions. The cache has room for M + B entries.
    num_sinks, num_heavy, num_recent : int, optional
        Slots that hold unchanged copies of the first tokens, of the tokens with the highest score, and of the last
        tokens.
    kernel_size : int
        Width of the fusion convolution over the entries (odd).
    head_rank : int, optional
        Rank r of a low-rank convolution (2d -> r with the kernel, r -> num_fused pointwise). None: one full kernel.
    normalization : {"sum", "softmax"}
        How a row of ReLU outputs becomes weights: divided by its sum (Eq. 7), or softmax (the released code).
    residual : {"slot", "layer", "none"}
        What a fused slot starts from: ``W = (1 - g) onehot + g conv`` with one gate g per slot or per layer, or the
        convolution alone (the paper's text).
    gate_init : float
        Starting value of g, 0 to 1. 0 is exact token selection.
    init_std : float, optional
        Standard deviation of normal initial convolution weights. None: PyTorch's own initialisation.
    mass_bias : bool
        Let a slot blended from n tokens count in attention for n tokens: its logits get a learned scale times log n.
    positions : {"absolute", "slot"}
        Rotary positions of keys: their place in the text, or their place in the cache, with which no position goes
        past ``num_slots + block_size`` and texts longer than the model's window can be read.
    score : {"distant", "learned", "mean", "sum", "last"} or str
        How heavy hitters are ranked: one of these, or a name given to ``lococo.register_score``. "distant": mean
        square of the attention from queries at least ``num_recent`` entries later, when the token is no longer a
        recent; older queries fade. "learned": the same, but with one delay for all heads whatever their slots, times
        a factor that a calibrated network predicts from the token itself. "mean": attention per query that could see
        the token. "sum": total attention (H2O). "last": attention from the current block only.
    decode_block_size : int, optional
        Tokens between two compressions while tokens are generated one by one; the paper has 1. None: ``block_size``.
    slots_per_head : tuple of tuples of int, optional
        Slots of every KV head, layer by layer, at most ``num_slots`` on average: a head that looks far back gets more
        of them than one that looks at its neighbours. Found by calibration. None: ``num_slots`` for every head. None
        in place of a layer: that layer keeps its sliding window.
    compressor : {"conv", "centroids"} or str
        What blends entries into fused slots: one of these, or a name given to ``lococo.register_compressor``. "conv":
        the convolution. "centroids": a fused slot is the mean of all evicted tokens whose keys are closest to it.
    scaling : {"share", "count"}
        How many sinks, recents and fused slots a head with another number of slots has (``slots_per_head``): the same
        share of its slots, or the same number, up to a quarter of its slots for each kind.
    slot_bits : {16, 8, 4} or tuple of two of them
        Bits in which the numbers of keys and values are held; two values are for keys and for values. 16: the model's
        own type. 8 and 4: codes between the smallest and the largest of 64 (8 bits) or 32 (4 bits) numbers of a key
        or value. Each is coded once, when it is read or blended.
    compress_windows : bool
        Whether layers with a sliding window are compressed, too. True: such a layer keeps ``num_slots`` entries of
        what its window sees, which is all of it if they are enough. False: it always keeps its whole window, and
        ``num_slots`` and ``slots_per_head`` apply only to the other layers; not with ``positions="slot"``.
    """

    num_slots: int = 512
    block_size: int = 512
    num_sinks: int | None = None
    num_heavy: int | None = None
    num_recent: int | None = None
    kernel_size: int = 21
    head_rank: int | None = None
    normalization: Literal["sum", "softmax"] = "sum"
    residual: Literal["slot", "layer", "none"] = "slot"
    gate_init: float = 0.0
    init_std: float | None = None
    mass_bias: bool = True
    positions: Literal["absolute", "slot"] = "absolute"
    score: str = "distant"
    decode_block_size: int | None = None
    slots_per_head: tuple[tuple[int, ...] | None, ...] | None = None
    compressor: str = "conv"
    scaling: Literal["share", "count"] = "share"
    slot_bits: int | tuple[int, int] = 16
    compress_windows: bool = True

    def __new__(cls, *args: Any, **kwargs: Any) -> LoCoCoConfig:
        """Name the place of what is no field any more."""
        for name in sorted(PATCH_OPTIONS & set(kwargs)):
            raise TypeError(
                f"LoCoCoConfig says what is computed and has no {name}: it is an option of lococo.patch_model("
                f"model, config, {name}={kwargs[name]!r})"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("num_slots", "block_size", "kernel_size"):
            check_count(name, getattr(self, name), least=1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd so that the convolution is centred, got {self.kernel_size}")
        for name in ("head_rank", "decode_block_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=1)
        if self.decode_block_size is not None and self.decode_block_size > self.block_size:
            raise ValueError(
                f"decode_block_size must not exceed block_size={self.block_size}, got {self.decode_block_size}"
            )
        self._fill_budget()
        if not isinstance(self.mass_bias, bool):
            raise ValueError(f"mass_bias must be True or False, got {self.mass_bias!r}")
        for name, allowed in (
            ("normalization", NORMALIZATIONS),
            ("residual", RESIDUALS),
            ("positions", POSITIONS),
            ("scaling", SCALINGS),
            ("score", tuple(SCORES)),
            ("compressor", tuple(COMPRESSORS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not _is_number(self.gate_init) or not 0.0 <= self.gate_init <= 1.0:
            raise ValueError(f"gate_init must lie between 0 and 1, got {self.gate_init!r}")
        if self.init_std is not None and not (_is_number(self.init_std) and 0 < self.init_std < math.inf):
            raise ValueError(f"init_std must be positive and finite, got {self.init_std!r}")
        if self.slots_per_head is not None:
            self._check_slots_per_head()
        self._check_slot_bits()
        if not isinstance(self.compress_windows, bool):
            raise ValueError(f"compress_windows must be True or False, got {self.compress_windows!r}")
        if not self.compress_windows and self.positions == "slot":
            raise ValueError(
                "compress_windows=False needs positions='absolute': places in the cache differ from layer to layer"
            )

    def _check_slot_bits(self) -> None:
        bits = tuple(self.slot_bits) if isinstance(self.slot_bits, list) else self.slot_bits  # JSON has lists only
        object.__setattr__(self, "slot_bits", bits)
        each = bits if isinstance(bits, tuple) else (bits, bits)
        if len(each) != 2 or any(type(count) is not int or count not in SLOT_BITS for count in each):
            raise ValueError(f"slot_bits must be 16, 8 or 4, or two of them, of keys and of values; got {bits!r}")

    def _check_slots_per_head(self) -> None:
        if self.positions == "slot":
            raise ValueError("slots_per_head needs positions='absolute': places in the cache differ from head to head")
        try:
            layers = tuple(None if layer is None else tuple(layer) for layer in self.slots_per_head or ())
        except TypeError:
            raise ValueError(
                f"slots_per_head must give the slots of every KV head, layer by layer, got {self.slots_per_head!r}"
            ) from None
        object.__setattr__(self, "slots_per_head", layers)  # JSON has lists only
        counts = [slots for layer in layers for slots in layer or ()]
        if not counts or () in layers:
            raise ValueError(
                "slots_per_head must give at least one KV head in every layer, got an empty layer or none"
            )
        for slots in counts:
            check_count("every number in slots_per_head", slots, least=1)
        if sum(counts) > self.num_slots * len(counts):
            raise ValueError(
                f"slots_per_head must not exceed num_slots={self.num_slots} on average, got "
                f"{sum(counts) / len(counts):.2f} over {len(counts)} KV heads"
            )

    def _fill_budget(self) -> None:
        slots = self.num_slots
        for name in ("num_sinks", "num_heavy", "num_recent"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        # What is derived from the others must not hide which of them is too large.
        _check_budget(slots, num_sinks=self.num_sinks, num_heavy=self.num_heavy, num_recent=self.num_recent)
        sinks = min(4, slots) if self.num_sinks is None else self.num_sinks
        recent = min(slots * 5 // 16, slots - sinks) if self.num_recent is None else self.num_recent
        heavy = self.num_heavy
        if heavy is None:
            heavy = max(0, slots - sinks - recent - min(slots * 3 // 8, slots - sinks - recent))
        budget = dict(num_sinks=sinks, num_heavy=heavy, num_recent=recent)
        _check_budget(slots, **budget)
        for name, value in budget.items():
            object.__setattr__(self, name, value)

    @property
    def num_fused(self) -> int:
        """Slots that hold blends: what sinks, heavy hitters and recents leave of ``num_slots``."""
        return self.num_slots - self.num_sinks - self.num_heavy - self.num_recent  # type: ignore[operator]

    @property
    def capacity(self) -> int:
        """Entries a layer can hold between two compressions, ``num_slots + block_size``."""
        return self.num_slots + self.block_size

    @property
    def has_features(self) -> bool:
        """Whether the score looks at learned features of tokens."""
        is_ranked = self.num_heavy > 0 or (self.num_fused > 0 and self.fuses_by_rank)  # type: ignore[operator]
        return is_ranked and "features" in SCORES[self.score].needs

    @property
    def bits(self) -> tuple[int, int]:
        """Of the numbers of keys and of values; 16: they are in the model's type."""
        return self.slot_bits if isinstance(self.slot_bits, tuple) else (self.slot_bits, self.slot_bits)

    @property
    def fuses_by_rank(self) -> bool:
        """Whether fused slots begin with entries that the score chooses."""
        return self.residual != "none" and not COMPRESSORS[self.compressor].is_running

    @property
    def score_delay(self) -> int:
        """Entries that must lie between a token and a query whose attention counts for its score."""
        return SCORES[self.score]().delay(self)

    @property
    def score_fade(self) -> float:
        """Factor by which summed attention fades per token read; 1: not at all, 0: only the current block counts."""
        return SCORES[self.score]().fade(self)

    @property
    def score_power(self) -> int:
        """Power of the attention that is summed for scores."""
        return SCORES[self.score]().power

    def with_slots(self, num_slots: int) -> LoCoCoConfig:
        """The same method for heads with another number of slots, shared out as ``scaling`` says."""
        if num_slots == self.num_slots and self.slots_per_head is None:
            return self
        return _with_slots(self, num_slots)

    def layer_configs(self, layer_idx: int) -> tuple[LoCoCoConfig, ...]:
        """One config per KV head of a layer, or a single one for all of its heads."""
        if self.slots_per_head is None:
            return (self,)
        slots_of_heads = self.slots_per_head[layer_idx]
        if slots_of_heads is None:  # nothing that is saved depends on the size of the window
            return (self.with_slots(self.num_slots),)
        return tuple(self.with_slots(slots) for slots in slots_of_heads)

    def keeps(self, window: int | None) -> bool:
        """Whether a layer whose queries see so many tokens (None: all) holds all that they see, whatever M."""
        return window is not None and not self.compress_windows

    def for_window(self, window: int | None) -> LoCoCoConfig:
        """What is in force in a layer whose queries see so many tokens (None: all)."""
        if window is None:
            return self
        is_enough = self.num_slots >= window - 1 and self.slots_per_head is None and self.positions == "absolute"
        return _for_window(self, window) if is_enough or self.keeps(window) else self

    @property
    def has_mass(self) -> bool:
        """Whether slots carry a log-mass that biases their attention logits."""
        return self.mass_bias and self.num_fused > 0

    @classmethod
    def paper(cls, num_slots: int = 512, **overrides: Any) -> LoCoCoConfig:
        """The paper's text (Eq. 6-7): all slots fused, weights divided by their sum, no residual."""
        preset = dict(num_sinks=0, num_heavy=0, num_recent=0, residual="none", mass_bias=False)
        return cls(num_slots, **{**preset, **overrides})

    @classmethod
    def reference(cls, num_slots: int = 512, **overrides: Any) -> LoCoCoConfig:
        """The authors' released code: half heavy hitters of the last block, half fused on a residual, softmax."""
        check_count("num_slots", num_slots, least=1)
        preset = dict(
            num_sinks=0,
            num_heavy=num_slots // 2,
            num_recent=0,
            normalization="softmax",
            residual="layer",
            gate_init=0.5,
            init_std=1.0,
            mass_bias=False,
            score="last",
        )
        return cls(num_slots, **{**preset, **overrides})

    @classmethod
    def h2o(cls, num_slots: int = 512, **overrides: Any) -> LoCoCoConfig:
        """H2O (Zhang et al. 2023): half heavy hitters by accumulated attention, half recents."""
        check_count("num_slots", num_slots, least=1)
        preset = dict(num_sinks=0, num_heavy=num_slots // 2, num_recent=num_slots - num_slots // 2, score="sum")
        return cls(num_slots, **{**preset, **overrides})

    @classmethod
    def streaming_llm(cls, num_slots: int = 512, **overrides: Any) -> LoCoCoConfig:
        """StreamingLLM (Xiao et al. 2023): 4 sinks, recents in the rest, positions inside the cache."""
        check_count("num_slots", num_slots, least=1)
        sinks = overrides.pop("num_sinks", min(4, num_slots))
        check_count("num_sinks", sinks, least=0)
        _check_budget(num_slots, num_sinks=sinks)
        preset = dict(num_sinks=sinks, num_heavy=0, num_recent=num_slots - sinks, positions="slot")
        return cls(num_slots, **{**preset, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoCoCoConfig:
        """A config from ``to_dict`` output.

        Fields this version does not know are named in a warning and left out; options of ``patch_model``, which
        were fields once, are left out.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - PATCH_OPTIONS)
        if unknown:
            warnings.warn(f"unknown LoCoCoConfig fields are ignored: {', '.join(unknown)}", stacklevel=2)
        return cls(**{name: value for name, value in values.items() if name in known})

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``lococo_config.json`` into a folder (made if missing)."""
        write_whole(Path(folder) / CONFIG_NAME, json.dumps({"config": self.to_dict()}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> LoCoCoConfig:
        """Read the config of a heads folder.

        Raises
        ------
        FileNotFoundError
            If the folder has no ``lococo_config.json``.
        ValueError
            If that file is no JSON object with a ``config``, or the config in it is invalid.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: not a folder written by save_heads or save_pretrained")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            values = dict(content["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a LoCoCo config: {error!r}") from error
        return cls.from_dict(values)


def _check_budget(num_slots: int, **counts: int | None) -> None:
    given = {name: count for name, count in counts.items() if count is not None}
    if sum(given.values()) > num_slots:
        parts = " + ".join(f"{name}={count}" for name, count in given.items())
        total = f" = {sum(given.values())}" if len(given) > 1 else ""
        raise ValueError(f"the budget does not add up: {parts}{total} must not exceed num_slots={num_slots}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@functools.lru_cache(maxsize=4096)
def _with_slots(config: LoCoCoConfig, num_slots: int) -> LoCoCoConfig:
    assert config.num_sinks is not None and config.num_recent is not None  # filled by __post_init__
    if config.scaling == "share":
        sinks = min(config.num_sinks, num_slots)
        recent, fused = (count * num_slots // config.num_slots for count in (config.num_recent, config.num_fused))
    else:
        most = max(num_slots // 4, 1)
        sinks, recent, fused = (min(each, most) for each in (config.num_sinks, config.num_recent, config.num_fused))
    recent = min(recent, num_slots - sinks)
    heavy = num_slots - sinks - recent - min(fused, num_slots - sinks - recent)
    if config.num_heavy == 0:  # what rounding left goes to another kind
        recent, heavy = recent + (heavy if config.num_recent else 0), 0
    return dataclasses.replace(
        config, num_slots=num_slots, num_sinks=sinks, num_recent=recent, num_heavy=heavy, slots_per_head=None
    )


@functools.lru_cache(maxsize=256)
def _for_window(config: LoCoCoConfig, window: int) -> LoCoCoConfig:
    slots = max(window - 1, 1)  # a query sees itself, too
    return dataclasses.replace(
        config, num_slots=slots, num_sinks=0, num_heavy=0, num_recent=slots, slots_per_head=None
    )


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer of at least ``least``.

    Raises
    ------
    ValueError
        Names the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
