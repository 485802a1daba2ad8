"""The table of targets: figures from result files, whichever of them there are."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import targets as targets_module
from experiments.targets import (
    OPEN,
    PRESET,
    SHIPPED,
    TARGETS,
    Target,
    calibration_minutes,
    ceiling_share,
    growth,
    least,
    main,
    most,
    over_full,
    score_tensor_share,
    target_rows,
)

RESULTS = Path(__file__).parents[2] / "docs/results"
CARD = "NVIDIA H100 80GB HBM3"


def write(folder, name, rows, **facts):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": CARD, "commit": "abc", "rows": rows, **facts}))


def cell(method, length, batch=1, **values):
    return {"method": method, "length": length, "batch": batch, **values}


def outcomes(folder):
    return {(row["what"], row["method"]): (row["measured"], row["outcome"]) for row in target_rows(folder)}


def test_without_files_nothing_is_measured(tmp_path):
    rows = target_rows(tmp_path)
    assert {row["outcome"] for row in rows} == {"not measured"}
    assert all(row["measured"] is row["device"] is row["commit"] is None for row in rows)
    assert len({(row["what"], row["method"]) for row in rows}) == len(rows) > len(TARGETS)


def test_cells_that_were_left_out_are_not_measured(tmp_path):
    columns = ("median", "peak_bytes", "speedup_over_full", "time_over_streaming", "tokens_per_second", "limit_share")
    nothing = dict.fromkeys((*columns, "limit_seconds", "cache_bytes", "score_share", "score_largest_bytes"))
    methods, lengths = ("full", PRESET, OPEN, SHIPPED), (512, 4096, 8192, 32768, 131072)
    for source in {target.source for target in TARGETS}:
        write(tmp_path, source, [cell(method, length, **nothing) for method in methods for length in lengths])
    assert {row["outcome"] for row in target_rows(tmp_path)} == {"not measured"}


def test_prefill_is_judged_by_method_at_its_worst_length(tmp_path):
    def prefill(method, slowness):
        times = [(4096, 1.04), (8192, 1.1), (32768, 1.5), (131072, 3.0)]
        return [
            cell(
                method,
                length,
                peak_bytes=16.5e9 + length,
                speedup_over_full=ceiling / slowness,
                limit_seconds=1.0 if method == "full" else 1 / ceiling,
                time_over_streaming=None if method == "full" else 1.02 * slowness,
            )
            for length, ceiling in times
        ]

    rows = [*prefill("full", 1), *prefill(PRESET, 1.05), *prefill(OPEN, 1.2)]
    write(tmp_path, targets_module.PREFILL_8B, rows)
    found = outcomes(tmp_path)
    what = "prefill, 8B shape: "
    assert found[what + "peak memory at 128K over 4K", PRESET] == (pytest.approx(1, rel=1e-4), "met")
    assert found[what + "peak GB at 128K", OPEN] == (pytest.approx(16.5, rel=1e-4), "met")
    share = what + "share of the speed-up possible over full, 32K and 128K"
    assert found[share, PRESET] == (pytest.approx(1 / 1.05), "met")
    assert found[share, OPEN] == (pytest.approx(1 / 1.2), "missed")
    assert found[what + "speed over full from 8K on", PRESET] == (pytest.approx(1.1 / 1.05), "met")
    assert found[what + "speed over full from 8K on", OPEN] == (pytest.approx(1.1 / 1.2), "missed")
    assert found[what + "time over the sliding window's", PRESET] == (pytest.approx(1.02 * 1.05), "met")
    assert found[what + "time over the sliding window's", OPEN][1] == "missed"
    measured = [row for row in target_rows(tmp_path) if row["measured"] is not None]
    assert {(row["device"], row["commit"]) for row in measured} == {(CARD, "abc")}


def test_a_short_visit_stands_in_for_the_long_grid(tmp_path):
    what = "decoding, 8B shape, batch 1: tokens per second"
    write(tmp_path, "gpu_decode", [cell(PRESET, 4096, tokens_per_second=250.0)])
    (row,) = [row for row in target_rows(tmp_path) if (row["what"], row["method"]) == (what, PRESET)]
    assert (row["measured"], row["outcome"], row["source"]) == (250, "met", "gpu_decode.json")
    write(tmp_path, targets_module.DECODE_8B, [cell(PRESET, 4096, tokens_per_second=150.0)])
    (row,) = [row for row in target_rows(tmp_path) if (row["what"], row["method"]) == (what, PRESET)]
    assert (row["measured"], row["outcome"], row["source"]) == (150, "missed", f"{targets_module.DECODE_8B}.json")


ROWS = [
    *(cell("full", length, median=0.1 * length, tokens_per_second=1.0) for length in (8, 64)),
    *(cell(PRESET, length, median=0.4, tokens_per_second=1000 / length, cache_bytes=5) for length in (8, 64)),
    cell(PRESET, 64, batch=2, median=9.0, tokens_per_second=7.0, score_largest_bytes=2, matrix_bytes=8),
]
OURS = [row for row in ROWS if row["method"] == PRESET]


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        (most("tokens_per_second", unit=10), 12.5),
        (most("tokens_per_second", batch=2), 7),
        (most("tokens_per_second", batch=3), None),
        (least("tokens_per_second"), 7),
        (least("tokens_per_second", batch=1), 1000 / 64),
        (least("tokens_per_second", since=65), None),
        (growth("cache_bytes", 8, 64), 1),
        (growth("tokens_per_second", 8, 64), 1 / 8),
        (growth("cache_bytes", 8, 32), None),
        (over_full("median", 64, 8), 0.5),
        (over_full("median", 64, 9), None),
        (ceiling_share(64), None),
        (score_tensor_share, 0.25),
    ],
)
def test_figures(figure, expected):
    assert figure({"rows": ROWS}, OURS) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    "figure", [most("tokens_per_second"), least("tokens_per_second"), growth("cache_bytes", 8, 64)]
)
def test_cells_that_found_no_memory_are_not_spoken_for_by_others(figure):
    left_out = [cell(PRESET, length, skipped="out of memory") for length in (64, 128)]
    rows = [*OURS[:1], *left_out]
    assert figure({"rows": rows}, rows) is None and figure({"rows": OURS}, OURS) is not None


def test_a_calibration_in_one_go_has_its_minutes():
    assert calibration_minutes({"usage": {"seconds": 90.0, "resumed": False}}, []) == 1.5
    assert calibration_minutes({"usage": {"seconds": 90.0, "resumed": True}}, []) is None
    assert calibration_minutes({}, []) is None


@pytest.mark.parametrize(("comparison", "met"), [("<=", [True, True, False]), (">=", [False, True, True])])
def test_the_bound_itself_is_good_enough(comparison, met):
    target = Target("x", comparison, 2, "x", most("x"))
    assert [target.is_met(figure) for figure in (1, 2, 3)] == met


def test_sources_are_files_that_commands_write():
    files = {*(f"bench_{topic}_cpu" for topic in ("decode", "extend", "score"))}
    files |= {f"bench_{topic}_cuda_llama-3.1-8b" for topic in ("prefill", "decode", "train", "extend", "score")}
    files |= {"bench_prefill_cuda_llama-2-7b"}
    files |= {f"heads/{name}/calibration" for name in ("smollm2-135m-128", "llama-2-7b-512")}
    assert {target.source for target in TARGETS} == files


def test_command_writes_the_table(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--results", str(tmp_path / "missing")])
    assert "--results must be a folder of result files" in capsys.readouterr().err
    shutil.copy(RESULTS / "bench_decode_cpu.json", tmp_path)
    main(["--results", str(tmp_path)])
    content = json.loads((tmp_path / "targets.json").read_text())
    assert content["rows"] == target_rows(tmp_path)
    device = json.loads((RESULTS / "bench_decode_cpu.json").read_text())["device"]
    assert {row["device"] for row in content["rows"]} == {device, None}
    table = (tmp_path / "targets.md").read_text()
    assert table.split("\n", 2)[2] == capsys.readouterr().out[:-1]


def test_the_table_in_the_repository_is_that_of_its_files():
    assert json.loads((RESULTS / "targets.json").read_text())["rows"] == target_rows(RESULTS)
