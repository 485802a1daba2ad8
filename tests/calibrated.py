"""A short calibration of the tiny model in all stages, and what stands in its folder."""

import json

import torch
from families import LENGTH_DEPENDENT_ROPES
from safetensors.torch import load_file
from tiny import tiny_llama
from words import word_tokenizer

import lococo
from lococo.data.windows import DataConfig, prepare
from lococo.heads import HEADS_NAME
from lococo.metrics import token_nlls

LENGTH, FIRST, SLOTS, BLOCK = 80, 40, 16, 8
FILES = {"README.md", "calibration.json", "calibration.png", "lococo_config.json", HEADS_NAME}
WINDOWS = ["--length", str(LENGTH), "--first", str(FIRST), "--heldout", "2", "--windows", "12"]
SHORT = ["--recipe", "blend", "--score-texts", "10", "--budget-texts", "4", "--local-steps", "3", "--local-texts", "4"]
SHORT += ["--steps", "4", "--windows-per-step", "2", "--measure-every", "2"]
CHANGES = ["objective", "backprop_tokens", "local_steps", "steps", "windows_per_step", "learning_rate"]
CHANGES += ["score_texts", "budget_texts", "local_texts", "measure_every"]
NOTHING = ["--score-texts", "0", "--objective", "none", "--budget-texts", "0"]


def data_config(texts):
    return DataConfig(sources=(str(texts),), length=LENGTH, num_windows=12, num_heldout=2)


def heldout_windows(texts, cache):
    return prepare(data_config(texts), word_tokenizer(), cache / "tokens")[1].ids


def nll(model, windows, first=FIRST):
    return sum(token_nlls(model, ids[None].long(), first).mean().item() for ids in windows) / len(windows)


def content(folder):
    return json.loads((folder / "lococo_config.json").read_text())


def result(folder):
    return json.loads((folder / "calibration.json").read_text())


def rows(folder, *stages):
    rows = result(folder)["rows"]
    return [row for row in rows if not stages or row["stage"] in stages]


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("lococo: ")]


def assert_same_heads(folder, expected, atol=0.0):
    actual, expected = load_file(folder / HEADS_NAME), load_file(expected / HEADS_NAME)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=atol, msg=name)


def calibrate_in_python(model, dataset, output, cache, **options):
    """The calibration of ``SHORT`` by the package's own function."""
    short = dict(recipe="blend", score_texts=10, budget_texts=4, local_steps=3, local_texts=4)
    short |= dict(steps=4, windows_per_step=2, measure_every=2)
    given = dict(num_slots=SLOTS, block_size=BLOCK, length=LENGTH, first=FIRST, num_windows=12, num_heldout=2)
    return lococo.calibrate(
        model, word_tokenizer(), dataset, output=output, cache_dir=cache, **{**given, **short, **options}
    )


def dynamic_llama():
    return tiny_llama(rope_scaling={**LENGTH_DEPENDENT_ROPES["dynamic"], "rope_theta": 1e4})
