"""Options that several commands have, each with its help said once.

No file of this package imports torch or Transformers before a command runs: help comes at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MODEL, METHOD, TEXT, TRAINING, RUN, MEASURED = "Model", "Method", "Text", "Training", "Run", "What is measured"

# Names of lococo.methods, lococo.bench.shapes and lococo.extension, which tests compare; those modules need torch.
Preset = Literal[
    "streaming",
    "streaming-absolute",
    "h2o",
    "h2o-slot",
    "lococo-uncalibrated",
    "lococo-uncalibrated-slot",
    "lococo-paper",
    "lococo-reference",
]
Method = Literal["full", Preset]
NUM_SLOTS = 512  # of LoCoCoConfig


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """An option in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


GgufFile = Annotated[str | None, option(MODEL, "GGUF file in that folder.", metavar="NAME")]
Device = Annotated[str, option(MODEL, "cpu, cuda, cuda:1, ...; auto: cuda where there is one.")]
Dtype = Annotated[str, option(MODEL, "float32, bfloat16, ...; auto: the checkpoint's, float32 on a CPU.")]


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

        return loading.load_model(
            self.model, gguf_file=self.gguf_file, device=device or self.device, dtype=self.dtype
        )

    def load_tokenizer(self) -> Any:
        """The tokenizer, without the model."""
        from lococo import loading

        return loading.load_tokenizer(self.model, self.gguf_file)


NumSlots = Annotated[int, option(METHOD, "KV slots per layer and KV head (M).")]
SlotCounts = Annotated[list[int], option(METHOD, "KV slots per layer and KV head (M), one number or several.")]
BlockSize = Annotated[int, option(METHOD, "Tokens read between two compressions (B).")]
OwnBlockSize = Annotated[
    int | None, option(METHOD, "Tokens read between two compressions (B). [dim]\\[default: M, at most 512][/dim]")
]
Heads = Annotated[
    str | None, option(METHOD, "Folder or Hub id of trained heads; sets method, slots and block.", metavar="HEADS")
]
ComparedHeads = Annotated[
    list[str], option(METHOD, "Folders or Hub ids of trained heads to compare.", metavar="HEADS", show_default=False)
]
Methods = Annotated[str, option(METHOD, "What is compared, joined by commas; eval ppl --help lists the names.")]

Data = Annotated[
    list[str] | None,
    option(
        TEXT,
        "Texts to measure on: files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders, or Hub ids such as "
        "org/name:configuration. [dim]\\[default: Proof-Pile-2 of the Hub][/dim]",
        metavar="DATA",
    ),
]
TextColumn = Annotated[str, option(TEXT, "Name of the text in a document of --data.")]
First = Annotated[int, option(TEXT, "First token of a window that counts.")]
Documents = Annotated[int, option(TEXT, "Windows of each file; with --sliding documents.")]

TimeLimit = Annotated[float | None, option(RUN, "Seconds after which it ends; the same command goes on.")]
WorkDir = Annotated[Path | None, option(RUN, "State of the run. [dim]\\[default: OUTPUT.work][/dim]")]
Output = Annotated[Path, option(RUN, "Name of the files to write, without a suffix.")]
Seed = Annotated[int, option(RUN, "Of what is drawn by chance.")]


def work_folder(work_dir: Path | None, output: Path) -> Path:
    """Where a run keeps its state: beside the output unless told."""
    return work_dir or output.absolute().with_name(f"{output.absolute().name}.work")  # "." has no name


def names_of(joined: str) -> list[str]:
    """Names that are joined by commas."""
    return [name for name in joined.split(",") if name]


