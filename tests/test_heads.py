"""Heads survive a round trip bit for bit, and nothing that does not fit gets into a model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from configs import FORESEEN
from huggingface_hub import RepoUrl
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

import lococo
from lococo.config import CONFIG_NAME, LoCoCoConfig
from lococo.heads import CARD_NAME, FILE_NAMES, HEADS_NAME, base_shape, read_heads_config
from lococo.state import patch_of

CONFIG = LoCoCoConfig(num_slots=16, block_size=8)
LEARNED = LoCoCoConfig(num_slots=16, block_size=8, score="learned")
EXAMPLES = sorted((Path(__file__).parents[1] / "examples/heads").iterdir())


def make_model(config=CONFIG, seed=0, **overrides):
    """A tiny Llama whose heads hold random values; ``config=None`` leaves it unpatched."""
    model = tiny_llama(seed, **overrides)
    if config is not None:
        lococo.patch_model(model, config)
        randomise_heads(model)
    return model


@torch.no_grad()
def randomise_heads(model):
    patch = patch_of(model)
    for module in (*patch.heads.values(), *patch.networks.values()):
        for parameter in module.parameters():
            parameter.copy_(torch.rand_like(parameter))


def head_values(model):
    patch = patch_of(model)
    return {
        f"layers.{index}.{prefix}{name}": parameter.detach().clone()
        for modules, prefix in ((patch.heads, ""), (patch.networks, "score."))
        for index, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | head_values(model)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_refused(model, folder, message, error=ValueError):
    before = values(model)
    with pytest.raises(error, match=message):
        lococo.load_heads(model, folder)
    assert same(values(model), before)


def rewrite(folder, **changes):
    """Change the tensors of a saved folder; None removes one."""
    tensors = {**load_file(folder / HEADS_NAME), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / HEADS_NAME)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def saved(model, tmp_path):
    return lococo.save_heads(model, tmp_path / "heads")


class TestRoundTrip:
    @pytest.mark.parametrize(
        "config",
        [
            CONFIG,
            LoCoCoConfig(num_slots=16, block_size=8, head_rank=3, mass_bias=False),
            LoCoCoConfig.paper(16, block_size=8),
            LoCoCoConfig.reference(16, block_size=8),
            LoCoCoConfig.h2o(16, block_size=8),
            LEARNED,
            LoCoCoConfig.h2o(16, block_size=8, score="learned"),
        ],
        ids=["default", "low-rank", "paper", "reference", "no-heads", "learned", "networks-alone"],
    )
    def test_is_bit_equal(self, config, tmp_path):
        model, other = make_model(config), make_model(config, seed=1)
        folder = lococo.save_heads(model, tmp_path / "heads")
        assert lococo.load_heads(other, folder) is other
        assert same(head_values(other), head_values(model))
        assert sorted(contents(folder)) == sorted(FILE_NAMES)

    def test_names_say_layer_and_parameter(self, model, saved):
        assert load_file(saved / HEADS_NAME).keys() == head_values(model).keys()
        assert "layers.1.conv.weight" in head_values(model)
        model = make_model(LEARNED)
        names = load_file(lococo.save_heads(model, saved) / HEADS_NAME).keys()
        assert names == head_values(model).keys()
        parts = [f"{part}.{kind}" for part in ("normed", "hidden", "output") for kind in ("weight", "bias")]
        assert {f"layers.{index}.score.{part}" for index in (0, 1) for part in parts} < names

    def test_bfloat16_file_and_model(self, model, tmp_path):
        folder = lococo.save_heads(model, tmp_path / "heads", dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in load_file(folder / HEADS_NAME).values()} == {torch.bfloat16}
        half, full = make_model(seed=1).to(torch.bfloat16), make_model(seed=1)
        expected = {name: tensor.bfloat16() for name, tensor in head_values(model).items()}
        assert same(head_values(lococo.load_heads(half, folder)), expected)
        rounded = {name: tensor.float() for name, tensor in expected.items()}
        assert same(head_values(lococo.load_heads(full, folder)), rounded)

    def test_patch_model_takes_config_and_heads(self, model, saved):
        other = lococo.patch_model(make_model(None, seed=1), heads=saved)
        assert same(head_values(other), head_values(model))
        assert read_heads_config(saved) == CONFIG == patch_of(other).config

    def test_heads_that_peft_trains(self, model, tmp_path):
        import peft

        lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lococo_head"])
        tuned = peft.get_peft_model(make_model(seed=1), lora)
        original, before = head_values(make_model(seed=1)), values(tuned)
        folder = lococo.save_heads(tuned, tmp_path / "heads")
        assert same(load_file(folder / HEADS_NAME), original)
        lococo.load_heads(tuned, lococo.save_heads(model, folder))
        assert same(load_file(lococo.save_heads(tuned, folder) / HEADS_NAME), head_values(model))
        changed = {name for name, tensor in values(tuned).items() if not torch.equal(tensor, before[name])}
        assert changed and all("lococo_head.modules_to_save" in name or name.startswith("layers.") for name in changed)

    def test_heads_that_another_adapter_has_no_copy_of(self, tmp_path):
        import peft

        tuned = peft.get_peft_model(
            make_model(seed=1), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lococo_head"])
        )
        lococo.load_heads(tuned, lococo.save_heads(make_model(seed=2), tmp_path / "other"))
        tuned.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj"]))
        tuned.set_adapter("plain")
        folder = lococo.save_heads(tuned, tmp_path / "heads")
        assert same(load_file(folder / HEADS_NAME), head_values(make_model(seed=1)))
        tuned.set_adapter("default")
        assert same(load_file(lococo.save_heads(tuned, folder) / HEADS_NAME), head_values(make_model(seed=2)))

    def test_str_folder(self, model, tmp_path):
        folder = lococo.save_heads(model, str(tmp_path / "made" / "here"))
        other = make_model(seed=1)
        assert not same(head_values(other), head_values(model))
        lococo.load_heads(other, str(folder))
        assert same(head_values(other), head_values(model))


class TestOldFolders:
    """Written before scores were learned, or fields of a config came."""

    @pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
    def test_examples_are_whole_and_fit_their_config(self, folder):
        config, shape = read_heads_config(folder), json.loads((folder / CONFIG_NAME).read_text())["base_model"]
        heads = shape["num_kv_heads"]
        sizes = dict(num_key_value_heads=heads, num_attention_heads=heads, hidden_size=heads * shape["head_dim"])
        model = tiny_llama(num_hidden_layers=shape["num_layers"], **sizes)
        lococo.patch_model(model, heads=folder)
        assert patch_of(model).config == config
        assert same(head_values(model), load_file(folder / HEADS_NAME))
        lococo.load_heads(model, folder)
        surplus = dataclasses.replace(config, score="learned")
        if not config.has_features:
            with lococo.patched(lococo.unpatch_model(model), surplus):
                assert_refused(model, folder, "trained with score='distant', but .* score='learned'")

    def test_a_config_without_the_newest_fields(self, model, saved):
        content = json.loads((saved / CONFIG_NAME).read_text())
        for field in ("compressor", "slots_per_head"):
            content["config"].pop(field)
        (saved / CONFIG_NAME).write_text(json.dumps(content))
        assert same(head_values(lococo.patch_model(make_model(None), heads=saved)), head_values(model))


class TestWritten:
    def test_json(self, model, tmp_path):
        folder = lococo.save_heads(
            model, tmp_path / "heads", training={"steps": 3}, metrics={"ppl": 21.5, "texts": ["a|b"]}
        )
        content = json.loads((folder / CONFIG_NAME).read_text())
        assert content["format_version"] == 1
        assert LoCoCoConfig.from_dict(content["config"]) == CONFIG
        assert content["base_model"] == {
            "name_or_path": "",
            "model_type": "llama",
            "num_layers": 2,
            "num_kv_heads": 2,
            "head_dim": 8,
        }
        assert set(content["versions"]) == {"lococo", "torch", "transformers"}
        assert content["training"] == {"steps": 3}
        assert content["metrics"]["ppl"] == 21.5
        card = (folder / CARD_NAME).read_text()
        assert "| ppl | 21.5 |\n" in card and r'| texts | ["a\|b"] |' in card
        assert "| num_slots | 16 |\n" in card

    def test_card_of_a_hub_model(self, model, saved):
        model.config.name_or_path = "org/name"
        lococo.save_heads(model, saved)
        card = (saved / CARD_NAME).read_text()
        assert card.startswith('---\nlibrary_name: lococo\nbase_model: "org/name"\ntags:\n- lococo\n')
        assert 'from_pretrained("org/name")\nlococo.patch_model(model, heads="heads")' in card
        assert "## Metrics" not in card

    @pytest.mark.parametrize("path", ["/home/someone/models/tiny", "../models/tiny/", "C:\\Users\\someone\\tiny"])
    def test_local_path_is_not_published(self, model, saved, path):
        model.config.name_or_path = path
        lococo.save_heads(model, saved)
        assert json.loads((saved / CONFIG_NAME).read_text())["base_model"]["name_or_path"] == "tiny"
        written = b"".join(contents(saved).values()).decode(errors="ignore")
        assert "models" not in written and "someone" not in written and str(saved.parent) not in written
        assert "base_model:" not in (saved / CARD_NAME).read_text()

    def test_relative_folder_that_looks_like_an_id(self, model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("private/tiny").mkdir(parents=True)
        model.config.name_or_path = "private/tiny"
        folder = lococo.save_heads(model, "heads")
        assert b"private" not in b"".join(contents(folder).values())

    def test_base_shape_without_optional_fields(self):
        model = make_model(None)
        model.config.num_key_value_heads = model.config.head_dim = None
        assert base_shape(model) == {"num_layers": 2, "num_kv_heads": 4, "head_dim": 8}


class TestSaveRefuses:
    def test_unpatched_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is not patched.*lococo\.patch_model\(model\)"):
            lococo.save_heads(make_model(None), tmp_path / "heads")
        assert not contents(tmp_path)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(dtype=torch.int8), r"floating dtype such as torch\.bfloat16, got torch\.int8"),
            (dict(dtype="float16"), r"floating dtype such as torch\.bfloat16, got 'float16'"),
            (dict(training={"folder": Path("x")}), r"training must hold plain finite JSON values, got .*Path"),
            (dict(metrics={"ppl": float("nan")}), r"metrics must hold plain finite JSON values, got .*nan"),
        ],
    )
    def test_wrong_arguments(self, model, saved, arguments, message):
        before = contents(saved)
        with pytest.raises(ValueError, match=message):
            lococo.save_heads(model, saved, **arguments)
        assert contents(saved) == before

    def test_values_that_overflow(self, model, saved):
        before = contents(saved)
        with torch.no_grad():
            patch_of(model).heads[1].conv.weight[0, 0, 0] = 1e6
        with pytest.raises(ValueError, match=r"layers\.1\.conv\.weight must be finite, but 1 of \d+ values in .*16"):
            lococo.save_heads(model, saved, dtype=torch.float16)
        assert contents(saved) == before

    def test_heads_without_values(self, model, tmp_path):
        with pytest.raises(ValueError, match=r"layers\.0\.\S+ is on the meta device"):
            lococo.save_heads(model.to("meta"), tmp_path / "heads")

    def test_folder_of_something_else(self, model, tmp_path):
        (tmp_path / "thesis.txt").write_text("ten years of work")
        with pytest.raises(FileExistsError, match=r"has no lococo_config\.json and is not empty"):
            lococo.save_heads(model, tmp_path)
        assert contents(tmp_path) == {"thesis.txt": b"ten years of work"}

    def test_heads_folder_with_other_files(self, model, saved):
        (saved / "optimizer.pt").write_text("state")
        before = contents(saved)
        with pytest.raises(FileExistsError, match=r"also holds optimizer\.pt"):
            lococo.save_heads(model, saved)
        assert contents(saved) == before

    def test_file(self, model, tmp_path):
        (tmp_path / "heads").write_text("")
        with pytest.raises(FileExistsError, match="is a file"):
            lococo.save_heads(model, tmp_path / "heads")


class TestSaveIsWholeOrNot:
    def test_replaces_heads(self, saved):
        other = make_model(seed=1)
        lococo.save_heads(other, saved)
        assert same(load_file(saved / HEADS_NAME), head_values(other))
        assert [path.name for path in saved.parent.iterdir()] == ["heads"]

    @pytest.mark.parametrize("stage", ["serialise", "write", "swap"])
    def test_failure_half_way_keeps_the_old_folder(self, saved, monkeypatch, stage):
        def fail(*args, **kwargs):
            raise OSError("no space left on device")

        rename, before = Path.rename, contents(saved)
        if stage == "serialise":
            monkeypatch.setattr("lococo.heads.safetensors_bytes", fail)
        elif stage == "write":
            write = Path.write_bytes
            monkeypatch.setattr(
                Path, "write_bytes", lambda p, data: (fail if p.name == HEADS_NAME else write)(p, data)
            )
        else:
            monkeypatch.setattr(Path, "rename", lambda p, to: (fail if p.name == "new" else rename)(p, to))
        with pytest.raises(OSError, match="no space left"):
            lococo.save_heads(make_model(seed=1), saved)
        assert contents(saved) == before
        assert [path.name for path in saved.parent.iterdir()] == ["heads"]


class TestLoadRefuses:
    def test_unpatched_model(self, saved):
        assert_refused_unpatched = r"LlamaForCausalLM is not patched.*lococo\.patch_model\(model, heads=\.\.\.\)"
        model = make_model(None)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=assert_refused_unpatched):
            lococo.load_heads(model, saved)
        assert same(model.state_dict(), before)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (dict(num_slots=32), r"num_fused=6, but the model is patched with num_fused=12"),
            (dict(num_heavy=2), r"num_fused=6, but .* num_fused=5"),
            (dict(kernel_size=5), r"kernel_size=21, but .* kernel_size=5"),
            (dict(head_rank=2), r"head_rank=None, but .* head_rank=2"),
            (dict(residual="layer"), r"residual='slot', but .* residual='layer'"),
            (dict(normalization="softmax"), r"normalization='sum', but .* normalization='softmax'"),
            (dict(mass_bias=False), r"has_mass=True, but .* has_mass=False"),
            (dict(score="learned"), r"score='distant', but .* score='learned'"),
        ],
    )
    def test_other_config(self, saved, overrides, message):
        config = LoCoCoConfig(**{"num_slots": 16, "block_size": 8, **overrides})
        assert_refused(make_model(config), saved, message)

    @pytest.mark.parametrize("score", ["distant", "sum", FORESEEN])
    def test_networks_of_another_score(self, score, tmp_path):
        saved = lococo.save_heads(make_model(LEARNED), tmp_path / "heads")
        other = make_model(dataclasses.replace(LEARNED, score=score))
        assert_refused(
            other, saved, f"score='learned', but the model is patched with score='{score}'; lococo.patch_model"
        )

    def test_networks_missing_surplus_or_of_another_shape(self, model, tmp_path):
        model = make_model(LEARNED)
        saved = lococo.save_heads(model, tmp_path / "heads")
        tensors = load_file(saved / HEADS_NAME)
        rewrite(saved, **{"layers.1.score.normed.bias": None, "layers.1.score.gate": torch.ones(1)})
        assert_refused(model, saved, r"missing: layers\.1\.score\.normed\.bias; surplus: layers\.1\.score\.gate")
        save_file({**tensors, "layers.0.score.hidden.bias": torch.ones(63)}, saved / HEADS_NAME)
        assert_refused(
            model, saved, r"layers\.0\.score\.hidden\.bias has shape \(63,\) in .* shape \(64,\) in the model"
        )
        save_file({**tensors, "layers.0.score.hidden.bias": torch.full((64,), torch.nan)}, saved / HEADS_NAME)
        assert_refused(model, saved, r"layers\.0\.score\.hidden\.bias must be finite")

    def test_block_size_may_differ(self, saved):
        model = make_model(LoCoCoConfig(num_slots=16, block_size=4, score="sum"), seed=1)
        before = head_values(model)
        lococo.load_heads(model, saved)
        assert not same(head_values(model), before)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                dict(num_hidden_layers=3),
                "'num_layers': 2, .*this model has {'num_layers': 3, 'num_kv_heads': 2, 'head_dim': 8}",
            ),
            (
                dict(num_key_value_heads=4),
                "'num_kv_heads': 2, .*this model has {'num_layers': 2, 'num_kv_heads': 4, 'head_dim': 8}",
            ),
            (
                dict(head_dim=16),
                "'head_dim': 8}, .*this model has {'num_layers': 2, 'num_kv_heads': 2, 'head_dim': 16}",
            ),
        ],
    )
    def test_other_base_shape(self, saved, overrides, message):
        assert_refused(make_model(**overrides), saved, message)

    def test_missing_tensor(self, model, saved):
        rewrite(saved, **{"layers.1.gate": None})
        assert_refused(model, saved, r"lococo_heads\.safetensors must .*missing: layers\.1\.gate; surplus: none")

    def test_surplus_tensor(self, model, saved):
        rewrite(saved, **{"layers.2.gate": torch.ones(6)})
        assert_refused(model, saved, r"missing: none; surplus: layers\.2\.gate")

    def test_other_tensor_shape(self, model, saved):
        rewrite(saved, **{"layers.1.gate": torch.ones(5)})
        assert_refused(model, saved, r"layers\.1\.gate has shape \(5,\) in .*, but shape \(6,\) in the model")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_value_that_is_not_finite(self, model, saved, value):
        rewrite(saved, **{"layers.1.gate": torch.tensor([1, 1, 1, value, value, 1])})
        assert_refused(model, saved, r"layers\.1\.gate must be finite, but 2 of 6 values in torch\.float32")

    def test_value_beyond_the_dtype_of_the_model(self, model, saved):
        rewrite(saved, **{"layers.1.gate": torch.full((6,), 1e6)})
        assert_refused(
            model.to(torch.float16), saved, r"layers\.1\.gate must be finite, but 6 of 6 values in .*float16"
        )

    @pytest.mark.parametrize("kept", [0, 5, 60, -1])
    def test_truncated_file(self, model, saved, kept):
        path = saved / HEADS_NAME
        path.write_bytes(path.read_bytes()[:kept])
        assert_refused(model, saved, r"lococo_heads\.safetensors is not a whole safetensors file")

    def test_no_tensors(self, model, saved):
        (saved / HEADS_NAME).unlink()
        assert_refused(model, saved, r"lococo_heads\.safetensors does not exist", FileNotFoundError)

    def test_no_config(self, model, saved):
        (saved / CONFIG_NAME).unlink()
        assert_refused(model, saved, r"lococo_config\.json does not exist", FileNotFoundError)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(format_version=2), r"lococo_config\.json has format_version=2, .* reads 1"),
            (
                dict(base_model=None),
                r"lococo_config\.json must give the base_model's num_layers, num_kv_heads, head_dim",
            ),
        ],
    )
    def test_other_json(self, model, saved, changes, message):
        path = saved / CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        assert_refused(model, saved, message)

    def test_neither_folder_nor_id(self, model, tmp_path):
        assert_refused(model, tmp_path / "nowhere", "nowhere' is neither a folder nor a Hub id", FileNotFoundError)

    def test_unknown_config_field_only_warns(self, model, saved):
        path = saved / CONFIG_NAME
        content = json.loads(path.read_text())
        content["config"]["colour"] = "blue"
        path.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match="unknown LoCoCoConfig fields are ignored: colour"):
            assert read_heads_config(saved) == CONFIG
        with pytest.warns(UserWarning, match="colour"):
            lococo.load_heads(model, saved)


class TestHub:
    def test_load_downloads_the_three_files(self, model, saved, monkeypatch):
        calls = []

        def snapshot_download(repo_id, **kwargs):
            calls.append((repo_id, kwargs))
            return str(saved)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        other = lococo.load_heads(make_model(seed=1), "org/heads", revision="v1", token="secret")
        assert same(head_values(other), head_values(model))
        assert calls == [("org/heads", dict(revision="v1", token="secret", allow_patterns=list(FILE_NAMES)))]

    def test_failed_download_names_the_id(self, model, monkeypatch):
        def snapshot_download(*args, **kwargs):
            raise ConnectionError("no route to host")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        assert_refused(model, "runs/heads", "'runs/heads' is not a folder here, .*no route to host", OSError)

    def test_push(self, model, monkeypatch):
        hub = FakeHub()
        monkeypatch.setattr("huggingface_hub.HfApi", hub)
        url = lococo.push_heads(
            model, "org/heads", private=True, token="secret", commit_message="Better", metrics={"ppl": 2.0}
        )
        assert url == "https://huggingface.co/org/heads"
        assert hub.token == "secret"
        assert hub.created == ("org/heads", dict(private=True, exist_ok=True))
        assert hub.commit_message == "Better"
        assert sorted(hub.files) == sorted(FILE_NAMES)
        assert b'heads="org/heads"' in hub.files[CARD_NAME]
        assert json.loads(hub.files[CONFIG_NAME])["metrics"] == {"ppl": 2.0}

    @pytest.mark.parametrize("repo_id", ["heads", "org/heads/more", ""])
    def test_push_refuses_other_names(self, model, repo_id):
        with pytest.raises(ValueError, match="repo_id must have the form 'org/name', got"):
            lococo.push_heads(model, repo_id)

    def test_push_creates_nothing_when_heads_are_unfit(self, monkeypatch):
        hub = FakeHub()
        monkeypatch.setattr("huggingface_hub.HfApi", hub)
        with pytest.raises(ValueError, match="not patched"):
            lococo.push_heads(make_model(None), "org/heads")
        assert hub.created is None


class FakeHub:
    """Stands in for ``HfApi`` and keeps what it was asked to upload."""

    created = None

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, **kwargs):
        self.created = (repo_id, kwargs)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.commit_message = commit_message
        self.files = contents(folder_path)
