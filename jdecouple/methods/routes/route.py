"""What every route offers: two pure functions of a stage, and how late its error comes."""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import optax

from jdecouple.methods.routes.remat import REMATS
from jdecouple.methods.routes.stage import Metrics, Stage, StageState
from jdecouple.methods.routes.unit import Carry

# Moved statistics, metrics, residuals for the backward, the next carry.
Forward = tuple[Any, Metrics, Any, Carry]


class Staleness(NamedTuple):
    """How many updates old are the things that an update of one stage uses.

    Attributes:
        weights: updates of the stage between the weights that the gradient was computed with and
            the weights that it is applied to.
        error: updates of the last stage between the loss that the error comes from and the use of
            the error.
    """

    weights: float
    error: float


class Route(abc.ABC):
    """How error reaches the blocks of a stage."""

    local: ClassVar[bool] = False
    """Whether every block needs a loss of its own."""

    scaling: ClassVar[str] = "stage"
    """Whose gradients a scaled loss may not overflow, for a step to be made; see `Stage`."""

    accumulate: int = 1
    """Backward passes to one optimiser step."""

    rebuilds: ClassVar[bool] = False
    """Whether stages whose blocks have inverses make their inputs of what comes back."""

    may_look_ahead: ClassVar[bool] = True
    """Whether a forward may compute with weights that its optimiser expects."""

    def passes_per_version(self, num_stages: int) -> int | None:
        """Backward passes to a version of the weights, of which a stage keeps that before, too.

        None where the current weights are all that a stage has. Raises ValueError for a number of
        stages that the versions are too short for.
        """
        return None

    @property
    @abc.abstractmethod
    def schedules(self) -> tuple[str, ...]:
        """Names of the schedules that run the route, its own first."""

    @abc.abstractmethod
    def forward(self, stage: Stage, state: StageState, carry: Carry, step_id: jax.Array) -> Forward:
        """Forward of a stage on the carry that it received, which is not yet prepared.

        `step_id` is [batch, microbatch]. Returns moved statistics, metrics, residuals for the
        backward, the next carry.
        """

    @abc.abstractmethod
    def backward(
        self, stage: Stage, state: StageState, residuals: Any, cotangent: Any, step_id: jax.Array
    ) -> tuple[Any, Any]:
        """Backward of a stage, whose state the forward may have seen in an older version.

        `residuals` are what the forward left, `cotangent` is the error from the stage above (None
        on the last stage), `step_id` is [batch, microbatch] of the forward. Returns gradients of
        the units' parameters, and the error for the stage below.
        """

    @property
    def remats(self) -> tuple[str, ...]:
        """What a forward whose backward is to come may keep."""
        return REMATS

    @property
    def automatic_remat(self) -> str:
        """The one of `remats` that a stage has unless another is asked for."""
        return "elementwise" if "elementwise" in self.remats else "none"

    def optimizer(
        self, stage: int, optimizer: optax.GradientTransformation
    ) -> optax.GradientTransformation:
        """The optimiser as stage number `stage` uses it."""
        return optimizer

    def delay(self, stage: int, num_stages: int) -> float:
        """Updates of a stage that the oldest part of its gradients has missed, see `staleness`."""
        return max(self.staleness(stage, num_stages))

    def staleness(self, stage: int, num_stages: int, *, shared: bool = False) -> Staleness:
        """Staleness of what stage number `stage` of `num_stages` updates with.

        Or of what it adds to the update of a parameter that it has `shared` with another stage.
        """
        return Staleness(0.0, 0.0)
