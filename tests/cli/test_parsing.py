"""Help, lists, groups of options, and tables."""

import dataclasses
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

import lococo
from lococo.cli import options
from lococo.cli.main import _app, main
from lococo.cli.parsing import Group, add_command, spread, up_to_missing
from lococo.cli.terminal import print_table

COMMANDS = [
    ["generate"],
    ["calibrate"],
    ["extend"],
    ["eval", "ppl"],
    ["eval", "tasks"],
    ["eval", "needles"],
    ["eval", "extended"],
    ["inspect"],
    ["bench", "memory"],
    ["bench", "prefill"],
    ["bench", "decode"],
    ["convert-chatglm"],
]
USING = Path(__file__).parents[2] / "docs/using.md"
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*words, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"Usage: lococo {' '.join(words)}" in said
    assert f"Example: lococo {' '.join(words)} " in " ".join(said.split())


def parsed(words):
    """Options of the command that is named, without running it."""
    command, name = typer.main.get_command(_app()), "lococo"
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(typer.Context(command), words)
    return command.make_context(name, words).params


def test_the_commands_of_a_page_are_understood():
    blocks = re.findall(r"```bash\n(.*?)```", USING.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("lococo ")]
    assert len(lines) > 8
    given = {line: parsed(shlex.split(line, comments=True)[1:]) for line in lines}
    assert any(options.get("lengths") == [4096, 16384] for options in given.values())


@pytest.mark.parametrize(
    ("words", "shown"), [([], "calibrate"), (["eval"], "needles"), (["bench"], "decode"), (["-h"], "bench")]
)
def test_without_a_command_there_is_help(words, shown, capsys):
    assert main(words) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["calibrate", "--help"], ["serve", "--help"], ["bench", "decode", "--help"]]
)
def test_help_imports_nothing_heavy(words):
    code = f"import sys; from lococo.cli.main import main; main({words})"
    code += f"; sys.exit(str([name for name in {HEAVY} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == "[]\n"


def test_the_package_loads_its_names_when_they_are_asked_for():
    assert all(getattr(lococo, name) is not None for name in lococo.__all__)
    with pytest.raises(AttributeError, match="module 'lococo' has no attribute 'patch_models'"):
        lococo.patch_models  # noqa: B018


IMPORTED_FIRST = """
import os, sys, lococo
assert "torch" not in sys.modules and set(lococo.__all__) <= set(dir(lococo))
from transformers import GenerationMixin, PreTrainedModel  # which take their time, once for all
for statement in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(statement)
        from lococo.config import LoCoCoConfig
        LoCoCoConfig(8, score="distant", compressor="conv")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(statement)
"""


def test_every_module_can_be_imported_first():
    modules = ["config", "compression.select", "kernels.scoring", "patch", "cache.cache"]
    statements = ["from lococo import *; patch_model, LoCoCoConfig(8)", *(f"import lococo.{each}" for each in modules)]
    command = [sys.executable, "-c", IMPORTED_FIRST, *statements]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_defaults_of_the_help_are_those_of_the_library():
    assert lococo.LoCoCoConfig.num_slots == options.NUM_SLOTS
    from lococo.methods import METHODS

    assert set(options.METHODS.removesuffix(", ...").split(", ")) <= set(METHODS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--n 1 2 --m a", "--n 1 --n 2 --m a"),
        ("--n=1 2 --m a b", "--n=1 --n 2 --m a b"),
        ("--n 1 --n 2", "--n 1 --n 2"),
        ("--n -1 -2", "--n -1 --n -2"),
        ("x --n 1 -h 2", "x --n 1 -h 2"),
        ("--n 1 -- 2", "--n 1 -- 2"),
    ],
)
def test_lists_are_spread(words, expected):
    assert spread(words.split(), {"--n"}) == expected.split()


def test_spreading_adds_names_of_lists_alone():
    for words in itertools.product(["--n", "--m", "1", "-2", "--n=1"], repeat=5):
        once = spread(words, {"--n"})
        assert [word for word in once if word != "--n"] == [word for word in words if word != "--n"]
        assert spread(once, {"--n"}) == once


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--n 1 --m a b --on", None),
        ("x --n --m a b", "x --n"),
        ("--m a --n 1", "--m a"),
        ("--n --n 1", "--n"),
        ("--n --m=a", None),  # no name of an option, as it stands
        ("--n -1 --on x", None),
        ("--on --n 1", None),
        ("--n=1 --m=a b --n", None),
        ("--n= --m a b", "--n"),
        ("-- --n --m", None),
    ],
)
def test_an_option_is_not_taken_for_the_value_of_another(words, expected):
    assert up_to_missing(words.split(), {"--n": 1, "--m": 2, "--on": 0}) == (expected or words).split()
    assert up_to_missing(["--n", "", "--on"], {"--n": 1, "--on": 0}) == ["--n"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("eval ppl --model x --data --num-slots 16", "--data"),
        ("eval ppl --model x --num-slots --data x", "--num-slots"),
        ("eval ppl --model --data x", "--model"),
        ("eval ppl --model x --data", "--data"),
        ("eval ppl --model x --data a --data --help", "--data"),
        ("calibrate --output --model x", "--output"),
    ],
)
def test_a_missing_value_is_named(words, name, capsys):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"lococo: error: Option '{name}' requires an argument.")


@pytest.mark.parametrize("name", ["--model", "--data", "--methods", "--output"])
def test_an_empty_value_is_none(name, capsys):
    for words in ([name, ""], [f"{name}="]):
        assert main(["eval", "ppl", *words, "--num-slots", "8"]) == 2
        assert capsys.readouterr().err.startswith(f"lococo: error: Option '{name}' requires an argument.")


@pytest.mark.parametrize("words", [["calibrate", "--help"], ["--version"]])
def test_a_reader_that_leaves_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-m", "lococo", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_other_ways_out_are_not_taken_for_it(monkeypatch):
    monkeypatch.setattr("lococo.cli.main._app", lambda: sys.exit(3))
    with pytest.raises(SystemExit):
        main([])


def test_groups_are_laid_out_as_options(capsys):
    @dataclasses.dataclass(frozen=True)
    class Size:
        width: Annotated[int, options.option("Size", "Columns.")]
        depths: Annotated[list[int], options.option("Size", "Rows.")] = dataclasses.field(default_factory=lambda: [3])

    given = []

    def draw(size: Size, *, name: Annotated[str, options.option("Name", "Name.")] = "x") -> None:
        """Draw."""
        given.append((size, name))

    app = typer.Typer(cls=Group, add_completion=False)
    app.callback()(lambda: None)
    add_command(app, "draw", draw)
    for words in (["--width", "2"], ["--width", "2", "--depths", "4", "5", "--name", "y"]):
        typer.main.get_command(app).main(["draw", *words], standalone_mode=False)
    assert given == [(Size(2, [3]), "x"), (Size(2, [4, 5]), "y")]


def test_a_table_fits_and_says_once_what_is_alike(capsys):
    rows = [
        {"method": "lococo-uncalibrated-slot", **{f"figure_{index}": 1.23456 * index * row for index in range(20)}}
        for row in (1, 2)
    ]
    more = {"block_size": 128, "nothing": None, "cache_bytes": 3 * 2**20}
    rows = [{**row, **more, "some": "long words " * int(9 * row["figure_1"])} for row in rows]
    print_table(rows, ["some", *rows[0]])
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 100
    assert any("1.235" in line and "2.469" in line for line in said), "numbers stay in one piece"
    assert not any("nothing" in line for line in said)
    assert said[-1] == "method lococo-uncalibrated-slot, block size 128, cache bytes 3.0 MiB"
    print_table(rows[:1], ["method", "block_size"])
    assert "lococo-uncalibrated-slot" in capsys.readouterr().out
    print_table([])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("columns", ["40", "70", "200"])
def test_what_finds_no_room_in_a_table_is_left_out_from_its_end(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    rows = [{f"figure_{index}": 0.00123456 * (index + 1) * row for index in range(30)} for row in (1, 2)]
    print_table(rows)
    said = capsys.readouterr().out.splitlines()
    assert min(100, int(columns)) - 15 <= max(map(len, said)) <= min(100, int(columns))
    assert said[-1].startswith("0.002469") and not any("\u2026" in line for line in said)
