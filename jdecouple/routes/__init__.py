"""Routes: how error reaches a block, as pure functions of one stage."""

from jdecouple.routes.delayed import Delayed
from jdecouple.routes.local import Local
from jdecouple.routes.route import Route, Staleness
from jdecouple.routes.stage import Accumulated, Metrics, Stage, StageState, add
from jdecouple.routes.synchronous import Synchronous
from jdecouple.routes.unit import Message, Unit

__all__ = [
    "Accumulated",
    "Delayed",
    "Local",
    "Message",
    "Metrics",
    "Route",
    "Stage",
    "StageState",
    "Staleness",
    "Synchronous",
    "Unit",
    "add",
]
