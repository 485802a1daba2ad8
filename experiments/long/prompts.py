"""Prompts as token ids: the chat format, and lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.long.items import Item


class Prompts:
    """How items become token ids.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    chat : bool
        Put prompts into the tokenizer's chat template, as a user's turn, but those of items that are continued.

    Raises
    ------
    ValueError
        If there is no chat template.
    """

    def __init__(self, tokenizer: Any, chat: bool = False) -> None:
        if chat and not tokenizer.chat_template:
            raise ValueError("--chat needs a tokenizer with a chat template, and this one has none")
        self.tokenizer, self.chat = tokenizer, chat

    def ids(self, item: Item, option: str | None = None) -> list[int]:
        """Token ids of the prompt, with an answer after it if one is given."""
        text = item.before + item.document + item.after
        is_turn = self.chat and not item.is_continued
        if is_turn:
            turns = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        if option is not None:
            text += option if is_turn or text.endswith(("\n", " ", "：")) else f" {option}"
        return self.tokenizer(text, add_special_tokens=not is_turn).input_ids

    def cut(self, item: Item, limit: int) -> Item:
        """The item with the middle of its document left out, so that the prompt has at most ``limit`` tokens.

        Raises
        ------
        ValueError
            If the rest of the prompt is longer than that.
        """
        surplus = len(self.ids(item)) - limit
        whole = self.tokenizer(item.document, add_special_tokens=False).input_ids
        kept = len(whole)
        shorter = item
        while surplus > 0:
            if not kept:
                raise ValueError(f"a prompt has {limit + surplus} tokens without its document, more than {limit}")
            kept = max(kept - surplus, 0)
            start, end = whole[: (kept + 1) // 2], whole[len(whole) - kept // 2 :]
            document = "".join(self.tokenizer.decode(part, skip_special_tokens=True) for part in (start, end))
            shorter = dataclasses.replace(item, document=document)
            surplus = len(self.ids(shorter)) - limit
        return shorter


def shared_start(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with."""
    first, *others = sequences
    for place, token in enumerate(first):
        if any(place >= len(other) or other[place] != token for other in others):
            return place
    return len(first)
