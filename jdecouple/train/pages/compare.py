"""The command compare: several runs on one page, their curves, values and final numbers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jdecouple._errors import Arguments, first_line
from jdecouple._files import replace, resolved
from jdecouple.train.errors import ConfigError
from jdecouple.train.pages import differing, figures, overlays, page
from jdecouple.train.pages.record import Record, read

FILE_NAME = "compare.html"
MOST_RUNS = 20

_COLUMNS = (
    *("run", "state", "test, last step", "test, best validation", "best test (not a result)"),
    *("last step", "parameters", "examples/s", "seconds"),
)
_OF_ACCURACY = (
    "Test accuracy of the last exit, at the last step, and at the step with the highest "
    "validation accuracy (the first of equals). The best test accuracy of any exit and step is "
    "what papers report; it is not a result, since the test set chose it. Only a finished run has "
    "results."
)
_OF_SECONDS = (
    "Examples/s is the median of the lines of the training. Seconds are those of its steps, as "
    "these lines measured them: with the compilation at the start, waiting for input and saving, "
    "and whatever held the process; without what comes before the first step, without "
    "evaluations, and without steps that were lost and trained again. Steps that no line "
    "measured, the last few of a run and those before a resumption, count as those beside them."
)
_OF_KEYS = "All other keys are equal. An empty cell: the run does not take the key."

Row = tuple[str | None, ...]  # cells of a table


def main(argv: Sequence[str]) -> None:
    """Compares runs on one self-contained HTML page.

    It has their curves, the keys that differ and the final numbers; both tables are printed, too.
    The runs may still go on.

    Raises:
        ValueError, OSError: bad arguments, no workdirs, or a page that cannot be written.
    """
    parser = Arguments("compare", main.__doc__)
    parser.add_argument(
        "workdirs", nargs="*", metavar="WORKDIR", help=f"what was trained, 2 to {MOST_RUNS} of them"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(FILE_NAME),
        help=f"a file, by default {FILE_NAME}; it replaces an earlier page, but nothing else",
    )
    parser.add_argument(
        "--by",
        choices=overlays.AXES,
        default="step",
        help="what curves are drawn by when the page is opened; by default step",
    )
    given = parser.parse_intermixed_args(argv)
    count = len(given.workdirs)
    if not 2 <= count <= MOST_RUNS:
        parser.error(f"{count} workdir(s) given, 2 to {MOST_RUNS} are needed")
    page.check_place(given.output)
    runs = [*map(_read, given.workdirs)]
    places = [resolved(run.folder) for run in runs]
    for place, times in Counter(places).items():
        if times > 1:
            raise ConfigError(f"'{place}' is given {times} times: different workdirs are needed")
    names = differing.labels(places)
    numbers, keys = _numbers(runs, names), _keys(runs)
    text = _rendered(runs, names, numbers, keys, given.by)
    replace(given.output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(_aligned([_COLUMNS, *numbers]))
    if keys:
        print(f"\n{_aligned([('key', *names), *keys])}")
    print(f"\n{given.output}")


def _read(workdir: str) -> Record:
    """A run with a configuration; ConfigError where there is none."""
    run = read(workdir)
    if not run.content:
        raise ConfigError(f"'{workdir}' cannot be compared: {run.notes[0]}")
    return run


def _rendered(
    runs: Sequence[Record], names: Sequence[str], numbers: list[Row], keys: list[Row], by: str
) -> str:
    """The page as HTML."""
    states = [*zip(names, map(figures.standing, runs), strict=True)]
    pending = [f"{name} ({state.text})" for name, state in states if not state.finished]
    damage = [
        f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes
    ]
    lead = [page.Note(f"Without results: {', '.join(pending)}.")] if pending else []
    table = page.Table("What each run ends with", _COLUMNS, numbers)
    differing_keys: page.Piece = page.Text("All keys are equal.")
    if keys:
        differing_keys = page.Table(_OF_KEYS, ("key", *names), keys)
    marked = [
        name if state.finished else f"{name} ({state.text.partition(',')[0]})"
        for name, state in states
    ]
    sections = [
        page.Section("Final numbers", [table, page.Text(_OF_ACCURACY), page.Text(_OF_SECONDS)]),
        page.Section("Keys that differ", [differing_keys]),
        page.Section("Curves", overlays.pieces(runs, marked, by)),
    ]
    return page.render(f"{len(runs)} runs compared", sections, [*lead, *map(page.Note, damage)])


def _numbers(runs: Sequence[Record], names: Sequence[str]) -> list[Row]:
    """Rows of the table of final numbers."""

    def accuracy(value: float | None, step: int | None = None) -> str | None:
        if value is None:
            return None
        return f"{value:.2%}" if step is None else f"{value:.2%} (step {step:,})"

    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return [
        (
            *(name, end.standing, accuracy(end.test)),
            *(accuracy(end.chosen, end.chosen_at), accuracy(end.papers)),
            *map(number, (end.step, end.parameters, end.examples_per_second, end.seconds)),
        )
        for name, end in zip(names, map(figures.final, runs), strict=True)
    ]


def _keys(runs: Sequence[Record]) -> list[Row]:
    """Rows of the table of keys that differ."""
    return [
        (key, *(None if value is None else str(value) for value in row))
        for key, row in differing.differences(runs).items()
    ]


def _aligned(rows: Sequence[Row]) -> str:
    """Rows of a table as lines whose columns are aligned; "-" for what has no value."""
    cells = [["-" if cell is None else first_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
