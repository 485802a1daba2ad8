import pytest
import torch
from tiny import patched_llama, tiny_ids, tiny_llama
from transformers import DynamicCache, cache_utils

import lococo
from lococo.compat import cache_of, with_cache


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


if hasattr(cache_utils, "Fp8QuantizedLayer"):  # not in older releases

    @torch.no_grad()
    def test_quantised_states_have_the_bytes_of_their_codes():
        model = tiny_llama()
        cache = cache_utils.QuantizedCache("fp8", model.config)
        model(tiny_ids(2, 50), **with_cache(model, cache))
        assert lococo.cache_bytes(cache) == 2 * 2 * (2 * 50 * 2 * 8 + 4)  # layers, keys and values: codes and a scale


def test_codes_inside_a_kind_of_tensor_count():
    codes, scales = torch.zeros(2, 3, 5, 4, dtype=torch.uint8), torch.zeros(2, 3, 5, 1, dtype=torch.float16)

    class Quantised(torch.Tensor):  # as optimum-quanto's, which have the bytes of the numbers that they stand for
        def __tensor_flatten__(self):
            return ["codes", "scales"], None

    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 1, 8), 0)
    keys = cache.layers[0]._quantized_keys = torch.zeros(2, 3, 5, 8).as_subclass(Quantised)
    keys.codes, keys.scales = codes, scales
    cache.layers[0]._quantized_values = (codes, {"scale": scales, "shape": codes.shape, "bits": 4})  # as HQQ's
    assert lococo.cache_bytes(cache) == 2 * 2 * 3 * 8 * 4 + 2 * (codes.nbytes + scales.nbytes)
