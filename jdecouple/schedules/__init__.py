"""Action tables of one global batch: built by name, validated, drawn, simulated. No JAX."""

from jdecouple.schedules.drawing import draw
from jdecouple.schedules.generators import build, names
from jdecouple.schedules.schedule import Action, Call, InFlight, Kind, Schedule
from jdecouple.schedules.simulation import Costs, Simulation, Span, simulate

__all__ = [
    "Action",
    "Call",
    "Costs",
    "InFlight",
    "Kind",
    "Schedule",
    "Simulation",
    "Span",
    "build",
    "draw",
    "names",
    "simulate",
]
