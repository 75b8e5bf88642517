"""The command line: jdecouple COMMAND ..., or python -m jdecouple COMMAND ..."""

import pkgutil

from jdecouple.train import console


def main(place: str = "jdecouple.train.commands:main") -> None:
    """Runs the function at "module:name"; Ctrl-C while it is imported is told in one line, too."""
    try:
        pkgutil.resolve_name(place)()
    except KeyboardInterrupt:
        console.refuse(*console.INTERRUPTED)


if __name__ == "__main__":
    main()
