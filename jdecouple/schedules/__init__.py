"""Action tables of one global batch: built by name, validated, printed as a grid. No JAX."""

from jdecouple.schedules.generators import build, names
from jdecouple.schedules.schedule import Action, Call, Kind, Schedule, Waiting

__all__ = ["Action", "Call", "Kind", "Schedule", "Waiting", "build", "names"]
