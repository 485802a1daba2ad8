"""Steps recorded on the CPU by ``step_tape``, beside launched ones."""

import contextlib
from unittest import mock

import torch
from step_tape import TapeRecorder
from tiny import tiny_ids

from lococo import cuda_graphs as graphs

PROMPT = tiny_ids(1, 21)
TOKENS = 50
REPLAYS = TOKENS - 1 - graphs.STEPS_BEFORE_RECORDING


@contextlib.contextmanager
def recording():
    """Steps on the CPU are recorded, and counted by what this gives."""
    recorder = TapeRecorder()
    with mock.patch.dict(graphs.RECORDERS, {"cpu": recorder}):
        yield recorder


def answer(model, ids=PROMPT, **arguments):
    """Logits of every new token."""
    options = dict(max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return model.generate(ids, **options, **arguments).logits


def assert_same_bits(launched, recorded):
    assert len(launched) == len(recorded)
    wrong = [index for index, pair in enumerate(zip(launched, recorded, strict=True)) if not torch.equal(*pair)]
    assert not wrong, f"{len(wrong)} of {len(launched)} calls differ, the first is number {wrong[0]}"


def assert_recorded_as_launched(model, ids=PROMPT, recordings=1, replays=REPLAYS, **arguments):
    expected = answer(model, ids, **arguments)
    with recording() as recorder:
        assert_same_bits(expected, answer(model, ids, **arguments))
    assert (recorder.recordings, recorder.replays) == (recordings, replays)
