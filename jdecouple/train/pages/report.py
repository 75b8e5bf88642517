"""The command report: one page about a run."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdecouple._errors import first_line, require_int
from jdecouple._files import replace
from jdecouple.inference import cli
from jdecouple.train import evaluation
from jdecouple.train import report as closing
from jdecouple.train.pages import answers, curves, page, setup
from jdecouple.train.pages.charts import Chart, Curve, categories
from jdecouple.train.pages.page import Facts, Fold, Headline, Note, Piece, Section, Table, Text
from jdecouple.train.pages.record import Record, read

FILE_NAME = "report.html"
SELECTIONS = {
    "test": (
        "last step",
        "The network as training left it: no test result has chosen it.",
    ),
    "test_at_best_validation": (
        "best validation",
        "The step with the highest accuracy on held-out validation examples, the first of equals. "
        "The test split has not chosen it.",
    ),
    "best_test": (
        "best test (no result)",
        "The highest test accuracy of any exit at any step, which papers report. The test split "
        "itself has chosen it: it promises more than new examples will show, and is no result.",
    ),
}
"""Names of what `report.summary` returns, and what each is."""
_UNFINISHED = "The run has not finished: these accuracies are those so far, and no results yet."
_MANY_EXITS, _FOLDED_EXITS = 4, 16  # above which a chart shows what the table lists; it is folded


def main(argv: Sequence[str]) -> None:
    """Writes one self-contained HTML page about a run.

    It has the results, curves, answers on a split, accuracy against cost, the timeline and the
    configuration. What evaluate and calibrate have written of the same step is taken, the rest is
    measured where the data can be read. Nothing else in the workdir changes.

    Raises:
        ValueError, OSError: bad arguments, no workdir, or a page that cannot be written.
    """
    parser = cli.Parser("report", main.__doc__)
    parser.add_argument(
        "--split", choices=evaluation.SPLITS, default="test", help="by default test"
    )
    parser.add_argument("--data_dir", help="folder that now holds the data, if not that of before")
    parser.add_argument("--noevaluate", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, help=f"a file, by default WORKDIR/{FILE_NAME}")
    given = parser.parse_args(argv)
    if given.batch_size is not None:
        require_int(1, batch_size=given.batch_size)
    record = read(given.workdir)
    path = given.output or record.folder / FILE_NAME
    page.check_place(path)
    if given.step not in ("best", "last", *record.steps):
        steps = ", ".join(map(str, record.steps)) or "no checkpoints"
        raise ValueError(f"--step {given.step}: best and last are allowed, and {steps}")
    asked = answers.Asked(
        given.split, given.step, given.data_dir, given.batch_size, not given.noevaluate
    )
    text = render(record, asked)
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(path)


def render(record: Record, asked: answers.Asked) -> str:
    """The page about a run, as HTML."""
    sections = [
        _exits(record),
        curves.section(record.lines),
        *answers.sections(record, asked),
        setup.stages(record),
        setup.settings(record),
        _versions(record),
    ]
    return page.render(record.title, sections, [*_results(record), *map(Note, record.notes)])


def _results(record: Record) -> list[Piece]:
    """What came out, and how far the run is."""
    pieces: list[Piece] = []
    try:
        found = record.summary()
    except ValueError as error:
        done = any(line["split"] == "test" for line in record.lines)
        why = first_line(error) if done else "the run has not been evaluated yet"
        pieces.append(Note(f"There is no test accuracy: {why}."))
    else:
        chosen = {key: found[key] for key in SELECTIONS if key in found}
        rows = [
            (SELECTIONS[key][0], line["step"], f"{accuracy_of(key, line):.2%}")
            for key, line in chosen.items()
        ]
        result = found["test"]
        until = "at the last step," if record.finished else "so far, at step"
        pieces += [
            Headline(f"{result['accuracy']:.2%}", f"test accuracy {until} {result['step']:,}"),
            *([] if record.finished else [Note(_UNFINISHED)]),
            Table("Test accuracy, chosen three ways", ["chosen by", "step", "accuracy"], rows),
            Facts([SELECTIONS[key] for key in chosen], sentences=True),
        ]
        if bits := closing.exits(result, "bits_per_byte"):
            perplexities = closing.exits(result, "perplexity")
            rows = [(name, f"{bits[name]:.4f}", f"{perplexities[name]:.2f}") for name in bits]
            columns = ["exit", "bits per byte", "perplexity"]
            pieces.append(Table("Test bits per byte, last step", columns, rows))
        if "best_test" not in found:
            pieces.append(
                Note(f"metrics.jsonl has lost {record.lost} line(s): the best steps are not known.")
            )
    return [*pieces, Facts(_facts(record)), *_ending(record)]


def accuracy_of(key: str, line: Mapping[str, Any]) -> float:
    """The accuracy that a selection of `report.summary` is about."""
    return max(closing.exits(line).values()) if key == "best_test" else line["accuracy"]


def _facts(record: Record) -> list[tuple[str, Any]]:
    total, seconds = record.total_steps, record.seconds
    state = "finished" if record.finished else "not finished"
    facts = [
        ("Run", state),
        ("Step", f"{record.step:,}" + (f" of {total:,}" if total else "")),
        ("Time in training", seconds and f"about {_duration(seconds)}"),
        ("Parameters", record.content.get("parameters")),
        ("Device", record.content.get("device_kind")),
        ("Metrics written", _when(record.written)),
        ("Workdir", str(record.folder)),
        ("This page written", _when(datetime.datetime.now(datetime.UTC))),
    ]
    return [fact for fact in facts if fact[1]]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _when(time: datetime.datetime | None) -> str | None:
    return f"{time:%Y-%m-%d %H:%M} UTC" if time else None


def _ending(record: Record) -> list[Piece]:
    """Why the run is where it is, if it did not just train its steps."""
    pieces: list[Piece] = []
    if record.stopped_early is not None:
        pieces.append(Text(f"Early stopping has ended the run: {record.stopped_early}."))
    losses = {
        line["step"]: line.get("loss", 0.0) for line in record.lines if line["split"] == "train"
    }
    bad = [step for step, loss in losses.items() if loss is None]
    refused = record.folder / "checkpoints_refused"
    if bad or refused.is_dir():
        where = f" at step {bad[0]:,}" if bad else ""
        aside = f"; suspect checkpoints are in {refused.name}/" if refused.is_dir() else ""
        pieces.append(Note(f"A loss or a checkpoint was no longer sound{where}{aside}."))
    return pieces


def _exits(record: Record) -> Section:
    """Accuracy of every exit at the steps that were chosen."""
    try:
        found = record.summary()
    except ValueError:
        return Section("Accuracy of each exit", [])
    chosen = [(key, name, found[key]) for key, (name, _) in SELECTIONS.items() if key in found]
    names = dict.fromkeys(name for _, _, line in chosen for name in closing.exits(line))
    rows = [
        (name.replace("_", " "), *(_percent(closing.exits(line).get(name)) for *_, line in chosen))
        for name in names
    ]
    columns = ["exit", *(f"{name} (step {line['step']:,})" for _, name, line in chosen)]
    pieces: list[Piece] = [Table("Test accuracy", columns, rows)]
    if len(names) > _MANY_EXITS:
        pieces.insert(0, Chart("Test accuracy by depth", _by_depth(chosen), "exit", percent=True))
    if len(names) > _FOLDED_EXITS:
        pieces[1:] = [Fold(f"All {len(names)} exits", pieces[1:])]
    return Section("Accuracy of each exit", pieces)


def _by_depth(chosen: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[Curve]:
    found = []
    for (_, name, line), colour in zip(chosen, categories(len(chosen)), strict=True):
        known = ((exit[len("exit_") :], value) for exit, value in closing.exits(line).items())
        points = sorted((int(number), value) for number, value in known if number.isdecimal())
        found.append(Curve(name, [x for x, _ in points], [y for _, y in points], colour))
    return found


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"


def _versions(record: Record) -> Section:
    versions = record.content.get("versions", {})
    rows = [(name, str(value)) for name, value in versions.items()]
    return Section("Versions", [Facts(rows)] if rows else [])
