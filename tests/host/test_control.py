"""Runs that are watched and asked for things over HTTP, beside a ComfyUI that makes pictures."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gmp.watch import duration
from tests.host.conftest import PYTHON
from tests.host.graphs import demo, node
from tests.host.repairs import LONG, end, events, only, start, steps, waiting


def heard_by(host, client: str, path: Path) -> subprocess.Popen:
    """Writes what ComfyUI sends to a client."""
    out = path.open("w")
    listener = subprocess.Popen([PYTHON, Path(__file__).parent / "listen.py", str(host.port), client], stdout=out)
    host.until(lambda: path.stat().st_size)
    return listener


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def kinds(host, run: str) -> list[str]:
    return [event["type"] for event in events(host, run)]


@pytest.fixture
def run(host, nodes):
    started = start(host, nodes, 100)
    yield started
    end(host, started)


def test_pause_holds_and_resume_goes_on(host, run):
    assert host.ask(run, "pause")[0] == 202
    host.until(lambda: host.runs()[run]["state"] == "paused")
    at = steps(host, run)
    time.sleep(1)
    assert steps(host, run) == at and host.runs()[run]["step"] == at
    assert "resume" in host.runs()[run]["can"] and "pause" not in host.runs()[run]["can"]
    assert host.ask(run, "resume")[0] == 202
    host.until(lambda: steps(host, run) > at)


def test_a_command_is_honoured_within_a_second(host, run):
    before = time.monotonic()
    host.ask(run, "pause")
    host.until(lambda: host.runs()[run]["state"] == "paused")
    assert time.monotonic() - before < 1


def test_save_and_measure_now(host, run):
    host.ask(run, "pause")
    host.until(lambda: host.runs()[run]["state"] == "paused")
    at = steps(host, run)
    host.ask(run, "save")
    host.until(lambda: at in host.get(f"/gmp/runs/{run}")["checkpoints"])
    host.ask(run, "measure")
    host.until(lambda: host.get(f"/gmp/runs/{run}")["measures"][-1]["step"] == at)
    assert host.runs()[run]["state"] == "paused"


def test_a_stopped_run_goes_on_when_its_prompt_is_queued_again(host, run):
    host.ask(run, "stop")
    host.until(lambda: host.runs()[run]["state"] == "interrupted")
    seen = host.runs()[run]
    assert "continue" in seen["can"] and seen["text"] == f"interrupted, resumable at step {seen['step']}"
    prompt = host.get(f"/gmp/runs/{run}/prompt")
    assert "KSampler" not in json.dumps(prompt) and "GmPRepair" in json.dumps(prompt)
    assert host.run(prompt).status == "success"
    host.until(lambda: steps(host, run) > seen["step"])
    assert host.runs()[run]["state"] == "running"


def test_a_crashed_comfyui_leaves_an_interrupted_run_that_one_click_resumes(host, nodes):
    run = start(host, nodes, 101, save_every=2)
    host.kill(signal.SIGKILL)
    host.start()
    seen = host.runs()[run]
    assert seen["state"] == "interrupted" and seen["step"] >= 2
    history = host.get(f"/gmp/runs/{run}/history")
    assert history["step"] >= seen["step"] and len(history["series"]["loss"]["mean"]) == history["step"]
    assert host.run(host.get(f"/gmp/runs/{run}/prompt")).status == "success"
    host.until(lambda: host.runs()[run]["state"] == "running")
    end(host, run)


def test_runs_wait_for_each_other_in_a_visible_order_and_can_be_cancelled(host, nodes, run):
    others = []
    for seed in (102, 103):
        known = set(host.runs())
        prompt = only(waiting(nodes, seed, on="none", **LONG), "GmPRepair")
        assert host.run(prompt).status == "success"
        others.append(host.until(lambda known=known: next(iter(host.runs().keys() - known), None)))
        host.until(lambda: host.runs()[others[-1]]["state"] == "waiting")
    second, third = others
    assert host.runs()[third]["ahead"] == [run, second]
    assert host.runs()[third]["text"] == f"waiting for {run}, {second}"
    host.ask(second, "stop")
    host.until(lambda: host.runs()[third]["ahead"] == [run])
    host.ask(run, "stop")
    host.until(lambda: host.runs()[third]["state"] == "running")
    for other in others:
        end(host, other)


def test_discarding_deletes_the_run(host, nodes):
    run = start(host, nodes, 104)
    assert host.ask(run, "discard")[0] == 202
    host.until(lambda: run not in host.runs())
    assert not (host.output / "gmp_runs" / run).exists()
    assert host.ask(run, "discard")[0] == 404


def test_a_run_that_cannot_do_it_says_so(host, nodes):
    run = start(host, nodes, 109)
    host.ask(run, "stop")
    host.until(lambda: host.runs()[run]["state"] == "interrupted")
    for command in ("pause", "resume", "stop", "save", "measure"):
        status, text = host.ask(run, command)
        assert status == 409 and "not at work" in text and str(host.base) not in text
    end(host, run)


# --- beside pictures


def picture(nodes: dict, name: str) -> dict:
    """Samples with a sampler that draws from the process's random numbers."""
    prompt = {key: demo(nodes)[key] for key in ("GmPDemoWorld",)}
    prompt |= {
        "model": node("GmPTestTinyModel", context_dim=64),
        "plus": node("CLIPTextEncode", clip=["GmPDemoWorld", 3], text="a small red circle"),
        "minus": node("CLIPTextEncode", clip=["GmPDemoWorld", 3], text=""),
        "latent": node("EmptyLatentImage", width=256, height=256, batch_size=1),
        "sampler": node(
            "KSampler", model=["model", 0], positive=["plus", 0], negative=["minus", 0], latent_image=["latent", 0],
            seed=7, steps=12, cfg=4.0, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0,
        ),
        "dump": node("GmPTestDump", value=["sampler", 0], name=name),
    }  # fmt: skip
    return prompt


def sampled(host, nodes, name: str):
    host.post("/free", {"unload_models": True, "free_memory": True})  # nothing comes from a cache
    result = host.run(picture(nodes, name))
    assert result.status == "success" and "sampler" not in result.cached, result.error
    return (host.output / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("policy", ["pause", "share"])
def test_pictures_beside_a_run_are_those_without_one(host, nodes, policy):
    alone = sampled(host, nodes, "alone")
    run = start(host, nodes, 105, while_generating=policy)
    assert sampled(host, nodes, policy) == alone
    samples = load_file(host.output / "alone.safetensors")["samples"]
    assert samples.isfinite().all() and samples.std() > 0
    held = [event for event in events(host, run) if event["type"] in ("paused", "resumed")]
    if policy == "pause":
        host.until(lambda: kinds(host, run)[-1] == "step" and "resumed" in kinds(host, run))
        held = [event for event in events(host, run) if event["type"] in ("paused", "resumed")]
        assert {event["why"] for event in held} == {"generating"}
    else:
        assert not held
    end(host, run)


def test_a_run_that_a_prompt_waits_for_does_not_wait_for_the_prompt(host, nodes):
    result = host.run(waiting(nodes, 106, epochs=2), seconds=120)
    assert result.status == "success", result.error


# --- what is told


def test_events_go_to_who_has_asked_seldom_and_small(host, nodes, tmp_path):
    asked, other = tmp_path / "asked", tmp_path / "other"
    listeners = [heard_by(host, "asked", asked), heard_by(host, "other", other)]
    status, newest = host.post("/gmp/watch", {"client": "asked"})
    assert status == 200 and newest == host.get("/gmp/runs")
    run = start(host, nodes, 107)
    time.sleep(2)
    end(host, run)
    for listener in listeners:
        listener.terminate()
        listener.wait()
    sent = [event for event in lines(asked) if event["type"] == "gmp.runs"]
    assert len(sent) > 5 and not [event for event in lines(other) if event["type"] == "gmp.runs"]
    times = [event["at"] for event in sent]
    assert all(sum(t <= later < t + 1 for later in times) <= 6 for t in times)  # 5 a second, and the clock's grain
    assert max(len(json.dumps(event["data"])) for event in sent) <= 4096
    states = [state["state"] for event in sent for state in event["data"]["runs"] if state["run"] == run]
    assert "running" in states
    assert str(host.base) not in asked.read_text()


def test_the_history_is_read_in_pieces(host, run):
    host.ask(run, "pause")
    host.until(lambda: host.runs()[run]["state"] == "paused")
    whole = host.get(f"/gmp/runs/{run}/history")
    taken = [event for event in events(host, run) if event["type"] == "step"]
    assert whole["at"] == [event["step"] for event in taken] and whole["stride"] == 1
    assert whole["series"]["loss"]["mean"] == pytest.approx([event["loss"] for event in taken], rel=1e-4)
    assert set(taken[0]["grad_norms"]) == set(whole["layers"]["names"])
    middle = whole["at"][len(whole["at"]) // 2]
    rest = host.get(f"/gmp/runs/{run}/history?since={middle}")
    assert not rest["reset"] and rest["at"] == [step for step in whole["at"] if step > middle]
    host.ask(run, "resume")


def test_the_newest_figures_are_those_that_were_recorded(host, run):
    host.ask(run, "pause")
    host.until(lambda: host.runs()[run]["state"] == "paused")
    seen, newest = host.runs()[run], [event for event in events(host, run) if event["type"] == "step"][-1]
    assert seen["loss"] == pytest.approx(newest["loss"], rel=1e-4)
    assert seen["memory"] == pytest.approx(newest["memory"], rel=1e-3)
    assert (seen["step"], seen["steps"], seen["epoch"]) == (newest["step"], newest["steps"], newest["epoch"])
    left = (newest["steps"] - newest["step"]) * 64 / seen["pairs_per_second"]
    assert seen["eta"] == pytest.approx(left, rel=1e-3) and duration(seen["eta"])


def test_a_finished_run_has_a_report_and_a_picture(host, nodes):
    prompt = waiting(nodes, 108, epochs=1)
    prompt["told"] = {"class_type": "PreviewAny", "inputs": {"source": ["GmPRepairedTextEncoder", 1]}}
    result = host.run(prompt)
    assert result.status == "success", result.error
    run = max(host.runs().values(), key=lambda one: one["started"])["run"]
    (link,) = result.outputs["told"]
    assert link == f"/gmp/runs/{run}/report"
    page = host.text(link)
    assert "Before and after" in page and "data:image/png;base64," in page and str(host.base) not in page
    assert "Verdict" in page and "GmPReassembleCLIP" in page and "What is missing" not in page
    assert "<script" not in page
    assert host.get(f"/gmp/runs/{run}")["pictures"] == ["loss.png"]
    config = host.get(f"/gmp/runs/{run}/config")
    assert config["config"]["epochs"] == 1 and config["dataset"]["training pictures"] > 200
    assert str(host.base) not in json.dumps(config)
