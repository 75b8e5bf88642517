"""The site is built without a warning, its links lead somewhere, and no page asks another host."""

import pkgutil
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = re.compile(r"https://github\.com/jdecouple/jdecouple/(?:blob|tree)/main/([^#]*)")
MODULES = (
    *("jdecouple", "jdecouple.data", "jdecouple.growth", "jdecouple.inference"),
    *("jdecouple.methods", "jdecouple.models", "jdecouple.objectives", "jdecouple.optim"),
    *("jdecouple.pipeline", "jdecouple.diagnostics", "jdecouple.routes", "jdecouple.schedules"),
    "jdecouple.train.tracking",
)


class Page(HTMLParser):
    """Where the links of a page lead, what it loads, and its anchors.

    Attributes:
        links: addresses of `a`.
        loads: addresses of all else that has one.
        ids: names that a link may end in.
        asks: components that ask other hosts by a script.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.asks: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        for name in ("href", "src", "srcset", "action", "data", "poster"):
            if name in given:
                (self.links if tag == "a" and name == "href" else self.loads).append(given[name])
        if given.get("data-md-component") == "source" or "mermaid" in given.get("class", ""):
            self.asks.append(str(given))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning would have ended the build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")  # of the end of Material's life, in 2027
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        folder = tmp_path_factory.mktemp("site")
        patch.chdir(ROOT)
        config = load_config("mkdocs.yml", site_dir=str(folder))
        assert config.strict
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_of_the_documents_is_there(site):
    for page in sorted(ROOT.glob("docs/*.md")):
        assert (site / page.with_suffix(".html").name).is_file(), page.name
    assert not [*site.rglob("*.py")]


def test_links_lead_somewhere(site, pages):
    wrong = []
    for path, page in pages.items():
        for address in [*page.links, *page.loads]:
            target, anchor = map(unquote, urldefrag(address))
            if match := REPOSITORY.match(address):
                wrong += [] if (ROOT / match[1]).exists() else [(path.name, address)]
            elif not re.match(r"\w+:", target):
                start = site if target.startswith("/") else path.parent  # as of 404.html
                file = (start / target.lstrip("/")).resolve() if target else path
                file = file / "index.html" if file.is_dir() else file
                anchors = pages[file].ids if file in pages else set()
                if not file.exists() or (anchor and anchor not in {*anchors, "__search"}):
                    wrong.append((path.name, address))
    assert not wrong


def test_no_page_asks_another_host(site, pages):
    for path, page in pages.items():
        assert not [address for address in page.loads if re.match(r"(\w+:)?//", address)], path
        assert not page.asks, path
    sheets = [*site.rglob("*.css")]
    assert sheets
    for sheet in sheets:
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:\w+:)?//", sheet.read_text()), sheet


def test_every_public_name_has_its_place(pages):
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api"))
    shown = {path.stem for path in pages if path.parent.name == "api"}
    for name in MODULES:
        module = pkgutil.resolve_name(name)
        public = getattr(module, "__all__", None) or [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
        ]
        assert public, name
        missing = [key for key in public if f"{name}.{key}" not in ids and key not in shown]
        assert missing == (["__version__"] if name == "jdecouple" else [])


def test_grids_are_drawn(site):
    concepts = (site / "concepts.html").read_text()
    assert concepts.count("<svg viewBox") >= 6
    assert concepts.count('class="backward"') > 100
