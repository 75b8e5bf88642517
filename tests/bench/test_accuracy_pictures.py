"""Pictures of matrices."""

import importlib

import pytest
import runs
from matplotlib.figure import Figure


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(runs.REPOSITORY / "bench"))
    return importlib.import_module("accuracy")


def cell(method, seed, test, k="2"):
    """A row of results; it failed without `test`."""
    axes = {"data": "digits", "model": "mlp", "K": k, "method": method, "seed": seed}
    return axes | {"state": "finished", "test": test, "loss": 2 * test} if test else axes


def panel(accuracy, lines, *looks):
    axes = Figure().subplots()
    accuracy.draw_panel(axes, lines, *looks)
    return axes


def test_means_and_deviations(accuracy):
    results = [cell("bp", "0", 0.5), cell("bp", "1", 0.7)]
    axes = panel(
        accuracy, {"bp": {"0.4": results[:1], "0": results}, "scpl": {"0": [cell("scpl", "0", 0)]}}
    )
    (bar,) = axes.containers
    assert bar[0].get_xydata().ravel() == pytest.approx([0.4, 50, 0, 60])
    (segments,) = [lines.get_segments() for lines in bar[2]]
    assert segments[1][:, 1] == pytest.approx([60 - 200**0.5, 60 + 200**0.5])


def test_what_does_not_depend_on_the_axis_goes_through(accuracy):
    looks = accuracy.LOSS_LOOKS
    lines = {"bp": {"2": [cell("bp", "0", 0.5)]}}
    lines["fdg"] = {k: [cell("fdg", "0", test)] for k, test in (("2", 0.6), ("4", 0.7))}
    axes = panel(accuracy, lines, looks)
    assert [bar.get_label() for bar in axes.containers] == ["bp", "fdg"]
    through = [line.get_ydata() for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert through == [[1.0, 1.0]]


def test_more_methods_than_colours(accuracy):
    methods = [f"m{number}" for number in range(len(accuracy.COLOURS) + 1)]
    lines = {name: {k: [cell(name, "0", 0.5)] for k in "24"} for name in methods}
    drawn = [bar[0] for bar in panel(accuracy, lines).containers]
    looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in drawn}
    assert len(looks) == len(methods)


@pytest.mark.parametrize(("measure", "label"), [(None, "test accuracy, %"), ("loss", "test loss")])
def test_the_measure_and_the_legend(accuracy, tmp_path, monkeypatch, measure, label):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = [cell(f"m{number}", "0", 0.5, k) for number in range(9) for k in "24"]
    accuracy.draw(rows, "K", tmp_path / "picture.png", measure)
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("K", label)
    figures[0].draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert legend.x0 > axes.get_window_extent().x1  # hides no line
