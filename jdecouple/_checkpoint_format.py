"""What a checkpoint directory holds, and how each part of it is verified.

``<step>/state`` is an Orbax PyTree item whose top level is a flat dict of leaves, with
``files.json`` (size and CRC-32 of every file of the item) beside Orbax's own files;
``<step>/info`` is one JSON document with its own CRC-32: step, metric, extra, and the spec and
CRC-32 of every leaf. Names of leaves join the keys by ``/`` after percent-escaping, so that keys
may hold any character.
"""

import functools
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import numpy as np

FORMAT = 1
_SEAL = "files.json"
_EMPTY_DICT = "{}"


class RefusedError(Exception):
    """Why one checkpoint is not used, in one line."""


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns name -> leaf of a nested dict; an empty dict counts as a leaf.

    Raises:
        TypeError: `tree` is no dict, or a key is no string.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"a checkpoint is a nested dict, got {type(tree).__name__}")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"keys of a checkpoint are strings, got {key!r} below {prefix!r}")
        name = prefix + (quote(key, safe="") or "%")
        nested = isinstance(value, Mapping) and value
        flat.update(flatten(value, f"{name}/") if nested else {name: value})
    return flat


def unflatten(template: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns a nested dict like `template` with the leaves of `arrays`; inverse of `flatten`."""
    leaves = iter(arrays[name] for name, leaf in flatten(template).items() if not _empty(leaf))

    def fill(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: fill(value) for key, value in node.items()}
        return next(leaves)

    return fill(template)


def spec(leaf: Any) -> str:
    """Returns dtype and shape as text, such as ``float32[3,4]``; ``{}`` for an empty dict."""
    if _empty(leaf):
        return _EMPTY_DICT
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"


def specs(tree: Any) -> dict[str, str]:
    """Returns name -> `spec` of every leaf of a nested dict."""
    return {name: spec(leaf) for name, leaf in flatten(tree).items()}


def host_copies(tree: Any) -> dict[str, Any]:
    """Returns name -> a NumPy copy that shares no memory with the leaf ({} for an empty dict).

    Raises:
        ValueError: no array among the leaves, or one that other processes hold.
        TypeError: a leaf that is neither a numeric array nor a scalar.
    """
    flat = flatten(tree)
    if all(_empty(leaf) for leaf in flat.values()):
        raise ValueError("a checkpoint needs at least one array")
    for leaf in flat.values():
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()
    return {name: leaf if _empty(leaf) else _copy(name, leaf) for name, leaf in flat.items()}


def describe(step: int, metric: float | None, extra: Any, leaves: Mapping[str, Any]) -> dict:
    """Returns the JSON document of a checkpoint, with its checksum.

    Raises:
        TypeError: `extra` is no dict that JSON can hold.
    """
    if not isinstance(extra, dict):
        raise TypeError(f"extra must be a dict, got {type(extra).__name__}")
    try:
        extra = json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra must be writable as JSON: {error}") from error
    document = {
        "format": FORMAT,
        "step": step,
        "metric": metric,
        "extra": extra,
        "leaves": {name: [spec(leaf), _crc(leaf)] for name, leaf in leaves.items()},
    }
    return {"document": document, "crc32": _document_crc(document)}


def stored(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the leaves that Orbax writes: it takes no empty arrays, and `spec` says all of them.

    Never empty itself, which Orbax would not take either.
    """
    kept = {name: leaf for name, leaf in leaves.items() if not _empty(leaf) and leaf.size}
    return kept or {"%": np.zeros(1, np.uint8)}


def seal(state: Path) -> None:
    """Writes the size and CRC-32 of every file of the item below `state`."""
    (state / _SEAL).write_text(json.dumps(_contents(state)))


def read_document(checkpoint: Path) -> dict[str, Any]:
    """Returns the verified JSON document of the checkpoint in directory `checkpoint`.

    Raises:
        RefusedError: it is missing, damaged or of another format.
    """
    path = checkpoint / "info" / "metadata"
    if not path.is_file():
        raise RefusedError("not a checkpoint of this program (no info/metadata)")
    try:
        info = json.loads(path.read_bytes())
        document, crc = info["document"], info["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"info/metadata is damaged ({one_line(error)})") from error
    if crc != _document_crc(document):
        raise RefusedError("info/metadata is damaged (checksum)")
    if document["format"] != FORMAT:
        raise RefusedError(f"format {document['format']}, this program reads {FORMAT}")
    return document


def load(
    checkpoint: Path,
    step: int,
    expected: Mapping[str, str],
    accept: Callable[[dict[str, Any]], str | None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads and verifies one checkpoint.

    Args:
        checkpoint: its directory.
        step: the step that it must be of.
        expected: name -> spec of every leaf.
        accept: says of its `extra` why it is to be refused, or None.

    Returns:
        name -> array, and the saved `extra`.

    Raises:
        RefusedError: anything differs from what was saved or from what is expected.
    """
    document = read_document(checkpoint)
    if document["step"] != step:
        raise RefusedError(f"it was saved at step {document['step']}")
    if reason := accept(document["extra"]):
        raise RefusedError(reason)
    found = {name: text for name, (text, _) in document["leaves"].items()}
    _compare(found, expected)
    try:
        json.loads((checkpoint / "_CHECKPOINT_METADATA").read_bytes())
        _verify_seal(checkpoint / "state")
        shapes = {name: _blank(text) for name, text in found.items() if text != _EMPTY_DICT}
        arrays = shapes | _read(checkpoint / "state", stored(shapes))
    except RefusedError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds on damaged files.
        raise RefusedError(f"unreadable ({one_line(error)})") from error
    for name, (text, crc) in document["leaves"].items():
        if text != _EMPTY_DICT and (spec(arrays[name]) != text or _crc(arrays[name]) != crc):
            raise RefusedError(f"leaf {unquote(name)} is corrupted")
    return {name: arrays[name] for name in shapes}, document["extra"]


@functools.cache
def sealing_handler() -> type:
    """Returns Orbax's standard PyTree handler, which also seals what it wrote."""
    import orbax.checkpoint as ocp

    class SealingHandler(ocp.StandardCheckpointHandler):
        def finalize(self, directory: Any) -> None:
            super().finalize(directory)
            seal(Path(directory))

    return SealingHandler


def process_alone() -> Any:
    """Returns Orbax options under which this process waits for no other."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"jdecouple_{me}"
    )


def one_line(error: BaseException) -> str:
    """Returns the first line of what `error` says, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _empty(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and not leaf


def _copy(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"leaf {unquote(name)} lives on other processes; bring it to the host")
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
        raise TypeError(f"leaf {unquote(name)} is a typed key; save jax.random.key_data of it")
    array = np.array(leaf, copy=True, order="C")
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        raise TypeError(f"leaf {unquote(name)} is no numeric array but {type(leaf).__name__}")
    return array


def _blank(text: str) -> np.ndarray:
    """An array of the given spec whose memory is not touched."""
    dtype, _, shape = text.rstrip("]").partition("[")
    return np.empty([int(size) for size in shape.split(",") if size], jax.numpy.dtype(dtype))


def _read(state: Path, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    handler = ocp.StandardCheckpointHandler(multiprocessing_options=process_alone())
    try:
        return handler.restore(_epath(state), args=ocp.args.StandardRestore(like))
    finally:
        handler.close()


def _epath(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)


def _compare(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        saved, wanted = found.get(name), expected.get(name)
        if saved != wanted:
            raise RefusedError(
                f"leaf {unquote(name)} is {saved or 'absent'}, expected {wanted or 'none'}"
            )


def _contents(state: Path) -> dict[str, list[int]]:
    files = (path for path in sorted(state.rglob("*")) if path.is_file())
    return {
        path.relative_to(state).as_posix(): [path.stat().st_size, _file_crc(path)]
        for path in files
        if path.name not in (_SEAL, "commit_success.txt")
    }


def _verify_seal(state: Path) -> None:
    sealed = json.loads((state / _SEAL).read_bytes())
    present = _contents(state)
    for name, (size, crc) in sealed.items():
        if name not in present:
            raise RefusedError(f"state/{name} is missing")
        if present[name][0] != size:
            raise RefusedError(f"state/{name} has {present[name][0]} bytes of {size}")
        if present[name][1] != crc:
            raise RefusedError(f"state/{name} is corrupted")


def _file_crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc(leaf: Any) -> int:
    return 0 if _empty(leaf) else zlib.crc32(memoryview(leaf.reshape(-1).view(np.uint8)))


def _document_crc(document: Any) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())
