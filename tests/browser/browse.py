"""Opens ComfyUI's page, for the scripts beside it; they run with ComfyUI's Python, which has Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
READY = """!!(window.LiteGraph?.registered_node_types?.GmPRepair
           && window.app?.extensionManager && window.app.graph)"""
SETTING = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
FIT = "window.app.extensionManager.command.execute('Comfy.Canvas.FitView')"


@contextmanager
def opened(port: str, canvas: str) -> Iterator[tuple[Page, list[str]]]:
    """The page with the wanted canvas, "classic" or "nodes2", and the errors of its console so far."""
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/", wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120_000)
        page.wait_for_timeout(2000)
        page.keyboard.press("Escape")
        page.evaluate(SETTING, ["Comfy.TutorialCompleted", True])
        page.evaluate(SETTING, ["Comfy.Minimap.Visible", False])
        page.evaluate(SETTING, ["Comfy.VueNodes.Enabled", canvas == "nodes2"])
        page.wait_for_timeout(500)
        yield page, errors
        page.evaluate(SETTING, ["Comfy.VueNodes.Enabled", False])
        page.wait_for_timeout(300)
        browser.close()


def show(page: Page, graph: dict) -> None:
    """Opens a workflow and makes all of it visible."""
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1000)
    page.evaluate(FIT)
    page.wait_for_timeout(1000)
