"""jdecouple: decoupled training of deep networks, pipelined over a mesh of devices."""

from jdecouple import data, methods, models, optim, pipeline, schedules
from jdecouple.methods import objectives, routes
from jdecouple.models import Model
from jdecouple.pipeline import diagnostics, make_mesh
from jdecouple.trainer import Trainer

__all__ = [
    "Model",
    "Trainer",
    "data",
    "diagnostics",
    "make_mesh",
    "methods",
    "models",
    "objectives",
    "optim",
    "pipeline",
    "routes",
    "schedules",
]
