"""What the site does otherwise than the repository's own pages: links, pictures, API pages."""

import html
import pkgutil
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

from jdecouple import schedules

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)

_NAMED = r"<(a|h\d|pre)\b.*?</\1>|<code>jd\.([\w.]+)(?:\([^<]*)?</code>"

SHOWN = {
    "bench/RESULTS.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files outside of docs/ that are pages of the site."""

API = {
    "jdecouple": ("jdecouple: Model, Trainer, load, make_mesh",),  # its modules have pages
    "models": (
        "jdecouple.models",
        "jdecouple.models.resnet.resnet_of_groups",
        "jdecouple.models.cuts: cuttable",
        "jdecouple.models.layers",
        "jdecouple.models.kept",
    ),
    "data": ("jdecouple.data", "jdecouple.data.augment"),
    "methods": ("jdecouple.methods",),
    "objectives": ("jdecouple.objectives",),
    "routes": ("jdecouple.routes", "jdecouple.routes.loss_scale"),
    "optim": ("jdecouple.optim", "jdecouple.optim.correctors: names, get, none, Trail"),
    "schedules": ("jdecouple.schedules",),
    "pipeline": ("jdecouple.pipeline", "jdecouple.pipeline.distributed"),
    "diagnostics": ("jdecouple.diagnostics",),
    "inference": ("jdecouple.inference", "jdecouple.inference.reports"),
    "growth": ("jdecouple.growth",),
    "train": (
        "jdecouple.train.presets: load, names, folder",
        "jdecouple.train.config: default, filled, validate",
        "jdecouple.train.loop: train_and_evaluate, NonFiniteError",
        "jdecouple.train.hosts: ProcessSpec, join",
        "jdecouple.train.metrics: read_metrics",
        "jdecouple.train.tracking",
        "jdecouple.train.pages.page: render, Section, Text, Note, Code, Facts, Table",
        "jdecouple.train.pages.charts: Chart, Curve, depths, categories",
    ),
}
"""Pages of the API, and what each shows: modules or, behind a colon, some names of one."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that do not lie in docs/."""
    for source, page in SHOWN.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for name, modules in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=_api_page(name, modules)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lets links lead to pages of the site or into the repository, and draws schedules."""
    shown = {site: source for source, site in SHOWN.items()}
    source = shown.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = FENCE.split(markdown)
    parts[::2] = [_relinked(text, source, page.file.src_uri) for text in parts[::2]]
    parts[1::2] = [_drawn(fence) for fence in parts[1::2]]
    return "".join(parts)


def on_page_content(content: str, **_: Any) -> str:
    """Lets public names in the text, such as `jd.Trainer`, lead to the API."""

    def linked(match: re.Match[str]) -> str:
        name = f"jdecouple.{match[2]}"
        return (
            f'<autoref identifier="{name}" optional>{match[0]}</autoref>' if match[2] else match[0]
        )

    return re.sub(_NAMED, linked, content, flags=re.S)


def _api_page(name: str, shown: Sequence[str]) -> str:
    """Markdown for mkdocstrings; the first module is the page, unless it has another name."""
    title = "jdecouple" if name == "jdecouple" else f"jdecouple.{name}"
    lines = ["---", "search: {boost: 0.5}", "---", f"# {title}", ""]  # the documents come first
    if name == "jdecouple":
        others = ", ".join(f"[{other}]({other}.md)" for other in API if other != name)
        lines += [f"What most programs need, by `import jdecouple as jd`. More is in {others}.", ""]
    for entry in shown:
        identifier, _, members = entry.partition(": ")
        headed = str(identifier != title).lower()
        lines += [f"::: {identifier}", "    options:"]
        lines += [f"      show_root_heading: {headed}", f"      show_root_toc_entry: {headed}"]
        lines += [f"      members: [{members}]"] if members else []
        lines += [""]
    return "\n".join(lines)


def _relinked(markdown: str, source: str, page: str) -> str:
    """Links of the file `source` as those of the site's `page`."""

    def relinked(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if path in SHOWN:
            target = SHOWN[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"](https://github.com/jdecouple/jdecouple/{kind}/main/{path}{match[2] or ''})"
        else:
            return match[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", relinked, markdown)


# --- Pictures of schedules -----------------------------------------------------------------------

_TIME, _ROW, _LEFT = 21, 24, 58  # pixels of a unit of time, of a line, of its name
_UNITS = 42  # of time that a picture shows
_COSTS = schedules.Costs(forward=1.0, backward=1.0, weight=1.0)


def _drawn(fence: str) -> str:
    """A fence that begins with ```grid, behind a picture of consecutive batches."""
    match = re.match(r"```grid (\w+) (\d+) (\d+)\n(.*)", fence, re.S)
    if not match:
        return fence
    schedule = schedules.build(match[1], int(match[2]), int(match[3]))
    return f"{_picture(schedule)}\n\n```text\n{match[4]}"


def _picture(schedule: schedules.Schedule) -> str:
    """SVG in one line, in the colours of the page; a backward takes as long as two forwards."""
    spans = schedules.simulate(schedule, _COSTS, batches=_UNITS // 3).spans
    width, height = _LEFT + _TIME * _UNITS, _ROW * schedule.num_stages
    boxes = [
        f'<text x="0" y="{_ROW * (stage + 0.65)}">stage {stage}</text>'
        for stage in range(schedule.num_stages)
    ]
    for span in spans:
        boxes += _boxes(span, schedule)
    label = html.escape(f"{schedule.name}: what {schedule.num_stages} stages do at which time")
    return (
        f'<div class="grid-picture"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{label}">{"".join(boxes)}</svg></div>'
    )


def _boxes(span: schedules.Span, schedule: schedules.Schedule) -> Iterator[str]:
    start = span.start
    for kind, microbatch in zip(span.kinds, span.microbatches, strict=True):
        length = {"F": 1, "B": 1 if schedule.splits else 2, "W": 1, "S": 0}[kind.value]
        number = span.batch * schedule.num_microbatches + microbatch
        if length and number >= 0 and start + length <= _UNITS:
            x, y, width = _LEFT + _TIME * start, _ROW * span.stage + 2, _TIME * length
            yield (
                f'<rect class="{kind.name.lower()}" x="{x + 0.5}" y="{y}" rx="2" '
                f'width="{width - 1}" height="{_ROW - 4}"/>'
                f'<text class="number" x="{x + width / 2}" y="{y + _ROW * 0.57}">{number}</text>'
            )
        start += length


# --- Docstrings ----------------------------------------------------------------------------------


class Docstrings(griffe.Extension):
    """Examples go into fences; a function goes before the module that has its name."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Makes what packages export what it is at run time.

        `jdecouple.models.vgg` is the function and not the file, `resnet18` has its docstring.
        """
        loader.resolve_aliases()
        for module in _modules(pkg):
            for name in map(str, module.exports or ()):
                member = module.members.get(name)
                if name in module.imports and name in module.modules and name in member.members:
                    function = member.members[name]
                    function.members.update(member.members)  # for who asks for what it holds
                    module.members[name] = griffe.Alias(name, function, parent=module)
                elif member.is_attribute and isinstance(member.value, griffe.ExprCall):
                    member = member.final_target if member.is_alias else member
                    built = pkgutil.resolve_name(member.path)
                    member.docstring = member.docstring or griffe.Docstring(built.__doc__)
                    member.value = None  # how it is made says nothing to who calls it

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes examples, which Markdown would take for quotations."""
        if obj.docstring:
            example = r"^( *)>>> .*?(?=\n\s*\n|\Z)"
            obj.docstring.value = re.sub(
                example,
                lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```",
                obj.docstring.value,
                flags=re.M | re.S,
            )


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for below in module.modules.values():
        if not below.is_alias:
            yield from _modules(below)
