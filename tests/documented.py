"""Commands and Python that the pages show, and what is wrong with a command, as far as it shows without running it."""

import functools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import typer
from typer.core import TyperCommand

from lococo.cli.main import _app
from lococo.cli.parsing import Group

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SHELL = ("bash", "sh", "shell", "console")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)

# Commands of others, whose options nothing here can tell, and why that is enough.
UNCHECKED = {
    "vllm": "vLLM pins a torch of its own: make test-vllm starts this server; what LoCoCo is told is checked here",
    "curl": "asks that server; the JSON that is sent is checked here",
}


def blocks(page, *languages):
    """The text of the fenced blocks of a page in these languages."""
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def shell_lines(page):
    """The commands in a page's blocks, each in one line and without comments; of a console what is typed."""
    found = []
    for body in blocks(page, *SHELL):
        lines = re.sub(r"\\\n\s*", " ", body).splitlines()
        typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
        found += [line.strip() for line in typed if shlex.split(line, comments=True)]
    return found


def spans(page):
    """Code in the running text of a page, as one line each."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def problem(line):
    """What is wrong with a command line, or None."""
    words = shlex.split(line, comments=True)
    if "&&" in words or "|" in words or ";" in words:
        joined = next(word for word in words if word in ("&&", "|", ";"))
        place = words.index(joined)
        return problem(shlex.join(words[:place])) or problem(shlex.join(words[place + 1 :]))
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program, arguments = Path(words[0]).name if words else "", words[1:]
    if program == "accelerate" and "-m" in arguments:
        program, arguments = "python", arguments[arguments.index("-m") :]
    if program.startswith("python"):
        return _problem_of_python(tuple(arguments))
    checks = {"lococo": _problem_of_lococo, "make": _problem_of_make, "pip": _problem_of_pip, "cd": _no_problem}
    if program in checks:
        return checks[program](arguments)
    return _problem_of_json(program, arguments) if program in UNCHECKED else f"nothing checks the command {program!r}"


def option_names():
    """Every option of every command of ``lococo``."""
    names, commands = set(), [_command()]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        names |= {name for param in command.params for name in [*param.opts, *param.secondary_opts]}
    return names | {"--help"}


def named_targets():
    """Targets of the Makefile; a percent sign stands for any characters."""
    rules = re.findall(r"^([^\s#:=][^:=\n]*):(?!=)", MAKEFILE, flags=re.MULTILINE)
    return {name for rule in rules for name in rule.split()}


@functools.cache
def _command():
    return typer.main.get_command(_app())


def _problem_of_lococo(words):
    """What lococo's own parser says; dots stand for what a line leaves out."""
    given, command, path = [word for word in words if word != "..."], typer.main.get_command(_app()), "lococo"
    while isinstance(command, Group) and given and not given[0].startswith("-"):
        if given[0] not in command.commands:
            return f"{path} has no command {given[0]!r}"
        path, command = f"{path} {given[0]}", command.commands[given.pop(0)]
    if "..." in words:
        for param in command.params:
            param.required = False
    try:
        command.make_context(path, given)
    except typer.Exit:  # of --help and --version
        return None
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return f"{path}: {error.format_message()}"
    return None


@functools.cache
def _problem_of_python(words):
    modules = {"lococo": _problem_of_lococo, "pip": _problem_of_pip, "venv": _no_problem}
    if words[0] == "-m" and words[1] in modules:
        return modules[words[1]](list(words[2:]))
    run = subprocess.run(
        [sys.executable, __file__, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = run.stderr.strip() or f"python {' '.join(words)}: status {run.returncode}"
    return said if run.returncode else None


def _problem_of_make(words):
    targets = [word for word in words if word != "..." and "=" not in word and not word.startswith("-")]
    known = named_targets()
    for target in targets:
        if target not in known:
            return f"the Makefile has no target {target!r}"
    for name in (word.partition("=")[0] for word in words if "=" in word):
        if not re.search(rf"\b{re.escape(name)}\b", MAKEFILE):
            return f"the Makefile knows no {name}"
    return None


def _problem_of_pip(words):
    for name in re.findall(r"(?:lococo[^\s\[]*|^\.)\[([^\]]+)\]", "\n".join(words), flags=re.MULTILINE):
        if unknown := set(re.split(r"\s*,\s*", name)) - extras().keys():
            return f"lococo has no extra {sorted(unknown)}"
    return None


def _problem_of_json(program, words):
    for word in words:
        if word.startswith("{"):
            try:
                content = json.loads(word)
            except ValueError as error:
                return f"{program}: {error} in {word}"
            if "lococo" in content:
                from lococo.vllm.settings import Settings

                try:
                    Settings.of(content["lococo"])
                except (OSError, ValueError) as error:
                    return f"{program}: {error}"
    return None


def _no_problem(words):
    return None


@functools.cache
def extras():
    """The optional dependencies that pyproject.toml names, by extra."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = lines.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    found = re.findall(r"^([\w-]+) = \[(.*?)\][ ]*(?:#[^\n]*)?$", table, flags=re.DOTALL | re.MULTILINE)
    return {name: re.findall(r'"([^"]+)"', listed) for name, listed in found}


class _Parsed(BaseException):
    """A command has read its words."""


def _parse_only(words):
    """Run a script, or with -m a module, up to where it has read its words; dots stand for what they leave out."""
    parse_args, make_context = ArgumentParser.parse_args, TyperCommand.make_context

    def stop(self, *args, **kwargs):
        for action in self._actions if "..." in words else ():
            action.required = False
        parse_args(self, *args, **kwargs)
        raise _Parsed

    def stop_command(self, *args, **kwargs):
        for param in self.params if "..." in words else ():
            param.required = False
        make_context(self, *args, **kwargs)
        raise _Parsed

    ArgumentParser.parse_args, TyperCommand.make_context = stop, stop_command
    given = [word for word in words if word != "..."]
    is_module = given[0] == "-m"
    sys.argv = given[is_module:]
    try:
        if is_module:
            runpy.run_module(given[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(given[0], run_name="__main__")
    except _Parsed:
        return
    sys.exit(f"{' '.join(words)}: ended before its words were read")


if __name__ == "__main__":
    _parse_only(sys.argv[1:])
