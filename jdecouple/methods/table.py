"""The table of methods: an objective and a route each."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from jdecouple._errors import choices, require_int, require_one_of
from jdecouple.methods.objectives import (
    AssociatedLearning,
    AugmentedNet,
    AuxiliaryNet,
    CrossEntropy,
    Exits,
    FeatureReconstruction,
    Fronted,
    InformationPropagation,
    InformationRegularization,
    MomentumNet,
    Objective,
    PredictionSimilarity,
    SupervisedContrastive,
)
from jdecouple.methods.routes import (
    Delayed,
    DoubleBuffered,
    Local,
    Reversible,
    Route,
    Synchronous,
)
from jdecouple.models import layers


@dataclasses.dataclass(frozen=True)
class Method:
    """A published way of training: what each block minimises, and how error reaches it.

    Attributes:
        name: what the table calls it.
        objective: what each block minimises.
        route: how error reaches a block.
        init: initial weights of the heads, see `jdecouple.models.layers`.
        attached: how many of the model's last units stand between every block and its head, see
            `jdecouple.methods.objectives.attached_top`; for local routes.
    """

    name: str
    objective: Objective
    route: Route
    init: str = "flax"
    attached: int = 0

    def __post_init__(self) -> None:
        require_one_of(layers.INITS, init=self.init)
        require_int(0, attached=self.attached)
        if not self.attached:
            return
        if not self.route.local:
            raise ValueError(f"attached is {self.attached}: method {self.name} is not local")
        if isinstance(self.objective, Fronted):
            raise ValueError(
                f"attached is {self.attached}: method {self.name} has auxiliary nets of its own"
            )

    @property
    def follows_above(self) -> bool:
        """Whether heads follow the weights of the block above."""
        return self.attached > 0 or getattr(self.objective, "follows_above", False)


class MethodSpec(NamedTuple):
    """What the table says of a method."""

    objective: type
    route: type[Route]
    source: str
    fixed: Mapping[str, Any] = {}
    """Arguments of the route that make the method what it is."""
    options: Mapping[str, Any] = {}
    """Arguments of the route that a caller may set, with the method's defaults."""


_METHODS: dict[str, MethodSpec] = {
    "bp": MethodSpec(CrossEntropy, Synchronous, "end-to-end backpropagation"),
    "early_exit": MethodSpec(Exits, Synchronous, "arXiv:1709.01686"),
    "greedy_exit": MethodSpec(Exits, Local, "arXiv:1812.11446"),
    "deinforeg": MethodSpec(InformationRegularization, Local, "arXiv:2506.18193"),
    "scpl": MethodSpec(SupervisedContrastive, Local, "arXiv:2602.00062"),
    "al": MethodSpec(AssociatedLearning, Local, "arXiv:1906.05560"),
    "dgl": MethodSpec(AuxiliaryNet, Local, "arXiv:1901.08164"),
    "predsim": MethodSpec(PredictionSimilarity, Local, "arXiv:1901.06656"),
    "auglocal": MethodSpec(AugmentedNet, Local, "arXiv:2402.17318"),
    "man": MethodSpec(MomentumNet, Local, "arXiv:2407.05623"),
    "infopro": MethodSpec(InformationPropagation, Local, "arXiv:2101.10832"),
    "lopt": MethodSpec(FeatureReconstruction, Local, "arXiv:2605.04913"),
    "ddg": MethodSpec(
        CrossEntropy,
        Delayed,
        "arXiv:1804.10574",
        {"forward_pass": "locked"},
        {"current_weights": False},
    ),
    "fr": MethodSpec(
        CrossEntropy,
        Delayed,
        "arXiv:1807.04511",
        {"forward_pass": "locked", "replay": True},
        {"first_stage_lr_scale": 1.0},
    ),
    "fdg": MethodSpec(
        CrossEntropy,
        Delayed,
        "arXiv:1906.09108",
        {"forward_pass": "pipelined"},
        {"beta": 1.0, "current_weights": False},
    ),
    "adl": MethodSpec(
        CrossEntropy,
        Delayed,
        "arXiv:2012.03747",
        {"forward_pass": "pipelined"},
        {"accumulate": 4, "beta": 1.0, "accumulate_mean": False, "current_weights": False},
    ),
    "2bw": MethodSpec(CrossEntropy, DoubleBuffered, "arXiv:2006.09503", options={"accumulate": 4}),
    "dsp": MethodSpec(
        CrossEntropy,
        Delayed,
        "arXiv:1909.02625",
        {"forward_pass": "pipelined", "replay": True, "forward_first": True},
    ),
    "petra": MethodSpec(CrossEntropy, Reversible, "arXiv:2406.02052", options={"accumulate": 1}),
}


_BUILT_IN = frozenset(_METHODS)


def register(
    name: str,
    objective: type,
    route: type[Route],
    *,
    source: str = "",
    fixed: Mapping[str, Any] = {},
    options: Mapping[str, Any] = {},
) -> None:
    """Adds a method to the table; `get`, configurations and the command line then know its name.

    A name that was registered before is replaced, so that a notebook's cell may run twice.

    >>> import jdecouple as jd
    >>> jd.methods.register("gpipe", jd.objectives.CrossEntropy, jd.routes.Synchronous)
    >>> jd.methods.get("gpipe").objective
    CrossEntropy()

    Args:
        name: what the method is called.
        objective: a dataclass that satisfies `jdecouple.objectives.Objective`; its fields are the
            arguments of the method.
        route: a class of `jdecouple.routes`, or one of your own.
        source: where the method was published.
        fixed: arguments of the route that make the method what it is.
        options: arguments of the route that a caller may set, with the method's defaults.

    Raises:
        ValueError: the name is a built-in method's, or two arguments have one name.
        TypeError: the objective is no dataclass, or the route is no `Route`.
    """
    if name in _BUILT_IN:
        raise ValueError(f"method {name!r} is built in: register yours under another name")
    if not (isinstance(objective, type) and dataclasses.is_dataclass(objective)):
        raise TypeError(f"the objective of method {name!r} must be a dataclass, got {objective!r}")
    if not (isinstance(route, type) and issubclass(route, Route)):
        raise TypeError(f"the route of method {name!r} must be a Route class, got {route!r}")
    fields = {field.name for field in dataclasses.fields(objective)}
    if taken := sorted(
        fields & {"name", "init", "attached", *fixed, *options} | {*fixed} & {*options}
    ):
        raise ValueError(f"method {name!r} has two arguments called {taken[0]!r}")
    _METHODS[name] = MethodSpec(objective, route, source, fixed, options)


def names() -> tuple[str, ...]:
    """Names that `get` takes."""
    return tuple(_METHODS)


def spec(name: str) -> MethodSpec:
    """What the table says of a method.

    Raises:
        ValueError: unknown method.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}: {choices(name, _METHODS)}")
    return _METHODS[name]


def source(name: str) -> str:
    """Where a method was published."""
    return spec(name).source


def arguments(name: str) -> dict[str, Any]:
    """Arguments of a method with their defaults: the objective's, the route's, `init`.

    Local methods whose heads have no layers of their own in front have `attached`, too.

    >>> arguments("fdg")
    {'beta': 1.0, 'current_weights': False, 'init': 'flax'}

    Raises:
        ValueError: unknown method.
    """
    method = spec(name)
    parameters = inspect.signature(method.objective).parameters.values()
    own = {parameter.name: parameter.default for parameter in parameters}
    shared: dict[str, Any] = {"init": Method.init}
    if method.route.local and not hasattr(method.objective, "front"):
        shared["attached"] = Method.attached
    return {**own, **method.options, **shared}


def get(name: str, *, init: str = "flax", attached: int = 0, **arguments: Any) -> Method:
    """Builds a method.

    >>> method = get("adl", accumulate=2)
    >>> method.route.accumulate, method.objective
    (2, CrossEntropy())

    Args:
        name: one of `names()`.
        init: initial weights of the heads, see `jdecouple.models.layers`.
        attached: Last units of the model that stand between every block and its head, for local
            methods; 0 for none. Their weights follow the model's, a batch late for every block
            between.
        **arguments: arguments of its objective and its route, see `arguments(name)`.

    Raises:
        ValueError: an unknown method, or an argument out of range.
        TypeError: an argument that the method does not have.
    """
    method = spec(name)
    own = [field.name for field in dataclasses.fields(method.objective)]
    for key in arguments:
        if key not in (known := [*own, *method.options, "init", "attached"]):
            raise TypeError(f"method {name} takes no argument {key!r}: {choices(key, known)}")
    objective = {key: arguments[key] for key in own if key in arguments}
    route = {key: arguments.get(key, default) for key, default in method.options.items()}
    built = method.objective(**objective), method.route(**method.fixed, **route)
    return Method(name, *built, init, attached)
