"""The command ``lococo convert-chatglm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_chatglm(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a ChatGLM2 or ChatGLM3 checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
) -> None:
    """Write a ChatGLM2 or ChatGLM3 checkpoint as Transformers' own GLM.

    Example: lococo convert-chatglm chatglm3-6b-32k chatglm3-6b-32k-native
    """
    from lococo.models.chatglm import convert

    convert.convert_chatglm(source, destination)
    print(f"{destination}: AutoModelForCausalLM and AutoTokenizer load it without remote code")
