"""Routes: how error reaches a block, as pure functions of one stage."""

from jdecouple.routes.local import Local
from jdecouple.routes.stage import Accumulated, Metrics, Route, Stage, StageState, add
from jdecouple.routes.synchronous import Synchronous
from jdecouple.routes.unit import Message, Unit

__all__ = [
    "Accumulated",
    "Local",
    "Message",
    "Metrics",
    "Route",
    "Stage",
    "StageState",
    "Synchronous",
    "Unit",
    "add",
]
