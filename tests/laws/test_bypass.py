"""What goes round the patch works as it should, or says what happened; never a third text without a word."""

import copy
import re

import pytest
import torch
import transformers
from configs import CONFIGS
from tiny import SIZES, tiny_ids, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3Config, LlamaConfig, LlamaForCausalLM, LlamaModel

import lococo
from lococo import LoCoCoConfig
from lococo.generation import read_and_answer

CONFIG = CONFIGS["open"]
IDS = tiny_ids(2, 61)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def patch(model, config=CONFIG, **options):
    torch.manual_seed(0)
    return lococo.patch_model(model, config, **options)


def answer(model, **arguments):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, **arguments)


# Another attention asked for after patching


def by_method(model):
    model.set_attn_implementation("eager")


def by_method_of_the_decoder(model):
    model.model.set_attn_implementation("eager")


def by_field(model):
    model.config._attn_implementation = "eager"


def by_field_of_the_decoder(model):
    model.model.config._attn_implementation = "eager"


def by_field_of_a_layer(model):
    model.model.layers[1].self_attn.config._attn_implementation = "eager"


CHANGES = [by_method, by_method_of_the_decoder, by_field, by_field_of_the_decoder, by_field_of_a_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_attention_chosen_later_counts_after_unpatching(change):
    model = patch(tiny_llama(attn_implementation="sdpa"))
    logits, text = model(IDS).logits, answer(model)
    change(model)
    assert torch.equal(model(IDS).logits, logits) and torch.equal(answer(model), text)
    lococo.unpatch_model(model)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    assert torch.equal(model(IDS).logits, tiny_llama(attn_implementation="eager")(IDS).logits)


def test_an_attention_read_from_the_view_and_set_again_is_forgotten():
    """As libraries do that try another attention for a while."""
    model = patch(tiny_llama(attn_implementation="sdpa"))
    text, before = answer(model), model.model.config._attn_implementation
    model.set_attn_implementation("eager")
    model.set_attn_implementation(before)
    assert torch.equal(answer(model), text)
    lococo.unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS).logits, tiny_llama(attn_implementation="sdpa")(IDS).logits)


def test_a_patch_may_be_taken_out_inside_a_block():
    model = tiny_llama()
    full = model(IDS).logits
    with lococo.patched(model, CONFIG), lococo.patch.suspended(model):
        lococo.unpatch_model(model)
    assert torch.equal(model(IDS).logits, full)
    patch(model)
    with lococo.patch.suspended(model):
        lococo.unpatch_model(model)
        expected = patch(model, CONFIGS["h2o"])(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(lococo.unpatch_model(model)(IDS).logits, full)


def a_decoders_config(model):
    model.model.config = copy.deepcopy(model.config)


def a_layers_config(model):
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("change", [a_decoders_config, a_layers_config], ids=lambda change: change.__name__)
def test_a_config_replaced_is_told(change, with_gradients):
    model = patch(tiny_llama())
    cache = model(IDS[:, :40], use_cache=True).past_key_values
    change(model)
    with torch.set_grad_enabled(with_gradients):
        for call in (model, answer_of(model), lambda ids: model(ids, past_key_values=cache)):
            with pytest.raises(
                ValueError, match=r"the config of Llama\w+ was replaced after .*'sdpa'; call lococo.unp"
            ):
                call(IDS)
    lococo.unpatch_model(model)
    expected = patch(model)(IDS).logits[:, 40:]
    torch.testing.assert_close(model(IDS[:, 40:], past_key_values=cache).logits, expected, rtol=0, atol=1e-5)


def answer_of(model):
    return lambda ids: model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_layer_replaced_or_left_out_is_told(attention):
    model = patch(tiny_llama())
    model.model.layers[1] = tiny_llama(attn_implementation=attention).model.layers[1]
    with pytest.raises(ValueError, match="mask of a patched model was used as a tensor .* layer was replaced"):
        model(IDS)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ValueError, match="1 of 2 attention layers did not go through LoCoCo, LlamaAttention 1 first"):
        model(IDS)


# Models that share a config, or are made from a patched model's


def test_a_model_of_the_same_config_is_not_patched():
    config = LlamaConfig(**SIZES)
    one, two = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    expected = two(IDS).logits, answer(two)
    patch(one)
    assert torch.equal(two(IDS).logits, expected[0]) and torch.equal(answer(two), expected[1])
    assert one.config is two.config
    patch(two)
    lococo.unpatch_model(one)
    assert (two(IDS).logits - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize("given", [{}, {"attn_implementation": "model's"}], ids=["config", "name"])
def test_models_made_from_a_patched_models_config_are_whole(given):
    """As trainers make a reference model, with the model's config or the name of its attention."""
    model = tiny_llama()
    full = model(IDS).logits
    patch(model)
    if given:
        given = {"attn_implementation": model.config._attn_implementation}
    makers = (
        lambda: AutoModelForCausalLM.from_config(model.config, **given),
        lambda: type(model)(model.config),
        lambda: AutoModelForCausalLM.from_config(copy.deepcopy(model.config), **given),
    )
    for make in makers:
        other = make().eval()
        other.load_state_dict(model.state_dict(), strict=False)
        assert not lococo.is_patched(other)
        assert torch.equal(other(IDS).logits, full)
        answer(other)


def test_a_saved_patched_model_loads_as_an_unpatched_one(tmp_path):
    model = tiny_llama()
    full = model(IDS).logits
    patch(model).save_pretrained(tmp_path)
    assert "lococo" not in (tmp_path / "config.json").read_text()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, full)


def test_a_model_made_from_the_decoders_own_view_says_so():
    """A bare decoder has no model around it that shows its config as it was."""
    torch.manual_seed(0)
    model = patch(LlamaModel(LlamaConfig(**SIZES)).eval())
    other = LlamaModel(model.config).eval()
    with pytest.raises(ValueError, match="outside the forward of the model that lococo.patch_model patched"):
        other(IDS)
    assert torch.isfinite(LlamaModel(lococo.unpatch_model(model).config).eval()(IDS).last_hidden_state).all()


def test_what_is_set_on_the_config_of_a_patched_model_lasts():
    model = patch(tiny_llama())
    model.config.use_cache = False
    assert model(IDS).past_key_values is None
    model.model.config.use_cache = True
    assert model.config.use_cache and model(IDS).past_key_values is not None
    model.config.label_smoothing = 0.5
    lococo.unpatch_model(model)
    assert model.config.label_smoothing == 0.5 and model.model.config is model.config


def test_two_models_around_one_decoder():
    model = patch(tiny_llama())
    other = LlamaForCausalLM(model.config).eval()
    other.model = model.model
    other.lm_head = model.lm_head
    assert torch.equal(other(IDS).logits, model(IDS).logits)


# Caches in other hands


@pytest.mark.parametrize("used", ["forward", "generate", "decoder", "suspended"])
def test_a_cache_in_a_model_that_is_not_patched_is_refused(used):
    model = patch(tiny_llama())
    cache = model(IDS[:, :40], use_cache=True).past_key_values
    calls = {
        "forward": lambda: model(IDS[:, 40:], past_key_values=cache),
        "decoder": lambda: model.model(IDS[:, 40:], past_key_values=cache),
        "generate": lambda: answer(model, past_key_values=cache),
    }
    if used == "suspended":
        with lococo.patch.suspended(model):
            for call in calls.values():
                with pytest.raises(ValueError, match="is a LoCoCoCache; inside lococo.patch.suspended"):
                    call()
    else:
        lococo.unpatch_model(model)
        with pytest.raises(ValueError, match="a LoCoCoCache was given to a model that is not patched"):
            calls[used]()
        patch(model)
    expected = model(IDS).logits[:, 40:]
    torch.testing.assert_close(model(IDS[:, 40:], past_key_values=cache).logits, expected, rtol=0, atol=1e-5)


def test_a_cache_of_another_method_is_refused_and_one_of_another_kernel_is_not():
    model = patch(tiny_llama())
    cache = model(IDS[:, :40], use_cache=True).past_key_values
    lococo.unpatch_model(model)
    patch(model, LoCoCoConfig(16, block_size=8, gate_init=0.4, positions="slot"))
    with pytest.raises(ValueError, match=r"filled with positions=absolute, the model is patched with positions=slot"):
        model(IDS[:, 40:], past_key_values=cache)
    lococo.unpatch_model(model)
    patch(model, attention="eager", prefill_chunk_size=4)
    expected = model(IDS).logits[:, 40:]
    torch.testing.assert_close(model(IDS[:, 40:], past_key_values=cache).logits, expected, rtol=0, atol=1e-5)


def test_an_empty_cache_of_another_kind_is_told_of_once(recwarn):
    model = patch(tiny_llama())
    caches = [DynamicCache(), DynamicCache(config=model.config)]
    outputs = [model(IDS, past_key_values=cache) for cache in caches]
    told = [str(warning.message) for warning in recwarn if "stays empty" in str(warning.message)]
    assert len(told) == 1 and "the empty DynamicCache given as" in told[0]
    assert torch.equal(*(output.logits for output in outputs))
    assert isinstance(outputs[0].past_key_values, lococo.LoCoCoCache) and caches[0].get_seq_length() == 0


def test_generate_makes_our_cache_and_tells_of_nothing(recwarn):
    model = patch(tiny_llama())
    output = answer(model, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, lococo.LoCoCoCache)
    assert not [warning for warning in recwarn if "lococo" in str(warning.filename)]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_kind_of_cache_that_generate_is_asked_for_is_told_of_once(kind, recwarn):
    model = patch(tiny_llama())
    expected = answer(model)
    for _ in range(2):
        assert torch.equal(answer(model, cache_implementation=kind), expected)
    told = [warning for warning in recwarn if re.search("cache_implementation=.* is not used", str(warning.message))]
    assert len(told) == 1
    with lococo.patch.suspended(model):
        full = answer(model, cache_implementation=kind)
    assert torch.equal(full, answer(tiny_llama()))


# Nothing to read, nothing to say


def test_an_empty_prompt_is_refused():
    model = patch(tiny_llama())
    for call in (
        lambda: model(IDS[:, :0]),
        lambda: model.generate(IDS[:, :0], max_new_tokens=3),
        lambda: model(inputs_embeds=torch.zeros(2, 0, 32)),
        lambda: model(IDS[:, :0], past_key_values=model(IDS, use_cache=True).past_key_values),
    ):
        with pytest.raises(ValueError, match=r"there is nothing to read: the input has shape \(2, 0"):
            call()
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        read_and_answer(model, IDS[:1], max_new_tokens=0)
    with pytest.raises(ValueError):
        model.generate(IDS, max_new_tokens=0)


# Training mode


def family(name, **features):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **features})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "Olmo2", "Granite", "Glm4", "SmolLM3"]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(enable|disable). is deprecated")
@pytest.mark.parametrize("name", FAMILIES)
def test_generate_in_training_mode_with_checkpointing_is_that_of_evaluation_mode(name):
    features = {"head_dim": 8} if name in ("Gemma2", "Glm4", "Qwen3") else {}
    model = patch(family(name, **features))
    expected = answer(model)
    chunked = patch(family(name, **features), prefill_chunk_size=8)
    for each in (model, chunked):
        each.train()
        each.gradient_checkpointing_enable()
        assert torch.equal(answer(each), expected)
        cache = each(IDS[:, :40], use_cache=True).past_key_values
        assert cache.seen_tokens == 40
        each.eval()
        each.gradient_checkpointing_disable()
        assert torch.equal(answer(each), expected)


# Models of several parts


def gemma3(**changes):
    text = dict(
        SIZES,
        head_dim=8,
        sliding_window=9,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63, **changes
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_the_text_part_of_a_model_with_images_is_read_as_by_itself():
    full = gemma3().double()  # its norms multiply what float32 rounds
    model = patch(gemma3().double(), LoCoCoConfig(80, block_size=16))
    ids = IDS.clamp(max=62)
    types = torch.zeros_like(ids)
    expected = full(ids, token_type_ids=types).logits
    for arguments in ({}, {"token_type_ids": types}):
        torch.testing.assert_close(model(ids, **arguments).logits, expected, rtol=0, atol=1e-5)
    options = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, **options), full.generate(ids, **options))
    other = type(model)(model.config).eval().double()
    other.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(other(ids, token_type_ids=types).logits, expected)
    assert torch.equal(lococo.unpatch_model(model)(ids, token_type_ids=types).logits, expected)


def test_images_are_refused_by_name():
    model = patch(gemma3(), LoCoCoConfig(80, block_size=16))
    ids = IDS.clamp(max=62)
    ids[:, 5:9] = 63
    image = dict(pixel_values=torch.randn(2, 3, 16, 16), token_type_ids=(ids == 63).long())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="the model masks its attention by .*: a patched model reads causally"):
            call(ids, **image)
    types = torch.zeros_like(ids)
    assert model(IDS.clamp(max=62), token_type_ids=types).logits.isfinite().all()


def test_continuous_batching_is_refused():
    model = patch(tiny_llama())
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        if hasattr(model, name):
            with pytest.raises(ValueError, match=f"{name} keeps pages of a full cache"):
                getattr(model, name)([[1, 2, 3]])
    assert hasattr(model, "generate_batch")
    assert answer(model).shape == (2, 73)


@pytest.mark.parametrize("mask", [[[1] * 61] * 2, torch.ones(2, 61).numpy()], ids=["list", "array"])
def test_masks_that_are_no_tensors_are_refused(mask):
    with pytest.raises(ValueError, match="attention_mask must be a 2-D tensor .* got a (list|ndarray)"):
        patch(tiny_llama()).model(IDS, attention_mask=mask)


def test_positions_that_slot_positions_have_no_use_for_are_told_of_once(recwarn):
    model = patch(tiny_llama(), CONFIGS["open-slot"])
    positions = torch.arange(61).expand(2, 61).clone()
    mask = torch.ones_like(positions)
    mask[0, :5] = 0
    model(IDS, position_ids=positions)
    model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).masked_fill(mask == 0, 1))
    answer(model, attention_mask=mask)
    assert not [warning for warning in recwarn if "position_ids" in str(warning.message)]
    positions[:, 30:] += 50
    for _ in range(2):
        model(IDS, position_ids=positions, attention_mask=torch.ones_like(positions))
    told = [warning for warning in recwarn if "position_ids that are not one after another" in str(warning.message)]
    assert len(told) == 1


def test_attention_in_both_directions_is_refused():
    model = patch(tiny_llama())
    with pytest.raises(ValueError, match="is_causal=False|not in two directions"):
        model(IDS, is_causal=False)


@pytest.mark.parametrize("asked", ["argument", "config"])
def test_logits_of_routers_are_those_of_the_whole_text(asked):
    """A text that is read in pieces would have those of the last piece alone, and another loss."""
    features = dict(num_local_experts=4, num_experts_per_tok=2)
    config = LoCoCoConfig(128, block_size=16)
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    outputs = []
    patched = patch(family("Mixtral", **features), config, prefill_chunk_size=7)
    for model in (family("Mixtral", **features), patched):
        arguments = {"output_router_logits": True} if asked == "argument" else {}
        model.config.output_router_logits = asked == "config"
        outputs.append(model(IDS, labels=IDS, attention_mask=mask, **arguments))
    full, ours = outputs
    torch.testing.assert_close(ours.aux_loss, full.aux_loss, rtol=0, atol=1e-4)
    assert [each.shape for each in ours.router_logits] == [each.shape for each in full.router_logits]
