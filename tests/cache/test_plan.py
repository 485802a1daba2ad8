"""The bookkeeping of blocks, against a walk through the tokens one by one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lococo.cache.plan import AlignedSegment, RowState, plan_call
from lococo.config import LoCoCoConfig

CONFIGS = st.builds(lambda slots, block: LoCoCoConfig(slots, block_size=block), st.integers(1, 20), st.integers(1, 12))


def walk(config, count):
    """(entry of each token, entries at each compression) of one row, token by token."""
    held, pending, entries, compressions = 0, 0, [], []
    for _ in range(count):
        if pending == config.block_size:  # compressed when the next token comes
            held, pending = held + pending, 0
            if held > config.num_slots:
                compressions.append(held)
                held = config.num_slots
        entries.append(held + pending)
        pending += 1
    return entries, compressions


def read_all(config, calls, masks=None):
    """Entries and compressions of every row after some calls, from the plans."""
    rows, batch = (RowState(),), 1 if masks is None else len(masks[0])
    entries, places, compressions = ([[] for _ in range(batch)] for _ in range(3))
    for call, length in enumerate(calls):
        real = None if masks is None else masks[call]
        plan = plan_call(rows, length, config, real)
        rows = plan.rows
        for row in range(batch):
            flags = [True] * length if real is None else real[row]
            for column, is_real in enumerate(flags):
                if is_real:
                    entries[row].append(plan.cache_positions.expand(batch, -1)[row, column].item())
                    places[row].append(plan.positions.expand(batch, -1)[row, column].item())
            for segment in plan.segments:
                for compression in segment.compressions:
                    if compression.rows is None or row in compression.rows.tolist():
                        compressions[row].append(compression.num_entries)
    return entries, places, compressions


@given(CONFIGS, st.lists(st.integers(1, 30), min_size=1, max_size=5))
@settings(deadline=None)
def test_any_split_gives_the_blocks_of_a_walk(config, calls):
    entries, places, compressions = read_all(config, calls)
    assert (entries[0], compressions[0]) == walk(config, sum(calls))
    assert places[0] == list(range(sum(calls)))
    assert max(entries[0]) < config.capacity


@given(CONFIGS, st.data())
@settings(deadline=None)
def test_padding_anywhere_moves_no_boundary(config, data):
    calls = data.draw(st.lists(st.integers(1, 15), min_size=1, max_size=4))
    flags = st.lists(st.booleans(), min_size=1, max_size=1)
    masks = [[[data.draw(flags)[0] for _ in range(length)] for _ in range(3)] for length in calls]
    entries, places, compressions = read_all(config, calls, masks)
    for row in range(3):
        count = sum(sum(mask[row]) for mask in masks)
        assert (entries[row], compressions[row]) == walk(config, count)
        assert places[row] == list(range(count))


def test_no_padding_needs_no_gathering():
    plan = plan_call((RowState(), RowState()), 20, LoCoCoConfig(8, block_size=4))
    assert all(isinstance(segment, AlignedSegment) for segment in plan.segments)


def test_decode_block_closes_early_and_only_for_single_tokens():
    config = LoCoCoConfig(8, block_size=4, decode_block_size=1)
    row = plan_call((RowState(),), 14, config).rows[0]
    assert row.pending == 2
    row = plan_call((row,), 1, config).rows[0]
    assert (row.num_entries(8), row.with_block_closed().num_entries(8), row.pending, row.seen) == (11, 8, 3, 15)


def test_write_and_take_are_inverse_in_both_modes():
    tokens = torch.randn(2, 3, 9, 4)
    masks = [[[True] * 9] * 2, [[True] * 9, [False] * 4 + [True] * 5]]
    for real in (None, *masks):
        plan = plan_call((RowState(),), 9, LoCoCoConfig(32, block_size=4), real)
        for in_place in (True, False):
            buffer = torch.zeros(2, 3, 36, 4)
            for segment in plan.segments:
                buffer = segment.write(buffer, tokens, in_place)
            assert torch.equal(buffer[0, :, :9], tokens[0])
            start = 0 if real is None or all(real[1]) else 4
            assert torch.equal(buffer[1, :, : 9 - start], tokens[1, :, start:])
            assert (buffer[1, :, 9 - start :] == 0).all()
