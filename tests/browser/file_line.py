"""Chooses files on the pack's nodes as a person does, and prints what the line on them tells, as JSON.

Runs with ComfyUI's Python: file_line.py PORT GRAPH FOLDER classic|nodes2 SCREENSHOTS. In GRAPH, node 1 loads a text
encoder and node 3 inspects a file; FOLDER is models/text_encoders.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from browse import opened, show
from playwright.sync_api import Page

LINES = """[...app.graph._nodes].sort((one, other) => one.id - other.id)
           .map(node => node.widgets.find(widget => widget.name === 'gmp_file_line').element)
           .map(line => line.isConnected ? line.textContent : 'not in the page')"""
SAVED = """app.graph.serialize().nodes.sort((one, other) => one.id - other.id)
           .map(node => node.widgets_values)"""
COUNT = "document.querySelectorAll('.gmp-file-line').length"
WIDGET = """([id, name]) => {
  const node = app.graph.getNodeById(id), widget = node.widgets.find(widget => widget.name === name);
  const middle = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
  const [x, y] = app.canvas.ds.convertOffsetToCanvas(middle);
  const box = app.canvas.canvas.getBoundingClientRect();
  return [box.left + x, box.top + y];
}"""
VALUE = "id => app.graph.getNodeById(id)?.widgets.find(widget => widget.name === 'file').value"


def choose(page: Page, canvas: str, node: int, file: str) -> None:
    """Opens a node's menu of files with the mouse and clicks one."""
    if canvas == "classic":
        page.mouse.click(*page.evaluate(WIDGET, [node, "file"]))
        page.locator(".litecontextmenu .litemenu-entry", has_text=file).first.click()
    else:
        page.locator(f'[data-node-id="{node}"] button[aria-label="file"]').click()
        page.get_by_role("option", name=file, exact=True).click()
    page.wait_for_timeout(800)
    assert page.evaluate(VALUE, node) == file


def main(port: str, graph: str, folder: str, canvas: str, pictures: str) -> None:
    seen: dict[str, object] = {}
    with opened(port, canvas) as (page, errors):
        show(page, json.loads(Path(graph).read_text(encoding="utf-8")))
        seen["loaded"] = page.evaluate(LINES)
        page.screenshot(path=f"{pictures}_loaded.png")

        choose(page, canvas, 1, "picture.safetensors")
        seen["wrong"] = page.evaluate(LINES)
        choose(page, canvas, 1, "checkpoints/small_xl.safetensors")
        seen["chosen"] = page.evaluate(LINES)
        page.screenshot(path=f"{pictures}_chosen.png")

        page.keyboard.press("Control+z")
        page.wait_for_timeout(1000)
        seen["undone"] = [page.evaluate(VALUE, 1), *page.evaluate(LINES)]

        choose(page, canvas, 1, "changing.safetensors")
        seen["before"] = page.evaluate(LINES)
        shutil.copyfile(Path(folder) / "lora.safetensors", Path(folder) / "changing.safetensors")
        page.mouse.click(1500, 800)
        page.keyboard.press("r")
        page.wait_for_timeout(2500)
        seen["reloaded"] = page.evaluate(LINES)

        page.evaluate("app.graph.getNodeById(1).widgets[0].value = 'alone.safetensors'")
        page.mouse.click(1500, 800)
        page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
        page.wait_for_timeout(1000)
        seen["set by a script"] = page.evaluate(LINES)

        seen["saved"] = page.evaluate(SAVED)
        seen["queued"] = page.evaluate("app.graphToPrompt().then(prompt => Object.values(prompt.output)[0].inputs)")
        page.evaluate("app.queuePrompt(0, 1)")
        page.wait_for_timeout(2500)
        page.screenshot(path=f"{pictures}_queued.png")

        page.evaluate("app.graph.remove(app.graph.getNodeById(1))")
        page.wait_for_timeout(500)
        seen["removed"] = page.evaluate(LINES)
        seen["left"] = page.evaluate(COUNT)
        seen["ran"] = page.evaluate("window.gmpRan ?? null")  # by a file name, if it got into the page as HTML
    print(json.dumps(seen | {"errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
