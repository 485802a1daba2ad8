"""The command that writes task files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.task_files import few_shot, generated, longbench

NAMES = (*few_shot.FILES, *longbench.NAMES, *generated.NAMES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for; of all tasks those that the folder has files for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.task_files", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with a folder of files per set")
    parser.add_argument("--haystack", type=Path, help="texts that hide needles and facts, .jsonl with a text per line")
    parser.add_argument("--samples", type=int, default=500, help="of generated tasks (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    options = parser.parse_args(arguments)
    for name in options.tasks or NAMES:
        try:
            write_task(name, options)
        except (FileNotFoundError, longbench.OtherPrompt) as error:
            if options.tasks:
                raise
            print(f"{name} is left out: {error}")


def write_task(name: str, options: argparse.Namespace) -> None:
    """Write one task file, and its data beside it."""
    options.output.mkdir(parents=True, exist_ok=True)
    if name in few_shot.FILES:
        few_shot.write_task(name, options.data_dir, options.output)
    elif name in longbench.NAMES:
        longbench.write_task(name, options.data_dir, options.output)
    else:
        generated.write_task(name, options.data_dir, options.haystack, options.samples, options.output)


if __name__ == "__main__":
    main()
