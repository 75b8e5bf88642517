"""A run over a mesh of devices: placement, partition, engines and evaluation."""

from jdecouple.pipeline import diagnostics, distributed
from jdecouple.pipeline.mesh import StageMesh, make_mesh
from jdecouple.pipeline.partition import Proposal, autoplace

__all__ = ["Proposal", "StageMesh", "autoplace", "diagnostics", "distributed", "make_mesh"]
