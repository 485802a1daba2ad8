"""What all task files have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks

Row = dict[str, Any]


def own_file(name: str) -> Path:
    """A file of lm-eval's folder of tasks."""
    return Path(lm_eval.tasks.__path__[0], name)


def write_task_file(
    name: str, own: str, splits: Mapping[str, Sequence[Row]], output: Path, changes: Mapping[str, Any]
) -> None:
    """Write rows, and a task file that includes lm-eval's ``own`` and reads them.

    Parameters
    ----------
    splits : mapping
        Rows by the name of their split.
    changes : mapping
        What else is not as lm-eval has it.
    """
    paths = {}
    for split, rows in splits.items():
        paths[split] = str((output / f"{name}-{split}.jsonl").absolute())
        Path(paths[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    content = {"include": str(own_file(own)), "task": name, "dataset_path": "json", "dataset_name": None}
    content |= {"dataset_kwargs": {"data_files": paths}, **changes}
    (output / f"{name}.yaml").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
