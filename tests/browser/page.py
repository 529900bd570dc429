"""Opens a workflow in a running ComfyUI's page, queues it, and prints what was seen as JSON.

Runs with ComfyUI's Python: page.py PORT WORKFLOW classic|nodes2 SCREENSHOTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from browse import opened, show

TEXT = """[...document.querySelectorAll('.gmp-widget')].filter(one => one.getClientRects().length)
          .map(one => ['.gmp-state', '.gmp-detail'].map(part => one.querySelector(part).textContent).join(': '))
          .join('\\n')"""
SHOWN = """Object.fromEntries(window.app.graph._nodes.map(node => [
             node.type, node.widgets?.find(widget => widget.name === '$$node-text-preview')?.value ?? '']))"""
HISTORY = "fetch('/history').then(answer => answer.json()).then(all => Object.keys(all).length)"


def main(port: str, workflow: str, canvas: str, pictures: str) -> None:
    graph = json.loads(Path(workflow).read_text(encoding="utf-8"))
    texts: list[str] = []
    with opened(port, canvas) as (page, errors):
        show(page, graph)
        page.screenshot(path=f"{pictures}_loaded.png")
        missing = page.evaluate("window.app.graph._nodes.filter(node => node.has_errors).map(node => node.type)")
        before = page.evaluate(HISTORY)
        queued = page.evaluate("window.app.queuePrompt(0, 1)")
        for _ in range(600):
            page.wait_for_timeout(100)
            text = page.evaluate(TEXT)
            if text and text not in texts:
                texts.append(text)
                if sum("step" in one for one in texts) == 5:
                    page.screenshot(path=f"{pictures}_running.png")
            if page.evaluate(HISTORY) > before:
                break
        page.wait_for_timeout(500)
        texts.append(page.evaluate(TEXT))
        page.screenshot(path=f"{pictures}_finished.png")
        shown = page.evaluate(SHOWN)
    print(json.dumps({"queued": queued, "missing": missing, "texts": texts, "shown": shown, "errors": errors}))


main(*sys.argv[1:])
