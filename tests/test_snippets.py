"""Every snippet of the README and of the documents is executed, or says why not."""

import collections
from pathlib import Path

import jax
import numpy as np
import pytest
from fences import CODE, NO_CODE, ROOT, Shell, commands_of, fences, run
from flax import nnx

import jdecouple as jd

pytestmark = pytest.mark.usefixtures("optimized")

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
ELSEWHERE = ("README.md", "CONTRIBUTING.md")  # their Python, by tests/test_readme.py
SLOW = (
    *(
        "command-line.md",
        "data.md",
        "delay.md",
        "first-hour.md",
        "growth.md",
        "index.md",
        "inference.md",
    ),
    *("language-models.md", "models.md", "own-method.md", "own-model-and-data.md", "plan.md"),
    "tracking.md",
)
"""Pages whose Python trains for longer, starts a process or needs data."""
DEEP = ("README.md", "report.md", *SLOW)
"""Pages of which slow tests run all: their commands train."""
NOT_RUN = {
    "first-hour.md": ["another repository", "stopped by hand", "two servers"],
    "multi-host.md": [
        *("two machines", "SLURM", "Open MPI", "two machines", "parts of several machines"),
        *("three processes for some minutes", "two machines"),
    ],
}
"""What is executed by no test, in the order of the pages."""

WITH_CODE = [page for page in PAGES if any(fence.language in CODE for fence in fences(page))]
MODES = [
    *(
        pytest.param(page, False, id=page.name)
        for page in WITH_CODE
        if page.name
        not in ("delay.md", "first-hour.md", "plan.md")  # whose commands take long even so
    ),
    *(
        pytest.param(page, True, id=f"{page.name}-all", marks=pytest.mark.slow)
        for page in WITH_CODE
        if page.name in DEEP
    ),
]


def given(page: Path) -> dict:
    """What a page takes for granted in its parts."""
    if page.name != "pipelines.md":
        return {"__name__": __name__}
    model = jd.models.mlp(2, input_size=4, hidden=4, depth=2, rngs=nnx.Rngs(0))
    batch = {"x": np.ones((4, 4), np.float32), "label": np.array([0, 1, 0, 1])}
    trainer = jd.Trainer(model, jd.methods.get("bp"), jd.optim.sgd(0.1), example=batch)
    return {"trainer": trainer, "state": trainer.init(), "batches": [batch] * 3}


@pytest.mark.parametrize(("page", "deep"), MODES)
def test_snippets_run(page, deep, monkeypatch, tmp_path, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    shell = Shell(monkeypatch, deep=deep)
    names = start = given(page)
    python = page.name not in ELSEWHERE and deep is (page.name in SLOW)
    for fence in fences(page):
        if fence.reason or fence.language not in CODE:
            continue
        if fence.language == "sh":
            for command in commands_of(fence.text):
                shell(command)
            continue
        head = fence.text.partition("\n")[0].removeprefix("# ")
        if head.endswith(".py"):
            Path(head).write_text(fence.text)
        if python:
            text = fence.text
            if "/data/tfds" in text:
                text = text.replace("/data/tfds", str(request.getfixturevalue("tfds_dir")))
            names = run(text, dict(start) if fence.language == "python" else names)
    assert jax.config.read("jax_disable_most_optimizations") is False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_of_a_known_kind(page):
    assert {fence.language for fence in fences(page)} <= {*CODE, *NO_CODE}
    assert page.read_text().count("\n```") == 2 * len(fences(page))


def test_what_is_not_run_is_known():
    found = collections.defaultdict(list)
    for page in PAGES:
        for fence in fences(page):
            if fence.reason:
                found[page.name].append(fence.reason)
    assert found == NOT_RUN


def test_grids_are_what_schedules_print():
    grids = [fence for page in PAGES for fence in fences(page) if fence.language == "grid"]
    assert len(grids) >= 6
    for grid in grids:
        name, stages, microbatches = grid.arguments.split()
        schedule = jd.schedules.build(name, int(stages), int(microbatches))
        assert grid.text == f"{schedule}\n", grid.arguments
