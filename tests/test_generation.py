"""Generating with a patched model: every way of calling it gives what reading the whole text again would give."""

import pytest
import torch
import transformers
from families import build, gap, greedy, pad_left, patch, read
from generating import NEW_TOKENS, ROWS, answer, beam_search
from tiny import tiny_ids, tiny_llama
from transformers import DynamicCache, StaticCache

import lococo
from lococo.cache.cache import LoCoCoCache
from lococo.config import LoCoCoConfig
from lococo.generation import read_tokens

CONFIG = LoCoCoConfig(num_slots=12, block_size=6, kernel_size=5, gate_init=0.5)
SLOT_POSITIONS = LoCoCoConfig(num_slots=12, block_size=6, kernel_size=5, gate_init=0.5, positions="slot")
PROMPT = tiny_ids(1, 31)
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[CONFIG, SLOT_POSITIONS], ids=["absolute", "slot"])
def model(request):
    return patched_llama(request.param)


def patched_llama(config=CONFIG, **changes):
    return patch(tiny_llama(), config, **changes)


def widths_read(model):
    """List that will hold the number of tokens of every call of the decoder."""
    widths = []

    def note(module, args, kwargs):
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        widths.append(tokens.shape[1])

    # Before the library's own hook, which leaves a call with its last chunk.
    model.model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    return widths


def test_greedy_is_the_argmax_after_reading_everything_again(model):
    generated = answer(model, PROMPT)
    assert torch.equal(generated, greedy(model, PROMPT, NEW_TOKENS))
    assert not torch.equal(generated, answer(lococo.unpatch_model(model), PROMPT))


def test_rows_of_a_left_padded_batch_are_answered_as_if_alone(model):
    ids, mask = pad_left(ROWS)
    together = answer(model, ids, attention_mask=mask)
    for row, generated in zip(ROWS, together, strict=True):
        assert torch.equal(generated[-len(row) - NEW_TOKENS :], answer(model, row[None])[0])


def test_sampling_draws_from_what_reading_everything_again_gives(model):
    expected = PROMPT
    torch.manual_seed(7)
    for _ in range(NEW_TOKENS):
        drawn = torch.multinomial(model(expected).logits[:, -1].softmax(-1), 1)
        expected = torch.cat([expected, drawn], dim=1)
    for _ in range(2):
        torch.manual_seed(7)
        assert torch.equal(answer(model, PROMPT, do_sample=True, top_k=0), expected)
    assert not torch.equal(expected, answer(model, PROMPT))


def test_returned_sequences_are_those_of_a_repeated_prompt(model):
    ids, mask = pad_left(ROWS[:2])
    torch.manual_seed(7)
    several = answer(model, ids, attention_mask=mask, do_sample=True, num_return_sequences=3)
    torch.manual_seed(7)
    ids, mask = ids.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0)
    assert torch.equal(several, answer(model, ids, attention_mask=mask, do_sample=True))
    assert len(set(map(tuple, several.tolist()))) == 6


def test_beams_take_their_cache_along(model):
    ids, mask = pad_left(ROWS)
    output = answer(
        model,
        ids,
        attention_mask=mask,
        num_beams=3,
        num_return_sequences=3,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for index, row in enumerate(ROWS):
        texts, scores = beam_search(model, row[None], num_beams=3)
        found = slice(3 * index, 3 * index + 3)
        assert torch.equal(output.sequences[found, -texts.shape[1] :], texts)
        torch.testing.assert_close(output.sequences_scores[found], scores, **TOLERANCE)
    parents = output.beam_indices.view(3, 3, NEW_TOKENS)[:, 0] % 3
    assert len(set(parents[0].tolist())) > 1, "no beam ever changed its place"


@pytest.mark.parametrize("chunk", [1, 5, 6, 31, 100])
def test_generates_prefill_chunk_size_changes_nothing(model, chunk):
    # Transformers 4 counts padding in the positions of the chunks, not in those of the answer, patched or not.
    counts_padding = transformers.__version__ < "5" and model.model.lococo_patch.config.positions == "absolute"
    ids, mask = pad_left(tiny_ids(3, 31) if counts_padding else ROWS)
    expected = answer(model, ids, attention_mask=mask)
    widths = widths_read(model)
    # Transformers 5.0 has no cache for its chunks unless one is asked for.
    arguments = {"prefill_chunk_size": chunk, "cache_implementation": "dynamic"}
    assert torch.equal(answer(model, ids, attention_mask=mask, **arguments), expected)
    assert sum(widths) == 31 + NEW_TOKENS - 1
    assert max(widths) <= chunk and len(widths) >= NEW_TOKENS - 1 + 31 // chunk


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one-row", "padded-rows"])
def test_a_second_turn_with_the_cache_is_one_long_reading(model, rows):
    ids, mask = pad_left(rows)
    first = answer(model, ids, attention_mask=mask, return_dict_in_generate=True)
    question = tiny_ids(len(rows), 9, seed=5)
    ids = torch.cat([first.sequences, question], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], dim=1)
    expected = answer(model, ids, attention_mask=mask)
    widths = widths_read(model)
    cache = first.past_key_values
    assert torch.equal(answer(model, ids, attention_mask=mask, past_key_values=cache), expected)
    assert widths == [10] + [1] * (NEW_TOKENS - 1)
    assert cache.seen_tokens == ids.shape[1] + NEW_TOKENS - 1


@pytest.mark.parametrize(
    "arguments",
    [{"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"}],
    ids=["use_cache=False", "dynamic", "static"],
)
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_the_kind_of_cache_asked_for_changes_nothing(family, arguments):
    model, (ids, mask) = patch(build(family), CONFIG), pad_left(ROWS)
    expected = answer(model, ids, attention_mask=mask)
    assert torch.equal(answer(model, ids, attention_mask=mask, **arguments), expected)


def test_compressing_after_every_token_while_decoding_is_a_block_of_one_token():
    fast = patched_llama(block_size=6, decode_block_size=1)
    slow = patched_llama(block_size=1)
    prompt = PROMPT[:, :1]
    expected = greedy(slow, prompt, 40)
    assert torch.equal(answer(fast, prompt, max_new_tokens=40), expected)
    logits = [read(model, expected, [1] * 41) for model in (fast, slow)]
    torch.testing.assert_close(*logits, **TOLERANCE)
    assert gap(logits[0], read(patched_llama(), expected)) > 1e-2
    after_a_prompt = answer(fast, PROMPT, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(after_a_prompt.logits[0], fast(PROMPT).logits[:, -1], **TOLERANCE)
    assert gap(after_a_prompt.logits[-1], read(fast, after_a_prompt.sequences[:, :-1])[:, -1]) > 1e-2


@pytest.mark.parametrize("keep", [0, 8])
@pytest.mark.parametrize("chunk", [1, 7, 8, 16])
def test_a_piece_of_a_prompt_is_no_generated_token_however_short(chunk, keep):
    text, logits = tiny_ids(1, 60), []
    for size in (512, chunk):
        model = patch(tiny_llama(), CONFIG, block_size=8, decode_block_size=1, prefill_chunk_size=size)
        cache = model(text[:, :33], use_cache=True, logits_to_keep=keep).past_key_values
        steps = [model(token, past_key_values=cache).logits for token in text[:, 33:].split(1, dim=1)]
        logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(*logits, **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 8, 11])
def test_a_piece_of_a_text_is_no_generated_token_either(chunk):
    text, logits = tiny_ids(1, 60), []
    for size in (33, chunk):
        model = patch(tiny_llama(), CONFIG, block_size=8, decode_block_size=1)
        cache = read_tokens(model, text[:, :33], chunk=size)
        logits.append(model(text[:, 33:34], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, **TOLERANCE)


@pytest.mark.parametrize("tokens", [20, 31])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_prompt_that_the_cache_has_read_is_not_read_again(model, given, tokens):
    cache, prompt = model(PROMPT, use_cache=True).past_key_values, PROMPT[:, :tokens]
    if given == "inputs_embeds":
        prompt = model.get_input_embeddings()(prompt)
    with pytest.raises(ValueError, match=f"has read 31 tokens and the prompt has {tokens}: it must begin with"):
        model.generate(**{given: prompt}, past_key_values=cache, max_new_tokens=1, pad_token_id=0)
    longer = tiny_ids(1, 40)
    assert cache.seen_tokens == 31
    assert torch.equal(answer(model, longer, past_key_values=cache), answer(model, longer))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_empty_cache_of_another_kind_changes_no_answer(kind):
    model, (ids, mask) = patch(build("Llama"), CONFIG), pad_left(ROWS)
    given = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=128)
    with pytest.warns(UserWarning, match=f"the empty {type(given).__name__} given as"):
        output = answer(model, ids, attention_mask=mask, past_key_values=given, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, LoCoCoCache)
    assert torch.equal(output.sequences, answer(model, ids, attention_mask=mask))


def test_a_full_cache_of_another_kind_is_refused_before_anything_is_read(model):
    given = tiny_llama()(PROMPT[:, :9], use_cache=True).past_key_values
    widths = widths_read(model)
    with pytest.raises(ValueError, match="is a DynamicCache that already holds tokens"):
        answer(model, PROMPT, past_key_values=given)
    assert not widths


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_llama(seed=1)}])
def test_decoding_that_must_take_tokens_back_says_to_unpatch(model, arguments):
    widths = widths_read(model)
    with pytest.raises(ValueError, match="unpatch_model"):
        answer(model, PROMPT, **arguments)
    assert not widths
    assert answer(lococo.unpatch_model(model), PROMPT, **arguments, eos_token_id=0).shape[1] > 31


def test_a_patched_assistant_says_to_unpatch(model):
    with pytest.raises(ValueError, match="unpatch_model"):
        answer(tiny_llama(), PROMPT, assistant_model=model)


LONG = tiny_ids(3, 52)
MASK = (torch.arange(52) >= torch.tensor([[0], [3], [17]])).long()
CALLS = {
    "plain": lambda model: {"input_ids": LONG},
    "padded": lambda model: {"input_ids": LONG, "attention_mask": MASK},
    "one-padded-row": lambda model: {"input_ids": LONG[2:], "attention_mask": MASK[2:]},
    "right-padded": lambda model: {"input_ids": LONG, "attention_mask": MASK.flip(1)},
    "embeds": lambda model: {"inputs_embeds": model.get_input_embeddings()(LONG), "attention_mask": MASK},
    "positions": lambda model: {"input_ids": LONG, "position_ids": 5 + torch.arange(52).expand(3, -1)},
    "keep-1": lambda model: {"input_ids": LONG, "logits_to_keep": 1},
    "keep-5": lambda model: {"input_ids": LONG, "attention_mask": MASK, "logits_to_keep": 5},
    "keep-more-than-a-chunk": lambda model: {"input_ids": LONG, "logits_to_keep": 11},
    "keep-more-than-all": lambda model: {"input_ids": LONG, "logits_to_keep": 60},
    "keep-by-index": lambda model: {"input_ids": LONG, "logits_to_keep": torch.tensor([2, 50])},
    "labels": lambda model: {"input_ids": LONG, "labels": LONG, "logits_to_keep": 0},
    "hidden": lambda model: {"input_ids": LONG, "attention_mask": MASK, "output_hidden_states": True},
}
READ_AT_ONCE = ("hidden", "keep-more-than-all")


@pytest.mark.parametrize("use_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("positions", ["absolute", "slot"])
def test_a_long_prompt_read_in_chunks_is_a_prompt_read_at_once(call, use_cache, positions):
    whole, chunked = (patched_llama(positions=positions, prefill_chunk_size=chunk) for chunk in (512, 7))
    widths = widths_read(chunked)
    outputs = [model(**CALLS[call](model), use_cache=use_cache) for model in (whole, chunked)]
    assert widths[0] == 52 and (len(widths) > 4) == (call not in READ_AT_ONCE)
    for expected, got in zip(*outputs_of(outputs), strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    if use_cache:
        assert [output.past_key_values.seen_tokens for output in outputs] == [52, 52]
        tokens = {"input_ids": LONG[: outputs[0].logits.shape[0], :3]}
        following = [
            model(**tokens, past_key_values=output.past_key_values).logits
            for model, output in zip((whole, chunked), outputs, strict=True)
        ]
        torch.testing.assert_close(*following, **TOLERANCE)
    else:
        assert all(output.past_key_values is None for output in outputs)
    as_tuple = chunked(**CALLS[call](chunked), use_cache=use_cache, return_dict=False)
    assert torch.equal(as_tuple["labels" in CALLS[call](chunked)], outputs[1].logits)


def test_only_the_last_chunks_hidden_states_are_held_for_the_last_logits(model):
    chunked = patched_llama(model.model.lococo_patch.config, prefill_chunk_size=7)
    lengths = []
    chunked.model.register_forward_hook(lambda _, args, output: lengths.append(output.last_hidden_state.shape[1]))
    for keep, held in ((1, 3), (5, 5), (11, 11), (0, 52)):
        chunked(LONG, logits_to_keep=keep)
        assert lengths[-1] == held


def outputs_of(outputs):
    return [
        [output[key] for key in ("loss", "logits") if key in output] + [*(output.hidden_states or ())]
        for output in outputs
    ]


def test_chunks_are_read_by_the_decoder_alone_too():
    whole, chunked = (patched_llama(prefill_chunk_size=chunk).model for chunk in (512, 7))
    expected = whole(LONG, MASK).last_hidden_state
    torch.testing.assert_close(chunked(LONG, MASK).last_hidden_state, expected, **TOLERANCE)
    torch.testing.assert_close(chunked(LONG, MASK, return_dict=False)[0], expected, **TOLERANCE)


def test_a_second_long_call_is_read_in_chunks_too(model):
    expected = read(model, LONG, [20, 32], MASK)
    chunked = patched_llama(model.model.lococo_patch.config, prefill_chunk_size=7)
    torch.testing.assert_close(read(chunked, LONG, [20, 32], MASK), expected, **TOLERANCE)


def full_cache():
    return tiny_llama()(PROMPT, use_cache=True).past_key_values


PACKED = torch.cat([torch.arange(20), torch.arange(11)])[None]
REFUSED = {
    "cache-of-another-config": ({"past_key_values": LoCoCoCache(SLOT_POSITIONS, 2)}, "was filled with positions=slot"),
    "cache-of-another-depth": ({"past_key_values": LoCoCoCache(CONFIG, 3)}, "it has num_layers=3"),
    "full-cache": ({"past_key_values": full_cache()}, "DynamicCache that already holds tokens"),
    "4-D-mask": ({"attention_mask": torch.ones(1, 1, 31, 31)}, r"2-D .* got shape \(1, 1, 31, 31\)"),
    "4-D-mask-per-layer-type": ({"attention_mask": {"full_attention": torch.ones(1, 1, 31, 31)}}, "2-D .* got shape"),
    "short-mask": ({"attention_mask": torch.ones(1, 30)}, r"shape \(1, 30\), expected \(1, 31\)"),
    "packed": ({"position_ids": PACKED}, "packed sequences"),
    "packed-by-number": ({"attention_mask": torch.arange(31)[None] // 16 + 1}, "got 2: rows of several texts"),
    "added-to-logits": ({"attention_mask": torch.full((1, 31), float("-inf"))}, "got -inf: .* added to logits"),
    "attention-matrices": ({"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_slots_cannot_do_is_refused(case):
    arguments, message = REFUSED[case]
    model = patched_llama()
    with pytest.raises(ValueError, match=message):
        model(PROMPT, **arguments)
    assert torch.equal(model(PROMPT).logits, patched_llama()(PROMPT).logits)


def test_an_empty_cache_of_another_kind_becomes_our_own(model):
    output = model(PROMPT, past_key_values=DynamicCache())
    assert isinstance(output.past_key_values, LoCoCoCache) and output.past_key_values.seen_tokens == 31


def test_a_cache_of_another_batch_size_is_refused(model):
    cache = model(tiny_ids(2, 31)).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows, the input has 1"):
        model(PROMPT, past_key_values=cache)


def test_a_cache_is_not_read_on_after_a_failure_until_it_is_reset(model):
    expected, cache = read(model, PROMPT, [20, 11]), model(PROMPT).past_key_values

    def fail(*args):
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(PROMPT, past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="did not finish.*reset"):
        model(PROMPT, past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(model(PROMPT, past_key_values=cache).logits, expected, **TOLERANCE)
