"""A model's cache under the names that releases give it."""

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from torch import nn
from transformers import PreTrainedModel

import lococo
from lococo import LoCoCoCache, LoCoCoConfig, compat
from lococo.compat import OUTPUT_CACHE, RELEASE, cache_argument, cache_of, with_cache

CONFIG = LoCoCoConfig(16, block_size=8)
IDS = tiny_ids(1, 50)
# Llama's own name for it, and the old one, which later releases take too.
NAMES = sorted({cache_argument(tiny_llama()), "past_key_values"})


@pytest.fixture
def model():
    return lococo.patch_model(tiny_llama(), CONFIG)


def read(model, name, read_with):
    """Logits of the text in two calls, the second of which gets the cache of the first."""
    with torch.no_grad():
        first = read_with(model)(IDS[:, :30], use_cache=True)
        return first, read_with(model)(IDS[:, 30:], use_cache=True, **{name: cache_of(first)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["model", "decoder"])
def test_cache_is_read_on_under_every_name(model, name, part):
    def whole(model):
        return model if part == "model" else model.model

    first, second = read(model, name, whole)
    assert isinstance(cache_of(first), LoCoCoCache) and cache_of(second) is cache_of(first)
    assert cache_of(second).seen_tokens == 50
    with torch.no_grad():
        torch.testing.assert_close(second[0][:, -1], whole(model)(IDS)[0][:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_generate_reads_on_under_every_name(model, name):
    settings = dict(attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False)
    expected = model.generate(IDS, **settings)
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :-1], use_cache=True))
    assert torch.equal(model.generate(IDS, **{name: cache}, **settings), expected)


@pytest.mark.parametrize("name", NAMES)
def test_refusals_hold_under_every_name(model, name):
    with torch.no_grad():
        full = cache_of(tiny_llama()(IDS, use_cache=True))
        ours = cache_of(model(IDS, use_cache=True))
    with pytest.raises(ValueError, match=f"^{cache_argument(model)} is a DynamicCache that already holds tokens"):
        model(IDS, **{name: full})
    with (
        lococo.patch.suspended(model),
        pytest.raises(ValueError, match=f"^{cache_argument(model)} is a LoCoCoCache; inside"),
    ):
        model(IDS, **{name: ours})


def test_release_tells_the_name():
    model, name = tiny_llama(), "cache" if RELEASE >= (5, 24) else "past_key_values"
    assert cache_argument(model) == cache_argument(model.model) == OUTPUT_CACHE == name
    assert cache_argument(nn.ModuleDict({"inside": model})) == name
    assert with_cache(model, 3) == {name: 3}
    assert name in inspect.signature(type(model).forward).parameters


def test_code_of_its_own_keeps_its_name():
    class Remote(PreTrainedModel):
        _supports_sdpa = True

        def forward(self, input_ids, past_key_values=None):
            return input_ids

    assert cache_argument(Remote(tiny_llama().config)) == "past_key_values"


@pytest.mark.parametrize("release, is_untested", [((5, 25), True), ((6, 0), True), ((5, 24), False), ((4, 56), False)])
def test_a_release_above_what_was_tested_is_said_once(release, is_untested, monkeypatch):
    monkeypatch.setattr(compat, "RELEASE", release)
    compat.warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        compat.warn_if_untested()
        compat.warn_if_untested()
    compat.warn_if_untested.cache_clear()
    assert len(given) == is_untested
    for warning in given:
        assert "newer than 5.24" in str(warning.message) and "'transformers<5.25'" in str(warning.message)


def test_the_project_is_tested_up_to_what_is_said():
    """The pin lets the whole major release in."""
    pin = re.search(
        r'"transformers>=[\d.]+,<(\d+)"', (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    )
    assert int(pin[1]) == compat.NEWEST_TESTED[0] + 1


def test_the_library_leaves_the_name_to_compat():
    files = list(Path(lococo.__file__).parent.rglob("*.py"))
    assert len(files) > 90
    named = [str(file) for file in files if re.search(r"past_key_values=|\.past_key_values", file.read_text("utf-8"))]
    assert not named
