"""Documents to read on in: files and folders, and what comes with Python."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jdecouple.data.splits import Amount, fixed_order, held_out, hold_out

PREFIX = "text:"
Documents = list[bytes]
_ROLES = ("train", "validation", "test")
_TEST_SHARE = 0.1
_LOOKED_AT = 8192  # bytes of a file that tell whether it is a text
# Modules that some installations leave out, add to or write themselves, and tables.
_LEFT_OUT = frozenset(
    (
        *("distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter"),
        *("test", "turtle", "turtledemo", "venv", "antigravity", "this", "sitecustomize"),
    )
)


def from_files(name: str, data_dir: str | os.PathLike[str] | None) -> dict[str, Documents]:
    """The documents of `text:PATH`, each a file, by the split that they are stored as.

    PATH is a file, or a folder. All files of a folder, at any depth, are documents in the order of
    their names, but for hidden ones and those with a zero byte. Where the folder has an entry
    called `train` (a folder, or a file with any ending), that, `validation` and `test` are the
    splits. A relative PATH begins at `data_dir`, by default the current folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: there are no texts.
    """
    suffix = name.removeprefix(PREFIX)
    path = Path(data_dir or "").expanduser() / Path(suffix).expanduser()
    if not suffix or not path.exists():
        raise FileNotFoundError(f"data set {name!r}: there is no file or folder '{path}'")
    entries = {each.stem: each for each in sorted(path.iterdir())} if path.is_dir() else {}
    roles = (
        {role: entries[role] for role in _ROLES if role in entries} if "train" in entries else {}
    )
    stored = {role: read(files_of(place)) for role, place in (roles or {"train": path}).items()}
    for role, documents in stored.items():
        if not documents:
            raise ValueError(f"data set {name!r}: '{roles.get(role, path)}' holds no texts")
    return stored


def standard_library() -> dict[str, Documents]:
    """The sources of Python's standard library: modules that every installation has alike."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(sys.stdlib_module_names - _LEFT_OUT)
    places = [root / f"{module}.py" for module in modules] + [root / module for module in modules]
    found = [path for place in places for path in files_of(place) if path.suffix == ".py"]
    tests = [path for path in found if {"test", "tests"} & {*path.relative_to(root).parts}]
    return {"train": read(sorted({*found} - {*tests}))}


def topics() -> dict[str, Documents]:
    """What `pydoc` says of the language, by topic."""
    from pydoc_data import topics

    return {"train": [text.encode() for _, text in sorted(topics.topics.items())]}


def files_of(place: Path) -> list[Path]:
    """A file, or the files of a folder at any depth in the order of their names; no hidden ones."""
    if not place.is_dir():
        return [place] if place.is_file() else []
    paths = sorted(place.rglob("*"), key=lambda path: path.relative_to(place).as_posix())
    hidden = (".", "__pycache__")
    return [
        path
        for path in paths
        if path.is_file()
        and not any(part.startswith(hidden) for part in path.relative_to(place).parts)
    ]


def read(paths: Iterable[Path]) -> Documents:
    """The contents of those files that are texts, and not empty."""
    contents = (path.read_bytes() for path in paths)
    return [text for text in contents if text.strip() and b"\0" not in text[:_LOOKED_AT]]


def divided(
    stored: Mapping[str, Documents], validation: Amount
) -> tuple[dict[str, Documents], str]:
    """Training, validation and test documents, and a digest of all of them.

    Without a stored test split that of validation is it; without either, a fixed tenth of the
    documents. `validation` is a number or a share of the others, as of `loaders.load`. Of a single
    document the end is held out.
    """
    train, given = stored["train"], {**stored}
    if "test" not in given:
        given["test"] = given.pop("validation", [])
    if not given["test"]:
        train, given["test"] = _held(train, _TEST_SHARE)
    if validation is None and "validation" in given:
        own = given["validation"]
    else:
        train, own = _held(train, validation)
    splits = {"train": train, "validation": own, "test": given["test"]}
    digest = hashlib.sha256()
    for role, documents in splits.items():
        for text in (role.encode(), *documents):
            digest.update(b"%d:" % len(text) + text)
    return splits, digest.hexdigest()


def _held(documents: Sequence[bytes], amount: Amount) -> tuple[Documents, Documents]:
    if len(documents) > 1:
        kept, held = hold_out(fixed_order(len(documents)), amount)
        if not len(held) and amount is None:  # a tenth of a few
            kept, held = held_out(fixed_order(len(documents)), 1)
        return [documents[i] for i in kept], [documents[i] for i in held]
    (text,) = documents
    share = 0.1 if amount is None else amount
    if not isinstance(share, float) and share != 0:
        raise ValueError(
            f"validation is {amount!r}: of a single document a fraction in [0, 1) is held out"
        )
    held_out(fixed_order(2), float(share) / 2)  # refuses what is no fraction
    # Of the line that the cut falls into, all is kept.
    end = text.find(b"\n", int(len(text) * (1 - share))) + 1 if share else len(text)
    end = end or int(len(text) * (1 - share))
    return [text[:end]], [part for part in [text[end:]] if part]
