"""Pages as a browser shows them: nothing is asked for, all is drawn, and what is chosen is seen."""

import functools
import re
from pathlib import Path

import pytest
import runs
from browser import REQUIRED, check, find_faults, opened, started, take_pictures
from PIL import Image

from jdecouple.train.loop import train_and_evaluate
from jdecouple.train.pages import compare, page, report
from jdecouple.train.pages.charts import Chart, Curve

DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
FAULTS = """
<img alt="a sound one" src="{dot}" width="9" height="9">
<img alt="from elsewhere" src="https://example.invalid/a.png">
<img alt="broken" src="data:image/png;base64,AAAA" width="9" height="9">
<svg aria-label="empty" width="9" height="9"></svg>
<svg aria-label="flat" width="9" height="0"><path d="M0 0H9V9"/></svg>
<svg aria-label="short" width="40" height="20"><text x="30" y="15">beyond</text></svg>
<details><summary>more</summary><img alt="broken inside" src="data:,"></details>
<p style="color: #777">faint</p>
<div style="width: 1500px">wide</div>
<script>fetch("https://example.invalid/data"); undefinedName();</script>
"""


def written(folder, markup="", policy=True):
    """A page with a chart, a fold and some more markup."""
    chart = Chart("Loss", [Curve("a run", [1, 2, 3], [3.0, 2.0, 2.5], "var(--colour-0)")])
    pieces = [page.Note("Mind this."), chart, page.Fold("More", [page.Code("a text", "x" * 500)])]
    text = page.render("A page", [page.Section("Part", pieces)])
    text = text.replace("</main>", markup + "</main>")
    if not policy:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy".*>', "", text)
    path = folder / "page.html"
    path.write_text(text)
    return path


def test_without_a_browser_tests_are_skipped_and_fail_in_ci(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    none = "none of chromium, chromium-browser, google-chrome is installed"
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=none):
        next(started())
    monkeypatch.setenv(REQUIRED, "required")
    with pytest.raises(pytest.fail.Exception, match=none):
        next(started())


def test_a_sound_page_has_no_fault(browser, tmp_path):
    path = written(tmp_path)
    assert find_faults(browser, path) == []
    taken = take_pictures(browser, path, tmp_path / "pictures")
    sizes = {file.name: Image.open(file).size[0] for file in taken}
    assert sizes == {
        "page-1280-light.png": 1280,
        "page-1280-dark.png": 1280,
        "page-390-light.png": 390,
        "page-390-dark.png": 390,
    }
    light, dark = (Image.open(taken[k]).convert("L").getpixel((2, 2)) for k in (0, 1))
    assert light > 200
    assert dark < 60


def test_every_fault_is_found(browser, tmp_path):
    """Or no test below could fail."""
    found = find_faults(browser, written(tmp_path, FAULTS.format(dot=DOT), policy=False))
    wheres = [f"{w} pixels wide, {s}" for s in ("light", "dark") for w in (1280, 390)]
    pictures = ("from elsewhere", "broken", "empty", "flat", "broken inside")
    wanted = {
        "a request: https://example.invalid/a.png",
        "a request: https://example.invalid/data",
        "a script fails: undefinedName is not defined",
        *(f"not drawn, {where}: {name}" for where in wheres for name in pictures),
        *(f"cut off, {where}: beyond" for where in wheres),
    }
    rest = sorted({*found} - wanted)
    assert wanted <= {*found}, rest
    shapes = [re.sub(r" \([\d.]+\)$|^\d+ ", "", fault) for fault in rest]
    assert sorted(shapes) == [
        "a script fails: Failed to fetch",
        "hard to read, dark: faint",
        "hard to read, light: faint",
        "on the console: Failed to load resource: net::ERR_INTERNET_DISCONNECTED",
        *sorted(f"pixels too wide, {where}" for where in wheres),
    ]


def test_what_the_policy_blocks_is_a_fault(browser, tmp_path):
    found = find_faults(browser, written(tmp_path, FAULTS.format(dot=DOT)))
    assert [fault for fault in found if fault.startswith("policy")] == [
        "policy: img-src blocks https://example.invalid/a.png",
        "policy: script-src-elem blocks inline",
    ]


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Gives a short run of one of three methods, which the first call trains."""
    folder = tmp_path_factory.mktemp("runs")
    given = {"epochs": 2, "log_every": 3, "checkpoint__every": 9}
    configs = {
        "bp": runs.cheap(**given),
        "deinforeg": runs.tiny(**given),
        "greedy_exit": runs.cheap(method__name="greedy_exit", **given),
    }

    @functools.cache
    def run(name: str) -> Path:
        train_and_evaluate(configs[name], folder / name)
        return folder / name

    return lambda number: run([*configs][number])


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (0, ["--noevaluate"]),
        pytest.param(1, [], marks=pytest.mark.slow),
        pytest.param(2, ["--noevaluate"], marks=pytest.mark.slow),
    ],
)
def test_report(browser, workdirs, number, options, tmp_path):
    report.main([str(workdirs(number)), "--output", str(tmp_path / "report.html"), *options])
    check(browser, tmp_path / "report.html")


@pytest.mark.slow
def test_compare(browser, workdirs, tmp_path):
    path = tmp_path / "compare.html"
    compare.main([*map(str, map(workdirs, range(3))), "--output", str(path), "--by=examples"])
    check(browser, path)
    with opened(browser, path) as shown:

        def seen():
            return {*shown.locator("svg:visible text:last-of-type").all_text_contents()}

        assert seen() == {"examples"}
        before = shown.locator("svg[role=img]:visible").count()
        shown.get_by_role("radio", name="seconds").check()
        assert seen() == {"seconds of training"}
        shown.get_by_role("radio", name="step").check()
        assert seen() == {"step"}
        shown.get_by_text(re.compile("^Metrics of blocks and exits")).click()
        assert shown.locator("svg[role=img]:visible").count() > before
        assert seen() == {"step"}
        assert shown.faults == []
