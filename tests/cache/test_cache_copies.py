"""A copy of a cache goes on as the original: by pickle, deepcopy, a file, or on another device; at any moment."""

import copy
import io
import json
import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from configs import ANY_SPLIT, CONFIGS, FEW
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import patched_llama, tiny_ids
from torch.multiprocessing.reductions import StorageWeakRef

import lococo
from lococo import LoCoCoCache, LoCoCoConfig

TEXT = tiny_ids(2, 90)
MASK = torch.ones_like(TEXT)
MASK[0, :11] = 0


def by_file(cache, folder):
    return LoCoCoCache.load(cache.save(folder / "cache.safetensors"))


def by_torch(cache, folder):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda cache, folder: pickle.loads(pickle.dumps(cache)),
    "oldest-pickle": lambda cache, folder: pickle.loads(pickle.dumps(cache, protocol=2)),
    "torch.save": by_torch,
    "deepcopy": lambda cache, folder: copy.deepcopy(cache),
    "multiprocessing": lambda cache, folder: pickle.loads(ForkingPickler.dumps(cache)),
    "copy": lambda cache, folder: copy.copy(cache),
    "file": by_file,
    "to": lambda cache, folder: copy.deepcopy(cache).to("cpu"),
}


def read(model, ids, cache=None, **arguments):
    output = model(ids, past_key_values=cache, use_cache=True, **arguments)
    return output.logits, output.past_key_values


def steps(model, cache, start, count):
    """Logits of tokens one by one."""
    logits = []
    for at in range(start, start + count):
        out, cache = read(model, TEXT[:, at : at + 1], cache, attention_mask=MASK[:, : at + 1])
        logits.append(out)
    return torch.cat(logits, dim=1) if logits else None


def buffers(cache):
    return [tensor for layer in cache.layers for tensor in layer.buffers()]


@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "pickle") for name in CONFIGS), *((name, "file") for name in FEW), *(("open", way) for way in WAYS)],
)
@torch.no_grad()
def test_copies_decode_as_the_original_and_alone(name, way, tmp_path):
    """After a prompt, in the middle of a block that came in steps, and at the end of one; padded and not."""
    model = patched_llama(CONFIGS[name])
    cache = read(model, TEXT[:, :30], attention_mask=MASK[:, :30])[1]
    at = 30
    for count in (0, 3, 2, 8):  # steps of the original between two copies
        steps(model, cache, at, count)
        at += count
        twin, kept = WAYS[way](cache, tmp_path), [tensor.clone() for tensor in buffers(cache)]
        mine = steps(model, twin, at, 9)
        assert all(map(torch.equal, kept, buffers(cache)))  # the original has not moved
        assert twin.nbytes == cache.nbytes
        rest = copy.deepcopy(cache)
        assert torch.equal(mine, steps(model, rest, at, 9))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_copies_read_on_in_longer_calls(way, tmp_path):
    model = patched_llama(CONFIGS["open-slot"])
    cache = read(model, TEXT[:, :30])[1]
    for at in range(30, 34):
        read(model, TEXT[:, at : at + 1], cache)
    twin = WAYS[way](cache, tmp_path)
    assert torch.equal(read(model, TEXT[:, 34:80], twin)[0], read(model, TEXT[:, 34:80], cache)[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["default", "open", "open-slot", "slots-per-head"])
def test_copies_of_caches_in_a_graph_are_outside_of_it(name, way, tmp_path):
    """With gradients the compression of a complete block is put off: a copy has it behind it."""
    model = patched_llama(CONFIGS[name])
    for prompt in (24, 30):  # ends with a block, and does not
        cache = read(model, TEXT[:, :prompt])[1]
        twin = WAYS[way](cache, tmp_path)
        assert not any(tensor.requires_grad for tensor in buffers(twin))
        with torch.no_grad():
            there, here = (read(model, TEXT[:, prompt : prompt + 20], each)[0] for each in (twin, cache))
        torch.testing.assert_close(there, here, rtol=0, atol=1e-6)


@torch.no_grad()
def test_buffers_of_a_copy_are_its_own_and_no_larger():
    """Budgets per head lie in common buffers: a pickle of views would hold each of them whole."""
    model = patched_llama(CONFIGS["slots-per-head"])
    cache = read(model, TEXT[:, :30], attention_mask=MASK[:, :30])[1]
    steps(model, cache, 30, 2)
    twin = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 1.5 * cache.nbytes
    mine = {StorageWeakRef(tensor.untyped_storage()) for tensor in buffers(cache)}
    assert not mine & {StorageWeakRef(tensor.untyped_storage()) for tensor in buffers(twin)}


def _answer_elsewhere(pickled, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(steps(*pickle.loads(pickled), 30, 6).tolist())


def test_another_process_goes_on_with_it():
    model = patched_llama(CONFIGS["open"])
    with torch.no_grad():
        cache = read(model, TEXT[:, :30], attention_mask=MASK[:, :30])[1]
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        worker = context.Process(target=_answer_elsewhere, args=(pickle.dumps((model, cache)), queue))
        worker.start()
        there = torch.tensor(queue.get(timeout=120))
        worker.join()
        assert torch.equal(there, steps(model, cache, 30, 6))


@torch.no_grad()
def test_a_saved_cache_is_one_file_that_says_what_it_is(tmp_path):
    model = patched_llama(CONFIGS["slots-per-head"])
    cache = read(model, TEXT[:, :30], attention_mask=MASK[:, :30])[1]
    path = cache.save(tmp_path / "deeper" / "book.safetensors")
    assert [entry.name for entry in path.parent.iterdir()] == ["book.safetensors"]
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["lococo_cache"])
    assert content["columns"] == 30 and LoCoCoConfig.from_dict(content["config"]) == cache.config
    loaded = LoCoCoCache.load(path)
    assert (loaded.rows, loaded.seen_tokens, loaded.nbytes) == (cache.rows, 30, cache.nbytes)


@torch.no_grad()
def test_one_prompt_serves_many_questions(tmp_path):
    model = patched_llama(CONFIGS["open"])
    read(model, TEXT[:1, :40])[1].save(tmp_path / "prompt.safetensors")
    for question in (tiny_ids(1, 7, seed=1), tiny_ids(1, 9, seed=2)):
        ids = torch.cat([TEXT[:1, :40], question], dim=1)
        cache = LoCoCoCache.load(tmp_path / "prompt.safetensors")
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False), expected)


@torch.no_grad()
def test_another_model_or_method_is_refused_by_name(tmp_path):
    config = CONFIGS["open"]
    model = patched_llama(config)
    path = read(model, TEXT[:1, :30])[1].save(tmp_path / "cache.safetensors")
    others = {
        r"num_layers=2, this model num_layers=3": patched_llama(config, num_hidden_layers=3),
        r"num_kv_heads=2, this model num_kv_heads=4": patched_llama(config, num_key_value_heads=4),
        r"head_dim=8, this model head_dim=16": patched_llama(config, head_dim=16),
        r"gate_init=0.4, the model is patched with gate_init=0.1": patched_llama(LoCoCoConfig(16, 8, gate_init=0.1)),
    }
    for message, other in others.items():
        cache = LoCoCoCache.load(path)
        with pytest.raises(ValueError, match=message):
            other(TEXT[:1, 30:31], past_key_values=cache)
        read(model, TEXT[:1, 30:31], cache)  # nothing has been touched


@torch.no_grad()
def test_how_it_is_computed_may_differ():
    model, ids = patched_llama(CONFIGS["open"]), TEXT[:1]
    cache = read(model, ids[:, :30])[1]
    other = patched_llama(CONFIGS["open"], attention="eager", prefill_chunk_size=8)
    expected = read(model, ids[:, 30:60], copy.deepcopy(cache))[0]
    torch.testing.assert_close(read(other, ids[:, 30:60], cache)[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_files_that_are_no_caches_are_refused(tmp_path):
    path = read(patched_llama(CONFIGS["open"]), TEXT[:1, :30])[1].save(tmp_path / "cache.safetensors")
    with pytest.raises(FileNotFoundError, match="missing.safetensors does not exist"):
        LoCoCoCache.load(tmp_path / "missing.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    content = json.loads(metadata["lococo_cache"])
    broken = {
        "cut": path.read_bytes()[:-100],
        "text": b"hello",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is no whole file written by LoCoCoCache.save"):
            LoCoCoCache.load(tmp_path / name)
    one = next(iter(tensors))
    changed = {
        "heads": (tensors, None),
        "fewer": ({name: tensor for name, tensor in tensors.items() if name != "layers.1.values"}, content),
        "more": ({**tensors, "layers.9.keys": tensors[one].clone()}, content),
        "shorter": ({**tensors, one: tensors[one][:, :-1].contiguous()}, content),
        "no-rows": (tensors, {key: value for key, value in content.items() if key != "rows"}),
    }
    for name, (held, said) in changed.items():
        save_file(held, tmp_path / name, {"format": "pt"} | ({"lococo_cache": json.dumps(said)} if said else {}))
        with pytest.raises(ValueError, match=f"{name} is no whole file written by LoCoCoCache.save"):
            LoCoCoCache.load(tmp_path / name)
    save_file(tensors, tmp_path / "new", {"lococo_cache": json.dumps({**content, "format_version": 9})})
    with pytest.raises(ValueError, match="format_version=9, this version of lococo reads 3"):
        LoCoCoCache.load(tmp_path / "new")


@torch.no_grad()
def test_what_cannot_be_saved_says_so(tmp_path):
    model = patched_llama(CONFIGS["open"])
    cache = lococo.state.patch_of(model).new_cache()
    with pytest.raises(ValueError, match="nothing has been read into this cache yet"):
        cache.save(tmp_path / "cache.safetensors")
    cache = read(model, TEXT[:1, :30])[1]
    handle = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(model, TEXT[:1, 30:40], cache)
    handle.remove()
    with pytest.raises(ValueError, match="the last forward with this LoCoCoCache did not finish"):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_an_error_before_the_first_layer_leaves_the_cache_usable():
    model = patched_llama(CONFIGS["open"])
    cache = read(model, TEXT[:1, :30])[1]
    handle = model.model.layers[0].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(model, TEXT[:1, 30:40], cache)
    handle.remove()
    expected = model(TEXT[:1, :40]).logits[:, 30:]
    torch.testing.assert_close(read(model, TEXT[:1, 30:40], cache)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "then"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float64), (torch.float64, torch.float16)],
)
@pytest.mark.parametrize("name", ["open", "open-slot", "slots-per-head", "centroids"])
@torch.no_grad()
def test_a_cache_follows_the_model_to_its_device_and_dtype(name, first, then, tmp_path):
    """What was read in one precision is read on in it, whatever the model computes in by now."""
    model = patched_llama(CONFIGS[name]).to(first)
    cache = read(model, TEXT[:, :30])[1]
    other = copy.deepcopy(model).to(then)
    logits = torch.cat([read(other, TEXT[:, at : at + 1], cache)[0] for at in range(30, 45)], dim=1)
    assert logits.dtype == then and logits.isfinite().all()
    assert {tensor.dtype for tensor in buffers(cache)} == {first}
    exact = model(TEXT[:, :45]).logits[:, 30:]
    assert (logits - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@torch.no_grad()
def test_a_prompt_that_fails_after_some_pieces_is_not_read_on(error):
    for piece in (1, 3, 4):  # of five
        model = patched_llama(CONFIGS["default"], prefill_chunk_size=8)
        cache, calls = read(model, TEXT[:1, :5])[1], []

        def fail(module, args, calls=calls, piece=piece):
            calls.append(module)
            if len(calls) > piece:
                raise error

        handle = model.model.embed_tokens.register_forward_pre_hook(fail)
        with pytest.raises(error):
            read(model, TEXT[:1, 5:45], cache)
        handle.remove()
        with pytest.raises(ValueError, match="the last forward with this LoCoCoCache did not finish"):
            read(model, TEXT[:1, 5:45], cache)
        cache.reset()
        torch.testing.assert_close(
            read(model, TEXT[:1, :45], cache)[0], model(TEXT[:1, :45]).logits, rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_an_interrupt_does_not_open_a_cache_to_other_models():
    model = patched_llama(CONFIGS["open"])
    cache = read(model, TEXT[:1, :30])[1]

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(model, TEXT[:1, 30:40], cache)
    handle.remove()
    lococo.unpatch_model(model)
    with pytest.raises(ValueError, match="a LoCoCoCache was given to a model that is not patched"):
        read(model, TEXT[:1, 30:31], cache)


@pytest.mark.parametrize("name", ANY_SPLIT)
def test_steps_go_on_in_another_mode(name):
    """A loop in inference mode, then ``generate``, which is not; in the middle of a block."""
    model = patched_llama(CONFIGS[name])
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]
    with torch.no_grad():
        expected = model(TEXT[:1, :42]).logits[:, 30:]
    with torch.inference_mode():
        cache, logits = read(model, TEXT[:1, :30])[1], []
    for at, mode in zip(range(30, 42, 3), modes, strict=True):
        with mode():
            for step in range(at, at + 3):
                logits.append(read(model, TEXT[:1, step : step + 1], cache)[0].clone())
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)
