"""The grids of ``python -m experiments.benchmarks``: order, ratios, resuming, limits, and the commands.

No absolute times.
"""

import importlib.util
import json
import sys

import pytest
import torch
from tiny import tiny_llama

import lococo
from experiments.benchmarks import runner
from experiments.benchmarks.__main__ import main
from experiments.benchmarks.decode import Decode
from experiments.benchmarks.extend import Extend
from experiments.benchmarks.prefill import Prefill
from experiments.benchmarks.roofline import Least, Limits, Work
from experiments.benchmarks.runner import Cell, Grid, Subject, Topic, plot, rows_of
from lococo.bench import meter as meter_module
from lococo.methods import plan_runs
from lococo.results.journal import Journal
from lococo.results.plots import thousands

M, B = 16, 8
CPU = torch.device("cpu")
RUNS = plan_runs(["full", "streaming", "h2o"], [M], B)
LIMITS = Limits(bytes_per_second=1e9, flops_per_second=1e6)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(runner, "measure_limits", lambda device, dtype: LIMITS)
    monkeypatch.setattr(meter_module.gc, "collect", lambda: 0)  # takes its time


class Scripted(Topic):
    """Takes as many seconds as it is told, and remembers what it measured."""

    name, unit = "scripted", "text"

    def __init__(self, seconds=None, needs=lambda cell: 0):
        self.measured, self.counted, self.seconds, self.needs = [], [], seconds or {}, needs

    def least(self, sizes, cell):
        return Least(cell.batch * cell.length, Work(flops=1e6 * cell.length, bytes=0), self.needs(cell))

    def take(self, model, cell, meter):
        assert lococo.is_patched(model) == (cell.run.config is not None)
        self.measured.append((cell.run.name, cell.length))
        turn = self.measured.count((cell.run.name, cell.length)) - 1  # 0 is the warm-up
        seconds = self.seconds.get(cell.run.name, 1.0)
        return {"seconds": 1e9 if turn == 0 else turn * seconds, "cache_bytes": 7, "extra": 10.0 * turn}

    def count(self, model, cell):
        self.counted.append((cell.run.name, cell.length))
        return {"operations": cell.length}


def make_grid(model, topic, path, lengths=(32, 64), repeats=3, runs=RUNS, **options):
    groups = [[Cell(run, length, 2) for run in runs] for length in lengths]
    return Grid(Subject("tiny", model), topic, groups, repeats, Journal(path), **options)


def test_methods_take_turns_after_a_warm_up(model, tmp_path):
    topic = Scripted()
    assert make_grid(model, topic, tmp_path / "j").run() == []
    turn = [("full", 32), ("streaming", 32), ("h2o", 32)]
    assert topic.measured[:12] == 4 * turn
    assert topic.measured[12:] == 4 * [(name, 64) for name, _ in turn]
    assert topic.counted == turn + [(name, 64) for name, _ in turn]


def test_rows_are_complete_and_ratios_follow_from_the_medians(model, tmp_path):
    grid = make_grid(model, Scripted({"full": 6.0, "streaming": 2.0, "h2o": 3.0}), tmp_path / "j")
    grid.run()
    rows = rows_of(grid)
    assert [(row["method"], row["length"]) for row in rows[:4]] == [
        *(("full", 32), ("streaming", 32), ("h2o", 32)),
        ("full", 64),
    ]
    assert len({tuple(row) for row in rows}) == 1
    for row in rows:
        base = {"full": 6.0, "streaming": 2.0, "h2o": 3.0}[row["method"]]
        assert (row["min"], row["median"], row["max"], row["repeats"]) == (base, 2 * base, 3 * base, 3)
        assert row["tokens_per_second"] == pytest.approx(2 * row["length"] / row["median"])
        assert row["speedup_over_full"] == pytest.approx(6.0 / base)
        assert row["time_over_streaming"] == (None if row["method"] == "full" else pytest.approx(base / 2.0))
        assert row["limit_seconds"] == row["length"]
        assert row["limit_share"] == pytest.approx(row["length"] / row["median"])
        assert row["operations"] == row["length"]
        assert (row["cache_bytes"], row["extra"], row["dtype"], row["shape"]) == (7, 20.0, "float32", "tiny")
        assert row["skipped"] is None


def test_a_run_goes_on_where_it_was_killed(model, tmp_path):
    class Killed(Scripted):
        def take(self, *args):
            if len(self.measured) == 8:
                raise KeyboardInterrupt
            return super().take(*args)

    first, second, third = Killed(), Scripted(), Scripted()
    with pytest.raises(KeyboardInterrupt):
        make_grid(model, first, tmp_path / "j").run()
    assert not lococo.is_patched(model)
    assert len(first.measured) == 3 + 3 + 2
    assert make_grid(model, second, tmp_path / "j").run() == []
    # What is left of the turn, and the last one, after a new warm-up of what is not finished.
    assert second.measured[:7] == [(n, 32) for n in ("full", "streaming", "h2o", "h2o", "full", "streaming", "h2o")]
    assert len(second.measured) == 7 + 12
    grid = make_grid(model, third, tmp_path / "j")
    assert grid.run() == [] and third.measured == []
    assert len(rows_of(grid)) == 6


def test_a_journal_is_not_taken_for_another_measurement(model, tmp_path):
    make_grid(model, Scripted(), tmp_path / "j", lengths=[32]).run()
    topic = Scripted()
    other = plan_runs(["full", "streaming", "h2o"], [M], B // 2)
    make_grid(model, topic, tmp_path / "j", lengths=[32], runs=other).run()
    assert {name for name, _ in topic.measured} == {"streaming", "h2o"}
    make_grid(tiny_llama(num_hidden_layers=1), topic := Scripted(), tmp_path / "j", lengths=[32]).run()
    assert len(topic.measured) == 12


def test_the_time_limit_ends_between_measurements_and_a_later_run_goes_on(model, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lococo.results.deadline.time.monotonic", lambda: now[0])

    class Slow(Scripted):
        def take(self, *args):
            now[0] += 1
            return super().take(*args)

    grid = make_grid(model, topic := Slow(), tmp_path / "j", time_limit=13.5)
    assert [(cell.run.name, cell.length) for cell in grid.run()] == [("full", 64), ("streaming", 64), ("h2o", 64)]
    assert len(topic.measured) == 14  # the one that had begun was finished
    assert [row["length"] for row in rows_of(grid)] == [32, 32, 32]
    grid = make_grid(model, topic := Slow(), tmp_path / "j", time_limit=100)
    assert grid.run() == [] and {length for _, length in topic.measured} == {64}


def test_what_is_too_large_is_named_and_the_grid_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "device_memory", lambda device: 2**30)
    topic = Scripted(needs=lambda cell: 3 * 2**30 if (cell.run.name, cell.length) == ("full", 32) else 1)
    grid = make_grid(model, topic, tmp_path / "j")
    assert grid.run() == []
    assert ("full", 32) not in topic.measured and ("full", 64) in topic.measured
    rows = rows_of(grid)
    assert len({tuple(row) for row in rows}) == 1
    (row,) = [row for row in rows if row["skipped"]]
    assert (row["method"], row["length"], row["needed_bytes"]) == ("full", 32, 3 * 2**30)
    assert row["skipped"] == "needs at least 3.0 GiB, the device has 1.0"
    assert row["median"] is row["peak_bytes"] is row["tokens_per_second"] is row["limit_share"] is None
    assert [row["speedup_over_full"] for row in rows] == [None, None, None, 1, 1, 1]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room\nfor it"), RuntimeError("can't allocate memory: you tried")]
)
@pytest.mark.parametrize("turn", [0, 2])
def test_out_of_memory_is_caught_whenever_it_comes(model, tmp_path, error, turn):
    class Large(Scripted):
        def take(self, model, cell, meter):
            found = super().take(model, cell, meter)
            if self.measured.count(("h2o", 32)) == turn + 1 and cell.run.name == "h2o":
                raise error
            return found

    grid = make_grid(model, topic := Large(needs=lambda cell: 5), tmp_path / "j", lengths=[32])
    assert grid.run() == [] and not lococo.is_patched(model)
    assert topic.measured.count(("h2o", 32)) == turn + 1
    (row,) = [row for row in rows_of(grid) if row["skipped"]]
    assert (row["method"], row["repeats"]) == ("h2o", 0) and row["needed_bytes"] >= 5
    assert row["skipped"] == f"out of memory: {str(error).splitlines()[0]}"
    assert make_grid(model, again := Scripted(), tmp_path / "j", lengths=[32]).run() == again.measured == []


def test_other_errors_are_not_swallowed(model, tmp_path):
    class Broken(Scripted):
        def take(self, *args):
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        make_grid(model, Broken(), tmp_path / "j").run()
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        make_grid(model, Scripted(), tmp_path / "j", repeats=0)


def bench(topic, output, *arguments):
    slots = ["--num-slots", str(M), "--block-size", str(B), "--repeats", "2"]
    return main([topic, "--shape", "tiny", "--device", "cpu", *slots, "--output", str(output), *arguments])


ARGUMENTS = {
    "prefill": ["--lengths", "16", "32", "--batches", "1", "2"],
    "decode": ["--lengths", "16", "32", "--steps", "3"],
    "train": ["--lengths", "32", "--objectives", "distill", "next-token"],
    "score": ["--batches", "1", "2", "--num-slots", "8", "16"],
}


@pytest.mark.parametrize("topic", ARGUMENTS)
def test_command_writes_its_files(topic, tmp_path, capsys):
    output = tmp_path / "results" / "bench_llama-3.1-8b"
    assert bench(topic, output, *ARGUMENTS[topic]) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == [
        f"bench_llama-3.1-8b.{ending}" for ending in ("json", "md", "png")
    ]
    content = json.loads((output.parent / "bench_llama-3.1-8b.json").read_text())
    assert content["limits"] == {"bytes_per_second": 1e9, "flops_per_second": 1e6}
    rows = content["rows"]
    assert len(rows) == {"prefill": 4 * 6, "decode": 2 * 5, "train": 2 + 2, "score": 4 * 4}[topic]
    assert all(row["median"] > 0 and row["limit_share"] > 0 and row["skipped"] is None for row in rows)
    assert all(row["speedup_over_full"] for row in rows)
    assert all((row["time_over_streaming"] is None) == (row["method"] == "full") for row in rows)
    if topic == "decode":
        assert all((row["kept_bytes_per_step"] > 0) == (row["method"] == "full") for row in rows)
    table = (output.parent / "bench_llama-3.1-8b.md").read_text()
    said = capsys.readouterr().out
    assert table.count("\n") == len(rows) + 4
    assert max(map(len, said.splitlines()[:-1])) <= 100 and f"{output}.json" in said.splitlines()[-1]


def test_command_stops_in_time_and_goes_on(tmp_path, capsys):
    output = tmp_path / "bench"
    assert bench("prefill", output, *ARGUMENTS["prefill"], "--time-limit", "1e-6", "--methods", "full,h2o") == 0
    assert not list(tmp_path.glob("bench.*"))
    said = capsys.readouterr().err
    assert "8 cells" in said and f"h2o M={M} length=32 batch=2" in said
    assert bench("prefill", output, *ARGUMENTS["prefill"], "--methods", "full,h2o") == 0
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 8
    assert not (tmp_path / "bench.partial.jsonl").exists()


@pytest.mark.parametrize("turn", [0, 2])
def test_a_cell_that_fails_takes_no_other_with_it(model, tmp_path, turn, capsys):
    class Broken(Scripted):
        def take(self, model, cell, meter):
            found = super().take(model, cell, meter)
            if self.measured[-1] == ("h2o", 64) and self.measured.count(("h2o", 64)) == turn + 1:
                raise ValueError("shapes cannot be multiplied\nat length 64")
            return found

    grid = make_grid(model, topic := Broken(), tmp_path / "j", lengths=[64, 32])
    message = rf"1 of 6 cells failed, first h2o M={M} length=64 batch=2: ValueError: shapes cannot be multiplied$"
    with pytest.raises(RuntimeError, match=message):
        grid.run()
    assert topic.measured.count(("h2o", 64)) == turn + 1 and not lococo.is_patched(model)
    measured = [(row["method"], row["length"]) for row in rows_of(grid)]
    assert measured == [("full", 64), ("streaming", 64), ("full", 32), ("streaming", 32), ("h2o", 32)]
    assert "at length 64" in capsys.readouterr().err  # the traceback
    # It is no finding: the same command tries again.
    assert make_grid(model, topic := Scripted(), tmp_path / "j", lengths=[64, 32]).run() == []
    assert set(topic.measured) == {("h2o", 64)}


def test_what_the_device_can_do_is_measured_before_anything_fails(model, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(runner, "measure_limits", lambda device, dtype: order.append("limits") or LIMITS)

    class Noted(Scripted):
        def take(self, *args):
            order.append("cell")
            return super().take(*args)

    make_grid(model, Noted(), tmp_path / "j").run()
    assert order[:2] == ["limits", "cell"] and order.count("limits") == 1


def test_counting_can_be_left_out(model, tmp_path):
    grid = make_grid(model, topic := Scripted(), tmp_path / "j", counts=False)
    assert grid.run() == [] and topic.counted == []
    assert all("operations" not in row and row["cache_bytes"] == 7 for row in rows_of(grid))
    # Its journal does not stand in for one with counts.
    grid = make_grid(model, Scripted(), tmp_path / "j", repeats=4)
    assert grid.run() == [] and [row["operations"] for row in rows_of(grid)] == 3 * [32] + 3 * [64]


def test_what_was_measured_before_an_interrupt_is_written(tmp_path, monkeypatch):
    def interrupted(self, model, cell, meter, take=Decode.take):
        if cell.length == 32:
            raise KeyboardInterrupt
        return take(self, model, cell, meter)

    monkeypatch.setattr(Decode, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench("decode", tmp_path / "bench", *ARGUMENTS["decode"], "--methods", "full,h2o", "--no-counts")
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [(row["method"], row["length"]) for row in rows] == [("full", 16), ("h2o", 16)]
    assert (tmp_path / "bench.partial.jsonl").exists()
    assert all("ops_per_step" not in row or row["ops_per_step"] is None for row in rows)


def test_without_matplotlib_there_is_no_picture_and_a_word(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench("prefill", tmp_path / "bench", "--lengths", "16", "--methods", "full") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    assert "no picture, matplotlib is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill", "--lengths", "0"], "lengths must be at least 1, got 0"),
        (["prefill", "--batches", "1", "0"], "batches must be at least 1, got 0"),
        (["prefill", "--num-slots", "16", "0"], "num_slots must be an integer of at least 1, got 0"),
        (["prefill", "--methods", "full,h20"], "unknown method 'h20'"),
        (["prefill", "--heads", "missing"], "missing"),
        (["decode", "--lengths", "64", "7"], "at least one block of 8 tokens, got 7"),
        (["decode", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--lengths", "1"], "lengths must be at least 2"),
        (["train", "--objectives", "guess"], "objectives must be of distill, next-token, got 'guess'"),
        (["prefill", "--shape", "huge"], "unknown shape 'huge': choose from"),
        (["decode", "--shape", "nope"], "unknown shape 'nope': choose from"),
        (["score", "--methods", ","], "there is nothing to compare"),
        (["prefill", "--model", "org/model"], "either --model or --shape"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, arguments, message):
    topic, *others = arguments
    assert bench(topic, tmp_path / "x", *others) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_memory_is_drawn_where_the_time_was_not_taken(tmp_path):
    place = {"shape": "tiny", "dtype": "float32", "method": "full", "num_slots": None, "objective": None, "batch": 1}
    times = dict.fromkeys(("median", "min", "max", "limit_seconds"))
    rows = [{**place, **times, "length": length, "peak_bytes": 2**30} for length in (1024, 2048)]
    plot(Extend(2), rows, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
    plot(Extend(2), [{**rows[0], **dict.fromkeys(times, 0.1)}, rows[1]], tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_of_nothing(tmp_path):
    row = {"median": None, "skipped": "too large", "batch": 1, "length": 8}
    plot(Prefill(), [row], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
    assert [thousands(length) for length in (64, 1024, 131072)] == ["64", "1K", "128K"]
