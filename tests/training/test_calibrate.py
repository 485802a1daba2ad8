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
    FILES,
    FIRST,
    LENGTH,
    NOTHING,
    SHORT,
    SLOTS,
    assert_same_heads,
    calibrate_in_python,
    content,
    data_config,
    dynamic_llama,
    errors,
    heldout_windows,
    nll,
    result,
    rows,
)
from families import KEPT, build
from safetensors.torch import load_file
from tiny import tiny_llama
from words import WORDS, word_tokenizer

import lococo
from lococo.config import LoCoCoConfig
from lococo.data import windows as data
from lococo.data.windows import prepare
from lococo.heads import HEADS_NAME
from lococo.methods import as_method, method_config
from lococo.training import gap
from lococo.training.calibrate import calibrate, plan_calibration
from lococo.training.recipes import Recipe, ScoreConfig
from lococo.training.scores import train_scores

LEARNED = LoCoCoConfig(SLOTS, block_size=BLOCK, score="learned", num_sinks=2, num_heavy=10, num_recent=4)


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
        assert plan.config.slot_bits == 16
    assert plan_calibration(texts, output=tmp_path / "heads", num_slots=16, slot_bits=(8, 4)).config.bits == (8, 4)


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


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("family", ["Gemma2", "Qwen2-half-window"])
def test_layers_that_keep_their_window_get_no_slots_and_nothing_is_learned_for_them(
    family, compress, texts, cache, tmp_path
):
    config = dataclasses.replace(LEARNED, num_heavy=6, compress_windows=compress)  # 4 slots are fused
    given = dict(recipe=Recipe(), config=config, score_texts=2, local_steps=2, steps=1, windows_per_step=1, dtype=None)
    kept = [] if compress else [KEPT[family]]
    others = [layer for layer in (0, 1) if layer not in kept]
    made = calibrate_in_python(build(family), texts, tmp_path / "heads", cache, **given)
    found, metrics = LoCoCoConfig.from_pretrained(made.folder), content(made.folder)["metrics"]
    assert found.compress_windows is compress
    assert [layer for layer, slots in enumerate(found.slots_per_head) if slots is None] == kept
    slots = [count for layer in others for count in found.slots_per_head[layer]]
    assert 0.9 * SLOTS < sum(slots) / len(slots) <= SLOTS
    assert [row["slots"] for row in rows(made.folder, "budgets")] == slots
    fusing = [layer for layer in others if any(head.num_fused for head in found.layer_configs(layer))]
    assert fusing and [row["layer"] for row in rows(made.folder, "local") if "error" in row] == fusing
    model, windows = build(family), heldout_windows(texts, cache)
    with lococo.patched(model, heads=made.folder):
        assert metrics["heldout_nll"] == pytest.approx(nll(model, windows), rel=1e-6)
    measured = []
    for name in ("h2o", "h2o-slot"):
        changes = dict(compress_windows=compress) if name == "h2o" else {}
        with as_method(model, dataclasses.replace(method_config(name, SLOTS, BLOCK), **changes)):
            measured.append(nll(model, windows))
    assert metrics["heldout_nll_h2o"] == pytest.approx(min(measured), rel=1e-6)


def test_where_every_layer_keeps_its_window_there_is_nothing_to_calibrate(texts, cache, tmp_path):
    config = dataclasses.replace(LEARNED, num_heavy=6, compress_windows=False)
    with pytest.raises(ValueError, match="every layer of MistralForCausalLM keeps its sliding window"):
        calibrate_in_python(build("Mistral-window"), texts, tmp_path / "heads", cache, recipe=Recipe(), config=config)
    assert not list(tmp_path.iterdir())


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


def measured(model, texts, cache, output):
    """Figures of heads that nothing was learned for."""
    nothing = dict(score_texts=0, objective="none", budget_texts=0, local_steps=0, steps=None)
    calibrate_in_python(model, texts, output, cache, **nothing)
    return content(output)["metrics"]


def test_models_in_training_mode_are_measured_without_dropout(texts, tmp_path):
    expected = measured(tiny_llama(), texts, tmp_path / "cache", tmp_path / "expected")
    model = tiny_llama(attention_dropout=0.5).train()
    found = measured(model, texts, tmp_path / "other_cache", tmp_path / "heads")
    assert found == pytest.approx(expected, abs=1e-6)
    assert all(module.training for module in model.modules())


def test_figures_of_the_same_weights_in_another_config_are_not_reused(texts, tmp_path):
    cache = tmp_path / "cache"
    measured(tiny_llama(), texts, cache, tmp_path / "plain")
    model = tiny_llama(rope_theta=100.0)
    found = measured(model, texts, cache, tmp_path / "other")["heldout_nll_full"]
    assert found == pytest.approx(nll(model, heldout_windows(texts, cache)), abs=1e-6)
