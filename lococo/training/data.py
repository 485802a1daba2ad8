"""Text in, windows of tokens out: the data that compression heads are calibrated on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lococo.files import replace_folder

DEFAULT_DATASET = "togethercomputer/RedPajama-Data-1T-Sample"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
TEXT_PART = 2**20  # characters of a .txt file in one document
STREAMS = 16  # parts of one source read side by side
BATCH = 64  # documents tokenised at a time
TRAIN_FILE, HELDOUT_FILE = "train.safetensors", "heldout.safetensors"

T = TypeVar("T")
Row = tuple[str, str, Mapping[str, Any]]  # where it is, domain unless it says so itself, the document


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text to read and how to cut it.

    Parameters
    ----------
    sources : tuple of str
        Dataset ids of the Hub (``org/name``), files (``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``, ``.txt``,
        ``.parquet``), or folders of such files at any depth. A ``.txt`` file is one document, or one per 2**20
        characters if it is longer.
    length : int
        Tokens per window.
    num_windows, num_heldout : int
        Windows wanted for training and for measurement.
    boundaries : {"reset", "none"}
        "reset": a window is consecutive tokens of one document; what is left of a document is dropped. "none":
        documents are joined, with the tokenizer's EOS token between two, and cut regardless of where they end.
    text_column : str
        Name of the text in each document.
    split : str
        Split of a Hub dataset.
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
    max_windows_per_document: int = 8

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
    FileNotFoundError
        If a source is neither there nor named like a Hub dataset.
    ValueError
        If a source cannot be read, holds no text or misses the text column, the tokenizer has no EOS token for
        ``boundaries="none"``, or the data holds not one window of a wanted kind.
    ImportError
        If a source needs a package that is not installed.
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
    files = [path for source in config.sources for path in _local_files(source) or []]
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

    def windows(self, order: Sequence[int]) -> Windows:
        rows = [self.rows[index] for index in order]
        ids = torch.stack(rows) if rows else torch.empty(0, self.config.length, dtype=torch.int32)
        return Windows(ids, [self.domains[index] for index in order])


def _find_windows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Windows, Windows]:
    sides = [_Side(config, wanted, tokenizer.eos_token_id) for wanted in (config.num_windows, config.num_heldout)]
    stream = documents(config)
    read = longest = 0
    with tqdm(total=config.num_windows + config.num_heldout, desc="windows", disable=None) as bar:
        while not all(side.full for side in sides) and (batch := list(itertools.islice(stream, BATCH))):
            read += len(batch)
            sided = [(sides[is_heldout(each["text"], config.heldout_share, config.seed)], each) for each in batch]
            needed = [(side, document) for side, document in sided if not side.full]
            texts = [document["text"] for _, document in needed]
            encoded = tokenizer(texts, verbose=False).input_ids if texts else []
            for (side, document), ids in zip(needed, encoded, strict=True):
                longest = max(longest, len(ids))
                side.add(ids, document["domain"])
            bar.update(sum(min(len(side.rows), side.wanted) for side in sides) - bar.n)
    for side, kind in zip(sides, ("training", "held-out"), strict=True):
        if side.wanted and not side.rows:
            raise ValueError(
                f"not one {kind} window of {config.length} tokens: {read} documents were read, the longest of "
                f"{longest} tokens; choose a smaller length, more data, another heldout_share (now "
                f'{config.heldout_share}) or boundaries="none" (now "{config.boundaries}")'
            )
    train, heldout = (min(len(side.rows), side.wanted) for side in sides)
    shuffled = torch.randperm(train, generator=torch.Generator().manual_seed(config.seed)).tolist()
    return sides[0].windows(shuffled), sides[1].windows(range(heldout))


def _to_bytes(windows: Windows) -> bytes:
    return safetensors.torch.save({"ids": windows.ids}, metadata={"domains": json.dumps(windows.domains)})


def _load(path: Path) -> Windows:
    with safetensors.safe_open(path, "pt") as file:
        return Windows(file.get_tensor("ids"), json.loads(file.metadata()["domains"]))


def documents(config: DataConfig) -> Iterator[dict[str, str]]:
    """Documents as ``{"text", "domain"}``, one of each source in turn; when a source ends the others go on.

    A source of several files is itself read at up to 16 places in turn: files are often sorted by domain. Documents
    without text are left out. The domain is the document's ``domain``, else ``meta.redpajama_set_name``, else the
    name of the file's folder or of the Hub dataset.

    Raises
    ------
    FileNotFoundError, ValueError, ImportError
        As in :func:`prepare`.
    """
    opened = [(source, _streams(source, config)) for source in config.sources]
    return _in_turn([_documents(source, _in_turn(streams), config.text_column) for source, streams in opened])


def _in_turn(streams: Sequence[Iterable[T]]) -> Iterator[T]:
    for turn in itertools.zip_longest(*streams):
        yield from (item for item in turn if item is not None)


def _documents(source: str, rows: Iterable[Row], text_column: str) -> Iterator[dict[str, str]]:
    empty = True
    for where, domain, record in rows:
        if text_column not in record:
            raise ValueError(f"{where}: no column {text_column!r}; it has {', '.join(map(repr, record)) or 'none'}")
        text = "" if record[text_column] is None else record[text_column]
        if not isinstance(text, str):
            raise ValueError(f"{where}: column {text_column!r} must hold text, got {type(text).__name__}")
        if text.strip():
            empty = False
            # JSON can hold half a surrogate pair, which no tokenizer takes.
            yield {"text": text.encode(errors="replace").decode(), "domain": _domain(record) or domain}
    if empty:
        raise ValueError(f"{source}: empty; expected at least one document with text")


def _domain(record: Mapping[str, Any]) -> str:
    meta = record.get("meta")
    if isinstance(meta, str):
        with contextlib.suppress(ValueError):
            meta = json.loads(meta)
    set_name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return str(record.get("domain") or set_name or "")


def _local_files(source: str) -> list[Path] | None:
    """Files of a source, or None for a Hub dataset."""
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise ValueError(f"{source}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return files
    if path.exists():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{source}: unknown suffix; expected one of {', '.join(SUFFIXES)}")
        return [path]
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not source.endswith(SUFFIXES):
        return None
    raise FileNotFoundError(f"{source}: no such file or folder, and not a Hub dataset, written as 'org/name'")


def _streams(source: str, config: DataConfig) -> list[Iterator[Row]]:
    files = _local_files(source)
    if files is None:
        dataset = _hub_dataset(source, config.split)
        count = min(STREAMS, dataset.num_shards)
        shards = (dataset.shard(count, index) for index in range(count))
        return [zip(itertools.repeat(source), itertools.repeat(source.split("/")[1]), shard) for shard in shards]
    count = min(STREAMS, len(files))
    parts = (files[index * len(files) // count : (index + 1) * len(files) // count] for index in range(count))
    read = functools.partial(_file_rows, text_column=config.text_column)
    return [itertools.chain.from_iterable(map(read, part)) for part in parts]


def _hub_dataset(source: str, split: str) -> Any:
    load = functools.partial(_optional("datasets").load_dataset, source, split=split, streaming=True)
    try:
        try:
            return load()
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # Of a dataset with a loading script, which `datasets` no longer runs, the Hub keeps a parquet copy.
            return load(revision="refs/convert/parquet")
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{source}: no such file or folder, and it does not open as a Hub dataset: {error}"
        ) from error


def _file_rows(path: Path, text_column: str) -> Iterator[Row]:
    where, domain, is_text = str(path), path.parent.name, path.suffix == ".txt"
    try:
        if path.suffix == ".parquet":
            for batch in _optional("pyarrow.parquet").ParquetFile(path).iter_batches(BATCH):
                yield from ((where, domain, record) for record in batch.to_pylist())
            return
        with _open(path) as file:
            for number, part in enumerate(iter(lambda: file.read(TEXT_PART), "") if is_text else file, 1):
                where = str(path) if is_text else f"{path}: line {number}"
                if "\0" in part:
                    raise ValueError("binary data; expected UTF-8 text")
                if part.strip():
                    record = {text_column: part} if is_text else json.loads(part)
                    if not isinstance(record, dict):
                        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
                    yield where, domain, record
    except ImportError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: binary data or another encoding; expected UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: invalid JSON: {error}") from error
    except Exception as error:  # each decompressor has errors of its own, none with the name of the file
        raise ValueError(f"{where}: {error or type(error).__name__}") from error


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        binary: Any = gzip.GzipFile(path)
    elif path.suffix == ".zst":
        decompressor = _optional("zstandard").ZstdDecompressor(max_window_size=2**31)
        binary = decompressor.stream_reader(path.open("rb"), read_across_frames=True)
    else:
        binary = path.open("rb")
    # Only "\n" ends a line of JSON: U+2028 and the like stand inside texts.
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline=None if path.suffix == ".txt" else "\n")


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this data needs the package {package}: pip install lococo[train]") from error
