"""Routes: how error reaches a block, as pure functions of one stage."""

from jdecouple.methods.routes import loss_scale
from jdecouple.methods.routes.delayed import Delayed
from jdecouple.methods.routes.double_buffered import DoubleBuffered
from jdecouple.methods.routes.local import Local
from jdecouple.methods.routes.ordering import after
from jdecouple.methods.routes.remat import REMATS, repeated
from jdecouple.methods.routes.reversible import Reversible
from jdecouple.methods.routes.route import Route, Staleness
from jdecouple.methods.routes.stage import (
    Accumulated,
    Metrics,
    Stage,
    StageState,
    add,
    with_whole_norm,
)
from jdecouple.methods.routes.synchronous import Synchronous
from jdecouple.methods.routes.unit import Carry, Unit
from jdecouple.methods.routes.updates import accumulating, averaged

__all__ = [
    "REMATS",
    "Accumulated",
    "Carry",
    "Delayed",
    "DoubleBuffered",
    "Local",
    "Metrics",
    "Reversible",
    "Route",
    "Stage",
    "StageState",
    "Staleness",
    "Synchronous",
    "Unit",
    "accumulating",
    "add",
    "after",
    "averaged",
    "loss_scale",
    "repeated",
    "with_whole_norm",
]
