"""Pages in a real browser: what they ask for, what they say, and whether they are drawn.

`python tests/browser.py PAGE FOLDER` checks one page and takes its pictures.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = "JDECOUPLE_BROWSER"  # set: no browser is a failure, not a reason to skip
WIDTHS = {1280: 800, 390: 844}  # of a desk and of a phone, with their heights
SCHEMES = ("light", "dark")
CONTRAST = 4.5  # the least of text that WCAG 2 asks for, at level AA

# Violations of the page's policy, also of what was blocked before it became a request.
_LISTEN = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.effectiveDirective} blocks ${event.blockedURI}`));
"""
_VISIBLE = """
const visible = (node) => node.checkVisibility({checkVisibilityCSS: true});
"""
# Number of pictures, and which of them are to be seen as the page stands.
_PICTURES = (
    """() => {"""
    + _VISIBLE
    + """
  const whole = (box) => box.width > 0 && box.height > 0;
  const loaded = (node) => node.tagName !== "IMG" || (node.complete && node.naturalWidth > 0);
  const filled = (node) => {  // a straight line has no height
    const box = node.tagName === "svg" ? node.getBBox() : node.getBoundingClientRect();
    return box.width + box.height > 0;
  };
  const pictures = [...document.querySelectorAll("img, svg, canvas")];
  const drawn = (node) => visible(node) && whole(node.getBoundingClientRect());
  return pictures.map((node) => [
    node.getAttribute("alt") || node.getAttribute("aria-label") || node.id || node.tagName,
    drawn(node) && loaded(node) && filled(node),
  ]);
}"""
)
# Texts of drawings that reach beyond them.
_CUT = (
    """() => {"""
    + _VISIBLE
    + """
  return [...document.querySelectorAll("svg text")].filter(visible).filter((node) => {
    const [inner, outer] = [node, node.ownerSVGElement].map((n) => n.getBoundingClientRect());
    return inner.left < outer.left - 1 || inner.right > outer.right + 1
      || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
  }).map((node) => node.textContent);
}"""
)
# Texts whose colour is too near to what is behind them.
_FAINT = (
    """(least) => {"""
    + _VISIBLE
    + """
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const read = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = read(getComputedStyle(node).backgroundColor);
      if (colour[3] > 127) return colour;
    }
    return [255, 255, 255, 255];
  };
  const faint = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].filter((child) => child.nodeType === Node.TEXT_NODE);
    const text = own.map((child) => child.data).join("").trim();
    if (!text || !visible(node) || node.closest("style, script, title")) continue;
    const style = getComputedStyle(node);
    const colour = node instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [luminance(read(colour)), luminance(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least) faint.push(`${text.slice(0, 40)} (${ratio.toFixed(1)})`);
  }
  return faint;
}"""
)


def started() -> Iterator[Any]:
    """A headless browser of this machine; skips, or fails, where there is none."""
    missing = pytest.fail if os.environ.get(REQUIRED) else pytest.skip
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        missing(f"none of {', '.join(NAMES)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: it comes with the extra 'test'")
    as_root = os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"] if as_root else []
        )
        with contextlib.closing(browser):
            yield browser


@contextlib.contextmanager
def opened(browser: Any, path: Path) -> Iterator[Any]:
    """The page of a file, when it has loaded, without a network.

    Its `faults` tell what it has asked for that is not itself, and what it has complained of.
    """
    context = browser.new_context(offline=True)
    with contextlib.closing(context):
        context.add_init_script(_LISTEN)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.faults = faults = []
        own = path.resolve().as_uri()

        def asked(request: Any) -> None:
            if request.url.partition("#")[0] != own and not request.url.startswith("data:"):
                faults.append(f"a request: {request.url[:100]}")

        def said(message: Any) -> None:
            if message.type == "error":
                faults.append(f"on the console: {message.text[:200]}")

        context.on("request", asked)
        page.on("websocket", lambda socket: faults.append(f"a request: {socket.url[:100]}"))
        page.on("console", said)
        page.on("pageerror", lambda error: faults.append(f"a script fails: {error}"))
        page.goto(own)
        yield page


def find_faults(browser: Any, path: Path) -> list[str]:
    """What is wrong with a page, at both widths, in both colour schemes.

    A request that is not for the file itself; an error of a script, or on the console; a violation
    of its policy; a picture that is not drawn, whatever is chosen and opened, or whose text is cut
    off; a page wider than the window; text that can hardly be read.
    """
    with opened(browser, path) as page:
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        pictures: list[list[Any]] = page.evaluate(_PICTURES)
        for width, scheme in _looks(page):
            drawn = _drawn(page)
            for choice in page.locator("input[type=radio]").all():
                choice.check()
                drawn |= _drawn(page)
            where = f"{width} pixels wide, {scheme}"
            names = (name for k, (name, _) in enumerate(pictures) if k not in drawn)
            page.faults += [f"not drawn, {where}: {name}" for name in names]
            over = page.evaluate("document.documentElement.scrollWidth") - width
            if over > 0:
                page.faults.append(f"{over} pixels too wide, {where}")
            page.faults += [f"cut off, {where}: {text}" for text in page.evaluate(_CUT)]
            faint = page.evaluate(_FAINT, CONTRAST)
            page.faults += [f"hard to read, {scheme}: {text}" for text in faint]
        page.faults += [f"policy: {each}" for each in page.evaluate("window.violations")]
        return [*dict.fromkeys(page.faults)]


def _looks(page: Any) -> Iterator[tuple[int, str]]:
    """Both widths in both colour schemes; the page is shown so while each is looked at."""
    for width, height in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            yield width, scheme


def _drawn(page: Any) -> set[int]:
    return {number for number, (_, seen) in enumerate(page.evaluate(_PICTURES)) if seen}


def take_pictures(browser: Any, path: Path, folder: Path) -> list[Path]:
    """Pictures of the whole page, at both widths and in both colour schemes."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    with opened(browser, path) as page:
        for width, scheme in _looks(page):
            taken.append(folder / f"{path.stem}-{width}-{scheme}.png")
            page.screenshot(path=taken[-1], full_page=True)
    return taken


def check(browser: Any, path: Path) -> None:
    """Fails with all that is wrong with a page, and where pictures of it are."""
    if faults := find_faults(browser, path):
        taken = take_pictures(browser, path, path.parent / "pictures")
        pytest.fail("\n".join([*faults, "pictures:", *map(str, taken)]))


def _main(page: str, folder: str) -> None:
    for browser in started():
        print("\n".join(find_faults(browser, Path(page))) or "no fault")
        print("\n".join(map(str, take_pictures(browser, Path(page), Path(folder)))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
