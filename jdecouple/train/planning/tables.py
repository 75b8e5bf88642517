"""A plan for people: tables with aligned columns."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jdecouple.train.quantities import show

_LEFT = ("module", "output", "devices", "device", "schedule", "blocks", "boundaries")
_BEST = "best boundaries and replicas"
Columns = Mapping[str, Callable[[Any], str]]


def aligned(columns: Columns, rows: Iterable[Any]) -> str:
    """A line for every row below the headings; numbers end together, words begin together.

    >>> print(aligned({"block": str, "flops": lambda n: str(n**2)}, [9, 10]))
    block  flops
        9     81
       10    100
    """
    cells = [[*columns], *([text(row) for text in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        parts = zip(columns, row, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width) for name, cell, width in parts
        ).rstrip()

    return "\n".join(map(line, cells))


def text_of(plan: Mapping[str, Any]) -> str:
    """The text of a plan, from what `jdecouple.train.plan.Plan.to_dict` gives."""
    return "\n\n".join(part for make in _PARTS if (part := make(plan)))


def _head(plan: Mapping[str, Any]) -> str:
    names = [f"{key} {plan[key]}" for key in ("model", "method", "data", "dtype")]
    names += [f"batch {plan['batch_size']}"]
    if plan["microbatches"] > 1:
        names += [f"{plan['microbatches']} microbatches of {plan['microbatch_size']}"]
    return " | ".join(names)


def _blocks(plan: Mapping[str, Any]) -> str:
    rows = plan["blocks"]
    sums = ("parameters", "flops", "weight_bytes", "output_bytes")
    total = {"block": "all", "module": "", "output": ""}
    total |= {key: sum(row[key] for row in rows) for key in sums}
    columns: Columns = {
        "block": lambda row: str(row["block"]),
        "module": lambda row: row["module"],
        "output": lambda row: row["output"],
        "parameters": lambda row: f"{row['parameters']:,}",
        "FLOPs": lambda row: show(row["flops"], ""),
        "weights": lambda row: show(row["weight_bytes"], "B"),
        "activations": lambda row: show(row["output_bytes"], "B"),
    }
    return aligned(columns, [*rows, total])


def _stages(plan: Mapping[str, Any]) -> str:
    columns: Columns = {
        "stage": lambda row: str(row["stage"]),
        "blocks": lambda row: _range(row["first_block"], row["last_block"]),
        "devices": lambda row: ", ".join(row["devices"]),
        "FLOPs": lambda row: show(row["flops"], ""),
        "of all": lambda row: f"{row['share']:.0%}",
        "a batch": lambda row: show(row["seconds"], "s"),
        "sends": lambda row: show(row["message_bytes"], "B") if row["message_bytes"] else "",
        "remat": lambda row: row["remat"],
    }
    said = f"engine {plan['engine']}, schedule {plan['schedule']}"
    if plan["fused"]:
        said += ", all stages in one call"
    grid = "\n".join(plan["grid"])
    return f"{aligned(columns, plan['stages'])}\n\n{said}\n{grid}"


def _memory(plan: Mapping[str, Any]) -> str:
    kinds = [key for key in plan["memory"][0] if key not in ("device", "stages")]
    columns: dict[str, Callable[[Any], str]] = {
        "device": lambda row: row["device"],
        "stages": lambda row: ", ".join(map(str, row["stages"])),
    }
    columns |= {kind: functools.partial(_bytes, kind) for kind in kinds}
    return f"{aligned(columns, plan['memory'])}\n{plan['memory_limit']}"


def _bytes(kind: str, row: Mapping[str, Any]) -> str:
    return show(row[kind], "B")


def _times(plan: Mapping[str, Any]) -> str:
    columns: Columns = {
        "schedule": lambda row: row["schedule"],
        "a batch": lambda row: show(row["seconds"], "s"),
        "examples/s": lambda row: f"{plan['batch_size'] / row['seconds']:,.0f}",
        "bubble": lambda row: f"{row['bubble']:.1%}",
        "groups": lambda row: str(row["groups"]),
    }
    return f"{aligned(columns, plan['times'])}\n{plan['speed']}"


def _best(plan: Mapping[str, Any]) -> str:
    best = plan["best"]
    if best is None:
        return f"{_BEST}: these"
    keys = f"--config.mesh.replicas='{_tuple(best['replicas'])}'"
    keys += f" --config.boundaries='{_tuple(best['boundaries'])}'"
    time = f"{show(best['seconds'], 's')} a batch, bubble {best['bubble']:.1%}"
    return f"{_BEST}: {time}\n  {keys}"


def _tuple(values: Sequence[int]) -> str:
    return f"({','.join(map(str, values))}{',' * (len(values) == 1)})"


def _assumed(plan: Mapping[str, Any]) -> str:
    return "\n".join(["assumed:", *(f"- {line}" for line in plan["assumed"])])


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


_PARTS = (_head, _blocks, _stages, _memory, _times, _best, _assumed)
