"""What `import jdecouple` leaves alone: packages that take long, and that few programs need."""

import subprocess
import sys

import pytest
import runs
from test_architecture import FILES, imports_of

LATER = {
    *("PIL", "dm_pix", "grain", "matplotlib", "ml_collections", "orbax", "pandas"),
    *("pyarrow", "safetensors", "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets"),
    *("tensorstore", "tokenizers", "torch", "tqdm", "wandb"),
}
TRACKERS = {"tensorboardX": "tensorboard.py", "wandb": "weights_and_biases.py"}


def test_a_fresh_interpreter_imports_little():
    program = (
        "import sys, jdecouple; [getattr(jdecouple, name) for name in jdecouple.__all__]; "
        "print(*sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env=runs.environment(),
        text=True,
    )
    modules = {*found.stdout.split()}
    assert "jdecouple.trainer" in modules
    packages = {name.partition(".")[0] for name in modules}
    assert packages & LATER == set()
    assert not [name for name in modules if name.startswith("jdecouple.train.")]


@pytest.mark.parametrize(("package", "file"), TRACKERS.items())
def test_a_tracker_is_imported_where_it_is_asked_for(package, file):
    """By its name in a table: no module of the package imports its own."""
    found = [edge for path in FILES for edge in imports_of(path)]
    own = f"jdecouple.train.tracking.{file.removesuffix('.py')}"
    assert {edge.source for edge in found if edge.target.split(".")[0] == package} == {own}
    assert not [str(edge) for edge in found if edge.target == own]
