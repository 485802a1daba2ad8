"""Result files: one JSON per topic, a Markdown table and a picture beside it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lococo.files import write_whole
from lococo.version import __version__

PACKAGE = Path(__file__).parent.parent
RESULTS = "docs/results"


def beside(path: Path, ending: str) -> Path:
    """A file of a result: ``bench_llama-3.1-8b`` is a name without a suffix, too."""
    return path.with_name(path.name + ending)


def write_result(
    path: Path,
    command: str,
    device: torch.device | str,
    rows: Sequence[dict[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    table: Sequence[dict[str, Any]] | None = None,
    how: str | None = None,
    seconds: float | None = None,
    commits: Sequence[str | None] = (),
    **facts: Any,
) -> None:
    """Write ``<path>.json`` and the table ``<path>.md`` of it.

    Parameters
    ----------
    path : Path
        Without a suffix: ``results/perplexity``.
    command : str
        What made it, as a user would type it.
    rows : sequence of dict
        Flat, all with the same keys.
    columns : sequence of str, optional
        Keys that the table shows. None: all.
    table : sequence of dict, optional
        Rows that the table shows in place of ``rows``.
    how : str, optional
        How the figures came about, in a sentence or two that both files hold.
    seconds : float, optional
        That measuring took, other work beside it included.
    commits : sequence of str or None
        That rows were measured at, as ``Journal.commits`` has them. Empty: the present one.
    **facts
        What else the file says of all rows.
    """
    facts = facts if how is None else {"how": how, **facts}
    facts = facts if seconds is None else {**facts, "seconds": round(seconds)}
    content = {**facts, **result_content(command, device, rows, commits)}
    write_whole(beside(path, ".json"), json.dumps(content, indent=1) + "\n")
    note = f"`{command}` on {content['device']}, {content['date']}"
    note += "" if seconds is None else f", measured in {max(1, round(seconds / 60))} min"
    named = ", then ".join(filter(None, [content["commit"], *content.get("later_commits", [])]))
    note += f", commit {named}\n\n" if named else "\n\n"
    note += f"{how}\n\n" if how else ""
    shown = rows if table is None else table
    shown = shown if columns is None else [{name: row[name] for name in columns} for row in shown]
    write_whole(beside(path, ".md"), note + markdown_table(shown))


def result_content(
    command: str, device: torch.device | str, rows: Sequence[dict[str, Any]], commits: Sequence[str | None] = ()
) -> dict[str, Any]:
    """What a result file holds: the rows, and what made them where."""
    commit, *later = commits or [own_commit(PACKAGE)]
    return {
        "command": command,
        "commit": commit,
        **({"later_commits": later} if later else {}),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "versions": {
            "lococo": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "rows": list(rows),
    }


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's architecture and cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device | str) -> int:
    """Most bytes in use at once since this process began: of the GPU for tensors, or of the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table with the rows' keys as its head; numbers to four significant digits, None empty."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def label_of(row: dict[str, Any]) -> str:
    """A row's method as pictures name it: ``h2o 128``."""
    return f"{row['method']} {row['num_slots'] or ''}".strip()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    # A domain is named by its file, or as a document says.
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split("\n")).replace("|", "\\|")


def own_commit(package: Path) -> str | None:
    """Commit of the LoCoCo checkout that a package folder is part of.

    None for an installed package, also inside a checkout of something else, and for a copy in another project.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    project = Path(top or package, "pyproject.toml")
    if top is None or Path(top, package.name).resolve() != package.resolve() or not project.is_file():
        return None
    is_tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    if not is_tracked or f'name = "{package.name}"' not in project.read_text(encoding="utf-8").splitlines():
        return None
    commit = _git(package, "describe", "--always")
    # Results that were just written change nothing of what is measured.
    asked = ("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){RESULTS}")
    return f"{commit}-dirty" if commit and _git(package, *asked) else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers about the repository that a folder lies in; None if it does not."""
    # A hook that runs us has told git of its own repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    asked = ["git", *arguments]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
