"""Opens ComfyUI's page, for the scripts beside it; they run with ComfyUI's Python, which has Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
READY = """!!(window.LiteGraph?.registered_node_types?.GmPRepair
           && window.app?.extensionManager && window.app.graph)"""
SETTING = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
COMMAND = "name => window.app.extensionManager.command.execute(name)"


@contextmanager
def opened(port: str, canvas: str) -> Iterator[tuple[Page, list[str]]]:
    """The page with the wanted canvas, "classic" or "nodes2", and the errors of its console so far.

    An error is told with the address that it came from.
    """
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.on("console", lambda told: told.type == "error" and errors.append(f"{told.text} {told.location['url']}"))
        page.on("pageerror", lambda error: errors.append(str(error.stack or error)))
        page.goto(f"http://127.0.0.1:{port}/", wait_until="domcontentloaded")
        settle(page)
        page.evaluate(SETTING, ["Comfy.TutorialCompleted", True])
        page.evaluate(SETTING, ["Comfy.Minimap.Visible", False])
        page.evaluate(SETTING, ["Comfy.VueNodes.Enabled", canvas == "nodes2"])
        page.wait_for_timeout(500)
        yield page, errors
        page.evaluate(SETTING, ["Comfy.VueNodes.Enabled", False])
        page.wait_for_timeout(300)
        browser.close()


def settle(page: Page) -> None:
    """Waits until the page has come up, and closes what greets."""
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(2000)
    page.keyboard.press("Escape")


def show(page: Page, graph: dict) -> None:
    """Opens a workflow and makes all of it visible."""
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1000)
    page.evaluate(COMMAND, "Comfy.Canvas.FitView")
    page.wait_for_timeout(1000)
