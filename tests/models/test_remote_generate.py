"""``generate`` of ChatGLM's own code, on a Transformers release that runs it whole: see make test-chatglm."""

import pytest
import torch
import transformers
from remote_chatglm import colossalai_chatglm
from tiny_chatglm import chatglm_fields, original_model, random_tensors

import lococo
from lococo import LoCoCoConfig

FIELDS = chatglm_fields(seq_length=256)
NEW_TOKENS = 12
LARGE = LoCoCoConfig(num_slots=80, block_size=16, kernel_size=5, gate_init=0.5)
SMALL = LoCoCoConfig(num_slots=12, block_size=6, kernel_size=5, gate_init=0.5)

every_position = pytest.mark.parametrize("positions", ["absolute", "slot"])


@pytest.fixture
def model():
    return original_model(colossalai_chatglm, FIELDS, random_tensors(FIELDS))


def token_ids(rows=2, length=40):
    return torch.randint(3, FIELDS["padded_vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))


def patch(model, config, positions):
    torch.manual_seed(1)
    return lococo.patch_model(model, LoCoCoConfig.from_dict({**config.to_dict(), "positions": positions}))


def answer(model, ids, **options):
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, **options)


def padded(ids, padding):
    """Arguments for the first row with padding on its left, as ChatGLM's tokenizer makes them."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))


@every_position
def test_answers_to_a_prompt_that_fits_the_slots_are_those_of_the_unpatched_model(model, positions):
    ids = token_ids()
    ways = [{}, dict(num_beams=3), padded(ids, 9)]
    expected = [answer(model, ids, **way) for way in ways]
    patch(model, LARGE, positions)
    for way, full in zip(ways, expected, strict=True):
        assert torch.equal(answer(model, ids, **way), full)
    lococo.unpatch_model(model)
    assert torch.equal(answer(model, ids), expected[0])


@every_position
@torch.no_grad()
def test_generate_goes_on_as_if_everything_were_read_again(model, positions):
    patch(model, SMALL, positions)
    ids = token_ids()
    again = ids
    for _ in range(NEW_TOKENS):
        again = torch.cat([again, model(again).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(answer(model, ids), again)


@every_position
def test_rows_do_not_see_each_other(model, positions):
    patch(model, SMALL, positions)
    ids = token_ids()
    together = answer(model, ids, **padded(ids, 9))
    assert torch.equal(together[0, 40:], answer(model, ids[:1, 9:])[0, 31:])
    assert torch.equal(together[1], answer(model, ids[1:])[0])
    beams = answer(model, ids, num_beams=3)
    for row in range(2):
        assert torch.equal(beams[row], answer(model, ids[row : row + 1], num_beams=3)[0])
    assert not torch.equal(beams, answer(model, ids)), "beams that change nothing show nothing"


def test_other_models_are_refused_with_the_release_that_they_need(model):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM needs transformers >= 4\.56"):
        lococo.patch_model(transformers.LlamaForCausalLM(config))
