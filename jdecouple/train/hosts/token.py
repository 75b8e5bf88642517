"""The secret that the processes of a run share."""

import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

VARIABLE = "JDECOUPLE_TOKEN"
_SHORTEST = 16  # characters, so that it cannot be guessed from what crosses the network


def shared_token(environ: Mapping[str, str]) -> bytes:
    """The token of JDECOUPLE_TOKEN, else that of the user's file, which its first use makes.

    The file is jdecouple/token in $XDG_CONFIG_HOME, or in ~/.config; its owner alone can read it.

    Raises:
        ValueError: in one line: a token that is too short, a file that others can read, or one
            that cannot be made or read.
    """
    token, source = environ.get(VARIABLE), VARIABLE
    if token is None:
        try:
            folder = Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "jdecouple"
            source = str(folder / "token")
            token = _read_or_make(folder / "token")
        except (OSError, RuntimeError, UnicodeError) as error:  # without a home it is no OSError
            said = getattr(error, "strerror", None) or error
            raise ValueError(
                f"no token in '{source}' ({said}): set {VARIABLE} to the same secret for all "
                "processes"
            ) from error
    if len(token) < _SHORTEST:
        raise ValueError(
            f"{source} has {len(token)} characters: at least {_SHORTEST} are needed, such as those "
            "of: openssl rand -hex 16"
        )
    return token.encode(errors="surrogateescape")


def _read_or_make(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as new:
            new.write(secrets.token_hex(32))
            new.flush()
            with suppress(FileExistsError):  # another process was faster
                os.link(new.name, path)
    with path.open() as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(0, "others may know it: it must be yours, and of mode 600")
        return file.read().strip()
