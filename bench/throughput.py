"""Speed, memory and compile time of methods on schedules, against BP on one device.

    python bench/throughput.py --output runs/throughput.json
    python bench/throughput.py --rows bp:1f1b,K=2,M=4 deinforeg,K=2 fdg,K=2 bp,D=2
    python bench/throughput.py --rows deinforeg,K=2 deinforeg,K=2,together deinforeg,K=2,apart

A row is `method[:schedule][,K=2][,D=1][,M=4][,T=1][,blocks=7+13][,together|apart][,spmd]`: K
stages, D replicas of each, M microbatches, T batches a call; `blocks` of every stage, by default
equally many; `together` has all stages on one device in one call, `apart` on one device in the
calls that several devices would have; `spmd` is the engine of one program. All rows train the same
net of equal blocks on the same global batches, which are on the devices beforehand. BP on one
device and every row's method on one device are added as references.

    --model mlp, vgg, or gpt: causal layers on rows of 128 tokens, the first behind an embedding,
                where `dgl` has a LayerNorm and a dense layer as its head
    --modules N joins the blocks to N blocks for methods, which have N heads then

Rows of PyTorch train the same net by BP from the same weights, a process a device, under Gloo or,
on GPUs, NCCL: `torch`, `torch:compiled`, `torch:ddp,D=2` and, by `torch.distributed.pipelining`,
`torch:gpipe,K=2,M=4`, `torch:1f1b,K=2,M=4`, `torch:zero_bubble,K=2,M=4` (ZB1P) and, two stages a
process in a V, `torch:zbv,K=4,M=4` and `torch:dualpipe_v,K=4,M=4`. They are left out, with a line
that says so, where they cannot run: pip install 'jdecouple[bench]' brings PyTorch.

Every row has processes of its own, which live from beginning to end. The rows take turns: each
trains a segment of N batches while the others idle. A segment lasts from the first dispatch until
all work is done, so that stages fill and drain once a segment.

    --place processes   K x D processes under `jax.distributed`, each pinned to a core of its own
                that is its only device (Linux; the default where JAX has no other device)
    --place devices     one process with all devices of JAX, such as GPUs; on one device all stages
                are together (JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 makes four that share cores)

Columns, as medians (lowest to highest) over the segments:

    x bp, x same method   time of BP, and of the same method, on one device over the row's, turn by
                turn; the same method has one stage and one microbatch, a delayed one its K stages
    ideal       the schedule's ratio to the same method with equal blocks and nothing else
    simulated   ms of a batch in the simulated segment, from the median time of every call on one
                device alone and from the link, and its error; not for replicas
    peak        the most bytes ever in use on a device, where JAX knows, as on GPUs
    state       parameters, statistics, optimiser and queues of the fullest device

A second table compares rows that compute the same: with T batches a call or another engine, and
with the stages on one device. Where pinned processes and `apart` do not end with losses and state
that are equal to the last bit, the exit code is 1; so it is where a row of PyTorch whose losses are
BP's begins its first segment with another one (by more than 1e-3, relative; 1e-2 in bfloat16).

`--dispatch N` adds what a stage and batch cost the host with nothing in flight, medians of N calls:
until the call returns, and until its batches are trained on. For it `--model arrays` is a net of
tiny blocks with `--hidden` arrays of state each.
"""

import contextlib
import functools
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import rows as row_specs
import runner
from rows import APART, BP, TORCH, Row
from runner import Columns, Processes, Spread

ROWS = (
    *("bp:gpipe,K=2,M=4", "bp:1f1b,K=2,M=4", "bp:zb_h1,K=2,M=4", "deinforeg,K=2", "scpl,K=2"),
    *("fdg,K=2", "ddg,K=2", "fr,K=2", "bp,D=2", "torch:compiled", "torch:ddp,D=2"),
    *("torch:gpipe,K=2,M=4", "torch:1f1b,K=2,M=4", "torch:zero_bubble,K=2,M=4"),
)
SIZES = {
    "mlp": {"hidden": 1024, "depth": 10, "batch": 256},
    "reversible": {"hidden": 2048, "depth": 10, "batch": 256},  # layers of 1024, but for the first
    "vgg": {"hidden": 32, "depth": 4, "batch": 64},
    "gpt": {"hidden": 128, "depth": 8, "batch": 8},
    "arrays": {"hidden": 64, "depth": 2, "batch": 8},
}
WARM_UP_BATCHES = 3
COST_BATCHES = 5
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}  # of PyTorch's losses


def measure(rows: Sequence[Row], options: dict[str, Any], pinned: bool) -> dict[str, Any]:
    """Lets the rows take turns: what they measured, and the "link" between the first of several."""
    cores = runner.cores() if pinned else None
    net = {x: options[x] for x in (*runner.NET, "dtype")}
    results: dict[Row, dict[str, Any]] = {row: {} for row in rows}
    simulated = [r for r in rows if r.groups > 1 and r.data == 1 and r.engine == "mpmd"]
    with contextlib.ExitStack() as stack:

        def start(row: Row) -> Processes:
            worker = runner.TORCH_WORKER if row.engine == TORCH else runner.WORKER
            size = row.devices if row.engine == TORCH else 1
            group = Processes(cores and cores[: row.devices], worker=worker, size=size)
            return stack.enter_context(group)

        processes = {row: start(row) for row in rows}
        alone: Any = start(BP) if simulated else None
        for row, group in processes.items():
            group.ask("build", "row", net | row.options())
            results[row]["compile"] = group.segment("row", 1)["seconds"]
            group.segment("row", WARM_UP_BATCHES)
        for row in simulated:
            alone.ask("build", str(row), net | row.alone.options())
        pairs = [
            processes[row] for row in rows if pinned and row.devices > 1 and row.engine != TORCH
        ]
        link = pairs[0].link() if pairs else {}

        def train(row: Row) -> dict[str, Any]:
            costs = alone.ask("costs", str(row), COST_BATCHES) if row in simulated else []
            return {**processes[row].segment("row", options["steps"]), "costs": costs}

        arms = {row: functools.partial(train, row) for row in rows}
        for row, segments in runner.turns(arms, options["repeats"]).items():
            group = processes[row]
            samples = options["dispatch"] if row.engine != TORCH else 0
            results[row]["segments"] = segments
            results[row]["digest"] = runner.union(group.ask("digest", "row"))
            results[row]["dispatch"] = group.ask("dispatch", "row", samples)[0] if samples else {}
    return {"rows": results, "link": link}


def compare(measured: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """What the segments say of each row."""
    segments_of = {row: result["segments"] for row, result in measured["rows"].items()}
    results = []
    for row, segments in segments_of.items():
        ms = Spread.of(segment["ms"] for segment in segments)
        costs = [reply for segment in segments for reply in segment["costs"]]
        simulated = 1e3 * row.simulated(costs, measured["link"], steps) / steps if costs else None
        peaks = [segment["peak"] for segment in segments]
        processor = zip(*(segment["processor_ms"] for segment in segments), strict=True)
        results.append(
            {
                "row": str(row),
                "ms": ms,
                "processor_ms": [statistics.median(values) for values in processor],
                "ratio_to_bp": runner.ratios(segments_of[BP], segments),
                "ratio_to_method": runner.ratios(segments_of[row.reference], segments),
                "first_loss": sum(losses[0] for losses in segments[0]["losses"].values()),
                "ideal": row.ideal(steps),
                "simulated_ms": simulated,
                "simulated_error": simulated and simulated / ms.median - 1,
                "peak_bytes": None if None in peaks else max(peaks),
                "state_bytes": segments[-1]["state"],
                "compile_seconds": measured["rows"][row]["compile"],
                **measured["rows"][row]["dispatch"],
                **compare_twin(row, measured["rows"]),
            }
        )
    return results


def compare_twin(row: Row, measured: dict[Row, dict[str, Any]]) -> dict[str, Any]:
    """The row's speed over that of its twin, if any, and whether their numbers are equal."""
    if (twin := row.twin(list(measured))) is None:
        return {}
    sides = [measured[twin], measured[row]]
    ratio = runner.ratios(*(side["segments"] for side in sides))
    histories = [([x["losses"] for x in side["segments"]], side["digest"]) for side in sides]
    equal = histories[0] == histories[1] if row.chunk == twin.chunk else None
    return {"twin": str(twin), "ratio_to_twin": ratio, "equal_to_twin": equal}


COLUMNS: Columns = {
    "row": lambda r: f"`{r['row']}`",
    "ms per batch": lambda r: r["ms"].show(),
    "processor ms": lambda r: ", ".join(f"{ms:.1f}" for ms in r["processor_ms"]),
    "x bp": lambda r: r["ratio_to_bp"].show(2),
    "x same method": lambda r: r["ratio_to_method"].show(2),
    "ideal": lambda r: f"{r['ideal']:.2f}",
    "simulated ms": lambda r: (
        f"{r['simulated_ms']:.1f} ({r['simulated_error']:+.1%})" if r["simulated_ms"] else ""
    ),
    "peak MB": lambda r: f"{r['peak_bytes'] / 1e6:.0f}" if r["peak_bytes"] else "not measured",
    "state MB": lambda r: f"{r['state_bytes'] / 1e6:.1f}",
    "compile s": lambda r: f"{r['compile_seconds']:.1f}",
}
DISPATCH_COLUMNS: Columns = {
    "arrays of a stage": lambda r: r.get("arrays", ""),
    "dispatched us": lambda r: f"{r['dispatched']:.0f}" if "dispatched" in r else "",
    "done us": lambda r: f"{r['done']:.0f}" if "done" in r else "",
}
EQUAL = {True: "equal", False: "differ", None: "not compared"}
TWIN_COLUMNS: Columns = {
    "row": COLUMNS["row"],
    "twin": lambda r: f"`{r['twin']}`",
    "x twin": lambda r: r["ratio_to_twin"].show(2),
    "losses and state to the last bit": lambda r: EQUAL[r["equal_to_twin"]],
}


def report(options: dict[str, Any], measured: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The result as Markdown."""
    shown = COLUMNS | DISPATCH_COLUMNS if options["dispatch"] else COLUMNS
    texts = [runner.options_line(options, "throughput.py"), runner.columns(shown, results)]
    if twins := [result for result in results if "twin" in result]:
        texts.append(runner.columns(TWIN_COLUMNS, twins))
    if errors := [abs(x["simulated_error"]) for x in results if x["simulated_ms"]]:
        wire = runner.link_text(measured["link"])
        texts.append(f"- Largest error of the simulation: {max(errors):.1%}; link: {wire}.")
    segments = [segment for result in measured["rows"].values() for segment in result["segments"]]
    return "\n".join([*texts, *runner.others_note(segments)])


def differing(rows: Sequence[Row], results: list[dict[str, Any]], options: dict) -> list[str]:
    """Rows of PyTorch that do not compute what BP does, though they should."""
    losses = {row: result["first_loss"] for row, result in zip(rows, results, strict=True)}
    # Statistics of BatchNorm, which VGG has, are those of a microbatch or replica.
    alike = [
        r for r in rows if r.engine == TORCH and (options["model"] != "vgg" or r == r.reference)
    ]
    tolerance = TOLERANCE[options["dtype"]]
    return [str(row) for row in alike if not abs(losses[row] / losses[BP] - 1) <= tolerance]


def obstacle(row: Row, options: Namespace, kinds: Sequence[str]) -> str:
    """Why a row of PyTorch cannot run here; nothing if it can, or is ours."""
    if row.engine != TORCH:
        return ""
    if options.model == "arrays":
        return "PyTorch has no net of arrays here"
    if kinds and not (kinds[0].startswith(("gpu", "cuda")) and len(kinds) >= row.devices):
        return "pinned processes or a GPU for each of its devices are needed"
    try:
        import torch
        from torch.distributed import pipelining
    except ImportError:
        return "PyTorch is not installed: pip install 'jdecouple[bench]'"
    name = row_specs.TORCH_SCHEDULES[row.schedule].name
    return (
        "" if hasattr(pipelining, name or "Schedule1F1B") else f"torch {torch.__version__} lacks it"
    )


def runnable(
    rows: Sequence[Row], options: Namespace, kinds: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """The rows that can run here, and a line for each reason why others cannot."""
    obstacles = {row: obstacle(row, options, kinds) for row in rows}
    left_out: dict[str, list[str]] = {}
    for row, reason in obstacles.items():
        left_out.setdefault(reason, []).append(f"`{row}`")
    kept = [row for row, reason in obstacles.items() if not reason]
    return kept, [f"- Left out: {', '.join(left_out[x])}: {x}." for x in left_out if x]


def parse() -> tuple[Namespace, list[Row], list[str], list[str]]:
    """Options, rows with their references, lines on those left out, and the kinds of JAX's devices.

    There are no kinds for pinned processes.
    """
    parser = runner.flags(__doc__)
    runner.net_flags(parser, SIZES, rows=ROWS)
    parser.add_argument("--place", choices=("processes", "devices"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=runner.count, default=40, help="batches of a segment")
    parser.add_argument("--repeats", type=runner.count, default=5, help="segments of each row")
    parser.add_argument("--dispatch", type=runner.count, metavar="N", help="calls with none before")
    options = parser.parse_args()
    try:
        runner.sized(options, SIZES)
        rows = [row_specs.parse(text) for text in options.rows]
        for row in rows:
            row.check(options.modules, options.batch)
            if options.steps % row.chunk:
                raise ValueError(f"row '{row}': --steps {options.steps} is no multiple of T")
        kinds = []
        if options.place != "processes":
            with Processes(None) as process:
                kinds = process.ask("devices")[0]
        if options.place is None and all(kind.startswith("cpu") for kind in kinds):
            kinds = []
        rows, notes = runnable(rows, options, kinds)
        if len(kinds) == 1:
            rows = [row.together() for row in rows]
        had, needed = len(kinds or runner.cores()), max((row.devices for row in rows), default=1)
        if needed > had:
            what = "devices" if kinds else "cores"
            raise ValueError(f"the rows need {needed} {what}, {had} can be had")
    except ValueError as error:
        parser.error(str(error))
    options.place = "devices" if kinds else "processes"
    return options, row_specs.with_references(rows), notes, kinds


def main() -> int:
    arguments, rows, notes, kinds = parse()
    options = vars(arguments)
    output = options.pop("output")
    options["rows"] = [str(row) for row in rows]
    setup = runner.describe(devices=kinds)
    if any(row.engine == TORCH for row in rows):
        setup["versions"]["torch"] = metadata.version("torch")
    measured = measure(rows, options, pinned=not kinds)
    results = compare(measured, options["steps"])
    text = "\n".join([report(options, measured, results), *notes])
    for result in measured["rows"].values():  # these are compared, and long
        del result["digest"]
        for segment in result["segments"]:
            del segment["losses"]
    measured["rows"] = {str(row): result for row, result in measured["rows"].items()}
    runner.publish(setup, text, output, options=options, **measured, results=results)
    apart = [x for x, row in zip(results, rows, strict=True) if row.place == APART]
    if wrong := differing(rows, results, options):
        print(f"the losses of {', '.join(wrong)} are not those of bp", file=sys.stderr)
        return 1
    return int(not kinds and any(result.get("equal_to_twin") is False for result in apart))


if __name__ == "__main__":
    sys.exit(main())
