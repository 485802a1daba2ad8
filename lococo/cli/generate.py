"""The command ``lococo generate``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lococo.cli.options import RUN, TEXT, MethodOptions, ModelOptions, option, writable

if TYPE_CHECKING:
    import torch

    from lococo.document import SavedDocument
    from lococo.generation import Usage

ANSWER = "Answer"
STANDARD_INPUT = Path("-")


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How the tokens of an answer are chosen, by the names that Transformers has for it."""

    max_new_tokens: Annotated[int, option(ANSWER, "Maximum number of tokens in an answer.", min=1)] = 64
    do_sample: Annotated[
        bool, option(ANSWER, "Sample tokens; without it the likeliest token is taken.", "--do-sample")
    ] = False
    temperature: Annotated[
        float | None, option(ANSWER, "Logits are divided by it before a token is sampled.", show_default="the model's")
    ] = None
    top_p: Annotated[
        float | None,
        option(
            ANSWER, "Sample from the likeliest tokens that together have this probability.", show_default="the model's"
        ),
    ] = None
    top_k: Annotated[
        int | None,
        option(
            ANSWER, "Sample from this many of the likeliest tokens; 0: from all.", min=0, show_default="the model's"
        ),
    ] = None
    seed: Annotated[
        int | None, option(ANSWER, "Random seed, the same for every question.", min=0, show_default="by chance")
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``generate``.

        Raises
        ------
        ValueError
            If there is no such temperature or probability, or one is given where nothing is drawn.
        """
        drawing = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        given = {name: value for name, value in drawing.items() if value is not None}
        if given and not self.do_sample:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names} changes what is drawn, and nothing is drawn: add --do-sample")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must lie above 0, and be 1 at most, got {self.top_p}")
        given.pop("seed", None)
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample, **given}


@dataclasses.dataclass(frozen=True)
class DocumentOptions:
    """What is read and asked."""

    prompt_file: Annotated[
        Path | None, option(TEXT, "Text file to read; -, or neither this nor --prompt: standard input.")
    ] = None
    prompt: Annotated[str | None, option(TEXT, "Text to read.")] = None
    question: Annotated[
        list[str],
        option(
            TEXT,
            "Question about the text, one or several; each is answered on its own.",
            metavar="TEXT",
            show_default=False,
        ),
    ] = dataclasses.field(default_factory=list)
    max_prompt_tokens: Annotated[int | None, option(TEXT, "Maximum number of tokens of the text to read.", min=1)] = (
        None
    )
    no_chat: Annotated[
        bool,
        option(TEXT, "Append the question to the plain text, without the tokenizer's chat template.", "--no-chat"),
    ] = False
    save_cache: Annotated[
        Path | None,
        option(RUN, "File to write the cache of the text to, for later questions.", callback=writable),
    ] = None
    load_cache: Annotated[
        Path | None, option(RUN, "File from --save-cache, in place of a text; for the same model and method.")
    ] = None

    def check(self, is_full: bool) -> None:
        """Refuse options that do not go together, and words that are no text.

        Raises
        ------
        ValueError
            Says what would.
        """
        from lococo.cache.file import is_cache_file
        from lococo.data.documents import decoded_text

        for name, texts in (("--prompt", [self.prompt or ""]), ("--question", self.question)):
            for text in texts:
                decoded_text(text.encode(errors="surrogateescape"), name)  # the bytes that were typed
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("give the text to read once: either --prompt-file or --prompt")
        if (self.save_cache or self.load_cache) and is_full:
            raise ValueError("the full cache is not written to a file: choose a method with slots, or --heads")
        if self.save_cache and self.save_cache.exists() and not is_cache_file(self.save_cache):
            raise ValueError(f"--save-cache would replace {self.save_cache}, which holds no cache: give another name")
        if self.load_cache is None:
            return
        others = {
            "--prompt-file": self.prompt_file,
            "--prompt": self.prompt,
            "--max-prompt-tokens": self.max_prompt_tokens,
            "--no-chat": self.no_chat or None,
            "--save-cache": self.save_cache,
        }
        surplus = [name for name, value in others.items() if value is not None]
        if surplus:
            raise ValueError(f"--load-cache has a text that was read: leave out {', '.join(surplus)}")
        if not self.question:
            raise ValueError("--load-cache needs a --question about its text")

    def text(self) -> str:
        """The text to read.

        Raises
        ------
        ValueError
            If there is none.
        OSError
            If the file cannot be read.
        """
        from lococo.data.documents import decoded_text, read_text

        if self.prompt is not None:
            return self.prompt
        if self.prompt_file is not None and self.prompt_file != STANDARD_INPUT:
            return read_text(self.prompt_file)
        is_asked = self.prompt_file == STANDARD_INPUT or not sys.stdin.isatty()
        text = decoded_text(sys.stdin.buffer.read(), "standard input") if is_asked else ""
        if not text:
            raise ValueError("give the text to read: either --prompt-file or --prompt, or on standard input")
        return text


def generate(source: ModelOptions, method: MethodOptions, texts: DocumentOptions, answers: AnswerOptions) -> None:
    """Read a long text and answer questions about it, or continue it.

    The text is read once for all questions. After --save-cache, --load-cache asks more without reading it again.

    Example: lococo generate --model MODEL --prompt-file book.txt --question "Who is the narrator?" --num-slots 256
    """
    from lococo.document import SavedDocument, text_ids
    from lococo.methods import as_method

    config, arguments = method.config(), answers.arguments()
    texts.check(is_full=config is None)
    read = SavedDocument.load(texts.load_cache) if texts.load_cache else texts.text()
    model, tokenizer = source.load()
    with as_method(model, config, method.heads):
        answerer = Answerer(model, tokenizer, arguments, answers.seed)
        if texts.question or texts.save_cache or not isinstance(read, str):
            usages = _ask(answerer, texts, read, method.heads)
        else:
            usages = [answerer.answer(text_ids(tokenizer, read, texts.max_prompt_tokens))]
    print(f"\n{functools.reduce(operator.add, usages).summary()}")
    if texts.save_cache:
        print(f"{texts.save_cache}: what is kept of the text; --load-cache asks more about it")


def _ask(answerer: Answerer, texts: DocumentOptions, read: str | SavedDocument, heads: str | None) -> list[Usage]:
    """Answer questions about a text, or one that was read before; all are looked at before anything is read."""
    from lococo.document import Document, save_document
    from lococo.generation import read_beginning

    model, tokenizer = answerer.model, answerer.tokenizer
    if isinstance(read, str):
        document = Document.of(tokenizer, read, texts.max_prompt_tokens, is_chat=not texts.no_chat)
    else:
        document = read.document(model, tokenizer, heads)
    prompts = [document.prompt(question) for question in texts.question]
    if not isinstance(read, str):
        return answerer.answers(texts.question, prompts, read.cache.to(model.device))
    longest = max((prompt.shape[1] for prompt in prompts), default=None)
    cache, usage = read_beginning(model, document.ids.to(model.device), length=longest)
    if texts.save_cache:
        save_document(texts.save_cache, document, cache, model, heads)
    return [usage, *answerer.answers(texts.question, prompts, cache)]


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Prints answers of a model token by token.

    Attributes
    ----------
    arguments : dict
        Of ``generate``.
    seed : int, optional
        Set before every answer.
    """

    model: Any
    tokenizer: Any
    arguments: dict[str, Any]
    seed: int | None

    def answer(self, prompt: torch.Tensor, cache: Any = None) -> Usage:
        """Go on with a prompt of which the cache has read the first tokens, and tell what it took."""
        import torch
        from transformers import TextStreamer

        from lococo.generation import read_and_answer

        if self.seed is not None:
            torch.manual_seed(self.seed)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids, is_long = prompt.to(self.model.device), cache is None
        return read_and_answer(self.model, ids, cache, progress=is_long, streamer=streamer, **self.arguments).usage

    def answers(self, questions: Sequence[str], prompts: Sequence[torch.Tensor], cache: Any) -> list[Usage]:
        """Answer one question after another, each on a copy of the cache that has read what all prompts begin with."""
        usages = []
        for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True), start=1):
            if len(questions) > 1:
                print(f"> {question}")
            own = copy.deepcopy(cache) if number < len(questions) else cache
            usages.append(self.answer(prompt, own))
        return usages
