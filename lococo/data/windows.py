"""Text in, windows of tokens out: the data that compression heads are calibrated on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lococo.data.documents import BATCH, documents, local_files
from lococo.files import replace_folder

DEFAULT_DATASET = "togethercomputer/RedPajama-Data-1T-Sample"
TRAIN_FILE, HELDOUT_FILE = "train.safetensors", "heldout.safetensors"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text to read and how to cut it.

    Parameters
    ----------
    sources, text_column, split
        As in ``documents``.
    length : int
        Tokens per window.
    num_windows, num_heldout : int
        Windows wanted for training and for measurement; every source gives as many.
    boundaries : {"reset", "none"}
        "reset": a window is consecutive tokens of one document; what is left of a document is dropped. "none":
        documents are joined, with the tokenizer's EOS token between two, and cut regardless of where they end.
    seed : int
        Decides which documents are held out and the order of the training windows.
    heldout_share : float
        Share of the documents that is held out.
    max_windows_per_document : int
        With "reset", at most so many windows come from one document.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    sources: tuple[str, ...]
    length: int
    num_windows: int
    num_heldout: int
    boundaries: Literal["reset", "none"] = "reset"
    text_column: str = "text"
    split: str = "train"
    seed: int = 0
    heldout_share: float = 0.05
    max_windows_per_document: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not self.sources:
            raise ValueError(f"sources must be a tuple of dataset ids, files or folders, got {self.sources!r}")
        for name, least in {"length": 2, "num_windows": 1, "num_heldout": 0, "max_windows_per_document": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.boundaries not in ("reset", "none"):
            raise ValueError(f"boundaries must be 'reset' or 'none', got {self.boundaries!r}")
        if not 0 <= self.heldout_share < 1 or (self.num_heldout and not self.heldout_share):
            raise ValueError(
                "heldout_share must lie between 0 and 1, and be 0 only if num_heldout is 0; "
                f"got {self.heldout_share!r} with num_heldout={self.num_heldout}"
            )


class Windows(torch.utils.data.Dataset):
    """Windows of one length, as the Trainer and its default collator take them.

    Parameters
    ----------
    ids : torch.Tensor
        (windows, length) int32.
    domains : sequence of str
        Domain of each window; of one that spans several documents, the domain of the document it starts in.
    """

    def __init__(self, ids: torch.Tensor, domains: Sequence[str]) -> None:
        self.ids = ids
        self.domains = list(domains)

    def __len__(self) -> int:
        return len(self.ids)

    def evenly(self, count: int) -> torch.Tensor:
        """(at most count, length) ids of windows that come from every domain in turn."""
        by_domain: dict[str, list[int]] = {}
        for index, domain in enumerate(self.domains):
            by_domain.setdefault(domain, []).append(index)
        turns = itertools.zip_longest(*by_domain.values())
        order = [index for turn in turns for index in turn if index is not None]
        return self.ids[order[:count]]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels``, both the (length,) int64 tokens: a causal model shifts labels itself."""
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | str) -> tuple[Windows, Windows]:
    """Training and held-out windows, made once and then read from ``cache_dir``.

    Each document is tokenised with the special tokens that the tokenizer adds to a text by itself (such as BOS). The
    windows depend on the config, the tokenizer and the data alone; changed local files are noticed by size and time.

    Parameters
    ----------
    cache_dir : Path or str
        Parent of one folder per fingerprint. Of several processes one must come first.

    Returns
    -------
    tuple of Windows
        Training windows, (at most ``num_windows``, ``length``), in an order shuffled by the seed; held-out windows,
        (at most ``num_heldout``, ``length``), of other documents, in the order of the data. Fewer than wanted come
        with a warning.

    Raises
    ------
    FileNotFoundError, ImportError
        As in ``documents``.
    ValueError
        As in ``documents``, or if the tokenizer has no EOS token for ``boundaries="none"``, or the data holds not one
        window of a wanted kind.
    """
    if config.boundaries == "none" and tokenizer.eos_token_id is None:
        raise ValueError(
            'boundaries="none" joins documents with an EOS token, and the tokenizer has none; '
            'set tokenizer.eos_token or choose boundaries="reset"'
        )
    folder = Path(cache_dir) / fingerprint(config, tokenizer)
    if not all((folder / name).is_file() for name in (TRAIN_FILE, HELDOUT_FILE)):
        train, heldout = _find_windows(config, tokenizer)
        replace_folder(folder, {TRAIN_FILE: _to_bytes(train), HELDOUT_FILE: _to_bytes(heldout)})
    train, heldout = _load(folder / TRAIN_FILE), _load(folder / HELDOUT_FILE)
    if len(train) < config.num_windows or len(heldout) < config.num_heldout:
        warnings.warn(
            f"the data holds {len(train)} training windows of {config.num_windows} wanted and {len(heldout)} held-out "
            f"windows of {config.num_heldout} wanted, of {config.length} tokens each",
            stacklevel=2,
        )
    return train, heldout


def fingerprint(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the cache folder: covers the config, the tokenizer, and name, size and time of local files."""
    files = [path for source in config.sources for path in local_files(source) or []]
    content = {
        "config": dataclasses.asdict(config),
        "tokenizer": [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())],
        "special_tokens": [tokenizer("").input_ids, tokenizer.eos_token_id],
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_heldout(text: str, share: float, seed: int) -> bool:
    """Whether a document is held out: decided by its text and the seed alone, for ``share`` of all texts."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Side:
    """Windows of the training or of the held-out documents."""

    def __init__(self, config: DataConfig, wanted: int, eos: int | None) -> None:
        self.config, self.wanted, self.eos = config, wanted, eos
        self.rows: list[torch.Tensor] = []  # (length,) int32 each
        self.domains: list[str] = []
        self.rest: list = []
        self.rest_domain = ""
        self.separator: list = []

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.wanted

    def add(self, ids: list[int], domain: str) -> None:
        length, reset = self.config.length, self.config.boundaries == "reset"
        tokens = self.rest + self.separator + ids
        first = self.rest_domain if self.rest else domain
        count = len(tokens) // length
        if reset:
            count = min(count, self.config.max_windows_per_document)
        for index in range(count):
            self.rows.append(torch.tensor(tokens[index * length : (index + 1) * length], dtype=torch.int32))
            self.domains.append(domain if index else first)
        if not reset:
            self.rest, self.rest_domain = tokens[count * length :], domain if count else first
            self.separator = [] if ids[-1:] == [self.eos] else [self.eos]


def _find_windows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Windows, Windows]:
    count = len(config.sources)
    wanted = [math.ceil(number / count) for number in (config.num_windows, config.num_heldout)]
    streams = [documents([source], config.text_column, config.split) for source in config.sources]
    with tqdm(total=sum(wanted) * count, desc="windows", disable=None) as bar:
        parts = [_read_source(stream, config, tokenizer, wanted, bar) for stream in streams]
    train, heldout = (_merge([sides[kind] for sides, _, _ in parts]) for kind in (0, 1))
    for kind, found, needed in (("training", train, config.num_windows), ("held-out", heldout, config.num_heldout)):
        if needed and not found:
            raise ValueError(
                f"not one {kind} window of {config.length} tokens: {sum(read for _, read, _ in parts)} documents were "
                f"read, the longest of {max(longest for _, _, longest in parts)} tokens; choose a smaller length, "
                f'more data, another heldout_share (now {config.heldout_share}) or boundaries="none" (now '
                f'"{config.boundaries}")'
            )
    train, heldout = train[: config.num_windows], heldout[: config.num_heldout]
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return _stacked([train[index] for index in shuffled], config.length), _stacked(heldout, config.length)


def _read_source(
    stream: Iterator[dict[str, str]],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[int],
    bar: tqdm,
) -> tuple[list[_Side], int, int]:
    """Training and held-out side of one source, documents read, tokens of the longest."""
    sides = [_Side(config, number, tokenizer.eos_token_id) for number in wanted]
    read = longest = found = 0
    while not all(side.full for side in sides) and (batch := list(itertools.islice(stream, BATCH))):
        read += len(batch)
        sided = [(sides[is_heldout(each["text"], config.heldout_share, config.seed)], each) for each in batch]
        needed = [(side, document) for side, document in sided if not side.full]
        texts = [document["text"] for _, document in needed]
        encoded = tokenizer(texts, verbose=False).input_ids if texts else []
        for (side, document), ids in zip(needed, encoded, strict=True):
            longest = max(longest, len(ids))
            side.add(ids, document["domain"])
        before, found = found, sum(min(len(side.rows), side.wanted) for side in sides)
        bar.update(found - before)
    return sides, read, longest


def _merge(sides: Sequence[_Side]) -> list[tuple[torch.Tensor, str]]:
    """(ids, domain) of the sources' windows, one of each source in turn."""
    by_source = [list(zip(side.rows, side.domains, strict=True))[: side.wanted] for side in sides]
    return [window for turn in itertools.zip_longest(*by_source) for window in turn if window is not None]


def _stacked(windows: Sequence[tuple[torch.Tensor, str]], length: int) -> Windows:
    ids = torch.stack([ids for ids, _ in windows]) if windows else torch.empty(0, length, dtype=torch.int32)
    return Windows(ids, [domain for _, domain in windows])


def _to_bytes(windows: Windows) -> bytes:
    return safetensors.torch.save({"ids": windows.ids}, metadata={"domains": json.dumps(windows.domains)})


def _load(path: Path) -> Windows:
    with safetensors.safe_open(path, "pt") as file:
        return Windows(file.get_tensor("ids"), json.loads(file.metadata()["domains"]))
