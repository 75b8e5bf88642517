"""How tests run a notebook: from top to bottom, small, on CPU devices.

Tags of a cell say what a test does with it, as papermill's do. `parameters`: its names get other
values, in a cell that is put behind it. `install`: it is left out.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from runs import environment

SECONDS = 900  # after which a cell that does not end is a failure


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook, as it is stored."""
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    """Its cells with a tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def parameters(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Names and values of its one cell of parameters, which only assigns constants."""
    (cell,) = tagged(notebook, "parameters")
    assigned = [(node.targets, node.value) for node in ast.parse(cell.source).body]
    return {name.id: ast.literal_eval(value) for (name,), value in assigned}


def execute(
    path: Path, values: Mapping[str, Any], folder: Path, devices: int = 1
) -> nbformat.NotebookNode:
    """Runs a notebook in a kernel of its own.

    Args:
        path: The notebook.
        values: Values of some of its parameters.
        folder: Working directory of the kernel.
        devices: Number of CPU devices that the kernel sees.

    Returns:
        The notebook with its outputs.

    Raises:
        CellExecutionError: A cell raised.
    """
    notebook = read(path)
    assert values.keys() <= parameters(notebook).keys()
    (settings,) = tagged(notebook, "parameters")
    replaced = nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in values.items()))
    notebook.cells.insert(notebook.cells.index(settings) + 1, replaced)
    install = tagged(notebook, "install")
    notebook.cells = [cell for cell in notebook.cells if cell not in install]
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where)
    client.execute(env=environment(devices))
    return notebook
