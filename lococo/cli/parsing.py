"""How a function becomes a command: its groups of options laid out, its lists taken word by word."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Sequence
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
        lists = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, spread(args, lists))


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
