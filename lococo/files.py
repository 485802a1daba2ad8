"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def temporary_name(name: str) -> str:
    """What ``write_whole`` calls a file until it is whole; a process that is killed leaves it there."""
    return f".{name}.tmp"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name beside its place, then move it there. Folders are made if missing.

    Raises
    ------
    OSError
        If it cannot be written; names the file, not the other one.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def check_output_file(path: Path) -> Path:
    """Refuse a file that could not be written, before any longer work. Returns the path.

    Raises
    ------
    OSError
        If it is a folder, or ``check_output`` refuses it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder")
    return check_output(path)


def check_output(path: Path) -> Path:
    """Refuse a file or folder that could not be written, before any longer work. Returns the path.

    Raises
    ------
    OSError
        If the folder that it would be made in is a file, or may not be written to.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: the folder {place} may not be written to")
    return path


def as_path(name: str, value: str | os.PathLike) -> Path:
    """The path that an argument gives.

    Raises
    ------
    ValueError
        If it is empty: it would stand for the working directory.
    TypeError
        If it is no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {value!r}")
    if not os.fspath(value):
        raise ValueError(f"{name} is empty; write '.' for the working directory")
    return Path(value).expanduser()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a folder, made if missing (its parents are not)."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def check_replaceable(folder: Path, marker: str, known: Collection[str]) -> None:
    """Refuse to replace a folder that holds anything but known files, the marker among them.

    Raises
    ------
    FileExistsError
        If ``folder`` is a file, has no ``marker`` and is not empty, or holds a file that is not known.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; expected a folder")
    names = {entry.name for entry in folder.iterdir()}
    if names and marker not in names:
        raise FileExistsError(f"{folder} has no {marker} and is not empty; give a new folder")
    surplus = sorted(names.difference(known))
    if surplus:
        raise FileExistsError(
            f"{folder} would be replaced, but also holds {', '.join(surplus)}; move them away or give a new folder"
        )


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder with these files in the place of what is there; after an error the old folder is there."""
    with new_folder(folder) as new:
        write_files(new, files)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that moves to its place at the end, for an old one if there is one.

    After an error or an interrupt nothing of it is left, and the old one is there.
    """
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=existing) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        yield new
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
