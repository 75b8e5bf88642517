"""A computation in two parts: what one of its results needs now, and the rest for later."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.tree_util import Partial

# What holds other operations and adds nothing to them, by the parameter that they stand in.
_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}
_DEAR = {"conv_general_dilated", "ragged_dot_general", "scan", "while"}


def defer(function: Callable, *arguments: Any) -> tuple[Any, Partial]:
    """Computes one of two results now; the other is computed when it is asked for.

    What the first needs is computed at once, and nothing twice. What only the second needs is left
    for later, but for cheap operations after which less has to be kept, such as sums. Functions
    within functions are taken apart, those of `jax.checkpoint` too; a loop or a branch stays whole.

    >>> import jax.numpy as jnp
    >>> def products(x, y):
    ...     return x @ y, x + y
    >>> now, later = defer(products, jnp.eye(2), jnp.ones((2, 2)))
    >>> now.sum(), later().sum()
    (Array(6., dtype=float32), Array(4., dtype=float32))

    Args:
        function: pure function of arrays, which returns (later, now).
        arguments: its arguments, trees of arrays.

    Returns:
        The result now, and a function without arguments for the other. It is a tree of the arrays
        that it needs, so that one compiled call may return it and another take it.
    """
    leaves, structure = jax.tree.flatten(arguments)
    closed, shapes = jax.make_jaxpr(
        lambda *leaves: function(*jax.tree.unflatten(structure, leaves)), return_shape=True
    )(*leaves)
    flat = jax.make_jaxpr(functools.partial(_inlined, closed))(*leaves)
    late, soon = map(jax.tree.structure, shapes)
    count = len(jax.tree.leaves(shapes[0]))
    outputs = flat.jaxpr.outvars
    second, first = outputs[:count], outputs[count:]
    given = [*flat.jaxpr.constvars, *flat.jaxpr.invars]
    now, later = _parted(flat.jaxpr.eqns, first, second)
    made = {variable for equation in later for variable in equation.outvars}
    crossing = [v for v in dict.fromkeys(_read(later, second)) if v not in made]
    values = _function(flat, given, [*first, *crossing], now)(*flat.consts, *leaves)
    rest = _function(flat, crossing, second, later)

    def run(*crossing: Any) -> Any:
        return jax.tree.unflatten(late, rest(*crossing))

    return jax.tree.unflatten(soon, values[: len(first)]), Partial(run, *values[len(first) :])


def _inlined(closed: ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Evaluates a function of which no part is one of `_CALLS`."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        body = equation.params.get(_CALLS.get(equation.primitive.name, ""))
        if body is None:
            operands = list(dict.fromkeys(_variables(equation.invars)))
            call = _function(closed, operands, equation.outvars, [equation])
            results = call(*map(read, operands))
        else:
            body = body if hasattr(body, "consts") else ClosedJaxpr(body, ())
            results = _inlined(body, *map(read, equation.invars))
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _function(like: ClosedJaxpr, inputs: Sequence, outputs: Sequence, equations: list) -> Callable:
    jaxpr = like.jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=equations)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))


def _parted(equations: Sequence, first: Iterable, second: Sequence) -> tuple[list, list]:
    """The equations for now and for later, each in order; those that nothing needs are left out."""
    now, rest = _needed(equations, first, lambda equation: bool(equation.effects))
    later, _ = _needed(rest, second)
    if not now:
        return now, later
    maker = {variable: equation for equation in later for variable in equation.outvars}
    uses = Counter(_read(later, second))
    count = None
    while count != len(maker):
        count = len(maker)
        for equation in later:
            cone = _cone(equation, maker)
            inside = Counter(_read(cone, ()))
            freed = sum(_size(v) for v in inside if v not in maker and inside[v] == uses[v])
            made = {variable for each in cone for variable in each.outvars}
            if cone and sum(_size(v) for v in made if inside[v] < uses[v]) <= freed:
                now += cone
                uses -= inside
                for variable in made:
                    del maker[variable]
    return now, [equation for equation in later if equation.outvars[0] in maker]


def _cone(equation: Any, maker: dict) -> list:
    """What is still to be computed up to an equation, in order; [] if any of it is dear."""
    if equation.outvars[0] not in maker:
        return []
    found: dict[int, Any] = {}

    def visit(equation: Any) -> bool:
        if id(equation) in found:
            return True
        if _dear(equation):
            return False
        before = [maker[v] for v in _variables(equation.invars) if v in maker]
        if not all(map(visit, before)):
            return False
        found[id(equation)] = equation
        return True

    return [*found.values()] if visit(equation) else []


def _needed(
    equations: Sequence, outputs: Iterable, always: Callable[[Any], bool] = lambda _: False
) -> tuple[list, list]:
    """The equations that outputs depend on, and the others."""
    wanted = set(_variables(outputs))
    parts: tuple[list, list] = [], []
    for equation in reversed(equations):
        is_needed = always(equation) or not wanted.isdisjoint(equation.outvars)
        parts[not is_needed].append(equation)
        if is_needed:
            wanted.update(_variables(equation.invars))
    return parts[0][::-1], parts[1][::-1]


def _read(equations: Iterable, outputs: Iterable) -> Iterator:
    """Variables that equations and outputs read, as often as they do."""
    for equation in equations:
        yield from _variables(equation.invars)
    yield from _variables(outputs)


def _variables(atoms: Iterable) -> Iterator:
    return (atom for atom in atoms if not isinstance(atom, Literal))


def _size(variable: Any) -> int:
    """Bytes, to compare: those of a key count as none."""
    return math.prod(variable.aval.shape) * getattr(variable.aval.dtype, "itemsize", 0)


def _dear(equation: Any) -> bool:
    """Whether an operation costs more than to go through its arrays once, as a product does."""
    if equation.primitive.name == "dot_general":
        return all(map(_has_rows, equation.invars, *equation.params["dimension_numbers"]))
    bodies = [*equation.params.get("branches", ())]
    return equation.primitive.name in _DEAR or any(
        _dear(inner) for body in bodies for inner in body.jaxpr.eqns
    )


def _has_rows(operand: Any, contracted: Sequence[int], batched: Sequence[int]) -> bool:
    """Whether an operand of a product is more than one vector, such as ones to sum with."""
    shape = operand.aval.shape
    return any(n > 1 for axis, n in enumerate(shape) if axis not in (*contracted, *batched))
