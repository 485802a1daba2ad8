"""What a reader answers is what ``generate`` answers, whatever it has read before."""

import random

import pytest
import torch
from configs import CODED, CONFIGS, FEW
from families import build
from tiny import tiny_llama
from transformers import GenerationConfig, StoppingCriteria

import lococo
from lococo.compat import OUTPUT_CACHE
from lococo.serving import reader as reading
from lococo.serving.reader import PromptReader

NEW = 6
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in {*FEW, "centroids", "decode-block-1"}
]
PLAIN = GenerationConfig(max_new_tokens=NEW, do_sample=False)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """What takes hundreds of tokens happens in a few dozen."""
    monkeypatch.setattr(reading, "WORTH_KEEPING", 4)
    monkeypatch.setattr(reading, "BEFORE_THE_END", (24, 12, 6))
    monkeypatch.setattr(reading, "PIECE", 10)


def read_by(model, kept_caches=8):
    """A reader, and a function that asks it and returns the new tokens and how many of the prompt's were reused."""
    reader = PromptReader(model, kept_caches)

    def ask(ids, config=PLAIN, **kwargs):
        reused = []
        output = reader.generate(torch.tensor([ids]), on_reuse=reused.append, generation_config=config, **kwargs)
        return output[0, len(ids) :].tolist(), sum(reused)

    return reader, ask


def alone(model, ids, config=PLAIN):
    input_ids = torch.tensor([ids])
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return output[0, len(ids) :].tolist()


def tokens(count, seed):
    return random.Random(seed).choices(range(1, 64), k=count)


def conversations(ask, check):
    """Two documents with questions in turn, a conversation that goes on, the same again, and something short."""
    for document in (tokens(50, 1), tokens(41, 2)):
        for question in range(3):
            check(document + tokens(5, 10 + question))
    history = tokens(30, 3)
    for turn in range(3):
        check(history)
        history = history + ask(history)[0] + tokens(4, turn)
    check(tokens(50, 1) + tokens(5, 10))
    check([7])
    check([7, 8, 9])


@pytest.mark.parametrize("name", [*FEW, "centroids", "decode-block-1", "full", *SLOW])
def test_answers_are_those_of_generate(name):
    model = tiny_llama().double()  # where no rounding of pieces decides between two tokens
    if name != "full":
        lococo.patch_model(model, CONFIGS[name])
    _, ask = read_by(model, kept_caches=5)
    reused = []

    def check(ids):
        answer, known = ask(ids)
        assert answer == alone(model, ids)
        reused.append(known)

    conversations(ask, check)
    has_blocks_of_steps = name != "full" and CONFIGS[name].decode_block_size is not None
    assert (sum(reused) == 0) == has_blocks_of_steps


CODED_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CODED if name not in ("8-4", "per-head")]


@pytest.mark.parametrize("name", ["8-4", "per-head", *CODED_SLOW])
def test_answers_from_codes_are_those_of_generate(name):
    model = lococo.patch_model(tiny_llama().double(), CODED[name])
    _, ask = read_by(model, kept_caches=5)
    conversations(ask, lambda ids: _assert_as_alone(model, ask, ids))


@pytest.mark.parametrize("name", ["open", "windows-kept", "windows-compressed", "full"])
def test_answers_of_layers_with_windows_are_those_of_generate(name):
    model = build("Qwen2-half-window", sliding_window=7).double()
    if name != "full":
        lococo.patch_model(model, CONFIGS[name])
    _, ask = read_by(model, kept_caches=5)
    conversations(ask, lambda ids: _assert_as_alone(model, ask, ids))


def _assert_as_alone(model, ask, ids):
    assert ask(ids)[0] == alone(model, ids)


@pytest.mark.parametrize("is_patched", [True, False])
def test_a_kind_of_cache_in_the_generation_config_is_no_hindrance(is_patched):
    """Some models are saved with one, which does not go with a cache to go on with."""
    model = tiny_llama()
    if is_patched:
        lococo.patch_model(model, CONFIGS["default"])
    _, ask = read_by(model)
    ids, config = tokens(40, 1), GenerationConfig(max_new_tokens=NEW, do_sample=False, cache_implementation="static")
    expected = alone(model, ids)
    assert [ask(ids, config)[0] for _ in range(2)] == [expected, expected]
    assert bool(ask(ids, config)[1]) == is_patched


def test_other_criteria_end_a_generation_too():
    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 42])

    _, ask = read_by(lococo.patch_model(tiny_llama(), CONFIGS["default"]))
    assert len(ask(tokens(40, 1), stopping_criteria=[Stop()])[0]) == 2


def test_a_document_is_read_once():
    """The second question finds all but a few of its tokens read, the third all of them."""
    model = lococo.patch_model(tiny_llama(), CONFIGS["default"])
    _, ask = read_by(model)
    document = tokens(100, 1)
    assert [ask(document + [first, 2, 3])[1] for first in (5, 6, 7)] == [0, 96, 100]


def test_a_conversation_goes_on_where_it_ended():
    model = lococo.patch_model(tiny_llama(), CONFIGS["default"])
    _, ask = read_by(model)
    history = tokens(40, 1)
    answer, _ = ask(history)
    assert ask(history + answer + tokens(4, 2))[1] == 40 + NEW - 1  # an answer's last token is not read


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_no_more_is_kept_than_allowed_and_the_latest(kept):
    model = lococo.patch_model(tiny_llama(), CONFIGS["default"])
    reader, ask = read_by(model, kept)
    output = model.generate(torch.tensor([tokens(60, 0)]), max_new_tokens=2, return_dict_in_generate=True)
    one = output[OUTPUT_CACHE].nbytes
    for seed in range(4):
        ask(tokens(60, seed))
        assert len(reader.kept) == kept and reader.nbytes <= kept * one
    assert bool(ask(tokens(60, 3))[1]) == (kept > 1)  # the very last is the end of the answer
    with pytest.raises(ValueError, match="at least 0, got -1"):
        PromptReader(model, -1)


def test_a_document_that_is_asked_about_again_and_again_stays():
    _, ask = read_by(lococo.patch_model(tiny_llama(), CONFIGS["default"]), kept_caches=10)
    document = tokens(100, 1)
    ask(document + [5, 2, 3])
    for seed in range(2, 9):
        ask(tokens(60, seed))
        assert ask(document + [5 + seed, 2, 3])[1] >= 96


def test_a_kept_cache_is_never_written_to():
    model = lococo.patch_model(tiny_llama(), CONFIGS["default"])
    reader, ask = read_by(model)
    document = tokens(60, 1)
    ask(document)
    before = {
        ids: [each.clone() for layer in cache.layers for each in layer.buffers()] for ids, cache in reader.kept.items()
    }
    for question in range(3):
        assert ask(document[:56] + tokens(9, question))[1] > 0
    still = [ids for ids in before if ids in reader.kept]
    assert still
    for ids in still:
        now = [each for layer in reader.kept[ids].layers for each in layer.buffers()]
        assert all(torch.equal(one, other) for one, other in zip(before[ids], now, strict=True))


@pytest.mark.parametrize("calls", [1, 3, 9])
def test_what_check_raises_ends_a_generation_and_the_reader_goes_on(calls):
    """Before it, while the prompt is read, and between two new tokens."""
    model = lococo.patch_model(tiny_llama(), CONFIGS["default"])
    _, ask = read_by(model)
    left = iter(range(calls - 1))
    ids = tokens(60, 1)

    def check():
        if next(left, None) is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ask(ids, check=check)
    assert ask(ids)[0] == alone(model, ids)


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(max_new_tokens=NEW, do_sample=False, num_beams=3),
        GenerationConfig(max_new_tokens=NEW, do_sample=False, use_cache=False),
    ],
    ids=["beams", "no-cache"],
)
def test_generations_that_cannot_go_on_begin_anew(config):
    model = lococo.patch_model(tiny_llama(), CONFIGS["default"])
    _, ask = read_by(model)
    ids = tokens(40, 1)
    ask(ids)
    assert ask(ids, config) == (alone(model, ids, config), 0)


@pytest.mark.parametrize("is_patched", [True, False])
def test_rotary_tables_that_depend_on_the_length_are_those_of_the_whole_text(is_patched):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model, other = (tiny_llama(max_position_embeddings=32, rope_scaling=rope) for _ in range(2))
    if is_patched:
        lococo.patch_model(model, CONFIGS["default"]), lococo.patch_model(other, CONFIGS["default"])
    _, ask = read_by(model)
    for length in (40, 90):
        ids = tokens(90, 1)[:length]
        assert ask(ids) == (alone(other, ids), 0)
