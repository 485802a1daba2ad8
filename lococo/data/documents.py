"""Documents of Hub datasets, files and folders, with the domain each comes from: what training and evaluation read."""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from lococo.hub import HUB_ID

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
HUB_FILES = "hf://"
TEXT_PART = 2**20  # characters of a .txt file in one document
STREAMS = 16  # parts of one source read side by side
ZST_PART = 2**14  # bytes of a .zst file decompressed at a time
BATCH = 64  # documents held at a time
NOT_TEXT = "binary data or another encoding; expected UTF-8 text"

T = TypeVar("T")
Row = tuple[str, str, str, Mapping[str, Any]]  # where it is; domain and id unless it has its own; the document


def documents(
    sources: Sequence[str], text_column: str = "text", split: str = "train", *, in_order: bool = False
) -> Iterator[dict[str, str]]:
    """Documents as ``{"text", "domain", "id"}``, one of each source in turn; when a source ends the others go on.

    A source of several files is itself read at up to 16 places in turn, as files are often sorted by domain, and a
    ``.txt`` file longer than 2**20 characters gives a document for each of them. Documents without text are left out.
    The domain is the document's ``domain``, else ``meta.redpajama_set_name``, else the
    name of the ``.txt`` file, of another file's folder, or of the Hub dataset. The id is the document's ``id``, else
    its place in the source.

    Parameters
    ----------
    sources : sequence of str
        Dataset ids of the Hub (``org/name``, or ``org/name:configuration``), files (``.jsonl``, ``.jsonl.gz``,
        ``.jsonl.zst``, ``.txt``, ``.parquet``), or folders of such files at any depth. What begins with ``hf://`` is
        the address of such files on the Hub.
    text_column : str
        Name of the text in each document.
    split : str
        Split of a Hub dataset.
    in_order : bool
        Read each source from its beginning to its end, and every ``.txt`` file as one document.

    Raises
    ------
    FileNotFoundError
        If a source is neither there nor named like a Hub dataset.
    ValueError
        If a source cannot be read, holds no text or misses the text column.
    ImportError
        If a source needs a package that is not installed.
    """
    opened = [(source, _streams(source, text_column, split, in_order)) for source in sources]
    return _in_turn([_documents(source, _in_turn(streams), text_column) for source, streams in opened])


def local_files(source: str) -> list[Path] | None:
    """Files of a source, or None for one of the Hub.

    Raises
    ------
    FileNotFoundError
        If it is neither there nor named like a Hub dataset.
    ValueError
        If no file has a suffix that can be read.
    """
    if not source:
        raise ValueError("the name of a source of text is empty: give a file, a folder ('.' for this one) or a Hub id")
    if source.startswith(HUB_FILES):
        return None
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if suffix_of(file.name) and file.is_file())
        if not files:
            raise ValueError(f"{source}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return files
    if path.exists():
        if not suffix_of(path.name):
            raise ValueError(f"{source}: unknown suffix; expected one of {', '.join(SUFFIXES)}")
        return [path]
    name, colon, configuration = source.partition(":")
    if HUB_ID.fullmatch(name) and bool(configuration) == bool(colon) and not suffix_of(source):
        return None
    raise FileNotFoundError(
        f"{source}: no such file or folder, and not a Hub dataset, written as 'org/name' or 'org/name:configuration'"
    )


def suffix_of(name: str) -> str | None:
    """The suffix that says how a file is read, whether in small letters or not; None if it is not one that can be."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def read_text(path: Path) -> str:
    """All of a text file, whatever it is called.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not UTF-8 text.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a text file")
    return decoded_text(path.read_bytes(), str(path))


def decoded_text(data: bytes, name: str) -> str:
    """Text of bytes that were read from somewhere.

    Parameters
    ----------
    name : str
        Of where they are from, for errors.

    Raises
    ------
    ValueError
        If they are not UTF-8 text.
    """
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()  # line ends as in any text file
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {NOT_TEXT} ({error})") from error
    if "\0" in text:
        raise ValueError(f"{name}: binary data; expected UTF-8 text")
    return text


def single_files(sources: Iterable[str | Path]) -> list[str]:
    """Sources that each are one file, or of the Hub: a folder is as many as it has files."""
    return [str(file) for source in map(str, sources) for file in local_files(source) or (source,)]


def check_sources(sources: Sequence[str], text_column: str = "text") -> None:
    """Refuse sources that hold no text, before any longer work: of every local one a document is read.

    Sources of the Hub are not opened: what was read of them once is used again without a network.

    Raises
    ------
    ValueError, OSError, ImportError
        As in ``documents``.
    """
    for source in sources:
        if local_files(source) is not None:
            next(documents([source], text_column))


def _in_turn(streams: Sequence[Iterable[T]]) -> Iterator[T]:
    for turn in itertools.zip_longest(*streams):
        yield from (item for item in turn if item is not None)


def _documents(source: str, rows: Iterable[Row], text_column: str) -> Iterator[dict[str, str]]:
    empty = True
    for where, domain, name, record in rows:
        if text_column not in record:
            raise ValueError(f"{where}: no column {text_column!r}; it has {', '.join(map(repr, record)) or 'none'}")
        text = "" if record[text_column] is None else record[text_column]
        if not isinstance(text, str):
            raise ValueError(f"{where}: column {text_column!r} must hold text, got {type(text).__name__}")
        if text.strip():
            empty = False
            # JSON can hold half a surrogate pair, which no tokenizer takes.
            text = text.encode(errors="replace").decode()
            yield {"text": text, "domain": _domain(record) or domain, "id": str(record.get("id") or name)}
    if empty:
        raise ValueError(f"{source}: empty; expected at least one document with text")


def _domain(record: Mapping[str, Any]) -> str:
    meta = record.get("meta")
    if isinstance(meta, str):
        with contextlib.suppress(ValueError):
            meta = json.loads(meta)
    set_name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    return str(record.get("domain") or set_name or "")


def _streams(source: str, text_column: str, split: str, in_order: bool) -> list[Iterator[Row]]:
    files = local_files(source)
    if files is None:
        dataset = _hub_dataset(source, split)
        count = 1 if in_order else min(STREAMS, dataset.num_shards)
        return [_hub_rows(source, dataset.shard(count, index), index) for index in range(count)]
    count = 1 if in_order else min(STREAMS, len(files))
    parts = (files[index * len(files) // count : (index + 1) * len(files) // count] for index in range(count))
    read = functools.partial(_file_rows, text_column=text_column, part_size=-1 if in_order else TEXT_PART)
    return [itertools.chain.from_iterable(map(read, part)) for part in parts]


def _hub_dataset(source: str, split: str) -> Any:
    load_dataset = _optional("datasets").load_dataset
    if source.startswith(HUB_FILES):
        kind = "parquet" if suffix_of(source) == ".parquet" else "json"
        load = functools.partial(load_dataset, kind, data_files=source, split="train", streaming=True)
    else:
        name, _, configuration = source.partition(":")
        named = [name, configuration] if configuration else [name]
        load = functools.partial(load_dataset, *named, split=split, streaming=True)
    try:
        try:
            return load()
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # Of a dataset with a loading script, which `datasets` no longer runs, the Hub keeps a parquet copy.
            return load(revision="refs/convert/parquet")
    except (OSError, RuntimeError, ValueError) as error:
        hint = "; name one as 'org/name:configuration'" if "config name is missing" in str(error).lower() else ""
        raise ValueError(
            f"{source}: no such file or folder, and it does not open as a Hub dataset: {error}{hint}"
        ) from error


def _hub_rows(source: str, shard: Iterable[Mapping[str, Any]], index: int) -> Iterator[Row]:
    domain = source.split("/")[-2] if source.startswith(HUB_FILES) else source.split("/")[1]
    try:
        for number, record in enumerate(shard):
            yield source, domain, f"{index}:{number}", record
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{source}: cannot be read from the Hub: {error}") from error


def _file_rows(path: Path, text_column: str, part_size: int) -> Iterator[Row]:
    where, suffix = str(path), suffix_of(path.name) or ""
    is_text, name = suffix == ".txt", path.name[: -len(suffix)]
    domain = name if is_text else path.parent.name
    try:
        if suffix == ".parquet":
            batches = _optional("pyarrow.parquet").ParquetFile(path).iter_batches(BATCH)
            for number, record in enumerate(record for batch in batches for record in batch.to_pylist()):
                yield where, domain, f"{name}:{number}", record
            return
        with _open(path, suffix) as file:
            for number, part in enumerate(iter(lambda: file.read(part_size), "") if is_text else file, 1):
                where = str(path) if is_text else f"{path}: line {number}"
                if "\0" in part:
                    raise ValueError("binary data; expected UTF-8 text")
                if part.strip():
                    record = {text_column: part} if is_text else json.loads(part.rstrip())
                    if not isinstance(record, dict):
                        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
                    yield where, domain, f"{name}:{number}", record
    except ImportError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {NOT_TEXT} ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: invalid JSON: {error.msg} at character {error.pos + 1}") from error
    except Exception as error:  # each decompressor has errors of its own, none with the name of the file
        raise ValueError(f"{where}: {error or type(error).__name__}") from error


def _open(path: Path, suffix: str) -> TextIO:
    if suffix.endswith(".gz"):
        binary: Any = gzip.GzipFile(path)
    elif suffix.endswith(".zst"):
        decompressor = _optional("zstandard").ZstdDecompressor(max_window_size=2**31)
        binary = io.BufferedReader(_Frames(path.open("rb"), decompressor))
    else:
        binary = path.open("rb")
    # Only "\n" ends a line of JSON: U+2028 and the like stand inside texts.
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline=None if suffix == ".txt" else "\n")


class _Frames(io.RawIOBase):
    """What is in the frames of a Zstandard file; ``stream_reader`` says nothing where one was cut."""

    def __init__(self, file: BinaryIO, decompressor: Any) -> None:
        self.file, self.decompressor = file, decompressor
        self.frame: Any = None
        self.content = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (part := self.content.read(len(buffer))) and (data := self.file.read(ZST_PART)):
            found = []
            while data:
                if self.frame is None or self.frame.eof:
                    self.frame = self.decompressor.decompressobj()
                found.append(self.frame.decompress(data))
                data = self.frame.unused_data
            self.content = io.BytesIO(b"".join(found))
        if not part and self.frame is not None and not self.frame.eof:
            raise EOFError("compressed file ended before the end of a frame was reached")
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.file.close()
        super().close()


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"this data needs the package {package}: pip install lococo[train]") from error
