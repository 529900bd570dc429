"""The pack's HTTP routes, events and texts on nodes. The only file that knows aiohttp and PromptServer.

`openapi.json` beside this file describes the routes. A run is told by its id; no path enters or leaves. Events go, as
`gmp.runs`, to those only who have lately asked for them: the host sends to one client after the other, and one that has
stopped reading would in time hold up all.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from comfy_api.latest import io, ui
from server import PromptServer

from ..gmp.errors import InputError
from ..gmp.events import Event
from ..gmp.presets import presets
from ..gmp.report import report
from ..gmp.watch import checkpoints, config
from . import files, host, runs

EVERY = 0.2  # seconds between two events that are sent out
LARGEST = 4000  # bytes of an event
LEASE = 30.0  # seconds that a client hears events for
ROOM = 20.0  # seconds that a run waits for room on its device
PICTURES = ("loss.png",)
_ID = re.compile(r"[0-9a-f]{16}")
_CLIENT = re.compile(r"[0-9A-Za-z_-]{1,64}")
log = logging.getLogger(__name__)


def register() -> None:
    """Adds the routes to ComfyUI's server."""
    table = PromptServer.instance.routes
    table.get("/gmp/runs")(_list)
    table.get("/gmp/runs/{id}")(_show)
    table.get("/gmp/runs/{id}/history")(_history)
    table.get("/gmp/runs/{id}/config")(_config)
    table.get("/gmp/runs/{id}/pictures/{name}")(_picture)
    table.get("/gmp/runs/{id}/report")(_report)
    table.get("/gmp/runs/{id}/prompt")(_prompt)
    table.post("/gmp/runs/{id}/command")(_command)
    table.get("/gmp/presets")(_presets)
    table.post("/gmp/watch")(_watch)
    table.get("/gmp/file")(_file)
    table.get("/gmp/plotly.js")(_plotly)
    table.get("/gmp/openapi.json")(_openapi)
    runs.connect(_announcer.hear, PromptServer.instance.prompt_queue.get_tasks_remaining)


# ---- texts on nodes -------------------------------------------------------------------------------------------------


def with_text(node: type[io.ComfyNode], text: str, *outputs: object) -> io.NodeOutput:
    """A node's outputs, with a text shown on it."""
    show_text(node, text)
    return io.NodeOutput(*outputs, ui=ui.PreviewText(text))


def show_text(node: type[io.ComfyNode], text: str) -> None:
    PromptServer.instance.send_progress_text(text, node.hidden.unique_id, PromptServer.instance.client_id)


def ask_for_room(needed: int) -> None:
    """Asks ComfyUI to move its models off the device, which it does between prompts, and waits a while for it.

    For a run's own thread: ComfyUI's memory may be managed by the prompt thread alone.
    """
    end = time.monotonic() + ROOM
    while not host.has_room(needed) and time.monotonic() < end:
        queue = PromptServer.instance.prompt_queue
        queue.set_flag("unload_models", True)
        queue.set_flag("free_memory", True)
        time.sleep(1)


# ---- events ---------------------------------------------------------------------------------------------------------


class _Announcer:
    """Tells watching clients which runs have changed, as they are then: seldom, small, and all in one message."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: dict[str, None] = {}  # in the order in which they will be told
        self._waiting = False
        self._last = 0.0
        self._leases: dict[str, float] = {}

    def hear(self, run: str, event: Event) -> None:
        """Called in the training threads."""
        with self._lock:
            if not self._leases:
                return
            self._changed.setdefault(run)
            self._tell_soon()

    def _tell_soon(self) -> None:
        if not self._waiting:
            self._waiting = True
            timer = threading.Timer(max(0.0, self._last + EVERY - time.monotonic()), self._tell)
            timer.daemon = True
            timer.start()

    def lease(self, client: str) -> None:
        """Whoever has it hears events for `LEASE` seconds."""
        with self._lock:
            self._leases[client] = time.monotonic() + LEASE

    def _tell(self) -> None:
        with self._lock:
            self._last, self._waiting = time.monotonic(), False
            self._leases = {client: end for client, end in self._leases.items() if end > self._last}
            clients, changed = list(self._leases), list(self._changed)
            self._changed.clear()
        told, size = [], 20
        for position, run in enumerate(changed):
            state = _state(run)
            size += len(json.dumps(state)) + 2
            if size > LARGEST and told:
                with self._lock:  # the others come next time, first
                    self._changed = dict.fromkeys([*changed[position:], *self._changed])
                    self._tell_soon()
                break
            told.append(state)
        try:
            for client in clients:
                PromptServer.instance.send_sync("gmp.runs", {"runs": told}, client)
        except RuntimeError:
            log.debug("the server no longer takes events")


_announcer = _Announcer()


# ---- answers --------------------------------------------------------------------------------------------------------


def _state(run: str) -> dict[str, object]:
    """A run without folders in its texts."""
    seen = runs.overview(run)
    return {name: host.without_folders(value) if isinstance(value, str) else value for name, value in seen.items()}


class _Newest:
    """The state of every run, looked up once for all who ask while it was being looked up for somebody else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, object] = {}
        self._began = 0.0

    def __call__(self) -> dict[str, object]:
        asked = time.monotonic()
        with self._lock:
            if self._began < asked:  # what was looked up before may miss what this caller knows of
                self._began = time.monotonic()
                self._known = _every_state()
            return self._known


_newest = _Newest()


def _every_state() -> dict[str, object]:
    folder = host.runs_folder()
    names = [path.name for path in folder.iterdir() if _ID.fullmatch(path.name)] if folder.is_dir() else []
    states = [_state(name) for name in names]
    shown = [state for state in states if state["state"] != "empty"]
    # one that has recorded nothing yet is the newest
    return {"runs": sorted(shown, key=lambda state: (state["started"] or math.inf, state["run"]), reverse=True)}


def _plain(value: object) -> object:
    """JSON values without folders in any text."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return host.without_folders(value) if isinstance(value, str) else value


def _folder(request: web.Request) -> Path:
    run = request.match_info["id"]
    folder = host.runs_folder() / run
    if not _ID.fullmatch(run) or not folder.is_dir():
        raise web.HTTPNotFound(text="there is no such run")
    return folder


async def _json(make: Callable[[], object], status: int = 200) -> web.Response:
    """What `make` gives, computed and written out off the event loop."""
    try:
        text = await asyncio.to_thread(lambda: json.dumps(make(), allow_nan=False))
    except FileNotFoundError as error:  # it was deleted meanwhile
        raise web.HTTPNotFound(text="there is no such run") from error
    return web.Response(text=text, status=status, content_type="application/json")


async def _body(request: web.Request, allowed: dict[str, type]) -> dict[str, object]:
    """A JSON object with these members and no others; the first one is needed."""
    if request.content_type != "application/json":  # other pages may post text/plain without being asked
        raise web.HTTPUnsupportedMediaType(text="send application/json")
    try:
        body = await request.json()
    except ValueError:
        body = None
    needed = next(iter(allowed))
    if not isinstance(body, dict) or needed not in body:
        raise web.HTTPBadRequest(text=f"send a JSON object with {needed!r}")
    wrong = [name for name, value in body.items() if name not in allowed or not isinstance(value, allowed[name])]
    if wrong:
        raise web.HTTPBadRequest(text=f"{', '.join(map(repr, wrong))}: not known, or not of the right type")
    return body


async def _list(request: web.Request) -> web.Response:
    return await _json(_newest)


async def _show(request: web.Request) -> web.Response:
    folder = _folder(request)

    def details() -> dict[str, object]:
        alarms = _plain(runs.watch.alarms(folder)[-50:])
        there = [name for name in PICTURES if (folder / name).exists()]
        found = {"measures": runs.watch.measures(folder), "alarm_events": alarms, "pictures": there}
        return _state(folder.name) | checkpoints(folder) | found

    return await _json(details)


async def _history(request: web.Request) -> web.Response:
    folder, since = _folder(request), request.query.get("since", "0")
    if not re.fullmatch(r"[0-9]{1,9}", since):
        raise web.HTTPBadRequest(text="since is a step, such as 100")

    def answer() -> dict[str, object]:
        history = runs.watch.history(folder, int(since))
        return history | {"alarms": _plain(history["alarms"])}  # all else is numbers

    return await _json(answer)


async def _config(request: web.Request) -> web.Response:
    folder = _folder(request)
    return await _json(lambda: _plain(config(folder)))


async def _picture(request: web.Request) -> web.StreamResponse:
    folder, name = _folder(request), request.match_info["name"]
    if name not in PICTURES or not (folder / name).is_file():
        raise web.HTTPNotFound(text="there is no such picture")
    return web.FileResponse(folder / name, headers={"Content-Type": "image/png", "Cache-Control": "no-cache"})


async def _report(request: web.Request) -> web.Response:
    folder = _folder(request)

    def make() -> str:
        history, state = runs.watch.history(folder, 0), runs.overview(folder.name)["text"]
        return report(folder, history, state, host.without_folders)

    page = await asyncio.to_thread(make)
    headers = {"Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"}
    return web.Response(text=page, content_type="text/html", headers=headers)


async def _prompt(request: web.Request) -> web.Response:
    path = _folder(request) / runs.PROMPT
    if not path.is_file():
        raise web.HTTPNotFound(text="this run was not started by a graph")
    return await _json(lambda: json.loads(path.read_text(encoding="utf-8")))


async def _command(request: web.Request) -> web.Response:
    folder = _folder(request)
    body = await _body(request, {"command": str, "offload": bool})
    command = body["command"]
    if command not in runs.COMMANDS:
        raise web.HTTPBadRequest(text=f"command is one of {', '.join(runs.COMMANDS)}")

    def tell() -> dict[str, object]:
        before = _state(folder.name)
        runs.send(folder.name, command, body.get("offload", False))
        return before

    try:
        return await _json(tell, status=202)
    except InputError as error:
        raise web.HTTPConflict(text=host.without_folders(str(error))) from error


async def _watch(request: web.Request) -> web.Response:
    body = await _body(request, {"client": str})
    if not _CLIENT.fullmatch(body["client"]):
        raise web.HTTPBadRequest(text="client is the id of a websocket")
    _announcer.lease(body["client"])
    return await _json(_newest)


async def _presets(request: web.Request) -> web.Response:
    from .repair import inputs_of

    found = [{"name": one.name, "when": one.when, "inputs": inputs_of(one.config)} for one in presets().values()]
    return await _json(lambda: {"presets": found})


async def _file(request: web.Request) -> web.Response:
    role, name = request.query.get("role", ""), request.query.get("name", "")
    if role not in host.MENUS:
        raise web.HTTPNotFound(text="there is no such role")
    try:
        return await _json(lambda: files.look(role, name))
    except InputError as error:
        raise web.HTTPNotFound(text="no menu lists such a file") from error


async def _plotly(request: web.Request) -> web.StreamResponse:
    package = importlib.util.find_spec("plotly")
    folders = package.submodule_search_locations if package else []
    script = next((p for p in (Path(f) / "package_data" / "plotly.min.js" for f in folders) if p.is_file()), None)
    if script is None:
        raise web.HTTPNotFound(text="plotly is not installed: pip install plotly, with ComfyUI's Python")
    return web.FileResponse(script, headers={"Content-Type": "text/javascript", "Cache-Control": "max-age=86400"})


async def _openapi(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(Path(__file__).with_name("openapi.json"), headers={"Content-Type": "application/json"})
