"""What an error says, in one line."""


def first_line(error: object) -> str:
    r"""First line of what an error says, or its type where it says nothing.

    >>> first_line(ValueError("no such file\nand more"))
    'no such file'
    >>> first_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
