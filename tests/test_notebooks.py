"""Every notebook is stored as a user should get it, and runs from top to bottom."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import nbformat
import notebooks
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
WHERE = "jdecouple/jdecouple/blob/main/notebooks/"
BADGES = {
    "colab": "https://colab.research.google.com/github/" + WHERE,
    "kaggle": "https://kaggle.com/kernels/welcome?src=https://github.com/" + WHERE,
}
KAGGLE = {
    "PLATFORM": "cpu",
    "WORK": ".",
    "IMAGES": "none",
    "IMAGE_SIZE": 8,
    "BLOCKS": "8,8,M|16|16|16",
    "PROJECTOR": "32-16",
    "BATCH": 32,
    "STEPS": 10,
    "EPOCHS": 1,
}
SMALL = {
    "colab_quickstart": ({"PLATFORM": "cpu", "EPOCHS": 2, "STEPS": 20}, 1),
    "kaggle_two_gpus": (KAGGLE, 2),
}
"""Parameters and devices of its test, by the name of a notebook."""

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def badge(path: Path) -> str:
    """Where the badge of a notebook leads to."""
    return BADGES[path.stem.split("_")[0]] + path.name


def test_all_are_tested():
    assert SMALL.keys() == {path.stem for path in NOTEBOOKS}


@each
class TestStored:
    def test_valid(self, path):
        notebook = json.loads(path.read_text())
        nbformat.validate(notebook)
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"

    def test_without_outputs(self, path):
        for cell in notebooks.code(notebooks.read(path)):
            assert not cell.outputs
            assert cell.execution_count is None

    def test_first_cell_has_a_badge_that_opens_it(self, path):
        first = notebooks.read(path).cells[0]
        assert first.cell_type == "markdown"
        assert first.source.startswith("# ")
        assert f"]({badge(path)})" in first.source

    def test_readme_has_its_badge(self, path):
        assert f"]({badge(path)})" in (ROOT / "README.md").read_text()

    def test_installs_before_jax_is_imported(self, path):
        notebook = notebooks.read(path)
        cells = [cell.source for cell in notebooks.code(notebook)]
        uses = [re.search(r"\bjax|jdecouple", source) is not None for source in cells]
        (install,) = notebooks.tagged(notebook, "install")
        assert uses.index(True) == cells.index(install.source)
        assert notebooks.parameters(notebook)["PLATFORM"] == "gpu"

    def test_tells_what_to_do_without_a_gpu(self, path):
        notebook = notebooks.read(path)
        with pytest.raises(AssertionError, match=r"hoose .* > .* all"):
            exec(only(notebook, "PLATFORM,"), notebooks.parameters(notebook))


def only(notebook: nbformat.NotebookNode, text: str) -> str:
    """The one cell of code that holds a text."""
    (source,) = [cell.source for cell in notebooks.code(notebook) if text in cell.source]
    return source


class TestColab:
    notebook = notebooks.read(ROOT / "notebooks" / "colab_quickstart.ipynb")

    def test_tells_what_to_do_with_the_jax_that_was_there(self, monkeypatch):
        monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
        with pytest.raises(AssertionError, match="Restart session, then Runtime > Run all"):
            exec(only(self.notebook, "assert jax"), {"PLATFORM": "cpu"})

    def test_keeps_runs_in_drive_if_asked(self, monkeypatch):
        mounted: list[str] = []
        colab = types.SimpleNamespace(drive=types.SimpleNamespace(mount=mounted.append))
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        found = []
        for save in (False, True):
            names = {"SAVE_TO_DRIVE": save}
            exec(only(self.notebook, "google.colab"), names)
            found.append(str(names["RUNS"]))
        assert found == ["runs", "/content/drive/MyDrive/jdecouple"]
        assert mounted == ["/content/drive"]


@pytest.mark.slow
@each
def test_runs(path, tmp_path):
    values, devices = SMALL[path.stem]
    executed = notebooks.execute(path, values, tmp_path, devices)
    outputs = [output for cell in notebooks.code(executed) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:  # a warning would be the first thing that a user sees
        assert "Warning" not in output.get("text", "")
    if path.stem == "kaggle_two_gpus":
        header, *rows = (tmp_path / "submission.csv").read_text().split()
        assert header == "id,label"
        images = sorted(image.stem for image in (tmp_path / "digits" / "test").iterdir())
        assert [row.split(",")[0] for row in rows] == images
        assert {row.split(",")[1] for row in rows} <= set("0123456789")
