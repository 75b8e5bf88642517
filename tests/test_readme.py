"""The README and the documents keep their word."""

import re
import tomllib
from pathlib import Path

import pytest
from fences import fences, run

import jdecouple as jd

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "bench" / "RESULTS.md"]
MOST_WORDS = 900

LISTED = re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", README.split("## Your own")[0], re.M)
"""Name and source of every method in the README's table."""
LATE = re.findall(r"^\| `(\w+)` \| [^|]* \| `(.*)` \| `(.*)` \| [^|]* \|$", METHODS, re.M)
"""Name and staleness, of weights and of error, of every method in the table of staleness."""


def snippets(page: Path) -> list[str]:
    return [fence.text for fence in fences(page) if fence.language == "python"]


def test_it_is_short():
    assert len(README.split()) < MOST_WORDS


@pytest.fixture(scope="module")
def library() -> dict:
    """What the library snippet leaves behind."""
    return run(snippets(ROOT / "README.md")[0])


def accuracy(library: dict, method: jd.methods.Method) -> float:
    """Of a short training on the model and data of the library snippet."""
    model, mesh, example = (library[name] for name in ("model", "mesh", "example"))
    trainer = jd.Trainer(model, method, jd.optim.adam(2e-3), mesh=mesh, example=example)
    state = trainer.init()
    for _ in range(60):
        state, _ = trainer.step(state, next(library["batches"]))
    test = jd.data.evaluation_batches(library["digits"].test, 64)
    scores = trainer.evaluate(state, test)
    assert {"exit_0/accuracy", "exit_1/accuracy", "exit_2/accuracy"} < scores.keys()
    return scores["accuracy"]


def test_library_snippet_runs_and_learns(library):
    assert library["scores"]["accuracy"] > 0.8
    assert len(library["blocks"]) == 3


def test_method_of_ones_own_trains(library):
    run(snippets(ROOT / "README.md")[1])
    assert accuracy(library, jd.methods.get("my_method", weight=2.0)) > 0.7


@pytest.mark.slow
def test_the_objective_of_contributing_trains(library):
    [snippet] = snippets(ROOT / "CONTRIBUTING.md")
    objective = run(snippet)["SquaredError"](weight=2.0)
    assert isinstance(objective, jd.objectives.Objective)
    method = jd.methods.Method("squared_error", objective, jd.routes.Local())
    assert accuracy(library, method) > 0.7


# A method may have a row in the code before it has one here, but not the other way round.


def test_methods_table_lists_methods_in_their_order():
    names = [name for name, _ in LISTED]
    assert names == [name for name in jd.methods.names() if name in names]
    assert len(names) >= 13


@pytest.mark.parametrize(("name", "source"), LISTED)
def test_listed_method_has_its_source_and_its_section(name, source):
    assert f"\n## {name} — " in METHODS
    link = re.fullmatch(r"\[(.*)\]\(https://arxiv.org/abs/(.*)\)", source)
    if link:
        assert link[1] == link[2]
        assert jd.methods.source(name) == f"arXiv:{link[1]}"
    else:
        assert not jd.methods.source(name).startswith("arXiv")


def test_sections_of_methods_are_listed():
    sections = re.findall(r"^## (\w+) — ", METHODS, re.M)
    assert sections == [name for name, _ in LISTED]


@pytest.mark.parametrize(("name", "weights", "error"), LATE)
def test_staleness_of_a_late_method(name, weights, error):
    route = jd.methods.get(name).route
    for num_stages in range(1, 6):
        for k in range(num_stages):
            names = {"K": num_stages, "k": k, "M": route.accumulate, "max": max, "min": min}
            stated = tuple(eval(text, dict(names)) for text in (weights, error))
            assert stated == route.staleness(k, num_stages), (num_stages, k)


def test_all_other_listed_methods_are_never_late():
    late = {name for name, _, _ in LATE}
    assert late
    for name, _ in LISTED:
        route = jd.methods.get(name).route
        assert (name in late) == (route.staleness(0, 3) != (0, 0)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_sections_that_it_names_exist(page):
    text = page.read_text()
    folder = page.parent
    for link, section in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        target = (folder / link) if link else page
        assert target.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert section in anchors, f"{link}#{section}"
    if page.parent.name == "bench":
        return  # a figure's command may be of a script that was deleted since
    code = r"(?<![\w/.])((?:configs|tests|jdecouple|docs|bench|\.ci|\.github)/[\w./]+\.\w+)"
    for name in re.findall(code, text):
        assert (ROOT / name).exists(), name


def test_version_is_told_alike():
    with open(ROOT / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert jd.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
