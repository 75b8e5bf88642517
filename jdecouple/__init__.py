"""jdecouple: decoupled training of deep networks, pipelined over a mesh of devices."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdecouple import data, growth, inference, methods, models, optim, pipeline, schedules
    from jdecouple.inference.load import load
    from jdecouple.methods import objectives, routes
    from jdecouple.models import Model
    from jdecouple.pipeline import diagnostics, make_mesh
    from jdecouple.trainer import Trainer

    __version__: str

__all__ = [
    "Model",
    "Trainer",
    "__version__",
    "data",
    "diagnostics",
    "growth",
    "inference",
    "load",
    "make_mesh",
    "methods",
    "models",
    "objectives",
    "optim",
    "pipeline",
    "routes",
    "schedules",
]

_PLACES = {
    "Model": "jdecouple.models",
    "Trainer": "jdecouple.trainer",
    "diagnostics": "jdecouple.pipeline",
    "load": "jdecouple.inference.load",
    "make_mesh": "jdecouple.pipeline",
    "objectives": "jdecouple.methods",
    "routes": "jdecouple.methods",
}


def __getattr__(name: str) -> Any:
    """Imports a name at its first use: JAX takes a second, which `--version` can do without."""
    if name == "__version__":
        value: Any = _version()
    elif name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
    elif name in __all__ or name in ("checkpoint", "trainer"):
        value = importlib.import_module(f"jdecouple.{name}")
    else:
        raise AttributeError(f"module 'jdecouple' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jdecouple")
    except PackageNotFoundError:  # a checkout on the path that was never installed
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
