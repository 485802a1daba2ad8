"""An extension sharded over processes (FSDP2) learns what one under DDP does; each process keeps a part."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharding_worker
import torch
from extension_worker import recipe
from sharding_worker import CASES
from test_training_data import text_of, word_tokenizer, write_lines
from tiny import tiny_ids, tiny_llama

import lococo
from lococo.cli import main
from lococo.compat import RELEASE
from lococo.training.data import DataConfig
from lococo.training.extend import extend_context
from lococo.training.sharding import check_sharding, keep_precision

can_shard = pytest.mark.skipif(RELEASE < (5, 0), reason="FSDP needs Transformers 5 and is refused before")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they made."""
    folder = tmp_path_factory.mktemp("sharded")
    write_lines(folder / "text.jsonl", [text_of(row) for row in (tiny_ids(12, 70) % 61).tolist()])
    command = [sys.executable, str(Path(sharding_worker.__file__))]
    processes = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What they found, by process."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@can_shard
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sharded_model_learns_what_a_whole_one_does(found, case):
    atol = 1e-4 if CASES[case][2] == torch.float32 else 1e-3  # a loss rounded to bfloat16 is 1e-2 off
    for of_process in found:
        torch.testing.assert_close(
            of_process["fsdp", case]["learned"], of_process["ddp", case]["learned"], rtol=0, atol=atol
        )
        torch.testing.assert_close(
            of_process["fsdp", case]["losses"], of_process["ddp", case]["losses"], rtol=0, atol=atol
        )
    torch.testing.assert_close(found[0]["fsdp", case]["learned"], found[1]["fsdp", case]["learned"], rtol=0, atol=0)


@can_shard
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(found, case):
    for of_process in found:
        torch.testing.assert_close(
            of_process["resumed", case]["learned"], of_process["fsdp", case]["learned"], rtol=0, atol=0
        )


@can_shard
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_process_keeps_its_part_alone(found, case):
    shares = [of_process["fsdp", case]["share"] for of_process in found]
    assert sum(shares) == pytest.approx(found[0]["ddp", case]["share"], rel=1e-6)
    assert max(shares) < 0.6
    for of_process in found:
        assert of_process["fsdp", case]["is_sharded_by_layer"]
        assert of_process["fsdp", case]["whole_weight_is_gone"]
        assert not of_process["ddp", case]["whole_weight_is_gone"]


@can_shard
@pytest.mark.slow
def test_what_it_writes_is_an_extension(folder):
    assert not (folder / "work").exists()
    model = lococo.load_extended(tiny_llama(), folder / "extended")
    with torch.no_grad():
        assert (model(tiny_ids()).logits - tiny_llama()(tiny_ids()).logits).abs().max() > 0.05
    assert len(json.loads((folder / "extended" / "training.json").read_text())["rows"]) == 3


# Failures


def test_releases_that_cannot_be_told_the_precision_are_refused():
    args = SimpleNamespace(fsdp=True)  # without what Transformers 5 calls fsdp_plugin_args
    with pytest.raises(ValueError, match=r"FSDP needs Transformers 5, \d+\.\d+.* is installed"):
        keep_precision(args)


def test_other_kinds_of_sharding_are_refused(tmp_path, monkeypatch, capsys):
    text = write_lines(tmp_path / "text.jsonl", [])
    data = DataConfig((str(text),), length=64, num_windows=6, num_heldout=0, heldout_share=0.0)
    given = (tiny_llama(), word_tokenizer(), data, recipe(), tmp_path / "out")
    places = dict(work_dir=tmp_path / "work", cache_dir=tmp_path, shard=True)
    with pytest.raises(ValueError, match="shard=True needs several processes"):
        extend_context(*given, **places)
    with pytest.raises(ValueError, match="sharded run writes no merged model"):
        extend_context(*given, merge_into=tmp_path / "merged", **places)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["extend", "--model", "none", "--output", str(tmp_path / "out")]) == 2
    assert "give lococo extend --fsdp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, "FSDP1 is not supported"),
        ({"cpu_ram_efficient_loading": True}, "on every process"),
        ({"fsdp": False}, "accelerate was told"),
    ],
)
def test_trainer_refuses_what_it_cannot_shard(changes, message):
    found = {"fsdp": True, "fsdp_version": 2, "cpu_ram_efficient_loading": False}
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**found, **changes})))
    with pytest.raises(ValueError, match=message):
        check_sharding(SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(**{**found, **changes})))
    accelerator.state.fsdp_plugin = None
    check_sharding(SimpleNamespace(accelerator=accelerator))
