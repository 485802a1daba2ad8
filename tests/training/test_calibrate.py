"""``lococo calibrate`` from text to a heads folder: what stands in it is true, and what cannot be is refused."""

import dataclasses
import itertools
import random
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from calibrated import (
    BLOCK,
    CHANGES,
    FILES,
    FIRST,
    LENGTH,
    NOTHING,
    SHORT,
    SLOTS,
    WINDOWS,
    assert_same_heads,
    content,
    data_config,
    errors,
    heldout_windows,
    nll,
    result,
    rows,
)
from families import LENGTH_DEPENDENT_ROPES, causal_lm
from safetensors.torch import load_file
from tiny import tiny_llama
from words import WORDS, word_tokenizer, write_texts

import lococo
from lococo.cli.main import main
from lococo.compat import RELEASE
from lococo.config import LoCoCoConfig
from lococo.data import windows as data
from lococo.data.windows import prepare
from lococo.heads import HEADS_NAME
from lococo.methods import as_method, method_config
from lococo.training import gap
from lococo.training.calibrate import calibrate, plan_calibration
from lococo.training.local import LocalConfig
from lococo.training.objectives import Distill, NextToken
from lococo.training.recipes import RECIPES, Recipe, ScoreConfig, adjusted
from lococo.training.scores import train_scores

LEARNED = LoCoCoConfig(SLOTS, block_size=BLOCK, score="learned", num_sinks=2, num_heavy=10, num_recent=4)


def dynamic_llama():
    return tiny_llama(rope_scaling={**LENGTH_DEPENDENT_ROPES["dynamic"], "rope_theta": 1e4})


def hunyuan():
    return causal_lm("HunYuanDenseV1", head_dim=8)


# What is written


def test_a_heads_folder_is_written_and_nothing_else(heads):
    assert {path.name for path in heads.iterdir()} == FILES
    assert [path.name for path in heads.parent.iterdir()] == ["heads"]
    assert (heads / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "gap_ratio" in (heads / "README.md").read_text()
    training = content(heads)["training"]
    assert training["objective"] == "Distill" and training["sources"] == ["words.jsonl"]
    recipe = training["recipe"]
    assert (recipe["steps"], recipe["local"]["steps"], recipe["scores"]["texts"]) == (4, 3, 10)
    assert training["command"].startswith("lococo calibrate --model")
    assert not re.search(r"(^|[ =])/", training["command"]), "a folder of the author"


def test_what_a_calibration_took_is_in_its_record(run, tmp_path):
    began = time.monotonic()
    assert run(tmp_path / "heads", *NOTHING) == 0
    usage = result(tmp_path / "heads")["usage"]
    assert 0 < usage["seconds"] < time.monotonic() - began and not usage["resumed"]
    resident = psutil.Process().memory_info().rss
    assert 0.3 * resident < usage["peak_memory_bytes"] < psutil.virtual_memory().total


def test_recorded_figures_are_those_of_the_heads_in_the_folder(heads, texts, cache):
    metrics, windows, model = content(heads)["metrics"], heldout_windows(texts, cache), tiny_llama()
    measured = {}
    for name in ("full", "h2o", "h2o-slot"):
        with as_method(model, method_config(name, SLOTS, BLOCK)):
            measured[name] = nll(model, windows)
    assert metrics["heldout_nll_full"] == pytest.approx(measured["full"], rel=1e-6)
    assert metrics["heldout_nll_h2o"] == pytest.approx(min(measured["h2o"], measured["h2o-slot"]), rel=1e-6)
    assert measured["h2o"] != pytest.approx(measured["h2o-slot"], rel=1e-3)
    lococo.patch_model(model, heads=heads)
    assert metrics["heldout_nll"] == pytest.approx(nll(model, windows), rel=1e-6)
    full, h2o = metrics["heldout_nll_full"], metrics["heldout_nll_h2o"]
    assert h2o > full + 0.1
    assert metrics["gap_ratio"] == pytest.approx((metrics["heldout_nll"] - full) / (h2o - full))
    assert (metrics["heldout_windows"], metrics["length"], metrics["first"]) == (2, LENGTH, FIRST)


def test_rows_tell_what_happened(heads):
    metrics = content(heads)["metrics"]
    assert [row["step"] for row in rows(heads, "end-to-end") if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(heads, "end-to-end") if "gap_ratio" in row] == [2, 4]
    assert [row["layer"] for row in rows(heads, "local") if "error" in row] == [0, 1]
    scores = rows(heads, "scores")
    assert [row.get("texts") for row in scores] == [0, 8, None, None], "eight at once"
    assert [row.get("layer") for row in scores] == [None, None, 0, 1]
    assert all(0 < row["lost_oracle"] < min(row["lost_before"], row["lost"]) < 1 for row in scores)
    assert scores[0]["lost"] == scores[0]["lost_before"] and scores[1]["lost"] != scores[1]["lost_before"]
    for row in rows(heads):
        if "gap_ratio" in row:
            full, h2o = metrics["heldout_nll_full"], metrics["heldout_nll_h2o"]
            assert row["gap_ratio"] == pytest.approx((row["heldout_nll"] - full) / (h2o - full))
    (saved,) = rows(heads, "saved")
    assert saved["gap_ratio"] == metrics["gap_ratio"]
    assert saved["gap_ratio"] != rows(heads, "start")[0]["gap_ratio"]


def test_budgets_are_within_the_average_and_in_the_rows(heads):
    slots = content(heads)["config"]["slots_per_head"]
    assert [len(layer) for layer in slots] == [2, 2]
    counts = [count for layer in slots for count in layer]
    assert 0.9 * SLOTS < sum(counts) / 4 <= SLOTS and len(set(counts)) > 1
    assert [row["slots"] for row in rows(heads, "budgets")] == counts


def test_every_stage_changes_every_head(heads, run, tmp_path):
    assert run(tmp_path / "start", *SHORT, "--objective", "none", "--local-steps", "0") == 0
    assert run(tmp_path / "local", *SHORT, "--objective", "none") == 0
    start, local, both = (load_file(folder / HEADS_NAME) for folder in (tmp_path / "start", tmp_path / "local", heads))
    model = tiny_llama()
    torch.manual_seed(0)
    lococo.patch_model(model, LoCoCoConfig.from_pretrained(tmp_path / "start"))
    lococo.save_heads(model, tmp_path / "new", dtype=torch.bfloat16)
    new = load_file(tmp_path / "new" / HEADS_NAME)
    assert new.keys() == start.keys() == local.keys() == both.keys()
    for name in new:
        each = [tensors[name] for tensors in (new, start, local, both)]
        is_learned = [not torch.equal(*pair) for pair in itertools.pairwise(each)]
        assert is_learned == ([True, False, False] if is_of_score(name) else [False, True, True]), name
    assert {row["stage"] for row in rows(tmp_path / "start")} == {"scores", "budgets", "start", "saved"}
    assert content(tmp_path / "start")["training"]["objective"] is None


def is_of_score(name):
    return ".score." in name


def test_the_default_recipe_learns_scores_and_what_it_measures_is_in_the_folder(
    run, texts, cache, tmp_path, monkeypatch, capsys
):
    measured, learned, measure = [], [], gap.GapRatio.measure

    def noted_measure(self, model):
        networks = lococo.state.patch_of(model).networks
        measured.append([each.detach().clone() for index in networks for each in networks[index].parameters()])
        return measure(self, model)

    def noted_training(model, networks, windows, *arguments):
        learned.append(windows)
        return train_scores(model, networks, windows, *arguments)

    monkeypatch.setattr(gap.GapRatio, "measure", noted_measure)
    monkeypatch.setattr("lococo.training.calibrate.train_scores", noted_training)
    assert run(tmp_path / "heads", "--score-texts", "9", "--budget-texts", "1") == 0
    config = LoCoCoConfig.from_pretrained(tmp_path / "heads")
    assert config.compressor == "centroids" and config.num_fused > 0 and config.slots_per_head is not None
    tensors = load_file(tmp_path / "heads" / HEADS_NAME)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if is_of_score(name))
    scales = {name: tensor.item() for name, tensor in tensors.items() if not is_of_score(name)}
    found = {row["layer"]: row["log_scale"] for row in rows(tmp_path / "heads", "budgets")}
    assert scales == {f"layers.{layer}.log_scale": scale for layer, scale in found.items()} and len(scales) == 2
    model = lococo.patch_model(tiny_llama(), heads=tmp_path / "heads")
    kept = [each for network in lococo.state.patch_of(model).networks.values() for each in network.parameters()]
    for before, after, here in zip(*measured, kept, strict=True):
        assert torch.equal(after, here) and torch.equal(before.bfloat16().float(), here)
    assert any(not torch.equal(*pair) for pair in zip(*measured, strict=True)), "nothing was rounded"
    train = prepare(data_config(texts), word_tokenizer(), cache / "tokens")[0]
    assert len(learned) == 1 and torch.equal(learned[0], train.evenly(9))
    (start,), (saved,) = rows(tmp_path / "heads", "start"), rows(tmp_path / "heads", "saved")
    assert saved["heldout_nll"] == pytest.approx(nll(model, heldout_windows(texts, cache)), rel=1e-6)
    assert "loss" not in start
    said = capsys.readouterr().out.splitlines()
    assert (
        sum(line.startswith("scores, step ") for line in said) == 2 and "of the way from the distant score" in said[0]
    )
    assert f"as saved: gap ratio {saved['gap_ratio']:.3f}" in said[-2]


def calibrate_in_python(model, dataset, output, cache, **options):
    """The calibration of ``SHORT`` by the package's own function."""
    short = dict(recipe="blend", score_texts=10, budget_texts=4, local_steps=3, local_texts=4)
    short |= dict(steps=4, windows_per_step=2, measure_every=2)
    given = dict(num_slots=SLOTS, block_size=BLOCK, length=LENGTH, first=FIRST, num_windows=12, num_heldout=2)
    return lococo.calibrate(
        model, word_tokenizer(), dataset, output=output, cache_dir=cache, **{**given, **short, **options}
    )


def drawn():
    """The next random numbers."""
    return random.random(), np.random.rand(), torch.rand(1).item()


def seed_all():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


@pytest.fixture(scope="module")
def by_function(texts, cache, tmp_path_factory):
    """A model after its calibration by the function, what that gave and told, and the random numbers after it."""
    told, model, folder = [], tiny_llama(), tmp_path_factory.mktemp("function")
    seed_all()
    made = calibrate_in_python(model, [texts], folder / "heads", cache, on_progress=told.append)
    return model, made, told, drawn()


def test_the_function_makes_the_heads_of_the_command_and_tells_what_it_measures(heads, by_function):
    _, made, told, _ = by_function
    assert_same_heads(made.folder, heads)
    assert [path.name for path in made.folder.parent.iterdir()] == ["heads"]
    assert sorted(str(row) for row in told if "closed" not in row) == sorted(map(str, made.rows))
    assert [(row["step"], row["steps"]) for row in told if "closed" in row] == [(1, 2), (2, 2)]
    measured = [row["gap_ratio"] for row in told if "gap_ratio" in row]
    assert len(measured) == 5 and measured[-1] == made.gap_ratio


def test_what_is_not_said_follows_from_the_length(texts, tmp_path):
    for length, first in ((80, 40), (2048, 512)):
        plan = plan_calibration(texts, output=tmp_path / "heads", num_slots=16, length=length)
        assert (plan.first, plan.config.block_size, plan.data.num_windows) == (first, 16, plan.recipe.windows_needed)
        assert plan.work == tmp_path / "heads.work"


def own_documents(count=10):
    words = random.Random(5)
    return [" ".join(words.choices(WORDS, k=LENGTH + 40)) for _ in range(count)]


@pytest.mark.parametrize(
    "kind", ["texts", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rows", "folder"))]
)
def test_ten_documents_of_ones_own_are_enough(kind, tmp_path):
    dataset = own_documents()
    if kind == "rows":
        dataset = [{"text": text, "domain": "mine"} for text in dataset]
    elif kind == "folder":
        (tmp_path / "texts").mkdir()
        for index, text in enumerate(dataset):
            (tmp_path / "texts" / f"{index}.txt").write_text(text)
        dataset = tmp_path / "texts"
    with pytest.warns(UserWarning, match="1 held-out windows of 8 wanted"):
        made = calibrate_in_python(
            tiny_llama(), dataset, tmp_path / "heads", tmp_path / "cache", num_heldout=8, num_windows=None, steps=2
        )
    windows = content(made.folder)["metrics"]["heldout_windows"]
    assert 1 <= windows < 5 and made.gap_ratio is not None
    lococo.patch_model(tiny_llama(), heads=made.folder)


def test_too_few_or_too_short_documents_are_refused_with_counts(tmp_path):
    for dataset, message in {
        "one": (own_documents(1), "1 document was read, and 2 are needed"),
        "short": (
            [text[:100] for text in own_documents()],
            "10 documents were read, the longest of .* length of at m",
        ),
    }.values():
        with pytest.raises(ValueError, match=message):
            calibrate_in_python(tiny_llama(), dataset, tmp_path / "heads", tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.filterwarnings("ignore:the data holds 1 training windows")
def test_one_window_is_enough_for_scores_and_slots_per_head(tmp_path):
    once = dict(local_steps=0, steps=1, windows_per_step=1)
    made = calibrate_in_python(tiny_llama(), own_documents(2), tmp_path / "heads", tmp_path / "cache", **once)
    assert [row["texts"] for row in made.rows if "texts" in row] == [0]
    assert content(made.folder)["config"]["slots_per_head"] is not None


def test_scores_learn_from_the_beginnings_of_texts_before_the_slots_of_heads(texts, cache, tmp_path, monkeypatch):
    """Which change nothing of what they learn, found or given."""
    recipe, seen, learned = Recipe(objective=None, steps=0, budget_texts=1), [], []
    recipe = dataclasses.replace(recipe, scores=ScoreConfig(texts=5, length=40, texts_at_once=2))

    def noted(model, networks, windows, *arguments):
        rows = train_scores(model, networks, windows, *arguments)
        seen.append((networks.config, windows))
        learned.append(networks.digest())
        return rows

    monkeypatch.setattr("lococo.training.calibrate.train_scores", noted)
    given = dict(recipe=recipe, score_texts=None, local_steps=None, steps=None, windows_per_step=None)
    for index, slots in enumerate((None, ((24, 8), (12, 20)))):
        config = dataclasses.replace(LEARNED, slots_per_head=slots)
        options = {**given, "config": config, "budget_texts": None}
        made = calibrate_in_python(tiny_llama(), texts, tmp_path / str(index), cache, measure_every=None, **options)
        found = LoCoCoConfig.from_pretrained(made.folder).slots_per_head
        assert found == slots if slots else found is not None
        assert [row["texts"] for row in made.rows if "texts" in row] == [0, 2, 4]
    train = prepare(data_config(texts), word_tokenizer(), cache / "tokens")[0]
    assert all(config == LEARNED and torch.equal(windows, train.evenly(5)[:, :40]) for config, windows in seen)
    assert len(seen) == 2 and learned[0] == learned[1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(recipe="ours"), ValueError, "recipe must be one of default, blend, paper, or a Recipe, got 'ours'"),
        (dict(objective="mse"), ValueError, "objective must be one of distill, next-token, none, got 'mse'"),
        (dict(recipe=["default"]), ValueError, "recipe must be one of default, blend, paper, or a"),
        (dict(lenght=5), TypeError, "lococo.calibrate has no option lenght; there are .* length, .* measure_every"),
        (dict(a=1, b=2), TypeError, "lococo.calibrate has no option a, b; there are"),
        (dict(dataset=[]), ValueError, "dataset is empty"),
        (dict(dataset=None), TypeError, "dataset must be a Hub id, .* got None"),
        (dict(dataset=""), ValueError, "the name of a source of text is empty"),
        (dict(dataset=["", "org/name"]), ValueError, "the name of a source of text is empty"),
        (dict(output=""), ValueError, "output is empty; write '.' for the working directory"),
        (dict(output=None), TypeError, "output must be a path, got None"),
        (dict(work_dir=""), ValueError, "work_dir is empty"),
        (dict(cache_dir=3), TypeError, "cache_dir must be a path, got 3"),
        (dict(num_slots="16"), ValueError, "num_slots must be an integer of at least 1, got '16'"),
        (dict(block_size=8.0), ValueError, "block_size must be an integer of at least 1, got 8.0"),
        (dict(length="80", first=None), ValueError, "length must be an integer of at least 2, got '80'"),
        (dict(first=1.5), ValueError, "first must lie between 1 and 79 for windows of 80, got 1.5"),
        (dict(steps=1.5), ValueError, "steps must be a whole number, got 1.5"),
        (dict(steps=True), ValueError, "steps must be a whole number, got True"),
        (dict(windows_per_step="2"), ValueError, "windows_per_step must be a whole number, got '2'"),
        (dict(local_steps=0.5), ValueError, "local_steps must be an integer of at least 0, got 0.5"),
        (dict(learning_rate="fast"), ValueError, "learning_rate must be positive, got 'fast'"),
        (dict(learning_rate=float("inf")), ValueError, "learning_rate must be positive, got inf"),
        (dict(objective=["distill"]), ValueError, "objective must be one of"),
        (dict(local=3, local_steps=None), TypeError, "local must be a LocalConfig or None, got 3"),
        (dict(scores=3, score_texts=None), TypeError, "scores must be a ScoreConfig or None, got 3"),
        (dict(score_texts=2.5), ValueError, "score_texts must be an integer of at least 0, got 2.5"),
        (dict(score_texts=0, config=LEARNED), ValueError, "'learned' learns from texts: .* or use score='distant'"),
        (dict(config=LoCoCoConfig(16)), ValueError, "score='distant', num_heavy=.* got 10; or use score='learned'"),
        (dict(config=LEARNED), ValueError, r"objective trains blends, .* \(num_fused=0\): use recipe='bl.* Distill"),
        (dict(config=LEARNED, objective="none"), ValueError, "local_steps trains blends, .* recipe='blend', .* got 3"),
        (dict(config={}), TypeError, "config must be a LoCoCoConfig, got {}"),
        (dict(dtype="bfloat16"), TypeError, "dtype must be torch.bfloat16, .* got 'bfloat16'"),
        (dict(dtype=torch.int8), TypeError, "dtype must be torch.bfloat16, .* got torch.int8"),
        (dict(resume="no"), TypeError, "resume must be True or False, got 'no'"),
        (dict(time_limit="1h"), ValueError, "a time limit must be more than 0 seconds, got '1h'"),
        (dict(on_progress="print"), TypeError, "on_progress must be a function of a row, got 'print'"),
        (dict(training_arguments=[1]), TypeError, r"training_arguments must be a dict, got \[1\]"),
        (dict(training_arguments={"nope": 1}), ValueError, "transformers.TrainingArguments has no nope"),
        (dict(training_arguments={"max_steps": 1}), ValueError, "must leave out max_steps: it follows from steps"),
        (dict(training_arguments={"seed": 1}), ValueError, "must leave out seed: it follows from seed"),
        (dict(training_arguments={"push_to_hub": True}), ValueError, "push_to_hub=True is not supported by HeadTr"),
    ],
)
def test_bad_options_of_the_function_are_refused(options, error, message, texts, tmp_path):
    given = [options.pop(name, value) for name, value in dict(dataset=texts, output=tmp_path / "heads").items()]
    with pytest.raises(error, match=message):
        calibrate_in_python(None, *given, options.pop("cache_dir", tmp_path / "cache"), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "tokenizer", "error", "message"),
    [
        (lambda: "org/model", word_tokenizer, TypeError, r"model must be a loaded model .* got 'org/model'; load it"),
        (lambda: None, word_tokenizer, TypeError, "model must be a loaded model .* got None"),
        (tiny_llama, lambda: "org/model", TypeError, "tokenizer must be a Transformers tokenizer, got 'org/model'"),
        (lambda: lococo.patch_model(tiny_llama()), word_tokenizer, ValueError, "patched: call lococo.unpatch_model"),
        (lambda: torch.nn.Linear(1, 1), word_tokenizer, ValueError, "Linear"),
        (dynamic_llama, word_tokenizer, ValueError, "must see keys before .* 'dynamic' have .*; use score='distant'"),
        (
            lambda: causal_lm("Phi", partial_rotary_factor=0.5),
            word_tokenizer,
            ValueError,
            "'learned' .* use score='di",
        ),
        *(
            [(hunyuan, word_tokenizer, ValueError, "normed with weights .* use score='di")]
            if RELEASE >= (5, 0)
            else []
        ),
    ],
)
def test_other_models_are_refused_before_data_are_read(model, tokenizer, error, message, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("lococo.training.calibrate.prepare", lambda *arguments: pytest.fail("data were read"))
    with pytest.raises(error, match=message):
        calibrate(model(), tokenizer(), texts, output=tmp_path / "heads", num_slots=SLOTS, length=LENGTH)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_keys_cannot_be_moved_is_calibrated_without_scores(texts, cache, tmp_path):
    model, changes = dynamic_llama(), dict(score_texts=0, local_steps=0, objective="none")
    made = calibrate_in_python(model, texts, tmp_path / "heads", cache, **changes)
    windows, measured = heldout_windows(texts, cache), content(made.folder)["metrics"]
    with as_method(model, method_config("h2o", SLOTS, BLOCK)):
        assert measured["heldout_nll_h2o"] == pytest.approx(nll(model, windows), rel=1e-6)


def test_a_value_that_the_trainer_does_not_take_leaves_nothing_that_is_in_the_way(texts, cache, tmp_path):
    for value in ("sideways", None):
        more = dict(steps=1, windows_per_step=1, local_steps=0, budget_texts=0, score_texts=0)
        more |= dict(training_arguments={"lr_scheduler_type": value}) if value else {}
        try:
            calibrate_in_python(tiny_llama(), texts, tmp_path / "heads", cache, **more)
        except ValueError as error:
            assert "sideways" in str(error)
            assert not list(tmp_path.iterdir())
    assert (tmp_path / "heads").is_dir()


def test_random_numbers_are_drawn_as_if_nothing_had_been(by_function):
    seed_all()
    assert by_function[-1] == drawn()


def test_the_model_is_as_it_was(by_function):
    (model, *_), expected = by_function, tiny_llama()
    assert not lococo.is_patched(model) and not any(module.training for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad and ours.grad is None


def test_heads_may_be_saved_as_they_were_trained(texts, cache, tmp_path):
    short = dict(dtype=None, steps=1, windows_per_step=1, local_steps=0, score_texts=2)
    made = calibrate_in_python(tiny_llama(), texts, tmp_path / "heads", cache, **short)
    assert made.folder == tmp_path / "heads" and made.rows[-1]["stage"] == "end-to-end"
    assert made.rows == rows(made.folder) and made.gap_ratio == content(made.folder)["metrics"]["gap_ratio"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "heads" / HEADS_NAME).values()} == {torch.float32}


def test_running_again_replaces_the_folder(run, tmp_path, capsys):
    for seed in ("1", "2"):
        assert run(tmp_path / "heads", *NOTHING, "--seed", seed) == 0
        assert f"--seed {seed}" in content(tmp_path / "heads")["training"]["command"]
        assert {path.name for path in (tmp_path / "heads").iterdir()} == FILES
        assert "heads: gap ratio " in capsys.readouterr().out
    (tmp_path / "heads" / "mine.txt").write_text("mine")
    assert run(tmp_path / "heads", *NOTHING) == 2
    assert "also holds mine.txt" in errors(capsys)[0]


def test_where_h2o_loses_nothing_there_is_no_gap(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(gap, "mean_nll", lambda *arguments: 2.0)
        assert run(tmp_path / "heads", *SHORT, "--cache-dir", tmp_path / "cache") == 0
    assert "heads: gap ratio - (" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "heads").iterdir()} == FILES
    measured = [row for row in rows(tmp_path / "heads") if "gap_ratio" in row]
    assert len(measured) >= 4 and all(row["gap_ratio"] is None and row["heldout_nll"] == 2.0 for row in measured)
    metrics = content(tmp_path / "heads")["metrics"]
    assert metrics["gap_ratio"] is None and metrics["heldout_nll_h2o"] == metrics["heldout_nll_full"] == 2.0
    lococo.patch_model(tiny_llama(), heads=tmp_path / "heads")


@pytest.mark.parametrize("h2o", [1.0, 1.000001, 0.9])
def test_gap_of_training_has_the_guard_of_all(h2o, monkeypatch):
    monkeypatch.setattr(gap, "mean_nll", lambda *arguments: 1.5)
    measured = gap.GapRatio(None, FIRST, 1.0, h2o).measure(None)
    assert measured == {"heldout_nll": 1.5, "gap_ratio": None}
    assert gap.GapRatio(None, FIRST, 1.0, 2.0).measure(None)["gap_ratio"] == 0.5


def test_calibrate_is_a_name_of_the_package_and_imported_when_asked_for():
    assert lococo.calibrate is calibrate
    with pytest.raises(AttributeError, match="has no attribute 'calibrated'"):
        _ = lococo.calibrated
    script = "import sys, lococo; print({'datasets', 'matplotlib', 'lococo.training'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


def test_tokens_and_figures_are_shared_between_runs(run, heads, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_find_windows", None)
    assert run(tmp_path / "more-slots", *NOTHING, num_slots=24) == 0
    measured, original = [], gap.mean_nll
    monkeypatch.setattr(gap, "mean_nll", lambda *arguments: measured.append(1) or original(*arguments))
    assert run(tmp_path / "again", *NOTHING) == 0
    assert len(measured) == 2, "the start and the end; baselines are there"


# Recipes


def test_the_paper_recipe_is_that_of_the_paper():
    config, recipe = RECIPES["paper"](512, 512)
    assert (recipe.steps, recipe.windows_per_step, recipe.learning_rate) == (200, 128, 5e-2)
    assert 128 * 4096 == 524_288 and recipe.windows_needed == 200 * 128
    assert type(recipe.objective) is NextToken and recipe.objective.backprop_tokens == 4 * 512
    assert (recipe.budget_texts, recipe.local, recipe.scalar_lr_factor) == (0, None, 1.0)
    assert config == LoCoCoConfig.reference(512, block_size=512)
    assert (config.normalization, config.init_std, config.head_rank) == ("softmax", 1.0, None)


def test_the_paper_recipe_runs(run, tmp_path):
    assert run(tmp_path / "heads", "--recipe", "paper", "--steps", "2", "--windows-per-step", "2") == 0
    written = content(tmp_path / "heads")
    config = written["config"]
    assert (config["normalization"], config["num_heavy"], config["slots_per_head"]) == ("softmax", SLOTS // 2, None)
    assert written["training"]["objective"] == "NextToken"
    assert [row["learning_rate"] for row in rows(tmp_path / "heads") if "loss" in row] == [5e-2, 2.5e-2]
    weight = load_file(tmp_path / "heads" / HEADS_NAME)["layers.0.conv.weight"].float()
    assert weight.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("block_size", [8, 512, 1024, 2048])
def test_back_propagation_reaches_over_a_block(block_size):
    recipes = [make(4096, block_size)[1] for make in RECIPES.values()]
    reaching = [recipe.objective.backprop_tokens for recipe in recipes if recipe.objective is not None]
    assert reaching and min(reaching) >= 2 * block_size


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], {}),
        (["--steps", "7"], {"steps": 7}),
        (["--windows-per-step", "3"], {"windows_per_step": 3}),
        (["--learning-rate", "0.5"], {"learning_rate": 0.5}),
        (["--score-texts", "8"], {"scores": ScoreConfig(texts=8)}),
        (["--score-texts", "0"], {"scores": None}),
        (["--budget-texts", "0"], {"budget_texts": 0}),
        (["--local-texts", "5"], {"local_texts": 5}),
        (["--measure-every", "9"], {"measure_every": 9}),
        (["--local-steps", "4"], {"local": LocalConfig(steps=4)}),
        (["--local-steps", "0"], {"local": None}),
        (["--objective", "none"], {"objective": None}),
        (["--objective", "none", "--steps", "0"], {"objective": None, "steps": 0}),
        (["--objective", "next-token"], {"objective": NextToken(backprop_tokens=1024)}),
        (["--objective", "distill"], {"objective": Distill(backprop_tokens=1024)}),
        (["--backprop-tokens", "99"], {"objective": Distill(backprop_tokens=99)}),
        (["--backprop-tokens", "0"], {"objective": Distill()}),
        (["--objective", "next-token", "--backprop-tokens", "0"], {"objective": NextToken()}),
    ],
)
def test_options_change_the_recipe(options, changes, monkeypatch):
    given = {}
    monkeypatch.setattr("lococo.training.calibrate.plan_calibration", lambda **more: given.update(more) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["calibrate", "--model", "m", "--output", "o", *options])
    named = {name: given[name] for name in CHANGES}
    recipe = adjusted(Recipe(), **named)
    assert recipe == Recipe(**changes)
    local_first = Recipe(local=LocalConfig(steps=9, learning_rate=0.1), objective=None)
    kept = adjusted(local_first, **named)
    if "local" not in changes:
        assert kept.local == local_first.local
    elif changes["local"]:
        assert kept.local == LocalConfig(steps=4, learning_rate=0.1)


def test_windows_needed_are_those_of_the_hungriest_stage():
    assert Recipe().windows_needed == 50
    assert Recipe(steps=3, windows_per_step=4).windows_needed == 12
    assert Recipe(objective=None).windows_needed == 7
    assert Recipe(objective=None, budget_texts=0).windows_needed == 1
    assert Recipe(objective=None, local=LocalConfig()).windows_needed == 12
    assert Recipe(scores=ScoreConfig(texts=70)).windows_needed == 70


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(texts=0), "score texts must be at least 1, got 0"),
        (dict(length=1), "score length must be at least 2, got 1"),
        (dict(length="all"), "score length must be a whole number, got 'all'"),
        (dict(texts_per_step=0), "score texts_per_step must be at least 1, got 0"),
        (dict(texts_per_step=4, texts_at_once=3), "score texts_at_once must be at least 4, got 3"),
        (dict(repeats=0), "score repeats must be at least 1, got 0"),
        (dict(learning_rate=0), "score learning_rate must be positive, got 0"),
        (dict(weight_decay=-0.1), "score weight_decay must be at least 0, got -0.1"),
    ],
    ids=str,
)
def test_scores_cannot_learn_by_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ScoreConfig(**settings)


def test_the_default_recipe_goes_nowhere_backward():
    for num_slots in (1, 2, 3, 5, 16, 128, 512):
        config, recipe = RECIPES["default"](num_slots, 64)
        assert (config.compressor, config.score, config.slots_per_head) == ("centroids", "learned", None)
        assert config.num_sinks == 1 and config.num_slots == num_slots
        assert config.num_recent <= 6 and config.num_fused == min(max(num_slots // 16, 1), num_slots - 1)
        assert (recipe.objective, recipe.local, recipe.steps) == (None, None, 0)
        assert recipe.scores == ScoreConfig() and recipe.budget_texts > 0
        blend, _ = RECIPES["blend"](num_slots, 64)
        assert (blend.compressor, blend.score, blend.num_slots, blend.block_size) == ("conv", "learned", num_slots, 64)
        assert blend.num_fused > 0 or num_slots <= 5


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-slots", "0"], "num_slots must be an integer of at least 1, got 0"),
        (["--block-size", "0"], "block_size must be an integer of at least 1, got 0"),
        (["--recipe", "blend", "--steps", "0"], "steps must be at least 1 with an objective"),
        (["--recipe", "blend", "--windows-per-step", "0"], "windows_per_step must be at least 1, got 0"),
        (["--learning-rate", "0"], "learning_rate must be positive, got 0.0"),
        (["--learning-rate", "nan"], "learning_rate must be positive, got nan"),
        (["--backprop-tokens", "-1"], "backprop_tokens must be an integer of at least 0, got -1"),
        (["--score-texts", "-1"], "score_texts must be an integer of at least 0, got -1"),
        (["--recipe", "paper", "--score-texts", "3"], "must be 0 .*score='last', .* got 3; or use score='learned'"),
        (["--num-slots", "2"], r"no score that learns gives slots \(score='learned', num_heavy=0\), .* more slots"),
        (
            ["--num-slots", "1", "--score-texts", "0", "--objective", "distill", "--steps", "5"],
            "objective trains blends, .* use recipe='blend', .* got Distill",
        ),
        (["--steps", "3"], "steps is for end-to-end training, which the recipe leaves out: use recipe='blend', got 3"),
        (["--learning-rate", "0.1"], "learning_rate is for end-to-end training, .* use recipe='blend', got 0.1"),
        (
            ["--num-slots", "1", "--score-texts", "0", "--local-steps", "3"],
            "local_steps trains blends, .* use recipe='blend', .* got 3",
        ),
        (
            ["--num-slots", "8", "--block-size", "12", "--length", "20", "--first", "9"],
            "windows of 20 tokens are too short for scores: .* a block of 12; choose windows of two blocks at least",
        ),
        (
            ["--block-size", "1030", "--length", "4096"],
            r"windows of 2048 tokens \(cut to ScoreConfig.length\) are too short for scores: .* a block of 1030",
        ),
        (["--budget-texts", "-1"], "budget_texts must be at least 0, got -1"),
        (["--local-steps", "-1"], "local_steps must be an integer of at least 0, got -1"),
        (["--local-steps", "3", "--local-texts", "2"], "local_texts must be more than the 2"),
        (["--measure-every", "0"], "measure_every must be at least 1, got 0"),
        (["--windows", "0"], "num_windows must be a whole number of at least 1, got 0"),
        (["--heldout", "0"], "num_heldout must be at least 1"),
        (["--length", "1"], "length must be a whole number of at least 2, got 1"),
        (["--first", "80"], "first must lie between 1 and 79 for windows of 80, got 80"),
        (["--first", "0"], "first must lie between 1 and 79"),
        (["--length", "25", "--first", "9"], "too short for num_slots=16 and block_size=8: .* evicted after 24"),
        (["--dataset", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--dtype", "float33"], "--dtype must be float32, bfloat16, ..., got 'float33'"),
        (["--device", "gpu"], "--device must be cpu, cuda, cuda:1, ..., got 'gpu'"),
        (["--deepspeed", "missing.json"], "missing.json: no such DeepSpeed config file"),
        (["--output", "."], "has no lococo_config.json and is not empty"),
        (["--output", "words.jsonl/heads"], "words.jsonl/heads cannot be written: .*words.jsonl is a file"),
        (["--work-dir", "words.jsonl"], "words.jsonl/run.json cannot be written"),
        (["--cache-dir", "words.jsonl"], "words.jsonl/tokens cannot be written"),
        (["--dataset", ""], "Option '--dataset' requires an argument"),
    ],
)
def test_bad_arguments_are_one_line_before_a_model_is_loaded(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "words.jsonl", 1)
    arguments = ["--model", "no-model", "--dataset", "words.jsonl", "--output", "heads", "--num-slots", str(SLOTS)]
    assert main(["calibrate", *arguments, "--block-size", str(BLOCK), *WINDOWS, *options]) == 2
    (error,) = errors(capsys)
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["words.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "body"], "no column 'body'"),
        (["--boundaries", "none"], "EOS"),
        (["--length", "200"], "not one training window of 200 tokens"),
    ],
)
def test_what_the_text_is_not_like_is_one_line(options, message, run, tmp_path, capsys):
    assert run(tmp_path / "heads", *NOTHING, *options) == 2
    (error,) = errors(capsys)
    assert message in error
    assert not list(tmp_path.iterdir())


# The example


def test_the_example_trains_heads_and_measures_them(checkpoint, texts, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "examples" / "calibrate.py"
    arguments = ["--model", checkpoint, "--data", texts, "--output", tmp_path / "heads"]
    arguments += ["--num-slots", SLOTS, "--length", LENGTH, "--steps", 2]
    monkeypatch.setattr(sys, "argv", [script.name, *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "perplexity with the full cache: " in printed and "with 16 slots per layer: " in printed
    model = lococo.patch_model(tiny_llama(), heads=tmp_path / "heads")
    config, patch = LoCoCoConfig.from_pretrained(tmp_path / "heads"), lococo.state.patch_of(model)
    assert all((head.gate != config.gate_init).any() for head in patch.heads.values()) and patch.heads
    assert all(network.output.weight.abs().max() > 0 for network in patch.networks.values())
    assert len(patch.networks) == 2 and config.slots_per_head is not None
