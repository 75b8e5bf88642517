"""The command line: jdecouple COMMAND ..., or python -m jdecouple COMMAND ..."""

import pkgutil

from jdecouple.train import console


def main(place: str = "jdecouple.train.commands:main") -> None:
    """Runs the function at "module:name", and ends with one line where Ctrl-C is pressed."""
    with console.ends_at_once():
        run = pkgutil.resolve_name(place)
    try:
        run()
    except KeyboardInterrupt:
        console.refuse(*console.INTERRUPTED)


if __name__ == "__main__":
    main()
