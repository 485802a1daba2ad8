import pytest
import torch
from tiny import patched_llama, tiny_ids, tiny_llama

import lococo
from lococo.compat import cache_of


@torch.no_grad()
@pytest.mark.parametrize("is_patched", [False, True])
def test_a_cache_and_the_output_that_holds_it_have_the_same_bytes(is_patched):
    model = patched_llama(lococo.LoCoCoConfig(12, block_size=8)) if is_patched else tiny_llama()
    ids = tiny_ids(2, 50)
    output, generated = model(ids, use_cache=True), model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    one_token = 2 * 2 * 2 * 8 * 4 * 2  # layers, keys and values, KV heads, numbers of four bytes, rows
    for each, tokens in ((output, 50), (generated, 51)):
        assert lococo.cache_bytes(each) == lococo.cache_bytes(cache_of(each))
        assert is_patched or lococo.cache_bytes(each) == tokens * one_token
    assert lococo.cache_bytes(output) < 50 * one_token or not is_patched
    with pytest.raises(ValueError, match="the output has no cache: call the model with use_cache=True"):
        lococo.cache_bytes(model(ids, use_cache=False))
