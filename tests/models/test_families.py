"""Every family of models that goes through the attention interface obeys the same laws; the others are refused."""

import dataclasses
import sys

import pytest
import torch
from configs import FORESEEN
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
from lococo.models.rotary import TextRotary, rotary_tables
from lococo.state import patch_of

every_family = pytest.mark.parametrize("family", FAMILIES)
every_position = pytest.mark.parametrize("positions", ["absolute", "slot"])
every_way = pytest.mark.parametrize(
    "changes",
    [{}, {"positions": "slot"}, {"score": FORESEEN, "normalization": "softmax"}],
    ids=["absolute", "slot", "learned"],
)
every_rotation = pytest.mark.parametrize(
    ("family", "features"),
    [*((family, {}) for family in FAMILIES), *(("Llama", {"rope_scaling": rope}) for rope in ROPES.values())],
    ids=[*FAMILIES, *ROPES],
)
every_refusal = pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"positions": "slot"}, "positions='slot' must move keys, {}.*; use positions='absolute'"),
        ({"score": "learned"}, "score='learned' must see keys before they are rotated, {}.*; use score='distant'"),
    ],
    ids=["slot", "learned"],
)


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


@every_way
@every_family
def test_the_split_of_a_text_over_calls_does_not_matter(family, changes):
    model, ids = build(family), tiny_ids(2, LENGTH)
    full = read(model, ids)
    patch(model, SMALL, **changes)
    whole = read(model, ids)
    for split in SPLITS.values():
        assert_close(read(model, ids, split), whole)
    assert gap(whole, full) > 1e-2


@every_way
@every_family
def test_left_padding_does_not_matter(family, changes):
    model, rows = patch(build(family), SMALL, **changes), [tiny_ids(1, n)[0] for n in (LENGTH, 38, 30)]
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


@every_rotation
def test_networks_see_keys_as_they_were_before_they_were_rotated(family, features, monkeypatch):
    """In calls and after steps, of rows that begin at different columns."""
    model = patch(build(family, **features), SMALL, score=FORESEEN, block_size=16)
    handle, made, seen = patch_of(model), [], {}
    module = sys.modules[type(handle.layers[0]).__module__]
    rotate = module.apply_rotary_pos_emb  # the patch has found it already

    def noted(query, key, *arguments, **options):
        made.append(key)
        return rotate(query, key, *arguments, **options)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", noted)
    for index, network in handle.networks.items():
        seen[index] = []
        network.register_forward_pre_hook(lambda module, states, index=index: seen[index].append(states[0]))
    ids, mask = pad_left([tiny_ids(1, length)[0] for length in (21, 16)])
    read(model, torch.cat([ids, tiny_ids(2, 5)], dim=1), [21, 1, 1, 1, 2], nn.functional.pad(mask, (0, 5), value=1))
    rotated = [index for index, table in handle.rotary_tables.items() if table is not None]
    scale = getattr(model.model.rotary_emb, "attention_scaling", 1.0)  # YaRN's, which is on queries and keys
    for at, index in enumerate(rotated):
        if not seen[index]:  # it has a sliding window
            continue
        prompt, *steps = made[at :: len(rotated)]
        has_steps = family != "Gemma2"  # whose cap on the logits is not for them
        assert [part.shape[2] for part in seen[index]] == ([21, 3, 2] if has_steps else [21, 1, 1, 1, 2])
        got = torch.cat([seen[index][0][:, :, 5:], *seen[index][1:]], dim=2)
        assert_close(got, scale * torch.cat([prompt[:, :, 5:], *steps], dim=2))
    assert any(seen.values()) == (family != "Mistral-window")


def test_an_interrupted_thread_does_not_go_on_with_the_angles_of_another():
    family, mine, other = find_family(tiny_llama()), torch.arange(3)[None], torch.arange(7, 10)[None]

    class Interrupted(TextRotary):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_last" and value is not None and value[0] is mine:
                self.angles(other)

    found, expected = (kind(family, family.layers[0]).angles(mine) for kind in (Interrupted, TextRotary))
    assert_close(found, expected)


@every_rotation
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


@every_refusal
@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        (
            "Cohere2",
            dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
            "but which layers",
        ),
        (
            "Exaone4",
            dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
            "but which layers",
        ),
        ("Phi", dict(partial_rotary_factor=0.5), "those of PhiAttention cannot be rotated outside its own code"),
        *(
            [("HunYuanDenseV1", dict(head_dim=8), "those of HunYuanDenseV1Attention are normed with weights")]
            if RELEASE >= (5, 0)
            else []
        ),
    ],
)
def test_keys_that_cannot_be_rotated_from_outside_are_refused(name, features, message, changes, refused):
    model, ids = causal_lm(name, attn_implementation="eager", **features), tiny_ids(1, LENGTH)
    full, before = read(model, ids), anatomy(model)
    with pytest.raises(ValueError, match=refused.format(message)):
        patch(model, SMALL, **changes)
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


@every_refusal
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("rope", LENGTH_DEPENDENT_ROPES)
def test_angles_that_depend_on_the_length_are_refused(rope, family, changes, refused):
    model, ids = build(family, rope_scaling=LENGTH_DEPENDENT_ROPES[rope]), tiny_ids(1, LENGTH)
    full, before = read(model, ids), anatomy(model)
    said = f"those of rope type '{rope}' have angles that depend on the length of the text"
    with pytest.raises(ValueError, match=refused.format(said)):
        patch(model, SMALL, **changes)
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
