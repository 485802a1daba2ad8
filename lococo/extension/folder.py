"""A model extended to longer texts, saved and loaded: adapters, heads, and how positions are stretched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lococo.config import LoCoCoConfig
from lococo.extension.adapters import load_adapter, restored
from lococo.extension.rope_scaling import RopeScaling, scale_positions
from lococo.files import as_path, check_output, check_replaceable, new_folder, write_whole
from lococo.heads import load_heads, save_heads
from lococo.models import base_config, base_shape
from lococo.patch import patch_model
from lococo.state import find_patch, is_patched, patch_of
from lococo.version import __version__

EXTENSION_NAME = "extension.json"
ADAPTER_FOLDER, HEADS_FOLDER = "adapter", "heads"
RECORD_NAMES = ("training.json", "training.png")


@dataclasses.dataclass(frozen=True)
class Extension:
    """What a model was extended for, and how it reads.

    Attributes
    ----------
    method : str
        How it was trained.
    length : int
        Tokens of the texts it was trained on.
    rope_scaling : RopeScaling, optional
        None where positions are those inside the cache.
    config : LoCoCoConfig, optional
        The compressed cache it reads with. None for the full cache.
    """

    method: str
    length: int
    rope_scaling: RopeScaling | None
    config: LoCoCoConfig | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Extension:
        """An extension from the plain JSON values of its fields."""
        scaling = values.get("rope_scaling", values.get("stretch"))  # as older folders call it
        config = values["config"] and LoCoCoConfig.from_dict(values["config"])
        return cls(values["method"], values["length"], scaling and RopeScaling(**scaling), config)


def read_extension(folder: str | os.PathLike) -> tuple[Extension, dict[str, Any]]:
    """What stands in the ``extension.json`` of a folder: the extension, and all of the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read.
    """
    path = as_path("folder", folder) / EXTENSION_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: not a folder written by lococo extend")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Extension.from_dict(content["extension"]), content
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an extension: {error!r}") from error


def extension_digest(folder: str | os.PathLike) -> str:
    """SHA-256 of all weights in a folder, to tell one training from another."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_extension_folder(folder: Path) -> None:
    """Refuse a folder that an extension would not replace.

    Raises
    ------
    FileExistsError
        If it is a file, or holds anything that is not of an extension.
    """
    check_replaceable(folder, EXTENSION_NAME, (EXTENSION_NAME, ADAPTER_FOLDER, HEADS_FOLDER, *RECORD_NAMES))


def save_extended(model: Any, folder: Path, extension: Extension, files: Mapping[str, bytes]) -> None:
    """Write adapters and heads of an extended model into a folder, whole or not at all.

    Parameters
    ----------
    model : peft.PeftModel
        Patched if the extension has a config.
    files : mapping of str to bytes
        More files by name: the record of the training and its picture.

    Raises
    ------
    FileExistsError
        If ``folder`` holds something else.
    """
    check_extension_folder(folder)
    with new_folder(folder.resolve()) as new:
        save_parts(model, new)
        for name, attached in files.items():
            write_whole(new / name, attached)
        base = {"name": Path(base_config(model)._name_or_path).name, "shape": _shape(model)}
        content = {"extension": dataclasses.asdict(extension), "base": base, "lococo": __version__}
        write_whole(new / EXTENSION_NAME, json.dumps(content, indent=1) + "\n")


def save_parts(model: Any, folder: Path) -> None:
    """Write a model's adapters and heads into folders of a folder."""
    # "embeddings" are among the modules to save; PEFT would look for the base model to tell.
    model.save_pretrained(folder / ADAPTER_FOLDER, save_embedding_layers=False)
    (folder / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)  # a form with nothing filled in
    patch = find_patch(model)
    if patch and (patch.heads or patch.networks):
        save_heads(model, folder / HEADS_FOLDER)


def load_extended(base: nn.Module | str | os.PathLike, folder: str | os.PathLike) -> Any:
    """Load an extended model: the base model with stretched positions and adapters, patched with its cache.

    Parameters
    ----------
    base : torch.nn.Module, path or str
        The model that was extended, as it was, or its folder or Hub id.
    folder : path or str
        A folder written by ``lococo extend``.

    Returns
    -------
    peft.PeftModel
        Around the base model, which is changed in place. ``lococo.unpatch_model`` gives it a full cache;
        ``lococo.merge_extended`` makes a plain model of it.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder is no extension, or not one of this model. The model is then as it was.
    """
    folder = as_path("folder", folder)
    extension, content = read_extension(folder)
    if not isinstance(base, nn.Module):
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(base)
    if is_patched(base):
        raise ValueError("the base model is patched: call lococo.unpatch_model first")
    if hasattr(base, "peft_config"):
        raise ValueError("the base model has adapters already: load the extension into the plain model")
    if content["base"]["shape"] != _shape(base):
        raise ValueError(
            f"{folder} extends {content['base']['name']} of shape {content['base']['shape']}, the model has shape "
            f"{_shape(base)}"
        )
    with restored(base, after_errors_only=True):
        if extension.rope_scaling:
            scale_positions(base, extension.rope_scaling)
        model = load_adapter(base, Path(folder, ADAPTER_FOLDER))
        if extension.config:
            patch_model(model, extension.config)
            _load_heads(model, Path(folder, HEADS_FOLDER))
    return model.eval()


def _load_heads(model: Any, folder: Path) -> None:
    patch = patch_of(model)
    if not (patch.heads or patch.networks):
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: the heads that were trained with the adapters are missing")
    load_heads(model, folder)


def merge_extended(model: Any, folder: str | os.PathLike | None = None, tokenizer: Any = None) -> Any:
    """Put the adapters of an extended model into its weights.

    Parameters
    ----------
    model : peft.PeftModel
        As ``load_extended`` gives it. Taken apart: use what is returned.
    folder : path or str, optional
        Where to write it, with the tokenizer: a plain checkpoint, and its heads in the folder ``heads`` for
        ``lococo.patch_model(model, heads=...)``.

    Returns
    -------
    transformers.PreTrainedModel
        Patched as the model was.

    Raises
    ------
    ValueError, OSError
        If the folder exists, has no name or cannot be written. The model is then as it was.
    """
    new_place = None if folder is None else check_output(as_path("folder", folder))
    if new_place is not None and new_place.exists():
        raise FileExistsError(f"{folder} exists; give a new folder")
    plain = model.merge_and_unload()
    if new_place is not None:
        with new_folder(new_place) as new:
            plain.save_pretrained(new)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            patch = find_patch(plain)
            if patch and (patch.heads or patch.networks):
                save_heads(plain, new / HEADS_FOLDER)
            elif patch:
                patch.config.save_pretrained(new / HEADS_FOLDER)
    return plain


def _shape(model: Any) -> dict[str, int]:
    config = base_config(model).get_text_config()
    return {**base_shape(model), "hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
