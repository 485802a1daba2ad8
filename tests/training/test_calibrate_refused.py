"""Calibrations that cannot be run, refused before any work by the command and by the function."""

import re

import pytest
import torch
from calibrated import (
    BLOCK,
    LENGTH,
    NOTHING,
    SLOTS,
    WINDOWS,
    calibrate_in_python,
    dynamic_llama,
    errors,
)
from families import causal_lm
from tiny import tiny_llama
from words import word_tokenizer, write_texts

import lococo
from lococo.cli.main import main
from lococo.compat import RELEASE
from lococo.config import LoCoCoConfig
from lococo.training.calibrate import calibrate

LEARNED = LoCoCoConfig(SLOTS, block_size=BLOCK, score="learned", num_sinks=2, num_heavy=10, num_recent=4)


def hunyuan():
    return causal_lm("HunYuanDenseV1", head_dim=8)


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
        (dict(slot_bits=7), ValueError, "slot_bits must be 16, 8 or 4, or two of them"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-slots", "0"], "num_slots must be an integer of at least 1, got 0"),
        (["--slot-bits", "8-5"], "slot_bits must be 16, 8 or 4, or two of them"),
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


def test_windows_shorter_than_the_first_token_that_counts_in_longer_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "words.jsonl", 1)
    short = ["--length", "80", "--num-slots", str(SLOTS), "--block-size", str(BLOCK), *NOTHING]
    assert main(["calibrate", "--model", "no-model", "--dataset", "words.jsonl", "--output", "heads", *short]) == 2
    assert "no-model" in errors(capsys)[0]
