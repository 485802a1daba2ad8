"""A visit to a GPU, dry: every stage on the CPU, in an interpreter without what may be missing there."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_recorded
import gpu_tests
import gpu_visit
import pytest
import torch
from gpu_visit import STAGES, Visit, chosen
from step_tape import TapeRecorder

from lococo.state import Patch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU = torch.device("cpu")
NAMES = [stage.name for stage in STAGES]
BARE = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, [ROOT, HERE / "bare", HERE.parent])),
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
}


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """(folder of results, finished process) of a visit to the CPU."""
    folder = tmp_path_factory.mktemp("visit")
    command = [sys.executable, "tests/gpu/dry_visit.py", "--device", "cpu", "--results", str(folder)]
    return folder, subprocess.run(command, cwd=ROOT, env=BARE, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_stage_passes_and_writes_its_files(dry):
    folder, process = dry
    logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
    assert process.returncode == 0, process.stdout + process.stderr + logs
    assert [line.split()[:3] for line in process.stdout.splitlines()] == [
        [stage.letter, stage.name, "passed"] for stage in STAGES
    ]
    files = {f"gpu_{name}.{end}" for name in NAMES for end in ("json", "md", "log")} | {"gpu.json", "gpu.md"}
    assert {path.name for path in folder.iterdir()} == files  # no picture, and no journal
    for name in NAMES:
        content = read(folder, f"gpu_{name}")
        assert {"command", "commit", "date", "device", "versions", "rows"} <= set(content)
        assert len({tuple(row) for row in content["rows"]}) == 1
    assert [row["outcome"] for row in read(folder, "gpu")["rows"]] == ["passed"] * len(NAMES)


@pytest.mark.slow
def test_results_say_what_was_compared(dry):
    folder, _ = dry
    checks = read(folder, "gpu_recorded")["rows"]
    assert [row["check"] for row in checks if row["outcome"] == "skipped"] == ["on a second device"]
    assert {row["of"].removesuffix(", padded") for row in checks} == {*gpu_recorded.CONFIGS, ""}
    # Tests of a GPU are skipped here, but found and imported, some of every group.
    tests = read(folder, "gpu_tests")["rows"]
    assert [row["group"] for row in tests] == list(gpu_tests.GROUPS)
    assert all(row["skipped"] == row["tests"] > 0 and row["outcome"] == "skipped" for row in tests)
    kernels = read(folder, "gpu_kernels")["rows"]
    assert {row["kernel"] for row in kernels} == {"attend", "mass", "blend", "decode"}
    assert all(0 < row["error"] < row["bound"] for row in kernels)
    for name in ("decode", "prefill"):
        rows = read(folder, f"gpu_{name}")["rows"]
        cells = {(row["method"], row["length"], row["batch"]) for row in rows}
        assert len(cells) == len(rows) == len(gpu_visit.METHODS) * 2 * 2
        assert all(row["median"] > 0 and row["shape"] == "tiny" for row in rows)
    assert "no picture, matplotlib is not installed" in (folder / "gpu_decode.log").read_text()


def test_packages_are_hidden_as_if_they_were_not_installed():
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('datasets', 'gguf')], u.find_spec('pytest'))"
    command = [sys.executable, "-c", code + "; import lm_eval"]
    found = subprocess.run(command, env=BARE, capture_output=True, text=True, check=False)
    assert found.stdout.startswith("[None, None] ModuleSpec")
    assert "ModuleNotFoundError: No module named 'lm_eval'" in found.stderr


def test_time_is_bounded():
    seconds = {stage.name: stage.seconds for stage in STAGES}
    assert seconds["recorded"] + seconds["tests"] <= 300
    assert sum(seconds.values()) <= 720 - 10  # the summary's own imports
    assert all(0 <= stage.reserve < stage.seconds - 30 for stage in STAGES)


def test_choice_of_stages_and_times():
    assert [stage.name for stage in chosen(["d", "a"], [])] == ["recorded", "decode", "prefill"]
    assert [(stage.name, stage.seconds) for stage in chosen(["score"], ["score=9", "tests=3"])] == [("score", 9)]
    with pytest.raises(ValueError, match="unknown stage 'f': choose from a, b"):
        chosen(["a", "f"], [])
    with pytest.raises(ValueError, match="must be of the form decode=100, got 'd=3'"):
        chosen(["a"], ["d=3"])


def visit(folder, commands, monkeypatch, **seconds):
    """A visit whose stages are Python code, given by name; WRITE in it stands for writing the result file."""

    def command_of(stage, size, device, output):
        row = "{'outcome': 'passed'}"
        written = f"import json, sys; json.dump({{'rows': [{row}]}}, open({str(output)!r} + '.json', 'w'))"
        return [sys.executable, "-c", commands[stage.name].replace("WRITE", written)]

    monkeypatch.setattr(gpu_visit, "command_of", command_of)
    stages = [
        dataclasses.replace(stage, seconds=seconds.get(stage.name, 60)) for stage in STAGES if stage.name in commands
    ]
    return Visit(folder, "cpu", stages, "make gpu").run()


def outcomes(folder):
    return {row["name"]: row["outcome"] for row in read(folder, "gpu")["rows"]}


@pytest.mark.parametrize("name", ["recorded", "tests"])
@pytest.mark.parametrize(
    "end", ["WRITE; sys.exit(1)", "pass", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
)
def test_what_is_wrong_stops_the_visit(tmp_path, monkeypatch, capsys, name, end):
    for stage in NAMES:
        (tmp_path / f"gpu_{stage}.json").write_text("a result of yesterday")
    assert not visit(tmp_path, {**dict.fromkeys(NAMES, "WRITE"), name: end}, monkeypatch)
    before, after = NAMES[: NAMES.index(name)], NAMES[NAMES.index(name) + 1 :]
    assert outcomes(tmp_path) == {
        **dict.fromkeys(before, "passed"),
        name: "failed",
        **dict.fromkeys(after, "not reached"),
    }
    assert "nothing after stage" in capsys.readouterr().out
    assert not any((tmp_path / f"gpu_{stage}.json").exists() for stage in after)
    assert "not reached" in (tmp_path / "gpu.md").read_text()


def test_what_is_slow_does_not(tmp_path, monkeypatch):
    ends = {"kernels": "WRITE; sys.exit(1)", "decode": "print('no room'); sys.exit(1)"}
    assert not visit(tmp_path, {**dict.fromkeys(NAMES, "WRITE"), **ends}, monkeypatch)
    assert outcomes(tmp_path) == {**dict.fromkeys(NAMES, "passed"), "kernels": "failed", "decode": "failed"}
    rows = {row["name"]: row for row in read(tmp_path, "gpu")["rows"]}
    assert (rows["kernels"]["detail"], rows["kernels"]["result"]) == ("1 passed", "gpu_kernels.json")
    assert (rows["decode"]["detail"].split(":")[0], rows["decode"]["result"]) == ("NameError", None)


def test_time_that_is_over_ends_all_that_a_stage_started_and_keeps_what_it_wrote(tmp_path, monkeypatch):
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # its child, too
    tell = f"open({str(tmp_path / 'child')!r}, 'w').write(str(p.pid)); "
    commands = {"kernels": "WRITE; " + deaf + child + tell + "time.sleep(60)", "decode": "WRITE"}
    start = time.monotonic()
    assert not visit(tmp_path, commands, monkeypatch, kernels=4)
    assert time.monotonic() - start < 40
    found = outcomes(tmp_path)
    assert (found["kernels"], found["decode"], found["tests"]) == ("stopped", "passed", "not asked for")
    assert (tmp_path / "gpu_kernels.json").is_file()
    assert not is_running(int((tmp_path / "child").read_text()))


def is_running(pid):
    for _ in range(50):  # whoever inherits it may take a moment to bury it
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_stage_is_interrupted_first_so_that_it_can_write(tmp_path, monkeypatch, before):
    """Also where interrupts are ignored, as in what a shell runs in the background."""
    here = signal.signal(signal.SIGINT, before)
    code = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  WRITE"
    try:
        assert not visit(tmp_path, {"kernels": code}, monkeypatch, kernels=8)
    finally:
        signal.signal(signal.SIGINT, here)
    (row,) = [row for row in read(tmp_path, "gpu")["rows"] if row["name"] == "kernels"]
    assert (row["outcome"], row["detail"], row["result"]) == ("stopped", "1 passed", "gpu_kernels.json")


def test_a_second_call_keeps_what_the_first_found(tmp_path, monkeypatch):
    assert visit(tmp_path, dict.fromkeys(["recorded", "tests"], "WRITE"), monkeypatch)
    first = read(tmp_path, "gpu")["rows"]
    assert visit(tmp_path, dict.fromkeys(["kernels", "score"], "WRITE"), monkeypatch)
    rows = read(tmp_path, "gpu")["rows"]
    assert rows[:2] == first[:2]
    assert [row["outcome"] for row in rows] == ["passed"] * 3 + ["not asked for"] * 2 + ["passed"]


def test_no_gpu_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("cuda", "finds no CUDA device"), ("meta", "must be cuda or cpu, got meta")):
        with pytest.raises(SystemExit) as ended:
            gpu_visit.main(["--device", device, "--results", str(tmp_path)])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Stale(TapeRecorder):
    """After three replays a recording does nothing any more."""

    def __call__(self, function):
        replay, output = super().__call__(function)
        replays = itertools.count()
        return (lambda: replay() if next(replays) < 3 else None), output


class Hoarding(TapeRecorder):
    """Keeps what it recorded."""

    kept = []

    def __call__(self, function):
        self.kept.append(function)
        return super().__call__(function)


@pytest.mark.parametrize(
    ("recorder", "check", "message"),
    [
        (Stale, lambda found: gpu_recorded.recorded_equals_launched(found, CPU, 20, "open", True), "logits differ"),
        (Stale, lambda found: gpu_recorded.outlives_another(found, CPU, 16), "logits"),
        (Hoarding, lambda found: gpu_recorded.answers_leave_nothing(found, CPU, 16), "bytes after 10 answers"),
    ],
)
def test_checks_of_recorded_steps_can_fail(monkeypatch, recorder, check, message):
    monkeypatch.setattr(gpu_recorded, "recorder_of", lambda device: gpu_recorded.Counted(recorder()))
    with pytest.raises(AssertionError, match=message):
        check({})


def test_a_failed_recording_that_nobody_is_told_of_is_found(monkeypatch):
    monkeypatch.setattr(Patch, "say_once", lambda self, message: None)
    with pytest.raises(AssertionError, match="0 warnings in place of 1"):
        gpu_recorded.survives_a_failed_capture({}, CPU, 16)
