"""Opens a workflow in a running ComfyUI's page, queues it, and prints what was seen as JSON.

Runs with ComfyUI's Python, which has Playwright: page.py PORT WORKFLOW classic|nodes2 SCREENSHOTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
READY = """!!(window.LiteGraph?.registered_node_types?.GmPRepair
           && window.app?.extensionManager && window.app.graph)"""
TEXT = """kind => window.app.graph._nodes.filter(node => node.type === kind)
          .flatMap(node => node.widgets ?? []).filter(widget => widget.name.includes('text-preview'))
          .map(widget => String(widget.value)).join('\\n')"""
SETTING = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
HISTORY = "fetch('/history').then(answer => answer.json()).then(all => Object.keys(all).length)"


def main(port: str, workflow: str, canvas: str, pictures: str) -> None:
    graph = json.loads(Path(workflow).read_text(encoding="utf-8"))
    errors: list[str] = []
    texts: list[str] = []
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
        page.evaluate("graph => window.app.loadGraphData(graph)", graph)
        page.wait_for_timeout(1000)
        page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(1000)
        page.screenshot(path=f"{pictures}_loaded.png")
        missing = page.evaluate("window.app.graph._nodes.filter(node => node.has_errors).map(node => node.type)")
        before = page.evaluate(HISTORY)
        queued = page.evaluate("window.app.queuePrompt(0, 1)")
        for _ in range(600):
            page.wait_for_timeout(100)
            text = page.evaluate(TEXT, "GmPRepair")
            if text and text not in texts:
                texts.append(text)
                if sum("step" in one for one in texts) == 5:
                    page.screenshot(path=f"{pictures}_running.png")
            if page.evaluate(HISTORY) > before:
                break
        page.wait_for_timeout(500)
        texts.append(page.evaluate(TEXT, "GmPRepair"))
        page.screenshot(path=f"{pictures}_finished.png")
        page.evaluate(SETTING, ["Comfy.VueNodes.Enabled", False])
        page.wait_for_timeout(300)
        browser.close()
    print(json.dumps({"queued": queued, "missing": missing, "texts": texts, "errors": errors}))


main(*sys.argv[1:])
