import pytest
import torch
from tiny import tiny_ids, tiny_llama
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lococo
from lococo import LoCoCoConfig
from lococo.kernels.attention import ATTENTIONS
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
