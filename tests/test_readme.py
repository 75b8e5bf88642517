"""The README keeps its word."""

import re
from pathlib import Path

import pytest

import jdecouple as jd

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_library_snippet_runs_and_learns():
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["scores"]["accuracy"] > 0.8
    assert len(names["blocks"]) == 3


def test_methods_table_lists_every_method():
    assert tuple(re.findall(r"^\| `(\w+)` \|", README, re.M)) == jd.methods.names()


@pytest.mark.parametrize("name", jd.methods.names())
def test_staleness_of_the_methods_table(name):
    [cell] = re.findall(rf"^\| `{name}` \|[^|]*\|[^|]*\| ([^|]*) \|", README, re.M)
    found = re.fullmatch(r"weights `(.+)`, error `(.+)`", cell)
    assert found or cell == "0"
    expressions = found.groups() if found else ("0", "0")
    route = jd.methods.get(name).route
    for num_stages in range(1, 6):
        for k in range(num_stages):
            names = {"K": num_stages, "k": k, "accumulate": route.accumulate, "max": max}
            told = tuple(eval(expression, dict(names)) for expression in expressions)
            assert told == route.staleness(k, num_stages), (num_stages, k)


def test_files_that_it_names_exist():
    root = Path(__file__).resolve().parents[1]
    named = re.findall(r"\]\((?!http)([^)#]+)\)|`((?:configs|tests|jdecouple)/[\w./]+\.py)", README)
    for link, code in named:
        assert (root / (link or code)).exists(), link or code
