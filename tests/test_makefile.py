"""What the Makefile would measure and train: its commands are those there are, and take what they are given."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from documented import ROOT, problem
from tiny import tiny_llama
from words import write_texts

import lococo
from lococo.cli.main import main
from lococo.cli.options import ModelOptions

TARGETS = (
    *("perplexity", "perplexity-gemma", "equal-bytes", "tasks", "ruler", "long", "extend", "chatglm"),
    *("memory", "memory-stream", "calibrate", "calibrate-gemma", "gpu-long"),
)
OF_EXPERIMENTS = (
    *("bench-prefill", "bench-decode", "bench-score", "bench-bits", "bench-extend", "parts", "agreement", "ablate"),
    *("tasks", "chatglm", "targets", "results", "gpu-long"),
)
DOMAINS = ("arxiv", "books", "code", "math_latex", "stackexchange", "web", "wikipedia", "wikipedia_zh")
RECORDER = """#!/bin/sh
for word in "$0" "$@"; do printf '%s\\0' "$word"; done >> {log}
echo >> {log}
"""


class _Checked(BaseException):
    """A command has checked what it was given, and turns to the model or to the tasks."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the Makefile names, and with programs that only note how they are called."""
    place = tmp_path_factory.mktemp("make")
    for domain in DOMAINS:
        (place / "text" / domain).mkdir(parents=True)
        for name in ("train", "heldout"):
            write_texts(place / "text" / domain / f"{name}.jsonl", count=12)
    shutil.copytree(ROOT / "examples/heads", place / "examples/heads")
    of_chatglm = lococo.patch_model(tiny_llama(), lococo.LoCoCoConfig(32, block_size=32))
    lococo.save_heads(of_chatglm, place / ".demo/tiny-chatglm-heads")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    (place / "venv/bin").mkdir(parents=True)
    for name in ("lococo", "python"):
        (place / "venv/bin" / name).write_text(RECORDER.format(log=place / "log"))
        (place / "venv/bin" / name).chmod(0o755)
    (place / "venv/.installed").touch()
    return place


def commands(place, target):
    """The commands that a target runs, each as a list of words."""
    given = {"VENV": "venv", "PYTHON": "venv/bin/python", "DATA": "text", "RESULTS": "results"}
    (place / "log").write_text("")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    words = ["make", "--silent", target, *(f"{name}={value}" for name, value in given.items())]
    run = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [line.split("\0")[:-1] for line in (place / "log").read_text().splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_commands_take_what_they_are_given(place, target, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise _Checked

    for name in ("load", "load_tokenizer"):
        monkeypatch.setattr(ModelOptions, name, stop)
    monkeypatch.setattr("lococo.evaluation.few_shot.read_tasks", stop)
    monkeypatch.setattr("lococo.extension.evaluate.ExtendedRun.of_all", stop)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(place)
    ran = [words for program, *words in commands(place, target) if Path(program).name == "lococo"]
    assert ran
    for words in ran:
        with pytest.raises(_Checked):
            main(words)
            pytest.fail(capsys.readouterr().err)


@pytest.mark.slow
def test_experiments_know_the_options_that_they_are_given(place):
    ran = {}
    for words in (words for target in OF_EXPERIMENTS for words in commands(place, target) if "-m" in words):
        # Of those that differ only in values, one.
        ran[(*words[2:4], *(word for word in words if word.startswith("--")))] = shlex.join(["python", *words[1:]])
    assert {f"experiments.{name}" for name in ("benchmarks", "parts", "ablation")} <= {module for module, *_ in ran}
    assert not list(filter(None, map(problem, ran.values())))
