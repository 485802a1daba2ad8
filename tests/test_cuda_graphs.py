"""Recorded steps: the same bits as steps that are not, whatever ``generate`` does; with a recorder for the CPU."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from configs import CONFIGS, FEW
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from step_tape import TapeRecorder
from tiny import patched_llama, tiny_ids, tiny_llama
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import lococo
from lococo import cuda_graphs as graphs
from lococo.whole_text import reading_pieces

PROMPT = tiny_ids(1, 21)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


class Recorder:
    """Stands in for a CUDA graph: nothing is computed while recording, every replay writes into one output."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, function):
        self.recordings += 1
        output = CausalLMOutputWithPast(logits=torch.full((self.batch, 1, 64), float("nan")))

        def replay():
            self.replays += 1
            output.logits.copy_(function().logits)

        return replay, output

    batch = 1


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder)
    return recorder


def answer(model, ids=PROMPT, **arguments):
    arguments = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, **arguments}
    return model.generate(ids, output_logits=True, **arguments)


@pytest.mark.parametrize("name", FEW)
def test_generate_gives_the_same_bits(name, monkeypatch):
    model = patched_llama(CONFIGS[name])
    expected = answer(model)
    recorder = Recorder()
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder)
    replayed = answer(model)
    assert recorder.recordings == 1
    assert recorder.replays == 39 - graphs.STEPS_BEFORE_RECORDING
    assert torch.equal(replayed.sequences, expected.sequences)
    assert all(map(torch.equal, replayed.logits, expected.logits))


@pytest.mark.parametrize("name", ["open", "slots-per-head"])
def test_padded_rows(name, monkeypatch):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(3, 25)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, :2] = 0
    expected = answer(model, ids, attention_mask=mask)
    recorder = Recorder()
    recorder.batch = 3
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder)
    replayed = answer(model, ids, attention_mask=mask)
    assert recorder.replays > 20
    assert all(map(torch.equal, replayed.logits, expected.logits))


def test_beams_are_reordered_under_a_recording(monkeypatch):
    model = patched_llama(CONFIGS["open"])
    expected = answer(model, num_beams=3).sequences
    recorder = Recorder()
    recorder.batch = 3
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder)
    assert torch.equal(answer(model, num_beams=3).sequences, expected)


@pytest.mark.parametrize("name", ["open", "slots-per-head"])
def test_rows_change_places_under_a_recording(name, recorder):
    model, ids, recorder.batch = patched_llama(CONFIGS[name]), tiny_ids(3, 60), 3
    with torch.no_grad():
        caches = [model(ids[:, :21], use_cache=True).past_key_values for _ in range(2)]
        for column in range(21, 60):
            launched = model(ids[:, [column]], past_key_values=caches[0]).logits
            replayed = model.__call__(input_ids=ids[:, [column]], past_key_values=caches[1]).logits
            assert torch.equal(replayed, launched)
            for cache in caches if column % 3 == 0 else []:
                cache.reorder_cache(torch.tensor([2, 0, 0]) if column % 2 else torch.tensor([1, 2, 0]))
    assert recorder.recordings == 1 and recorder.replays > 20


@pytest.mark.parametrize("name", ["open", "slots-per-head"])
def test_a_cache_that_changes_is_recorded_anew(name, recorder):
    model = patched_llama(CONFIGS[name])
    with torch.no_grad():
        cache = model(tiny_ids(2, 21), use_cache=True).past_key_values
        recorder.batch = 2
        for _ in range(12):
            model.__call__(input_ids=tiny_ids(2, 1), past_key_values=cache)
        assert recorder.recordings == 1
        cache.batch_select_indices(torch.tensor([1]))
        recorder.batch = 1
        tokens = tiny_ids(1, 12, seed=5)
        replayed = [model.__call__(input_ids=token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
        assert recorder.recordings == 2
        text = torch.cat([tiny_ids(2, 21)[1:], *[tiny_ids(2, 1)[1:]] * 12, tokens], dim=1)
        torch.testing.assert_close(torch.cat(replayed, dim=1), model(text).logits[:, -12:], rtol=0, atol=1e-5)


def test_the_memory_of_a_recording_is_free_before_the_next_one_takes_some(monkeypatch):
    alive, graphs_made = [], weakref.WeakSet()

    class Watching(TapeRecorder):
        def __call__(self, function):
            alive.append(len(graphs_made))
            return super().__call__(function)

    class Listed(graphs.DecodeGraph):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            graphs_made.add(self)

    monkeypatch.setattr(graphs, "DecodeGraph", Listed)
    monkeypatch.setitem(graphs.RECORDERS, "cpu", Watching())
    model = patched_llama(CONFIGS["open"])
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
        for _ in range(2):
            for _ in range(12):
                model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([1]))  # as before, in other buffers
    assert alive == [0, 0]


@torch.no_grad()
def test_a_step_gives_all_that_a_config_asks_for(monkeypatch):
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder := TapeRecorder())
    model, ids = patched_llama(CONFIGS["open"]), tiny_ids(1, 60)
    model.config.output_hidden_states = True
    caches, given = [model(ids[:, :21], use_cache=True).past_key_values for _ in range(2)], []
    for column in range(21, 60):
        launched = model(ids[:, [column]], past_key_values=caches[0])
        given.append((launched, model.__call__(input_ids=ids[:, [column]], past_key_values=caches[1])))
    assert recorder.replays > 20
    for launched, replayed in given:
        assert set(replayed) == set(launched)
        assert all(map(torch.equal, replayed.hidden_states, launched.hidden_states))


@torch.no_grad()
def test_a_tuple_is_given_to_who_asks_for_one(recorder):
    model = patched_llama(CONFIGS["open"])
    cache = model(PROMPT, use_cache=True).past_key_values
    for _ in range(12):
        output = model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache, return_dict=False)
    assert isinstance(output, tuple) and not recorder.recordings


@torch.no_grad()
def test_pieces_of_a_text_are_no_steps(recorder):
    model = patched_llama(CONFIGS["open"])
    with reading_pieces(model, 40):
        cache = model(PROMPT, use_cache=True).past_key_values
        for _ in range(12):
            model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache)
    assert not recorder.recordings


def test_longer_calls_come_between(recorder):
    model, ids = patched_llama(CONFIGS["open"]), tiny_ids(1, 90)
    with torch.no_grad():
        cache, logits = model(ids[:, :20], use_cache=True).past_key_values, []
        for part in ids[:, 20:].split([1] * 15 + [13] + [1] * 30 + [12], dim=1):
            logits.append(model.__call__(input_ids=part, past_key_values=cache).logits)
        assert recorder.recordings == 1
        assert recorder.replays == 15 + 30 - graphs.STEPS_BEFORE_RECORDING
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits[:, 20:], rtol=0, atol=1e-5)


def test_weights_that_move_are_recorded_anew(recorder):
    model = patched_llama(CONFIGS["open"])
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
        for _ in range(10):
            model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache)
        model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight)
        twice = model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache).logits
        assert recorder.recordings == 2
        text = torch.cat([PROMPT, *[tiny_ids(1, 1)] * 11], dim=1)
        torch.testing.assert_close(twice[:, -1], model(text).logits[:, -1], rtol=0, atol=1e-5)


def test_nothing_is_recorded_where_it_would_not_be_the_same(recorder):
    model = patched_llama(CONFIGS["open"])
    answer(model, output_hidden_states=True)
    model.train()
    answer(model)
    model.eval()
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    answer(model)
    handle.remove()
    assert len(seen) == 40
    with lococo.patch.suspended(model):
        answer(model)
    answer(model, num_beams=2)
    assert recorder.recordings == 0
    answer(model)
    assert recorder.recordings == 1


@pytest.mark.parametrize("error", [RuntimeError, ImportError, OSError, ValueError, torch.OutOfMemoryError])
def test_a_recording_that_fails_is_told_once_and_never_tried_again(error, monkeypatch, recwarn):
    """Whatever it raises; nothing of it is tried again for another cache of the same patch."""
    tries = []

    def fail(function):
        tries.append(function)
        raise error("capture is not permitted here")

    model = patched_llama(CONFIGS["open"])
    expected = answer(model).sequences
    monkeypatch.setitem(graphs.RECORDERS, "cpu", fail)
    for _ in range(3):
        assert torch.equal(answer(model).sequences, expected)
    told = [str(warning.message) for warning in recwarn if "CUDA graph" in str(warning.message)]
    assert told == ["LlamaForCausalLM decodes without a CUDA graph: capture is not permitted here"]
    assert len(tries) == 1
    lococo.unpatch_model(model)
    torch.manual_seed(0)
    lococo.patch_model(model, CONFIGS["open"])
    answer(model)
    assert len(tries) == 2


def test_a_recording_that_fails_half_way_leaves_cache_and_model_as_they_were(monkeypatch):
    """The function has run to the second layer: on a GPU nothing would have been computed."""
    model, ids = patched_llama(CONFIGS["open"]), tiny_ids(1, 60)

    def fail(function):
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        cache = next(iter(caches))
        kept = [tensor.clone() for layer in cache.layers for tensor in layer.buffers()]
        at = [layer.decode._at.clone() for layer in cache.layers]
        try:
            function()
        finally:
            handle.remove()
            for tensor, value in zip([t for layer in cache.layers for t in layer.buffers()], kept, strict=True):
                tensor.copy_(value)
            for layer, value in zip(cache.layers, at, strict=True):
                layer.decode._at.copy_(value)

    monkeypatch.setitem(graphs.RECORDERS, "cpu", fail)
    with torch.no_grad(), pytest.warns(UserWarning, match="without a CUDA graph: division by zero"):
        cache, logits = model(ids[:, :21], use_cache=True).past_key_values, []
        caches = [cache]
        for part in ids[:, 21:].split(1, dim=1):
            logits.append(model.__call__(input_ids=part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits[:, 21:], rtol=0, atol=1e-5)
    assert not cache.is_open and not cache.is_reading and model.model.lococo_patch.thread.request is None


@pytest.mark.parametrize("prefix", range(21, 30))
def test_a_recording_that_fails_at_the_end_of_a_block_leaves_it_compressed_once(prefix, monkeypatch):
    model, ids = patched_llama(CONFIGS["open"]), tiny_ids(1, 60)
    monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda function: 1 / 0)
    with torch.no_grad(), pytest.warns(UserWarning, match="without a CUDA graph"):
        cache, logits = model(ids[:, :prefix], use_cache=True).past_key_values, []
        for part in ids[:, prefix:].split(1, dim=1):
            logits.append(model.__call__(input_ids=part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits[:, prefix:], rtol=0, atol=1e-5)


def test_an_empty_recording_is_found_out_before_it_counts(monkeypatch):
    """As when it was made on the stream of another device: nothing is ever written."""
    model = patched_llama(CONFIGS["open"])
    expected = answer(model)

    def record_nothing(function):
        return lambda: None, CausalLMOutputWithPast(logits=torch.zeros(1, 1, 64))

    monkeypatch.setitem(graphs.RECORDERS, "cpu", record_nothing)
    with pytest.warns(UserWarning, match="without a CUDA graph: the recording is empty"):
        got = answer(model)
    assert all(map(torch.equal, got.logits, expected.logits))


def test_a_recording_that_lost_memory_to_another_is_made_anew(recorder, monkeypatch):
    class Replay:
        is_intact = True

        def __init__(self, replay):
            self.replay = replay

        def __call__(self):
            self.replay()

    made = []

    def record(function):
        replay, output = recorder(function)
        made.append(Replay(replay))
        return made[-1], output

    model = patched_llama(CONFIGS["open"])
    monkeypatch.setitem(graphs.RECORDERS, "cpu", record)
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
        for step in range(20):
            if step == 15:
                made[-1].is_intact = False
            model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache)
    assert recorder.recordings == 2


def test_streams_count_the_graphs_that_were_freed_on_them():
    class Graph:
        def replay(self):
            """Nothing."""

    graph, other, elsewhere = Graph(), Graph(), Graph()
    replays = [graphs.CudaGraphReplay(each, stream) for each, stream in ((graph, 7), (other, 7), (elsewhere, 8))]
    assert all(replay.is_intact for replay in replays)
    replays[1]._graph = other = None
    gc.collect()
    assert [replay.is_intact for replay in replays] == [False, False, True]


def other_linear(model):
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)


def other_head(model):
    model.lm_head = nn.Linear(32, 64, bias=False)


def other_embedding(model):
    model.set_input_embeddings(nn.Embedding(64, 32))


def other_layer(model):
    model.model.layers[1].mlp = tiny_llama(seed=5).model.layers[1].mlp


def moved_buffer(model):
    model.model.rotary_emb.inv_freq = 2 * model.model.rotary_emb.inv_freq


def moved_data(model):
    model.model.norm.weight.data = 3 * model.model.norm.weight.data


def new_hook(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)


def new_pre_hook(model):
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def wrapped_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda states, forward=mlp.forward: 2 * forward(states)


def other_number(model):
    model.model.layers[0].self_attn.scaling = 2.0


def other_function(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def new_adapter(model):
    torch.manual_seed(3)
    inject_adapter_in_model(LORA, model)


def disabled_adapter(model):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)


def changed_weight(model):
    model.lm_head.weight.data.mul_(2)


CHANGES = [
    *(other_linear, other_head, other_embedding, other_layer, moved_buffer, moved_data, new_hook, new_pre_hook),
    *(wrapped_forward, other_number, other_function, new_adapter, disabled_adapter, changed_weight),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changes_in_the_model_counts_from_the_next_step_on(change, monkeypatch):
    """With the tape, which repeats operations and looks at no module again."""
    recorder = TapeRecorder()
    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder)
    torch.manual_seed(0)
    model = tiny_llama()
    if change is disabled_adapter:
        inject_adapter_in_model(LORA, model)
    model = lococo.patch_model(model, CONFIGS["open"])
    cache = model(PROMPT, use_cache=True).past_key_values
    for _ in range(12):
        model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache)
    assert recorder.recordings == 1 and recorder.replays == 12 - graphs.STEPS_BEFORE_RECORDING
    unchanged = model(tiny_ids(1, 1), past_key_values=copy.deepcopy(cache)).logits
    torch.manual_seed(1)
    change(model)
    for _ in range(3):
        expected = model(tiny_ids(1, 1), past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model.__call__(input_ids=tiny_ids(1, 1), past_key_values=cache).logits, expected)
        assert (expected - unchanged).abs().max() > 1e-3
    is_launched = change in (new_hook, new_pre_hook)
    assert recorder.recordings == 1 + (change not in (new_hook, new_pre_hook, changed_weight))
    assert recorder.replays == 12 - graphs.STEPS_BEFORE_RECORDING + (0 if is_launched else 3)


def test_what_is_patched_in_inference_mode_works_in_and_out_of_it(recorder):
    expected = answer(patched_llama(CONFIGS["open"]))
    with torch.inference_mode():
        model = patched_llama(CONFIGS["open"])
        inside = answer(model)
    outside = answer(model)
    for got in (inside, outside):
        assert all(map(torch.equal, got.logits, expected.logits))


def test_unpatching_leaves_nothing_and_copies_stay_patched(recorder):
    model = tiny_llama()
    before = set(vars(model))
    lococo.patch_model(model, CONFIGS["open"])
    twin = copy.deepcopy(model)
    thawed = pickle.loads(pickle.dumps(model))
    expected = answer(model).sequences
    lococo.unpatch_model(model)
    assert set(vars(model)) == before
    for other in (twin, thawed):
        recorder.replays = 0
        assert torch.equal(answer(other).sequences, expected)
        assert recorder.replays > 20


@torch.no_grad()
@pytest.mark.parametrize("name", ["open", "open-slot", "streaming", "slots-per-head"])
def test_moving_a_cache_to_where_it_is_changes_nothing(name, recorder):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(1, 70)
    caches = [model(ids[:, :10], use_cache=True).past_key_values for _ in range(2)]
    for column in range(10, 70):
        launched = model(ids[:, [column]], past_key_values=caches[0]).logits
        replayed = model.__call__(input_ids=ids[:, [column]], past_key_values=caches[1]).logits
        assert torch.equal(replayed, launched)
        if column % 7 == 0:
            caches[1].to("cpu")
    assert recorder.recordings == 1 and recorder.replays > 40


@torch.no_grad()
@pytest.mark.parametrize("name", ["open", "open-slot"])
def test_another_model_that_goes_on_with_a_cache_is_not_the_one_that_was_recorded(name, recorder):
    models = [lococo.patch_model(tiny_llama(seed), CONFIGS[name]) for seed in (0, 1)]
    models[1].model.rotary_emb.inv_freq.mul_(0.7)
    ids, caches = tiny_ids(1, 60), []
    for _ in range(2):
        caches.append(models[0](ids[:, :10], use_cache=True).past_key_values)
    for column in range(10, 60):
        model = models[0] if column < 30 or column >= 45 else models[1]
        launched = model(ids[:, [column]], past_key_values=caches[0]).logits
        replayed = model.__call__(input_ids=ids[:, [column]], past_key_values=caches[1]).logits
        torch.testing.assert_close(replayed, launched, rtol=0, atol=1e-6)
    assert recorder.recordings == 3


@pytest.mark.parametrize("name", ["open", "open-slot"])
def test_steps_recorded_in_inference_mode_go_on_outside_of_it(name, recorder):
    model, ids = patched_llama(CONFIGS[name]), tiny_ids(1, 60)
    with torch.inference_mode():
        cache = model(ids[:, :10], use_cache=True).past_key_values
        for column in range(10, 30):
            model.__call__(input_ids=ids[:, [column]], past_key_values=cache)
    assert recorder.recordings == 1
    with torch.no_grad():
        logits = [model.__call__(input_ids=ids[:, [c]], past_key_values=cache).logits for c in range(30, 60)]
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits[:, 30:], rtol=0, atol=1e-5)
