"""Timelines: every call is a box at its time, and the numbers stand where they fit."""

import os
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex

from jdecouple.schedules import Costs, Kind, Span, build, simulate
from jdecouple.schedules.drawing import draw

F, B, S = Kind.FORWARD, Kind.BACKWARD, Kind.STEP
BLUE, ORANGE, GREEN = "#56b4e9", "#e69f00", "#009e73"
COSTS = Costs(0.001, 0.002, 0.0005)


def drawn(spans, path, **kwargs):
    """The figure of some calls, saved."""
    figure = draw(spans, **kwargs)
    figure.savefig(path)
    return figure


def boxes(figure) -> list[tuple]:
    """Left, right, top, bottom and colour of each box, in order."""
    [collection] = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    found = []
    for path, colour in zip(collection.get_paths(), collection.get_facecolors(), strict=True):
        (left, top), (right, bottom) = path.vertices.min(axis=0), path.vertices.max(axis=0)
        assert len(np.unique(path.vertices, axis=0)) == 4
        found.append((*np.round([left, right, top, bottom], 6).tolist(), to_hex(colour)))
    return found


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("title", ["$a_to_$b", "$x_{y$", "csv:caf\udce9.csv"])
def test_a_title_is_plain_text(tmp_path, title):
    figure = drawn(simulate(build("1f1b", 1, 1), COSTS).spans, tmp_path / "x.png", title=title)
    assert figure.axes[0].get_title(loc="left") == title.replace("\udce9", "\\udce9")


def test_picture_of_a_schedule(tmp_path):
    spans = simulate(build("1f1b", 4, 8), COSTS).spans
    figure = drawn(spans, tmp_path / "1f1b.png", title="1f1b, K = 4")
    assert os.listdir(tmp_path) == ["1f1b.png"]
    image = matplotlib.image.imread(tmp_path / "1f1b.png")
    assert image.shape[:2] == (408, 1440)
    for colour in (BLUE, ORANGE, GREEN):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(image[..., :3] - wanted).max(axis=-1) < 0.01).mean() > 0.003
    [axes] = figure.axes
    assert axes.get_title(loc="left") == "1f1b, K = 4"
    assert axes.get_xlabel() == "time (ms)"
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"stage {stage}" for stage in range(4)
    ]
    assert axes.get_xlim() == pytest.approx((0, 33.5))
    low, high = axes.get_ylim()
    assert low > high  # the first stage on top, as the grid prints it
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["forward", "backward", "step"]
    assert sorted(texts(figure)) == sorted(4 * 2 * [str(each) for each in range(8)])


def test_boxes_are_the_calls(tmp_path):
    """Time counts from the first call; a call of several actions has a band for each."""
    spans = [
        Span(0, 0, (F,), (0,), 0, 7.0, 7.001),
        Span(1, 1, (F, B), (0, 0), 0, 7.001, 7.004),
        Span(0, 0, (B, S), (0, 0), 0, 7.004, 7.0065),
        Span(1, 1, (S,), (0,), 0, 7.004, 7.0045),
    ]
    assert boxes(drawn(iter(spans), tmp_path / "a.png")) == [
        (0, 1, -0.4, 0.4, BLUE),
        (1, 4, 0.6, 1.0, BLUE),
        (1, 4, 1.0, 1.4, ORANGE),
        (4, 6.5, -0.4, 0.0, ORANGE),
        (4, 6.5, 0.0, 0.4, GREEN),
        (4, 4.5, 0.6, 1.4, GREEN),
    ]


def test_stages_of_a_row_share_a_line_and_differ_in_shade(tmp_path):
    spans = simulate(build("interleaved_1f1b", 4, 2), COSTS).spans
    figure = drawn(spans, tmp_path / "a.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["stages 0, 2", "stages 1, 3"]
    assert len({colour for *_, colour in boxes(figure)}) == 2 * 3
    assert {BLUE, ORANGE, GREEN} < {colour for *_, colour in boxes(figure)}


def test_weight_gradients_have_a_colour(tmp_path):
    spans = simulate(build("zbv", 4, 2), Costs(0.001, 0.001, 0.0005, weight=0.001)).spans
    figure = drawn(spans, tmp_path / "a.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["stages 0, 3", "stages 1, 2"]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["forward", "backward", "weight", "step"]
    assert "#cc79a7" in {colour for *_, colour in boxes(figure)}
    assert sorted(texts(figure)) == sorted(4 * 3 * ["0", "1"])


def test_rows_of_one_process_alone(tmp_path):
    """A process measures its own stages."""
    spans = [span for span in simulate(build("gpipe", 4, 2), COSTS).spans if span.device_group >= 2]
    figure = drawn(spans, tmp_path / "a.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["stage 2", "stage 3"]
    assert {top for _, _, top, *_ in boxes(figure)} == {-0.4, 0.6, 1.0}
    assert figure.axes[0].get_xlim()[0] == 0
    assert min(left for left, *_ in boxes(figure)) == 0


def test_single_microbatches_are_numbered_by_batch(tmp_path):
    """Batches before the first do not exist and have no number."""
    spans = simulate(build("delayed", 2), COSTS, batches=3).spans
    first, second = [span for span in spans if span.stage == 0][1:]
    assert first.microbatches == second.microbatches == (-2, -2, 0)
    figure = drawn(spans, tmp_path / "a.png")
    # Stage 0 forwards 0, 1, 2 and trains on 0 at last; stage 1 does both to 0 and 1.
    assert sorted(texts(figure)) == sorted(["0", "1", "2", "0", "0", "0", "1", "1"])


def test_numbers_stand_where_they_fit(tmp_path):
    many = simulate(build("local", 2, 300), COSTS).spans
    assert texts(drawn(many, tmp_path / "many.png")) == []
    few = simulate(build("local", 2, 30), COSTS).spans
    figure = drawn(few, tmp_path / "few.png")
    assert len(texts(figure)) == 2 * 2 * 30
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    [axes] = figure.axes
    for text in axes.texts:
        left, right = (axes.transData.inverted().transform(text.get_window_extent(renderer)))[:, 0]
        assert right - left < 3.0  # ms of a call


def test_calls_that_take_no_time_are_drawn(tmp_path):
    drawn(simulate(build("gpipe", 2, 2), Costs(0, 0)).spans, tmp_path / "a.png")
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.01


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="spans is empty"):
        draw([])


def test_drawing_leaves_pyplot_alone(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    drawn(simulate(build("local", 2), COSTS).spans, tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules
