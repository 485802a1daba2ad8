"""How a function becomes a command: its groups of options laid out, its lists taken word by word."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class Group(TyperGroup):
    """Commands that show their help when none of them is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Words of the command line for the group."""
        return super().parse_args(ctx, args or ["--help"])


class Command(TyperCommand):
    """A command whose lists may be written in one: ``--num-slots 128 256`` for ``--num-slots 128 --num-slots 256``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Words of the command line for the command."""
        named = {name: option for option in self.get_params(ctx) for name in option.opts if name.startswith("-")}
        lists = {name for name, option in named.items() if getattr(option, "multiple", False)}
        counts = {name: 0 if getattr(option, "is_flag", False) else option.nargs for name, option in named.items()}
        return super().parse_args(ctx, up_to_missing(spread(args, lists), counts))


def spread(words: Sequence[str], lists: Collection[str]) -> list[str]:
    """Words in which every value of a list has the option's name before it.

    Parameters
    ----------
    words : sequence of str
        Of a command line.
    lists : collection of str
        Names of the options that take several values.
    """
    found: list[str] = []
    repeated, values = "", 0  # the list that is being read, and how many of its values have been
    for word in words:
        if re.match(r"-+[a-zA-Z]|--$", word):
            name, equals, _ = word.partition("=")
            repeated, values = (name, len(equals)) if name in lists else ("", 0)
        elif repeated:
            found += [repeated] if values else []
            values += 1
        found.append(word)
    return found


def up_to_missing(words: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """Words up to an option's name where another option's value should stand, so that the value is found missing.

    An empty value counts as none.

    Parameters
    ----------
    words : sequence of str
        Of a command line, lists spread.
    counts : mapping of str to int
        How many words each option takes.
    """
    missing = 0  # words that the last option still takes
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if missing and (word in counts or not word):
            return list(words[:place])
        if missing:
            missing -= 1
        elif word == "--":
            break
        elif name in counts:
            if equals and not value:
                return [*words[:place], name]
            missing = counts[name] - len(equals)
    return list(words)


def command_group(help: str) -> typer.Typer:
    """An app, or a group of its commands."""
    return typer.Typer(cls=Group, help=help, add_completion=False, rich_markup_mode="rich")


def add_command(app: typer.Typer, name: str, function: Callable[..., Any]) -> None:
    """Make a function a command of an app; its docstring is the help."""
    app.command(name, cls=Command)(laid_out(function))


def laid_out(function: Callable[..., Any]) -> Callable[..., None]:
    """A function that takes the fields of its parameters that are dataclasses one by one, each as an option."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += _parameters(groups[name]) if name in groups else [parameter]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]

    @functools.wraps(function)
    def command(**options: Any) -> None:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            options[name] = group(**{field: options.pop(field) for field in fields})
        function(**options)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters(group: Any) -> list[inspect.Parameter]:
    """The parameters that make a dataclass."""
    found = []
    for name, parameter in inspect.signature(group, eval_str=True).parameters.items():
        factory = group.__dataclass_fields__[name].default_factory
        found.append(parameter if factory is dataclasses.MISSING else parameter.replace(default=factory()))
    return found
