"""Every family of models that goes through the attention interface obeys the same laws; the others are refused."""

import dataclasses

import pytest
import torch
import transformers
from tiny import SIZES, tiny_ids, tiny_llama
from torch import nn

import lococo
from lococo.compat import RELEASE
from lococo.config import LoCoCoConfig
from lococo.models import find_family
from lococo.models.rotary import rotary_tables

torch.set_num_threads(1)  # threads of tensors this small wait for each other most of the time

LENGTH = 41
WINDOW = 9
SMALL = LoCoCoConfig(num_slots=12, block_size=6, kernel_size=5, gate_init=0.5)
LARGE = LoCoCoConfig(num_slots=48, block_size=16, kernel_size=5, gate_init=0.5)
SPLITS = {
    "one-by-one": [1] * LENGTH,
    "sevens": [7] * 5 + [6],
    "eights": [8] * 5 + [1],
    "mixed": [1, 7, 8, 25],
}
PARTIAL = dict(head_dim=8, partial_rotary_factor=0.5)
FAMILIES = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "Mistral-window": ("Mistral", dict(sliding_window=WINDOW)),
    "Qwen2": ("Qwen2", {}),
    "Qwen2-half-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "Qwen3": ("Qwen3", dict(head_dim=8)),
    "Gemma2": (
        "Gemma2",
        dict(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=5, attn_logit_softcapping=2.0),
    ),
    "Gemma3": (
        "Gemma3",
        dict(
            head_dim=8,
            sliding_window=WINDOW,
            query_pre_attn_scalar=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "Phi3": ("Phi3", {}),
    "Phi3-partial": ("Phi3", dict(partial_rotary_factor=0.5)),
    "Olmo2": ("Olmo2", {}),
    "Granite": (
        "Granite",
        dict(embedding_multiplier=2.0, attention_multiplier=0.3, residual_multiplier=0.5, logits_scaling=2.0),
    ),
    "SmolLM3": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "Glm": ("Glm", PARTIAL),
    "Glm4": ("Glm4", PARTIAL),
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
HALF_HEAD = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
LENGTH_DEPENDENT_ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3][:HALF_HEAD],
        "long_factor": [2.0, 3.0, 4.0, 5.0][:HALF_HEAD],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_position = pytest.mark.parametrize("positions", ["absolute", "slot"])


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def build(family, **overrides):
    """The unpatched model of a family, with Transformers' own eager attention."""
    name, features = FAMILIES[family]
    names = [f"{name}Text", name] if name == "Gemma3" else [name]
    config_class = next(getattr(transformers, f"{n}Config") for n in names if hasattr(transformers, f"{n}Config"))
    config = config_class(**{**SIZES, **features, **overrides}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if name.startswith("Gemma") and parameter_name.endswith("norm.weight"):
            parameter.data.zero_()  # 1 at first in Transformers 4.56, which doubles the logits and their rounding
    return model


def patch(model, config, **changes):
    """Patch with heads that are the same for the same config."""
    chunk = changes.pop("prefill_chunk_size", None)
    torch.manual_seed(1)
    return lococo.patch_model(model, dataclasses.replace(config, **changes), prefill_chunk_size=chunk)


def read(model, ids, split=None, mask=None):
    """Logits of ``ids``, read in calls of the given lengths."""
    if split is None:
        return model(ids, attention_mask=mask).logits
    cache, logits, stop = None, [], 0
    for part in ids.split(split, dim=1):
        stop += part.shape[1]
        seen_mask = None if mask is None else mask[:, :stop]
        output = model(part, attention_mask=seen_mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def pad_left(rows, padding=0):
    """(batch, longest row) ids with their mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0), value=padding) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


def greedy(model, ids, num_tokens):
    """The answer token by token, the whole text read again for each."""
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def anatomy(model):
    """All that a patch could leave behind: names, types, hooks and configuration of every module."""
    modules = {}
    for name, module in model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if "_hooks" in key and value is not None}
        modules[name] = (type(module), set(vars(module)), hooks)
    configs = {id(module.config): dict(vars(module.config)) for module in model.modules() if hasattr(module, "config")}
    return modules, configs, list(model.state_dict())


def assert_close(left, right):
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def gap(left, right):
    return (left - right).abs().max().item()


@every_position
@every_family
def test_a_text_that_fits_the_slots_is_read_as_by_the_unpatched_model(family, positions):
    model, ids = build(family), tiny_ids(2, LENGTH)
    full = read(model, ids)
    patch(model, LARGE, positions=positions)
    assert_close(read(model, ids), full)
    assert_close(read(model, ids, SPLITS["mixed"]), full)


@every_position
@every_family
def test_the_split_of_a_text_over_calls_does_not_matter(family, positions):
    model, ids = build(family), tiny_ids(2, LENGTH)
    full = read(model, ids)
    patch(model, SMALL, positions=positions)
    whole = read(model, ids)
    for split in SPLITS.values():
        assert_close(read(model, ids, split), whole)
    if family != "Mistral-window":  # which loses nothing, see below
        assert gap(whole, full) > 1e-2


@every_position
@every_family
def test_left_padding_does_not_matter(family, positions):
    model, rows = patch(build(family), SMALL, positions=positions), [tiny_ids(1, n)[0] for n in (LENGTH, 38, 30)]
    ids, mask = pad_left(rows)
    alone = [read(model, row[None])[0] for row in rows]
    for split in [None, *SPLITS.values()]:
        together = read(model, ids, split, mask)
        for row, logits in enumerate(alone):
            assert_close(together[row, -len(logits) :], logits)


@every_family
def test_generate_goes_on_as_if_everything_were_read_again(family):
    model, ids = patch(build(family), SMALL), tiny_ids(1, 23)
    model.generation_config.eos_token_id = None
    expected = greedy(model, ids, num_tokens=18)
    assert model.generate(ids, max_new_tokens=18, do_sample=False).tolist() == expected.tolist()


@every_family
def test_unpatching_leaves_no_trace(family):
    model, ids = build(family), tiny_ids(1, LENGTH)
    logits, before = read(model, ids), anatomy(model)
    for positions in ("absolute", "slot"):
        patch(model, SMALL, positions=positions)
        assert anatomy(model) != before
        read(model, ids, SPLITS["mixed"])
        model.generate(ids, max_new_tokens=2, do_sample=False)
        lococo.unpatch_model(model)
        assert anatomy(model) == before
        assert torch.equal(read(model, ids), logits)


@every_family
def test_slot_positions_never_pass_the_capacity(family):
    model, ids = build(family, max_position_embeddings=32), tiny_ids(1, 64)
    patch(model, SMALL, positions="slot")
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    rotaries = [module for module in model.modules() if "RotaryEmbedding" in type(module).__name__]
    for module in rotaries:
        module.register_forward_pre_hook(record, with_kwargs=True)
    assert read(model, ids).isfinite().all()
    assert model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1).shape == (1, 84)
    assert max(positions.max() for positions in seen) == SMALL.capacity - 1


@pytest.mark.parametrize(
    ("family", "features"),
    [*((family, {}) for family in FAMILIES), *(("Llama", {"rope_scaling": rope}) for rope in ROPES.values())],
    ids=[*FAMILIES, *ROPES],
)
def test_a_key_moved_to_another_slot_is_the_key_the_model_makes_there(family, features):
    model, keys = build(family, **features), []
    tables = rotary_tables(find_family(model), SMALL)
    for place in (3, 17):
        output = model(tiny_ids(1, 1), position_ids=torch.tensor([[place]]), use_cache=True)
        keys.append([layer.keys for layer in output.past_key_values.layers])
    for table, here, there in zip(tables.values(), *keys, strict=True):
        moved = here
        if table is not None:
            moved = table.rotate(table.rotate(here, torch.tensor([[3]]), inverse=True), torch.tensor([[17]]))
            assert gap(here, there) > 1e-2
        assert_close(moved, there)


@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        ("Cohere2", dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]), "which layers"),
        ("Exaone4", dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]), "which layers"),
        ("Phi", dict(partial_rotary_factor=0.5), "outside its own code"),
        *([("HunYuanDenseV1", dict(head_dim=8), "normed with weights after")] if RELEASE >= (5, 0) else []),
    ],
)
def test_slot_positions_refuse_keys_they_could_not_move(name, features, message):
    model, ids = causal_lm(name, attn_implementation="eager", **features), tiny_ids(1, LENGTH)
    full, before = read(model, ids), anatomy(model)
    with pytest.raises(ValueError, match=f"'slot'.*{message}.*'absolute'"):
        patch(model, SMALL, positions="slot")
    assert anatomy(model) == before
    assert_close(read(patch(model, LARGE), ids), full)


@every_position
def test_a_sliding_window_that_fits_the_slots_loses_nothing(positions):
    model, ids = build("Mistral-window"), tiny_ids(2, LENGTH)
    full = read(model, ids)
    with lococo.patched(model, LoCoCoConfig(num_slots=WINDOW - 1, block_size=6, positions=positions)):
        assert_close(read(model, ids), full)
    with lococo.patched(model, LoCoCoConfig(num_slots=WINDOW - 2, block_size=6, positions=positions)):
        assert gap(read(model, ids), full) > 1e-2


@pytest.mark.parametrize("family", ["Phi3-partial", "Glm", "Glm4"])
def test_partial_rotary_embeddings_are_partial(family):
    model = build(family)
    assert model.model.rotary_emb.inv_freq.shape[0] == HALF_HEAD // 2


@every_position
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type_that_follows_from_the_position(rope, positions):
    model, ids = tiny_llama(rope_scaling=ROPES[rope], attn_implementation="eager"), tiny_ids(2, LENGTH)
    assert model.model.rotary_emb.rope_type == rope
    full = read(model, ids)
    assert_close(read(patch(model, LARGE, positions=positions), ids), full)
    lococo.unpatch_model(model)
    patch(model, SMALL, positions=positions)
    whole = read(model, ids)
    assert gap(whole, full) > 1e-2
    for split in SPLITS.values():
        assert_close(read(model, ids, split), whole)


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("rope", LENGTH_DEPENDENT_ROPES)
def test_slot_positions_refuse_angles_that_depend_on_the_length(rope, family):
    model, ids = build(family, rope_scaling=LENGTH_DEPENDENT_ROPES[rope]), tiny_ids(1, LENGTH)
    full, before = read(model, ids), anatomy(model)
    with pytest.raises(ValueError, match=f"'slot'.*'{rope}'.*'absolute'"):
        patch(model, SMALL, positions="slot")
    assert anatomy(model) == before
    assert_close(read(patch(model, LARGE), ids), full)


def test_a_release_that_renames_the_cache_once_more_is_refused(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model.model), "forward", lambda self, input_ids=None, memory=None, **kwargs: None)
    before = anatomy(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported on transformers .* neither cache nor"):
        patch(model, SMALL)
    assert anatomy(model) == before


UNSUPPORTED = {
    "not-rotary": lambda: causal_lm("GPT2", n_embd=32, n_layer=2, n_head=4),
    "encoder-decoder": lambda: conditional("T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "encoder-decoder-through-the-interface": lambda: conditional(
        "Bart",
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 32),
    ),
    "state-space": lambda: causal_lm("Mamba", state_size=4, expand=2),
    "hybrid": lambda: causal_lm(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False, mamba_d_state=4
    ),
    "sinks": lambda: causal_lm("GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "latent": lambda: causal_lm(
        "DeepseekV3",
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=4,
        first_k_dense_replace=2,
    ),
    "difference-of-attentions": lambda: causal_lm("DiffLlama"),
    "keywords-kept": lambda: causal_lm("Nemotron"),
    "keywords-kept-in-one-layer": lambda: with_attention_of_its_own("keeps"),
    "own-attention": lambda: with_attention_of_its_own("attends"),
    "multimodal-rotary": lambda: vision_language("Qwen2_5_VL", rope_scaling=SECTIONS),
    "multimodal-rotary-interleaved": lambda: vision_language("Qwen3VL", head_dim=8, rope_scaling=SECTIONS),
    "two-head-sizes": lambda: with_head_dims(8, 16),
    "head-size-of-no-config": lambda: with_head_dims(16, 16),
    "more-kv-heads-than-the-config-says": lambda: causal_lm("JetMoe", kv_channels=8, num_local_experts=4),
    "cross-attention": lambda: transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**MLLAMA)),
    "shared-keys": lambda: transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**GEMMA3N)),
    "tensor-parallel": lambda: with_tensor_parallelism(),
    "layers-of-another-kind": lambda: with_layer_types("sparse_attention"),
    "cache-of-its-own": lambda: causal_lm(
        "MiniMax", head_dim=8, layer_types=["full_attention"] * 2, num_local_experts=2
    ),
    "several-decoders": lambda: nn.ModuleDict({"policy": tiny_llama(), "reference": tiny_llama(num_hidden_layers=3)}),
    "no-model": lambda: nn.Linear(4, 4),
}


for kind, config in {"multimodal-rotary-interleaved": "Qwen3VLConfig", "cross-attention": "MllamaTextConfig"}.items():
    if not hasattr(transformers, config):  # not yet there in the oldest release
        del UNSUPPORTED[kind]

FULL = {"layer_types": ["full_attention"] * 2}
SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2]}
MLLAMA = {**SIZES, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}}
GEMMA3N = {
    **SIZES,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [48] * 4,
}


def vision_language(name, **features):
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[]
    )
    config = getattr(transformers, f"{name}Config")(text_config={**SIZES, **features}, vision_config=vision)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def with_attention_of_its_own(kind):
    """A Llama in whose last layer somebody has put code of their own, a class with the same name."""
    model = tiny_llama()
    layer = model.model.layers[1]
    owner = layer if kind == "keeps" else layer.self_attn

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        if kind == "attends":
            return torch.nn.functional.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states), None
        return self.self_attn(hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings)

    owner.__class__ = type(type(owner).__name__, (type(owner),), {"forward": forward})
    return model


def with_head_dims(*head_dims):
    model = tiny_llama()
    for layer, head_dim in zip(model.model.layers, head_dims, strict=True):
        layer.self_attn.head_dim = head_dim
    return model


def with_layer_types(name):
    model = tiny_llama()
    model.config.layer_types = ["full_attention", name]
    return model


def with_tensor_parallelism():
    model = tiny_llama()
    model._tp_size = 2
    return model


def causal_lm(name, **features):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **features})
    return getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config).eval()


def conditional(name, **features):
    config = getattr(transformers, f"{name}Config")(vocab_size=64, **features)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name_and_left_alone(kind):
    model = UNSUPPORTED[kind]()
    before, weights = anatomy(model), [parameter.clone() for parameter in model.parameters()]
    is_split = kind == "tensor-parallel"
    reason = "is split over processes by tensor parallelism" if is_split else "is not supported: "
    with pytest.raises(ValueError, match=f"{type(model).__name__} {reason}"):
        lococo.patch_model(model, SMALL)
    assert anatomy(model) == before and not lococo.is_patched(model)
    assert all(map(torch.equal, weights, model.parameters()))


# Before Transformers 5 both attend in code of their own.
WINDOWS = {"Phimoe": dict(num_local_experts=2), "Olmoe": dict(num_experts=2)} if RELEASE >= (5, 0) else {}


@pytest.mark.parametrize(("name", "features"), WINDOWS.items())
def test_the_window_of_the_mask_is_that_of_the_layer(name, features):
    """PhiMoE's attention is not told of the window in its mask, OLMoE's of one that its mask does not have."""
    model, ids = causal_lm(name, sliding_window=WINDOW, num_experts_per_tok=1, **features), tiny_ids(2, LENGTH)
    full = read(model, ids)
    patch(model, LARGE)
    assert_close(read(model, ids), full)
    assert_close(read(model, ids, SPLITS["mixed"]), full)


@pytest.mark.filterwarnings("ignore")  # torch's own quantisation is on its way out
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_linear_layers_in_dynamic_int8(positions):
    def model():
        return torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear})

    ids = tiny_ids(2, LENGTH)
    full = read(model(), ids)
    assert_close(read(patch(model(), LARGE, positions=positions), ids), full)
    options = dict(max_new_tokens=9, do_sample=False)
    assert torch.equal(
        patch(model(), LARGE, positions=positions).generate(ids, **options), model().generate(ids, **options)
    )
    small = patch(model(), SMALL, positions=positions)
    assert gap(read(small, ids), full) > 1e-2
    assert small.generate(ids, **options).shape == (2, LENGTH + 9)
    assert_close(read(lococo.unpatch_model(small), ids), full)
