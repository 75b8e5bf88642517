"""Compiled programs on disk: JAX's compilation cache, in the cache directory of the user."""

import glob
import os
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from absl import logging

_MOST_BYTES = 2 << 30
_SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_DAMAGED = "Error (?:reading|writing) persistent compilation cache entry for '(.*?)'"


def keep() -> None:
    """Has JAX keep what it compiles, unless the user has told JAX where, or not to.

    A folder that cannot be used is a warning. JAX's key holds the versions, the options and the
    features of the processor, so that machines may share the folder.
    """
    told = jax.config.values
    if told["jax_compilation_cache_dir"] is not None or not told["jax_enable_compilation_cache"]:
        return
    try:
        folder = cache_folder(os.environ)
        str(folder).encode()  # XLA reads it as UTF-8
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        prune(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "it cannot be written to", str(folder))
    except (OSError, RuntimeError, UnicodeError) as error:  # without a home it is no OSError
        logging.warning("compiled programs are not kept (--nocache says that): %s", error)
        return
    _drop_damaged(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _SHORTEST not in os.environ:  # the many small programs of a start count, too
        jax.config.update(_SHORTEST.lower(), 0.0)


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The folder of the user's cache directory; RuntimeError where there is no home."""
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(environ.get("XDG_CACHE_HOME") or usual).expanduser() / "jdecouple" / "xla"


def prune(folder: Path, most: int = _MOST_BYTES) -> None:
    """Deletes the entries that were used least recently, until the others take `most` bytes."""
    entries = []
    for path in folder.glob("*-cache"):
        with suppress(OSError):  # another run deletes, too
            status = path.stat()
            used = max(status.st_atime, status.st_mtime)
            entries.append((used, status.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= most:
            break
        with suppress(OSError):
            path.unlink()
        total -= size


def _drop_damaged(folder: Path) -> None:
    """Deletes entries that JAX warns about, of which it would warn again in every run.

    JAX writes none that is there. One is cut where a run was killed or the disk was full.
    """
    show = warnings.showwarning

    def showwarning(message: Any, *others: Any, **options: Any) -> None:
        found = re.match(_DAMAGED, str(message))
        if not found:
            show(message, *others, **options)
            return
        for path in folder.glob(f"{glob.escape(found[1])}-*-cache"):
            with suppress(OSError):
                path.unlink()

    warnings.filterwarnings("always", _DAMAGED)
    warnings.showwarning = showwarning
