"""The folder in which a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_same_run(path: Path, run: dict[str, Any]) -> None:
    """Refuse to go on with another run.

    Parameters
    ----------
    path : Path
        File of the work folder that says which run it is; there is none before the first.
    run : dict
        What makes one run another, as plain JSON values.

    Raises
    ------
    ValueError
        If it differs from what the file says; names what differs.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else run
    changed = [name for name in run if before.get(name) != run[name]]
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with another {', '.join(changed)}: resume it with the same arguments, or "
            "remove that folder"
        )
