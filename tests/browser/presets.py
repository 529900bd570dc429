"""Chooses presets on a GmP Repair node and in the panel as a person does, and prints what was seen as JSON.

Runs with ComfyUI's Python: presets.py PORT GRAPH classic|nodes2 SCREENSHOTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from browse import COMMAND, opened, show
from file_line import WIDGET
from panel import open_panel, toasted
from panel_parts import OUTSIDE
from playwright.sync_api import Page

VALUES = """app.graph.nodes.filter(node => node.type === 'GmPRepair').map(node => Object.fromEntries(
             node.widgets.filter(one => one.serialize !== false).map(one => [one.name, one.value])))"""
REPAIR = "app.graph.nodes.find(node => node.type === 'GmPRepair')"
SENT = """app.graphToPrompt().then(prompt =>
           Object.values(prompt.output).find(one => one.class_type === 'GmPRepair').inputs)"""
SET = f"""([name, value]) => {{
  const widget = {REPAIR}.widgets.find(one => one.name === name);
  widget.value = value;
  widget.callback?.(value);
}}"""
TITLES = "[...document.querySelectorAll('.gmp-presets li strong')].map(one => one.textContent)"


def values(page: Page) -> dict[str, object]:
    return page.evaluate(VALUES)[0]


def choose(page: Page, canvas: str, preset: str) -> None:
    """Opens the menu on the node with the mouse and clicks a preset."""
    node = page.evaluate(f"{REPAIR}.id")
    if canvas == "classic":
        page.mouse.click(*page.evaluate(WIDGET, [node, "preset"]))
        page.locator(".litecontextmenu .litemenu-entry").get_by_text(preset, exact=True).click()
    else:
        page.locator(f'[data-node-id="{node}"] button[aria-label="preset"]').click()
        page.get_by_role("option", name=preset, exact=True).click()
    page.wait_for_timeout(1000)


def focus(page: Page) -> None:
    """Shows the repair node alone, as large as it gets."""
    page.evaluate(f"app.canvas.selectNode({REPAIR})")
    page.evaluate(COMMAND, "Comfy.Canvas.FitView")
    page.wait_for_timeout(1000)


def on_the_node(page: Page, graph: dict, canvas: str, pictures: str) -> dict[str, object]:
    """A loaded graph, a chosen preset, changed values that are saved and loaded, and an undo."""
    seen: dict[str, object] = {"loaded": values(page)}
    focus(page)
    page.screenshot(path=f"{pictures}_loaded.png")
    choose(page, canvas, "seed-gmp")
    seen |= {"chosen": values(page), "sent": page.evaluate(SENT)}
    page.screenshot(path=f"{pictures}_chosen.png")
    page.evaluate(SET, ["epochs", 7])
    page.evaluate(SET, ["settings", "ema = 0.9"])
    page.wait_for_timeout(300)
    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    show(page, graph)
    seen["other"] = values(page)
    show(page, json.loads(saved))
    seen["again"] = values(page)
    focus(page)
    page.screenshot(path=f"{pictures}_again.png")
    choose(page, canvas, "large-batch")
    seen["second"] = values(page)
    page.mouse.click(1550, 850)
    for _ in range(6):  # a click, the choice and what it set may be steps of their own
        page.keyboard.press("Control+z")
        page.wait_for_timeout(600)
        if values(page)["preset"] == "seed-gmp":
            break
    seen["undone"] = values(page)
    return seen


def in_the_panel(page: Page, graph: dict, pictures: str) -> dict[str, object]:
    """The list, and its buttons with one node, with two, and with one of two selected."""
    show(page, graph)
    open_panel(page)
    page.evaluate("document.querySelector('.gmp-sidebar').style.width = '320px'")
    page.locator(".gmp-recipes summary").click()
    page.locator(".gmp-presets li").first.wait_for()
    page.locator(".gmp-recipes summary").evaluate("one => one.scrollIntoView()")
    page.wait_for_timeout(500)
    seen: dict[str, object] = {"listed": page.evaluate(TITLES), "outside": page.evaluate(OUTSIDE)}
    page.screenshot(path=f"{pictures}_panel.png")
    page.locator(".gmp-sidebar").screenshot(path=f"{pictures}_list.png")

    def use(preset: str) -> None:
        page.get_by_role("button", name=f"Use the preset {preset}", exact=True).click()
        page.wait_for_timeout(1000)

    use("gentle")
    seen |= {"toast": toasted(page, "Preset set"), "used": values(page)}
    page.screenshot(path=f"{pictures}_used.png")
    page.evaluate("""() => {
      const node = LiteGraph.createNode('GmPRepair');
      node.pos = [-700, 0];
      app.graph.add(node);
      app.canvas.deselectAll?.();
    }""")
    page.wait_for_timeout(500)
    use("clip-g")
    seen |= {"refused": toasted(page, "No preset was set"), "both": page.evaluate(VALUES)}
    page.evaluate("app.canvas.selectNode(app.graph.nodes.filter(node => node.type === 'GmPRepair')[1])")
    page.wait_for_timeout(500)
    use("clip-g")
    seen["selected"] = page.evaluate(VALUES)
    return seen


def main(port: str, path: str, canvas: str, pictures: str) -> None:
    graph = json.loads(Path(path).read_text(encoding="utf-8"))
    seen: dict[str, object] = {}
    with opened(port, canvas) as (page, errors):
        page.set_default_timeout(30_000)
        try:
            show(page, graph)
            seen["node"] = on_the_node(page, graph, canvas, pictures)
            seen["panel"] = in_the_panel(page, graph, pictures)
        except Exception:
            page.screenshot(path=f"{pictures}_failed.png")
            raise
    print(json.dumps(seen | {"errors": errors}))


main(*sys.argv[1:])
