"""How the house is built: imports go one way, without a circle, and files stay small.

The source is parsed and never imported, so that a line under `TYPE_CHECKING` or inside a function
counts like any other.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jdecouple"
MOST_LINES = 450
MOST_NAMES = 16

LAYERS: dict[str, set[str]] = {
    "_errors": set(),
    "_files": {"_errors"},
    "data": {"_errors"},
    "optim": {"_errors"},
    "models": {"_errors"},
    "schedules": {"_errors"},
    "methods": {"_errors", "models"},
    "pipeline": {"_errors", "models", "methods", "schedules"},
    "checkpoint": {"_errors", "_files", "pipeline"},
    "trainer": {"_errors", "models", "methods", "schedules", "pipeline", "checkpoint"},
    "growth": {"_errors", "models", "methods", "pipeline", "trainer"},
    "inference": {
        "_errors",
        "_files",
        "data",
        "models",
        "methods",
        "pipeline",
        "trainer",
        "checkpoint",
        "growth",
    },
}
"""What each entry of the package may import of the others. `train` may import them all."""
LAYERS["train"] = set(LAYERS)
LAYERS["__main__"] = {"train"}
LAYERS["__init__"] = set(LAYERS) - {"train", "__main__"}

WITHOUT_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"}


class Import(NamedTuple):
    """An import of one module by another, both by their dotted names."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}, imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands; of a name in a module, that module."""
    source = module_name(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}, line {node.lineno}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                target = submodule if submodule in MODULES else str(node.module)
                yield Import(source, target, node.lineno)


@functools.cache
def internal() -> tuple[Import, ...]:
    """Imports of one module of the package by another."""
    return tuple(
        edge for path in FILES for edge in imports_of(path) if edge.target.startswith("jdecouple")
    )


def layer(module: str) -> str:
    """The entry of the package that a module belongs to; "__init__" for the package itself."""
    return [*module.split("."), "__init__"][1]


def test_every_entry_of_the_package_has_its_layer():
    assert {layer(module) for module in MODULES} == set(LAYERS)


def test_imports_go_one_way():
    wrong = [
        str(edge)
        for edge in internal()
        if layer(edge.target) not in {*LAYERS[layer(edge.source)], layer(edge.source)}
    ]
    assert not wrong, "\n".join(wrong)


def test_layers_have_no_circle():
    """The table above is itself an order."""
    done: set[str] = set()
    while len(done) < len(LAYERS):
        ready = {name for name, below in LAYERS.items() if below <= done} - done
        assert ready, set(LAYERS) - done
        done |= ready


def test_modules_have_no_circle():
    below: dict[str, list[Import]] = {module: [] for module in MODULES}
    for edge in internal():
        if edge.target in MODULES and edge.target != "jdecouple":
            below[edge.source].append(edge)
    done: set[str] = set()

    def visit(module: str, path: tuple[Import, ...]) -> None:
        open_modules = [edge.source for edge in path]
        if module in open_modules:
            circle = path[open_modules.index(module) :]
            pytest.fail("a circle:\n" + "\n".join(map(str, circle)))
        if module not in done:
            for edge in below[module]:
                visit(edge.target, (*path, edge))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_module_imports_a_package_that_it_is_in():
    """That package is half built while the module is read."""
    wrong = [
        str(edge)
        for edge in internal()
        if f"{edge.source}.".startswith(f"{edge.target}.") and edge.source != edge.target
    ]
    assert not wrong, "\n".join(wrong)


def test_schedules_know_no_jax():
    wrong = [
        str(edge)
        for path in FILES
        if layer(module_name(path)) == "schedules"
        for edge in imports_of(path)
        if edge.target.split(".")[0] in WITHOUT_JAX
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_runs_without_the_options_of_the_compiler():
    """`pipeline.mesh.jit` gives them; `jax.jit(...).lower` reads a program that never runs, and so
    does `stablehlo.export`, whose script gives its own; `inline` makes a part of another.
    """
    wrong = []
    for path in FILES:
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        read = {
            node.value.func
            for node in nodes
            if isinstance(node, ast.Attribute)
            and node.attr == "lower"
            and isinstance(node.value, ast.Call)
        }
        read |= {
            node.func
            for node in nodes
            if isinstance(node, ast.Call) and any(word.arg == "inline" for word in node.keywords)
        }
        read |= {
            node.args[0].func
            for node in nodes
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) == "stablehlo.export"
            and isinstance(node.args[0], ast.Call)
        }
        wrong += [
            f"{module_name(path)}, line {node.lineno}"
            for node in nodes
            if isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("jax.jit", "jax.pmap", "nnx.jit", "nnx.pmap")
            and node not in read
            and module_name(path) not in ("jdecouple.pipeline.mesh", "jdecouple.inference.serve")
        ]
    assert not wrong, "\n".join(wrong)


def test_the_root_of_the_package_is_short():
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert len(entries) <= MOST_NAMES, entries


@pytest.mark.parametrize("folder", ["jdecouple", "tests", "bench", "configs"])
def test_no_file_is_long(folder):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    long = {path: lines for path, lines in lengths.items() if lines > MOST_LINES}
    assert not long
