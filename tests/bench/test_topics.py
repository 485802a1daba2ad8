"""What ``lococo bench`` measures: the state that is timed, what is trained and scored, memory. No absolute times."""

import pytest
import torch
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig, patched
from lococo.bench.decode import Decode, compressed_cache, random_full_cache
from lococo.bench.extend import Extend, saved_bytes
from lococo.bench.meter import HeldBytes, Meter, Operations
from lococo.bench.prefill import Prefill
from lococo.bench.roofline import measure_limits
from lococo.bench.runner import Cell, random_ids
from lococo.bench.score import Score
from lococo.bench.train import Train, learning, objective_of, with_objectives
from lococo.cache.buffers import KVBuffer
from lococo.generation import cache_bytes
from lococo.kernels.scoring import SCORE_TILE
from lococo.methods import PRESETS, Run, as_method, plan_runs
from lococo.state import patch_of
from lococo.training.objectives import Distill, NextToken, WindowLoss

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


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "name",
    ["full", "streaming", "lococo-uncalibrated", "split"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("paper-decoding", "pairs")],
)
def test_only_the_full_cache_keeps_more_with_every_token(model, name, batch):
    config = {
        "split": LoCoCoConfig(M, block_size=B, slots_per_head=((20, 12), (9, 16))),
        "paper-decoding": LoCoCoConfig(M, block_size=B, decode_block_size=1),
        "pairs": LoCoCoConfig(M, block_size=B, decode_block_size=2),
    }.get(name)
    (run,) = [Run(name, config)] if config else plan_runs([name], [M], B)
    with as_method(model, run.config):
        counted = Decode(3).count(model, Cell(run, 80, batch))
    assert counted["ops_per_step"] > 2 * 20  # the model's own
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, their size, bytes
    assert counted["kept_bytes_per_step"] == (batch * per_token if name == "full" else 0)


def test_operations_are_counted_as_they_are_dispatched():
    with Operations() as operations:
        (torch.ones(3) + 1).view(1, 3).mul_(2)
    assert operations.count == 4


def test_objectives_are_for_heads_alone_and_in_the_chunks_of_the_recipe():
    runs = plan_runs(["full", "streaming", "lococo-open"], [512], 512)
    cells = with_objectives([Cell(run, 4096, 1) for run in runs], ["distill", "next-token"])
    assert [(cell.run.name, cell.objective) for cell in cells] == [
        ("full", "next-token"),
        ("streaming", "next-token"),
        ("lococo-open", "distill"),
        ("lococo-open", "next-token"),
    ]
    assert objective_of(cells[2]) == Distill(backprop_tokens=1024)
    assert objective_of(cells[3]) == NextToken(backprop_tokens=1024)


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
    (cell,) = with_objectives([Cell(run, 1400, 1) for run in plan_runs([name], [M], B)], [objective])
    with as_method(model, cell.run.config):
        found = Train().take(model, cell, Meter(CPU))
    ((*has_gradient,),) = steps
    assert all(has_gradient) if name in ("full", "streaming") else any(has_gradient)
    assert found["seconds"] > 0 and (found["cache_bytes"] is None) == (name == "full")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "streaming", "h2o", "lococo-open-rank16"])
def test_a_step_of_an_extension_keeps_no_more_for_longer_windows_with_slots(name):
    model = tiny_llama().bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(tiny_ids()).logits
    (run,) = plan_runs([name], [M], B)
    found = []
    for length in (97, 385):
        with as_method(model, run.config):
            found.append(Extend(depth=2).take(model, Cell(run, length, 1), Meter(CPU, watches_memory=True)))
    short, long = (each["saved_bytes"] for each in found)
    assert long > 2 * short if name == "full" else 0 < long <= 1.01 * short
    assert found[0]["cache_bytes"] == found[1]["cache_bytes"] and (found[0]["cache_bytes"] is None) == (name == "full")
    with as_method(model, run.config):
        assert Extend(2).take(model, Cell(run, 40, 1), Meter(CPU))["saved_bytes"] is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(tiny_ids()).logits, logits)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Extend(0)


def test_bytes_are_counted_as_long_as_autograd_keeps_them():
    with saved_bytes() as saved:
        factor = torch.ones(5, requires_grad=True)
        product = factor * torch.ones(5)  # one of both is kept
        (product * product).sum().backward()  # twice the same
    assert (saved.now, saved.most) == (0, 3 * 5 * 4)


def test_where_there_are_no_heads_norms_learn(model):
    with learning(model) as parameters:
        assert len(parameters) == 5 and all(parameter.dim() == 1 for parameter in parameters)
        assert sum(parameter.requires_grad for parameter in model.parameters()) == 5
    with patched(model, LoCoCoConfig(M, block_size=B)), learning(model) as parameters:
        assert {id(each) for each in parameters} == {id(each) for each in WindowLoss(model, Distill()).parameters()}


@pytest.mark.parametrize("name", ["full", "streaming", "h2o", "lococo-open", "split"])
def test_scoring_is_timed_where_entries_are_scored(model, name):
    split = LoCoCoConfig(M, block_size=B, slots_per_head=((20, 12), (9, 16)))
    (run,) = plan_runs(["h2o" if name == "split" else name], [M], B)
    run = Run(name, split) if name == "split" else run
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
    (run,) = plan_runs(["lococo-uncalibrated"], [block], block)
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


def test_the_peak_of_memory_counts_from_the_first_to_what_is_set_apart():
    assert Meter(CPU).peak() is None
    meter = Meter(CPU, watches_memory=True)
    before = meter.peak()
    assert before is not None, "needs Linux, and to write to /proc/self/clear_refs"
    size = 2**28
    with meter.apart():
        held = [torch.ones(size // 4), torch.ones(size // 4)]
        del held[0]
    assert before + 0.9 * size <= meter.peak() < before + 1.5 * size
    held.append(torch.ones(size // 4))
    held.clear()
    assert meter.peak() >= before + 1.9 * size
    with meter.apart():
        pass
    assert meter.peak() >= before + 1.9 * size
    assert Meter(CPU, watches_memory=True).peak() < before + 0.5 * size


def test_limits_are_rates(monkeypatch):
    monkeypatch.setattr("lococo.bench.roofline.CPU_SIZES", (2**16, 64))
    limits = measure_limits(CPU, torch.float32)
    assert limits.bytes_per_second > 0 and limits.flops_per_second > 0
