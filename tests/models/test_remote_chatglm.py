"""ChatGLM in its own code, patched: the laws of the other families, and the same numbers as the native class."""

import pytest
import torch
from configs import FORESEEN
from families import LARGE, LENGTH, SMALL, SPLITS, anatomy, assert_close, gap, pad_left, patch, read
from remote_chatglm import colossalai_chatglm, diffusers_chatglm
from safetensors.torch import load_file
from tiny_chatglm import GOLDEN, chatglm_fields, original_model, random_tensors, read_golden, write_checkpoint
from transformers import GlmForCausalLM
from words import word_tokenizer, write_texts

import lococo
from lococo import LoCoCoConfig
from lococo.heads import HEADS_NAME
from lococo.models.chatglm.convert import convert_chatglm
from lococo.patch import suspended
from lococo.state import patch_of
from lococo.training.local import LocalConfig
from lococo.training.objectives import Distill, WindowLoss
from lococo.training.recipes import Recipe
from lococo.training.record import record

FIELDS = chatglm_fields()
TENSORS = random_tensors(FIELDS)
VARIANTS = {"groups": {}, "a-head-for-each": dict(multi_query_attention=False), "no-bias": dict(add_qkv_bias=False)}
PER_HEAD = LoCoCoConfig(12, block_size=6, kernel_size=5, gate_init=0.5, slots_per_head=((6, 16), (14, 10)))

LEARNED = dict(score=FORESEEN, normalization="softmax")

every_position = pytest.mark.parametrize("positions", ["absolute", "slot"])
every_way = pytest.mark.parametrize(
    "changes", [{}, {"positions": "slot"}, LEARNED], ids=["absolute", "slot", "learned"]
)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def some_ids(rows=2, length=LENGTH):
    return torch.randint(3, FIELDS["padded_vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def remote_model(**overrides):
    fields = chatglm_fields(**overrides)
    return original_model(colossalai_chatglm, fields, random_tensors(fields))


def native_model(tmp_path, **overrides):
    fields = chatglm_fields(**overrides)
    convert_chatglm(write_checkpoint(tmp_path / "original", fields, random_tensors(fields)), tmp_path / "native")
    return GlmForCausalLM.from_pretrained(tmp_path / "native", attn_implementation="eager").eval()


@every_position
def test_a_text_that_fits_the_slots_is_read_as_by_the_unpatched_model(positions):
    model, ids = remote_model(), some_ids()
    full = read(model, ids)
    patch(model, LARGE, positions=positions)
    assert_close(read(model, ids), full)
    assert_close(read(model, ids, SPLITS["mixed"]), full)


@every_way
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_the_native_class_gives_the_same(tmp_path, overrides, changes):
    ids = some_ids()
    remote, native = remote_model(**overrides), native_model(tmp_path, **overrides)
    full = read(remote, ids)
    for model in (remote, native):
        patch(model, SMALL, **changes)
    assert_close(read(remote, ids), read(native, ids))
    assert gap(read(remote, ids), full) > 1e-2


def test_heads_with_slots_of_their_own_too(tmp_path):
    ids = some_ids()
    remote, native = patch(remote_model(), PER_HEAD), patch(native_model(tmp_path), PER_HEAD)
    assert_close(read(remote, ids), read(native, ids))


@every_way
def test_the_split_of_a_text_over_calls_does_not_matter(changes):
    model, ids = patch(remote_model(), SMALL, **changes), some_ids()
    whole = read(model, ids)
    for split in SPLITS.values():
        assert_close(read(model, ids, split), whole)


@every_position
def test_a_long_prompt_is_read_in_chunks(positions):
    ids = some_ids()
    whole = read(patch(remote_model(), SMALL, positions=positions), ids)
    model = patch(remote_model(), SMALL, positions=positions, prefill_chunk_size=7)
    assert_close(read(model, ids), whole)
    hidden = model.transformer(ids, return_dict=False)[0]
    assert hidden.shape == (LENGTH, 2, FIELDS["hidden_size"]), "tokens come first in this code"


@every_way
def test_left_padding_does_not_matter(changes):
    model, rows = patch(remote_model(), SMALL, **changes), [some_ids(1, n)[0] for n in (LENGTH, 38, 30)]
    ids, mask = pad_left(rows)
    alone = [read(model, row[None])[0] for row in rows]
    for split in [None, *SPLITS.values()]:
        together = read(model, ids, split, mask)
        for row, logits in enumerate(alone):
            assert_close(together[row, -len(logits) :], logits)


def test_networks_see_the_same_keys_as_in_the_native_class(tmp_path):
    ids, features = some_ids(), []
    for model in (remote_model(), native_model(tmp_path)):
        cache = patch(model, LARGE, **LEARNED)(ids, use_cache=True).past_key_values
        features.append(torch.cat([layer.entries.features for layer in cache.layers]).float())
    assert features[0].std() > 0.1
    torch.testing.assert_close(*features, rtol=2e-3, atol=1e-3)


def test_more_places_in_the_cache_than_angles_are_refused():
    model, before = remote_model(seq_length=32), anatomy(remote_model(seq_length=32))
    with pytest.raises(ValueError, match="positions='slot' must move keys, but num_slots . block_size = 64 positions"):
        patch(model, LARGE, positions="slot")
    assert anatomy(model)[0].keys() == before[0].keys() and not lococo.is_patched(model)


def test_slot_positions_read_beyond_the_rotary_table():
    model, ids = remote_model(seq_length=32), some_ids(1, 64)
    patch(model, SMALL, positions="slot")
    assert read(model, ids).isfinite().all()
    lococo.unpatch_model(model)
    patch(model, SMALL)
    with pytest.raises(ValueError, match="64 positions are more than the 32 of this model"):
        read(model, ids)
    model.transformer.lococo_patch.prefill_chunk_size = 8
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="64 positions are more than the 32 of this model"):  # before any chunk
        model(ids[:, 20:], past_key_values=cache)
    assert cache.seen_tokens == 20 and not cache.is_reading
    cache = model(ids[:, 20:32], past_key_values=cache).past_key_values
    with pytest.raises(ValueError, match="33 positions are more"):
        model(ids[:, 32:33], past_key_values=cache)


def test_a_second_implementation():
    model, ids = original_model(diffusers_chatglm, FIELDS, TENSORS, prefix="transformer."), some_ids()
    full = model(ids).last_hidden_state
    patch(model, LARGE)
    assert_close(model(ids).last_hidden_state, full)
    lococo.unpatch_model(model)
    patch(model, SMALL)
    hidden = model(ids).last_hidden_state
    assert gap(hidden, full) > 1e-2
    remote = patch(remote_model(), SMALL)
    assert_close(hidden, remote.transformer(ids).last_hidden_state)


@pytest.mark.parametrize("generation", [2, 3])
def test_recorded_values_of_the_original(generation):
    path = GOLDEN / f"glm{generation}_model.data"
    if not path.is_file():
        pytest.skip("needs ../shared/data/weights/chatglm_golden")
    fields, tensors, steps = read_golden(path, epsilon=1e-5)
    for implementation, prefix in ((colossalai_chatglm, ""), (diffusers_chatglm, "transformer.")):
        model = original_model(implementation, fields, tensors, prefix=prefix)
        decoder, cache = getattr(model, "transformer", model), None
        patch(model, LoCoCoConfig(8, block_size=2, kernel_size=3))
        for ids, expected in steps:
            output = decoder(ids[None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            torch.testing.assert_close(output.last_hidden_state[:, 0], expected, rtol=0, atol=1e-5)


def test_unpatching_leaves_no_trace():
    model, ids = remote_model(), some_ids()
    full, before = read(model, ids), anatomy(model)
    for positions in ("absolute", "slot"):
        patch(model, SMALL, positions=positions)
        assert anatomy(model) != before
        read(model, ids, SPLITS["mixed"])
        lococo.unpatch_model(model)
        assert anatomy(model) == before
        assert torch.equal(read(model, ids), full)


def test_a_suspended_patch_reads_with_the_full_cache():
    model, ids = remote_model(), some_ids()
    full = read(model, ids)
    patch(model, SMALL)
    with suspended(model):
        assert torch.equal(read(model, ids), full)
    with pytest.raises(IndexError):  # in the embedding, after the call began
        model(torch.full_like(ids, FIELDS["padded_vocab_size"]))
    with suspended(model):
        assert torch.equal(read(model, ids), full)


def test_where_generate_is_gone_the_converter_is_named():
    model = patch(remote_model(), SMALL)
    with pytest.raises(ValueError, match="lococo convert-chatglm"):
        model.generate(some_ids())


def test_what_its_code_can_do_and_ours_cannot():
    model, ids = patch(remote_model(), SMALL), some_ids()
    with pytest.raises(ValueError, match="full_attention_mask"):
        model.transformer(ids, full_attention_mask=torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_mask must be 2-D"):
        model(ids, attention_mask=torch.ones(2, 1, LENGTH))
    with suspended(model):
        tuples = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values is a tuple"):
        model(ids[:, :1], past_key_values=tuples)
    model.transformer.encoder.gradient_checkpointing = True
    with torch.enable_grad(), pytest.raises(ValueError, match="gradient checkpointing.*lococo convert-chatglm"):
        model.train()(ids)


def test_prefix_tuning_is_refused():
    model = remote_model()
    model.transformer.pre_seq_len = 4
    before = anatomy(model)
    with pytest.raises(ValueError, match="prefix tuning.*pre_seq_len=4"):
        patch(model, SMALL)
    assert anatomy(model) == before


# Calibration


def test_recordings_are_those_of_the_native_class(tmp_path):
    remote, native, ids = remote_model(), native_model(tmp_path), some_ids(1)
    full, before = read(remote, ids), anatomy(remote)
    records = [record(model, ids, gradients=True) for model in (remote, native)]
    assert anatomy(remote) == before and torch.equal(read(remote, ids), full)
    for index, entry in records[1].items():
        for name in ("query", "key", "value", "output", "gradient"):
            assert_close(getattr(records[0][index], name), getattr(entry, name))


def test_heads_learn_the_same_as_in_the_native_class(tmp_path):
    ids, gradients = some_ids(), []
    for model in (remote_model(), native_model(tmp_path)):
        patch(model.requires_grad_(False), SMALL)
        loss = WindowLoss(model, Distill(backprop_tokens=15))
        for parameter in loss.parameters():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss(ids).mean().backward()
        gradients.append({name: parameter.grad for name, parameter in loss.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, LEARNED], ids=["distant", "learned"])
def test_heads_of_one_class_are_heads_of_the_other(changes, tmp_path):
    native, remote, ids = patch(native_model(tmp_path), SMALL, **changes), remote_model(), some_ids()
    lococo.save_heads(native, tmp_path / "heads")
    lococo.patch_model(remote, heads=tmp_path / "heads")
    assert len(patch_of(remote).heads) == 2 and len(patch_of(remote).networks) == (2 if changes else 0)
    assert_close(read(remote, ids), read(native, ids))


def test_calibration_makes_the_same_heads_for_either_class(tmp_path):
    write_texts(tmp_path / "words.jsonl")
    config = LoCoCoConfig(12, block_size=8, kernel_size=5, gate_init=0.2)
    recipe = Recipe(
        budget_texts=3, local=LocalConfig(steps=2, num_checked=1), local_texts=3, objective=Distill(), steps=2
    )
    models = {"remote": remote_model(seq_length=128), "native": native_model(tmp_path, seq_length=128)}
    for name, model in models.items():
        with torch.enable_grad():
            lococo.calibrate(
                model.double(),  # in float32 rounding decides over weights whose gradient is near Adam's epsilon
                word_tokenizer(),
                tmp_path / "words.jsonl",
                output=tmp_path / "heads" / name,
                config=config,
                recipe=recipe,
                length=80,
                num_windows=6,
                num_heldout=2,
                cache_dir=tmp_path / "cache",
                first=40,
                dtype=None,
            )
    remote, native = (load_file(tmp_path / "heads" / name / HEADS_NAME) for name in ("remote", "native"))
    assert remote.keys() == native.keys()
    for name, tensor in native.items():
        torch.testing.assert_close(remote[name], tensor, rtol=0, atol=1e-6)
    configs = [LoCoCoConfig.from_pretrained(tmp_path / "heads" / name) for name in ("remote", "native")]
    assert configs[0] == configs[1] and configs[0].slots_per_head
