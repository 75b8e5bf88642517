"""An object store in a folder of this machine, as fsspec and etils see one.

It is as strict as those of the clouds: keys and nothing else, so that a folder is there while an
object is below it; an object appears whole when its writer closes it; none is appended to, and none
renamed.
"""

import contextlib
import io
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from etils.epath import backend
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

VARIABLE = "JDECOUPLE_TEST_STORE"  # names the folder, for this process and those it starts


class _Writer(io.BytesIO):
    def __init__(self, place: Path):
        super().__init__()
        self._place = place

    def close(self) -> None:
        if not self.closed:
            temporary = self._place.with_name(f".{secrets.token_hex(8)}")
            temporary.write_bytes(self.getvalue())
            os.replace(temporary, self._place)
        super().close()


class Store(AbstractFileSystem):
    """Objects, each a file whose name is the key."""

    protocol = ("gs", "gcs", "s3")
    cachable = False

    def __init__(self, **options):
        assert options.get("use_listings_cache") is False  # else it may not see other processes'
        super().__init__(**options)
        self._folder = Path(os.environ[VARIABLE])

    @classmethod
    def _strip_protocol(cls, path) -> str:
        return os.fspath(path).partition("://")[2].strip("/") or os.fspath(path).strip("/")

    def _keys(self) -> list[str]:
        return [unquote(name) for name in os.listdir(self._folder) if not name.startswith(".")]

    def _at(self, path) -> Path:
        return self._folder / quote(self._strip_protocol(path), safe="")

    def ls(self, path, detail=True, **options):
        folder = self._strip_protocol(path)
        found = {}
        for key in self._keys():
            if key == folder:
                found[key] = self._entry(key)
            elif key.startswith(f"{folder}/"):
                name, _, below = key[len(folder) + 1 :].partition("/")
                child = f"{folder}/{name}"
                found[child] = _folder(child) if below else self._entry(key)
        if not found:
            raise FileNotFoundError(path)
        return [*found.values()] if detail else [*found]

    def info(self, path, **options):
        if self._at(path).exists():
            return self._entry(self._strip_protocol(path))
        self.ls(path)
        return _folder(self._strip_protocol(path))

    def _entry(self, key: str) -> dict:
        status = self._at(key).stat()
        return {"name": key, "type": "file", "size": status.st_size, "mtime": status.st_mtime}

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            return io.BytesIO(self._at(path).read_bytes())
        assert mode == "wb", f"a store does not know mode {mode}"
        return _Writer(self._at(path))

    def _rm(self, path):
        self._at(path).unlink(missing_ok=True)  # a folder goes with what was below it

    def objects(self) -> list[str]:
        """Keys of all that is there."""
        return sorted(self._keys())

    def mv(self, *arguments, **options):
        raise AssertionError("a store does not rename")

    cp_file = rename = mv


def _folder(name: str) -> dict:
    return {"name": name, "type": "directory", "size": 0}


def install(setitem=dict.__setitem__) -> None:
    """Makes ``gs://`` and ``s3://`` of this process the store that the variable names."""
    for name in ("gcs", "s3"):
        setitem(_registry, name, Store)
    backend.fsspec_backend._get_filesystem.cache_clear()


@contextlib.contextmanager
def installed(folder: Path, monkeypatch) -> Iterator[None]:
    """A store in `folder`, until the end of the test."""
    monkeypatch.setenv(VARIABLE, str(folder))
    install(monkeypatch.setitem)
    yield
    backend.fsspec_backend._get_filesystem.cache_clear()
