"""An extended model is the same after saving, loading, merging, and after a run that was killed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extended import command
from extension_worker import CONFIGS, SCALING, recipe
from families import build
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lococo
from lococo.data.windows import DataConfig
from lococo.extension.adapters import adapted, adapter_config
from lococo.extension.extend import ExtensionRun, extension_config, heads_config
from lococo.extension.folder import Extension, read_extension, save_parts
from lococo.extension.rope_scaling import RopeScaling, scale_positions
from lococo.extension.trainer import load_parts
from lococo.results.deadline import Deadline, OutOfTime
from lococo.state import patch_of
from lococo.training.recipes import default_recipe

IDS = tiny_ids(2, 64, seed=1)


def extend(model, tokenizer, text, folder, method="lococo", **options):
    data = DataConfig((str(text),), length=64, num_windows=6, num_heldout=0)
    places = dict(output=folder / "out", work_dir=folder / "work", cache_dir=folder / "cache")
    how = recipe(method, **options.pop("changes", {}))
    return ExtensionRun(data=data, recipe=how, **places, **options).run(model, tokenizer).rows


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tokenizer, text, tmp_path_factory):
    """A folder for each method, and what its run returned."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = extend(tiny_llama(), tokenizer, text, folder, request.param, merge_into=folder / "merged")
    return request.param, folder, rows


def test_a_run_leaves_a_folder_and_nothing_else(made):
    method, folder, rows = made
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["learning_rate"] < rows[0]["learning_rate"]
    names = {"extension.json", "adapter", "training.json", "training.png"} | (
        {"heads"} if method == "lococo" else set()
    )
    assert {path.name for path in (folder / "out").iterdir()} == names
    assert {path.name for path in folder.iterdir()} == {"out", "cache", "merged"}
    record = json.loads((folder / "out" / "training.json").read_text())
    assert record["rows"] == rows
    assert record["recipe"]["method"] == method
    assert record["usage"]["peak_memory_bytes"] > 0
    assert (folder / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_loaded_model_reads_as_it_was_trained(made):
    method, folder, _ = made
    model = lococo.load_extended(tiny_llama(), folder / "out")
    assert lococo.is_patched(model) == (CONFIGS[method] is not None)
    assert not model.training
    loaded = logits(model)
    plain = tiny_llama()
    if method != "streaming":
        scale_positions(plain, SCALING)
    if CONFIGS[method]:
        lococo.patch_model(plain, CONFIGS[method])
    assert (loaded - logits(plain)).abs().max() > 0.05
    twice = lococo.load_extended(tiny_llama(), folder / "out")
    assert torch.equal(logits(twice), loaded)


def test_base_may_be_a_folder(made, tmp_path):
    _, folder, _ = made
    tiny_llama().save_pretrained(tmp_path)
    expected = logits(lococo.load_extended(tiny_llama(), folder / "out"))
    assert torch.equal(logits(lococo.load_extended(tmp_path, folder / "out")), expected)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_merged_checkpoint_is_the_extended_model(made, tied, tokenizer, text, tmp_path):
    method, folder, _ = made
    if tied:
        folder = tmp_path
        base = tiny_llama(tie_word_embeddings=True)
        extend(base, tokenizer, text, folder, method, merge_into=folder / "merged")
        expected = logits(lococo.load_extended(tiny_llama(tie_word_embeddings=True), folder / "out"))
    else:
        expected = logits(lococo.load_extended(tiny_llama(), folder / "out"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert type(merged) is LlamaForCausalLM
    heads = folder / "merged" / "heads"
    assert heads.is_dir() == (CONFIGS[method] is not None)
    if method == "lococo":
        lococo.patch_model(merged, heads=heads)
    elif heads.is_dir():
        lococo.patch_model(merged, lococo.LoCoCoConfig.from_pretrained(heads))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=2e-5)


def test_merging_in_memory_keeps_the_cache(made):
    method, folder, _ = made
    expected = logits(lococo.load_extended(tiny_llama(), folder / "out"))
    plain = lococo.merge_extended(lococo.load_extended(tiny_llama(), folder / "out"))
    assert lococo.is_patched(plain) == (CONFIGS[method] is not None)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)


def test_adapters_load_with_plain_peft(made):
    method, folder, _ = made
    base = tiny_llama() if method == "streaming" else scale_positions(tiny_llama(), SCALING)
    model = PeftModel.from_pretrained(base, folder / "out" / "adapter")
    if method == "lococo":
        lococo.patch_model(model, CONFIGS[method], heads=folder / "out" / "heads")
    elif CONFIGS[method]:
        lococo.patch_model(model, CONFIGS[method])
    assert torch.equal(logits(model.eval()), logits(lococo.load_extended(tiny_llama(), folder / "out")))


@pytest.mark.parametrize("method", ["lococo", "h2o"])
@torch.no_grad()
def test_networks_of_a_learned_score_are_kept_and_merged(method, tmp_path):
    """Where nothing is blended, too."""

    def extended():
        model = tiny_llama()
        learner = adapted(model, adapter_config(model))
        return lococo.patch_model(learner, dataclasses.replace(CONFIGS[method], score="learned"))

    def numbers(model):
        return [parameter for each in patch_of(model).networks.values() for parameter in each.parameters()]

    learner, twin = extended(), extended()
    for parameter in numbers(learner):
        parameter.copy_(torch.randn_like(parameter))
    expected = [parameter.clone() for parameter in numbers(learner)]
    save_parts(learner, tmp_path / "parts")
    load_parts(twin, tmp_path / "parts")
    assert len(expected) == 12 and all(map(torch.equal, numbers(twin), expected))
    lococo.merge_extended(learner, tmp_path / "merged")
    merged = lococo.patch_model(tiny_llama(), heads=tmp_path / "merged" / "heads")
    assert all(map(torch.equal, numbers(merged), expected))


DEAR = [pytest.param(name, marks=pytest.mark.slow) for name in ("Glm", "Glm4", "Qwen3", "Granite", "SmolLM3")]


@pytest.mark.parametrize("family", ["Gemma2", "Mistral-window", *DEAR])
def test_families_extend_alike(family, tokenizer, text, tmp_path):
    before = logits(build(family))
    model = build(family)
    rows = extend(model, tokenizer, text, tmp_path, merge_into=tmp_path / "merged")
    assert len(rows) == 3
    assert torch.equal(logits(model), before)
    extended = lococo.load_extended(model, tmp_path / "out")
    found = logits(extended)
    assert (found - before).abs().max() > 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(build(family))
    with lococo.patched(merged, heads=tmp_path / "merged" / "heads"):
        torch.testing.assert_close(logits(merged), found, rtol=0, atol=1e-4)


def test_positions_that_cannot_be_stretched_leave_the_model_as_it_was(tokenizer, text, tmp_path):
    model = scale_positions(tiny_llama(), RopeScaling(2, 16, "yarn"))
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(ValueError, match="already stretched with 'yarn'"):
        extend(model, tokenizer, text, tmp_path)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert not list(tmp_path.iterdir())


# Runs that go on


@pytest.mark.parametrize("method", ["lococo", pytest.param("full", marks=pytest.mark.slow)])
def test_stopped_and_resumed_equals_uninterrupted(method, tokenizer, text, tmp_path):
    whole = extend(tiny_llama(), tokenizer, text, tmp_path / "whole", method)
    stopped, deadline = tmp_path / "stopped", Deadline(1e-9)
    for _ in range(2):
        with pytest.raises(OutOfTime):
            extend(tiny_llama(), tokenizer, text, stopped, method, deadline=deadline, resume=True)
        assert not (stopped / "out").exists()
    rows = extend(tiny_llama(), tokenizer, text, stopped, method, resume=True)
    assert rows == whole
    found = [logits(lococo.load_extended(tiny_llama(), folder / "out")) for folder in (tmp_path / "whole", stopped)]
    assert torch.equal(*found)


KILLED = """
import sys
sys.path[:0] = {path!r}
import os, torch, test_extension as here
from extended import id_tokenizer
from pathlib import Path
from lococo.training.window_trainer import StopInTime
torch.set_num_threads(1)
StopInTime.on_step_end = lambda self, args, state, control, **kwargs: os._exit(9) if state.global_step == 3 else None
here.extend(here.tiny_llama(), id_tokenizer(), Path({text!r}), Path({folder!r}))
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tokenizer, text, tmp_path):
    killed = tmp_path / "killed"
    script = KILLED.format(path=[str(Path(__file__).parents[1]), *sys.path], text=str(text), folder=str(killed))
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=300).returncode == 9
    whole = extend(tiny_llama(), tokenizer, text, tmp_path / "whole")
    assert (killed / "work" / "trainer" / "checkpoint-2").is_dir()
    rows = extend(tiny_llama(), tokenizer, text, killed, resume=True)
    assert rows == whole
    found = [logits(lococo.load_extended(tiny_llama(), folder / "out")) for folder in (tmp_path / "whole", killed)]
    assert torch.equal(*found)


def test_another_run_is_not_gone_on_with(tokenizer, text, tmp_path):
    with pytest.raises(OutOfTime):
        extend(tiny_llama(), tokenizer, text, tmp_path, deadline=Deadline(1e-9))
    with pytest.raises(FileExistsError, match="unfinished run"):
        extend(tiny_llama(), tokenizer, text, tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        extend(tiny_llama(), tokenizer, text, tmp_path, resume=True, changes=dict(learning_rate=0.02))
    with pytest.raises(ValueError, match="another model"):
        extend(tiny_llama(seed=1), tokenizer, text, tmp_path, resume=True)


# What is refused


@pytest.fixture
def folder(made, tmp_path):
    """A copy of a folder, to be spoiled."""
    return shutil.copytree(made[1] / "out", tmp_path / "copy")


def test_folders_that_call_the_scaling_by_its_old_name_are_read(made):
    _, folder, _ = made
    extension, content = read_extension(folder / "out")
    values = dict(content["extension"])
    assert Extension.from_dict({"stretch": values.pop("rope_scaling"), **values}) == extension


def assert_as_it_was(model):
    assert not lococo.is_patched(model)
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert model.config.to_dict() == tiny_llama().config.to_dict()


def test_folder_that_does_not_fit_leaves_the_model_as_it_was(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="extension.json does not exist"):
        lococo.load_extended(tiny_llama(), tmp_path)
    small = tiny_llama(hidden_size=16)
    with pytest.raises(ValueError, match="hidden_size.*32.*hidden_size.*16"):
        lococo.load_extended(small, folder)
    model = tiny_llama()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="the weights in .*adapter cannot be read"):
        lococo.load_extended(model, folder)
    assert_as_it_was(model)
    (folder / "extension.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an extension"):
        lococo.load_extended(model, folder)
    assert_as_it_was(model)


def test_heads_that_cannot_be_read_leave_the_model_as_it_was(tokenizer, text, tmp_path):
    extend(tiny_llama(), tokenizer, text, tmp_path)
    (tmp_path / "out" / "heads" / "lococo_heads.safetensors").write_bytes(b"cut short")
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"lococo_heads\.safetensors"):
        lococo.load_extended(model, tmp_path / "out")
    assert_as_it_was(model)


def test_models_that_are_changed_already_are_refused(folder):
    with pytest.raises(ValueError, match="patched: call lococo.unpatch_model"):
        lococo.load_extended(lococo.patch_model(tiny_llama(), CONFIGS["h2o"]), folder)
    model = lococo.load_extended(tiny_llama(), folder)
    with pytest.raises(ValueError, match="has adapters already|is patched"):
        lococo.load_extended(model.base_model.model, folder)
    with pytest.raises(FileExistsError, match="give a new folder"):
        lococo.merge_extended(model, folder)


def test_no_name_is_not_this_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    model = lococo.load_extended(tiny_llama(), ".")
    for call in (lambda: lococo.load_extended(tiny_llama(), ""), lambda: lococo.merge_extended(model, "")):
        with pytest.raises(ValueError, match="folder is empty; write '.' for the working directory"):
            call()
    with pytest.raises(NotADirectoryError, match=r"extension.json/a cannot be written: .* is a file"):
        lococo.merge_extended(model, "extension.json/a")


def test_a_model_with_adapters_is_not_extended(folder, tokenizer, text, tmp_path):
    model = lococo.load_extended(tiny_llama(), folder)
    model = lococo.unpatch_model(model) if lococo.is_patched(model) else model
    with pytest.raises(ValueError, match="the model has adapters already: merge them first"):
        lococo.extend_context(model, tokenizer, text, output=tmp_path / "out", original_length=16)


def test_outputs_that_hold_something_else_are_refused(tokenizer, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"extension\.json"):
        extend(tiny_llama(), tokenizer, text, tmp_path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(FileExistsError, match="merged"):
        extend(tiny_llama(), tokenizer, text, tmp_path / "other", merge_into=tmp_path / "merged")
    with pytest.raises(ValueError, match="is patched"):
        extend(lococo.patch_model(tiny_llama(), CONFIGS["h2o"]), tokenizer, text, tmp_path / "third")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="sparse"), "method must be one of .*got 'sparse'"),
        (dict(method="full", config=CONFIGS["h2o"]), "method='full' needs no config"),
        (dict(config=None), "method='lococo' needs a config"),
        (dict(depth=0), "depth must be at least 1, got 0"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(learning_rate=0.0), "learning_rate must be positive, got 0.0"),
    ],
)
def test_recipes_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


# The function


@pytest.mark.parametrize("method", ["lococo", pytest.param("full", marks=pytest.mark.slow)])
def test_the_function_makes_what_the_command_makes(method, checkpoint, text, tokenizer, tmp_path):
    more = ["--factor", 4, "--device", "cpu", "--method", method]
    assert command(checkpoint, text, tmp_path / "command", *more) == 0
    model, told = AutoModelForCausalLM.from_pretrained(checkpoint), []
    made = lococo.extend_context(
        model,
        tokenizer,
        [{"text": json.loads(line)["text"]} for line in text.read_text().splitlines()],
        factor=4,
        output=tmp_path / "out",
        method=method,
        num_slots=16,
        block_size=8,
        steps=2,
        windows_per_step=1,
        cache_dir=tmp_path,
        on_progress=told.append,
    )
    assert made.folder == tmp_path / "out" and made.rows == told and [row["step"] for row in told] == [1, 2]
    folders = (tmp_path / "command" / "out", made.folder)
    assert torch.equal(*(logits(lococo.load_extended(checkpoint, folder)) for folder in folders))
    assert not lococo.is_patched(model) and not hasattr(model, "peft_config")


def test_positions_are_chosen_for_every_compressed_cache():
    for method, default in (("lococo", "absolute"), ("h2o", "absolute"), ("streaming", "slot")):
        assert extension_config(method, 16, 8).positions == default
        for positions in ("absolute", "slot"):
            assert extension_config(method, 16, 8, positions).positions == positions
    assert extension_config("full", 16, 8) is None
    with pytest.raises(ValueError, match="method='full' has none: got 'slot'"):
        extension_config("full", 16, 8, "slot")


def test_calibrated_heads_go_on_in_the_positions_of_slots(tokenizer, text, tmp_path):
    config = dataclasses.replace(default_recipe(16, 8)[0], slots_per_head=((8, 24), (20, 12)))
    model = lococo.patch_model(tiny_llama(), config)
    with torch.no_grad():
        for network in patch_of(model).networks.values():
            network.output.weight.normal_()
    heads = lococo.save_heads(model, tmp_path / "heads")
    folder = tmp_path / "out"
    options = dict(heads=heads, positions="slot", factor=4, steps=1, windows_per_step=1, cache_dir=tmp_path / "cache")
    lococo.extend_context(tiny_llama(), tokenizer, text, output=folder, original_length=16, **options)
    extension, _ = read_extension(folder)
    assert extension.config == dataclasses.replace(config, positions="slot", slots_per_head=None)
    assert extension.rope_scaling is None
    before, after = (load_file(path / "lococo_heads.safetensors") for path in (heads, folder / "heads"))
    assert before.keys() == after.keys()
    weights = [name for name in before if name.endswith("output.weight")]
    assert weights and all(torch.allclose(before[name], after[name].to(before[name]), atol=0.1) for name in weights)
    assert heads_config(heads) == heads_config(heads, "absolute") == config


def test_heads_of_the_function_are_for_one_method(tokenizer, text, tmp_path):
    with pytest.raises(ValueError, match=r'heads are for method="lococo", got method=\'full\''):
        lococo.extend_context(tiny_llama(), tokenizer, text, output=tmp_path / "out", method="full", heads="somewhere")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(model="org/model"), TypeError, "model must be a loaded model .* got 'org/model'; load it first"),
        (dict(tokenizer=None), TypeError, "tokenizer must be a Transformers tokenizer, got None"),
        (dict(dataset=3), TypeError, "dataset must be a Hub id, .* got 3"),
        (dict(dataset=""), ValueError, "the name of a source of text is empty"),
        (dict(output=""), ValueError, "output is empty"),
        (dict(merge_into=""), ValueError, "merge_into is empty"),
        (dict(nope=3), TypeError, "lococo.extend_context has no option nope; there are alpha, .* rope_type"),
        (dict(num_heldout=3), TypeError, "lococo.extend_context has no option num_heldout: it measures on no text"),
        (dict(num_slots="16"), ValueError, "num_slots must be an integer of at least 1, got '16'"),
        (dict(method=["full"]), ValueError, "method must be one of"),
        (dict(length=0), ValueError, "length must be a whole number of at least 2, got 0"),
        (dict(steps=1.5), ValueError, "steps must be a whole number, got 1.5"),
        (dict(rank="8"), ValueError, "rank must be a whole number, got '8'"),
        (dict(factor="8"), ValueError, "factor must be at least 1 .* got '8'"),
        (dict(config="h2o"), TypeError, "config must be a LoCoCoConfig, got 'h2o'"),
        (dict(shard="no"), TypeError, "shard must be True or False, got 'no'"),
        (dict(training_arguments={"nope": 1}), ValueError, "transformers.TrainingArguments has no nope"),
        (dict(training_arguments={"learning_rate": 1}), ValueError, "must leave out learning_rate"),
        (dict(training_arguments={"push_to_hub": True}), ValueError, "not supported by ExtensionTrainer"),
        (dict(training_arguments={"lr_scheduler_type": "sideways"}), ValueError, "sideways"),
    ],
)
def test_bad_arguments_of_the_function_leave_nothing(options, error, message, tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.setattr("lococo.extension.extend.prepare", lambda *arguments: pytest.fail("data were read"))
    places = dict(output=tmp_path / "run" / "out", cache_dir=tmp_path / "run")
    given = dict(model=tiny_llama(), tokenizer=tokenizer, dataset=text, num_slots=16, length=32, **places)
    with pytest.raises(error, match=message):
        lococo.extend_context(**{**given, **options})
    assert not (tmp_path / "run").exists()


# The command


@pytest.mark.parametrize(
    "method", ["lococo", *(pytest.param(method, marks=pytest.mark.slow) for method in CONFIGS if method != "lococo")]
)
def test_command_extends_by_a_factor(method, checkpoint, text, tmp_path, capsys):
    assert command(checkpoint, text, tmp_path, "--factor", 4, "--method", method, "--device", "cpu") == 0
    assert "loss" in capsys.readouterr().out
    model = lococo.load_extended(checkpoint, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["length"] == 64
    assert record["recipe"]["rope_scaling"]["factor"] == 4.0
    assert logits(model).isfinite().all()


def test_lengths_that_fit_no_block_and_texts_shorter_than_the_slots(checkpoint, text, tmp_path):
    assert command(checkpoint, text, tmp_path, "--factor", 4, "--length", 61) == 0
    short = tmp_path / "short"
    assert command(checkpoint, text, short, "--factor", 2, "--length", 11, "--method", "lococo") == 0
    assert logits(lococo.load_extended(checkpoint, short / "out"), IDS[:, :11]).isfinite().all()


def test_command_stops_in_time_and_goes_on(checkpoint, text, tmp_path, capsys):
    assert command(checkpoint, text, tmp_path, "--factor", 4, "--time-limit", 0.001) == 0
    assert "out of time" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert command(checkpoint, text, tmp_path, "--factor", 4, "--resume") == 0
    assert (tmp_path / "out" / "extension.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--factor", "0.5"], "factor must be at least 1"),
        (["--num-slots", "0"], "num_slots must be an integer of at least 1"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--method", "full", "--heads", "somewhere"], "heads are for method"),
        (["--deepspeed", "nowhere.json"], "no such DeepSpeed config file"),
        (["--length", "100"], "not one training window of 100 tokens"),
        (["--original-length", "-3"], "original_length must be a whole number of at least 1"),
        (["--original-length", "0"], "original_length must be a whole number of at least 1"),
        (["--depth", "-1"], "Invalid value for '--depth'"),
    ],
)
def test_command_refuses_bad_input(words, message, checkpoint, text, tmp_path, capsys):
    assert command(checkpoint, text, tmp_path, "--factor", 4, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_heads_that_are_missing_leave_the_model_as_it_was(tokenizer, text, tmp_path):
    extend(tiny_llama(), tokenizer, text, tmp_path)
    shutil.rmtree(tmp_path / "out" / "heads")
    model = tiny_llama()
    with pytest.raises(FileNotFoundError, match="heads does not exist: the heads that were trained with the adapters"):
        lococo.load_extended(model, tmp_path / "out")
    assert_as_it_was(model)
