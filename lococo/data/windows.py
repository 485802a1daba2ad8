"""Text in, windows of tokens out: the data that compression heads are calibrated on."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lococo.data.documents import BATCH, documents, local_files, suffix_of
from lococo.files import replace_folder

DEFAULT_DATASET = "togethercomputer/RedPajama-Data-1T-Sample"
DEFAULT_CACHE = Path("~/.cache/lococo")
HELDOUT_SHARE = 0.05  # of the documents, where nothing else is said
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
    heldout_share : float, optional
        Share of the documents that is held out; of few documents at least one that gives a window, as one stays for
        training. None: 0.05, or 0 if ``num_heldout`` is 0.
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
    heldout_share: float | None = None
    max_windows_per_document: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not self.sources:
            raise ValueError(f"sources must be a tuple of dataset ids, files or folders, got {self.sources!r}")
        for name, least in {"length": 2, "num_windows": 1, "num_heldout": 0, "max_windows_per_document": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        for name in ("text_column", "split"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name, got {getattr(self, name)!r}")
        if self.boundaries not in ("reset", "none"):
            raise ValueError(f"boundaries must be 'reset' or 'none', got {self.boundaries!r}")
        if self.heldout_share is None:
            return
        if (
            not isinstance(self.heldout_share, int | float)
            or not 0 <= self.heldout_share < 1
            or (self.num_heldout and not self.heldout_share)
        ):
            raise ValueError(
                "heldout_share must lie between 0 and 1, and be 0 only if num_heldout is 0; "
                f"got {self.heldout_share!r} with num_heldout={self.num_heldout}"
            )

    @property
    def share(self) -> float:
        """``heldout_share``, or what stands for None."""
        if self.heldout_share is not None:
            return self.heldout_share
        return HELDOUT_SHARE if self.num_heldout else 0.0


def as_sources(
    dataset: str | os.PathLike | Iterable[str | os.PathLike | Mapping[str, Any]],
    cache_dir: Path,
    text_column: str = "text",
) -> tuple[str, ...]:
    """Names of sources for a ``DataConfig``.

    Parameters
    ----------
    dataset : str, path, or iterable
        Names of sources, one or several: Hub ids, files or folders. Or documents: mappings with a text in
        ``text_column``, such as the rows of a ``datasets.Dataset``, or texts: strings with blanks inside, or longer
        than any name, that are no file. Documents are read to the end of the iterable and kept in a file in
        ``cache_dir``, named after what is in it, which is then the source.

    Raises
    ------
    ValueError
        If ``dataset`` is empty, or holds names beside documents.
    TypeError
        If it is or holds something else.
    """
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"dataset must hold documents, got one mapping of {', '.join(map(repr, dataset)) or 'nothing'}: give a "
            "list of documents, or of a datasets.DatasetDict one of its splits"
        )
    if isinstance(dataset, bytes) or not isinstance(dataset, (str, os.PathLike, Iterable)):
        raise TypeError(
            f"dataset must be a Hub id, a file or a folder, several of them, or documents, got {dataset!r}"
        )
    several = [dataset] if isinstance(dataset, (str, os.PathLike)) else list(dataset)
    if not several:
        raise ValueError("dataset is empty: give Hub ids, files, folders, or documents")
    for item in several:
        if not isinstance(item, (str, os.PathLike, Mapping)):
            raise TypeError(f"dataset must hold names of sources, or texts or mappings, got {type(item).__name__}")
    names = [os.fspath(item) for item in several if not isinstance(item, Mapping) and not _is_text(item)]
    if len(names) == len(several):
        return tuple(names)
    if names:
        raise ValueError(f"dataset holds {len(names)} names of sources, such as {names[0]!r}, beside documents")
    rows: list[Any] = [item if isinstance(item, Mapping) else {text_column: item} for item in several]
    content = "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()
    path = cache_dir / "documents" / f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")  # of several processes each writes its own
        temporary.write_bytes(content)
        os.replace(temporary, path)
    return (str(path),)


def _is_text(item: str | os.PathLike) -> bool:
    """Whether a string has blanks inside, or is longer than names are, and is no name of a file."""
    is_long = isinstance(item, str) and (len(item.split()) > 1 or len(item) > 255)
    return is_long and not (suffix_of(str(item)) or os.path.exists(item))


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
        "tokenizer": [type(tokenizer).__name__, _tokenizer_parts(tokenizer)],
        "special_tokens": [tokenizer("").input_ids, tokenizer.eos_token_id],
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What makes tokens of a text, as plain JSON values; of a tokenizer in Python the vocabulary alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    of_calls = ("truncation", "padding")
    return {name: part for name, part in json.loads(backend.to_str()).items() if name not in of_calls}


def is_heldout(text: str, share: float, seed: int) -> bool:
    """Whether a document is held out: decided by its text and the seed alone, for ``share`` of all texts."""
    return _rank(text, seed) < share * 2**64


def _rank(text: str, seed: int) -> int:
    """64 bits of a document by which it is held out or not."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big")


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
        if self.full:
            return
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
    limit = config.share * 2**64
    sides, lengths, count = _read(config, tokenizer, limit)
    if config.num_heldout and not all(sides) and (nearest := _limit_for_both(lengths, config, limit)) is not None:
        sides, lengths, count = _read(config, tokenizer, nearest)
    train, heldout = sides
    if not train or (config.num_heldout and not heldout):
        raise ValueError(_too_little("held-out" if train else "training", list(lengths.values()), count, config))
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return _stacked([train[index] for index in shuffled], config.length), _stacked(heldout, config.length)


def _limit_for_both(lengths: Mapping[int, int], config: DataConfig, limit: float) -> float | None:
    """The rank nearest to a limit below which documents have a window, and from which on. None if there is none."""
    apart = config.boundaries == "reset"
    ranked = sorted((rank, tokens) for rank, tokens in lengths.items() if not apart or tokens >= config.length)

    def reaching(documents: Sequence[tuple[int, int]]) -> int | None:
        """Rank of the document with which a side of one document after another has a window."""
        totals = itertools.accumulate(tokens for _, tokens in documents)
        return next((rank for (rank, _), total in zip(documents, totals, strict=True) if total >= config.length), None)

    low, high = reaching(ranked), reaching(ranked[::-1])
    return None if low is None or high is None or low >= high else min(max(limit, low + 1), high)


def _too_little(kind: str, lengths: list[int], count: int, config: DataConfig) -> str:
    """What to say if not one window of a kind was found in so many documents, those that differ of these lengths."""
    different, needed = len(lengths), 2 if config.num_heldout else 1
    read = f"{count} {'document was' if count == 1 else 'documents were'} read"
    read += f", {different} different {'one' if different == 1 else 'ones'} among them" if different < count else ""
    if different < needed:
        return f"{read}, and {needed} are needed: one to learn from, another to measure on"
    most = sorted(lengths)[-needed] if config.boundaries == "reset" else sum(lengths) // needed
    return (
        f"not one {kind} window of {config.length} tokens: {read}, the longest of {max(lengths)} tokens; choose a "
        f"length of at most {most}, more data, another heldout_share (now {config.share}) or another boundaries "
        f'(now "{config.boundaries}")'
    )


def _read(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, limit: float
) -> tuple[list[list[tuple[torch.Tensor, str]]], dict[int, int], int]:
    """Windows, tokens of the documents read by rank, and how many were read.

    The windows are those for training and those of documents ranked below the limit, which are held out. Documents
    with the same text have the same rank.
    """
    numbers, lengths, count = (config.num_windows, config.num_heldout), dict[int, int](), 0
    wanted = [math.ceil(number / len(config.sources)) for number in numbers]
    streams = [documents([source], config.text_column, config.split) for source in config.sources]
    parts = [[_Side(config, number, tokenizer.eos_token_id) for number in wanted] for _ in streams]
    with tqdm(total=sum(wanted) * len(streams), desc="windows", disable=None) as bar:
        for sides, stream in zip(parts, streams, strict=True):
            while not all(side.full for side in sides) and (batch := list(itertools.islice(stream, BATCH))):
                # As long as a side has nothing, any document may yet be wanted there.
                is_open = [not side.full or any(each.wanted and not each.rows for each in sides) for side in sides]
                ranked = [(_rank(document["text"], config.seed), document) for document in batch]
                needed = [(rank, document) for rank, document in ranked if is_open[rank < limit]]
                count += len(needed)
                encoded = tokenizer([each["text"] for _, each in needed], verbose=False).input_ids if needed else []
                for (rank, document), ids in zip(needed, encoded, strict=True):
                    lengths[rank] = len(ids)
                    sides[rank < limit].add(ids, document["domain"])
                bar.update(sum(min(len(side.rows), side.wanted) for part in parts for side in part) - bar.n)
    windows = [_merge(sides)[:number] for sides, number in zip(zip(*parts, strict=True), numbers, strict=True)]
    return windows, lengths, count


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
