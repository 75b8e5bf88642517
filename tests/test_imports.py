"""What `import jdecouple` leaves alone: packages that take long, and that few programs need."""

import subprocess
import sys

import runs

LATER = {
    *("PIL", "dm_pix", "grain", "matplotlib", "ml_collections", "orbax", "pandas"),
    *("pyarrow", "safetensors", "sklearn", "tensorflow", "tensorflow_datasets", "tensorstore"),
    *("tokenizers", "torch", "tqdm"),
}


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
