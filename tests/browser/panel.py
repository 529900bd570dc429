"""Follows one run through the panel as a person does, and prints what was seen as JSON.

Runs with ComfyUI's Python: panel.py PORT GRAPH RUNS EPOCH classic|nodes2 SCREENSHOTS. RUNS is the folder of runs, EPOCH
how many steps one has. A line "kill" or "start" that it prints is for the caller to do to the server, and to answer
with a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from browse import COMMAND, opened, settle, show
from playwright.sync_api import Page

CURVE = """(() => {
  const plot = document.querySelector('.gmp-sidebar .gmp-plot');
  const run = document.querySelector('.gmp-sidebar .gmp-row[aria-current] .gmp-name')?.textContent;
  const isOfRun = plot.layout?.uirevision.startsWith(run);
  return isOfRun ? plot.data.find(one => one.name === 'loss')?.x.length ?? 0 : 0;
})()"""
CHOSEN = "document.querySelector('.gmp-sidebar .gmp-row[aria-current]')?.dataset.state"
NODE = """(() => {
  const node = app.graph.nodes.find(node => node.type === 'GmPRepair');
  const [element] = [...document.querySelectorAll('.gmp-widget')].filter(one => one.getClientRects().length);
  return {
    run: node.properties.gmp_run ?? null,
    last: node.widgets.filter(widget => widget.name !== '$$node-text-preview').at(-1).name,
    state: element?.dataset.state,
    words: element?.querySelector('.gmp-detail').textContent,
    points: element?.querySelector('.gmp-spark polyline').getAttribute('points').split(' ').filter(Boolean).length,
  };
})()"""
SAVED = "[...document.querySelectorAll('.gmp-use-row option')].map(one => Number(one.value)).filter(Boolean)"
QUEUED = "fetch('/history').then(answer => answer.json()).then(all => Object.keys(all).length)"
TOASTS = "[...document.querySelectorAll('.p-toast-message, [data-toast-kind]')].map(one => one.innerText)"


def open_panel(page: Page) -> None:
    page.evaluate(COMMAND, "GmP.Panel.Open")
    page.wait_for_selector(".gmp-sidebar")


def until(page: Page, script: str, argument: object = None, seconds: float = 90) -> None:
    page.wait_for_function(script, arg=argument, timeout=1000 * seconds)


def is_now(page: Page, state: str) -> None:
    """Waits until the panel says so of the chosen run."""
    until(page, f"state => {CHOSEN} === state", state)


def press(page: Page, name: str) -> None:
    """Presses a button of the panel when it can be pressed."""
    page.locator(f".gmp-sidebar .gmp-{name}:not([aria-disabled])").click()


def toasted(page: Page, words: str) -> str:
    """The toast with these words."""
    until(page, f"words => {TOASTS}.some(text => text.includes(words))", words)
    return next(text for text in page.evaluate(TOASTS) if words in text)


def steps(runs: str, run: str) -> list[int]:
    """The steps that are on record."""
    lines = (Path(runs) / run / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event["step"] for event in events if event["type"] == "step"]


def ask(what: str) -> None:
    print(what, flush=True)
    sys.stdin.readline()


def begin(page: Page, pictures: str) -> dict[str, object]:
    """Queues the graph and watches the curve grow."""
    open_panel(page)
    page.evaluate("app.queuePrompt(0, 1)")
    is_now(page, "running")
    curve = [page.evaluate(CURVE)]
    for _ in range(3):
        until(page, f"last => {CURVE} > last", curve[-1])
        curve.append(page.evaluate(CURVE))
    page.screenshot(path=f"{pictures}_running.png")
    return {"curve": curve, "node": page.evaluate(NODE)}


def hold(page: Page, runs: str, run: str, pictures: str) -> dict[str, object]:
    """Pauses the run and opens the page anew."""
    press(page, "pause")
    is_now(page, "paused")
    at = steps(runs, run)
    page.wait_for_timeout(1500)
    until(page, f"steps => {CURVE} === steps", len(at))
    page.get_by_label("Queue again when the run ends").check()
    seen = {"paused": [at, steps(runs, run)], "title": page.locator(".gmp-title").inner_text()}
    page.screenshot(path=f"{pictures}_paused.png")

    page.reload(wait_until="domcontentloaded")
    settle(page)
    open_panel(page)
    until(page, f"{CURVE} > 0")
    page.wait_for_timeout(1500)
    seen |= {"curve": page.evaluate(CURVE), "state": page.evaluate(CHOSEN), "node": page.evaluate(NODE)}
    seen["again"] = page.get_by_label("Queue again when the run ends").is_checked()
    page.screenshot(path=f"{pictures}_reloaded.png")
    return seen


def save_and_stop(page: Page, runs: str, run: str, epoch: int, pictures: str) -> dict[str, object]:
    """Resumes the run, saves it, and stops it."""
    before = steps(runs, run)[-1]
    press(page, "resume")
    is_now(page, "running")
    until(page, f"last => {CURVE} > last", before)
    seen: dict[str, object] = {"resumed": [before, steps(runs, run)[-1]]}
    while not any(step % epoch for step in page.evaluate(SAVED)):  # the end of an epoch is saved anyhow
        before = len(page.evaluate(SAVED))
        press(page, "save")
        until(page, f"before => {SAVED}.length > before", before)
    seen["saved"] = page.evaluate(SAVED)
    seen["files"] = sorted(path.name for path in (Path(runs) / run / "checkpoints").glob("*.state.json"))
    press(page, "stop")
    is_now(page, "interrupted")
    seen |= {"toast": toasted(page, "was interrupted"), "sentence": page.locator(".gmp-sentence").inner_text()}
    seen["stopped"] = steps(runs, run)[-1]
    page.screenshot(path=f"{pictures}_stopped.png")
    return seen


def restart(page: Page, pictures: str) -> dict[str, object]:
    """Loses the server and has it back, at the same place."""
    ask("kill")
    page.locator(".gmp-trouble").wait_for(state="visible", timeout=30_000)
    seen: dict[str, object] = {"trouble": page.locator(".gmp-trouble").inner_text()}
    seen["meanwhile"] = page.evaluate(CHOSEN)
    page.screenshot(path=f"{pictures}_gone.png")
    ask("start")
    page.locator(".gmp-trouble").wait_for(state="hidden", timeout=60_000)
    seen |= {"state": page.evaluate(CHOSEN), "curve": page.evaluate(CURVE)}
    return seen


def finish(page: Page, runs: str, run: str, pictures: str) -> dict[str, object]:
    """Goes on with the run, to its end."""
    queued = page.evaluate(QUEUED)
    press(page, "continue")
    is_now(page, "running")
    page.screenshot(path=f"{pictures}_resumed.png")
    seen: dict[str, object] = {"toast": toasted(page, "has finished")}
    page.screenshot(path=f"{pictures}_finished.png")
    until(page, f"before => {QUEUED}.then(all => all >= before + 2)", queued)
    page.wait_for_timeout(1500)
    seen |= {"steps": steps(runs, run), "curve": page.evaluate(CURVE), "state": page.evaluate(CHOSEN)}
    seen |= {"queued": page.evaluate(QUEUED) - queued, "node": page.evaluate(NODE)}
    seen["can"] = page.evaluate(
        "[...document.querySelectorAll('.gmp-run .gmp-button:not([aria-disabled])')].map(one => one.innerText)"
    )
    page.screenshot(path=f"{pictures}_end.png")
    return seen


def main(port: str, graph: str, runs: str, epoch: str, canvas: str, pictures: str) -> None:
    seen: dict[str, object] = {}
    with opened(port, canvas) as (page, errors):
        page.set_default_timeout(60_000)
        try:
            show(page, json.loads(Path(graph).read_text(encoding="utf-8")))
            seen["begin"] = begin(page, pictures)
            run = seen["run"] = page.locator(".gmp-row[aria-current] .gmp-name").inner_text()
            seen["hold"] = hold(page, runs, run, pictures)
            seen["stop"] = save_and_stop(page, runs, run, int(epoch), pictures)
            seen["restart"] = restart(page, pictures)
            seen["finish"] = finish(page, runs, run, pictures)
        except Exception:
            page.screenshot(path=f"{pictures}_failed.png")
            raise
    print(json.dumps(seen | {"errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
