"""The table of results is that of the files, and names all of them."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from experiments import results_index
from experiments.results_index import BEGIN, END, RESULTS, Result, table, with_table

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/results"


def content(**changes):
    return json.dumps({"date": "2026-01-02", "commit": "abc", **changes})


def test_a_row_tells_the_oldest_commit_and_the_time_of_all_files(tmp_path):
    (tmp_path / "one.json").write_text(content(seconds=90))
    (tmp_path / "two.json").write_text(content(date="2026-01-01", commit="old", seconds=150))
    result = Result("make-it", ("one", "two", "three"), "what it is")
    expected = "| [one](one.md), [two](two.md) | what it is | `make make-it` | 2026-01-01, old | 4 min |\n"
    assert result.row(tmp_path) == expected
    assert "| not measured yet | |" in Result("t", ("four",), "x").row(tmp_path)
    (tmp_path / "four.json").write_text(content(commit=None))
    assert "| 2026-01-02, no commit |  |" in Result("t", ("four",), "x").row(tmp_path)


def test_what_was_measured_before_a_change_is_stale(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        asked = ["git", *identity, *words]
        return subprocess.run(asked, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def is_stale(commit):
        results_index._is_unchanged_since.cache_clear()
        (tmp_path / "docs" / "one.json").write_text(content(commit=commit))
        return Result("make-it", ("one",), "x").is_stale(tmp_path / "docs")

    monkeypatch.setattr(results_index, "PACKAGE", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("one")
    git("init", "-q")
    assert Result("make-it", ("one",), "x").is_stale(tmp_path / "docs")
    (tmp_path / "docs" / "one.json").write_text(content())
    git("add", "-A")
    git("commit", "-qm", "One")
    commit = git("rev-parse", "--short", "HEAD")
    assert not is_stale(commit) and is_stale(f"{commit}-dirty") and is_stale(None) and is_stale("0123456")
    (tmp_path / "README.md").write_text("more")
    (tmp_path / "new.py").write_text("new")
    git("add", "-A")
    git("commit", "-qm", "Two")
    assert not is_stale(commit)
    (tmp_path / "code.py").write_text("two")
    assert is_stale(commit)


def test_the_page_keeps_what_is_around_the_table(tmp_path):
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    made = with_table(page, tmp_path)
    assert made.startswith(f"before\n{BEGIN}\n\n| result |") and made.endswith(f"|\n\n{END}\nafter\n")
    assert "old" not in made.split(END)[0].replace("oldest", "") and with_table(made, tmp_path) == made
    with pytest.raises(ValueError, match="no place for the table"):
        with_table("page", tmp_path)


def test_every_target_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {result.target for result in RESULTS} <= targets


def test_the_page_of_results_is_up_to_date():
    assert table(FOLDER) in (FOLDER / "README.md").read_text(encoding="utf-8")
    named = {name for result in RESULTS for name in result.files}
    assert {path.stem for path in FOLDER.glob("*.json")} <= named
