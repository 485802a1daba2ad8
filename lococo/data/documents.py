"""Documents of Hub datasets, files and folders, with the domain each comes from."""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
TEXT_PART = 2**20  # characters of a .txt file in one document
STREAMS = 16  # parts of one source read side by side
BATCH = 64  # documents held at a time

T = TypeVar("T")
Row = tuple[str, str, Mapping[str, Any]]  # where it is, domain unless it says so itself, the document


def documents(sources: Sequence[str], text_column: str = "text", split: str = "train") -> Iterator[dict[str, str]]:
    """Documents as ``{"text", "domain"}``, one of each source in turn; when a source ends the others go on.

    A source of several files is itself read at up to 16 places in turn: files are often sorted by domain. Documents
    without text are left out. The domain is the document's ``domain``, else ``meta.redpajama_set_name``, else the
    name of the file's folder or of the Hub dataset.

    Parameters
    ----------
    sources : sequence of str
        Dataset ids of the Hub (``org/name``), files (``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``, ``.txt``,
        ``.parquet``), or folders of such files at any depth. A ``.txt`` file is one document, or one per 2**20
        characters if it is longer.
    text_column : str
        Name of the text in each document.
    split : str
        Split of a Hub dataset.

    Raises
    ------
    FileNotFoundError
        If a source is neither there nor named like a Hub dataset.
    ValueError
        If a source cannot be read, holds no text or misses the text column.
    ImportError
        If a source needs a package that is not installed.
    """
    opened = [(source, _streams(source, text_column, split)) for source in sources]
    return _in_turn([_documents(source, _in_turn(streams), text_column) for source, streams in opened])


def local_files(source: str) -> list[Path] | None:
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


def _streams(source: str, text_column: str, split: str) -> list[Iterator[Row]]:
    files = local_files(source)
    if files is None:
        dataset = _hub_dataset(source, split)
        count = min(STREAMS, dataset.num_shards)
        shards = (dataset.shard(count, index) for index in range(count))
        return [zip(itertools.repeat(source), itertools.repeat(source.split("/")[1]), shard) for shard in shards]
    count = min(STREAMS, len(files))
    parts = (files[index * len(files) // count : (index + 1) * len(files) // count] for index in range(count))
    read = functools.partial(_file_rows, text_column=text_column)
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
