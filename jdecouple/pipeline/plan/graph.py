"""What a traced call computes, as operations on values of so many bytes.

XLA's compiler is not asked. What it does on CPUs to the operations of a call is done here in short:
operations that go element by element are computed where their result is used, and no array holds
it, unless several users or a product need it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

_SAME = {  # no computation: the same bytes
    "bitcast_convert_type",
    "copy",
    "copy_p",
    "device_put",
    "expand_dims",
    "name",
    "optimization_barrier",
    "pvary",
    "random_unwrap",
    "random_wrap",
    "reduce_precision",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "stop_gradient",
}
_MOVES = {  # elements are taken from elsewhere
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "gather",
    "iota",
    "pad",
    "rev",
    "slice",
    "split",
    "transpose",
}
_REDUCES = {
    "argmax",
    "argmin",
    "reduce_and",
    "reduce_max",
    "reduce_min",
    "reduce_or",
    "reduce_prod",
    "reduce_sum",
}
_DEAR = {"erf", "erf_inv", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "tanh"}
_WHOLE = {  # neither element by element nor one of the above
    "conv_general_dilated",
    "cumsum",
    "dot_general",
    "dynamic_update_slice",
    "random_bits",
    "random_fold_in",
    "random_seed",
    "random_split",
    "ragged_dot_general",
    "reduce_window_max",
    "reduce_window_sum",
    "scatter",
    "scatter-add",
    "scatter_add",
    "select_and_gather_add",
    "select_and_scatter_add",
    "sort",
    "threefry2x32",
    "top_k",
}


class Op(NamedTuple):
    """One operation.

    Attributes:
        name: that of JAX.
        kind: "whole" (its inputs and its results are in memory), "reduce" (its results are), or
            "each" and "move" (computed where they are used; "each" element by element).
        inputs: numbers of the values that it reads.
        outputs: numbers of its results.
        inner: bytes that it needs beside both while it runs.
        reads: whether the inputs of a "reduce" have to be in memory.
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    inner: int = 0
    reads: bool = True


class Graph(NamedTuple):
    """The operations of a call in the order of the program.

    Attributes:
        ops: all that a result depends on.
        sizes: bytes of every value.
        ranks: its number of axes.
        inputs: numbers of the arguments.
        outputs: numbers of the results; None for a constant.
    """

    ops: list[Op]
    sizes: list[int]
    ranks: list[int]
    inputs: list[int]
    outputs: list[int | None]

    @property
    def results(self) -> list[int]:
        """The results that are no constants."""
        return [value for value in self.outputs if value is not None]


def size_of(leaf: Any) -> int:
    """Bytes of an array of a shape and a dtype."""
    dtype = leaf.dtype
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return math.prod(leaf.shape) * 8
    return math.prod(leaf.shape) * np.dtype(dtype).itemsize


def graph_of(closed: ClosedJaxpr, platform: str, peak: Callable[[Graph], int]) -> Graph:
    """The operations of a traced function, with all functions that it calls.

    `peak` counts the bytes that the body of a loop or a branch needs.
    """
    builder = _Builder(platform, peak)
    inputs = [builder.new(variable.aval) for variable in closed.jaxpr.invars]
    outputs = builder.trace(closed.jaxpr, [None] * len(closed.jaxpr.constvars), inputs)
    return Graph(_needed(builder.ops, outputs), builder.sizes, builder.ranks, inputs, outputs)


class _Builder:
    def __init__(self, platform: str, peak: Callable[[Graph], int]):
        self.ops: list[Op] = []
        self.sizes: list[int] = []
        self.ranks: list[int] = []
        self._platform, self._peak = platform, peak
        self._index: dict[int, int | None] = {}

    def new(self, aval: Any) -> int:
        self.sizes.append(size_of(aval))
        self.ranks.append(len(aval.shape))
        return len(self.sizes) - 1

    def trace(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[int | None]:
        """Adds the operations of a function; the numbers of its results, None for constants."""
        values: dict[Any, int | None] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)
        branch: dict[Any, int] = {}  # indices of platforms
        for equation in jaxpr.eqns:
            read = [None if isinstance(v, Literal) else values[v] for v in equation.invars]
            if equation.primitive.name == "platform_index":
                branch[equation.outvars[0]] = self._branch(equation.params["platforms"])
                values[equation.outvars[0]] = None
                continue
            first = next(iter(equation.invars), None)
            is_cond = equation.primitive.name == "cond" and not isinstance(first, Literal)
            chosen = branch.get(first) if is_cond else None
            found = self._equation(equation, read, chosen)
            values |= zip(equation.outvars, found, strict=True)
        return [None if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    def _branch(self, platforms: Any) -> int:
        for number, names in enumerate(platforms):
            if names is None or self._platform in names:
                return number
        raise ValueError(f"no branch for platform {self._platform}")

    def _equation(self, equation: Any, read: list, chosen: int | None) -> list[int | None]:
        name, params = equation.primitive.name, equation.params
        if chosen is not None:
            body = params["branches"][chosen]
            return self.trace(body.jaxpr, [None] * len(body.jaxpr.constvars), read[1:])
        if name == "cond":
            return self._whole(equation, read, self._most(params["branches"]))
        if name == "while":
            return self._whole(equation, read, self._most([params["body_jaxpr"]]))
        if name == "scan":
            return self._whole(equation, read, self._most([params["jaxpr"]]))
        if (body := _called(params)) is not None:
            return self.trace(body.jaxpr, [None] * len(body.jaxpr.constvars), read)
        sizes = [size_of(variable.aval) for variable in equation.outvars]
        if name in _SAME or (name == "broadcast_in_dim" and read and self._same(read[0], sizes)):
            return read[: len(sizes)]
        inputs = tuple(value for value in read if value is not None)
        outputs = [self.new(variable.aval) for variable in equation.outvars]
        kind, reads = _kind(equation)
        self.ops.append(Op(name, kind, inputs, tuple(outputs), 0, reads))
        return list(outputs)

    def _same(self, value: int | None, sizes: list[int]) -> bool:
        return value is not None and self.sizes[value] == sizes[0]

    def _whole(self, equation: Any, read: list, inner: int) -> list[int | None]:
        outputs = [self.new(variable.aval) for variable in equation.outvars]
        inputs = tuple(value for value in read if value is not None)
        name = equation.primitive.name
        self.ops.append(Op(name, "whole", inputs, tuple(outputs), inner))
        return list(outputs)

    def _most(self, bodies: Sequence[Any]) -> int:
        return max(self._peak(graph_of(body, self._platform, self._peak)) for body in bodies)


def _called(params: dict[str, Any]) -> ClosedJaxpr | None:
    """The function that an operation calls, if that is all it does."""
    for key in ("call_jaxpr", "jaxpr", "fun_jaxpr"):
        body = params.get(key)
        if body is None:
            continue
        return body if hasattr(body, "jaxpr") else ClosedJaxpr(body, ())
    return None


def _kind(equation: Any) -> tuple[str, bool]:
    name = equation.primitive.name
    if name in _REDUCES:
        shape, axes = equation.invars[0].aval.shape, equation.params["axes"]
        wide = [axis for axis, size in enumerate(shape) if size > 1]
        return "reduce", bool(wide) and wide[-1] not in axes
    if name in _MOVES:
        return "move", False
    if name in _WHOLE:
        return "whole", True
    return ("dear" if name in _DEAR else "each"), False


def _needed(ops: list[Op], outputs: Sequence[int | None]) -> list[Op]:
    """The operations that a result depends on."""
    needed = {value for value in outputs if value is not None}
    kept = []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            needed.update(op.inputs)
            kept.append(op)
    return kept[::-1]
