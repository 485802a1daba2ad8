"""The grids of ``lococo bench``: order, ratios, resuming, limits; and what each topic measures. No absolute times."""

import json

import pytest
import torch
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig, patched
from lococo.bench import grid as grid_module
from lococo.bench import meter as meter_module
from lococo.bench.counts import Work
from lococo.bench.decode import Decode, compressed_cache, random_full_cache
from lococo.bench.grid import Grid, Subject
from lococo.bench.limits import Limits, measure_limits
from lococo.bench.meter import Meter
from lococo.bench.methods import OPEN, plan_bench
from lococo.bench.pictures import plot, thousands
from lococo.bench.prefill import Prefill
from lococo.bench.score import HeldBytes, Score
from lococo.bench.table import rows_of
from lococo.bench.topic import Cell, Topic, random_ids
from lococo.bench.train import Train, learning, objective_of, with_objectives
from lococo.cache import Memory
from lococo.cli import main
from lococo.evaluation.methods import PRESETS, as_method
from lococo.evaluation.results import Journal
from lococo.generation import cache_bytes
from lococo.kernels import SCORE_TILE
from lococo.state import head_modules
from lococo.training.objectives import Distill, NextToken, WindowLoss

M, B = 16, 8
CPU = torch.device("cpu")
RUNS = plan_bench(["full", "streaming", "h2o"], [M], B)
LIMITS = Limits(bytes_per_second=1e9, flops_per_second=1e6)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(grid_module, "measure_limits", lambda device, dtype: LIMITS)
    monkeypatch.setattr(meter_module.gc, "collect", lambda: 0)  # takes its time


class Scripted(Topic):
    """Takes as many seconds as it is told, and remembers what it measured."""

    name, unit = "scripted", "text"

    def __init__(self, seconds=None, needs=lambda cell: 0):
        self.measured, self.seconds, self.needs = [], seconds or {}, needs

    def tokens(self, cell):
        return cell.batch * cell.length

    def work(self, sizes, cell):
        return Work(flops=1e6 * cell.length, bytes=0)

    def least_memory(self, sizes, cell):
        return self.needs(cell)

    def take(self, model, cell, meter):
        assert lococo.is_patched(model) == (cell.run.config is not None)
        self.measured.append((cell.run.name, cell.length))
        turn = self.measured.count((cell.run.name, cell.length)) - 1  # 0 is the warm-up
        seconds = self.seconds.get(cell.run.name, 1.0)
        return {"seconds": 1e9 if turn == 0 else turn * seconds, "cache_bytes": 7, "extra": 10.0 * turn}


def make_grid(model, topic, path, lengths=(32, 64), repeats=3, runs=RUNS, **options):
    groups = [[Cell(run, length, 2) for run in runs] for length in lengths]
    return Grid(Subject("tiny", model), topic, groups, repeats, Journal(path), **options)


def test_methods_take_turns_after_a_warm_up(model, tmp_path):
    topic = Scripted()
    assert make_grid(model, topic, tmp_path / "j").run() == []
    turn = [("full", 32), ("streaming", 32), ("h2o", 32)]
    assert topic.measured[:12] == 4 * turn
    assert topic.measured[12:] == 4 * [(name, 64) for name, _ in turn]


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
    other = plan_bench(["full", "streaming", "h2o"], [M], B // 2)
    make_grid(model, topic, tmp_path / "j", lengths=[32], runs=other).run()
    assert {name for name, _ in topic.measured} == {"streaming", "h2o"}
    make_grid(tiny_llama(num_hidden_layers=1), topic := Scripted(), tmp_path / "j", lengths=[32]).run()
    assert len(topic.measured) == 12


def test_the_time_limit_ends_between_measurements_and_a_later_run_goes_on(model, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(grid_module.time, "monotonic", lambda: now[0])

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
    monkeypatch.setattr(grid_module, "device_memory", lambda device: 2**30)
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


def test_open_gates_run_the_convolution_that_closed_ones_leave_out(model):
    for name, is_closed in {"lococo-uncalibrated": True, "lococo-open": False, "lococo-open-rank16": False}.items():
        (run,) = plan_bench([name], [M], B)
        with as_method(model, run.config), torch.no_grad():
            assert {head.is_closed for head in head_modules(model).values()} == {is_closed}
    with pytest.raises(ValueError, match=f"unknown method 'h20': choose from full, .*{list(OPEN)[-1]}"):
        plan_bench(["h20"], [M], B)


def test_trained_heads_are_named_by_their_folder(model, tmp_path):
    with patched(model, LoCoCoConfig(M, block_size=B, gate_init=0.5)):
        lococo.save_heads(model, tmp_path / "mine")
    full, ours = plan_bench(["full"], [M], B, [str(tmp_path / "mine")])
    assert (ours.name, ours.num_slots, full.config) == ("lococo-mine", M, None)
    found = Prefill().take(lococo.patch_model(tiny_llama(), heads=ours.heads), Cell(ours, 40, 1), Meter(CPU))
    assert found["seconds"] > 0


def state(cache):
    buffers = [(tuple(tensor.shape), tensor.dtype) for layer in cache.layers for tensor in layer.buffers()]
    (row,) = set(cache.rows)
    return buffers, [row.entries(slots) for slots in (9, 12, M, 20)], row.pending


@pytest.mark.parametrize("name", [*PRESETS, "split", "small-blocks"])
def test_a_compressed_cache_is_filled_as_by_a_long_text(model, name):
    config = {
        "split": LoCoCoConfig(M, block_size=B, slots_per_head=((20, 12), (9, 16))),
        "small-blocks": LoCoCoConfig(M, block_size=3),
    }.get(name) or PRESETS[name](M, block_size=B)
    long = 30 * config.block_size
    with patched(model, config), torch.no_grad():
        really = model(random_ids(model, 2, long), use_cache=True).past_key_values
        quickly = compressed_cache(model, config, 2, long)
        assert state(quickly) == state(really) and quickly.nbytes == really.nbytes
        assert quickly.seen_tokens < really.seen_tokens
        short = 2 * config.block_size
        assert compressed_cache(model, config, 2, short).seen_tokens == short
        with pytest.raises(ValueError, match="at least one block of"):
            compressed_cache(model, config, 1, config.block_size - 1)


def test_a_random_full_cache_is_like_one_that_was_read(model):
    with torch.no_grad():
        really = model(tiny_ids(2, 40)).past_key_values
        quickly = random_full_cache(model, 40, 2)
        assert quickly.get_seq_length() == really.get_seq_length() and cache_bytes(quickly) == cache_bytes(really)
        assert model(tiny_ids(2, 1), past_key_values=quickly).logits.isfinite().all()


class CountingMeter(Meter):
    """One second for a lap, and one more for each compression of a layer in it."""

    compressions = 0

    def _now(self):
        self.ticks = getattr(self, "ticks", 0) + 0.5  # start and stop are half a second each way
        return self.ticks * 2 + CountingMeter.compressions

    def seconds(self):
        laps, self._laps = self._laps, []
        return [stop - start for start, stop in laps]


@pytest.mark.parametrize("steps", [1, 3, 7, 20])
@pytest.mark.parametrize(("name", "decode_block"), [("h2o", None), ("lococo-open", None), ("h2o", 3), ("h2o", 1)])
def test_a_decoded_token_has_its_share_of_the_compression(model, monkeypatch, name, decode_block, steps):
    compress = Memory.compress

    def counted(*args):
        CountingMeter.compressions += 1
        return compress(*args)

    monkeypatch.setattr(Memory, "compress", counted)
    presets = {**PRESETS, **OPEN}
    config = presets[name](M, block_size=B, decode_block_size=decode_block)
    (run,) = [run for run in plan_bench([name], [M], B)]
    cell = Cell(type(run)(name, config), 80, 2)
    with patched(model, config):
        found = Decode(steps).take(model, cell, CountingMeter(CPU))
    block = decode_block or B
    assert found["compressing_seconds"] == 3.0  # two layers
    assert found["step_seconds"] == (3.0 if block == 1 else 1.0)
    assert found["seconds"] == pytest.approx(((block - 1) * found["step_seconds"] + 3.0) / block)


def test_decoding_through_the_full_cache_takes_that_many_steps(model):
    laps = []

    class Meter_(CountingMeter):
        def seconds(self):
            found = super().seconds()
            laps.extend(found)
            return found

    found = Decode(steps=5).take(model, Cell(RUNS[0], 40, 3), Meter_(CPU))
    assert len(laps) == 5 and found["seconds"] == 1.0 and found["compressing_seconds"] is None
    assert found["cache_bytes"] == 3 * 40 * 2 * 2 * 2 * 8 * 4
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Decode(0)


def test_objectives_are_for_heads_alone_and_in_the_chunks_of_the_recipe():
    runs = plan_bench(["full", "streaming", "lococo-open"], [512], 512)
    cells = with_objectives([Cell(run, 4096, 1) for run in runs], ["distill", "next-token"])
    assert [(cell.run.name, cell.objective) for cell in cells] == [
        ("full", "next-token"),
        ("streaming", "next-token"),
        ("lococo-open", "distill"),
        ("lococo-open", "next-token"),
    ]
    assert objective_of(cells[2]) == Distill(backprop_tokens=1280)
    assert objective_of(cells[3]) == NextToken(backprop_tokens=1280)


@pytest.mark.parametrize("name", ["full", "streaming", "lococo-open", "lococo-open-rank16"])
@pytest.mark.parametrize("objective", ["distill", "next-token"])
def test_a_training_step_leaves_the_model_as_it_is(monkeypatch, name, objective):
    model = tiny_llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps = []

    class Watched(torch.optim.AdamW):
        def step(self, *args):
            parameters = self.param_groups[0]["params"]
            steps.append([parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    (cell,) = with_objectives([Cell(run, 1400, 1) for run in plan_bench([name], [M], B)], [objective])
    with as_method(model, cell.run.config):
        found = Train().take(model, cell, Meter(CPU))
    ((*has_gradient,),) = steps
    assert all(has_gradient) if name in ("full", "streaming") else any(has_gradient)
    assert found["seconds"] > 0 and (found["cache_bytes"] is None) == (name == "full")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_where_there_are_no_heads_norms_learn(model):
    with learning(model) as parameters:
        assert len(parameters) == 5 and all(parameter.dim() == 1 for parameter in parameters)
        assert sum(parameter.requires_grad for parameter in model.parameters()) == 5
    with patched(model, LoCoCoConfig(M, block_size=B)), learning(model) as parameters:
        assert {id(each) for each in parameters} == {id(each) for each in WindowLoss(model, Distill()).parameters()}


@pytest.mark.parametrize("name", ["full", "streaming", "h2o", "lococo-open", "split"])
def test_scoring_is_timed_where_entries_are_scored(model, name):
    split = LoCoCoConfig(M, block_size=B, slots_per_head=((20, 12), (9, 16)))
    (run,) = plan_bench(["h2o" if name == "split" else name], [M], B)
    run = type(run)(name, split) if name == "split" else run
    with as_method(model, run.config):
        found = Score(B).take(model, Cell(run, M + B, 3), Meter(CPU))
    assert found["seconds"] > 0
    if name in ("full", "streaming"):
        assert found["score_share"] is found["score_bytes"] is None
        return
    assert found["score_share"] == pytest.approx(found["score_seconds"] / found["seconds"])
    entries = 20 + B + 12 + B if name == "split" else 2 * (M + B)
    assert found["matrix_bytes"] == 4 * 3 * 2 * B * entries  # batch, query heads of a KV head
    assert found["score_bytes"] >= found["score_largest_bytes"] > 0


def test_scoring_never_holds_a_matrix_of_the_whole_block(model):
    block = 4 * SCORE_TILE
    (run,) = plan_bench(["lococo-uncalibrated"], [block], block)
    with as_method(model, run.config):
        found = Score(block).take(model, Cell(run, 2 * block, 1), Meter(CPU))
    assert found["score_largest_bytes"] <= found["matrix_bytes"] / 4


def test_held_bytes_are_those_alive_at_once():
    given = torch.ones(1000)
    with HeldBytes() as held:
        first = given + 1
        second = first.view(10, 100)[2:].clone()
        del first
        given.add_(1)
        third = torch.zeros(500)
    assert (held.peak, held.largest) == (4000 + 3200, 4000)
    assert second.shape[0] + third.shape[0] == 508


def test_the_peak_of_memory_begins_where_it_is_told():
    assert Meter(CPU).peak() is None
    meter = Meter(CPU, watches_memory=True)
    before = meter.peak()
    if before is None:
        pytest.skip("this system does not say")
    held = torch.ones(2**26)
    assert meter.peak() >= before + 0.9 * held.nbytes
    del held
    assert meter.peak() >= before + 0.9 * 2**28
    meter.reset_peak()
    assert meter.peak() < before + 0.5 * 2**28


def test_limits_are_rates(monkeypatch):
    monkeypatch.setattr("lococo.bench.limits.CPU_SIZES", (2**16, 64))
    limits = measure_limits(CPU, torch.float32)
    assert limits.bytes_per_second > 0 and limits.flops_per_second > 0


def bench(topic, output, *arguments):
    slots = ["--num-slots", str(M), "--block-size", str(B), "--repeats", "2"]
    return main(["bench", topic, "--shape", "tiny", "--device", "cpu", *slots, "--output", str(output), *arguments])


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
    table = (output.parent / "bench_llama-3.1-8b.md").read_text()
    assert table.count("\n") == len(rows) + 4 and table.split("\n", 2)[2] == capsys.readouterr().out[:-1]


def test_command_stops_in_time_and_goes_on(tmp_path, capsys):
    output = tmp_path / "bench"
    assert bench("prefill", output, *ARGUMENTS["prefill"], "--time-limit", "-1", "--methods", "full,h2o") == 0
    assert not list(tmp_path.glob("bench.*"))
    said = capsys.readouterr().err
    assert "8 cells" in said and f"h2o M={M} length=32 batch=2" in said
    assert bench("prefill", output, *ARGUMENTS["prefill"], "--methods", "full,h2o") == 0
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 8
    assert not (tmp_path / "bench.partial.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "--lengths must be at least 1, got 0"),
        (["--num-slots", "16", "0"], "--num-slots must be at least 1, got 0"),
        (["--methods", "full,h20"], "unknown method 'h20'"),
        (["--heads", "missing"], "missing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, arguments, message):
    assert bench("prefill", tmp_path / "x", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_picture_of_nothing(tmp_path):
    row = {"median": None, "skipped": "too large", "batch": 1, "length": 8}
    plot("prefill", [row], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
    assert [thousands(length) for length in (64, 1024, 131072)] == ["64", "1K", "128K"]
