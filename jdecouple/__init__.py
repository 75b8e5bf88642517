"""jdecouple: decoupled training of deep networks, pipelined over a mesh of devices."""

from jdecouple import (
    data,
    diagnostics,
    methods,
    models,
    objectives,
    optim,
    pipeline,
    schedules,
    timeline,
)
from jdecouple.models import Model
from jdecouple.pipeline import make_mesh
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
    "schedules",
    "timeline",
]
