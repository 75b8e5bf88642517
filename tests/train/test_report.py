"""The curves of a run show what its metrics hold."""

import os

import matplotlib.image
import numpy as np
import pytest
from test_metrics import write_run

from jdecouple.train.metrics import MetricsWriter
from jdecouple.train.report import plot_curves

pytestmark = pytest.mark.usefixtures("drawn")


def axes_of(monkeypatch, workdir, **kwargs):
    """The axes of the figure that `plot_curves` saves."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    path = plot_curves(workdir, **kwargs)
    return path, figures[0], figures[0].axes


@pytest.mark.parametrize(("blocks", "steps"), [(4, 40), (1, 10), (16, 10)])
def test_curves_show_every_block_and_exit(tmp_path, monkeypatch, blocks, steps):
    write_run(tmp_path, blocks, steps)
    path, figure, (losses, accuracies) = axes_of(monkeypatch, tmp_path, title="a run")
    assert path == tmp_path / "curves.png"
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (540, 1320)
    assert image[..., :3].std() > 0.05
    assert figure.get_suptitle() == "a run"
    assert [axes.get_xlabel() for axes in (losses, accuracies)] == ["step", "step"]
    assert (losses.get_ylabel(), accuracies.get_ylabel()) == ("training loss", "accuracy")
    legend = [text.get_text() for text in losses.get_legend().get_texts()]
    assert legend == [f"block {i}" for i in range(blocks)]
    legend = [text.get_text() for text in accuracies.get_legend().get_texts()]
    assert sorted(legend) == sorted(
        [f"exit {i}" for i in range(blocks)] + ["final", "train", "validation", "test"]
    )
    assert len(accuracies.lines) == 2 * (blocks + 1) + 1
    for i, line in enumerate(losses.lines):
        np.testing.assert_allclose(line.get_ydata(), (i + 1) / np.arange(1, steps + 1))


def test_curves_without_blocks_or_exits(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, "train", {"loss": float("nan"), "accuracy": 0.5})
        writer.write(2, "train", {"loss": 1.0})
    _, _, (losses, accuracies) = axes_of(monkeypatch, tmp_path)
    assert [line.get_label() for line in losses.lines] == ["loss"]
    np.testing.assert_array_equal(losses.lines[0].get_ydata(), [np.nan, 1.0])
    assert [line.get_label() for line in accuracies.lines] == ["final"]


def test_curves_of_exits_that_come_later_hide_none(tmp_path, monkeypatch):
    """The last exit of a model that grows is drawn once, in its own colour."""
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write(1, "test", {"accuracy": 0.5, "exit_0/accuracy": 0.5})
        writer.write(2, "test", {"accuracy": 0.7, "exit_0/accuracy": 0.5, "exit_1/accuracy": 0.7})
    _, _, (_, accuracies) = axes_of(monkeypatch, tmp_path)
    assert [line.get_label() for line in accuracies.lines] == ["exit 0", "exit 1"]


def test_losses_of_many_decades_get_a_logarithmic_axis(tmp_path, monkeypatch):
    write_run(tmp_path, steps=200, test=False)
    assert axes_of(monkeypatch, tmp_path)[2][0].get_yscale() == "log"


def test_curves_of_an_empty_run_go_where_told(tmp_path):
    path = plot_curves(tmp_path, tmp_path / "other.png")
    assert path == tmp_path / "other.png"
    assert os.listdir(tmp_path) == ["other.png"]


@pytest.mark.parametrize(
    "title", ["$a_to_$b", "$x_{y$", "csv:caf\udce9.csv", "\U0001f40c 猫", "a\nb"]
)
def test_a_title_is_plain_text(tmp_path, monkeypatch, recwarn, title):
    _, figure, _ = axes_of(monkeypatch, tmp_path, title=title)
    assert figure.get_suptitle() == title.replace("\udce9", "\\udce9")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_curves_leave_pyplot_alone(tmp_path):
    import sys

    write_run(tmp_path)
    sys.modules.pop("matplotlib.pyplot", None)
    plot_curves(tmp_path)
    assert "matplotlib.pyplot" not in sys.modules
