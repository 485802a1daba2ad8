"""Heads for another number of slots, with the scores of heads that there are."""

import pytest
import torch
from calibrated import BLOCK, SLOTS, content, errors, heldout_windows, nll, result, rows
from safetensors.torch import load_file
from tiny import patched_llama, tiny_llama
from words import word_tokenizer

import lococo
from lococo import LoCoCoConfig
from lococo.heads import HEADS_NAME
from lococo.training.calibrate import plan_calibration


@pytest.fixture(scope="module")
def learned(run, tmp_path_factory):
    """Heads of the default recipe."""
    folder = tmp_path_factory.mktemp("learned") / "heads"
    assert run(folder, "--score-texts", "9", "--budget-texts", "1") == 0
    return folder


def scores_in(folder):
    return {name: each for name, each in load_file(folder / HEADS_NAME).items() if ".score." in name}


def test_the_scores_are_taken_and_the_slots_found(run, learned, texts, cache, tmp_path):
    assert run(tmp_path / "more", "--scores-from", learned, "--budget-texts", "1", num_slots=24) == 0
    before, after = scores_in(learned), scores_in(tmp_path / "more")
    assert before.keys() == after.keys() and len(before) == 12
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = content(tmp_path / "more")["config"]
    assert config["num_slots"] == 24 and config["slots_per_head"] != content(learned)["config"]["slots_per_head"]
    assert not rows(tmp_path / "more", "scores") and rows(learned, "scores")
    assert "--scores-from heads" in result(tmp_path / "more")["command"]
    model = lococo.patch_model(tiny_llama(), heads=tmp_path / "more")
    (saved,) = rows(tmp_path / "more", "saved")
    assert saved["heldout_nll"] == pytest.approx(nll(model, heldout_windows(texts, cache)), rel=1e-6)


def test_a_run_with_other_scores_is_another(run, learned, tmp_path, monkeypatch, capsys):
    def stopped(*arguments):
        raise KeyboardInterrupt

    given = ["--budget-texts", "1"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("lococo.training.calibrate.allocate_with_scales", stopped)
        run(tmp_path / "heads", "--scores-from", learned, *given)
    other = lococo.patch_model(tiny_llama(), heads=learned)
    with torch.no_grad():
        lococo.state.patch_of(other).networks[0].output.bias.add_(1)
    lococo.save_heads(other, tmp_path / "other")
    capsys.readouterr()
    assert run(tmp_path / "heads", "--scores-from", tmp_path / "other", *given, "--resume") == 2
    assert "holds a run with another scores_from" in errors(capsys)[0]
    assert run(tmp_path / "heads", "--scores-from", learned, *given, "--resume") == 0


def test_scores_of_another_kind_are_refused_before_a_model_is_there(texts, tmp_path):
    heads = lococo.save_heads(patched_llama(LoCoCoConfig(SLOTS, block_size=BLOCK)), tmp_path / "other")
    with pytest.raises(ValueError, match="learned with score='distant', not 'learned'"):
        plan_calibration(texts, output=tmp_path / "heads", num_slots=SLOTS, block_size=BLOCK, scores_from=heads)


def test_scores_serve_blocks_of_another_size(learned, texts, tmp_path):
    plan = plan_calibration(texts, output=tmp_path / "heads", num_slots=SLOTS, block_size=4, scores_from=learned)
    assert plan.config.block_size != lococo.heads.read_heads_config(learned).block_size


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(score_texts=3), ValueError, "score_texts must be 0 or not given with scores_from, got 3"),
        (dict(config=LoCoCoConfig(SLOTS, block_size=BLOCK)), ValueError, "a learned one, got score='distant'"),
        (dict(recipe="paper"), ValueError, "a learned one, got score='last'"),
        (dict(scores_from="nowhere/at/all"), OSError, "neither a folder nor a Hub id"),
    ],
)
def test_what_does_not_go_with_them_is_refused(options, error, message, learned, texts, tmp_path):
    given = {"scores_from": learned, "num_slots": SLOTS, "block_size": BLOCK, **options}
    with pytest.raises(error, match=message):
        plan_calibration(texts, output=tmp_path / "heads", **given)


def test_scores_of_a_model_of_another_shape_are_refused(run, learned, texts, tmp_path, cache):
    other = tiny_llama(num_key_value_heads=1)
    with pytest.raises(
        ValueError, match="slots_per_head is for 2 layers with 2 KV heads, the model has 2 layers with 1"
    ):
        lococo.calibrate(
            *(other, word_tokenizer(), texts),
            **dict(output=tmp_path / "heads", num_slots=SLOTS, block_size=BLOCK, scores_from=learned, length=80),
            **dict(first=40, num_windows=3, num_heldout=1, cache_dir=cache),
        )
    assert not lococo.is_patched(other) and not list(tmp_path.iterdir())
