"""What a request may ask for: it is done, or refused by its name, and never passed over."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

# What is not done, and the values of it that ask for nothing else than what is done.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": (),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
TEXT_PARTS = ("text", "input_text", "output_text")


def _as_object(text: str) -> str:
    if not isinstance(json.loads(text), dict):
        raise ValueError("must be a JSON object")
    return text


class _Done(BaseModel):
    """Types and ranges of what is done."""

    model_config = ConfigDict(allow_inf_nan=False)

    stream: bool = False
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, gt=-1)  # it becomes a factor of repeated tokens, 1 + penalty
    max_tokens: int = 1
    max_completion_tokens: int = 1
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    stop: str | list[str] = ""
    logit_bias: dict[int, float] = {}
    generation_config: Annotated[str, AfterValidator(_as_object)] = "{}"
    chat_template_kwargs: dict[str, Any] = {}


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """A request's body without what asks for nothing, and with values of the types that they should have.

    Raises
    ------
    ValueError
        If it asks for what is not done, or a value is none of its kind; says which.
    """
    given = {name: value for name, value in body.items() if value is not None}
    _check_characters(given)
    for name in NOT_DONE.keys() & given.keys():
        if not _is_among(given[name], NOT_DONE[name]):
            raise ValueError(f"{name} is not served: leave out {name}={given[name]!r}")
    try:
        done = _Done.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as error:
        told = "; ".join(f"{_path(each['loc'])}: {each['msg']}, got {each['input']!r}" for each in error.errors())
        raise ValueError(told) from error
    if not done.get("logit_bias", True):
        del done["logit_bias"], given["logit_bias"]
    if given.get("tool_choice") == "none":
        given.pop("tools", None)
    return {**{name: value for name, value in given.items() if name not in NOT_DONE}, **done}


def _check_characters(body: dict[str, Any]) -> None:
    """Refuse texts that no tokenizer takes, as clients make them that cut a text by its UTF-16 units."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!r} is half a character: texts must be of whole ones") from error


def check_messages(messages: Any) -> None:
    """Refuse messages without a role, what is no text in them, and calls of tools without a function's name.

    Raises
    ------
    ValueError
        Says which message.
    """
    if not isinstance(messages, list):
        raise ValueError(f"messages must be a list, got {messages!r}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{number}] must have a role and a content, got {message!r}")
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
            if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"messages[{number}] must hold text alone, got a part of type {kind!r}")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"the text of messages[{number}] must be a string, got {part.get('text')!r}")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise ValueError(f"messages[{number}] must have tool_calls of functions with a name, got {calls!r}")


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def before(text: str, stops: Collection[str]) -> str:
    """A text up to the first of these strings that is in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def may_go_on(text: str, stops: Collection[str]) -> int:
    """Length of a text's end that one of these strings may begin with."""
    longest = max(map(len, stops), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((length for length in lengths if any(stop.startswith(text[-length:]) for stop in stops)), 0)


def _is_among(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether it is one of the others, where False is not 0."""
    return any(type(value) is type(each) and value == each for each in others)


def _path(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place))
