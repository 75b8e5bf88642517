"""Action tables of one global batch: built by name, validated, drawn, simulated. No JAX."""

from jdecouple.schedules.generators import build, names
from jdecouple.schedules.schedule import Action, Call, Kind, Schedule, Waiting
from jdecouple.schedules.simulation import Costs, Simulation, Span, simulate

__all__ = [
    "Action",
    "Call",
    "Costs",
    "Kind",
    "Schedule",
    "Simulation",
    "Span",
    "Waiting",
    "build",
    "names",
    "simulate",
]
