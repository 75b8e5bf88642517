"""Eight CPU devices, a persistent compilation cache and the fixtures that tests share."""

import gc
import importlib
import itertools
import os
import secrets
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    # Compilation is most of the suite's time: these two halve it.
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones abort on the unknown flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# Without costly optimisations compilation takes half of what is left; 0 compiles all as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JDECOUPLE_TOKEN", secrets.token_hex())  # or home would be written to
gc.set_threshold(100_000, 20, 100)  # tracing makes many small objects: a sixth of the time was this

import jax  # noqa: E402
import pytest  # noqa: E402

_FILES = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def _compiled_functions_are_forgotten():
    """Else all of them would lie in memory; not behind every file, which would compile all anew."""
    yield
    if next(_FILES) % 10 == 0:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def module_x64():
    """Double precision for a whole file."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def optimized():
    """Compilation as users have it, for a whole file."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()  # these do not know about the option
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _pictures_stay_blank():
    """See `blank`."""
    import blank

    blank.install()


@pytest.fixture
def drawn(monkeypatch):
    """Pictures as users have them."""
    import blank

    monkeypatch.setattr(blank.pictures, "save", blank.DRAWN)


@pytest.fixture
def tfds_dir() -> Path:
    """Folder of prepared TFDS data sets; tests that need it are skipped without it."""
    assets = Path(os.environ.get("JDECOUPLE_TEST_ASSETS", REPOSITORY.parent / "shared"))
    folder = assets / "data" / "tfds"
    if not folder.is_dir():
        pytest.skip(f"no prepared data sets under {folder} (set JDECOUPLE_TEST_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; tests that need it are skipped without one, see `browser`."""
    from browser import started

    yield from started()


@pytest.fixture(autouse=True)
def _registries_as_they_were(monkeypatch):
    """What a test registers, its end forgets."""
    for module, table in (
        ("methods.table", "_METHODS"),
        ("models", "_BUILDERS"),
        ("data.loaders", "_LOADERS"),
    ):
        name = f"jdecouple.{module}"
        monkeypatch.setattr(f"{name}.{table}", dict(getattr(importlib.import_module(name), table)))
