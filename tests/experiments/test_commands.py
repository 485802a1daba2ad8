"""Experiments on the command line of the library: help with an example, and bad words in one line."""

import pytest

from experiments.ablation import __main__ as ablation
from experiments.benchmarks import __main__ as benchmarks

COMMANDS = [
    (ablation, "experiments.ablation", []),
    *((benchmarks, "experiments.benchmarks", [topic]) for topic in ("prefill", "decode", "train", "extend", "score")),
]


@pytest.mark.parametrize(("module", "name", "words"), COMMANDS)
def test_every_command_has_help_with_an_example(module, name, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert module.main([*words, "--help"]) == 0
    said, typed = " ".join(capsys.readouterr().out.split()), " ".join(["python -m", name, *words])
    assert f"Usage: {typed} [OPTIONS]" in said and f"Example: {typed} --" in said


@pytest.mark.parametrize(("module", "name", "words"), COMMANDS)
def test_an_unknown_option_is_one_line_and_status_2(module, name, words, capsys):
    assert module.main([*words, "--no-such-option"]) == 2
    assert "lococo: error: No such option: --no-such-option" in capsys.readouterr().err
