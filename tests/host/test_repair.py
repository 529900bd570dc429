"""A repair in a real ComfyUI: from the demo workflow to the conditioning, and through stops and crashes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmp import telemetry
from gmp.clip import TextTower
from gmp.files import write_safetensors
from gmp.join import join
from gmp.layouts import read_text, read_vision, write_text
from gmp.tokenizer import Tokenizer
from gmp.world.models import ASSETS, ORIGINAL
from tests.host.conftest import PYTHON
from tests.host.graphs import demo, node
from tests.host.repairs import LONG, events, fresh_run, only, steps, waiting

PROMPT = "a small red circle left of a large blue square"


def threads(host) -> list[str]:
    return host.run({"1": node("GmPTestThreads")}).outputs["1"]


@pytest.fixture(scope="module")
def repaired(host, nodes, tmp_path_factory):
    """The demo graph's first run, and everything that ComfyUI sent meanwhile."""
    heard = tmp_path_factory.mktemp("events") / "events.jsonl"
    script = Path(__file__).parent / "listen.py"
    with heard.open("w") as out:
        listener = subprocess.Popen([PYTHON, script, str(host.port), "listener"], stdout=out)
        host.until(lambda: heard.stat().st_size)
        result = host.result(host.queue(demo(nodes), "listener"))
        time.sleep(0.5)
        listener.terminate()
        listener.wait()
    return result, [json.loads(line) for line in heard.read_text().splitlines()]


def test_the_demo_graph_repairs_the_encoder_that_prompts_are_read_with(host, repaired):
    result, _ = repaired
    assert result.status == "success", result.error
    run = next(iter(host.runs()))
    assert host.runs()[run]["state"] == "finished"
    encoder = read_text(host.output / "gmp_runs" / run / "text_encoder.safetensors")
    tower = TextTower(encoder.config)
    tower.load_state_dict({name: tensor for name, tensor in encoder.state.items() if name != "logit_scale"})
    with torch.no_grad():
        points = tower(Tokenizer()([PROMPT]).ids)
    seen = load_file(host.output / "demo.safetensors")
    torch.testing.assert_close(seen["cond"], points.last, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["pooled"], points.pooled, atol=1e-4, rtol=1e-4)


def test_the_saved_file_is_the_repaired_encoder(host, repaired):
    run = next(iter(host.runs()))
    saved = read_text(host.output / "clip" / "repaired_00001_.safetensors")
    result = read_text(host.output / "gmp_runs" / run / "text_encoder.safetensors")
    assert saved.config == result.config
    for name, tensor in result.state.items():
        assert torch.equal(saved.state[name], tensor), name
    with open(host.output / "clip" / "repaired_00001_.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header["__metadata__"]
    assert json.loads(metadata["prompt"])["GmPRepair"]["class_type"] == "GmPRepair"
    assert json.loads(metadata["gmp_run"])["config"]["epochs"] >= 1
    assert json.loads(metadata["gmp_source"])["sha256"] == result.source.sha256


def test_queueing_again_runs_nothing_again(host, nodes, repaired):
    before = set(host.runs())
    again = host.run(demo(nodes))
    assert again.status == "success"
    assert again.cached == set(demo(nodes))
    assert set(host.runs()) == before and threads(host) == []
    assert not (host.output / "clip" / "repaired_00002_.safetensors").exists()


def test_a_second_prompt_joins_the_run_at_work(host, nodes, repaired):
    known = set(host.runs())
    prompt = only(waiting(nodes, 1, on="none", **LONG), "GmPRepairedTextEncoder", "GmPSaveTextEncoder")
    first = host.run(prompt)
    assert first.status == "success" and "GmPSaveTextEncoder" not in first.outputs  # blocked: there is no step yet
    run = fresh_run(host, known)
    host.until(lambda: steps(host, run) >= 6)
    second = host.run(prompt)
    assert second.status == "success" and second.outputs["GmPSaveTextEncoder"]  # a checkpoint is there by now
    assert threads(host) == [f"gmp {run}"] and set(host.runs()) == known | {run}
    status, _ = host.ask(run, "stop")
    assert status == 202
    host.until(lambda: host.runs()[run]["state"] == "interrupted")
    assert events(host, run)[-1]["type"] == "stopped" and threads(host) == []


def test_cancelling_a_waiting_graph_saves_the_run_and_queueing_resumes_it(host, nodes):
    for seed, on in ((2, "GmPRepair"), (3, "GmPRepairedTextEncoder")):
        known = set(host.runs())
        prompt = waiting(nodes, seed, on=on, **LONG)
        prompt_id = host.queue(prompt)
        run = fresh_run(host, known)
        host.until(lambda run=run: steps(host, run) >= 6)
        host.post("/interrupt", {})
        assert host.result(prompt_id).interrupted
        status = host.get(f"/gmp/runs/{run}")
        assert status["state"] == "interrupted" and status["step"] >= 6
        stopped_at = status["step"]
        prompt_id = host.queue(prompt)
        host.until(lambda run=run, at=stopped_at: steps(host, run) > at)
        assert {"type": "resume", "step": stopped_at}.items() <= next(
            event for event in events(host, run) if event["type"] == "resume"
        ).items()
        host.post("/interrupt", {})
        assert host.result(prompt_id).interrupted


def test_a_killed_comfyui_resumes_the_run(host, nodes):
    known = set(host.runs())
    prompt = waiting(nodes, 4, epochs=12, save_every=2)
    host.queue(prompt)
    run = fresh_run(host, known)
    host.until(lambda: steps(host, run) >= 8)
    host.kill(signal.SIGKILL)
    host.start()
    assert host.runs()[run]["state"] == "interrupted"
    result = host.run(prompt)
    assert result.status == "success", result.error
    assert host.runs()[run]["state"] == "finished"
    resumes = [event for event in events(host, run) if event["type"] == "resume"]
    assert len(resumes) == 1 and resumes[0]["step"] >= 4
    standing = telemetry.read(host.output / "gmp_runs" / run, kinds=("step",))
    assert [event["step"] for event in standing] == list(range(1, standing[-1]["steps"] + 1))


def test_a_failed_run_tells_why_and_can_be_tried_again(host, nodes):
    prompt = only(waiting(nodes, 5), "GmPRepairedTextEncoder", "GmPSaveTextEncoder")
    prompt["GmPRepair"]["inputs"]["batch"] = 4096  # more than there are pictures
    result = host.run(prompt)
    assert result.failed == "GmPRepair" and "4096" in result.error, (result.error, result.status)
    again = host.run(prompt)
    assert again.failed == "GmPRepair" and again.error == result.error


def test_errors_that_are_told_to_everyone_name_no_folders(host, nodes):
    prompt = only(waiting(nodes, 51), "GmPRepairedTextEncoder", "GmPSaveTextEncoder")
    prompt["GmPRepair"]["inputs"]["batch"] = 4096
    prompt["GmPRepair"]["inputs"]["wait"] = prompt["GmPRepairedTextEncoder"]["inputs"]["wait"] = False
    known = set(host.runs())
    host.run(prompt)
    run = (set(host.runs()) - known).pop()

    def failure(word: str) -> str | None:
        error = host.get(f"/gmp/runs/{run}")["error"]
        return error if error and word in error else None

    host.until(lambda: failure("4096"))
    (host.output / "gmp_runs" / run / "notes.doc").write_text("not a run's file")
    host.run(prompt)  # tells the first failure
    host.run(prompt)  # starts again
    told = host.until(lambda: failure("notes.doc"))
    assert str(host.base) not in told and "gmp_runs" in told


def test_latest_best_and_single_steps_can_be_taken(host, nodes, repaired):
    prompt = only(waiting(nodes, 6, epochs=3, save_every=1), "GmPRepairedTextEncoder")
    prompt["dump"] = node("GmPTestDump", value=["GmPRepairedTextEncoder", 0], name="taken")
    known = set(host.runs())
    seen = {}
    for which, step in (("latest", 0), ("best", 0), ("step", 8), ("step", 9), ("step", 1)):
        prompt["GmPRepairedTextEncoder"]["inputs"] |= {"which": which, "step": step}
        result = host.run(prompt)
        if step == 1:  # three are kept
            assert result.failed == "GmPRepairedTextEncoder" and "it has 7, 8, 9" in result.error, result.error
            break
        assert result.status == "success", result.error
        seen[which, step] = load_file(host.output / "taken.safetensors")
    assert len(set(host.runs()) - known) == 1
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.allclose(seen["latest", 0][name], seen["step", 9][name], atol=1e-6)
    assert not torch.allclose(seen["step", 8][name], seen["step", 9][name], atol=1e-6)
    best = read_text(next(iter((host.output / "gmp_runs").glob(f"{(set(host.runs()) - known).pop()}/best*"))))
    assert torch.equal(seen["best", 0][name], best.state[name])


def test_an_anchor_needs_the_full_original(host, nodes, tmp_path):
    """A vision-only file, and a text encoder that has its own projection."""
    original = join(read_text(ASSETS / ORIGINAL), read_vision(ASSETS / ORIGINAL))
    vision = {name: tensor for name, tensor in original.state.items() if name.startswith("visual.")}
    text = {name: tensor for name, tensor in original.state.items() if not name.startswith("visual.")}
    config = json.dumps({"vision": asdict(original.config.vision)})
    models = host.base / "models"
    write_safetensors(vision, models / "clip_vision" / "vision_only.safetensors", {"clip_config": config})
    write_text(text, models / "text_encoders" / "whole.safetensors", config=original.config.text)
    prompt = only(waiting(nodes, 7), "GmPRepair")
    prompt["GmPReassembleCLIP"]["inputs"] = {"text_encoder": ["text", 0], "vision_tower": ["vision", 0]}
    prompt["text"] = node("GmPLoadTextEncoder", file="whole.safetensors", member="auto")
    prompt["vision"] = node("GmPLoadVisionTower", file="vision_only.safetensors")
    prompt["show"] = node("PreviewAny", source=["GmPRepair", 0])
    result = host.run(prompt)
    assert result.failed == "GmPRepair" and "no text tower" in result.error, result.error
    prompt["GmPRepair"]["inputs"]["anchor_weight"] = 0.0
    result = host.run(prompt)
    assert result.status == "success", result.error
    assert result.outputs["GmPRepair"][0].split("\n")[1].startswith("finished after")
