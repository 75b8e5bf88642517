"""jdecouple: decoupled training of deep networks, pipelined over a mesh of devices."""

from importlib.metadata import PackageNotFoundError, version

from jdecouple import data, growth, inference, methods, models, optim, pipeline, schedules
from jdecouple.inference.load import load
from jdecouple.methods import objectives, routes
from jdecouple.models import Model
from jdecouple.pipeline import diagnostics, make_mesh
from jdecouple.trainer import Trainer

try:
    __version__ = version("jdecouple")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "unknown"

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
