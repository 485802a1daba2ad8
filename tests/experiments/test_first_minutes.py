import contextlib
import json
import re
import subprocess
import time

import pytest

from experiments import first_minutes
from experiments.first_minutes import Step, clone, run, shown
from lococo.results.tables import PACKAGE


def commit(folder):
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "all"], cwd=folder, check=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with our README and its example alone."""
    folder = tmp_path / "project"
    (folder / "lococo").mkdir(parents=True)
    (folder / "README.md").write_text((PACKAGE.parent / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    commit(folder)
    monkeypatch.setattr(first_minutes, "PACKAGE", folder / "lococo")
    return folder


def test_the_example_is_readmes_with_a_model_that_is_there(project, tmp_path):
    assert clone(tmp_path / "clone") > 0
    example = (tmp_path / "clone" / first_minutes.QUICKSTART).read_text(encoding="utf-8")
    compile(example, "quickstart", "exec")
    assert example.count('"' + first_minutes.MODEL) == 2 and "meta-llama" not in example and "book.txt" not in example
    (project / "README.md").write_text("```python\nimport lococo\n```\n", encoding="utf-8")
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-qam", "two"], cwd=project, check=True
    )
    with pytest.raises(ValueError, match="README's example has no"):
        clone(tmp_path / "other")


def test_a_step_sees_what_a_user_would(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seconds, output = run(Step("", "echo ${PYTHONPATH-none} ${HF_HUB_OFFLINE-none}; pwd; sleep 0.2"), tmp_path)
    assert output.splitlines() == ["none none", str(tmp_path)] and seconds >= 0.2
    with pytest.raises(RuntimeError, match=r"'echo no; false' ended with 1:\nno"):
        run(Step("", "echo no; false"), tmp_path)


@pytest.mark.parametrize("end", ["true", "false"])
def test_what_a_step_leaves_running_ends_with_it(tmp_path, end):
    step = Step("", f"(sleep 3; touch {tmp_path}/late) &\n{end}")
    with contextlib.nullcontext() if end == "true" else pytest.raises(RuntimeError):
        assert run(step, tmp_path)[0] < 3
    time.sleep(4)
    assert not (tmp_path / "late").exists()


def test_the_end_is_shown_as_a_terminal_shows_it(tmp_path):
    assert shown(f"10%\r100%\n\x1b[1mbold\x1b[0m\n\n{tmp_path}/file\r\n", tmp_path) == "100%\nbold\nfile"
    lines = shown("\n".join(map(str, range(50))), tmp_path).splitlines()
    assert lines == ["...", *map(str, range(50 - first_minutes.LINES, 50))]


def test_transcript_and_times_are_written(project, tmp_path, monkeypatch):
    done = [Step("First", "echo one"), Step("Then", "echo two\necho three")]
    monkeypatch.setattr(first_minutes, "steps", lambda torch: done)
    first_minutes.main(["--output", str(tmp_path / "minutes")])
    content = json.loads((tmp_path / "minutes.json").read_text())
    assert [row["what"] for row in content["rows"]] == ["The project", "First", "Then"]
    page = (tmp_path / "minutes.md").read_text()
    assert re.search(r"Then: \*\*\d+ s\*\*\n\n```text\n\$ echo two\n\$ echo three\ntwo\nthree\n```", page)
    assert str(tmp_path) not in page.split("\n", 1)[1]


def test_steps_are_commands_of_the_pages():
    """Every command of ours that is run stands in README, with options of its own."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    commands = " ".join(step.command for step in first_minutes.steps("torch"))
    for ours in set(re.findall(r"lococo (generate|serve|bench \w+)", commands)) - {"bench memory"}:
        assert f"lococo {ours}" in readme
    assert "make demo" in readme and "make demo" in commands
