import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lococo
from lococo import LoCoCoConfig
from lococo.kernels.attention import ATTENTIONS
from lococo.patch import patched, suspended
from lococo.state import patch_of

SMALL = LoCoCoConfig(16, block_size=8)


@pytest.fixture
def one_process_group(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    assert not lococo.is_patched(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_patching_returns_the_model_and_shows():
    model = tiny_llama()
    assert not lococo.is_patched(model)
    assert lococo.patch_model(model, SMALL) is model
    assert lococo.is_patched(model)
    assert lococo.unpatch_model(model) is model
    assert not lococo.is_patched(model)


def test_patching_twice_says_so_in_a_line():
    model = lococo.patch_model(tiny_llama(), SMALL)
    with pytest.raises(ValueError, match=r"already patched \(num_slots=16\); call lococo.unpatch_model first$"):
        lococo.patch_model(model, LoCoCoConfig(32))


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_every_attention_may_be_asked_for(attention):
    model = tiny_llama()
    with lococo.patched(model, SMALL, attention=attention):
        assert patch_of(model).attention == attention and patch_of(model).config == SMALL


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attention": "xformers"}, "attention must be one of auto, sdpa, eager, triton, .*, got 'xformers'"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be an integer of at least 1, got 0"),
        ({"prefill_chunk_size": 7.5}, "prefill_chunk_size must be an integer of at least 1, got 7.5"),
    ],
)
def test_bad_options_are_named_and_the_model_is_left_alone(option, message):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        lococo.patch_model(model, SMALL, **option)
    assert_untouched(model, before)


def test_unpatching_an_unpatched_model_says_so():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        lococo.unpatch_model(tiny_llama())


def test_model_is_unpatched_after_an_error_inside_the_block():
    model = tiny_llama()
    before = state(model)
    with pytest.raises(RuntimeError, match="inside"), lococo.patched(model, SMALL):
        raise RuntimeError("inside")
    assert_untouched(model, before)


def test_heads_that_cannot_be_loaded_leave_the_model_unpatched(tmp_path):
    lococo.save_heads(lococo.patch_model(tiny_llama(), SMALL), tmp_path / "heads")
    (tmp_path / "heads" / "lococo_heads.safetensors").write_bytes(b"half a file")
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lococo.patch_model(model, heads=tmp_path / "heads")
    assert_untouched(model, before)


def test_config_of_the_heads_is_used(tmp_path):
    lococo.save_heads(lococo.patch_model(tiny_llama(), SMALL), tmp_path / "heads")
    model = lococo.patch_model(tiny_llama(), heads=tmp_path / "heads")
    with torch.no_grad():
        assert model(tiny_ids(1, 40), use_cache=True).past_key_values.config == SMALL


def test_wrapped_models_are_refused(one_process_group):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match="patch it first, then wrap"):
        lococo.patch_model(DistributedDataParallel(model), SMALL)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="patch it first, then wrap"):
        lococo.patch_model(fully_shard(tiny_llama(), mesh=distributed.init_device_mesh("cpu", (1,))), SMALL)


# Models and options of another type


@pytest.mark.parametrize("given", ["gpt2", None, 3])
def test_what_is_no_model_is_told(given, tmp_path):
    for call in (
        lococo.patch_model,
        lococo.unpatch_model,
        lococo.is_patched,
        lambda model: lococo.save_heads(model, tmp_path / "heads"),
        lambda model: lococo.load_heads(model, tmp_path),
        lambda model: suspended(model).__enter__(),
        lambda model: lococo.patched(model).__enter__(),
    ):
        with pytest.raises(TypeError, match=re.escape(f"must be a loaded model (a torch.nn.Module), got {given!r}")):
            call(given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("heads/",), {}, "config must be a LoCoCoConfig, got 'heads/'; heads are given by name, heads='heads/'"),
        (({"num_slots": 16},), {}, "config must be a LoCoCoConfig, got {'num_slots': 16}"),
        ((SMALL,), {"attention": ["sdpa"]}, r"attention must be one of auto, .*, got \['sdpa'\]"),
        ((SMALL,), {"attention": None}, "attention must be one of auto, .*, got None"),
        ((SMALL,), {"heads": 3}, "heads must be a folder or a Hub id, got 3"),
        ((), {"heads": 3}, "heads must be a folder or a Hub id, got 3"),
        ((SMALL,), {"prefill_chunk_size": "8"}, "prefill_chunk_size must be an integer of at least 1, got '8'"),
    ],
)
def test_options_of_another_type_are_named_and_the_model_is_left_alone(arguments, options, message):
    model = tiny_llama()
    before = state(model)
    with pytest.raises((TypeError, ValueError), match=message):
        lococo.patch_model(model, *arguments, **options)
    assert_untouched(model, before)


# A model that was changed meanwhile


def everything_set(model):
    changes = patch_of(model).changes
    return [(module, name) for module, name, *_ in changes.attributes if name in vars(module)]


def test_what_was_deleted_since_does_not_keep_a_patch_in():
    model, ids = tiny_llama(), tiny_ids(1, 40)
    full = model(ids).logits
    places = range(len(everything_set(lococo.patch_model(model, SMALL))))
    for gone in (*([place] for place in places), places):
        names = everything_set(model)
        for place in gone:
            delattr(*names[place])
        del model.model.layers[1].self_attn.lococo_head
        before = lococo.unpatch_model(model).state_dict().keys()
        assert not lococo.is_patched(model) and before == tiny_llama().state_dict().keys()
        assert torch.equal(model(ids).logits, full)
        assert not any("lococo" in repr(value) for module in model.modules() for value in vars(module).values())
        lococo.patch_model(model, SMALL)


@pytest.mark.parametrize("block", [patched, suspended])
def test_a_patch_put_in_inside_a_block_stays(block):
    model, other = tiny_llama(), LoCoCoConfig(32, block_size=8)
    if block is suspended:
        lococo.patch_model(model, SMALL)
    with block(model, *([] if block is suspended else [SMALL])):
        lococo.patch_model(lococo.unpatch_model(model), other)
        expected = model(tiny_ids(1, 60)).logits
    assert patch_of(model).config == other and not patch_of(model).is_suspended
    assert torch.equal(model(tiny_ids(1, 60)).logits, expected)


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_llama(seed=1)}])
def test_a_suspended_model_takes_tokens_back_like_the_unpatched_one(arguments):
    model, ids = lococo.patch_model(tiny_llama(), SMALL), tiny_ids(1, 40)
    # Transformers 4.56 looks prompts up for a model that has an end of text alone.
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=63, pad_token_id=0, **arguments)
    with suspended(model):
        answer = model.generate(ids, **options)
    assert torch.equal(answer, tiny_llama().generate(ids, **options))
    with pytest.raises(ValueError, match="unpatch_model"):
        model.generate(ids, **options)


def test_suspension_holds_for_every_thread():
    model, ids = lococo.patch_model(tiny_llama(), SMALL), tiny_ids(1, 60)
    with ThreadPoolExecutor(1) as pool, suspended(model):
        assert torch.equal(pool.submit(model, ids).result().logits, tiny_llama()(ids).logits)
