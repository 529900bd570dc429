"""The live panel in the real page: one run from its start to its end, and every part of the panel.

Both canvases, with the page that ComfyUI pins and with the newest on PyPI. Screenshots are kept in GMP_SCREENSHOTS, if
that names a folder.
"""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.test_page import browse, change, is_ours, need_browser, screenshots
from tests.host.conftest import COMFYUI, PYTHON, Host, host, nodes  # noqa: F401
from tests.host.graphs import ROOT
from tests.host.repairs import events, start, steps

PAGE = "comfyui-frontend-package"
EPOCH, STEPS = 30, 90
LOCALES = ("de", "fr")


def demo(folder: Path, seed: int, run: str = "") -> Path:
    """The demo graph with a run that lasts for a while, or with one that there is."""
    workflow = json.loads((ROOT / "workflows" / "demo_repair.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "GmPDemoWorld":
            node["widgets_values"][0] = 1024
        if node["type"] == "GmPRepair" and run:
            node["properties"]["gmp_run"] = run
    change(workflow, epochs=STEPS // EPOCH, batch=32, seed=seed)
    graph = folder / f"demo_{seed}.json"
    graph.write_text(json.dumps(workflow))
    return graph


def newest_page() -> Path:
    """The newest page on PyPI, installed beside ComfyUI once."""
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    found = subprocess.run([*pip, "index", "versions", PAGE], capture_output=True, text=True)
    version = re.match(rf"{PAGE} \(([\w.]+)\)", found.stdout)
    if not version:
        pytest.skip(f"the newest {PAGE} cannot be had: {found.stderr.strip()[-200:]}")
    folder = COMFYUI / ".frontends" / version[1]
    if not folder.exists():
        half = folder.with_name(f"{version[1]}.part")
        target = ["--no-deps", "--upgrade", "--target", half, f"{PAGE}=={version[1]}"]
        done = subprocess.run([*pip, "install", "--quiet", *target], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the newest {PAGE} cannot be installed: {done.stderr.strip()[-200:]}")
        half.rename(folder)
    return folder / "comfyui_frontend_package" / "static"


@pytest.fixture(scope="module", params=["pinned", "newest"])
def server(request, tmp_path_factory) -> Iterator[tuple[Host, Path | None, str]]:
    """ComfyUI, the folder of its page where that is not the pinned one, and the page's name."""
    need_browser()
    pinned = request.getfixturevalue("host")
    if request.param == "pinned":
        yield pinned, None, "pinned"
        return
    page = newest_page()
    one = Host(tmp_path_factory.mktemp("newest"))
    one.start(frontend=page)
    yield one, page, "newest"
    one.kill()


def follow(server: Host, page: Path | None, *arguments: object) -> dict:
    """Runs panel.py, loses and brings back the server for it, and returns what it saw."""
    command = [PYTHON, Path(__file__).parent / "panel.py", *map(str, arguments)]
    script = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    complaints: list[str] = []
    listener = threading.Thread(target=lambda: complaints.append(script.stderr.read()), daemon=True)
    listener.start()
    timer = threading.Timer(300, script.kill)
    timer.start()
    seen = ""
    for line in script.stdout:
        if line.strip() == "kill":
            server.kill(signal.SIGKILL)
        elif line.strip() == "start":
            server.start(server.port, page)
        else:
            seen = line
            continue
        script.stdin.write("done\n")
        script.stdin.flush()
    timer.cancel()
    listener.join(10)
    if server.process.poll() is not None:  # the script gave up in between
        server.start(server.port, page)
    assert script.wait(30) == 0, "".join(complaints)[-2000:]
    return json.loads(seen)


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def story(request, server, tmp_path_factory) -> dict:
    """What was seen of one run, from its start over a pause, a reload, a stop and a restart to its end."""
    one, page, name = server
    folder = tmp_path_factory.mktemp("story")
    graph = demo(folder, seed=200 + ["classic", "nodes2"].index(request.param))
    pictures = screenshots(folder) / f"panel_{name}_{request.param}"
    seen = follow(one, page, one.port, graph, one.output / "gmp_runs", EPOCH, request.param, pictures)
    seen["events"] = events(one, seen["run"])
    return seen


def test_the_curve_of_a_run_that_was_queued_grows_in_the_panel_and_on_the_node(story):
    curve = story["begin"]["curve"]
    assert len(curve) == 4 and curve == sorted(set(curve)), curve
    node = story["begin"]["node"]
    assert node["run"] == story["run"] and node["state"] == "running"
    assert node["words"].startswith("step ") and node["points"] >= 2
    assert node["last"] == "gmp_run"  # a widget behind it would take another one's saved value


def test_a_paused_run_takes_no_steps(story):
    before, after = story["hold"]["paused"]
    assert before and before == after
    assert story["hold"]["title"] == f"Run {story['run']}: Paused (as asked)"


def test_a_page_that_is_reloaded_has_the_curve_the_run_on_its_node_and_what_was_chosen(story):
    hold = story["hold"]
    taken = len(hold["paused"][0])
    assert hold["curve"] == taken and hold["state"] == "paused" and hold["again"]
    node = hold["node"]
    assert node["run"] == story["run"] and node["state"] == "paused" and node["points"] == taken
    assert node["words"] == f"step {taken} of {STEPS}"


def test_resume_goes_on_and_save_saves_the_step_that_is_taken(story):
    before, after = story["stop"]["resumed"]
    assert after > before
    by_hand = [step for step in story["stop"]["saved"] if step % EPOCH]
    assert by_hand and by_hand[0] >= before
    assert f"step_{by_hand[0]:08d}.state.json" in story["stop"]["files"]


def test_stop_saves_the_run_and_a_toast_tells_so(story):
    stopped = story["stop"]["stopped"]
    assert before_the_end(stopped) and story["stop"]["sentence"] == f"interrupted, resumable at step {stopped}"
    assert story["stop"]["toast"].startswith(f"Run {story['run']} was interrupted")


def before_the_end(step: int) -> bool:
    return 0 < step < STEPS


def test_a_lost_server_is_told_and_what_was_known_stays_until_it_is_back(story):
    seen = story["restart"]
    assert seen["trouble"] == "ComfyUI does not answer. What is shown may be old."
    assert seen["meanwhile"] == seen["state"] == "interrupted"
    assert seen["curve"] == story["stop"]["stopped"]


def test_a_run_goes_on_after_a_restart_where_it_was_and_finishes_with_a_toast(story):
    finish = story["finish"]
    assert finish["steps"] == list(range(1, STEPS + 1))  # none twice, none left out
    assert finish["state"] == "finished" and finish["curve"] == STEPS
    assert finish["toast"].startswith(f"Run {story['run']} has finished")
    assert finish["node"]["state"] == "finished" and finish["node"]["words"] == f"step {STEPS} of {STEPS}"
    assert finish["can"] == ["Discard", "Report"]
    kinds = [event["type"] for event in story["events"]]
    assert [kinds.count(kind) for kind in ("start", "paused", "resumed", "stopped", "resume", "done")] == [1] * 6


def test_the_open_graph_is_queued_again_when_the_run_ends_if_that_was_asked_for(story):
    assert story["finish"]["queued"] == 2  # what went on with the run, and the graph


def test_the_panel_leaves_no_error_in_the_console(story):
    lost = ("ERR_CONNECTION", "ERR_EMPTY_RESPONSE")  # while the server was gone
    assert not [error for error in story["errors"] if is_ours(error) and not any(word in error for word in lost)]


# ---- the parts, once ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(host, nodes, tmp_path_factory) -> dict:  # noqa: F811
    """What was seen of all parts of the panel beside a run that holds."""
    need_browser()
    run = start(host, nodes, 210, batch=16, save_every=4)  # 15 steps an epoch
    host.until(lambda: steps(host, run) >= 35)
    host.ask(run, "pause")
    host.until(lambda: host.runs()[run]["state"] == "paused")
    folder = tmp_path_factory.mktemp("parts")
    known = {"run": run, "events": events(host, run), "texts": host.get("/i18n")}
    known["taken"] = [event for event in known["events"] if event["type"] == "step"]
    known["saved"] = host.get(f"/gmp/runs/{run}")["checkpoints"]
    pictures = screenshots(folder) / "panel_parts"
    seen = browse("panel_parts.py", host.port, demo(folder, 210, run), run, ",".join(LOCALES), pictures)
    return known | seen


def test_without_plotly_there_are_numbers_and_the_line_that_installs_it(parts):
    seen = parts["missing"]
    assert "pip install plotly" in seen["note"]
    assert seen["head"][:2] == ["step", "loss"] and seen["rows"] == 12
    step, loss = seen["newest"][:2]
    last = parts["taken"][-1]
    assert int(step) == last["step"] and float(loss) == pytest.approx(last["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["loss", "heat", "gradients", "drift", "rate", "speed"])
def test_every_chart_is_drawn_and_fits_a_narrow_sidebar(parts, kind):
    assert parts["charts"]["width"] == 320
    seen = parts["charts"][kind]
    assert seen["lines"]["names"] and seen["lines"]["points"] > 1
    assert 0 < seen["lines"]["width"] <= seen["lines"]["room"] < 320
    assert seen["head"][0] == "step" and len(seen["head"]) > 1
    assert seen["outside"] == []


def test_the_settings_of_a_run_are_shown_and_fit_a_narrow_sidebar(parts):
    rows = dict(row.split("\t") for row in parts["charts"]["settings"])
    assert rows["batch"] == "16" and rows["text tower"].startswith("ruined_text_encoder.safetensors")
    assert len(rows) < 130 and parts["charts"]["outside"] == []


def test_the_numbers_that_are_saved_are_those_on_record(parts):
    files = parts["files"]
    assert files["names"] == [f"gmp_{parts['run']}_loss.csv", f"gmp_{parts['run']}_loss.png"]
    assert bytes.fromhex(files["png"]) == b"\x89PNG"
    rows = {int(row["step"]): row for row in csv.DictReader(io.StringIO(files["csv"]))}
    assert len(parts["taken"]) >= 35
    for event in parts["taken"]:
        assert float(rows[event["step"]]["loss"]) == pytest.approx(event["loss"], rel=1e-4)
    measured = [event for event in parts["events"] if event["type"] == "measure"]
    for event in measured:
        assert float(rows[event["step"]]["held-out"]) == pytest.approx(event["held_out"]["loss"], rel=1e-4)


def test_a_checkpoint_that_is_chosen_is_set_on_the_node_behind_the_run_and_can_be_taken_back(parts):
    seen, oldest = parts["use"], min(parts["saved"])
    assert seen["menu"][0] == "latest" and seen["menu"][-1] == f"step {oldest}"
    assert seen["before"] == [["latest", 0]] and seen["after"] == [["step", oldest]]
    assert f"step {oldest}, on 1 Repaired Text Encoder node" in seen["toast"]
    assert seen["undone"] == seen["before"]


def test_the_wide_panel_has_two_charts_and_takes_no_more_room_than_it_has(parts):
    seen = parts["bottom"]
    assert [len(one["names"]) > 0 and one["points"] > 1 for one in seen["charts"]] == [True, True]
    assert all(0 < one["width"] <= one["room"] for one in seen["charts"])
    assert seen["scrolls"][0] == seen["scrolls"][1] and seen["closed"] == 0


def test_the_settings_dialog_has_a_page_of_the_pack_and_its_settings_count(parts):
    seen = parts["settings"]
    assert seen["values"] == [1, 0.9, "pause"]
    for words in ("While pictures are made", "Seconds between two looks", "Smoothing of the loss"):
        assert words in seen["text"]
    assert seen["policies"] == ["share", "pause"]
    assert "smoothed" in parts["charts"]["loss"]["lines"]["names"] and "smoothed" not in seen["sharp"]


def test_the_report_opens_in_a_window_of_its_own(parts):
    assert parts["report"].startswith(f"Run {parts['run']}")


def test_the_panel_takes_the_colours_of_a_light_theme(parts):
    dark, light = parts["looks"]["dark"], parts["looks"]["light"]
    assert brightness(dark["text"]) > 150 > 100 > brightness(light["text"])
    assert light["chart"] != dark["chart"]


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("locale", LOCALES)
def test_the_panel_speaks_the_page_s_language_and_fits_a_narrow_sidebar(parts, locale):
    seen, texts = parts["languages"].get(locale), parts["texts"].get(locale, {}).get("gmp")
    if texts is None:
        pytest.skip(f"there is no locales/{locale}")
    if seen is None:
        pytest.skip(f"ComfyUI's page does not offer the language {locale}")
    names = ("pause", "resume", "continue", "stop", "save", "measure", "discard", "report")
    assert seen["buttons"] == [texts["button"][name] for name in names]
    assert seen["buttons"] != [parts["texts"]["en"]["gmp"]["button"][name] for name in names]
    assert seen["kinds"] == list(texts["chart"]["kind"].values())
    assert seen["sentence"] == texts["run"]["steps"].format(step=len(parts["taken"]), steps=15000)
    assert seen["outside"] == []


def test_discarding_asks_first(parts):
    seen = parts["discard"]
    assert "Discard the run?" in seen["question"] and parts["run"] in seen["question"]
    assert seen["kept"] == 200 and seen["gone"] == 404
    assert seen["node"] == "The run is not there any more: queue to start it."
