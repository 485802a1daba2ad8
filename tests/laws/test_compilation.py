"""A compiled model, or a compiled layer, says what it says without."""

import pytest
import torch
from tiny import tiny_llama
from wrapped import IDS, assert_equal, logits, patched


@pytest.fixture
def graphs():
    """Graphs that torch compiles, by number of operations."""
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    return sizes, backend


@pytest.mark.slow
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


@pytest.mark.slow
def test_compiled_models_read_in_several_calls(graphs):
    model, cache, parts = torch.compile(patched(tiny_llama()), backend=graphs[1]), None, []
    with torch.no_grad():
        for ids in IDS.split([46, 16, 1, 1], dim=1):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert_equal(torch.cat(parts, dim=1), logits(patched(tiny_llama())))


@pytest.mark.slow
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
