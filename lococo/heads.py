"""Saving, loading and pushing trained heads: JSON and safetensors, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from lococo.card import model_card
from lococo.config import CONFIG_NAME, LoCoCoConfig
from lococo.files import check_replaceable, replace_folder, write_files
from lococo.hub import HUB_ID
from lococo.models import base_config, base_shape
from lococo.state import Patch, patch_of
from lococo.version import __version__

HEADS_NAME = "lococo_heads.safetensors"
CARD_NAME = "README.md"
FILE_NAMES = (CONFIG_NAME, HEADS_NAME, CARD_NAME)
ATTACHMENTS = ("calibration.json", "calibration.png")
FORMAT_VERSION = 1
NETWORK_PREFIX = "score."
NO_HEADS = (
    "it has no heads; call lococo.patch_model(model) first, or lococo.patch_model(model, heads=...) to patch and load "
    "at once"
)
HEAD_FIELDS = ("compressor", "num_fused", "kernel_size", "head_rank", "residual", "normalization", "has_mass")


def save_heads(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    training: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    attachments: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the heads of a patched model into a folder, whole or not at all.

    The folder holds ``lococo_config.json``, ``lococo_heads.safetensors`` (tensors ``layers.{index}.{parameter}``, of a
    learned score's networks ``layers.{index}.score.{parameter}``) and a ``README.md`` model card. An existing heads
    folder is replaced. Of a base model loaded from a local path only the last part of that path is written.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    folder : path
        Where to write; made if missing, parents included.
    training, metrics : dict, optional
        How the heads were trained and their measured figures, as plain JSON values.
    dtype : torch.dtype, optional
        Floating dtype of the saved tensors. None: that of each parameter.
    attachments : mapping of str to bytes, optional
        More files, of the names in ``ATTACHMENTS``: the record of a calibration and its picture.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If the model is not patched, a head holds a value that is not finite in ``dtype``, ``dtype`` is not a floating
        dtype, ``training`` or ``metrics`` are not plain finite JSON values, or an attachment has another name.
    FileExistsError
        If ``folder`` is a file, or holds anything that is not of a heads folder.
    """
    folder = Path(folder)
    files = _heads_files(model, folder.resolve().name, training, metrics, dtype)
    for name, content in (attachments or {}).items():
        if name not in ATTACHMENTS:
            raise ValueError(f"attachments must be named {' or '.join(ATTACHMENTS)}, got {name!r}")
        files[name] = content
    check_heads_folder(folder)
    replace_folder(folder.resolve(), files)
    return folder


def check_heads(model: nn.Module) -> None:
    """Refuse a model whose heads could not be saved.

    Raises
    ------
    ValueError
        If it is not patched, or a head is not in memory as a whole.
    """
    _head_parameters(patch_of(model, NO_HEADS))


def check_heads_folder(folder: Path) -> None:
    """Refuse a folder that ``save_heads`` would not replace.

    Raises
    ------
    FileExistsError
        If it is a file, or holds anything that is not of a heads folder.
    """
    check_replaceable(folder, CONFIG_NAME, FILE_NAMES + ATTACHMENTS)


def load_heads(
    model: nn.Module,
    folder_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Copy saved heads into a patched model, after checking all of them.

    Dtype and device of the model's heads stay as they are. When an error is raised, the model is as it was.

    Parameters
    ----------
    model : torch.nn.Module
        A model patched with a config whose heads are like the saved ones.
    folder_or_id : path or str
        A folder written by `save_heads`, or a Hub id ``"org/name"``.
    revision : str, optional
        Branch, tag or commit on the Hub.
    token : str or bool, optional
        Hub access token.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        If the model is not patched, was patched for other heads or has another shape than the heads' base model, or
        if a tensor is missing, surplus, of another shape, not finite in the dtype of the model's head, or unreadable.
    OSError
        If there is no such folder, or the Hub could not deliver it.
    """
    patch = patch_of(model, NO_HEADS)
    parameters = _head_parameters(patch)
    folder = _local_folder(folder_or_id, revision, token)
    _check_config(LoCoCoConfig.from_pretrained(folder), patch.config, folder)
    _check_base_shape(folder / CONFIG_NAME, base_shape(model))
    tensors = _read_tensors(folder / HEADS_NAME)
    _check_tensors(tensors, parameters, folder / HEADS_NAME)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model


def read_heads_config(
    folder_or_id: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> LoCoCoConfig:
    """The config saved heads were trained with.

    Parameters
    ----------
    folder_or_id, revision, token
        As in `load_heads`.

    Returns
    -------
    LoCoCoConfig
        Fields this version does not know are named in a warning and left out.

    Raises
    ------
    ValueError
        If the config is invalid.
    OSError
        If there is no such folder, no config in it, or the Hub could not deliver it.
    """
    return LoCoCoConfig.from_pretrained(_local_folder(folder_or_id, revision, token))


def heads_digest(folder_or_id: str | os.PathLike) -> str:
    """SHA-256 of saved heads' weights, to tell one training from another."""
    return hashlib.sha256((_local_folder(folder_or_id, None, None) / HEADS_NAME).read_bytes()).hexdigest()


def push_heads(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload LoCoCo heads",
    **save_kwargs: Any,
) -> str:
    """Upload the heads of a patched model to the Hub.

    Parameters
    ----------
    model : torch.nn.Module
        A patched model.
    repo_id : str
        ``"org/name"``; the repository is made if missing.
    private : bool, optional
        Visibility of a new repository. None: the organisation's default.
    token : str or bool, optional
        Hub access token with the right to write.
    commit_message : str
        Title of the commit.
    **save_kwargs
        ``training``, ``metrics`` and ``dtype`` as in `save_heads`.

    Returns
    -------
    str
        Address of the repository.

    Raises
    ------
    ValueError
        If ``repo_id`` is not of the form ``"org/name"``, or for the reasons of `save_heads`.
    """
    if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id must have the form 'org/name', got {repo_id!r}")
    from huggingface_hub import HfApi

    files = _heads_files(model, repo_id, **save_kwargs)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(repository)


def _head_parameters(patch: Patch) -> dict[str, nn.Parameter]:
    """Every learned parameter by its name in the file, ``layers.{index}.{parameter}``, networks' under ``score.``."""
    parameters = {
        f"layers.{index}.{prefix}{name}": parameter
        for modules, prefix in ((patch.heads, ""), (patch.networks, NETWORK_PREFIX))
        for index, module in modules.items()
        for name, parameter in _active_head(module).named_parameters()
    }
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; load the model's weights first")
        if hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{name} lies in parts on several processes (FSDP): save and load heads inside "
                "lococo.extension.sharding.gathered(model), which puts them together"
            )
    return parameters


def _active_head(head: Any) -> nn.Module:
    """What the model reads with: the head itself, or the copy that PEFT's ``modules_to_save`` trains in its place."""
    if not hasattr(head, "modules_to_save"):
        return head
    is_original = head.disable_adapters or not head.active_adapters
    return head.original_module if is_original else head.modules_to_save[head.active_adapters[0]]


def _heads_files(
    model: nn.Module,
    source: str,
    training: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, bytes]:
    """Contents of a heads folder by file name; ``source`` is where its card says the heads are."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating dtype such as torch.bfloat16, got {dtype!r}")
    patch = patch_of(model, NO_HEADS)
    tensors = {
        name: parameter.detach().to("cpu", dtype, copy=True).contiguous()
        for name, parameter in _head_parameters(patch).items()
    }
    for name, tensor in tensors.items():
        _check_finite(name, tensor)
    _check_json("training", training)
    _check_json("metrics", metrics)
    base = base_config(model)
    content = {
        "format_version": FORMAT_VERSION,
        "config": patch.config.to_dict(),
        "base_model": {
            "name_or_path": _public_name(base.name_or_path or ""),
            "model_type": base.model_type,
            **base_shape(model),
        },
        "versions": {
            "lococo": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "training": training,
        "metrics": metrics,
    }
    return {
        CONFIG_NAME: (json.dumps(content, indent=2) + "\n").encode(),
        HEADS_NAME: safetensors_bytes(tensors, metadata={"format": "pt"}),
        CARD_NAME: model_card(content, source).encode(),
    }


def _public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a local path the last part, so that no folder of the author is published."""
    if HUB_ID.fullmatch(name_or_path) and not os.path.exists(name_or_path):
        return name_or_path
    return re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1]


def _check_json(name: str, values: dict[str, Any] | None) -> None:
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold plain finite JSON values, got {values!r}: {error}") from error


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    # Not every dtype, float8 for one, has isfinite.
    finite = tensor.float().isfinite()
    if not finite.all():
        raise ValueError(
            f"{name} must be finite, but {int((~finite).sum())} of {tensor.numel()} values in {tensor.dtype} are not"
        )


def _local_folder(folder_or_id: str | os.PathLike, revision: str | None, token: str | bool | None) -> Path:
    """The folder itself, or a download of the heads files of a Hub repository."""
    if not isinstance(folder_or_id, (str, os.PathLike)):
        raise TypeError(f"heads must be a folder or a Hub id, got {folder_or_id!r}")
    if os.path.isdir(folder_or_id):
        return Path(folder_or_id)
    name = os.fspath(folder_or_id)
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub id of the form 'org/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILE_NAMES)))
    except OSError as error:
        raise OSError(f"{name!r} is not a folder here, and the Hub did not deliver it: {error}") from error


def _check_config(saved: LoCoCoConfig, current: LoCoCoConfig, folder: Path) -> None:
    learned_score = ("score",) if saved.has_features or current.has_features else ()
    for field in HEAD_FIELDS + learned_score:
        theirs, ours = getattr(saved, field), getattr(current, field)
        if theirs != ours:
            raise ValueError(
                f"the heads in {folder} were trained with {field}={theirs!r}, but the model is patched with "
                f"{field}={ours!r}; lococo.patch_model(model, heads=...) patches it with their config"
            )


def _check_base_shape(path: Path, shape: dict[str, int]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={content.get('format_version')!r}, "
            f"this version of lococo reads {FORMAT_VERSION}, written by save_heads"
        )
    try:
        saved = {name: content["base_model"][name] for name in shape}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must give the base_model's {', '.join(shape)}: {error!r}") from error
    if saved != shape:
        raise ValueError(f"the heads were trained for a base model of shape {saved}, but this model has {shape}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: not a folder written by save_heads")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file, save or download it again: {error}") from error


def _check_tensors(tensors: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter], path: Path) -> None:
    missing = sorted(parameters.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - parameters.keys())
    if missing or surplus:
        raise ValueError(
            f"{path} must hold exactly the tensors of the model's heads; "
            f"missing: {', '.join(missing) or 'none'}; surplus: {', '.join(surplus) or 'none'}"
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)} in {path}, "
                f"but shape {tuple(parameter.shape)} in the model"
            )
        _check_finite(name, tensors[name].to(parameter.dtype))
