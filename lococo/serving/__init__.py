"""An OpenAI-compatible server for one machine, on Transformers' own (``transformers.cli.serving``)."""

from __future__ import annotations

import importlib.util

import transformers

from lococo.compat import RELEASE

OLDEST = (5, 8)  # the release whose server has the parts that ours puts together
PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")


def check_available() -> None:
    """Refuse to go on without Transformers' server.

    Raises
    ------
    ImportError
        Says what to install.
    """
    if RELEASE < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"lococo serve is built on the server of transformers {oldest} and later, this is "
            f"{transformers.__version__}: pip install 'transformers>={oldest}'"
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"lococo serve needs {', '.join(missing)}: pip install lococo[serve]")
