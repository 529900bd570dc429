"""Runs a graph with a strength scan in a running ComfyUI's page, presses its button, and prints what was seen as JSON.

Runs with ComfyUI's Python: choose.py PORT WORKFLOW classic|nodes2 SCREENSHOTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from browse import COMMAND, opened, settle, show

HISTORY = "fetch('/history').then(answer => answer.json()).then(all => Object.keys(all).length)"
BUTTON = "[...document.querySelectorAll('.gmp-widget button')].find(one => /strength/i.test(one.textContent))"
STRENGTHS = """window.app.graph._nodes.filter(node => ['GmPBlendTextEncoders', 'GmPApplyToCLIP'].includes(node.type))
               .map(node => [node.type, node.widgets.find(widget => widget.name === 'strength').value])"""

TEXTS = """Object.fromEntries(window.app.graph._nodes.map(node => [
             node.type, node.widgets?.find(widget => widget.name === '$$node-text-preview')?.value ?? '']))"""
HEIGHTS = "Object.fromEntries(window.app.graph._nodes.map(node => [node.type, node.size[1]]))"


def main(port: str, workflow: str, canvas: str, pictures: str) -> None:
    graph = json.loads(Path(workflow).read_text(encoding="utf-8"))
    with opened(port, canvas) as (page, errors):
        show(page, graph)
        page.screenshot(path=f"{pictures}_loaded.png")
        missing = page.evaluate("window.app.graph._nodes.filter(node => node.has_errors).map(node => node.type)")
        before, label = page.evaluate(HISTORY), page.evaluate(f"{BUTTON}.textContent")
        queued = page.evaluate("window.app.queuePrompt(0, 1)")
        for _ in range(1500):
            page.wait_for_timeout(100)
            if page.evaluate(HISTORY) > before:
                break
        page.wait_for_timeout(2000)
        page.evaluate(COMMAND, "Comfy.Canvas.FitView")
        page.wait_for_timeout(1000)
        page.screenshot(path=f"{pictures}_finished.png")
        suggestion = page.evaluate(f"{BUTTON}.textContent")
        page.evaluate(f"{BUTTON}.click()")
        page.wait_for_timeout(500)
        page.screenshot(path=f"{pictures}_used.png")
        strengths, told, heights = page.evaluate(STRENGTHS), page.evaluate(TEXTS), page.evaluate(HEIGHTS)

        page.reload(wait_until="domcontentloaded")
        settle(page)
        again = {"suggestion": page.evaluate(f"{BUTTON}.textContent"), "strengths": page.evaluate(STRENGTHS)}
        before = page.evaluate(HISTORY)
        page.evaluate("window.app.queuePrompt(0, 1)")
        for _ in range(1500):
            page.wait_for_timeout(100)
            if page.evaluate(HISTORY) > before:
                break
        page.wait_for_timeout(1000)
        page.screenshot(path=f"{pictures}_again.png")
        again |= {"told": page.evaluate(TEXTS)}
        answer = page.evaluate("fetch('/history').then(answer => answer.json())")
        states = [one["status"]["status_str"] for one in answer.values()]
    seen = {"queued": queued, "missing": missing, "label": label, "suggestion": suggestion, "strengths": strengths}
    seen |= {"told": told, "heights": heights, "again": again}
    print(json.dumps(seen | {"states": states, "errors": errors}))


main(*sys.argv[1:])
