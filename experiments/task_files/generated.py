"""Tasks that make their data when they are loaded: RULER's and BABILong's, with texts from a local file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from lm_eval.utils import ignore_constructor

from experiments.task_files import makers
from experiments.task_files.common import own_file

OWN = {
    "niah_single_1": "ruler/niah_single_1.yaml",
    "niah_single_2": "ruler/niah_single_2.yaml",
    "niah_multikey_1": "ruler/niah_multikey_1.yaml",
    "niah_questions": "ruler/niah_multikey_1.yaml",
    "ruler_vt": "ruler/vt.yaml",
    **{f"babilong_qa{number}": f"babilong/babilong_qa{number}.yaml" for number in range(1, 6)},
}
NAMES = tuple(OWN)


def write_task(name: str, data_dir: Path, haystack: Path | None, samples: int, output: Path) -> None:
    """Write a task file, beside it ``makers.py``, which it names, and what nltk must know to find sentences.

    Parameters
    ----------
    haystack : Path, optional
        Texts around needles and facts.
    samples : int
        Items of each length; of ``niah_questions`` documents.

    Raises
    ------
    FileNotFoundError
        If there is no haystack, or not bAbI's file.
    """
    if haystack is None or not haystack.is_file():
        raise FileNotFoundError(f"it needs a file of texts, got --haystack {haystack}")
    told: dict[str, Any] = {"haystack": str(haystack.absolute()), "num_samples": samples}
    maker = name
    if name.startswith("babilong_"):
        maker = "babilong"
        told["stories"] = str(_babi_file(name.removeprefix("babilong_"), data_dir).absolute())
    shutil.copy(makers.__file__, output / "makers.py")
    makers.learn_sentences(haystack, output / makers.SENTENCES)
    content = f"""include: {json.dumps(str(own_file(OWN[name])))}
task: {name}
custom_dataset: !function makers.{maker}
metadata: {json.dumps({**_own_metadata(OWN[name]), **told})}
"""
    (output / f"{name}.yaml").write_text(content, encoding="utf-8")


def _own_metadata(own: str) -> dict[str, Any]:
    """What lm-eval's task file tells its task, the version among it."""

    class Loader(yaml.SafeLoader):
        """Reads task files without the functions that they name."""

    Loader.add_constructor("!function", ignore_constructor)
    content = yaml.load(own_file(own).read_text(encoding="utf-8"), Loader)
    included = content.get("include")
    before = _own_metadata(f"{Path(own).parent}/{included}") if included else {}
    return {**before, **content.get("metadata", {})}


def _babi_file(name: str, data_dir: Path) -> Path:
    found = sorted((data_dir / "babi").glob(f"{name}_*test.txt"))
    if not found:
        raise FileNotFoundError(f"it needs bAbI's file {data_dir / 'babi'}/{name}_*test.txt")
    return found[0]
