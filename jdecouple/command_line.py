"""The command line of train.py: flags, one-line errors and exit codes."""

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Path of a file in configs/, with :argument where it takes one."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for metrics, curves and checkpoints; continued if it holds a run."
)


def main() -> None:
    """Runs train.py.

    Exit codes: 0 done, or stopped by SIGTERM or Ctrl-C after saving; 1 the training diverged;
    2 bad input, told in one line.
    """
    app.run(_train, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        # A value that config_flags could not set is kept and raised at the first look.
        given = flags.FLAGS["config"].value
        if given is None or _WORKDIR.value is None:
            raise ValueError("--config FILE and --workdir FOLDER are needed")
        len(given)
        if len(rest) > 1:
            raise ValueError(f"unknown argument {rest[1]!r}: flags begin with --")
    except Exception as error:
        _fail(error)
    return rest


def _train(argv: Sequence[str]) -> None:
    del argv
    # Imported late, so that bad flags are told at once.
    from jdecouple.config import ConfigError
    from jdecouple.training import NonFiniteError, train_and_evaluate

    try:
        train_and_evaluate(_CONFIG.value, str(_WORKDIR.value))
    except ConfigError as error:
        _fail(error)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _fail(error: BaseException) -> None:
    text = str(error).strip() or type(error).__name__
    print(f"error: {text.splitlines()[0]}", file=sys.stderr)
    sys.exit(2)
