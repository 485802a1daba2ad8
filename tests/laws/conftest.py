import dataclasses

import pytest
from tiny import tiny_llama
from wrapped import CONFIG, assert_equal, logits, patched


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
