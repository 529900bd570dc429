"""The routes against their description, and against input that nobody should send."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, unsupported_method

from tests.host.repairs import end, start

ROOT = Path(__file__).parents[2]
DESCRIPTION = json.loads((ROOT / "nodes" / "openapi.json").read_text(encoding="utf-8"))
described = schemathesis.openapi.from_dict(DESCRIPTION)


@pytest.fixture(scope="module")
def run(host, nodes):
    started = start(host, nodes, 200)
    host.ask(started, "pause")
    host.until(lambda: host.runs()[started]["state"] == "paused")
    yield started
    end(host, started)


def test_the_description_is_that_of_the_routes(host):
    source = (ROOT / "nodes" / "routes.py").read_text(encoding="utf-8")
    registered = set(re.findall(r'table\.(get|post)\("(/gmp[^"]*)"\)', source))
    assert registered == {(verb, path) for path, verbs in DESCRIPTION["paths"].items() for verb in verbs}
    assert host.get("/gmp/openapi.json") == DESCRIPTION


def test_nothing_changes_on_get():
    assert {path for path, verbs in DESCRIPTION["paths"].items() if "post" in verbs} == {
        "/gmp/runs/{id}/command", "/gmp/watch",
    }  # fmt: skip


@described.parametrize()
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case, host, run):
    """Ids, steps, names and bodies of all kinds, in both senses of valid; half of the time of a run that is there."""
    if isinstance(case.body, dict) and case.body.get("command") in ("discard", "stop", "resume"):
        case.body["command"] = "pause"  # the run is needed, and paused, by the tests after this one
    there = "id" in (case.path_parameters or {}) and len(str(case.path_parameters)) % 2
    if there:
        case.path_parameters["id"] = run
    # with the right id, a wrong request may have become right; ComfyUI answers 404 to other methods of any path
    spared = [unsupported_method, *([negative_data_rejection] if there else [])]
    case.call_and_validate(base_url=f"http://127.0.0.1:{host.port}", excluded_checks=spared)


@pytest.mark.parametrize("path", [path for path, verbs in DESCRIPTION["paths"].items() if "{id}" in path])
@pytest.mark.parametrize("bad", ["0123456789abcdef", "..%2f..%2finput", "%2e%2e", "0123456789ABCDEF", "a" * 5000])
def test_what_is_no_run_is_not_found(host, path, bad):
    target = path.replace("{id}", bad).replace("{name}", "loss.png")
    status = host.ask(bad, "stop")[0] if path.endswith("command") else host.status(target)
    assert status == 404 or (len(bad) > 1000 and status in (400, 404, 414))


@pytest.mark.parametrize("path", ["command", "watch"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_forms_of_other_sites_are_refused(host, run, path, kind):
    target = "/gmp/watch" if path == "watch" else f"/gmp/runs/{run}/command"
    assert host.post(target, {"command": "stop", "client": "x"}, kind=kind)[0] == 415
    assert host.runs()[run]["state"] == "paused"


@pytest.mark.parametrize(
    "body", [[], None, "stop", {}, {"command": 3}, {"command": "explode"}, {"command": "stop", "path": "/etc"},
             {"command": "pause", "offload": "yes"}],
)  # fmt: skip
def test_bodies_of_another_form_are_refused_with_a_sentence(host, run, body):
    status, text = host.post(f"/gmp/runs/{run}/command", body)
    assert status == 400 and text and host.runs()[run]["state"] == "paused"


def test_a_body_that_is_no_json_is_refused(host, run):
    url = f"http://127.0.0.1:{host.port}/gmp/runs/{run}/command"
    request = urllib.request.Request(url, b"{command", {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == 400


def test_no_answer_names_a_folder(host, run):
    for path, verbs in DESCRIPTION["paths"].items():
        if "get" in verbs and "plotly" not in path and "file" not in path:
            target = path.replace("{id}", run).replace("{name}", "loss.png")
            if host.status(target) == 200:
                assert str(host.base) not in host.text(target) and "/root" not in host.text(target)
