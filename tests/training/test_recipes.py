"""Recipes of calibrations: what they ask for, and what options change of them."""

import pytest
from calibrated import (
    BLOCK,
    CHANGES,
    SLOTS,
    content,
    rows,
)
from safetensors.torch import load_file

from lococo.cli.main import main
from lococo.config import LoCoCoConfig
from lococo.heads import HEADS_NAME
from lococo.training.local import LocalConfig
from lococo.training.objectives import Distill, NextToken
from lococo.training.recipes import RECIPES, Recipe, ScoreConfig, adjusted

LEARNED = LoCoCoConfig(SLOTS, block_size=BLOCK, score="learned", num_sinks=2, num_heavy=10, num_recent=4)


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
