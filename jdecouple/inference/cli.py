"""The commands that need a workdir alone: predict, generate and export."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdecouple._errors import Arguments
from jdecouple._files import replace
from jdecouple.data import csv_rows
from jdecouple.data.columns import places_to_read
from jdecouple.data.inputs import ImageInputs, Inputs, image_paths
from jdecouple.inference.load import load
from jdecouple.inference.rules import NAMES, Rule
from jdecouple.inference.run import Predictions, Run

EXITS = "exits.json"  # in a workdir: the rule that `calibrate` chose
_COLUMNS = ("input", "label", "class_name", "probability", "exit")
_FORMATS = ("csv", "jsonl")
_BATCHES = 8  # that are read before they are computed
_DIGITS = 6  # of a probability
_BATCH_SIZE = "inputs that are computed together; by default as in training's evaluation"

Row = tuple[str, Any]  # what an input is called, and what `encode` takes


class Parser(Arguments):
    """Arguments of a command on one workdir."""

    def __init__(
        self, command: str, documentation: str | None, batch_size: str | None = _BATCH_SIZE
    ):
        super().__init__(command, documentation)
        self.add_argument("workdir", metavar="WORKDIR", help="what was trained")
        self.add_argument(
            "--step", type=step, default="best", help="best (by validation), last or a number"
        )
        if batch_size is not None:
            self.add_argument("--batch_size", type=int, help=batch_size)


def predict(argv: Sequence[str]) -> None:
    """Classifies images or texts, and writes a line for each.

    Of images: files, folders (at any depth), CSV files with a column of paths, which begin at
    their folder. Of texts: files with one in a line, CSV files. `-`, or no input, reads lines from
    stdin: paths or texts.

    Raises:
        TypeError, ValueError, OSError: bad arguments, a workdir or an input that cannot be used.
    """
    parser = Parser("predict", predict.__doc__)
    parser.add_argument(
        "inputs", nargs="*", default=["-"], metavar="INPUT", help="file, folder or -"
    )
    parser.add_argument(
        "--exit", type=exit_or("calibrated"), help="by default the last; a number or 'calibrated'"
    )
    parser.add_argument("--column", help="of CSV files; several of texts: a,b")
    parser.add_argument(
        "--format", choices=_FORMATS, help="by default what --output ends in, else csv"
    )
    parser.add_argument(
        "--output", type=Path, help="a file, written whole or not at all; by default stdout"
    )
    given = parser.parse_intermixed_args(argv)  # inputs may stand before and behind options
    if given.output and not given.output.parent.is_dir():
        raise FileNotFoundError(f"--output {given.output}: its folder does not exist")
    if given.output and given.output.exists() and not given.output.is_file():
        raise ValueError(f"--output {given.output} is no regular file")
    run = load(given.workdir, given.step)
    exit = calibrated(run) if given.exit == "calibrated" else given.exit
    columns = None if given.column is None else given.column.split(",")
    rows = read_rows(run.inputs, given.inputs, columns)
    size = _BATCHES * run.rows(given.batch_size)
    found: list[dict[str, Any]] = []
    while part := [*itertools.islice(rows, size)]:
        names, items = zip(*part, strict=True)
        found += _answers(names, run.predict(list(items), exit, given.batch_size))
    if not found:
        raise ValueError("there are no inputs: at least one is needed")
    suffix = given.output.suffix[1:] if given.output else ""
    kind = given.format or (suffix if suffix in _FORMATS else "csv")
    # Names of files may be no UTF-8: in CSV they are what they were, in JSON they are escaped.
    errors = "backslashreplace" if kind == "jsonl" else "surrogateescape"
    _write(_text(found, kind).encode("utf-8", errors), given.output)


def export(argv: Sequence[str]) -> None:
    """Writes a network, or its first blocks and their exit, into a folder that serves it.

    Raises:
        TypeError, ValueError, OSError: bad arguments, or a workdir that cannot be used.
    """
    parser = Parser("export", export.__doc__, "the only number of inputs; by default any")
    parser.add_argument("folder", metavar="FOLDER", help="a new or an empty one")
    parser.add_argument(
        "--exit",
        type=exit_or("all"),
        help="number of that to end at, by default the last; or 'all'",
    )
    given = parser.parse_args(argv)
    folder = load(given.workdir, given.step).export(
        given.folder, exit=given.exit, batch_size=given.batch_size
    )
    print(folder)


def generate(argv: Sequence[str]) -> None:
    """Goes on with a text, by a network that was trained on tokens, and prints all of it.

    With a threshold every new token leaves at the first exit whose score is above it, and stderr
    tells how many left where.

    Raises:
        TypeError, ValueError, OSError: bad arguments, or a workdir that cannot be used.
    """
    parser = Parser("generate", generate.__doc__, None)
    parser.add_argument("--prompt", default="", help="its beginning, by default that of a document")
    parser.add_argument("--max_tokens", type=int, default=256, help="more than the prompt has")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="of the likeliest tokens; 0: of all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--exit", type=int, help="number of that to read, by default the last")
    where.add_argument(
        "--threshold", type=float, help="above which a token leaves early; inf: none"
    )
    parser.add_argument("--rule", choices=NAMES, help="what is above it, by default confidence")
    parser.add_argument("--patience", type=int, help="exits in succession above it, by default 1")
    given = vars(parser.parse_args(argv))
    rule, patience, threshold = (given.pop(name) for name in ("rule", "patience", "threshold"))
    if threshold is not None:
        given["exit"] = Rule(rule or "confidence", threshold, 1 if patience is None else patience)
    elif rule is not None or patience is not None:
        raise ValueError("--rule and --patience need a --threshold")
    run = load(given.pop("workdir"), given.pop("step"))
    text = run.generate(**given)
    print(given["prompt"] + text)
    if threshold is not None and len(text.exits):
        shares = (f"{exit} {np.mean(text.exits == exit):.0%}" for exit in run.exits)
        print(f"exits of {len(text.exits)} tokens: {', '.join(shares)}", file=sys.stderr)


def step(text: str) -> str | int:
    """A value of --step: a number, or a word for `load` to read."""
    return int(text) if text.isdecimal() else text


def exit_or(word: str) -> Callable[[str], str | int]:
    """What reads a value of --exit: a number, or this word."""

    def read(text: str) -> str | int:
        try:
            return text if text == word else int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"invalid value {text!r}: a number or {word!r} is needed"
            ) from None

    return read


def calibrated(run: Run) -> Rule:
    """The rule that `calibrate` chose; ValueError where there is none, or one of another step."""
    path = run.workdir / EXITS
    try:
        content = json.loads(path.read_bytes())
        rule, chosen_at = Rule.from_json(content["rule"]), content["step"]
        rule.for_exits(len(run.exits))
    except FileNotFoundError:
        raise ValueError(
            f"'{path}' is not there: jdecouple calibrate {run.workdir} writes it"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"'{path}' is no rule that calibrate wrote for this network") from error
    if chosen_at != run.step:
        raise ValueError(
            f"'{path}' was chosen at step {chosen_at}, but step {run.step} is loaded: calibrate "
            f"again, or give --step={chosen_at}"
        )
    return rule


def read_rows(inputs: Inputs, paths: Iterable[str], columns: Sequence[str] | None) -> Iterator[Row]:
    """Reads what is to be classified, in the order given.

    Args:
        inputs: what the network reads.
        paths: files and folders; `-` is stdin.
        columns: names of columns of CSV files, by default those that are no labels or numbers.

    Raises:
        ValueError: a file that cannot be read so.
    """
    pictures = isinstance(inputs, ImageInputs)
    for path in paths:
        if path.lower().endswith(".csv") and not Path(path).is_dir():
            folder = Path(path).parent
            for text in _column(Path(path), columns, pictures):
                yield text, str(folder / text) if pictures else text
        elif path != "-" and pictures:
            yield from ((file, file) for file in image_paths(path))
        else:
            texts = (line.rstrip("\r\n") for line in _lines(path))
            yield from ((text, text) for text in texts if text or not pictures)


def _lines(path: str) -> Iterator[str]:
    if path != "-" and Path(path).is_dir():
        raise ValueError(f"'{path}' is a folder: files of texts are needed")
    try:
        if path == "-":
            yield from sys.stdin or ()  # None where it is closed
            return
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        name = "stdin" if path == "-" else f"'{path}'"
        raise ValueError(f"{name} is no text in UTF-8 ({error})") from error


def _column(path: Path, columns: Sequence[str] | None, pictures: bool) -> Iterator[str]:
    places: Sequence[int] = ()
    for line, row in csv_rows.rows(path):
        if not places:
            places, is_header = places_to_read(row, columns, f"'{path}', line {line}", pictures)
            if is_header:
                continue
        if len(row) <= max(places):
            raise ValueError(f"'{path}', line {line} has only {len(row)} column(s)")
        yield " ".join(row[place] for place in places)


def _answers(names: Sequence[str], found: Predictions) -> Iterator[dict[str, Any]]:
    for row, name in enumerate(names):
        label = int(found.labels[row])
        probability = round(float(found.probabilities[row, label]), _DIGITS)
        values = (name, label, found.class_names[label], probability, int(found.exit[row]))
        yield dict(zip(_COLUMNS, values, strict=True))


def _text(found: Sequence[dict[str, Any]], kind: str) -> str:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def _write(encoded: bytes, path: Path | None) -> None:
    if path is not None:
        replace(path.resolve(), lambda temporary: temporary.write_bytes(encoded))
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(encoded)
    sys.stdout.buffer.flush()
