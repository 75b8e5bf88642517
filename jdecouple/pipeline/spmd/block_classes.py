"""Which blocks of a model are the same program, and in what others differ from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple.methods.routes import Carry, Unit
from jdecouple.methods.routes.stage import floating, with_floating

MIDDLE, FIRST, LAST = 0, 1, 2


def block_classes(
    units: Sequence[Unit], carries: Sequence[Carry]
) -> tuple[tuple[int, ...], str | None]:
    """Tells repeated blocks from the ends.

    All blocks but the first and the last have to be the same: weights of the same shapes under the
    same names, and one program of forward and backward. A first or last block that differs from
    them is of a class of its own.

    Returns:
        The class of every block; and which block differs from another that it has to be equal to,
        and how, or None.
    """
    if len(units) == 1:
        return (MIDDLE,), None

    def difference(index: int, reference: int) -> str | None:
        reason = _difference(units[index], units[reference], carries[index], carries[reference])
        return reason and f"block {index} differs from block {reference}: {reason}"

    last = len(units) - 1
    reference = min(1, last - 1)
    for index in range(2, last):
        if reason := difference(index, 1):
            return (), reason
    at_end = difference(last, reference)
    at_start = difference(0, reference) if reference else None
    if at_end and (last == 1 or (at_start and last == 2)):
        return (), at_end
    middle = (MIDDLE,) * (last - 1)
    return (FIRST if at_start else MIDDLE, *middle, LAST if at_end else MIDDLE), None


def _difference(unit: Unit, other: Unit, carry: Carry, expected: Carry) -> str | None:
    """In what a unit differs from another, in words; None if they are the same."""
    for kind, arrays, wanted in zip(
        ("parameter", "statistic"), *map(_state, (unit, other)), strict=True
    ):
        if reason := _first_difference(kind, arrays, wanted):
            return reason
    if _listed(carry["x"]) != _listed(expected["x"]):
        return f"its input is {_listed(carry['x'])} instead of {_listed(expected['x'])}"
    if reason := _first_difference("carry entry", carry, expected):
        return reason
    # Equal definitions make equal programs; others may do so too, because modules also hold what no
    # program sees, such as the functions that drew their weights.
    if unit.dtype == other.dtype and unit.same_definition(other):
        return None
    output, other_output = (_listed(_output(one, carry)) for one in (unit, other))
    if output != other_output:
        return f"its output is {output} instead of {other_output}"
    if unit.has_loss != other.has_loss:
        return f"it has {'a' if unit.has_loss else 'no'} head"
    if _program(unit, carry) != _program(other, carry):
        return "its program is another (layers, activations, rates or constants)"
    return None


def _first_difference(
    kind: str, entries: Mapping[str, Any], wanted: Mapping[str, Any]
) -> str | None:
    for name in sorted({*entries, *wanted}):
        if name not in entries:
            return f"it has no {kind} {name}"
        if name not in wanted:
            return f"it has a {kind} {name}"
        if _listed(entries[name]) != _listed(wanted[name]):
            return f"{kind} {name} is {_listed(entries[name])} instead of {_listed(wanted[name])}"
    return None


def _listed(tree: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ", ".join(
        f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}".strip()
        for path, leaf in leaves
    )


def _output(unit: Unit, carry: Carry) -> Any:
    return jax.eval_shape(lambda *arguments: unit.train(*arguments)[0], *_arguments(unit, carry))


def _state(unit: Unit) -> Any:
    return jax.eval_shape(unit.initial)


def _arguments(unit: Unit, carry: Carry) -> tuple:
    return (*_state(unit), carry, jax.eval_shape(lambda: jax.random.key(0)))


def _program(unit: Unit, carry: Carry) -> str:
    """Forward, loss and backward of a unit as XLA reads it, with all constants."""

    def program(params, stats, carry, key):
        def run(params, x):
            received = {**carry, "x": with_floating(x, carry["x"])}
            features, output, moved = unit.train(params, stats, received, key)
            loss = jnp.zeros((), jnp.float32) if output is None else output.loss
            aside = features, moved, output and (output.metrics, dict(output.carry))
            return (floating(features), loss), aside

        out, pullback, aside = jax.vjp(run, params, floating(carry["x"]), has_aux=True)
        return out, aside, pullback(jax.tree.map(jnp.ones_like, out))

    return jax.jit(program).lower(*_arguments(unit, carry)).as_text()
