"""A calibration that was stopped or killed goes on, and two processes make the heads of one."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from calibrated import (
    BLOCK,
    FIRST,
    NOTHING,
    SHORT,
    SLOTS,
    assert_same_heads,
    calibrate_in_python,
    content,
    data_config,
    errors,
    result,
    rows,
)
from tiny import tiny_llama
from torch import distributed
from words import word_tokenizer, write_texts

from lococo.config import LoCoCoConfig
from lococo.training import calibrate as module
from lococo.training import gap, local, scores
from lococo.training.calibrate import Calibration
from lococo.training.local import LocalConfig
from lococo.training.objectives import Distill
from lococo.training.recipes import Recipe, ScoreConfig


def stop_in(name, when):
    """Replacement of a function that stops the program when it is called for the n-th time, after the call."""

    def replace(monkeypatch, holder):
        original, calls = getattr(holder, name), []

        def stopped(*arguments, **options):
            calls.append(1)
            if len(calls) == when:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(holder, name, stopped)

    return replace


STOPS = {
    "learning scores": (stop_in("save", 1), scores._Trainer),
    "learning scores from more texts": (stop_in("record_lookups", 10), scores),
    "before slots per head": (stop_in("eviction_errors", 1), module),
    "recording the third text": (stop_in("record", 3), local),
    "learning the second layer": (stop_in("train_layer", 2), local),
    "between the stages": (stop_in("_train_end_to_end", 1), Calibration),
    "step three": (stop_in("on_step_end", 3), gap.MeasureGap),
    "saving": (stop_in("_save", 1), Calibration),
}


def test_stopped_again_and_again_equals_uninterrupted(heads, run, tmp_path, monkeypatch, capsys):
    for stop, (replace, holder) in STOPS.items():
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            replace(patched, holder)
            run(tmp_path / "heads", *SHORT, "--resume")
            pytest.fail(f"{stop}: nothing was stopped")
        assert [path.name for path in tmp_path.iterdir()] == ["heads.work"]
    capsys.readouterr()
    assert run(tmp_path / "heads", *SHORT) == 2
    (error,) = errors(capsys)
    assert "heads.work holds an unfinished run: resume it (--resume) or remove that folder" in error
    assert run(tmp_path / "heads", *SHORT, "--resume", "--seed", "1") == 2
    assert "holds a run with another data: resume it with the same arguments" in errors(capsys)[0]
    assert run(tmp_path / "heads", *SHORT, "--resume") == 0
    assert_same_heads(tmp_path / "heads", heads)
    assert rows(tmp_path / "heads") == rows(heads)
    assert result(tmp_path / "heads")["usage"]["resumed"]
    assert not (tmp_path / "heads.work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_stopped_and_resumed_equals_uninterrupted(stop, heads, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        replace, holder = STOPS[stop]
        replace(patched, holder)
        run(tmp_path / "heads", *SHORT)
    assert run(tmp_path / "heads", *SHORT, "--resume") == 0
    assert_same_heads(tmp_path / "heads", heads)
    assert rows(tmp_path / "heads") == rows(heads)


def test_stopped_when_slots_per_head_are_measured(run, tmp_path, monkeypatch):
    short = ["--score-texts", "2", "--budget-texts", "1"]
    assert run(tmp_path / "whole", *short) == 0
    short += ["--cache-dir", str(tmp_path / "cache")]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_in("allocate_with_scales", 1)(patched, module)
        run(tmp_path / "heads", *short)

    def recorded_again(*arguments, **options):
        raise AssertionError("the errors are remembered")

    monkeypatch.setattr("lococo.training.evictions.record", recorded_again)
    assert run(tmp_path / "heads", *short, "--resume") == 0
    assert_same_heads(tmp_path / "heads", tmp_path / "whole")


def test_resumed_after_its_last_step_with_windows_left(run, tmp_path, monkeypatch):
    short = [*NOTHING, "--recipe", "blend", "--objective", "next-token", "--steps", "2", "--measure-every", "1"]
    assert run(tmp_path / "whole", *short) == 0
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_in("_save", 1)(patched, Calibration)
        run(tmp_path / "cut", *short)
    assert run(tmp_path / "cut", *short, "--resume") == 0
    assert_same_heads(tmp_path / "cut", tmp_path / "whole")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_folder_of_something_else_is_neither_resumed_nor_removed(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert run(tmp_path / "heads", *NOTHING, "--resume", "--work-dir", tmp_path / "mine") == 2
    assert "mine holds thesis.txt, so it is no run to resume" in errors(capsys)[0]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def killed_at_the_end(output, texts, cache, monkeypatch, **options):
    """The work folder of a calibration that was stopped before it could save."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_in("_save", 1)(patched, Calibration)
        shortly_calibrated(output, texts, cache, **options)
    return output.with_name(f"{output.name}.work")


def shortly_calibrated(output, texts, cache, **options):
    short = dict(score_texts=4, budget_texts=0, local_steps=0, steps=3, measure_every=1)
    calibrate_in_python(tiny_llama(), texts, output, cache, **{**short, **options})


def test_what_a_kill_left_half_written_is_passed_over(texts, cache, tmp_path, monkeypatch):
    shortly_calibrated(tmp_path / "whole", texts, cache)
    work = killed_at_the_end(tmp_path / "cut", texts, cache, monkeypatch)
    (work / ".scores.safetensors.tmp").write_bytes(b"cut sho")
    state = work / "trainer" / "checkpoint-3" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:50])
    shortly_calibrated(tmp_path / "cut", texts, cache, resume=True)
    assert_same_heads(tmp_path / "cut", tmp_path / "whole")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert not work.exists()


def test_what_is_left_of_a_finished_run_is_not_gone_on_with(texts, cache, tmp_path, monkeypatch):
    work = killed_at_the_end(tmp_path / "heads", texts, cache, monkeypatch)
    (work / "run.json").unlink()
    with pytest.raises(FileExistsError, match=r"heads\.work has no run\.json, so it is no run to resume"):
        shortly_calibrated(tmp_path / "heads", texts, cache, resume=True, seed=1)


# Several processes


def calibrate_tiny(folder, windows_per_step=2):
    """Float32 heads after every stage, in one process or in one of two."""
    recipe = Recipe(
        scores=ScoreConfig(texts=7, texts_at_once=4, texts_per_step=2, repeats=3),  # steps of two, and one of one
        budget_texts=2,
        local=LocalConfig(steps=3),
        local_texts=4,
        objective=Distill(backprop_tokens=20),
        steps=3,
        windows_per_step=windows_per_step,
        measure_every=2,
    )
    config = LoCoCoConfig(SLOTS, block_size=BLOCK, score="learned", head_rank=4, kernel_size=5, gate_init=0.2)
    places = dict(output=folder / "heads", work_dir=folder / "work", cache_dir=folder / "cache")
    texts = data_config(folder / "words.jsonl")
    calibration = Calibration(config=config, data=texts, recipe=recipe, first=FIRST, dtype=None, **places)
    # In float32 the order of a sum decides over weights whose gradient is near Adam's epsilon.
    return calibration.run(tiny_llama().double(), word_tokenizer()).rows


@pytest.mark.slow
def test_two_processes_make_the_heads_of_one(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        write_texts(folder / "words.jsonl")
    alone = calibrate_tiny(folders[0])
    command = [sys.executable, __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [subprocess.Popen([*command, str(rank), str(folders[1])], env=environment) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    assert_same_heads(folders[1] / "heads", folders[0] / "heads", atol=1e-9)
    assert sorted(path.name for path in folders[1].iterdir()) == ["cache", "heads", "words.jsonl"]
    (journal,) = folders[1].glob("cache/measured-*.jsonl")
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys)), "what one process has measured the other measures again"
    together = rows(folders[1] / "heads")
    assert [row.keys() for row in together] == [row.keys() for row in alone]
    assert content(folders[1] / "heads")["metrics"] == pytest.approx(
        content(folders[0] / "heads")["metrics"], abs=1e-9
    )


def worker(rank, folder):
    torch.set_num_threads(1)
    launched = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(**launched, MASTER_ADDR="localhost", MASTER_PORT="0")
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    time.sleep(3 * rank)  # the first process must not begin before the last has looked at the work folder
    with pytest.raises(ValueError, match="windows_per_step=3 must be a multiple of 2 processes"):
        calibrate_tiny(folder, windows_per_step=3)
    calibrate_tiny(folder)
    distributed.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
