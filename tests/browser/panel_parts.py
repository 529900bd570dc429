"""Uses all parts of the panel beside one run that holds, and prints what was seen as JSON.

Runs with ComfyUI's Python: panel_parts.py PORT GRAPH RUN LOCALES SCREENSHOTS. In GRAPH, a GmP Repair node has RUN; at
the end RUN is discarded. LOCALES are languages, such as de,fr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from browse import COMMAND, SETTING, opened, settle, show
from panel import open_panel, toasted
from playwright.sync_api import Page

KINDS = ("loss", "heat", "gradients", "drift", "rate", "speed")
DRAWN = """place => [...document.querySelectorAll(`.gmp-${place} .gmp-plot`)].map(plot => ({
  names: (plot.data ?? []).filter(one => one.showlegend !== false).map(one => one.name ?? one.type),
  points: Math.max(0, ...(plot.data ?? []).map(one => one.x.length)),
  width: plot.querySelector('.main-svg')?.clientWidth ?? 0,
  room: plot.clientWidth,
}))"""
# What reaches over the panel's right edge, apart from what scrolls by itself.
OUTSIDE = """() => {
  const panel = document.querySelector('.gmp-sidebar');
  const { right } = panel.getBoundingClientRect();
  const all = [...panel.querySelectorAll('*:not(.gmp-scroll *, .gmp-numbers *, .gmp-live)')];
  const outside = all.filter(one => one.getClientRects().length && one.getBoundingClientRect().right > right + 0.5);
  const names = outside.map(one => one.className.baseVal ?? one.className);
  return panel.scrollWidth > panel.clientWidth ? ['the panel scrolls', ...names] : names;
}"""
READERS = """app.graph.nodes.filter(node => node.type === 'GmPRepairedTextEncoder')
             .map(node => node.widgets.slice(0, 2).map(widget => widget.value))"""
DIALOG = "[role=dialog]"


def without_plotly(page: Page, pictures: str) -> dict[str, object]:
    """The panel where plotly is not installed."""
    page.route("**/gmp/plotly.js", lambda route: route.fulfill(status=404, body="plotly is not installed"))
    open_panel(page)
    note = page.locator(".gmp-sidebar .gmp-pane .gmp-note")
    note.get_by_text("plotly").wait_for()
    page.locator(".gmp-sidebar .gmp-numbers tbody tr").first.wait_for()
    seen = {"note": note.inner_text(), "head": page.locator(".gmp-sidebar .gmp-numbers thead th").all_inner_texts()}
    rows = page.locator(".gmp-sidebar .gmp-numbers tbody tr")
    seen |= {"rows": rows.count(), "newest": rows.first.locator("th, td").all_inner_texts()}
    page.screenshot(path=f"{pictures}_without_plotly.png")
    page.unroute("**/gmp/plotly.js")
    return seen


def anew(page: Page) -> None:
    page.reload(wait_until="domcontentloaded")
    settle(page)
    open_panel(page)
    page.wait_for_function(f"() => ({DRAWN})('sidebar')[0].points > 0")


def charts(page: Page, pictures: str) -> dict[str, object]:
    """Every chart in a narrow sidebar, as lines and as numbers."""
    page.evaluate("document.querySelector('.gmp-sidebar').style.width = '320px'")
    seen: dict[str, object] = {"width": page.evaluate("document.querySelector('.gmp-sidebar').offsetWidth")}
    pane = page.locator(".gmp-sidebar .gmp-pane")
    for kind in KINDS:
        pane.locator("select").first.select_option(kind)
        page.wait_for_timeout(400)
        lines, outside = page.evaluate(DRAWN, "sidebar")[0], page.evaluate(OUTSIDE)
        page.locator(".gmp-sidebar").screenshot(path=f"{pictures}_{kind}.png")
        pane.locator(".gmp-as-numbers").click()
        head = pane.locator(".gmp-numbers thead th").all_inner_texts()
        outside += page.evaluate(OUTSIDE)
        if kind == "loss":
            page.locator(".gmp-sidebar").screenshot(path=f"{pictures}_numbers.png")
        pane.locator(".gmp-as-numbers").click()
        seen[kind] = {"lines": lines, "head": head, "outside": outside}
    page.locator(".gmp-config:not(.gmp-recipes) summary").click()
    page.locator(".gmp-config:not(.gmp-recipes) tbody tr").first.wait_for()
    seen["settings"] = page.locator(".gmp-config:not(.gmp-recipes) tbody tr").all_inner_texts()
    seen["outside"] = page.evaluate(OUTSIDE)
    page.locator(".gmp-config:not(.gmp-recipes) summary").evaluate("one => one.scrollIntoView()")
    page.screenshot(path=f"{pictures}_settings_of_the_run.png")
    page.locator(".gmp-config:not(.gmp-recipes) summary").click()
    pane.locator("select").first.select_option("loss")
    return seen


def downloads(page: Page) -> dict[str, object]:
    """The chart as files."""
    with page.expect_download() as csv:
        page.locator(".gmp-sidebar .gmp-csv").click()
    with page.expect_download() as png:
        page.locator(".gmp-sidebar .gmp-png").click()
    names = [one.value.suggested_filename for one in (csv, png)]
    text = csv.value.path().read_text(encoding="utf-8")
    return {"names": names, "csv": text, "png": png.value.path().read_bytes()[:4].hex()}


def use(page: Page, pictures: str) -> dict[str, object]:
    """Takes a saved step into the graph, and back."""
    row = page.locator(".gmp-sidebar .gmp-use-row")
    seen: dict[str, object] = {"menu": row.locator("option").all_inner_texts(), "before": page.evaluate(READERS)}
    row.locator("select").select_option(index=len(seen["menu"]) - 1)
    row.locator(".gmp-use").click()
    seen |= {"toast": toasted(page, "Checkpoint chosen"), "after": page.evaluate(READERS)}
    page.screenshot(path=f"{pictures}_used.png")
    page.mouse.click(1500, 800)
    page.keyboard.press("Control+z")
    page.wait_for_timeout(1000)
    return seen | {"undone": page.evaluate(READERS)}


def bottom(page: Page, pictures: str) -> dict[str, object]:
    """The wide panel below the graph, with all of the page's width."""
    page.evaluate(COMMAND, "Workspace.ToggleSidebarTab.gmp-runs")
    page.evaluate(COMMAND, "Workspace.ToggleBottomPanelTab.gmp-runs-wide")
    page.wait_for_function(f"() => ({DRAWN})('bottom').every(one => one.points > 0)")
    page.wait_for_timeout(500)
    seen = {"charts": page.evaluate(DRAWN, "bottom")}
    seen["scrolls"] = page.evaluate(
        "['scrollWidth', 'clientWidth'].map(name => document.querySelector('.gmp-bottom')[name])"
    )
    page.screenshot(path=f"{pictures}_bottom.png")
    page.evaluate(COMMAND, "Workspace.ToggleBottomPanelTab.gmp-runs-wide")
    open_panel(page)
    return seen | {"closed": page.locator(".gmp-bottom").count()}


def settings(page: Page, pictures: str) -> dict[str, object]:
    """The pack's page of the settings dialog, and what a setting does."""
    names = ("GmP.Panel.PollSeconds", "GmP.Panel.Smoothing", "GmP.Repair.WhileGenerating")
    values = page.evaluate("names => names.map(name => app.extensionManager.setting.get(name))", names)
    page.evaluate(COMMAND, "Comfy.ShowSettingsDialog")
    dialog = page.locator(DIALOG)
    dialog.get_by_text("Text Encoder Repair", exact=True).first.click()
    page.wait_for_timeout(500)
    text = dialog.inner_text()
    page.screenshot(path=f"{pictures}_settings.png")
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    policy = """() => {
      const node = LiteGraph.createNode('GmPRepair');
      return node.widgets.find(widget => widget.name === 'while_generating').value;
    }"""
    page.evaluate(SETTING, [names[2], "share"])
    shared = page.evaluate(policy)
    page.evaluate(SETTING, [names[2], "pause"])
    page.evaluate(SETTING, [names[1], 0])
    page.wait_for_function(f"() => !({DRAWN})('sidebar')[0].names.includes('smoothed')")
    sharp = page.evaluate(DRAWN, "sidebar")[0]["names"]
    page.evaluate(SETTING, [names[1], 0.9])
    return {"values": values, "text": text, "policies": [shared, page.evaluate(policy)], "sharp": sharp}


def report(page: Page) -> str:
    """The run's report, which opens in a window of its own."""
    with page.expect_popup() as opened_page:
        page.locator(".gmp-sidebar .gmp-report").click()
    return opened_page.value.locator("body").inner_text()


def looks(page: Page, pictures: str) -> dict[str, object]:
    """The panel in a dark theme and in a light one."""
    colours = """() => ({
      text: getComputedStyle(document.querySelector('.gmp-sidebar')).color,
      chart: document.querySelector('.gmp-sidebar .gmp-plot').layout.font.color,
    })"""
    seen = {"dark": page.evaluate(colours)}
    page.evaluate(SETTING, ["Comfy.ColorPalette", "light"])
    page.wait_for_timeout(1500)
    seen["light"] = page.evaluate(colours)
    page.screenshot(path=f"{pictures}_light.png")
    page.evaluate(SETTING, ["Comfy.ColorPalette", "dark"])
    page.wait_for_timeout(500)
    return seen


def languages(page: Page, locales: list[str], pictures: str) -> dict[str, object]:
    """The panel in those of the languages that the page offers."""
    seen = {}
    for locale in locales:
        page.evaluate(SETTING, ["Comfy.Locale", locale])
        page.wait_for_timeout(500)
        if page.evaluate("app.extensionManager.setting.get('Comfy.Locale')") == locale:
            seen[locale] = language(page, f"{pictures}_{locale}.png")
    page.evaluate(SETTING, ["Comfy.Locale", "en"])
    page.wait_for_timeout(500)
    anew(page)
    return seen


def language(page: Page, picture: str) -> dict[str, object]:
    """The panel in the language that was just chosen."""
    anew(page)
    page.evaluate("document.querySelector('.gmp-sidebar').style.width = '320px'")
    page.wait_for_timeout(500)
    buttons = page.locator(".gmp-sidebar .gmp-buttons .gmp-button").all_inner_texts()
    kinds = page.locator(".gmp-sidebar .gmp-pane select").first.locator("option").all_inner_texts()
    seen = {"buttons": [text.strip() for text in buttons], "kinds": kinds, "outside": page.evaluate(OUTSIDE)}
    page.screenshot(path=picture)
    return seen | {"sentence": page.locator(".gmp-sidebar .gmp-sentence").inner_text()}


def discard(page: Page, run: str, pictures: str) -> dict[str, object]:
    """Deletes the run, at the second thought."""
    page.locator(".gmp-sidebar .gmp-discard").click()
    dialog = page.locator(DIALOG)
    dialog.wait_for()
    page.wait_for_timeout(1000)
    seen: dict[str, object] = {"question": dialog.inner_text()}
    page.screenshot(path=f"{pictures}_discard.png")
    dialog.get_by_role("button", name="Cancel").click()
    dialog.wait_for(state="hidden")
    page.wait_for_timeout(1000)
    address = page.evaluate(f"location.origin + '/gmp/runs/{run}'")
    seen["kept"] = page.request.get(address).status
    page.locator(".gmp-sidebar .gmp-discard").click()
    dialog.get_by_role("button", name="Delete").click()
    page.locator(".gmp-sidebar .gmp-row", has_text=run).wait_for(state="detached")
    page.wait_for_timeout(500)
    seen["gone"] = page.request.get(address).status
    seen["node"] = page.locator(".gmp-widget .gmp-state").inner_text()
    page.screenshot(path=f"{pictures}_discarded.png")
    return seen


def main(port: str, graph: str, run: str, locales: str, pictures: str) -> None:
    seen: dict[str, object] = {}
    with opened(port, "classic") as (page, errors):
        page.set_default_timeout(30_000)
        try:
            show(page, json.loads(Path(graph).read_text(encoding="utf-8")))
            seen["missing"] = without_plotly(page, pictures)
            errors.clear()  # that the script was not there
            anew(page)
            seen["charts"] = charts(page, pictures)
            seen["files"] = downloads(page)
            seen["use"] = use(page, pictures)
            seen["bottom"] = bottom(page, pictures)
            seen["settings"] = settings(page, pictures)
            seen["report"] = report(page)
            seen["looks"] = looks(page, pictures)
            seen["languages"] = languages(page, locales.split(","), pictures)
            seen["discard"] = discard(page, run, pictures)
        except Exception:
            page.screenshot(path=f"{pictures}_failed.png")
            raise
    print(json.dumps(seen | {"errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
