"""The command line: python -m jdecouple COMMAND ..."""

from jdecouple.train.commands import main

if __name__ == "__main__":
    main()
