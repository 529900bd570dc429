"""The pack's HTTP routes, events and texts on nodes. The only file that knows aiohttp and PromptServer.

    GET  /gmp/runs             every run: id, state, step
    GET  /gmp/runs/{id}        one run and its newest event
    POST /gmp/runs/{id}/stop   asks it to stop at the next step, where it saves itself
    GET  /gmp/file?role=&name= what a file is; role: a menu of `host.MENUS`, name: one that this menu lists

Events go out as `gmp.run`. A run is told by its id; no path leaves the server.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re

from aiohttp import web
from comfy_api.latest import io, ui
from server import PromptServer

from ..gmp import telemetry
from ..gmp.errors import InputError
from . import files, host, runs

_ID = re.compile(r"[0-9a-f]{16}")
log = logging.getLogger(__name__)


def register() -> None:
    """Adds the routes to ComfyUI's server."""
    table = PromptServer.instance.routes
    table.get("/gmp/runs")(_list)
    table.get("/gmp/runs/{id}")(_show)
    table.post("/gmp/runs/{id}/stop")(_stop)
    table.get("/gmp/file")(_file)
    runs.listen(_publish)


def with_text(node: type[io.ComfyNode], text: str, *outputs: object) -> io.NodeOutput:
    """A node's outputs, with a text shown on it."""
    show_text(node, text)
    return io.NodeOutput(*outputs, ui=ui.PreviewText(text))


def show_text(node: type[io.ComfyNode], text: str) -> None:
    PromptServer.instance.send_progress_text(text, node.hidden.unique_id, PromptServer.instance.client_id)


def viewer(node: type[io.ComfyNode]) -> tuple[str, str | None]:
    """Who watches: the node's id, and the client whose prompt runs now."""
    return node.hidden.unique_id, PromptServer.instance.client_id


def small(event: dict[str, object]) -> dict[str, object]:
    """The plain values of an event, without folders. Numbers that JSON does not have become null."""
    plain = {name: value for name, value in event.items() if value is None or isinstance(value, (str, int, float))}
    shown = {name: host.without_folders(value) if isinstance(value, str) else value for name, value in plain.items()}
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in shown.items()}


def _publish(run: str, event: dict[str, object], text: str, viewers: set[tuple[str, str | None]]) -> None:
    """Called in the training thread; `send_sync` is made for that. The server may be shutting down."""
    text = host.without_folders(text)
    try:
        PromptServer.instance.send_sync("gmp.run", small(event) | {"run": run, "text": text})
        for node, client in viewers:
            PromptServer.instance.send_progress_text(text, node, client)
    except RuntimeError:
        log.debug("run %s: the server no longer takes events", run)


def _state(run: str) -> dict[str, object]:
    status = runs.status_of(run)
    return {"run": run, "state": status.state, "step": status.step}


def _known(request: web.Request) -> str:
    run = request.match_info["id"]
    if not _ID.fullmatch(run) or not (host.runs_folder() / run).is_dir():
        raise web.HTTPNotFound(text="there is no such run")
    return run


async def _list(request: web.Request) -> web.Response:
    def states() -> list[dict[str, object]]:
        folder = host.runs_folder()
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [_state(name) for name in names if _ID.fullmatch(name)]

    return web.json_response(await asyncio.to_thread(states))


async def _show(request: web.Request) -> web.Response:
    run = _known(request)

    def state() -> dict[str, object]:
        worker = runs.worker(run)
        events = [worker.latest] if worker else telemetry.read(host.runs_folder() / run)[-1:]
        newest = small(events[0]) | {"run": run} if events else None
        return _state(run) | {"event": newest}

    return web.json_response(await asyncio.to_thread(state))


async def _stop(request: web.Request) -> web.Response:
    if request.content_type != "application/json":  # other pages may post text/plain without being asked
        raise web.HTTPUnsupportedMediaType(text="send application/json")
    run = _known(request)
    worker = runs.at_work(run)
    if worker is None:
        raise web.HTTPConflict(text="this run is not running")
    worker.stop()
    return web.json_response(_state(run))


async def _file(request: web.Request) -> web.Response:
    role, name = request.query.get("role", ""), request.query.get("name", "")
    if role not in host.MENUS:
        raise web.HTTPNotFound(text="there is no such role")
    try:
        return web.json_response(await asyncio.to_thread(files.look, role, name))
    except InputError as error:
        raise web.HTTPNotFound(text="no menu lists such a file") from error
