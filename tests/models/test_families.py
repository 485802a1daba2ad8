"""Every family of models that goes through the attention interface obeys the same laws; the others are refused."""

import dataclasses

import pytest
import torch
from families import (
    FAMILIES,
    HALF_HEAD,
    LARGE,
    LENGTH,
    LENGTH_DEPENDENT_ROPES,
    ROPES,
    SMALL,
    SPLITS,
    UNSUPPORTED,
    WINDOW,
    anatomy,
    assert_close,
    build,
    causal_lm,
    gap,
    greedy,
    pad_left,
    patch,
    read,
)
from tiny import tiny_ids, tiny_llama
from torch import nn

import lococo
from lococo.compat import RELEASE
from lococo.config import LoCoCoConfig
from lococo.models import find_family
from lococo.models.rotary import rotary_tables

every_family = pytest.mark.parametrize("family", FAMILIES)
every_position = pytest.mark.parametrize("positions", ["absolute", "slot"])


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


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
    tables = rotary_tables(find_family(model), dataclasses.replace(SMALL, positions="slot"))
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
