"""A patched model goes through whatever people put around models, and says the same afterwards."""

import copy
import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import distributed_worker
import gguf
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

import lococo
from lococo.state import patch_of

CONFIG = lococo.LoCoCoConfig(
    num_slots=16, block_size=8, num_sinks=2, num_heavy=4, num_recent=4, kernel_size=5, gate_init=0.3
)
SLOT_POSITIONS = dataclasses.replace(CONFIG, positions="slot")
IDS = tiny_ids(2, 64, seed=1)
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def patched(model, config=CONFIG):
    """A model patched in place, with the same random heads every time."""
    lococo.patch_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for head in patch_of(model).heads.values():
            for parameter in head.conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def assert_equal(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def environment():
    """Environment of a process that imports the same lococo as this one."""
    path = [str(Path(lococo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads only wait for each other over tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def full():
    return logits(tiny_llama())


@pytest.fixture(scope="module")
def compressed(full):
    """Logits of the patched model with nothing around it; blends have a part in them."""
    result = logits(patched(tiny_llama()))
    selection = logits(patched(tiny_llama(), dataclasses.replace(CONFIG, gate_init=0.0)))
    assert_equal(result[:, : CONFIG.num_slots], full[:, : CONFIG.num_slots])
    assert (result - full)[:, CONFIG.capacity :].abs().max() > 1
    assert (result - selection)[:, CONFIG.capacity :].abs().max() > 0.1
    return result


# Copies


@pytest.mark.parametrize("unpatched", ["original", "copy"])
def test_deepcopy_is_patched_by_itself(unpatched, full, compressed):
    pair = {"original": patched(tiny_llama())}
    pair["copy"] = copy.deepcopy(pair["original"])
    assert_equal(logits(pair["copy"]), compressed, atol=0)
    lococo.unpatch_model(pair[unpatched])
    assert_equal(logits(pair.pop(unpatched)), full, atol=0)
    assert_equal(logits(*pair.values()), compressed, atol=0)


def test_deepcopy_has_heads_of_its_own(compressed):
    model = patched(tiny_llama())
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for head in patch_of(duplicate).heads.values():
            head.gate.zero_()
    assert_equal(logits(model), compressed, atol=0)
    selection = logits(patched(tiny_llama(), dataclasses.replace(CONFIG, gate_init=0.0)))
    assert_equal(logits(duplicate), selection)


FRESH_PROCESS = """
import sys
import torch

model, ids = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    compressed = model(input_ids=ids).logits
    import lococo

    full = lococo.unpatch_model(model)(input_ids=ids).logits
torch.save((compressed, full), sys.argv[2])
"""


def test_torch_save_of_the_whole_model_loads_in_a_fresh_process(tmp_path, full, compressed):
    torch.save((patched(tiny_llama()), IDS), tmp_path / "model.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "model.pt", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, timeout=100, env=environment())
    loaded_compressed, loaded_full = torch.load(tmp_path / "logits.pt")
    assert_equal(loaded_compressed, compressed)
    assert_equal(loaded_full, full)


# Accelerate


class Counter(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("part", ["", "model", "model.layers.0", "model.layers.1.self_attn"])
@pytest.mark.parametrize("first", ["patch", "hook"])
@pytest.mark.parametrize("first_undone", ["patch", "hook"])
def test_accelerate_hooks_come_and_go(part, first, first_undone, full, compressed):
    model, counter = tiny_llama(), Counter()
    module = model.get_submodule(part)
    do = {"patch": lambda: patched(model), "hook": lambda: add_hook_to_module(module, counter)}
    undo = {"patch": lambda: lococo.unpatch_model(model), "hook": lambda: remove_hook_from_module(module)}
    do.pop(first)()
    do.popitem()[1]()
    assert_equal(logits(model), compressed, atol=0)
    undo.pop(first_undone)()
    assert_equal(logits(model), compressed if first_undone == "hook" else full, atol=0)
    undo.popitem()[1]()
    assert_equal(logits(model), full, atol=0)
    assert counter.calls == (1 if first_undone == "hook" else 2)


def spread(model, folder):
    """One layer in memory, one on disk."""
    return dispatch_model(
        model, {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}, offload_dir=folder
    )


def offload(model, folder):
    return cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("place", [spread, offload])
@pytest.mark.parametrize("first", ["patch", "place"])
@pytest.mark.parametrize("config", [CONFIG, SLOT_POSITIONS], ids=["absolute", "slot"])
def test_offloaded_weights_give_the_same_logits(place, first, config, tmp_path):
    expected = patched(tiny_llama(), config)
    if first == "patch":
        model = place(patched(tiny_llama(), config), tmp_path)
    else:
        model = patched(place(tiny_llama(), tmp_path), config)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert_equal(logits(model), logits(expected), atol=0)
    assert_equal(model(input_ids=IDS).logits.detach(), logits(expected), atol=0)
    options = dict(max_new_tokens=12, do_sample=False)
    assert model.generate(IDS, **options).tolist() == expected.generate(IDS, **options).tolist()


@pytest.mark.parametrize("config", [CONFIG, SLOT_POSITIONS], ids=["absolute", "slot"])
@pytest.mark.parametrize("padding", [0, 5])
def test_layers_on_another_device_use_nothing_of_the_first(config, padding):
    model = patched(tiny_llama(), config)
    for part in ("model.layers.1", "model.norm", "lm_head"):
        module = model.get_submodule(part).to("meta")
        module.register_forward_pre_hook(to_meta, with_kwargs=True)
    mask = torch.ones_like(IDS)
    mask[1, :padding] = 0
    cache = None
    for ids in (IDS[:, :40], IDS[:, 40:]):
        output = model(input_ids=ids, attention_mask=mask[:, : 40 if cache is None else 64], past_key_values=cache)
        cache = output.past_key_values
    assert output.logits.is_meta
    assert output.logits.shape == (2, 24, 64)
    assert [layer.buffers()[0].device.type for layer in cache.layers] == ["cpu", "meta"]


def to_meta(module, args, kwargs):
    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return move(args), {name: move(value) for name, value in kwargs.items()}


# PEFT


def with_lora(model, **options):
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return get_peft_model(model, config).eval()


@pytest.fixture(scope="module")
def adapted(compressed):
    """Logits of a patched model whose weights hold the LoRA update, with no PEFT around it."""
    result = logits(patched(with_lora(tiny_llama()).merge_and_unload()))
    assert (result - compressed).abs().max() > 1
    return result


def test_lora_before_patching(adapted):
    model = patched(with_lora(tiny_llama()))
    assert_equal(logits(model), adapted)
    lococo.unpatch_model(model)
    assert_equal(logits(model), logits(with_lora(tiny_llama())), atol=0)


@pytest.mark.parametrize("modules_to_save", [None, ["lococo_head"]])
def test_lora_after_patching(modules_to_save, adapted, compressed):
    model = with_lora(patched(tiny_llama()), modules_to_save=modules_to_save)
    assert_equal(logits(model), adapted)
    with model.disable_adapter():
        assert_equal(logits(model), compressed, atol=0)
    lococo.unpatch_model(model)
    assert_equal(logits(model), logits(with_lora(tiny_llama())), atol=0)


def sgd_step(model):
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5).step()
    model.zero_grad()
    return model.eval()


def head_values(model):
    return [parameter.detach().clone() for head in patch_of(model).heads.values() for parameter in head.parameters()]


def test_heads_in_modules_to_save_train_and_travel_with_the_adapter(tmp_path, adapted):
    model = with_lora(patched(tiny_llama()), modules_to_save=["lococo_head"])
    trained = logits(sgd_step(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(patched(tiny_llama()), tmp_path / "adapter")
    assert_equal(logits(loaded), trained, atol=0)
    lococo.save_heads(model, tmp_path / "heads")
    merged = model.merge_and_unload()
    assert_equal(logits(merged), trained)
    assert not any(map(torch.equal, head_values(merged), head_values(patched(tiny_llama()))))
    untrained = patched(tiny_llama())
    lococo.load_heads(untrained, tmp_path / "heads")
    assert all(map(torch.equal, head_values(untrained), head_values(merged)))


def test_without_modules_to_save_peft_freezes_the_heads(adapted):
    model = with_lora(patched(tiny_llama()))
    before = head_values(model)
    assert (logits(sgd_step(model)) - adapted).abs().max() > 0.1
    assert not any(
        parameter.requires_grad for head in patch_of(model).heads.values() for parameter in head.parameters()
    )
    assert all(map(torch.equal, head_values(model), before))


# Training


def gradients(model):
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def freeze_base(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lococo_head" in name)


def checkpointing(use_reentrant):
    """Arguments of ``TrainingArguments``, whose name changes with Transformers 6."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


class GradientKeeper(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trained", ["everything", "heads"])
def test_trainer_with_checkpointing_has_the_gradients_of_a_plain_backward(use_reentrant, trained, tmp_path):
    labels = IDS.clone()
    labels[:, 0] = -100  # has no prediction; some Trainer versions would count it
    models = [patched(tiny_llama()) for _ in range(2)]
    layer_calls = []
    for model in models:
        if trained == "heads":
            freeze_base(model)
            model.enable_input_require_grads()
    models[0].train()(input_ids=IDS, labels=labels).loss.backward()
    models[1].model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *_: layer_calls.append(1))
    keeper = GradientKeeper()
    Trainer(
        model=models[1],
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            max_grad_norm=0,
            **checkpointing(use_reentrant),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[dict(input_ids=row, labels=label) for row, label in zip(IDS, labels, strict=True)],
        callbacks=[keeper],
    ).train()
    expected = gradients(models[0])
    assert len(layer_calls) == 2  # forward, and again in backward
    assert keeper.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (trained == "heads" and "lococo_head" not in name), name
        if gradient is not None:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(keeper.gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_reads_a_given_cache_no_second_time(use_reentrant):
    losses, kept = [], []
    for checkpoints in (False, True):
        model = patched(tiny_llama()).train()
        if checkpoints:
            model._set_gradient_checkpointing(
                gradient_checkpointing_func=partial(checkpoint, use_reentrant=use_reentrant)
            )
        cache = lococo.LoCoCoCache(CONFIG, 2) if checkpoints else None
        losses.append(model(input_ids=IDS, labels=IDS, past_key_values=cache).loss)
        losses[-1].backward()
        kept.append(gradients(model))
    assert_equal(*losses)
    for name, gradient in kept[0].items():
        torch.testing.assert_close(kept[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_training_leaves_no_cache_behind():
    assert patched(tiny_llama()).train()(input_ids=IDS).past_key_values is None


@pytest.mark.parametrize("length", [12, 16, 64])
def test_every_head_parameter_has_a_gradient_whatever_the_length(length):
    model = patched(tiny_llama()).train()
    ids = IDS[:, :length]
    model(input_ids=ids, labels=ids).loss.backward()
    for head in patch_of(model).heads.values():
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad.abs().max() > 0) == (length > CONFIG.capacity), name


def test_heads_of_sliding_window_layers_have_a_gradient_too():
    sizes = tiny_llama().config.to_dict()
    sizes = {name: sizes[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")}
    model = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2, intermediate_size=48, sliding_window=8))
    patched(model).train()(input_ids=IDS, labels=IDS).loss.backward()
    assert patch_of(model).heads
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_short_text_trains_in_half_precision_with_heads_whose_sum_overflows():
    model = patched(tiny_llama()).half()
    with torch.no_grad():
        for head in patch_of(model).heads.values():
            head.conv.weight.fill_(500.0)
            assert head.conv.weight.sum().isinf()
    assert model(input_ids=IDS[:, :12]).logits.isfinite().all()


def test_gates_opened_by_training_are_seen_though_address_and_version_stay():
    model = patched(tiny_llama(), dataclasses.replace(CONFIG, gate_init=0.0))
    closed = logits(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    gates = [head.gate for head in patch_of(model).heads.values()]
    # As FSDP does it: the gathered weights change under a version counter that is put back.
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(gates)):
        for gate in gates:
            gate.fill_(CONFIG.gate_init)
    opened = logits(model.eval())
    assert (opened - closed).abs().max() > 0.1
    assert_equal(opened, logits(patched(tiny_llama())))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of the two processes of ``distributed_worker``."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, distributed_worker.__file__]
    workers = [subprocess.Popen([*command, str(rank), folder], env=environment()) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("gate_init", distributed_worker.GATES)
@pytest.mark.parametrize("strategy", distributed_worker.STRATEGIES)
def test_two_processes_train_like_one(strategy, gate_init, two_processes):
    model = distributed_worker.make_model(gate_init)
    start = distributed_worker.parameters(model)
    expected = distributed_worker.train(model, ranks=[0, 1])
    parameters = distributed_worker.parameters(model)
    assert all((parameters[name] - start[name]).abs().max() > 1e-6 for name in start)
    results = [result[strategy, gate_init] for result in two_processes]
    assert_equal(sum(result["losses"] for result in results) / 2, expected["losses"])
    for result in results:
        assert_equal(result["before"], expected["before"])
        assert_equal(result["after"], expected["after"], atol=1e-4)
        assert result["parameters"].keys() == parameters.keys()
        for name, value in parameters.items():
            assert_equal(result["parameters"][name], value, atol=1e-6)


# Compilation and number formats


@pytest.fixture
def graphs():
    """Graphs that torch compiles, by number of operations."""
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    return sizes, backend


def test_compiled_models_read_train_and_generate_as_others(graphs):
    """Hooks and attention stay between the graphs: as many are made for a long text as for a short one."""
    sizes, backend = graphs
    expected = patched(tiny_llama())
    model = torch.compile(patched(tiny_llama()), backend=backend, dynamic=True)
    assert_equal(logits(model, IDS[:, :20]), logits(expected, IDS[:, :20]))
    made = len(sizes)
    assert made > 2 and max(sizes) > 10
    for length in (64, 33, 20):
        assert_equal(logits(model, IDS[:, :length]), logits(expected, IDS[:, :length]))
    assert len(sizes) < 3 * made  # one text with and one without compressions
    options = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    gradients = []
    for each in (model, expected):
        each(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in expected.parameters()] if each is expected else None)
    for mine, theirs in zip(model.parameters(), gradients[1], strict=True):
        assert_equal(mine.grad, theirs)


def test_compiled_models_read_in_several_calls(graphs):
    model, cache, parts = torch.compile(patched(tiny_llama()), backend=graphs[1]), None, []
    with torch.no_grad():
        for ids in IDS.split([46, 16, 1, 1], dim=1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert_equal(torch.cat(parts, dim=1), logits(patched(tiny_llama())))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # used by inductor itself
def test_inductor_gives_the_same_logits():
    torch._dynamo.reset()
    model = patched(tiny_llama(num_hidden_layers=1))
    assert_equal(logits(torch.compile(model)), logits(patched(tiny_llama(num_hidden_layers=1))))


def test_a_layer_that_is_compiled_alone(graphs):
    model = patched(tiny_llama())
    expected = logits(model)
    for layer in model.model.layers:
        layer.mlp.compile(backend=graphs[1])
        layer.compile(backend=graphs[1])
    assert_equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_follow_the_model_into_half_precision(dtype):
    model = patched(tiny_llama()).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    result = logits(model)
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert_equal(result, logits(patched(tiny_llama().to(dtype))), atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_more_than_the_unpatched_model(dtype, full):
    # Without heavy hitters, which a rounded score may choose otherwise.
    config = lococo.LoCoCoConfig.paper(16, block_size=8, kernel_size=5)
    exact = logits(patched(tiny_llama(), config))
    assert (exact - full)[:, config.capacity :].abs().max() > 1
    error = (logits(patched(tiny_llama(), config).to(dtype)) - exact).abs().max()
    assert error < 2 * (logits(tiny_llama().to(dtype)) - full).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", [lococo.LoCoCoConfig.paper, lococo.LoCoCoConfig.reference])
def test_rows_of_zeros_after_relu_stay_finite(dtype, preset, full):
    model = patched(tiny_llama(), preset(16, block_size=8, kernel_size=5)).to(dtype)
    with torch.no_grad():
        for head in patch_of(model).heads.values():
            head.conv.weight.zero_()
            head.conv.bias.fill_(-1)
    result = logits(model)
    assert result.isfinite().all()
    assert (result - full)[:, CONFIG.capacity :].abs().max() > 1


class EightBitLinear(torch.nn.Module):
    """Keeps its weights as bitsandbytes does: no parameter of it is a floating-point number."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.scale = weight.abs().amax().item() / 127
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantised_attention_gets_heads_in_the_dtype_of_the_model(full):
    model = tiny_llama().bfloat16()
    for layer in model.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            layer.self_attn.set_submodule(name, EightBitLinear(linear))
    before = logits(model)
    assert (logits(patched(model)) - before)[:, CONFIG.capacity :].abs().max() > 1
    assert {value.dtype for value in head_values(model)} == {torch.bfloat16}


# Saving and evaluating


def test_save_pretrained_writes_the_unpatched_model(tmp_path, full, compressed):
    tiny_llama().save_pretrained(tmp_path / "unpatched")
    model = patched(tiny_llama())
    model.save_pretrained(tmp_path / "patched")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("unpatched", "patched")]
    assert files[0].keys() == files[1].keys()
    configs = [(tmp_path / name / "config.json").read_text() for name in ("unpatched", "patched")]
    assert configs[0] == configs[1]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "patched")
    assert not lococo.is_patched(loaded)
    assert_equal(logits(loaded), full, atol=0)
    assert_equal(logits(model), compressed, atol=0)


def write_gguf(model, path):
    """A GGUF file with the shapes of a model and its weights as they are."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_model_is_patched_and_saved_like_any_other(tmp_path):
    write_gguf(tiny_llama(), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    plain = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    expected = logits(plain)
    assert (logits(patched(model)) - expected).abs().max() > 1
    assert_equal(logits(model), logits(patched(plain)), atol=0)
    lococo.save_heads(model, tmp_path / "heads")
    if getattr(model, "hf_quantizer", None) is not None:
        with pytest.raises(ValueError, match="(?i)gguf"):
            model.save_pretrained(tmp_path / "saved")
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(tmp_path / "saved")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_equal(logits(saved), expected, atol=0)
    assert_equal(logits(lococo.patch_model(saved, heads=tmp_path / "heads")), logits(model), atol=0)


WORDS = ["<pad>", "<eos>", *(f"t{index}" for index in range(2, 64))]


def text(ids):
    return " ".join(WORDS[index] for index in ids.tolist())


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    by_words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    by_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=by_words, pad_token="<pad>", eos_token="<eos>")


def continued_greedily(model, ids, count):
    """(count,) next tokens, each from a forward over the whole text."""
    length = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, length:]


def test_text_generation_pipeline_writes_what_the_patched_model_says(tokenizer):
    prompt = IDS[:1, :50]
    generate = pipeline("text-generation", model=patched(tiny_llama()), tokenizer=tokenizer)
    result = generate(text(prompt[0]), max_new_tokens=20, do_sample=False, return_tensors=True)
    expected = continued_greedily(patched(tiny_llama()), prompt, 20)
    assert result[0]["generated_token_ids"][50:] == expected.tolist()
    assert expected.tolist() != continued_greedily(tiny_llama(), prompt, 20).tolist()


def continuation_score(model, context, continuation):
    ids = torch.cat([context, continuation])[None]
    scores = logits(model, ids[:, :-1])[0, -len(continuation) :].log_softmax(dim=-1)
    return scores.gather(-1, continuation[:, None]).sum().item()


def test_lm_eval_scores_with_the_patched_model(tokenizer):
    pairs = [
        (IDS[0, :50], IDS[0, 50:57]),
        (IDS[1, :9], IDS[1, 9:12]),
        (IDS[1, :33], IDS[1, 33:64]),
        (IDS[0, :40], IDS[1, :3]),
    ]
    requests = [
        Instance("loglikelihood", {}, (text(context), " " + text(continuation)), index)
        for index, (context, continuation) in enumerate(pairs)
    ]
    model = patched(tiny_llama())
    scores = [score for score, _ in HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests)]
    assert scores == pytest.approx([continuation_score(model, *pair) for pair in pairs], abs=1e-4)
    unpatched = [continuation_score(tiny_llama(), *pair) for pair in pairs]
    differs = [abs(score - other) > 0.1 for score, other in zip(scores, unpatched, strict=True)]
    assert differs == [True, False, True, True]
