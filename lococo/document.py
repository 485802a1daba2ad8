"""A text that is read once and asked about many times, what prompts begin with, and its cache in a file."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import re
from typing import Any

import torch
from torch import nn

from lococo.cache.cache import LoCoCoCache
from lococo.cache.file import load_notes, save_cache
from lococo.digest import model_digest
from lococo.heads import heads_digest
from lococo.models import base_shape
from lococo.state import patch_of

KEY = "lococo_document"
PROBES = ("", "?", "a")  # questions that have no beginning in common
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # what a chat template calls for the date


def text_ids(tokenizer: Any, text: str, max_tokens: int | None = None) -> torch.Tensor:
    """(1, tokens) ids of a text, cut to its first tokens.

    Raises
    ------
    ValueError
        If the text is empty.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens]
    if not ids.shape[1]:
        raise ValueError("the prompt is empty")
    return ids


def _first_tokens(tokenizer: Any, text: str, max_tokens: int | None) -> str:
    """What the first tokens of a longer text stand for."""
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer.decode(tokenizer(text).input_ids[:max_tokens], skip_special_tokens=True)
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping
    # A character of several tokens is in the offsets of each, a special token at the end in none.
    starts = [start for start, end in offsets[max_tokens:] if end > start]
    return text[: min([max(end for _, end in offsets[:max_tokens]), *starts])]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to be asked about.

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    text : str
        A question follows it after an empty line.
    is_chat : bool
        Whether both stand in the tokenizer's chat template, as what the user says.
    time : datetime.datetime
        The present for a chat template that tells the date: the prompts of all questions begin alike, at any time.
    """

    tokenizer: Any
    text: str
    is_chat: bool
    time: datetime.datetime = dataclasses.field(default_factory=datetime.datetime.now)

    @classmethod
    def of(cls, tokenizer: Any, text: str, max_tokens: int | None = None, is_chat: bool = True) -> Document:
        """A text, cut to its first tokens, in the chat template if the tokenizer has one and ``is_chat``.

        A character that is only in part in these tokens is left out.

        Raises
        ------
        ValueError
            If the text is empty.
        """
        if text_ids(tokenizer, text).shape[1] > (max_tokens or float("inf")):
            text = _first_tokens(tokenizer, text, max_tokens)
        return cls(tokenizer, text, is_chat and bool(tokenizer.chat_template))

    def prompt(self, question: str) -> torch.Tensor:
        """(1, tokens) ids of the text and a question; the first are ``ids``.

        Raises
        ------
        ValueError
            If the question changes how the text's last token is written.
        """
        prompt = self._prompt(question)
        if not torch.equal(prompt[:, : self.ids.shape[1]], self.ids):
            raise ValueError(f"the text ends in other tokens before the question {question!r}: ask it in other words")
        return prompt

    def _prompt(self, question: str) -> torch.Tensor:
        content = f"{self.text}\n\n{question}"
        if not self.is_chat:
            return text_ids(self.tokenizer, content)
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            **({"chat_template": self._dated_template()} if self.tells_time else {}),
        )
        return chat["input_ids"]

    @property
    def tells_time(self) -> bool:
        """Whether the prompts may have a date in them."""
        return self.is_chat and NOW.search(str(self.tokenizer.chat_template)) is not None

    def _dated_template(self) -> str:
        """The chat template with dates in the place of calls for them."""
        return NOW.sub(lambda call: json.dumps(self.time.strftime(call[2])), self.tokenizer.get_chat_template())

    @functools.cached_property
    def ids(self) -> torch.Tensor:
        """(1, tokens) ids that the prompts of all questions begin with.

        Raises
        ------
        ValueError
            If there are none.
        """
        prompts = [self._prompt(question)[0] for question in PROBES]
        shortest = min(map(len, prompts))
        alike = torch.stack([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts]).all(dim=0)
        length = int(alike.long().cumprod(0).sum())
        if not length:
            raise ValueError(
                f"the text {self.text!r} is too short to be asked about: no token of it is there for sure"
            )
        return prompts[0][None, :length]


def save_document(
    path: str | os.PathLike, document: Document, cache: LoCoCoCache, model: nn.Module, heads: str | None = None
) -> None:
    """Write the cache after a document into one file, with its text and tokens, and by which weights it was read.

    ``LoCoCoCache.load`` reads such a file, too.

    Parameters
    ----------
    model : torch.nn.Module
        Patched as it was when it read the document.
    heads : str, optional
        Folder or Hub id of the trained heads it was patched with.
    """
    notes = {
        "text": document.text,
        "is_chat": document.is_chat,
        "time": document.time.isoformat() if document.tells_time else None,
        "tokens": document.ids[0].tolist(),
        "dtype": str(patch_of(model).decoder.dtype),
        "weights": model_digest(model),
        "heads": heads and heads_digest(heads),
    }
    save_cache(cache, path, {KEY: json.dumps(notes)})


@dataclasses.dataclass(frozen=True)
class SavedDocument:
    """What a file of ``save_document`` holds.

    Attributes
    ----------
    path : str or os.PathLike
    cache : LoCoCoCache
    notes : dict
        The text, its tokens, and by what it was read.
    """

    path: str | os.PathLike
    cache: LoCoCoCache
    notes: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike) -> SavedDocument:
        """Read a file.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no whole file of a cache, or holds no text.
        """
        cache = LoCoCoCache.load(path)
        notes = load_notes(path).get(KEY)
        if notes is None:
            raise ValueError(f"{path} holds a cache without its text: lococo generate --save-cache writes both")
        return cls(path, cache, json.loads(notes))

    def document(self, model: nn.Module, tokenizer: Any, heads: str | None = None) -> Document:
        """The document, for the model and method that have read it.

        Parameters
        ----------
        model : torch.nn.Module
            Patched.
        heads : str, optional
            Folder or Hub id of the trained heads it is patched with.

        Raises
        ------
        ValueError
            If another model, method, or dtype is to go on, or the tokenizer gives other tokens; names what differs.
        """
        patch, path, notes = patch_of(model), self.path, self.notes
        self.cache.check_fits(patch.config, base_shape(model), str(path))
        if notes["dtype"] != str(patch.decoder.dtype):
            raise ValueError(
                f"{path} was read in {notes['dtype']}, the model is in {patch.decoder.dtype}: give --dtype"
            )
        if notes["weights"] != model_digest(model):
            raise ValueError(f"{path} was read by a model with other weights or another config")
        if notes["heads"] != (heads and heads_digest(heads)):
            used = "other" if notes["heads"] else "no"
            raise ValueError(f"{path} was read with {used} trained heads: choose --heads or --method as then")
        time = {"time": datetime.datetime.fromisoformat(notes["time"])} if notes.get("time") else {}
        document = Document(tokenizer, notes["text"], notes["is_chat"], **time)
        if document.ids[0].tolist() != notes["tokens"]:
            raise ValueError(f"{path} was read with another tokenizer or chat template: other tokens come of its text")
        return document
