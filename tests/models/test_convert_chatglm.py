"""Converted ChatGLM checkpoints compute what the original code does, and what cannot be converted leaves nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from remote_chatglm import colossalai_chatglm, diffusers_chatglm
from safetensors.torch import load_file, save_file
from tiny_chatglm import (
    EMBEDDING,
    GOLDEN,
    INV_FREQ,
    OUTPUT,
    chatglm_fields,
    original_model,
    random_tensors,
    read_golden,
    write_checkpoint,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GlmForCausalLM, GlmModel

from lococo.cli.main import main
from lococo.models.chatglm import convert as converter
from lococo.models.chatglm.convert import convert_chatglm

VARIANTS = {
    "groups": {},
    "one-group": dict(multi_query_group_num=1),
    "a-head-for-each": dict(multi_query_attention=False),
    "no-bias": dict(add_qkv_bias=False),
    "heads-wider-than-hidden": dict(kv_channels=12, num_attention_heads=6),
    "other-epsilon": dict(layernorm_epsilon=0.1),
}


def converted(tmp_path, fields, tensors, **how):
    convert_chatglm(write_checkpoint(tmp_path / "original", fields, tensors, **how), tmp_path / "native")
    return tmp_path / "native"


def token_ids(length=40):
    return torch.randint(3, 300, (2, length), generator=torch.Generator().manual_seed(1))


def native_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


class TestSameModel:
    @torch.no_grad()
    @pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
    def test_logits_of_the_original_code(self, tmp_path, overrides):
        fields = chatglm_fields(**overrides)
        tensors = random_tensors(fields)
        original = original_model(colossalai_chatglm, fields, tensors)
        native = GlmForCausalLM.from_pretrained(converted(tmp_path, fields, tensors)).eval()
        expected = original(token_ids()).logits
        assert expected.std() > 0.1, "logits that are all alike would not show a mistake"
        torch.testing.assert_close(native(token_ids()).logits, expected, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_hidden_states_of_a_second_implementation(self, tmp_path):
        fields = chatglm_fields()
        tensors = random_tensors(fields)
        original = original_model(diffusers_chatglm, fields, tensors, prefix="transformer.")
        native = GlmModel.from_pretrained(converted(tmp_path, fields, tensors)).eval()
        expected = original(token_ids()).last_hidden_state.transpose(0, 1)
        torch.testing.assert_close(native(token_ids()).last_hidden_state, expected, rtol=0, atol=1e-5)

    @torch.no_grad()
    @pytest.mark.parametrize("generation", [2, 3])
    def test_rope_ratio(self, tmp_path, monkeypatch, generation):
        # The copies of the original code are older than the releases for 32k tokens.
        ratio, base, divisor = 50, 10000.0 * (50 if generation == 3 else 1), (50 if generation == 2 else 1)

        def rotary(self, length):
            frequencies = 1 / base ** (torch.arange(0, self.dim, 2).float() / self.dim)
            angles = torch.outer(torch.arange(length).float() / divisor, frequencies)
            return torch.stack([angles.cos(), angles.sin()], dim=-1)

        fields = chatglm_fields(rope_ratio=ratio)
        tensors = random_tensors(fields)
        original = original_model(colossalai_chatglm, fields, tensors)
        without = original(token_ids()).logits
        monkeypatch.setattr(type(original.transformer.rotary_pos_emb), "forward", rotary)
        expected = original(token_ids()).logits
        native = GlmForCausalLM.from_pretrained(converted(tmp_path, fields, tensors, generation=generation)).eval()
        torch.testing.assert_close(native(token_ids()).logits, expected, rtol=0, atol=1e-5)
        assert (without - expected).abs().max() > 1e-2

    @torch.no_grad()
    @pytest.mark.parametrize("generation", [2, 3, 4])
    def test_recorded_values(self, tmp_path, generation):
        path = GOLDEN / f"glm{generation}_model.data"
        if not path.is_file():
            pytest.skip("needs ../shared/data/weights/chatglm_golden")
        fields, tensors, steps = read_golden(path, epsilon=1.5625e-07 if generation == 4 else 1e-5)
        native = GlmModel.from_pretrained(converted(tmp_path, fields, tensors)).eval()
        cache = None
        for ids, expected in steps:
            output = native(ids[None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            torch.testing.assert_close(output.last_hidden_state[0], expected, rtol=0, atol=1e-5)


class TestCheckpoint:
    @pytest.mark.parametrize("kind", ["safetensors", "torch"])
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_every_tensor_is_there_bit_for_bit(self, tmp_path, kind, shards, dtype):
        fields = chatglm_fields()
        tensors = random_tensors(fields, dtype=dtype)
        folder = converted(tmp_path, fields, tensors | {INV_FREQ: torch.ones(2)}, kind=kind, shards=shards)
        native = native_tensors(folder)
        for layer in range(2):
            source, target = f"transformer.encoder.layers.{layer}", f"model.layers.{layer}"
            for part in ("weight", "bias"):
                parts = [native.pop(f"{target}.self_attn.{name}_proj.{part}") for name in "qkv"]
                assert [len(rows) for rows in parts] == [32, 16, 16]
                assert torch.equal(torch.cat(parts), tensors.pop(f"{source}.self_attention.query_key_value.{part}"))
            for old, new in (
                ("self_attention.dense", "self_attn.o_proj"),
                ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
                ("mlp.dense_4h_to_h", "mlp.down_proj"),
                ("input_layernorm", "input_layernorm"),
                ("post_attention_layernorm", "post_attention_layernorm"),
            ):
                assert torch.equal(native.pop(f"{target}.{new}.weight"), tensors.pop(f"{source}.{old}.weight"))
        assert torch.equal(native.pop("model.embed_tokens.weight"), tensors.pop(EMBEDDING))
        assert torch.equal(native.pop("model.norm.weight"), tensors.pop("transformer.encoder.final_layernorm.weight"))
        assert torch.equal(native.pop("lm_head.weight"), tensors.pop(OUTPUT))
        assert not native and not tensors

    @pytest.mark.parametrize("shards", [1, 3])
    def test_loads_without_remote_code(self, tmp_path, shards):
        fields = chatglm_fields()
        folder = converted(tmp_path, fields, random_tensors(fields, dtype=torch.bfloat16), shards=shards)
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert type(model) is GlmForCausalLM and model.dtype == torch.bfloat16
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.max_position_embeddings == 64
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        ids = AutoTokenizer.from_pretrained(folder)("ab", return_tensors="pt").input_ids
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]

    def test_files_are_those_of_the_standard_layout(self, tmp_path):
        fields = chatglm_fields()
        # A shard that holds only what is left out becomes no file.
        tensors = random_tensors(fields) | {INV_FREQ: torch.ones(2)}
        original = write_checkpoint(tmp_path / "original", fields, tensors, shards=len(tensors))
        convert_chatglm(original, tmp_path / "native")
        index = json.loads((tmp_path / "native/model.safetensors.index.json").read_text())
        files = {path.name for path in (tmp_path / "native").glob("*.safetensors")}
        count = len(tensors) - 1
        assert files == {f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)}
        held = {name: file for file in files for name in load_file(tmp_path / "native" / file)}
        assert index["weight_map"] == held and len(held) > count
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in random_tensors(fields).values())

    @pytest.mark.parametrize(("generation", "ends"), [(2, [2]), (3, [2, 280, 282])])
    def test_generation_config(self, tmp_path, generation, ends):
        fields = chatglm_fields()
        folder = converted(tmp_path, fields, random_tensors(fields), generation=generation)
        config = GenerationConfig.from_pretrained(folder)
        assert config.eos_token_id == ends and config.pad_token_id == 0

    def test_safetensors_come_before_torch_files(self, tmp_path):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), kind="torch", shards=2)
        chosen = random_tensors(fields, seed=1)
        save_file(chosen, original / "model.safetensors")
        convert_chatglm(original, tmp_path / "native")
        assert torch.equal(native_tensors(tmp_path / "native")["lm_head.weight"], chosen[OUTPUT])

    def test_generation_by_the_code_beside_the_weights(self, tmp_path):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), generation=3)
        (original / "tokenization_chatglm.py").write_text('special_tokens = ["[MASK]", "[gMASK]", "sop", "eop"]')
        convert_chatglm(original, tmp_path / "native")
        assert "[Round " in AutoTokenizer.from_pretrained(tmp_path / "native").chat_template


def config_with(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {name: value for name, value in content.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def tensors_with(**changes):
    """Change tensors of the last shard; their names with ``/`` for dots."""

    def change(folder):
        path = folder / "model-00002-of-00002.safetensors"
        tensors = load_file(path) | {name.replace("/", "."): value for name, value in changes.items()}
        save_file({name: value for name, value in tensors.items() if value is not None}, path)

    return change


def file_with(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def truncated(folder):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def index_with(name):
    content = json.dumps({"weight_map": {EMBEDDING: name}}).encode()
    return file_with("model.safetensors.index.json", content)


def nameless(folder):
    (folder / "tokenizer_config.json").write_text("{}")


INDEX, LAST = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
REFUSED = {
    "no-config": (without("config.json"), r"config\.json does not exist"),
    "no-json": (file_with("config.json", b"{"), r"config\.json is not JSON"),
    "json-list": (file_with("config.json", b"[]"), r"config\.json must hold a JSON object, got a list"),
    "other-model": (config_with(model_type="llama"), r"config\.json: model_type must be 'chatglm', got 'llama'"),
    "chatglm-1": (config_with(padded_vocab_size="absent"), r"config\.json has no padded_vocab_size"),
    "no-number": (config_with(num_layers="2"), r"num_layers must be an integer of at least 1, got '2'"),
    "negative": (config_with(layernorm_epsilon=-1), r"layernorm_epsilon must be a number above 0, got -1"),
    "no-bool": (config_with(add_qkv_bias=1), r"add_qkv_bias must be true or false, got 1"),
    "groups": (
        config_with(multi_query_group_num=3),
        r"must divide num_attention_heads=4, got 3",
    ),
    "layernorm": (config_with(rmsnorm=False), r"rmsnorm must be True, .*GlmForCausalLM.*got False"),
    "no-final-norm": (config_with(post_layer_norm=False), r"post_layer_norm must be True"),
    "biases": (config_with(add_bias_linear=True), r"add_bias_linear must be False, .*got True"),
    "other-residual": (config_with(apply_residual_connection_post_layernorm=True), r"apply_resid.* must be False"),
    "fp32-residual": (config_with(fp32_residual_connection=True), r"fp32_residual_connection must be False"),
    "prefix-tuning": (config_with(pre_seq_len=128), r"pre_seq_len must be None, .*got 128"),
    "quantized": (config_with(quantization_bit=4), r"quantization_bit must be 0, .*got 4"),
    "no-weights": (without(INDEX), r"has neither model\.safetensors nor pytorch_model\.bin"),
    "no-shard": (without(LAST), rf"{LAST} does not exist, but {INDEX} names it"),
    "index-no-json": (file_with(INDEX, b"\xff"), rf"{INDEX} is not JSON"),
    "index-empty": (file_with(INDEX, b"{}"), rf"{INDEX} must name the file of each tensor in weight_map"),
    "index-leads-away": (index_with("../secret.bin"), r"must name files beside it, got '\.\./secret\.bin'"),
    "truncated": (truncated, rf"{LAST} cannot be read"),
    "missing": (tensors_with(**{OUTPUT.replace(".", "/"): None}), rf"lacks {OUTPUT} of shape \(300, 32\)"),
    "surplus": (tensors_with(extra=torch.ones(1)), rf"{LAST} holds extra, which no ChatGLM2 or ChatGLM3"),
    "twice": (tensors_with(**{EMBEDDING: torch.ones(300, 32)}), rf"{LAST} holds {EMBEDDING}, and so does model-00001"),
    "shape": (
        tensors_with(**{OUTPUT: torch.ones(299, 32)}),
        rf"{LAST}: {OUTPUT} has shape \(299, 32\), but config\.json says \(300, 32\)",
    ),
    "dtype": (
        tensors_with(**{OUTPUT: torch.ones(300, 32, dtype=torch.int8)}),
        rf"{OUTPUT} must be one of torch\.float32, .*, got torch\.int8",
    ),
    "no-tokenizer-config": (without("tokenizer_config.json"), r"tokenizer_config\.json does not exist"),
    "no-tokenizer": (without("tokenizer.model"), r"tokenizer\.model does not exist"),
    "no-tokenizer-model": (file_with("tokenizer.model", b"<html>"), r"tokenizer\.model is not a SentencePiece"),
    "glm-4-tokenizer": (file_with("tokenizer.model", b"IQ== 0\nIg== 1\n"), r"tokenizer\.model is not a SentencePiece"),
    "which-generation": (nameless, r"says whether it is ChatGLM2 or ChatGLM3"),
}


class TestRefusals:
    @pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
    def test_leaves_nothing(self, tmp_path, change, message):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), shards=2)
        change(original)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert_chatglm(original, tmp_path / "made" / "native")
        assert list(tmp_path.iterdir()) == [original]

    def test_tokenizer_of_another_model(self, tmp_path):
        fields = chatglm_fields(padded_vocab_size=282)
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields))
        with pytest.raises(ValueError, match=r"tokenizer\.model has 283 tokens .* padded_vocab_size .* is 282"):
            convert_chatglm(original, tmp_path / "native")
        assert list(tmp_path.iterdir()) == [original]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:-100],
            lambda content: content[: len(content) // 2],
            lambda content: b"",
            lambda content: b"not a torch file",
        ],
        ids=["end", "half", "empty", "other"],
    )
    def test_damaged_torch_file(self, tmp_path, damage):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), kind="torch", shards=2)
        path = original / "pytorch_model-00002-of-00002.bin"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin cannot be read"):
            convert_chatglm(original, tmp_path / "native")
        assert list(tmp_path.iterdir()) == [original]

    @pytest.mark.parametrize("content", [[torch.ones(1)], {"step": 3}, {"model": {"weight": torch.ones(1)}}])
    def test_torch_file_of_something_else(self, tmp_path, content):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), kind="torch")
        torch.save(content, original / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold tensors by name and nothing else"):
            convert_chatglm(original, tmp_path / "native")

    def test_code_in_a_torch_file_is_not_run(self, tmp_path):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), kind="torch")
        torch.save({"weight": Harmful(tmp_path / "harm")}, original / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
            convert_chatglm(original, tmp_path / "native")
        assert list(tmp_path.iterdir()) == [original]

    @pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
    def test_destination_that_exists(self, tmp_path, make):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields))
        make(tmp_path / "native")
        with pytest.raises(FileExistsError, match="native exists; give a new folder"):
            convert_chatglm(original, tmp_path / "native")
        assert len(list(tmp_path.iterdir())) == 2

    def test_source_that_is_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="THUDM/chatglm3-6b is not a folder"):
            convert_chatglm("THUDM/chatglm3-6b", tmp_path / "native")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
    def test_stopped_in_the_middle(self, tmp_path, monkeypatch, error):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), shards=3)
        write, written = converter.write_safetensors, []

        def stop_at_the_second(path, *arguments):
            write(path, *arguments)
            written.append(path)
            if len(written) == 2:
                raise error

        monkeypatch.setattr(converter, "write_safetensors", stop_at_the_second)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            convert_chatglm(original, tmp_path / "made" / "native")
        assert len(written) == 2 and list(tmp_path.iterdir()) == [original]


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


MEASURE = """
import sys
from lococo.models.chatglm.convert import convert_chatglm

def memory(line):
    with open("/proc/self/status") as status:
        return next(int(text.split()[1]) * 1024 for text in status if text.startswith(line))

small, large, destination = sys.argv[1:]
convert_chatglm(small, f"{destination}-small")
before = memory("VmRSS")
convert_chatglm(large, f"{destination}-large")
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("grouped", [True, False])
def test_memory_is_that_of_one_shard(tmp_path, kind, grouped):
    small = write_checkpoint(tmp_path / "small", chatglm_fields(), random_tensors(chatglm_fields()), kind=kind)
    fields = chatglm_fields(
        num_layers=12, hidden_size=512, ffn_hidden_size=1376, kv_channels=64, num_attention_heads=8
    ) | dict(multi_query_attention=grouped)
    large = write_checkpoint(tmp_path / "large", fields, random_tensors(fields), kind=kind, shards=4)
    shards = [path.stat().st_size for path in large.glob("*model-*")]
    assert len(shards) == 4 and min(shards) > 25e6
    command = [sys.executable, "-c", MEASURE, small, large, tmp_path / "native"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1.5 * max(shards)


class TestCommandLine:
    def test_converts(self, tmp_path, capsys):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), shards=2)
        assert main(["convert-chatglm", str(original), str(tmp_path / "native")]) == 0
        assert str(tmp_path / "native") in capsys.readouterr().out
        assert main(["generate", "--model", str(tmp_path / "native"), "--prompt", "ab", "--max-new-tokens", "2"]) == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (config_with(rmsnorm=False), "rmsnorm must be True"),
            (truncated, "cannot be read"),
            (without("tokenizer.model"), "does not exist"),
        ],
    )
    def test_bad_input_is_one_line_and_status_2(self, tmp_path, capsys, change, message):
        fields = chatglm_fields()
        original = write_checkpoint(tmp_path / "original", fields, random_tensors(fields), shards=2)
        change(original)
        assert main(["convert-chatglm", str(original), str(tmp_path / "native")]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and errors[0].startswith("lococo: ") and message in errors[0]
