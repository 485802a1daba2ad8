"""Pictures: every panel draws what it is given, gaps and single points too."""

import builtins

import pytest

from lococo.results.plots import (
    GAP,
    Band,
    Bars,
    HeatMap,
    Lines,
    Series,
    in_rows,
    lines_over,
    method_styles,
    picture,
    thousands,
)


def drawn(panel):
    """Matplotlib's axes of a panel."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    panel.draw(figure, axes)
    return axes


def test_lines_have_points_levels_bands_and_gaps():
    series = [
        Series("full", [3.0]),
        Series("ours", [5.0, GAP, 4.0], [64, 128, 256], [4.5, GAP, 3.5], [5.5, GAP, 4.5]),
        Series("", [1.0], [64], style={"linestyle": ":"}),
    ]
    ticks = {64: "64", 128: "128", 256: "256"}
    axes = drawn(Lines(series, "t", "x", "y", "xy", ticks, bottom=1, top=9))
    assert axes.get_legend_handles_labels()[1] == ["full", "ours"]
    level, line, thin = axes.get_lines()
    assert list(level.get_ydata()) == [3, 3] and list(line.get_xdata()) == [64, 128, 256]
    assert thin.get_linestyle() == ":" and len(axes.collections) == 1
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylim()) == ("log", "log", (1, 9))
    assert [label.get_text() for label in axes.get_xticklabels()] == list(ticks.values())


def test_bars_stand_in_groups_from_top_to_bottom_with_errors_marks_and_a_band():
    series = [Series("a", [1.0, 2.0], low=[0.5, 2.0], high=[1.5, 2.5]), Series("b", [GAP, 3.0])]
    marks, band = Series("before", [2.0, GAP]), Band("chance", 0.9, 1.1)
    bars = Bars(["first", "second"], series, "t", "value", marks=marks, band=band, limits=(0, 4))
    axes = drawn(bars)
    assert set(axes.get_legend_handles_labels()[1]) == {"a", "b", "before", "chance"}
    assert [patches[1].get_width() for each in axes.containers if (patches := getattr(each, "patches", None))] == [
        2,
        3,
    ]
    assert axes.get_ylim()[0] > axes.get_ylim()[1] and axes.get_xlim() == (0, 4)
    assert series[0].errors == [[0.5, 0], [0.5, 0.5]] and series[1].errors is None
    assert bars.height < Bars(["x"] * 9, series).height


@pytest.mark.parametrize("values", [[[1, 100], [10, 10]], [[16, 16], [16, 16]]])
@pytest.mark.parametrize("log", [False, True])
def test_maps_have_their_colours_and_names(values, log):
    axes = drawn(HeatMap(values, "t", "x", "y", ["a", "b"], ["0%", "100%"], log=log))
    assert axes.get_images()[0].get_array().tolist() == values
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "100%"]


def test_a_picture_is_a_grid_of_panels():
    line = Lines([Series("one with a long name", [1, 2], [1, 2])])
    content = picture([[line, line], [HeatMap([[1.0]]), None]], (6, 5), title="t", xlabel="x", ylabel="y", share=True)
    assert content.startswith(b"\x89PNG")
    assert picture([[Bars(["a"], [Series("", [1.0])])]], (3, 2)).startswith(b"\x89PNG")


def test_a_method_has_one_colour_and_more_slots_are_dashed_but_over_slots():
    rows = [
        {"method": method, "num_slots": slots, "length": length, "loss": slots or 1, "error": error}
        for length in (30, 20)
        for method, slots, error in [("full", None, 2), ("h2o", 16, None), ("h2o", 32, 1)]
    ]

    def name(row):
        return f"{row['method']} {row['num_slots']}"

    styles = method_styles(rows, "length", name)
    assert styles == {
        "full None": {"color": "C0"},
        "h2o 16": {"color": "C1", "linestyle": "-"},
        "h2o 32": {"color": "C1", "linestyle": "--"},
    }
    panel = lines_over(rows, "length", "loss", {**styles, "missing": {}}, name, "error", title="t")
    assert [(line.label, line.x, line.y, line.low, line.high) for line in panel.series] == [
        ("full None", [20, 30], [1, 1], [-1, -1], [3, 3]),
        ("h2o 16", [20, 30], [16, 16], [16, 16], [16, 16]),
        ("h2o 32", [20, 30], [32, 32], [31, 31], [33, 33]),
    ]
    assert [line.style for line in panel.series] == list(styles.values())
    assert panel.ticks == {20: "20", 30: "30"} and panel.title == "t"

    def method(row):
        return row["method"]

    styles = method_styles(rows, "num_slots", method)
    assert styles == {"full": {"color": "C0"}, "h2o": {"color": "C1"}}
    level, line = lines_over([row for row in rows if row["length"] == 20], "num_slots", "loss", styles, method).series
    assert (level.x, line.x, line.low) == (None, [16, 32], None)


def test_the_last_row_of_a_grid_may_have_empty_places():
    one, two, three = (Lines([], title) for title in "abc")
    assert in_rows([one, two, three], 2) == [[one, two], [three, None]] and in_rows([one], 1) == [[one]]


def test_a_missing_matplotlib_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("no matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install lococo\[eval\]"):
        picture([[None]], (3, 2))


def test_lengths_are_written_as_people_do():
    assert [thousands(length) for length in (64, 1024, 131072, 1500)] == ["64", "1K", "128K", "1500"]
