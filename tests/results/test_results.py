"""Whose commit a result names: LoCoCo's own, or none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lococo
from lococo.files import check_output, check_output_file, write_whole
from lococo.results.journal import Journal
from lococo.results.tables import own_commit, write_result

PACKAGE = Path(lococo.__file__).parent


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    asked = ["git", *identity, *arguments]
    return subprocess.run(
        asked, cwd=folder, check=True, capture_output=True, text=True, env=environment
    ).stdout.strip()


def repository(folder, files):
    """A repository with one commit of some files; returns the commit."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    git(folder, "init", "-q")
    git(folder, "add", *files)
    git(folder, "commit", "-qm", "All")
    return git(folder, "rev-parse", "HEAD")


OWN = {"pyproject.toml": '[project]\nname = "lococo"\n', "lococo/__init__.py": "", "lococo/config.py": ""}
FOREIGN = {"pyproject.toml": '[project]\nname = "thesis"\n', "run.py": ""}


def test_a_checkout_names_its_commit_and_that_it_was_changed(tmp_path):
    commit = repository(tmp_path, {**OWN, "docs/results/a.json": "{}"})
    named = own_commit(tmp_path / "lococo")
    assert len(named) >= 4 and commit.startswith(named)
    (tmp_path / "docs" / "results" / "a.json").write_text("{ }")
    (tmp_path / "untracked.json").write_text("{ }")
    assert own_commit(tmp_path / "lococo") == named, "results that were just written"
    (tmp_path / "lococo" / "config.py").write_text("changed = True\n")
    assert own_commit(tmp_path / "lococo") == f"{named}-dirty"
    git(tmp_path, "worktree", "add", "-q", str(tmp_path / "second"))
    assert own_commit(tmp_path / "second" / "lococo") == named


@pytest.mark.parametrize("place", [".venv/lib/python3/site-packages/lococo", "vendor/lococo", "lococo"])
@pytest.mark.parametrize("is_tracked", [False, True])
def test_the_commit_of_a_project_that_holds_a_copy_is_not_named(place, is_tracked, tmp_path):
    repository(tmp_path, {**FOREIGN, **({f"{place}/__init__.py": ""} if is_tracked else {})})
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "__init__.py").write_text("")
    assert own_commit(tmp_path / place) is None


def test_a_package_beside_a_checkout_or_not_in_git_has_none(tmp_path):
    repository(tmp_path / "own", OWN)
    build = tmp_path / "own" / "build" / "lococo"
    build.mkdir(parents=True)
    assert own_commit(build) is None, "not the package that is tracked"
    repository(tmp_path / "old", {**OWN, "old/lococo/__init__.py": ""})
    assert own_commit(tmp_path / "old" / "old" / "lococo") is None, "not at the top"
    (tmp_path / "alone" / "lococo").mkdir(parents=True)
    assert own_commit(tmp_path / "alone" / "lococo") is None
    untracked = {name: content for name, content in OWN.items() if not name.startswith("lococo")}
    repository(tmp_path / "untracked", untracked)
    (tmp_path / "untracked" / "lococo").mkdir()
    (tmp_path / "untracked" / "lococo" / "__init__.py").write_text("")
    assert own_commit(tmp_path / "untracked" / "lococo") is None


def test_a_submodule_is_named_and_not_what_it_is_part_of(tmp_path):
    commit = repository(tmp_path / "own", OWN)
    outer = repository(tmp_path / "outer", FOREIGN)
    git(tmp_path / "outer", "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(tmp_path / "own"), "lib")
    named = own_commit(tmp_path / "outer" / "lib" / "lococo")
    assert commit.startswith(named) and not outer.startswith(named)


def test_a_hook_of_another_repository_changes_nothing(tmp_path, monkeypatch):
    commit = repository(tmp_path / "own", OWN)
    repository(tmp_path / "foreign", FOREIGN)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "foreign" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "foreign"))
    assert commit.startswith(own_commit(tmp_path / "own" / "lococo"))


def test_without_git_there_is_none(tmp_path, monkeypatch):
    repository(tmp_path, OWN)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_commit(tmp_path / "lococo") is None


def test_a_result_written_inside_another_project_names_none(tmp_path):
    """LoCoCo installed into the virtual environment of a project, run from its folder."""
    commit = repository(tmp_path, FOREIGN)
    installed = tmp_path / ".venv" / "site-packages"
    shutil.copytree(PACKAGE, installed / "lococo")
    script = (
        "import sys; sys.path.insert(0, '.venv/site-packages'); import lococo; assert '.venv' in lococo.__file__\n"
        "from pathlib import Path; from lococo.results.tables import write_result\n"
        "write_result(Path('found'), 'lococo eval ppl', 'cpu', [{'nll': 1.0}])"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "found.json").read_text())["commit"] is None
    table = (tmp_path / "found.md").read_text()
    assert "commit" not in table and commit[:7] not in table and "| nll |" in table


def test_a_result_has_one_commit_in_both_files(tmp_path, monkeypatch):
    monkeypatch.setattr("lococo.results.tables.own_commit", lambda package: f"of {package.name}")
    write_result(tmp_path / "found", "lococo eval ppl", "cpu", [{"nll": 1.0}])
    assert json.loads((tmp_path / "found.json").read_text())["commit"] == "of lococo"
    assert "commit of lococo\n" in (tmp_path / "found.md").read_text()


def test_a_result_says_how_long_it_was_measured_also_by_runs_that_were_stopped(tmp_path, monkeypatch):
    clock = iter([10.0, 100.0, 500.0, 530.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    path = tmp_path / "found.partial.jsonl"
    assert Journal(path).measure(["a"], lambda: 1) == 1
    journal = Journal(path)
    assert (journal.measure(["a"], lambda: 9), journal.measure(["b"], lambda: 2)) == (1, 2)
    write_result(tmp_path / "found", "lococo eval ppl", "cpu", [{"nll": 1.0}], seconds=journal.seconds)
    assert json.loads((tmp_path / "found.json").read_text())["seconds"] == 120
    assert ", measured in 2 min" in (tmp_path / "found.md").read_text().splitlines()[0]


def test_a_result_names_the_commit_that_was_there_when_measuring_began(tmp_path, monkeypatch):
    present = iter(["aaa", "bbb", "ccc-dirty", "ddd"])
    monkeypatch.setattr("lococo.results.journal.own_commit", lambda package: next(present))
    monkeypatch.setattr("lococo.results.tables.own_commit", lambda package: "made while it was measured")
    path = tmp_path / "found.partial.jsonl"
    assert Journal(path).commits == ["aaa"], "where nothing is measured, that of now"
    found = []
    for names in ("a", "ab", "ba"):
        journal = Journal(path)
        for name in names:
            journal.measure([name], lambda: 1)
        found.append(journal.commits)
    assert found == [["bbb"], ["ccc-dirty", "bbb"], ["ccc-dirty", "bbb"]], "those that are no clean one first"
    write_result(tmp_path / "found", "lococo eval ppl", "cpu", [{"nll": 1.0}], commits=journal.commits)
    content = json.loads((tmp_path / "found.json").read_text())
    assert (content["commit"], content["later_commits"]) == ("ccc-dirty", ["bbb"])
    assert ", commit ccc-dirty, then bbb\n" in (tmp_path / "found.md").read_text()


def test_rows_that_only_other_options_need_count_for_neither_time_nor_commits(tmp_path, monkeypatch):
    present = iter(["aaa", "bbb"])
    monkeypatch.setattr("lococo.results.journal.own_commit", lambda package: next(present))
    clock = iter([0.0, 1000.0, 2000.0, 2001.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    path = tmp_path / "found.partial.jsonl"
    Journal(path).measure(["128 slots"], lambda: 1)  # the run is killed, and its options were not right
    journal = Journal(path)
    journal.measure(["256 slots"], lambda: 2)
    assert (journal.seconds, journal.commits) == (1.5, ["bbb"])
    assert journal.recall(["128 slots"]) == 1, "asked for after all"
    assert (journal.seconds, journal.commits) == (1001.5, ["aaa", "bbb"])


def test_rows_of_something_else_are_left_aside_and_older_ones_go_on(tmp_path):
    path = tmp_path / "found.partial.jsonl"
    path.write_text(json.dumps({"key": json.dumps(["old"]), "value": 1, "seconds": 2}) + "\n")
    assert Journal(path, of="one model").measure(["new"], lambda: 2) == 2
    other = Journal(path, of="another model")
    assert (other.recall(["old"]), other.recall(["new"])) == (1, None) and other.seconds == 2
    assert other.measure(["new"], lambda: 3) == 3
    assert [Journal(path, of=of).recall(["new"]) for of in ("one model", "another model")] == [2, 3]


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path):
    path = tmp_path / "found.partial.jsonl"
    Journal(path).measure(["a"], lambda: 1)
    path.write_text(path.read_text() + '{"key": "half a li')
    Journal(path).measure(["b"], lambda: 2)
    again = Journal(path)
    assert (again.recall(["a"]), again.recall(["b"])) == (1, 2)


# Places


def test_what_cannot_be_written_is_named_before_and_after(tmp_path):
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file" / "a.html", tmp_path / "file" / "b" / "a.html"):
        with pytest.raises(NotADirectoryError, match=f"{path} cannot be written: {tmp_path / 'file'} is a file"):
            check_output(path)
        with pytest.raises(NotADirectoryError, match=f"{path} cannot be written"):
            Journal(path)
        with pytest.raises(OSError) as error:
            write_whole(path, "text")
        assert error.value.filename == str(path)
    assert check_output(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_take_its_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "folder", "text")
    with pytest.raises(IsADirectoryError, match="folder cannot be written: it is a folder"):
        check_output_file(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_folders_that_may_not_be_written_to_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=f"cannot be written: the folder {tmp_path} may not be written to"):
        check_output(tmp_path / "new" / "a.json")
