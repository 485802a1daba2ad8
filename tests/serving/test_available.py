"""What ``lococo serve`` says where Transformers' server, or a package that it needs, is not there."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from lococo import serving
from lococo.cli.main import main


def test_a_release_without_the_server_is_named(monkeypatch, capsys):
    monkeypatch.setattr(serving, "RELEASE", (4, 56))
    assert main(["serve", "--model", "any"]) == 2
    assert "pip install 'transformers>=5.8'" in capsys.readouterr().err


def test_packages_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setattr(serving, "RELEASE", serving.OLDEST)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else name)
    assert main(["serve", "--model", "any"]) == 2
    assert capsys.readouterr().err == "lococo: error: lococo serve needs fastapi, uvicorn: pip install lococo[serve]\n"


def test_the_extra_has_what_is_looked_for():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extra = ast.literal_eval(re.search(r"^serve = (\[.*?\])", project, flags=re.MULTILINE)[1])
    oldest = "transformers>=" + ".".join(map(str, serving.OLDEST))
    assert set(extra) == {*serving.PACKAGES, oldest}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "--port"),
        (["--max-prompt-tokens", "0"], "--max-prompt-tokens"),
        (["--kept-caches", "-1"], "--kept"),
    ],
)
def test_wrong_options_are_refused(words, said, capsys):
    assert main(["serve", "--model", "any", *words]) == 2
    assert said in capsys.readouterr().err
