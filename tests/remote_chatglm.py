"""The original ChatGLM code, from packages that carry a copy of it. Never part of this repository: fetched once."""

import functools
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import transformers

CACHE = Path(__file__).parents[1] / ".demo/chatglm"
UNAVAILABLE: dict[str, str] = {}
SDIST = ("--no-binary", ":all:", "--no-build-isolation")
CHATGLM2 = "colossalai/shardformer/modeling/chatglm2_6b"
KOLORS = "diffusers/pipelines/kolors"


@functools.cache
def colossalai_chatglm():
    """(config class, model class with an LM head) as published with ChatGLM2."""
    modules = [f"{CHATGLM2}/configuration_chatglm.py", f"{CHATGLM2}/modeling_chatglm.py"]
    configuration, modeling = _import("colossalai==0.3.6", modules, *SDIST)
    return _complete(configuration.ChatGLMConfig), modeling.ChatGLMForConditionalGeneration


@functools.cache
def diffusers_chatglm():
    """(config class, model class without an LM head) as adapted for ChatGLM3 in an image generator."""
    # All it takes of the package around it.
    utils = types.ModuleType("original_diffusers.utils")
    utils.logging = transformers.utils.logging
    sys.modules[utils.__name__] = utils
    (text_encoder,) = _import("diffusers==0.42.1", [f"{KOLORS}/text_encoder.py"])
    return _complete(text_encoder.ChatGLMConfig), text_encoder.ChatGLMModel


def _complete(original):
    """The config class with the fields that its model reads and that no config has by itself any more."""

    class ChatGLMConfig(original):
        def __init__(self, **fields):
            super().__init__(**fields)
            self.use_cache = True
            self.max_length = self.seq_length
            self.original_rope = True

    return ChatGLMConfig


def _import(requirement, members, *options):
    """Modules of a distribution by their paths in it, as ``original_<package>.<path>``."""
    folder = _fetch(requirement, members, *options)
    name = requirement.split("==")[0]
    package = types.ModuleType(f"original_{name}")
    package.__path__ = [str(folder / name)]
    sys.modules[package.__name__] = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script and others are deprecated since
        return [
            importlib.import_module("original_" + ".".join(PurePosixPath(member).with_suffix("").parts))
            for member in members
        ]


def _fetch(requirement, members, *options):
    """Folder that holds these members of a distribution, downloaded by pip as it is configured here."""
    folder = CACHE / requirement
    if not folder.is_dir() and requirement not in UNAVAILABLE:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            download = [sys.executable, "-m", "pip", "download", "--retries", "1", "--no-deps", "--dest", scratch]
            result = subprocess.run([*download, *options, requirement], capture_output=True, text=True)
            if result.returncode:
                UNAVAILABLE[requirement] = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
            else:
                _extract(Path(scratch), members, folder)
    if requirement in UNAVAILABLE:
        pytest.fail(f"the original code in {requirement} cannot be downloaded: {UNAVAILABLE[requirement]}")
    return folder


def _extract(scratch, members, folder):
    """Members of the only archive in a folder, moved to their place once they are complete."""
    (archive,) = scratch.iterdir()
    for member in members:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(member)
        else:
            with tarfile.open(archive) as sdist:
                content = sdist.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{member}").read()
        path = scratch / "members" / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        os.rename(scratch / "members", folder)
    except OSError:
        assert folder.is_dir(), "only another process that fetched the same may be in the way"
