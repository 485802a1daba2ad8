"""Options that several commands have, each with its help said once.

No file of this package imports torch or Transformers before a command runs: help comes at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lococo.files import check_output, check_output_file

if TYPE_CHECKING:
    from lococo.config import LoCoCoConfig

MODEL, METHOD, TEXT, TRAINING, RUN, MEASURED = "Model", "Method", "Text", "Training", "Run", "What is measured"

DEFAULT_METHOD = "lococo-uncalibrated"
NUM_SLOTS = 512  # of LoCoCoConfig, which needs torch
METHODS = "full, streaming, h2o, h2o-slot, lococo-uncalibrated, lococo-paper, lococo-reference, ..."


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def writable(output: Path | None) -> Path | None:
    """A file to write, refused where it could not be: better now than after what takes long."""
    return None if output is None else check_output_file(output)


def drawn(output: Path | None) -> Path | None:
    """The name of a measurement's files, refused where they could not be written or no picture drawn."""
    if not importlib.util.find_spec("matplotlib"):
        raise ImportError("what is measured is drawn with the package matplotlib: pip install lococo[eval]")
    return None if output is None else check_output(output)


GgufFile = Annotated[str | None, option(MODEL, "GGUF file in that folder.", metavar="NAME")]
Device = Annotated[str, option(MODEL, "cpu, cuda, cuda:1, ...; auto: cuda if there is one.")]
Dtype = Annotated[str, option(MODEL, "float32, bfloat16, ...; auto: the checkpoint's, but float32 on a CPU.")]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """A model, and where it runs."""

    model: Annotated[str, option(MODEL, "Folder or Hub id of a causal language model.")]
    gguf_file: GgufFile = None
    device: Device = "auto"
    dtype: Dtype = "auto"

    def load(self, device: str | None = None) -> tuple[Any, Any]:
        """Model and tokenizer, on another device if so told."""
        from lococo import loading

        return loading.load_model(self.model, gguf_file=self.gguf_file, device=device or self.device, dtype=self.dtype)

    def load_tokenizer(self) -> Any:
        """The tokenizer, without the model; what the model will be told is checked, too."""
        from lococo import loading

        loading.chosen_device(self.device)
        loading.chosen_dtype(self.dtype)
        return loading.load_tokenizer(self.model, self.gguf_file)


NumSlots = Annotated[int, option(METHOD, "KV slots per layer and KV head (M).")]
SlotCounts = Annotated[
    list[int],
    option(
        METHOD,
        "KV slots per layer and KV head (M), one number or several.",
        show_default=f"the heads', or {NUM_SLOTS}",
    ),
]
BlockSize = Annotated[int, option(METHOD, "Tokens read between two compressions (B).")]
OwnBlockSize = Annotated[
    int | None, option(METHOD, "Tokens read between two compressions (B).", show_default="M, at most 512")
]
ComparedBlockSize = Annotated[
    int | None,
    option(METHOD, "Tokens read between two compressions (B).", show_default="the heads', or M, at most 512"),
]
SlotBits = Annotated[
    list[str],
    option(
        METHOD,
        "Bits of keys and values: 16, 8, 4, or different ones, such as 8-4; one or several.",
        metavar="BITS",
        show_default="16, or the heads'",
    ),
]
ComparedHeads = Annotated[
    list[str], option(METHOD, "Folders or Hub ids of trained heads to compare.", metavar="HEADS", show_default=False)
]
MethodNames = Annotated[str, option(METHOD, f"Methods to compare, separated by commas: {METHODS}", metavar="METHODS")]

Data = Annotated[
    list[str] | None,
    option(
        TEXT,
        "Texts to measure on: files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders, or Hub ids such as "
        "org/name:configuration.",
        metavar="DATA",
        show_default="Proof-Pile-2 of the Hub",
    ),
]
TextColumn = Annotated[str, option(TEXT, "Field of a document in --data that holds its text.")]
First = Annotated[int, option(TEXT, "First token of a window that counts for the loss.")]
Documents = Annotated[int, option(TEXT, "Windows per file; with --sliding, documents per file.")]

TimeLimit = Annotated[float | None, option(RUN, "Seconds after which the run ends; the same command continues it.")]
WorkDir = Annotated[Path | None, option(RUN, "Folder for the state of the run.", show_default="OUTPUT.work")]
Output = Annotated[Path, option(RUN, "Name of the files to write, without a suffix.", callback=drawn)]
Seed = Annotated[int, option(TEXT, "Random seed.")]
Chat = Annotated[bool, option(TEXT, "Put prompts into the model's chat template.", "--chat")]


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """How a model reads: by a method, or with trained heads."""

    method: Annotated[
        str | None, option(METHOD, f"One of {METHODS}", metavar="METHOD", show_default=DEFAULT_METHOD)
    ] = None
    heads: Annotated[
        str | None, option(METHOD, "Folder or Hub id of trained heads; sets method, slots and block size.")
    ] = None
    num_slots: Annotated[
        int | None, option(METHOD, "KV slots per layer and KV head (M).", show_default=str(NUM_SLOTS))
    ] = None
    block_size: OwnBlockSize = None
    slot_bits: Annotated[
        str | None,
        option(
            METHOD,
            "Bits of keys and values: 16, 8, 4, or different ones, such as 8-4.",
            show_default="16, or the heads'",
        ),
    ] = None

    @property
    def name(self) -> str:
        """What the method is called."""
        return Path(self.heads).name if self.heads else self.method or DEFAULT_METHOD

    def config(self) -> LoCoCoConfig | None:
        """The config that a model is patched with; None for the full cache.

        Raises
        ------
        ValueError
            If an option is given that heads, or the full cache, leave no room for.
        """
        from lococo.methods import chosen_config

        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return chosen_config(**chosen, spelled=lambda name: f"--{name.replace('_', '-')}")


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """Text to train on."""

    dataset: Annotated[
        list[str] | None,
        option(
            TEXT,
            "Texts to train on: files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders, or Hub ids such as "
            "org/name or org/name:configuration.",
            metavar="DATA",
            show_default="togethercomputer/RedPajama-Data-1T-Sample",
        ),
    ] = None
    text_column: Annotated[str, option(TEXT, "Field of a document that holds its text.")] = "text"
    windows: Annotated[
        int | None, option(TEXT, "Windows to train on.", show_default="as many as the training reads")
    ] = None
    boundaries: Annotated[
        str, option(TEXT, "reset: a window is part of one document; none: documents are joined and cut anywhere.")
    ] = "reset"
    seed: Annotated[int, option(TEXT, "Random seed.")] = 0

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``lococo.calibrate`` and ``lococo.extend_context``."""
        from lococo.data.windows import DEFAULT_DATASET

        return {
            "dataset": self.dataset or [DEFAULT_DATASET],
            "text_column": self.text_column,
            "num_windows": self.windows,
            "boundaries": self.boundaries,
            "seed": self.seed,
        }


@dataclasses.dataclass(frozen=True)
class TrainingRunOptions:
    """Where a training writes and keeps its state, and how it goes on."""

    output: Annotated[Path, option(RUN, "Folder to write.")]
    work_dir: WorkDir = None
    cache_dir: Annotated[Path, option(RUN, "Folder for token windows and figures that other runs can reuse.")] = Path(
        "~/.cache/lococo"
    )
    resume: Annotated[bool, option(RUN, "Continue the run in the work folder.", "--resume")] = False
    deepspeed: Annotated[
        str | None, option(RUN, "zero2 for a built-in ZeRO-2 config, or a DeepSpeed config file.", metavar="CONFIG")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``lococo.calibrate`` and ``lococo.extend_context``.

        Raises
        ------
        FileNotFoundError
            If there is no such DeepSpeed config.
        ImportError
            If DeepSpeed is not installed.
        """
        from lococo.training.window_trainer import deepspeed_arguments

        return {
            "output": self.output,
            "work_dir": self.work_dir,
            "cache_dir": self.cache_dir,
            "resume": self.resume,
            "training_arguments": deepspeed_arguments(self.deepspeed) if self.deepspeed else None,
        }

    def process(self, source: ModelOptions) -> Any:
        """One process of a distributed run, which is here; from now on "cuda" is its own GPU."""
        from lococo.training.runs import this_process

        return this_process(on_cpu=source.device == "cpu")


def names_of(joined: str) -> list[str]:
    """Names that are joined by commas."""
    return [name.strip() for name in joined.split(",") if name.strip()]
