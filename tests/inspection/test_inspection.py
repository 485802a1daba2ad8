import base64
import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from configs import CONFIGS, FORESEEN, opened
from families import build
from reference import naive_head, naive_lococo, naive_network, rope_rotate
from tiny import tiny_ids, tiny_llama
from words import TEXT

import lococo
import lococo.attention
from lococo import LoCoCoConfig, patched
from lococo.cache.plan import RowState, plan_call
from lococo.cli.main import main
from lococo.inspection import trace
from lococo.inspection.decisions import OUTCOMES
from lococo.inspection.page import page, page_data
from lococo.state import patch_of

# Rotated keys, as they are given, are those that are held.
ABSOLUTE = [name for name, config in CONFIGS.items() if config.positions == "absolute"]


@pytest.fixture
def layers_given(monkeypatch):
    """Every layer of the next trace, with the keys and values of the tokens it was given."""
    given, read_layer = {}, lococo.attention.read_layer

    def recorded(layer, reading, query, key, value):
        given.setdefault(layer, []).append((key[0], value[0]))
        return read_layer(layer, reading, query, key, value)

    monkeypatch.setattr(lococo.attention, "read_layer", recorded)
    return given


@pytest.mark.parametrize("length", [10, 16, 24, 61, 97])
@pytest.mark.parametrize(("name", "chunk"), [*((name, None) for name in ABSOLUTE), ("open", 8)])
def test_entries_are_the_weighted_sums_of_the_tokens(layers_given, name, chunk, length):
    model = tiny_llama()
    with patched(model, CONFIGS[name], prefill_chunk_size=chunk):
        traces = trace(model, tiny_ids(1, length))
    assert [(each.layer, each.head) for each in traces] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    by_head = {(each.layer, each.head): each.weights for each in traces}
    assert len(layers_given) == 2
    for index, (layer, parts) in enumerate(layers_given.items()):
        keys, values = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        for buffer in layer.views():
            for place, head in enumerate(buffer.group.heads):
                weights = by_head[index, head]
                used = len(weights)
                torch.testing.assert_close(weights.sum(-1), torch.ones(used), rtol=0, atol=1e-5)
                for held, given in ((buffer.keys, keys), (buffer.values, values)):
                    torch.testing.assert_close(held[0, place, :used], weights @ given[head], rtol=0, atol=1e-5)


@pytest.fixture
def layers(monkeypatch):
    """What every layer of the next trace is given: its index, rotated queries, keys and values, scale, and window."""
    given, read_layer = [], lococo.attention.read_layer

    def recorded(layer, reading, query, key, value):
        given.append((len(given), query[0], key[0], value[0], reading.scale, layer.window))
        return read_layer(layer, reading, query, key, value)

    monkeypatch.setattr(lococo.attention, "read_layer", recorded)
    return given


OPEN, SLOT_POSITIONS = CONFIGS["open"], CONFIGS["open-slot"]
NAIVE = {
    **{name: ("Llama", {}, config) for name, config in CONFIGS.items()},
    "one KV head": ("Llama", dict(num_key_value_heads=1), OPEN),
    "a KV head for every query head": ("Llama", dict(num_key_value_heads=4), SLOT_POSITIONS),
    "four budgets": (
        "Llama",
        dict(num_key_value_heads=4),
        opened(slots_per_head=((20, 12, 9, 23), (16, 5, 27, 16))),
    ),
    "windows": ("Mistral-window", {}, OPEN),
    "windows wider than the slots": ("Mistral-window", dict(sliding_window=30), OPEN),
    "windows and slots per head": ("Mistral-window", dict(sliding_window=20), CONFIGS["slots-per-head"]),
    "windows that are kept": ("Mistral-window", {}, CONFIGS["windows-kept"]),
    "a window in every other layer": ("Qwen2-half-window", {}, OPEN),
    "a narrow window in every other layer": ("Qwen2-half-window", dict(sliding_window=7), OPEN),
    "a compressed window in every other layer": ("Qwen2-half-window", {}, CONFIGS["windows-compressed"]),
    "slots per head in every other layer": (
        "Qwen2-half-window",
        {},
        opened(slots_per_head=((24, 8), None), compress_windows=False),
    ),
    "features in every other layer": ("Qwen2-half-window", {}, CONFIGS["learned"]),
    "features beside a compressed window": ("Qwen2-half-window", {}, opened(score=FORESEEN, compress_windows=True)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NAIVE)
def test_weights_are_those_of_a_naive_composition(layers, name):
    family, features, config = NAIVE[name]
    model, ids = build(family, **features).double(), tiny_ids(1, 61)
    with patched(model, config):
        traces, patch = trace(model, ids), patch_of(model)
        config, heads, networks = patch.config, patch.heads, patch.networks
    places = plan_call([RowState()], ids.shape[1], config).cache_positions[0]
    for index, query, key, value, scale, window in layers:
        if config.positions == "slot":
            query, key = (rope_rotate(8)(states, -places) for states in (query, key))
        own = config.slots_per_head and config.slots_per_head[index] and (config.slots_per_head[index],)
        decided = []
        _, held = naive_lococo(
            *(query, key, value, dataclasses.replace(config, slots_per_head=own)),
            head=None if window else naive_head(heads.get(index)),
            rotate=rope_rotate(8),
            scale=scale,
            window=window,
            network=naive_network(networks.get(index)),
            # What is full is compressed when the next token comes.
            blocks=[config.block_size] * ((ids.shape[1] - 1) // config.block_size),
            decided=decided,
        )
        of_layer = [each for each in traces if each.layer == index]
        assert len(of_layer) == len(held)
        for each, expected in zip(of_layer, decided, strict=True):
            assert_decided_alike(each.decisions, expected, config.block_size)
        for each, entries in zip(of_layer, held, strict=True):
            expected = torch.stack([entry.tokens for entry in entries]).float()
            torch.testing.assert_close(each.weights, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(each.weights.sum(-1), torch.ones(len(entries)), rtol=0, atol=1e-5)
            if window:
                is_kept = config.for_window(window).num_slots == window - 1
                kinds = {"recent", "open"} if is_kept else {"heavy", "recent", "open"}
                assert set(each.kinds) == kinds and (each.weights.count_nonzero(-1) == 1).all()


def assert_decided_alike(decisions, expected, block_size):
    """Every token's last decision is that of the naive reference."""
    at = decisions.at.tolist()
    assert {token for token, number in enumerate(at) if number >= 0} == expected.keys()
    for token, number in enumerate(at):
        outcome = OUTCOMES[decisions.outcome[token]]
        if number < 0:
            assert (outcome, decisions.rank[token], decisions.slot[token]) == ("open", 0, -1)
            continue
        naive, found = expected[token], decisions.compressions[number]
        assert found == (naive.now / block_size, naive.now, naive.candidates, naive.kept)
        assert (outcome, decisions.rank[token].item()) == (naive.outcome, naive.rank)
        slot, weight = decisions.slot[token].item(), max(naive.weights)
        assert (slot >= 0) == (weight > 0)
        told = [decisions.weight[token].item(), naive.weights[slot] if slot >= 0 else 0]  # several may have as much
        assert told == pytest.approx([weight, weight], rel=1e-5, abs=1e-9)
        # Features are rounded to float16; the reference leaves the floor in, which changes no order.
        close = dict(rel=1e-3 if decisions.parts else 1e-5, nan_ok=True)
        floor = 1e-5 * bool(decisions.parts)
        assert decisions.score[token].item() + floor == pytest.approx(naive.score, **close)
        if decisions.parts:
            distant, factor = (decisions.parts[name][token].item() for name in ("distant", "factor"))
            assert distant == pytest.approx(naive.statistic, rel=1e-5)
            assert (distant + floor) * factor == pytest.approx(naive.score, **close)
            assert decisions.parts["foreseen"][token].item() == pytest.approx(naive.score, **close)


def test_kinds_follow_the_budget():
    config = LoCoCoConfig(16, block_size=8, gate_init=0.5)
    with patched(tiny_llama(), config) as model:
        for each in trace(model, tiny_ids(1, 99)):
            counts = {kind: each.kinds.count(kind) for kind in ("sink", "heavy", "recent", "fused", "open")}
            assert counts == dict(
                sink=config.num_sinks, heavy=config.num_heavy, recent=config.num_recent, fused=config.num_fused, open=3
            )
            copies = [row for row, kind in zip(each.weights, each.kinds, strict=True) if kind != "fused"]
            assert all((row > 0).sum() >= 1 for row in copies)
            assert torch.equal(each.weights[-3:, -3:], torch.eye(3))


def test_tracing_leaves_reading_as_it_is():
    ids, config = tiny_ids(1, 90), LoCoCoConfig(16, block_size=8, gate_init=0.5)
    with patched(tiny_llama(), config) as model, torch.no_grad():
        before = model(ids).logits
        trace(model, ids)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("ids", [tiny_ids(2, 9), tiny_ids(1, 9)[0], tiny_ids(1, 9)[:, :0]])
def test_only_one_row_is_traced(ids):
    with (
        patched(tiny_llama(), LoCoCoConfig(16, block_size=8)) as model,
        pytest.raises(ValueError, match="must be one row"),
    ):
        trace(model, ids)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.data, self.inside = set(), [], "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.inside = named.get("id") if tag == "script" else None
        self.ids |= {named["id"]} if "id" in named else set()
        self.links += [named[name] for name in ("src", "href") if name in named]

    def handle_data(self, data):
        if self.inside == "data":
            self.data += data

    def handle_endtag(self, tag):
        self.inside = None


def test_page_holds_its_data_and_asks_for_nothing_else():
    with patched(tiny_llama(), LoCoCoConfig(16, block_size=8, gate_init=0.5)) as model:
        traces = trace(model, tiny_ids(1, 90))
    tokens = ["</script><b>", "{{data}}", '"&'] + ["w"] * 87
    data = page_data(traces, tokens, "a title", threshold=0.05)
    written = page(data)
    parsed = Page(written)
    assert json.loads(parsed.data) == data
    assert {"layer", "head", "text", "slots", "detail", "title", "summary"} <= parsed.ids
    assert not parsed.links and "://" not in written
    head = data["heads"][3]
    assert (head["layer"], head["head"], len(head["kept"])) == (1, 1, 90)
    for slot, row in zip(head["slots"], traces[3].weights, strict=True):
        places, shares = slot[1::2], slot[2::2]
        assert sorted(places) == (row >= 0.05).nonzero()[:, 0].tolist()
        assert shares == sorted(shares, reverse=True)
        assert shares == [round(1000 * row[place].item()) for place in places]
    assert head["kept"] == pytest.approx((1000 * traces[3].weights.sum(0)).tolist(), abs=0.51)


@pytest.mark.parametrize("name", ["open", "learned", "streaming"])
def test_page_holds_what_was_decided(name):
    with patched(tiny_llama(), CONFIGS[name]) as model:
        traces = trace(model, tiny_ids(1, 90))
    data = page_data(traces, ["w"] * 90, "a title", threshold=0.05)
    for head, each in zip(data["heads"], traces, strict=True):
        why, decisions = head["why"], each.decisions
        assert why["compressions"] == [list(compression) for compression in decisions.compressions]
        assert why["outcome"] == "".join(OUTCOMES[outcome][0] for outcome in decisions.outcome)
        for field in ("at", "rank", "slot"):
            held = np.frombuffer(base64.b64decode(why[field]), "<u2").astype(int)
            assert np.where(held == 65535, -1, held).tolist() == getattr(decisions, field).tolist()
        names = {"learned": ["distant", "factor", "foreseen"], "open": ["score"], "streaming": []}[name]
        assert list(why["scores"]) == names
        for score in names:
            half = np.frombuffer(base64.b64decode(why["scores"][score]), "<u2").astype("<u4")
            expected = (decisions.parts or {"score": decisions.score})[score]
            np.testing.assert_allclose((half << 16).view("<f4"), expected, rtol=2**-8)


def test_a_text_that_fits_is_not_decided_about():
    with patched(tiny_llama(), LoCoCoConfig(16, block_size=8)) as model:
        (decisions, *_) = [each.decisions for each in trace(model, tiny_ids(1, 9))]
    assert not decisions.compressions and [OUTCOMES[outcome] for outcome in decisions.outcome] == ["open"] * 9
    assert decisions.at.tolist() == decisions.slot.tolist() == [-1] * 9 and not decisions.rank.any()


def test_inspect_writes_a_page(checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["inspect", "--model", str(checkpoint), "--data", str(tmp_path / "text.txt")]
    output = tmp_path / "slots.html"
    sizes = ["--num-slots", "16", "--block-size", "8", "--max-tokens", "120"]
    assert main([*arguments, *sizes, "--output", str(output)]) == 0
    assert "120 tokens of 200 (--max-tokens reads more), 4 KV heads" in capsys.readouterr().out
    data = json.loads(Page(output.read_text(encoding="utf-8")).data)
    assert data["tokens"] == TEXT.split()[:120] and data["title"] == "text.txt in 16 slots, lococo-uncalibrated"
    model = lococo.patch_model(tiny_llama(), LoCoCoConfig(16, block_size=8, gate_init=0.5))
    lococo.save_heads(model, tmp_path / "heads")
    assert main([*arguments, "--heads", str(tmp_path / "heads"), "--output", str(output)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "Invalid value for '--max-tokens'"),
        (["--threshold", "0"], "Invalid value for '--threshold'"),
        (["--num-slots", "0"], "num_slots must be an integer of at least 1, got 0"),
        (["--data", "empty.txt"], "empty.txt: the text is empty"),
        (["--output", "."], "cannot be written: it is a folder"),
        (["--output", "./text.txt"], "--output would replace the text text.txt"),
    ],
)
def test_bad_options_are_named_before_a_model_is_looked_for(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    assert main(["inspect", "--model", "missing", "--data", "text.txt", *arguments]) == 2
    assert message in capsys.readouterr().err
