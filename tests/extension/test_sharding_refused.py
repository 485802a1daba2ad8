"""What cannot be sharded over processes is refused by name, with every release of Transformers."""

from types import SimpleNamespace

import pytest
from extension_worker import recipe
from numbered_words import word_tokenizer, write_lines
from tiny import tiny_llama

from lococo.cli.main import main
from lococo.data.windows import DataConfig
from lococo.extension.extend import ExtensionRun
from lococo.extension.sharding import check_sharding, keep_precision


def test_releases_that_cannot_be_told_the_precision_are_refused():
    args = SimpleNamespace(fsdp=True)  # without what Transformers 5 calls fsdp_plugin_args
    with pytest.raises(ValueError, match=r"FSDP needs Transformers 5, \d+\.\d+.* is installed"):
        keep_precision(args)


def test_other_kinds_of_sharding_are_refused(tmp_path, monkeypatch, capsys):
    text = write_lines(tmp_path / "text.jsonl", ["w1"])
    data = DataConfig((str(text),), length=64, num_windows=6, num_heldout=0)
    given = dict(data=data, recipe=recipe(), output=tmp_path / "out", cache_dir=tmp_path, shard=True)
    with pytest.raises(ValueError, match="shard=True needs several processes"):
        ExtensionRun(**given).run(tiny_llama(), word_tokenizer())
    with pytest.raises(ValueError, match="sharded run writes no merged model"):
        ExtensionRun(**given, merge_into=tmp_path / "merged").run(tiny_llama(), word_tokenizer())
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
