"""``python -m experiments.ablation``: what is varied is varied alone, figures are true, and a stopped run goes on."""

import json
import math
import random

import numpy as np
import pytest
import torch
from tiny import tiny_llama
from words import WORDS, word_tokenizer

from experiments.ablation import run
from experiments.ablation.__main__ import main
from experiments.ablation.grid import KINDS, combined, grid_cells
from experiments.ablation.run import gap_change, plot_rows
from lococo.config import LoCoCoConfig
from lococo.evaluation.losses import DocumentLosses
from lococo.methods import Run, as_method
from lococo.metrics import gap_ratio, token_nlls
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.journal import Journal
from lococo.training import gap

LENGTH, FIRST, SLOTS, BLOCK = 48, 24, 16, 8
BASE = LoCoCoConfig(1, block_size=BLOCK, gate_init=0.05)
ALL = "sinks+heavy+recent+fused"
CENTRE = ["--centre", SLOTS, 5, ALL]
SMALL = [*CENTRE, "--kernel-size", 3, "--combine", "sinks+heavy+recent"]


def budget(config):
    return [getattr(config, f"num_{kind}") for kind in KINDS]


# The grid


@pytest.mark.parametrize("num_slots", [16, 128, 200])
def test_default_kinds_are_the_default_preset(num_slots):
    assert budget(combined(ALL, LoCoCoConfig(num_slots))) == budget(LoCoCoConfig(num_slots))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fused", [0, 0, 0, 128]),
        ("sinks+fused", [4, 0, 0, 124]),
        ("fused+heavy", [0, 36, 0, 92]),
        ("recent+fused", [0, 0, 40, 88]),
        ("sinks+heavy+recent", [4, 84, 40, 0]),
        ("sinks+recent", [4, 0, 124, 0]),
        ("sinks:8+heavy:64+fused:56", [8, 64, 0, 56]),
        ("heavy+recent:64", [0, 64, 64, 0]),
    ],
)
def test_kinds_that_are_not_named_get_no_slot(name, expected):
    config = combined(name, LoCoCoConfig(128, kernel_size=7))
    assert budget(config) == expected and config.kernel_size == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fused+sink", "unknown combination 'fused\\+sink': join sinks, heavy, recent, fused by"),
        ("", "unknown combination ''"),
        ("fused+fused", "each once at most"),
        ("sinks:4.5+fused", "the slots of sinks must be a number, got '4.5'"),
        ("sinks", "does not add up to 128 slots: 4 sinks are 4, and no kind takes what is left"),
        ("sinks:8+heavy:64", "8 sinks \\+ 64 heavy are 72"),
        ("heavy:128+fused", "128 heavy leave nothing for fused"),
        ("recent:200+fused:8", "are 208, and no kind"),
    ],
)
def test_budgets_that_do_not_add_up_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        combined(name, LoCoCoConfig(128))


def cells_of(**changes):
    given = dict(slots=[8, 16, 32], kernels=[3, 5], combinations=["fused", ALL, "sinks+recent"], seeds=[0, 7])
    return grid_cells(BASE, (SLOTS, 5, ALL), **{**given, **changes})


def test_a_cell_differs_from_the_centre_in_what_it_says():
    centre, *cells = cells_of()
    assert (centre.varied, centre.seed, centre.config.kernel_size, centre.config.num_slots) == ("centre", 0, 5, SLOTS)
    assert [cell.varied for cell in cells] == ["num_slots"] * 2 + ["kernel_size"] + ["combine"] * 2 + ["seed"]
    for cell in cells:
        ours, theirs = cell.config.to_dict(), centre.config.to_dict()
        changed = {name for name in ours if ours[name] != theirs[name]}
        shares = {"num_sinks", "num_heavy", "num_recent"}
        expected = {"num_slots": shares | {"num_slots"}, "combine": shares, "seed": set()}
        assert changed <= expected.get(cell.varied, {cell.varied}) and (cell.seed != 0) == (cell.varied == "seed")
    assert len({cell.name for cell in (centre, *cells)}) == 7


def test_a_full_grid_has_every_value_with_every_other_once():
    cells = cells_of(seeds=[0, 1], product=True)
    fusing = [cell for cell in cells if cell.config.num_fused]
    values = {(cell.config.num_slots, cell.config.kernel_size, cell.combination, cell.seed) for cell in fusing}
    assert len(values) == len(fusing) == 3 * 2 * 2 * 2
    assert len(cells) == 24 + 3, "without heads kernel and seed do nothing"
    assert cells[0].varied == "centre" and {cell.varied for cell in cells[1:]} == {"product"}


def test_counts_at_the_centre_are_shares_elsewhere():
    cells = grid_cells(BASE, (128, 5, "sinks:4+heavy:32+fused"), slots=[64, 256])
    assert [budget(cell.config) for cell in cells] == [[4, 32, 0, 92], [4, 14, 0, 46], [4, 68, 0, 184]]


def test_what_has_no_effect_is_not_varied():
    for changes, named in ((dict(kernels=[3], seeds=[0]), "kernel_size"), (dict(kernels=[], seeds=[0, 1]), "seed")):
        with pytest.raises(ValueError, match=f"varying {named} changes nothing where 'sinks\\+recent'"):
            grid_cells(BASE, (SLOTS, 5, "sinks+recent"), **changes)


# Figures


def test_gap_change_equals_a_naive_bootstrap_of_both():
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 900, 9)
    full = rng.normal(2.5, 0.4, 9)
    lost = rng.gamma(6, 0.05, 9)
    by_name = {"full": full, "h2o": full + lost, "h2o-slot": full + 1.4 * lost, "mine": full + 0.5 * lost}
    by_name["centre"] = full + 0.6 * lost + rng.normal(0, 0.05, 9)
    group, losses = (LENGTH, "all"), {}
    for name, nll in by_name.items():
        losses[Run(name, None if name == "full" else BASE)] = {group: (found := DocumentLosses())}
        for index, (value, count) in enumerate(zip(nll, tokens, strict=True)):
            found.by_document["d", str(index)] += value * count, count
    runs = {each.name: each for each in losses}
    change, low, high = gap_change(losses, runs["mine"], runs["centre"], group)

    def ratio(name, counts):
        means = {key: (nll * tokens) @ counts / (tokens @ counts) for key, nll in by_name.items()}
        return gap_ratio(means[name], means["full"], [means["h2o"], means["h2o-slot"]])

    assert change == pytest.approx(ratio("mine", np.ones(9)) - ratio("centre", np.ones(9)))
    draws = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=2000)
    changes = [ratio("mine", counts) - ratio("centre", counts) for counts in draws]
    assert (low, high) == pytest.approx(tuple(np.quantile(changes, [0.025, 0.975])))


def test_a_picture_is_drawn_of_any_grid(tmp_path):
    def row(varied, num_slots=SLOTS, kernel=5, kinds=ALL, gap=0.5, method="lococo"):
        fused = None if method == "full" else 0 if kernel is None else 6
        figures = dict(ppl=9.0, gap_ratio=gap, untrained_gap_ratio=gap, change=None, change_low=None, change_high=None)
        place = dict(varied=varied, method=method, combination=kinds, num_slots=num_slots, kernel_size=kernel)
        return {**place, "num_fused": fused, **figures}

    methods = [row("baseline", None, None, None, None, "full"), row("baseline", 16, None, None, 1.0, "h2o")]
    centre, more = row("centre"), row("num_slots", 32)
    grids = {
        "all but kinds, no gap": [centre, more, row("kernel_size", kernel=3, gap=None)],
        "kinds": [centre, row("combine", kinds="sinks+recent", kernel=None), row("seed", gap=0.6)],
        "product": [centre, row("product", 32, 3)],
    }
    for name, cells in grids.items():
        plot_rows(methods + cells, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# The command


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, words = tmp_path_factory.mktemp("texts"), random.Random(1)
    for name, count in (("train", 60), ("heldout", 4)):
        lines = [json.dumps({"text": " ".join(words.choices(WORDS, k=LENGTH + 2))}) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def ablate(checkpoint, texts):
    def call(output, *options):
        given = ["--model", checkpoint, "--device", "cpu", "--dataset", texts / "train.jsonl", "--output", output]
        given += ["--data", texts / "heldout.jsonl", "--length", LENGTH, "--first", FIRST, "--block-size", BLOCK]
        return main(list(map(str, [*given, *options])))

    return call


def content(output):
    return json.loads(output.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def whole(ablate, tmp_path_factory):
    """Result of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "ablation"
    assert ablate(output, *SMALL, "--steps", 2) == 0
    return output


def test_figures_are_those_of_the_texts(whole, texts):
    rows = {(row["method"], row["varied"]): row for row in content(whole)["rows"]}
    assert [row["varied"] for row in content(whole)["rows"]] == ["baseline"] * 4 + ["centre", "kernel_size", "combine"]
    model, tokenizer = tiny_llama(), word_tokenizer()
    lines = [json.loads(line)["text"] for line in (texts / "heldout.jsonl").read_text().splitlines()]
    ids = [torch.tensor([tokenizer(line).input_ids[:LENGTH]]) for line in lines]

    def measured(config):
        with as_method(model, config):
            return torch.cat([token_nlls(model, each, FIRST) for each in ids]).double().mean().item()

    full, h2o = measured(None), measured(LoCoCoConfig.h2o(SLOTS, block_size=BLOCK))
    selection = measured(combined("sinks+heavy+recent", LoCoCoConfig(SLOTS, block_size=BLOCK)))
    torch.manual_seed(0)
    untrained = measured(LoCoCoConfig(SLOTS, block_size=BLOCK, kernel_size=5, head_rank=16, gate_init=0.05))
    row = rows["lococo", "combine"]
    assert (row["nll"], row["ppl"]) == pytest.approx((selection, math.exp(selection)))
    assert rows["h2o", "baseline"]["nll"] == pytest.approx(h2o)
    best = min(h2o, rows["h2o-slot", "baseline"]["nll"])
    assert best > full, "other texts, please: the gap ratio has no meaning"
    assert row["gap_ratio"] == row["untrained_gap_ratio"] == pytest.approx((selection - full) / (best - full), 1e-4)
    centre = rows["lococo", "centre"]
    assert centre["untrained_gap_ratio"] == pytest.approx((untrained - full) / (best - full), 1e-4)
    assert centre["gap_ratio"] != centre["untrained_gap_ratio"] and centre["change"] is None
    assert row["change"] == pytest.approx(row["gap_ratio"] - centre["gap_ratio"])
    assert budget(LoCoCoConfig(SLOTS)) == [centre[f"num_{kind}"] for kind in KINDS]


def test_its_files_are_there_and_nothing_else(whole):
    assert {path.name for path in whole.parent.iterdir()} == {"ablation.json", "ablation.md", "ablation.png"}
    assert content(whole)["not_measured"] == []
    assert "The centre is M=16, kernel 5, " + ALL in whole.with_suffix(".md").read_text()


def test_out_of_time_then_killed_then_finished_equals_uninterrupted(whole, ablate, tmp_path, monkeypatch, capsys):
    output, arguments = tmp_path / "ablation", [*SMALL, "--steps", 2]
    steps, calibrations = [], []
    with monkeypatch.context() as patched:
        taken = gap.MeasureGap.on_step_end
        patched.setattr(gap.MeasureGap, "on_step_end", lambda *args, **kw: steps.append(1) or taken(*args, **kw))
        patched.setattr(Deadline, "is_over", property(lambda self: bool(steps)))
        assert ablate(output, *arguments, "--time-limit", 1000) == 0
    assert len(steps) == 1 and not output.with_suffix(".json").exists()
    assert "no time for 3 cells; the same command goes on" in capsys.readouterr().err

    original = run.Calibration.run

    def counted(calibration, *args):
        calibrations.append(calibration.config.kernel_size)
        if len(calibrations) == 2:
            raise KeyboardInterrupt
        return original(calibration, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run.Calibration, "run", counted)
        patched.setattr(gap.MeasureGap, "on_step_end", lambda *args, **kw: steps.append(1) or taken(*args, **kw))
        ablate(output, *arguments)
    assert len(steps) == 2, "the step that was taken is not taken again"
    monkeypatch.setattr(run.Calibration, "run", counted)
    assert ablate(output, *arguments, "--steps", 3) == 2
    assert "holds a run with another data, recipe" in capsys.readouterr().err
    assert ablate(output, *arguments) == 0
    assert calibrations == [5, 3, 3, 5], "what was finished is not done again"
    assert content(output)["rows"] == content(whole)["rows"]
    assert not (tmp_path / "ablation.work").exists()


def test_what_there_was_time_for_is_written(ablate, tmp_path, monkeypatch, capsys):
    output, original, done = tmp_path / "ablation", run.Calibration.run, []
    arguments = ["--centre", SLOTS, 5, ALL, "--num-slots", 32, "--objective", "local", "--steps", 1, "--windows", 3]

    def slow(*args):
        done.append(original(*args))

    with monkeypatch.context() as patched:
        patched.setattr(run.Calibration, "run", slow)
        patched.setattr(Journal, "measure", in_time(Journal.measure, lambda: len(done) > 1))
        assert ablate(output, *arguments) == 0
    assert content(output)["not_measured"] == ["m32-k5-sinks+heavy+recent+fused-seed0"]
    assert [row["varied"] for row in content(output)["rows"]][-1] == "centre"
    assert "no time for 1 cells" in capsys.readouterr().err
    recorded = list((tmp_path / "ablation.work" / "recordings-0").iterdir())
    assert len(recorded) == 3, "texts are recorded once for all cells"
    assert ablate(output, *arguments) == 0
    assert [row["num_slots"] for row in content(output)["rows"] if row["method"] == "lococo"] == [SLOTS, 32]


def in_time(measure, is_over):
    def stopped(self, *args):
        if is_over():
            raise OutOfTime
        return measure(self, *args)

    return stopped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*CENTRE], "nothing is varied: give values for --num-slots"),
        ([*CENTRE, "--kernel-size", "4"], "kernel_size must be odd so that the convolution is centred, got 4"),
        ([*CENTRE, "--combine", "sinks+slots"], "unknown combination 'sinks+slots'"),
        ([*CENTRE, "--combine", "sinks:9+recent:9+fused"], "9 sinks + 9 recent leave nothing for fused"),
        ([*CENTRE, "--num-slots", "0"], "num_slots must be an integer of at least 1, got 0"),
        ([*CENTRE, "--num-slots", "64"], "windows of 48 tokens are too short for num_slots=64"),
        (["--centre", "16", "five", ALL], "Invalid value for '--centre'"),
        ([*SMALL, "--methods", "full,streaming"], "--methods needs full and h2o for the gap ratio, h2o is missing"),
        ([*SMALL, "--methods", "full,h2o,h3o"], "unknown method 'h3o'"),
        ([*SMALL, "--first", "48"], "--first must lie between 1 and 47"),
        ([*SMALL, "--steps", "0"], "Invalid value for '--steps'"),
        ([*SMALL, "--objective", "local", "--learning-rate", "1"], "--learning-rate is that of training from end"),
        ([*SMALL, "--objective", "local", "--windows", "2"], "local_texts must be more than the 2"),
        ([*SMALL, "--time-limit", "0"], "a time limit must be more than 0 seconds, got 0"),
        ([*SMALL, "--data", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_a_bad_grid_is_refused_before_a_model_is_loaded(ablate, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr("lococo.loading.load_model", None)
    assert ablate(tmp_path / "ablation", *options) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lococo: ")]
    assert message in error
    assert not list(tmp_path.iterdir())


def test_heads_are_not_measured_on_what_they_learn_from(ablate, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lococo.loading.load_model", None)
    assert ablate(tmp_path / "x", *SMALL, "--dataset", texts) == 2
    assert "heldout.jsonl is in --data and in --dataset" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(ablate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lococo.loading.load_model", None)
    (tmp_path / "thesis.txt").write_text("mine")
    assert ablate(tmp_path / "x", *SMALL, "--work-dir", tmp_path) == 2
    assert "has no ablation.json, so it is no run to go on with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
