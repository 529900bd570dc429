"""Opens a report as a file, measures how it fits on screens and on paper, and prints what was seen as JSON.

Runs with ComfyUI's Python: report.py REPORT SCREENSHOTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from browse import ARGS
from playwright.sync_api import Browser, sync_playwright

WIDTHS = (400, 1200)
PAPER = (688, 1001)  # pixels of an A4 page inside its margins
TALLEST = 12_000  # pixels of a screenshot; Chromium makes none that is much taller
# How far the page can be scrolled sideways, and which elements reach beyond its right edge
WIDE = """() => ({
  scrolls: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  beyond: [...document.querySelectorAll('main *')]
    .filter(one => one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
    .map(one => one.tagName + ' ' + one.textContent.slice(0, 40)),
  pictures: [...document.images].map(one => one.complete && one.naturalWidth > 0),
  ink: getComputedStyle(document.body).color, back: getComputedStyle(document.body).backgroundColor,
})"""
# What must not be cut in two: how it is kept together, and its height
WHOLE = """() => [...document.querySelectorAll('tr, figure, img, .measured tbody')].map(one => ({
  what: one.tagName, height: one.getBoundingClientRect().height,
  kept: [...(function* () { for (let at = one; at; at = at.parentElement) yield at; })()]
    .some(at => getComputedStyle(at).breakInside === 'avoid'),
}))"""


def on_screen(browser: Browser, address: str, width: int, scheme: str, picture: str) -> dict[str, object]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    page.on("console", lambda told: told.type == "error" and errors.append(told.text))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or errors.append(asked.url))
    page.goto(address)
    seen = page.evaluate(WIDE)
    height = min(TALLEST, page.evaluate("document.documentElement.scrollHeight"))
    page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
    page.close()
    return seen | {"errors": errors}


def on_paper(browser: Browser, address: str, path: str) -> dict[str, object]:
    page = browser.new_page(viewport={"width": PAPER[0], "height": PAPER[1]}, color_scheme="dark")
    page.goto(address)
    page.emulate_media(media="print")
    seen = page.evaluate(WIDE) | {"whole": page.evaluate(WHOLE)}
    page.pdf(path=path, prefer_css_page_size=True, print_background=True)
    page.close()
    return seen


def main(report: str, pictures: str) -> None:
    address = Path(report).resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
        seen = {
            f"{width} {scheme}": on_screen(browser, address, width, scheme, f"{pictures}_{width}_{scheme}.png")
            for width in WIDTHS
            for scheme in ("light", "dark")
        }
        paper = on_paper(browser, address, f"{pictures}.pdf")
        browser.close()
    print(json.dumps({"screens": seen, "paper": paper, "errors": [e for one in seen.values() for e in one["errors"]]}))


main(*sys.argv[1:])
