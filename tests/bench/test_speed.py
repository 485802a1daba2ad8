"""``lococo bench prefill | decode``: the state that is timed, turns and rows, and the commands. No absolute times."""

import json

import pytest
import torch
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig, patched
from lococo.bench import meter as meter_module
from lococo.bench.meter import Meter
from lococo.bench.speed import (
    Cell,
    Decode,
    Measurement,
    Prefill,
    compare_speed,
    compressed_cache,
    random_ids,
)
from lococo.cache.buffers import KVBuffer
from lococo.cli.main import main
from lococo.generation import cache_bytes, random_full_cache
from lococo.methods import PRESETS, Run, as_method, plan_runs
from lococo.state import patch_of

M, B = 16, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_open_gates_run_the_convolution_that_closed_ones_leave_out(model):
    for name, is_closed in {"lococo-uncalibrated": True, "lococo-open": False, "lococo-open-rank16": False}.items():
        (run,) = plan_runs([name], [M], B)
        with as_method(model, run.config), torch.no_grad():
            assert {head.is_closed for head in patch_of(model).heads.values()} == {is_closed}
    with pytest.raises(ValueError, match="unknown method 'h20': choose from full, .*lococo-open-rank16"):
        plan_runs(["h20"], [M], B)


def test_trained_heads_are_named_by_their_folder(model, tmp_path):
    with patched(model, LoCoCoConfig(M, block_size=B, gate_init=0.5)):
        lococo.save_heads(model, tmp_path / "mine")
    full, ours = plan_runs(["full"], [M], B, [str(tmp_path / "mine")], name_heads=True)
    assert (ours.name, ours.num_slots, full.config) == ("lococo-mine", M, None)
    found = Prefill().take(lococo.patch_model(tiny_llama(), heads=ours.heads), Cell(ours, 40, 1), Meter(CPU))
    assert found["seconds"] > 0


def state(cache):
    buffers = [(tuple(tensor.shape), tensor.dtype) for layer in cache.layers for tensor in layer.buffers()]
    (row,) = set(cache.rows)
    return buffers, [row.with_block_closed().num_entries(slots) for slots in (9, 12, M, 20)], row.pending


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
    compress = KVBuffer.compress

    def counted(*args):
        CountingMeter.compressions += 1
        return compress(*args)

    monkeypatch.setattr(KVBuffer, "compress", counted)
    config = PRESETS[name](M, block_size=B, decode_block_size=decode_block)
    cell = Cell(Run(name, config), 80, 2)
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

    found = Decode(steps=5).take(model, Cell(Run("full", None), 40, 3), Meter_(CPU))
    assert len(laps) == 5 and found["seconds"] == 1.0 and found["compressing_seconds"] is None
    assert found["cache_bytes"] == 3 * 40 * 2 * 2 * 2 * 8 * 4
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Decode(0)


# Turns and rows


class Scripted(Measurement):
    """Takes as many seconds as it is told, and remembers what it measured."""

    name, unit = "scripted", "text"

    def __init__(self, seconds, fails=None):
        self.measured, self.seconds, self.fails = [], seconds, fails

    def take(self, model, cell, meter):
        assert lococo.is_patched(model) == (cell.run.config is not None)
        assert meter.watches_memory == ((cell.run.name, cell.length) not in self.measured)
        self.measured.append((cell.run.name, cell.length))
        turn = self.measured.count((cell.run.name, cell.length)) - 1  # 0 is the warm-up
        if self.fails and (cell.run.name, turn) == self.fails[:2]:
            raise self.fails[2]
        return {"seconds": turn * self.seconds[cell.run.name] if turn else 1e9, "cache_bytes": 7}


SECONDS = {"full": 6.0, "streaming": 2.0, "h2o": 3.0}
TURN = list(SECONDS)


def rows_of(model, measurement, lengths=(32, 64)):
    groups = [[Cell(run, length, 2) for run in plan_runs(TURN, [M], B)] for length in lengths]
    return compare_speed(model, measurement, groups, 3)


def test_methods_take_turns_after_a_warm_up_and_ratios_follow_from_the_medians(model):
    rows = rows_of(model, scripted := Scripted(SECONDS))
    assert scripted.measured == [(name, length) for length in (32, 64) for _ in range(4) for name in TURN]
    assert [(row["method"], row["length"]) for row in rows] == [(name, length) for length in (32, 64) for name in TURN]
    for row in rows:
        base = SECONDS[row["method"]]
        assert (row["min"], row["median"], row["max"], row["repeats"]) == (base, 2 * base, 3 * base, 3)
        assert row["tokens_per_second"] == pytest.approx(2 * row["length"] / row["median"])
        assert row["speedup_over_full"] == pytest.approx(6.0 / base)
        assert (row["cache_bytes"], row["batch"], row["unit"], row["skipped"]) == (7, 2, "text", None)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room\nfor it"), RuntimeError("can't allocate memory: you tried")]
)
@pytest.mark.parametrize("turn", [0, 2])
def test_what_is_too_large_is_named_and_the_others_are_measured(model, error, turn):
    rows = rows_of(model, scripted := Scripted(SECONDS, ("full", turn, error)), lengths=[32])
    assert not lococo.is_patched(model) and scripted.measured.count(("full", 32)) == turn + 1
    full, *others = rows
    assert full["skipped"] == f"out of memory: {str(error).splitlines()[0]}"
    assert full["median"] is full["min"] is full["tokens_per_second"] is full["speedup_over_full"] is None
    assert all(row["repeats"] == 3 and row["skipped"] is row["speedup_over_full"] is None for row in others)


def test_other_errors_are_not_swallowed(model):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        rows_of(model, Scripted(SECONDS, ("h2o", 1, RuntimeError("shapes cannot be multiplied"))))
    assert not lococo.is_patched(model)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        compare_speed(model, Prefill(), [], 0)


# The commands


@pytest.fixture
def bench(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(meter_module.gc, "collect", lambda: 0)  # takes its time

    def call(topic, *arguments):
        slots = ["--num-slots", str(M), "--block-size", str(B), "--repeats", "2", "--output", str(tmp_path / "out")]
        return main(["bench", topic, "--model", str(checkpoint), "--device", "cpu", *slots, *arguments])

    return call


@pytest.mark.parametrize("topic", ["prefill", "decode"])
def test_command_writes_its_files(bench, topic, tmp_path, capsys):
    steps = ["--steps", "3"] if topic == "decode" else []
    assert bench(topic, "--lengths", "16", "32", "--batches", "1", "2", *steps) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md"]
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["batch"], row["length"]) for row in rows[::3]] == [(1, 16), (1, 32), (2, 16), (2, 32)]
    assert [row["method"] for row in rows[:3]] == ["full", "h2o", "lococo-uncalibrated"]
    assert all(row["median"] > 0 and row["peak_bytes"] and row["skipped"] is None for row in rows)
    held = {method: [row["cache_bytes"] for row in rows if row["method"] == method] for method in ("full", "h2o")}
    per_token = 2 * 2 * 8 * 2 * 4  # layers, KV heads, head_dim, key and value, bytes of a float32
    assert held["full"] == [16 * per_token, 32 * per_token, 32 * per_token, 64 * per_token]
    assert held["h2o"][0] == held["h2o"][1]
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said[:-1])) <= 100 and "out.json" in said[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill", "--lengths", "0"], "lengths must be at least 1, got 0"),
        (["prefill", "--batches", "1", "0"], "batches must be at least 1, got 0"),
        (["prefill", "--num-slots", "16", "0"], "num_slots must be an integer of at least 1, got 0"),
        (["prefill", "--methods", "full,h20"], "unknown method 'h20'"),
        (["prefill", "--heads", "missing"], "missing"),
        (["prefill", "--repeats", "0"], "Invalid value for '--repeats'"),
        (["decode", "--lengths", "64", "7"], "at least one block of 8 tokens, got 7"),
        (["decode", "--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(bench, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("lococo.loading.load_model", lambda *names, **options: pytest.fail("the model was loaded"))
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
