"""The command line: ``lococo generate | serve | calibrate | extend | eval | inspect | bench | convert-chatglm``."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from lococo.cli import bench, evaluate
from lococo.cli.calibrate import calibrate
from lococo.cli.convert_chatglm import convert_chatglm
from lococo.cli.extend import extend
from lococo.cli.generate import generate
from lococo.cli.inspect import inspect
from lococo.cli.needles import needles
from lococo.cli.parsing import add_command, command_group
from lococo.cli.serve import serve
from lococo.version import __version__

# What a wrong value or a missing file, package or device ends in: one line instead of a traceback.
BAD_INPUT = (ValueError, OSError, ImportError, FloatingPointError)
HELP_OPTIONS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends with one line on stderr and status 2."""
    return run(_app(), "lococo", arguments)


def run(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run an app's command. Bad input ends with one line on stderr and status 2.

    Parameters
    ----------
    app : typer.Typer
    program : str
        What is typed to start it; commands find it with all that follows in their context's ``obj``.
    arguments : sequence of str, optional
        None: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, typed = typer.main.get_command(app), " ".join([program, *map(shlex.quote, words)])
    try:
        with _plain_warnings(), command.make_context(program, words, obj=typed, **HELP_OPTIONS) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except (BrokenPipeError, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, BrokenPipeError):  # as rich turns it into
            raise
        # Who reads what is printed has read enough, as in lococo | head -1. What is left has no way to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        # What is wrong with the words themselves has no common class in all releases of typer.
        is_usage = hasattr(error, "format_message")
        if not (is_usage or isinstance(error, BAD_INPUT)):
            raise
        print(f"lococo: error: {_usage_error(error) if is_usage else _words_of(error)}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings in a line, without the code that gave them."""
    as_ever = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **more: f"lococo: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = as_ever


def _usage_error(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return error.format_message() + (f" ({context.command_path} --help shows what there is)" if context else "")


def _words_of(error: Exception) -> str:
    """An error as a sentence: one of the system's, too, begins with the file."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error)


def _app() -> typer.Typer:
    app = command_group("Read long texts with a language model in a fixed number of key-value slots.")
    app.callback()(_root)
    add_command(app, "generate", generate)
    add_command(app, "serve", serve)
    add_command(app, "calibrate", calibrate)
    add_command(app, "extend", extend)
    evaluations = command_group("Measure quality: perplexity, tasks, needles.")
    add_command(evaluations, "ppl", evaluate.perplexity)
    add_command(evaluations, "tasks", evaluate.tasks)
    add_command(evaluations, "needles", needles)
    add_command(evaluations, "extended", evaluate.extended)
    app.add_typer(evaluations, name="eval")
    add_command(app, "inspect", inspect)
    benchmarks = command_group("Measure speed and memory.")
    add_command(benchmarks, "memory", bench.memory)
    add_command(benchmarks, "prefill", bench.prefill)
    add_command(benchmarks, "decode", bench.decode)
    app.add_typer(benchmarks, name="bench")
    add_command(app, "convert-chatglm", convert_chatglm)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lococo {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Read long texts with a language model in a fixed number of key-value slots."""


if __name__ == "__main__":
    sys.exit(main())
