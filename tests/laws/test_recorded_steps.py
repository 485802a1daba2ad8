"""Recorded steps give the bits of launched ones where Python runs once and memory stays put: see step_tape.py."""

import copy
import dataclasses
import gc

import pytest
import torch
import transformers
from configs import CONFIGS, FEW, opened
from families import FAMILIES, HALF_HEAD, KEPT, ROPES, build, fitting
from recorded import PROMPT, REPLAYS, TOKENS, answer, assert_recorded_as_launched, assert_same_bits, recording
from step_tape import FreedMemory, TapeRecorder
from tiny import SIZES, patched_llama, tiny_ids

import lococo
from lococo.state import patch_of


@pytest.mark.parametrize("name", CONFIGS)
def test_generate(name):
    assert_recorded_as_launched(patched_llama(CONFIGS[name]))


@pytest.mark.parametrize("name", FEW)
def test_generate_in_half_precision(name):
    assert_recorded_as_launched(patched_llama(CONFIGS[name]).bfloat16())


def test_no_block_ends_while_steps_are_recorded():
    assert_recorded_as_launched(patched_llama(opened(block_size=200)))


@pytest.mark.parametrize("name", ["default", "open-slot", "slots-per-head"])
@pytest.mark.parametrize("is_made_there", [False, True], ids=["model-from-outside", "model-made-there"])
def test_inference_mode(is_made_there, name):
    model = None if is_made_there else patched_llama(CONFIGS[name])
    with torch.inference_mode():
        assert_recorded_as_launched(model or patched_llama(CONFIGS[name]))


@pytest.mark.parametrize("name", ["default", "open", "slots-per-head", "h2o", "score-mean"])
def test_padded_rows(name):
    ids, mask = padded()
    assert_recorded_as_launched(patched_llama(CONFIGS[name]), ids, attention_mask=mask)


def test_padded_rows_in_slot_positions_are_not_recorded():
    ids, mask = padded()
    assert_recorded_as_launched(patched_llama(CONFIGS["open-slot"]), ids, 0, 0, attention_mask=mask)


def padded():
    ids = tiny_ids(3, 25)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, :2] = 0
    return ids, mask


# A cap on the logits is not for steps.
RECORDED = {name: dict(attn_logit_softcapping=None) if name == "Gemma2" else {} for name in FAMILIES}


@pytest.mark.parametrize("name", [pytest.param("default", marks=pytest.mark.slow), "open-slot"])
@pytest.mark.parametrize("family", RECORDED)
def test_families(family, name):
    torch.manual_seed(1)
    assert_recorded_as_launched(lococo.patch_model(build(family, **RECORDED[family]), CONFIGS[name]))


@pytest.mark.parametrize("family", [name for name, (_, features) in FAMILIES.items() if "sliding_window" in features])
def test_budgets_per_head_and_sums_of_scores_beside_windows(family):
    for name in ("slots-per-head", "h2o"):
        for compress in (True, False) if family in KEPT else (True,):
            config = fitting(family, dataclasses.replace(CONFIGS[name], compress_windows=compress))
            assert_recorded_as_launched(lococo.patch_model(build(family, **RECORDED[family]), config))


@pytest.mark.filterwarnings("ignore:MixtralForCausalLM decodes without a CUDA graph")
def test_a_mixture_of_experts_is_right_whether_it_can_be_recorded_or_not():
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).eval()
    lococo.patch_model(model, CONFIGS["open"])
    expected = answer(model)
    with recording() as recorder:
        assert_same_bits(expected, answer(model))
    assert recorder.recordings == 1


def with_rope(parameters):
    # Under both names: Transformers 4 and 5.
    rope = {"rope_theta": 10000.0, **parameters}
    return patched_llama(CONFIGS["open"], rope_parameters=rope, rope_scaling=rope, max_position_embeddings=32)


@pytest.mark.parametrize("rope", ROPES)
def test_ropes(rope):
    assert_recorded_as_launched(with_rope(ROPES[rope]))


@pytest.mark.filterwarnings("error:.*without a CUDA graph")
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_ropes_that_ask_the_host_for_the_length_are_not_recorded(rope_type):
    factors = dict(short_factor=[1.0] * HALF_HEAD, long_factor=[2.0] * HALF_HEAD, original_max_position_embeddings=32)
    rope = {"rope_type": rope_type, "factor": 2.0, **(factors if rope_type == "longrope" else {})}
    assert_recorded_as_launched(with_rope(rope), recordings=0, replays=0)


@pytest.mark.parametrize("name", ["default", "slots-per-head"])
def test_beams_give_the_same_text(name):
    model = patched_llama(CONFIGS[name])

    def text():
        return model.generate(PROMPT, num_beams=3, max_new_tokens=TOKENS, do_sample=False)

    expected = text()
    with recording() as recorder:
        assert torch.equal(text(), expected)
    assert recorder.recordings <= 2


@pytest.mark.parametrize("name", ["default", "open-slot"])
def test_several_samples_of_one_prompt(name):
    model = patched_llama(CONFIGS[name])

    def text():
        torch.manual_seed(1)
        return model.generate(PROMPT, num_return_sequences=3, do_sample=True, max_new_tokens=TOKENS)

    expected = text()
    with recording() as recorder:
        assert torch.equal(text(), expected)
    assert (recorder.recordings, recorder.replays) == (1, REPLAYS)


class Reader:
    """Reads parts of texts into caches, as ``generate`` calls a model, and keeps the logits."""

    def __init__(self, model):
        self.model, self.logits = model, []

    def read(self, ids, widths=None, cache=None):
        """Columns of a text, in parts of some widths (one token each if there are none); the cache."""
        for part in ids.split([1] * ids.shape[1] if widths is None else widths, dim=1):
            output = self.model.__call__(input_ids=part, past_key_values=cache, use_cache=True)
            self.logits.append(output.logits)
            cache = output.past_key_values
        return cache


def text(batch=1, length=40, seed=0):
    return tiny_ids(batch, length, seed)


def longer_calls_between_steps(reader):
    reader.read(text(1, 129), [20] + [1] * 20 + [13] + [1] * 30 + [40] + [1] * 6)


def rows_are_selected(reader):
    cache = reader.read(text(3, 40), [20] + [1] * 20)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache = reader.read(text(2, 25), cache=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    reader.read(text(2, 20, seed=1), cache=cache)


def the_cache_is_reset_and_reads_again(reader):
    cache = reader.read(text(1, 45), [20] + [1] * 25)
    cache.reset()
    reader.read(text(1, 50, seed=1), [17] + [1] * 33, cache)


def a_copy_and_its_original_both_go_on(reader):
    cache = reader.read(text(1, 43), [20] + [1] * 23)
    twin = copy.deepcopy(cache)
    for step in range(30):
        reader.read(text(1, 1, seed=step), cache=cache)
        reader.read(text(1, 1, seed=100 + step), cache=twin)


def rows_come_and_go_beside_another_cache(reader):
    first = reader.read(text(1, 40), [20] + [1] * 20)
    second = reader.read(text(2, 45, seed=1), [20] + [1] * 25)
    first = reader.read(text(1, 12, seed=2), cache=first)
    del first
    gc.collect()
    second = reader.read(text(2, 20, seed=3), cache=second)
    third = reader.read(text(1, 40, seed=4), [9] + [1] * 31)
    reader.read(text(2, 20, seed=5), cache=second)
    reader.read(text(1, 20, seed=6), cache=third)


def gradients_between_steps(reader):
    cache = reader.read(text(1, 40), [20] + [1] * 20)
    with torch.enable_grad():
        cache = reader.read(text(1, 11, seed=1), [11], cache)
    cache.detach()
    reader.read(text(1, 30, seed=2), cache=cache)


def gates_are_opened_between_steps(reader):
    cache = reader.read(text(1, 40), [20] + [1] * 20)
    before = {head: head.gate.clone() for head in patch_of(reader.model).heads.values()}
    for head in before:
        head.gate.fill_(0.9)
    reader.read(text(1, 30, seed=1), cache=cache)
    for head, gate in before.items():
        head.gate.copy_(gate)


HANDED_OVER = [
    longer_calls_between_steps,
    rows_are_selected,
    the_cache_is_reset_and_reads_again,
    a_copy_and_its_original_both_go_on,
    rows_come_and_go_beside_another_cache,
    gradients_between_steps,
    gates_are_opened_between_steps,
]


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "open-slot", "slots-per-head"])
@pytest.mark.parametrize("scenario", HANDED_OVER, ids=lambda function: function.__name__)
def test_a_cache_is_handed_on(scenario, name):
    model = patched_llama(CONFIGS[name])
    launched, recorded = Reader(model), Reader(model)
    scenario(launched)
    with recording() as recorder:
        scenario(recorded)
    assert_same_bits(launched.logits, recorded.logits)
    assert recorder.replays > 20


@pytest.mark.parametrize("name", ["default", "slots-per-head"])
def test_one_cache_for_several_answers(name):
    model = patched_llama(CONFIGS[name])

    def conversation():
        ids, logits, cache = PROMPT, [], None
        for turn in range(3):
            # Without a mask generate would take the pad tokens of its own answers for padding.
            output = model.generate(
                ids, past_key_values=cache, max_new_tokens=25, do_sample=False, return_dict_in_generate=True,
                output_logits=True, attention_mask=torch.ones_like(ids),
            )  # fmt: skip
            cache = output.past_key_values
            logits += output.logits
            ids = torch.cat([output.sequences, tiny_ids(1, 9, seed=turn)], dim=1)
        return logits

    expected = conversation()
    with recording() as recorder:
        assert_same_bits(expected, conversation())
    assert recorder.recordings == 1


# What the recorder is for: without these rules it would find nothing.


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


def test_python_runs_once_and_nothing_is_computed_before_the_first_replay():
    number, total, calls = torch.tensor([2.0]), torch.zeros(1), []

    def function():
        calls.append(1)
        total.add_(number)
        return Output(number * torch.tensor(3.0))

    replay, output = TapeRecorder()(function)
    assert total.item() == 0.0
    assert output.logits.isnan().all()
    number.fill_(5.0)
    replay()
    replay()
    assert (total.item(), output.logits.item(), len(calls)) == (10.0, 15.0, 1)


def test_memory_that_was_freed_is_not_read():
    held = {"bias": torch.ones(3)}
    replay, output = TapeRecorder()(lambda: Output(held["bias"] + 1))
    replay()
    assert torch.equal(output.logits, torch.full((3,), 2.0))
    held["bias"] = torch.zeros(3)
    with pytest.raises(FreedMemory, match=r"freed memory: torch.float32 \(3,\)"):
        replay()


NUMBERS = torch.arange(4.0)
HOST_WAITS = {
    "item": lambda: NUMBERS[0].item(),
    "truth": lambda: bool(NUMBERS[0] > 0),
    "equal": lambda: torch.equal(NUMBERS, NUMBERS),
    "tolist": lambda: NUMBERS.tolist(),
    "cpu": lambda: NUMBERS.cpu(),
    "nonzero": lambda: NUMBERS.nonzero(),
    "where": lambda: torch.where(NUMBERS > 1),
    "mask": lambda: NUMBERS[NUMBERS > 1],
    "write to a mask": lambda: NUMBERS.index_put_((NUMBERS > 1,), torch.ones(())),
    "masked_select": lambda: NUMBERS.masked_select(NUMBERS > 1),
    "repeat_interleave": lambda: NUMBERS.repeat_interleave(NUMBERS.long()),
    "upload": lambda: torch.tensor([1, 2]),
    "index with a list": lambda: NUMBERS[[0, 1]],
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("wait", HOST_WAITS.values(), ids=HOST_WAITS)
def test_nothing_waits_for_the_device(wait, mode):
    before = NUMBERS.clone()
    with mode(), pytest.raises(RuntimeError, match="not permitted while recording"):
        TapeRecorder()(wait)
    assert torch.equal(NUMBERS, before)
