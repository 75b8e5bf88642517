"""What the notebooks' installation changes on Colab and Kaggle, by the versions that they ship.

`tests/platforms/` lists these. An environment gets no more than their metadata, for which pip
believes that they are installed. Needs a package index.
"""

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import notebooks
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "jdecouple[cuda12] @ git+https://github.com/jdecouple/jdecouple"
REPLACED = {"jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "flax"}
ADDED = {"jdecouple", "dm-pix", "chex", "ml-collections"}
PYTHON = {"colab": "3.13", "kaggle": "3.12"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="both platforms run Linux"),
]


def normal(name: str) -> str:
    """A package's name as the index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def plan(*arguments: str, python: str = sys.executable) -> dict[str, dict[str, Any]]:
    """Metadata, by name, of the packages that `pip install` would install for an interpreter."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--quiet"]
    with tempfile.NamedTemporaryFile() as report:
        options = ["--report", report.name, *arguments]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = [entry["metadata"] for entry in json.load(report)["install"]]
    return {normal(package["name"]): package for package in found}


def pretend(environment: Path, package: dict[str, Any]) -> None:
    """Makes pip believe that an environment has a package."""
    (site,) = environment.glob("lib/python*/site-packages")
    name = normal(package["name"]).replace("-", "_")
    folder = site / f"{name}-{package['version']}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {package['name']}", f"Version: {package['version']}"]
    lines += [f"Requires-Dist: {needed}" for needed in package.get("requires_dist", ())]
    lines += [f"Provides-Extra: {extra}" for extra in package.get("provides_extra", ())]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / "RECORD").touch()


def asked(notebook: Path) -> list[str]:
    """What the installation cell of a notebook asks pip for, with this checkout as the package."""
    (cell,) = notebooks.tagged(notebooks.read(notebook), "install")
    *lines, magic = cell.source.replace("\\\n", " ").splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    words = shlex.split(re.sub(r"\$(\w+)", lambda found: names[found[1]], magic))
    assert words[:3] == ["%pip", "install", "-q"]
    assert SOURCE in words
    return [
        f"jdecouple[cuda12] @ {ROOT.as_uri()}" if word == SOURCE else word for word in words[3:]
    ]


def broken(
    present: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]], python: str
) -> list[str]:
    """What packages that stay need of those that change, and would not have."""
    found = []
    for name in present.keys() - changes.keys():
        for needed in map(Requirement, present[name].get("requires_dist", ())):
            asks = needed.marker is None or needed.marker.evaluate({"python_version": python})
            package = changes.get(normal(needed.name))
            if asks and package and not needed.specifier.contains(package["version"]):
                found.append(f"{name}: {needed}, not {package['version']}")
    return found


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_changes_no_more_than_jax_and_flax(notebook, tmp_path, monkeypatch):
    platform = notebook.stem.split("_")[0]
    text = (ROOT / "tests" / "platforms" / f"{platform}.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.M))
    for_python = ("--python-version", PYTHON[platform])
    given = [f"{name}=={version}" for name, version in pins.items()]
    present = plan("--no-deps", "--ignore-installed", *for_python, *given)
    venv.create(tmp_path, with_pip=False)
    for package in present.values():
        pretend(tmp_path, package)
    monkeypatch.setattr(importlib.metadata, "version", pins.__getitem__)
    options = ["--only-binary=:all:", *for_python, *asked(notebook)]
    changes = plan(*options, python=str(tmp_path / "bin" / "python"))
    assert changes.keys() & pins.keys() == REPLACED
    assert changes.keys() - pins.keys() == ADDED
    assert not broken(present, changes, PYTHON[platform])
