"""What ``experiments.benchmarks`` measures: what is counted, trained and scored. No absolute times."""

import pytest
import torch
from tiny import tiny_ids, tiny_llama

from experiments.benchmarks.decode import Decode
from experiments.benchmarks.extend import Extend
from experiments.benchmarks.roofline import measure_limits
from experiments.benchmarks.runner import Cell
from experiments.benchmarks.score import Score
from experiments.benchmarks.train import Train, learning, objective_of, with_objectives
from lococo import LoCoCoConfig, patched
from lococo.bench.meter import Meter
from lococo.kernels.scoring import SCORE_TILE
from lococo.methods import Run, as_method, plan_runs
from lococo.training.objectives import Distill, NextToken, WindowLoss

M, B = 16, 8
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


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


def test_limits_are_rates(monkeypatch):
    monkeypatch.setattr("experiments.benchmarks.roofline.CPU_SIZES", (2**16, 64))
    limits = measure_limits(CPU, torch.float32)
    assert limits.bytes_per_second > 0 and limits.flops_per_second > 0
