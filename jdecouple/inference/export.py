"""A trained network as files for others: a compiled program's source, weights, a description."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flatbuffers
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as stablehlo
from safetensors.numpy import save_file

from jdecouple._errors import first_line, require_int, require_one_of
from jdecouple._files import local_folder, new_folder
from jdecouple.methods.objectives.base import at_least_float32
from jdecouple.methods.routes import Carry, Unit
from jdecouple.methods.routes.unit import Arrays

Transform = Callable[..., Carry]
_UnitState = tuple[Unit, Arrays, Arrays]

FORMAT = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ALL = "all"
MOST_BYTES = 2**31 - 2**24  # of weights: what JAX writes holds less than 2 GiB


def export(
    folder: str | os.PathLike[str],
    units: Sequence[Unit],
    params: Sequence[Arrays],
    stats: Sequence[Arrays],
    example: jax.ShapeDtypeStruct,
    *,
    transform: Transform | None = None,
    exit: int | str | None = None,
    batch_size: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a network, or its first blocks and their exit, into a folder that serves it.

    The folder then holds

    - `model.jax`: the function from inputs to logits `[n, classes]`, float32 at least, as
      `jax.export` writes it: StableHLO with the weights in it. The transform is a part of it, so
      that uint8 images go in as they are.
    - `model.safetensors`: the weights by their names in a checkpoint, "block_{i}/params/..." and
      "block_{i}/stats/...".
    - `model.json`: exit, inputs, output, platforms, versions, weights, and what `about` says.
    - `serve.py`, which answers with jax alone, and the package `flatbuffers` (Apache License 2.0),
      which `jax.export` reads with but jax does not bring.

    JAX promises that its versions of the next six months read what it writes (docs.jax.dev,
    "Exporting and serializing"). Weights and description are for any time.

    Args:
        folder: a new folder, or an empty one; it appears whole or not at all.
        units: the blocks of the network with their heads.
        params: the parameters of every unit.
        stats: its statistics.
        example: shape and dtype of one input, without the batch's axis.
        transform: what prepares a batch for the first block: normalisation.
        exit: the block whose exit answers, and the last to be exported; None for the last exit;
            "all" for the logits of all exits, `[exits, n, classes]`.
        batch_size: the only number of inputs; by default any, each compiled at its first use.
        platforms: where it is to run.
        about: more for `model.json`, such as "class_names".

    Returns:
        The folder.

    Raises:
        ValueError: an exit that is none, a block that cannot be written so, or weights that are too
            large; or a folder that holds something.
        OSError: the folder cannot be written.
    """
    path = local_folder(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there: a new or an empty folder is needed")
    if batch_size is not None:
        require_int(1, batch_size=batch_size)
    for platform in platforms:
        require_one_of(PLATFORMS, platform=platform)
    batch = stablehlo.symbolic_shape("batch")[0] if batch_size is None else batch_size
    x = jax.ShapeDtypeStruct((batch, *example.shape), example.dtype)
    states = [*zip(units, params, stats, strict=True)]
    one = jax.ShapeDtypeStruct((1, *example.shape), example.dtype)
    exits = [*jax.eval_shape(lambda x: _logits(states, transform, x, whole=True), one)]
    answering = _chosen(exit, exits)
    used = states[: answering[-1] + 1]

    def network(x: jax.Array) -> jax.Array:
        found = _logits(used, transform, x, whole=len(used) == len(states))
        logits = [found[index] for index in answering]
        return jnp.stack(logits) if exit == ALL else logits[0]

    weights = {
        f"block_{unit.index}/{kind}/{name}": np.asarray(array)
        for unit, *arrays in used
        for kind, named in zip(("params", "stats"), arrays, strict=True)
        for name, array in named.items()
    }
    size = sum(array.nbytes for array in weights.values())
    if size > MOST_BYTES:
        raise ValueError(
            f"the weights are {size / 2**30:.1f} GiB: at most {MOST_BYTES / 2**30:.1f} fit into "
            "an artifact; an earlier exit may"
        )
    try:
        exported = stablehlo.export(jax.jit(network), platforms=platforms)(x)
        artifact = exported.serialize()
    except _BlockError as error:  # of one input it did not fail
        raise ValueError(
            f"{error}; write x.shape[0] for the number of inputs, not len(x), or give batch_size"
        ) from error
    except Exception as error:
        raise ValueError(
            f"the network cannot be written for {', '.join(platforms)}: {first_line(error)}"
        ) from error
    [output] = exported.out_avals
    description = {
        "format": FORMAT,
        "exit": answering[-1],
        "exits": answering,
        "input": _described(x),
        "output": _described(output),
        "platforms": exported.platforms,
        "versions": _versions(),
        **(about or {}),
        "weights": {name: _described(array) for name, array in weights.items()},
    }
    text = json.dumps(description, indent=1)

    def write(place: Path) -> None:
        (place / "model.jax").write_bytes(artifact)
        save_file(weights, place / "model.safetensors")
        (place / "model.json").write_text(text)
        shutil.copyfile(Path(__file__).with_name("serve.py"), place / "serve.py")
        reader = Path(flatbuffers.__file__).parent
        shutil.copytree(reader, place / reader.name, ignore=shutil.ignore_patterns("__pycache__"))

    new_folder(path, write)
    return path


class _BlockError(ValueError):
    """A block that cannot be traced."""


def _chosen(exit: int | str | None, exits: Sequence[int]) -> tuple[int, ...]:
    """The exits that answer, by the indices of their blocks."""
    if exit == ALL:
        return (*exits,)
    if exit is None:
        return (exits[-1],)
    if exit not in exits:
        raise ValueError(f"exit is {exit!r}: allowed are {', '.join(map(str, exits))} and {ALL!r}")
    return (int(exit),)


def _logits(states: Sequence[_UnitState], transform: Transform | None, x: Any, whole: bool) -> dict:
    """Logits `[n, classes]` of every exit by the index of its block, as evaluation computes them.

    Where the network is there as a whole, an answer may come down from the last block.
    """
    carry = {"x": x} if transform is None else transform({"x": x}, None, False)
    found = {}
    for unit, params, stats in states:
        try:
            # What the compiler computes of constants rounds otherwise than what runs.
            params, stats = jax.lax.optimization_barrier((params, stats))
            carry["x"], logits = _rounded(unit.evaluate(params, stats, carry))
        except Exception as error:
            raise _BlockError(
                f"block {unit.index} cannot be exported: {first_line(error)}"
            ) from error
        if logits is not None:
            found[unit.index] = logits
    if whole and unit.descends:
        answer = _rounded(unit.turn(params, stats, carry["x"]))
        for unit, params, stats in reversed(states):
            answer = _rounded(unit.descend(params, stats, answer)) if unit.descends else answer
        found[states[-1][0].index] = answer
    return {index: at_least_float32(logits) for index, logits in found.items()}


def _rounded(tree: Any) -> Any:
    """What a block gives, in half precision rounded to it.

    Where a program goes on, XLA may leave out that two conversions round. In evaluation a block is
    a program of its own.
    """

    def rounded(leaf: jax.Array) -> jax.Array:
        if leaf.dtype not in (jnp.bfloat16, jnp.float16):
            return leaf
        digits = jnp.finfo(leaf.dtype)
        wide = leaf.astype(jnp.float32)
        narrow = jax.lax.reduce_precision(wide, digits.nexp, digits.nmant)
        if leaf.dtype == jnp.float16:  # which has numbers below the least normal one
            unit = float(digits.smallest_subnormal)
            narrow = jnp.where(abs(wide) < digits.tiny, jnp.round(wide / unit) * unit, narrow)
        return narrow.astype(leaf.dtype)

    return jax.tree.map(rounded, tree)


def _described(array: Any) -> dict[str, Any]:
    return {"shape": [*map(_size, array.shape)], "dtype": jnp.dtype(array.dtype).name}


def _size(size: Any) -> int | str:
    return str(size) if stablehlo.is_symbolic_dim(size) else int(size)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("jdecouple", "jax", "jaxlib", "flax"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a checkout on the path
            found[package] = metadata.version(package)
    return found
