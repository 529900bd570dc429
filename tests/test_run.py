"""Whole repairs: resumed exactly, safe from crashes, full disks and second owners; and what a folder holds."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gmp import run as run_module
from gmp import session, telemetry, trainer, training_data
from gmp import step as step_module
from gmp.clip import CLIP
from gmp.config import Anchor, Captions, RepairConfig, default_lr
from gmp.data.captions import Picture, read_index
from gmp.errors import InputError
from gmp.geometric import fold
from gmp.join import join, text_tower
from gmp.layouts import read_text, read_vision, write_text
from gmp.measure import drift
from gmp.run import BEST, RESULT, Status, describe_run, repair, run_id, status
from gmp.worker import Worker
from tests.small import CONTEXT, PICTURES, SMALL, disturbed, full_disk, small_clip, tokenize

CPU = torch.device("cpu")
COMMON = {"epochs": 2, "batch": 8, "lr": 1e-3, "held_out": 0.08, "save_every": 2}
TEXT = RepairConfig(**COMMON)
# 26 pictures, 2 held out: 3 steps an epoch, 6 in all
BOTH = RepairConfig(**COMMON | {"batch": 4, "accumulate": 2, "train": "both"})
CONFIGS = {"text": TEXT, "both": BOTH}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(inputs, cache):
    """repair() with the small inputs, whatever is not given."""

    def go(folder, config=TEXT, stop=lambda: False, inputs=inputs, cache=cache):
        return repair(inputs, config, folder, cache=cache, device=CPU, stop=stop)

    return go


@pytest.fixture(scope="session")
def whole(inputs, cache, tmp_path_factory):
    """An uninterrupted run of each mode: folder, events."""
    runs = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp("whole") / name
        runs[name] = folder, list(repair(inputs, config, folder, cache=cache, device=CPU))
    return runs


def of(kind, events):
    return [event for event in events if event["type"] == kind]


def until(events, step):
    """Takes events up to and including that step's; leaves the generator open."""
    for event in events:
        if event["type"] == "step" and event["step"] == step:
            return
    raise AssertionError(f"no step {step}")


def figures(events):
    """All that must be equal between two runs: everything but the clock."""
    clock = ("t", "pairs_per_second", "tokens_per_second", "memory")
    kept = [event for event in events if event["type"] in ("step", "measure")]
    return [{key: value for key, value in event.items() if key not in clock} for event in kept]


def assert_same(folder, whole):
    for name in (RESULT, BEST):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert figures(telemetry.read(folder)) == figures(telemetry.read(whole))
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    assert (ours["steps"], ours["skipped"], ours["best"]) == (
        theirs["steps"],
        theirs["skipped"],
        theirs["best"],
    )
    if (whole / "clip.safetensors").exists():
        assert (folder / "clip.safetensors").read_bytes() == (whole / "clip.safetensors").read_bytes()


# --- a run from start to end


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_whole_run(whole, mode):
    folder, events = whole[mode]
    assert [event["step"] for event in of("step", events)] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in of("measure", events)] == [0, 3, 6]
    assert [event["step"] for event in of("checkpoint", events)] == [2, 3, 4, 6]
    assert events[-1]["type"] == "done" and not events[-1]["resumed"]
    assert of("step", events)[-1]["loss"] < of("step", events)[0]["loss"]
    names = {path.name for path in folder.iterdir()} - {"lock", "evidence"}
    expected = {
        "run.json", "config.toml", "join.json", "dataset.json", "events.jsonl", "history.npz", "checkpoints",
        RESULT, BEST, "result.json", "loss.png", "evidence.json", "report.html",
    }  # fmt: skip
    assert names == (expected | {"clip.safetensors"} if mode == "both" else expected)
    with Image.open(folder / "loss.png") as picture:
        assert picture.size == (960, 960)
    written = telemetry.read(folder)
    assert [event["type"] for event in written] == [event["type"] for event in events if event["type"] != "progress"]
    assert status(folder) == Status("finished", 6)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


@pytest.mark.parametrize("mode", CONFIGS)
def test_the_result_reads_as_what_was_trained(whole, inputs, start, mode, monkeypatch, tmp_path):
    kept = []
    original = run_module.begin
    monkeypatch.setattr(run_module, "begin", lambda *a: kept.append(original(*a)) or kept[-1])
    list(start(tmp_path / "run", CONFIGS[mode]))
    assert (tmp_path / "run" / RESULT).read_bytes() == (whole[mode][0] / RESULT).read_bytes()
    trained = kept[0].clip
    file = read_text(tmp_path / "run" / RESULT)
    assert file.config == trained.text_config and not file.source.missing
    ids = tokenize([caption for picture in inputs.index.pictures for caption in picture.captions]).ids
    tower = text_tower(file, join(inputs.text, inputs.vision, inputs.original))
    assert torch.equal(tower.text_projection, trained.text_projection)
    for point, value in drift(tower, trained, ids).items():
        assert value.one_minus_cosine < 1e-10 and abs(value.relative_norm - 1) < 1e-5, point
    with torch.no_grad():
        assert torch.allclose(tower(ids).projected, trained(ids).projected, rtol=1e-4, atol=1e-5)
    if mode == "both":
        path = tmp_path / "run" / "clip.safetensors"
        full = join(read_text(path), read_vision(path), read_text(path)).build()
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(full.encode_image(pixels), trained.encode_image(pixels), rtol=1e-4, atol=1e-5)
        assert torch.equal(full.logit_scale, trained.logit_scale)
    assert fold(trained)


def test_the_result_is_for_the_clip_slot(whole):
    tensors = load_file(whole["text"][0] / RESULT)
    assert "text_model.encoder.layers.1.mlp.fc2.weight" in tensors and "text_projection.weight" in tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert not any(name.endswith((".r", ".theta")) for name in tensors)


def test_nothing_global_changes(start, tmp_path):
    def state():
        return (
            torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_default_dtype(),
            torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.is_inference_mode_enabled(), torch.backends.cudnn.benchmark, os.getcwd(), dict(os.environ),
        )  # fmt: skip

    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")  # what importing may set is set before
    list(start(tmp_path / "first", dataclasses.replace(BOTH, epochs=1)))
    before = state()
    list(start(tmp_path / "both", dataclasses.replace(BOTH, epochs=1)))
    events = start(tmp_path / "text", dataclasses.replace(TEXT, precision="bf16", seed=5))
    for _ in events:
        assert state() == before


# --- stopped, killed, resumed


@pytest.mark.parametrize(
    ("mode", "step"),
    [("text", 1), ("text", 2), ("text", 3), ("text", 5), ("both", 1), ("both", 3), ("both", 4)],
)
def test_stopped_and_resumed_is_uninterrupted(start, whole, tmp_path, mode, step):
    folder, flag = tmp_path / "run", threading.Event()
    events = start(folder, CONFIGS[mode], stop=flag.is_set)
    until(events, step)
    flag.set()
    rest = list(events)
    assert rest[-1]["type"] == "stopped" and (rest[-1]["step"], rest[-1]["steps"]) == (step, 6)
    assert not of("step", rest)
    assert status(folder) == Status("interrupted", step)
    assert read_text(folder / RESULT).config == SMALL.text  # what there is can be used
    again = list(start(folder, CONFIGS[mode]))
    assert of("resume", again)[0]["step"] == step
    assert [event["step"] for event in of("step", again)] == list(range(step + 1, 7))
    assert_same(folder, whole[mode][0])


def test_stopped_at_every_step(start, whole, tmp_path):
    folder = tmp_path / "run"
    for step in range(1, 6):
        flag = threading.Event()
        for event in start(folder, stop=flag.is_set):
            if event["type"] == "step":
                flag.set()
        assert (event["type"], event["step"]) == ("stopped", step)
    assert list(start(folder))[-1]["type"] == "done"
    assert_same(folder, whole["text"][0])


@pytest.mark.parametrize(
    ("mode", "step", "saved"),
    [("text", 1, 0), ("text", 2, 0), ("text", 5, 4), ("text", 6, 4), ("both", 3, 2)],
)
def test_killed_and_resumed_is_uninterrupted(start, whole, tmp_path, mode, step, saved):
    folder = tmp_path / "run"
    events = start(folder, CONFIGS[mode])
    until(events, step)
    events.close()
    assert status(folder).step == saved
    with open(folder / telemetry.EVENTS, "ab") as file:
        file.write(b'{"type":"step","step":7,"lo')  # torn by the crash
    again = list(start(folder, CONFIGS[mode]))
    assert [event["step"] for event in of("step", again)] == list(range(saved + 1, 7))
    assert_same(folder, whole[mode][0])
    kinds = [event["type"] for event in telemetry.read(folder)]
    assert kinds.count("join") == kinds.count("dataset") == 2  # what follows a torn line is not lost with it


@pytest.mark.parametrize("step", [3, 6])
def test_killed_right_after_an_epochs_checkpoint(start, whole, tmp_path, step):
    folder = tmp_path / "run"
    events = start(folder)
    for event in events:
        if event["type"] == "checkpoint" and event["step"] == step:
            events.close()
    assert status(folder) == Status("interrupted", step)
    list(start(folder))
    assert_same(folder, whole["text"][0])


@pytest.mark.parametrize("kill", ["join", "dataset", "start", "measure"])
def test_killed_before_the_first_step(start, whole, tmp_path, kill):
    folder = tmp_path / "run"
    events = start(folder)
    for event in events:
        if event["type"] == kill:
            events.close()
    assert status(folder) == Status("interrupted", 0)
    list(start(folder))
    assert_same(folder, whole["text"][0])


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_a_full_disk_while_saving(start, whole, tmp_path, monkeypatch, call):
    """At the end of the first epoch: in the best encoder, the weights, the moments, the state."""
    folder = tmp_path / "run"
    events = start(folder)
    until(events, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk(call))
        with pytest.raises(OSError, match="no space left to write .*bytes are needed"):
            list(events)
    failed = status(folder)
    assert (failed.state, failed.step) == ("failed", 2) and "no space left" in failed.error
    assert not list(folder.rglob("*.part"))
    list(start(folder))
    assert_same(folder, whole["text"][0])


def test_a_standing_alarm_is_not_raised_again_by_a_resumed_run(start, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "contrastive", lambda images, texts, *rest, **more: (texts * torch.nan).sum())
    folder = tmp_path / "run"
    events = start(folder)
    until(events, 5)
    events.close()
    list(start(folder))
    raised = of("alarm", telemetry.read(folder))
    assert [(event["alarm"], event["step"]) for event in raised] == [("non_finite", 1)]


def test_a_finished_run_is_done_at_once(start, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole["text"][0], folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    monkeypatch.setattr(run_module, "join", None)
    events = [event for event in start(folder) if event["type"] != "progress"]
    assert [event["type"] for event in events] == ["done"] and events[0]["resumed"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


# --- whose folder it is


def test_a_folder_of_another_run(start, whole, inputs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["text"][0], folder)
    with pytest.raises(InputError) as error:
        list(start(folder, dataclasses.replace(TEXT, batch=6, smoothing=0.1)))
    message = str(error.value)
    assert "batch was 8, is 6" in message and "smoothing was 0.0, is 0.1" in message and "epochs" not in message
    swapped = dataclasses.replace(inputs, text=inputs.original)
    with pytest.raises(InputError, match="another text was used"):
        list(start(folder, inputs=swapped))
    fewer = dataclasses.replace(inputs.index, pictures=inputs.index.pictures[:-1])
    with pytest.raises(InputError, match="another dataset was used"):
        list(start(folder, inputs=dataclasses.replace(inputs, index=fewer)))
    assert status(folder).state == "finished"


def test_the_same_file_read_another_way_is_another_run(inputs):
    keys = ["0" * 64] * PICTURES
    one = run_id(describe_run(inputs, keys, TEXT))
    assert one == run_id(describe_run(inputs, list(keys), RepairConfig(**COMMON)))
    other = dataclasses.replace(inputs.text, config=dataclasses.replace(inputs.text.config, activation="gelu"))
    assert one != run_id(describe_run(dataclasses.replace(inputs, text=other), keys, TEXT))
    assert one != run_id(describe_run(dataclasses.replace(inputs, original=None), keys, TEXT))
    assert one != run_id(describe_run(inputs, ["1" * 64, *keys[1:]], TEXT))
    assert one != run_id(describe_run(inputs, keys, dataclasses.replace(TEXT, seed=1)))


def test_a_folder_of_something_else(start, tmp_path):
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(InputError, match="not a run's folder .*holiday.txt"):
        list(start(tmp_path))
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 3}', "{}"])
def test_a_damaged_folder(start, tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="run.json is damaged"):
        list(start(tmp_path))


def test_two_at_a_time(start, whole, tmp_path):
    folder = tmp_path / "run"
    first = start(folder)
    until(first, 1)
    assert status(folder).state == "running"
    with pytest.raises(InputError, match="being trained by process"):
        next(start(folder))
    until(first, 4)
    first.close()
    assert status(folder) == Status("interrupted", 3)
    list(start(folder))
    assert_same(folder, whole["text"][0])


def test_a_run_that_another_thread_gives_up_is_free_again(start, tmp_path):
    folder = tmp_path / "run"
    events = start(folder)
    until(events, 1)
    closer = threading.Thread(target=events.close)
    closer.start()
    closer.join()
    assert status(folder).state == "interrupted"


def test_a_failed_start_does_not_spoil_the_folder(start, inputs, pictures, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError):
        list(start(folder, dataclasses.replace(TEXT, batch=500)))
    assert status(folder).state == "failed" and not (folder / "run.json").exists()
    until(start(folder), 1)


# --- data


def copy_of(pictures, folder):
    shutil.copytree(pictures, folder)
    return folder, json.loads((folder / "captions.json").read_text())


@pytest.mark.parametrize("mode", CONFIGS)
def test_broken_pictures_are_skipped_counted_and_listed(start, inputs, pictures, cache, tmp_path, mode):
    root, captions = copy_of(pictures, tmp_path / "pictures")
    names = sorted(captions)
    (root / names[3]).write_bytes((root / names[3]).read_bytes()[:200])
    (root / names[7]).write_bytes(b"no picture")
    (root / names[8]).write_bytes(b"no picture")  # the same content under another name
    index = read_index(root, root / "captions.json")
    folder = tmp_path / "run"
    config = dataclasses.replace(CONFIGS[mode], epochs=1, batch=3, accumulate=1)
    events = list(start(folder, config, inputs=dataclasses.replace(inputs, index=index)))
    report = of("dataset", events)[0]
    assert [path for path, _ in report["broken"]] == [names[3], names[7], names[8]]
    assert all(reason for _, reason in report["broken"])
    assert report["listed"] == PICTURES
    assert report["training pictures"] + report["held-out pictures"] == PICTURES - 3
    assert json.loads((folder / "dataset.json").read_text())["broken"] == [list(pair) for pair in report["broken"]]
    assert events[-1]["type"] == "done"


def test_too_few_pictures_are_told_before_anything_is_done(start, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "embed_files", None)
    for count, batch in ((26, 25), (5, 8), (1, 2)):
        index = dataclasses.replace(inputs.index, pictures=inputs.index.pictures[:count])
        config = dataclasses.replace(TEXT, batch=batch)
        with pytest.raises(InputError, match=f"{count} pictures, of which .* fewer than one step of {batch}"):
            list(start(tmp_path / f"{count}", config, inputs=dataclasses.replace(inputs, index=index)))


def test_without_held_out_pictures(start, tmp_path):
    events = list(start(tmp_path / "run", dataclasses.replace(TEXT, held_out=0.0, epochs=1)))
    assert not of("measure", events) and events[-1]["type"] == "done"
    assert of("dataset", events)[0]["held-out pictures"] == 0
    assert (tmp_path / "run" / RESULT).exists()


def test_held_out_pictures_are_never_trained_on(start, inputs, tmp_path, monkeypatch):
    kept = []
    original = session.train
    monkeypatch.setattr(
        session,
        "train",
        lambda training, pairs, *a, **more: kept.append(pairs) or original(training, pairs, *a, **more),
    )
    events = list(start(tmp_path / "run", dataclasses.replace(TEXT, held_out=0.3, epochs=1)))
    measured = of("measure", events)[-1]
    assert (len(kept[0].counts), measured["images"]) == (18, 8)
    assert measured["captions"] == 24 and len(kept[0].ids) == 54
    every = {tuple(row) for row in tokenize([c for p in inputs.index.pictures for c in p.captions]).ids.tolist()}
    trained = {tuple(row) for row in kept[0].ids.tolist()}
    assert len(every - trained) > 20


# --- cached features


def test_a_second_run_embeds_nothing(start, tmp_path, embedded):
    own = tmp_path / "cache"
    list(start(tmp_path / "first", cache=own))
    assert sum(embedded) == PICTURES
    embedded.clear()
    list(start(tmp_path / "second", dataclasses.replace(TEXT, seed=3), cache=own))
    assert embedded == []


def test_stopped_while_embedding(start, inputs, tmp_path):
    events = list(start(tmp_path / "run", cache=tmp_path / "cache", stop=lambda: True))
    assert events[-1]["type"] == "stopped" and not of("step", events)
    assert list(start(tmp_path / "run", cache=tmp_path / "cache"))[-1]["type"] == "done"


# --- putting the towers together


def test_join_says_where_everything_came_from(inputs, small_files):
    joined = join(inputs.text, inputs.vision, inputs.original)
    found = {origin.name: (origin.tensors, origin.source) for origin in joined.report}
    original, ruined = (path.name for path in small_files)
    assert found == {
        "text tower": (len(inputs.text.state), ruined),
        "text_projection": (1, original),
        "logit_scale": (1, original),
        "vision tower": (len(inputs.vision.state), original),
    }
    assert sum(origin.tensors for origin in joined.report) == len(joined.state)
    clip = joined.build()
    assert isinstance(clip, CLIP) and clip.config == SMALL
    for name, tensor in clip.state_dict().items():
        source = inputs.vision.state if name.startswith("visual.") else inputs.text.state
        source = source if name in source else inputs.original.state
        assert torch.equal(tensor, source[name]), name
        assert tensor.data_ptr() != source[name].data_ptr()


def test_building_draws_no_global_random_numbers(inputs):
    joined = join(inputs.text, inputs.vision, inputs.original)
    before = torch.get_rng_state()
    joined.build()
    text_tower(inputs.text, joined)
    assert torch.equal(torch.get_rng_state(), before)


def with_projection(inputs, projection):
    return dataclasses.replace(inputs.text, state=inputs.text.state | {"text_projection": projection})


def test_a_projection_of_its_own_is_used(inputs):
    noise = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    own = inputs.original.state["text_projection"] + 0.05 * noise
    joined = join(with_projection(inputs, own), inputs.vision, inputs.original)
    assert torch.equal(joined.state["text_projection"], own)
    assert {o.name: o.reason for o in joined.report}["text_projection"] == "its own"
    join(with_projection(inputs, own), inputs.vision, None)


@pytest.mark.parametrize(
    ("projection", "word"),
    [
        (torch.zeros(32, 16), "zeros"),
        (torch.eye(32), "identity"),
        (torch.full((32, 16), torch.nan), "NaN"),
        (torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), "nothing in common"),
    ],
)
def test_what_is_no_projection_of_this_clip_is_not_used(inputs, projection, word):
    joined = join(with_projection(inputs, projection), inputs.vision, inputs.original)
    assert torch.equal(joined.state["text_projection"], inputs.original.state["text_projection"])
    assert word in {o.name: o.reason for o in joined.report}["text_projection"]
    if word == "nothing in common":  # with nothing to compare with it may be right
        return
    with pytest.raises(InputError, match=f"no usable text_projection .*{word}.* lends none; give the full original"):
        join(with_projection(inputs, projection), inputs.vision, None)


def test_towers_that_do_not_belong_together(inputs, tmp_path):
    wide = dataclasses.replace(SMALL.text, width=48)
    from gmp.clip import CLIPConfig, initialize

    clip = initialize(CLIP(CLIPConfig(wide, SMALL.vision)), torch.Generator().manual_seed(0))
    state = {n: t for n, t in clip.state_dict().items() if not n.startswith("visual.")}
    write_text(state, tmp_path / "wide.safetensors", config=wide)
    other = read_text(tmp_path / "wide.safetensors")
    del other.state["text_projection"]
    with pytest.raises(InputError, match=r"48 wide, .*16 dimensions, .* 32 × 16"):
        join(other, inputs.vision, inputs.original)


def test_a_vision_file_without_text_tower_cannot_be_anchored_to(start, inputs, tmp_path):
    alone = dataclasses.replace(inputs, original=None, text=inputs.original)
    with pytest.raises(InputError, match="anchored: original.safetensors has no text tower; give"):
        list(start(tmp_path / "run", inputs=alone))
    events = list(start(tmp_path / "run", dataclasses.replace(TEXT, anchors=()), inputs=alone))
    assert events[-1]["type"] == "done" and of("measure", events)[0]["drift"] == {}


def test_anchored_to_the_broken_encoder(start, tmp_path):
    config = dataclasses.replace(TEXT, anchors=(Anchor("broken", "pooled", 0.5),), epochs=1)
    events = list(start(tmp_path / "run", config))
    step = of("step", events)[0]
    assert step["losses"]["broken:pooled=0.5"] == pytest.approx(0, abs=1e-6)
    assert of("measure", events)[0]["drift"]["pooled"]["cosine"] < 0.99  # measured against the original all the same


# --- in a thread


def drive(start, folder, **options):
    heard = []
    worker = Worker(lambda stop: start(folder, stop=stop, **options), folder, heard.append)
    return worker, heard


def finish(worker):
    worker._thread.join(60)
    assert not worker.alive
    return worker.latest


def test_a_worker_finishes(start, whole, tmp_path):
    worker, heard = drive(start, tmp_path / "run")
    assert worker.latest["type"] == "queued" and not worker.alive
    worker.start()
    while worker.alive:
        worker.wait(1)
    assert worker.wait(0)["type"] == worker.latest["type"] == "done" and worker.error is None
    assert len(of("step", heard)) == 6
    assert_same(tmp_path / "run", whole["text"][0])


def test_who_listens_is_told_when_the_folder_is_free(start, tmp_path):
    folder, seen = tmp_path / "run", []
    worker = Worker(lambda stop: start(folder, stop=stop), folder, lambda e: seen.append((e["type"], status(folder))))
    worker.start()
    finish(worker)
    assert seen[-1] == ("ended", Status("finished", 6)) and seen[-2][0] == "done" and seen[-2][1].at_work


def test_a_worker_stops_and_the_run_goes_on_later(start, whole, tmp_path):
    folder = tmp_path / "run"
    worker = Worker(lambda stop: start(folder, stop=stop), folder, lambda e: e["type"] == "step" and worker.stop())
    worker.start()
    assert finish(worker)["type"] == "stopped" and worker.latest["step"] == 1
    worker, _ = drive(start, folder)
    worker.start()
    assert finish(worker)["type"] == "done"
    assert_same(folder, whole["text"][0])


def test_a_failure_becomes_an_event(start, tmp_path):
    folder = tmp_path / "run"
    worker, heard = drive(start, folder, config=dataclasses.replace(TEXT, batch=500))
    worker.start()
    assert finish(worker)["type"] == "failed" and "fewer than one step" in worker.latest["error"]
    assert isinstance(worker.error, InputError) and heard[-1] is worker.latest
    assert "fewer than one step" in (folder / "failure.txt").read_text()
    until(start(folder), 1)  # failure.txt does not spoil the folder


def test_a_failure_that_cannot_be_written_down_is_an_event_too(start, tmp_path):
    (tmp_path / "file").touch()
    worker, heard = drive(start, tmp_path / "file" / "run")
    worker.start()
    assert finish(worker)["type"] == "failed" and heard[-1] is worker.latest


def test_a_failed_run_lets_go_of_its_memory(start, tmp_path, monkeypatch):
    """The error outlives the run, in a panel for example; the model on the card must not."""
    import weakref

    models = []
    original = run_module.begin
    monkeypatch.setattr(run_module, "begin", lambda clip, *a: models.append(weakref.ref(clip)) or original(clip, *a))
    monkeypatch.setattr(trainer, "clip_gradients", lambda *a: 1 / 0)
    worker, _ = drive(start, tmp_path / "run")
    worker.start()
    assert finish(worker)["type"] == "failed" and isinstance(worker.error, ZeroDivisionError)
    gc.collect()
    assert models[0]() is None


def test_no_thread_outlives_a_run(start, tmp_path):
    before = set(threading.enumerate())
    list(start(tmp_path / "run", BOTH))
    events = start(tmp_path / "other", BOTH)
    until(events, 2)
    events.close()
    del events
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert set(threading.enumerate()) <= before


# --- settings


def test_settings_that_did_not_work_may_be_mended_in_the_same_folder(inputs, tmp_path):
    run = {"cache": tmp_path / "cache", "device": CPU}
    wrong = dataclasses.replace(TEXT, captions=Captions(prefix="a photo of many words " * 40))
    with pytest.raises(InputError, match="leave no room"):
        list(repair(inputs, wrong, tmp_path / "run", **run))
    assert "Traceback" not in (tmp_path / "run" / "failure.txt").read_text()
    taken = repair(inputs, TEXT, tmp_path / "run", **run)
    assert next(event for event in taken if event["type"] == "step")["step"] == 1
    taken.close()
    with pytest.raises(InputError, match="holds another run: captions.prefix was '', is 'a photo"):
        list(repair(inputs, wrong, tmp_path / "run", **run))


def test_all_problems_of_the_settings_at_once():
    with pytest.raises(InputError) as error:
        RepairConfig(
            train="vision", epochs=0, batch=1, accumulate=0, lr=2.0, schedule="triangle", warmup=1.0, smoothing=-0.1,
            held_out=0.95, keep=0, precision="int8", rates={"*.r": -1.0}, betas=(0.9, 1.0), weight_decay=float("nan"),
            anchors=(Anchor("nobody", "middle", 0.0),),
        )  # fmt: skip
    message = str(error.value)
    for part in (
        "train is 'vision'", "epochs is 0", "batch is 1", "accumulate is 0", "lr is 2,", "'triangle'", "warmup is 1,",
        "smoothing is -0.1", "held_out is 0.95", "keep is 0", "'int8'", "*.r", "betas", "weight_decay is nan",
        "teacher is 'nobody'", "read_point is 'middle'", "weight is 0,",
    ):  # fmt: skip
        assert part in message, part


def test_an_anchor_twice_is_refused():
    with pytest.raises(InputError, match="original@dataset:last is given more than once"):
        RepairConfig(anchors=(Anchor("original", "last", 0.1), Anchor("original", "last", 0.1)))
    RepairConfig(anchors=(Anchor("original", "last", 0.1), Anchor("broken", "last", 0.1)))


def test_settings_survive_json():
    config = RepairConfig(
        train="both", lr=3e-5, rates={"*.r": 0.5, "visual.*": 0.0}, betas=(0.8, 0.99), schedule="linear",
        anchors=(Anchor("original", "penultimate", 0.3), Anchor("broken", "pooled", 0.1)), precision="bf16",
    )  # fmt: skip
    for one in (config, RepairConfig(), RepairConfig(anchors=())):
        assert RepairConfig.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert RepairConfig.from_json({}) == RepairConfig()
    with pytest.raises(InputError, match="colour"):
        RepairConfig.from_json({"colour": "red"})
    with pytest.raises(InputError, match="version 99"):
        RepairConfig.from_json({"version": 99})


def test_anchors_are_parsed():
    assert Anchor.parse("penultimate=0.3") == Anchor("original", "penultimate", 0.3)
    assert Anchor.parse(" broken : pooled = 1 ") == Anchor("broken", "pooled", 1.0)
    assert Anchor.parse(str(Anchor("broken", "last", 0.25))) == Anchor("broken", "last", 0.25)
    with pytest.raises(InputError, match="TEACHER"):
        Anchor.parse("penultimate")


def test_default_rates():
    assert default_lr(64) == 1e-3
    assert 6e-6 < default_lr(768) < 8e-6 and 2e-6 < default_lr(1280) < 3e-6
    assert disturbed(small_clip()).text_config.width == 32


# --- checks before work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": {"nothing*": 0.0}}, "match no parameter that is trained"),
        ({"rates": {"visual.*": 0.5}}, "match no parameter that is trained"),
        ({"precision": "fp16"}, "fp16 training needs a GPU"),
    ],
)
def test_settings_are_refused_before_a_picture_is_opened(start, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(training_data, "embed_files", None)
    with pytest.raises(InputError, match=message):
        list(start(tmp_path / "run", dataclasses.replace(TEXT, **changes)))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("mode", CONFIGS)
def test_a_stop_while_pictures_are_read_names_the_step_it_can_go_on_from(start, tmp_path, mode):
    folder = tmp_path / "run"
    events = start(folder, CONFIGS[mode])
    while next(events)["type"] != "checkpoint":
        pass
    events.close()
    step = status(folder).step
    stopped = list(start(folder, CONFIGS[mode], stop=lambda: True))[-1]
    assert step > 0 and (stopped["type"], stopped["step"]) == ("stopped", step)
    assert telemetry.read(folder)[-1]["type"] == "stopped"
    assert list(start(folder, CONFIGS[mode]))[-1]["type"] == "done"


def with_context(inputs, length):
    """The text encoder with another number of positions than the original's."""
    state = inputs.text.state | {"positional_embedding": torch.randn(length, 32)}
    config = dataclasses.replace(inputs.text.config, context_length=length)
    return dataclasses.replace(inputs, text=dataclasses.replace(inputs.text, state=state, config=config))


def test_an_original_of_another_shape_is_no_anchor_and_no_reference(start, inputs, tmp_path):
    longer = with_context(inputs, CONTEXT + 8)
    with pytest.raises(InputError, match=f"cannot be anchored: .* context length {CONTEXT + 8} against {CONTEXT}"):
        list(start(tmp_path / "run", inputs=longer))
    assert not (tmp_path / "run" / "run.json").exists()
    events = list(start(tmp_path / "run", dataclasses.replace(TEXT, anchors=()), inputs=longer))
    assert "drift is not measured" in of("join", events)[0]["notes"][0]
    assert of("measure", events)[0]["drift"] == {} and events[-1]["type"] == "done"


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(start, tmp_path, monkeypatch):
    def no_matplotlib(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(session, "plot_losses", no_matplotlib)
    events = list(start(tmp_path / "run"))
    assert events[-1]["type"] == "done" and "matplotlib" in of("alarm", events)[0]["advice"]


def test_a_repair_that_only_made_it_worse_has_no_best(start, tmp_path):
    list(start(tmp_path / "run", dataclasses.replace(TEXT, lr=0.9, schedule="constant", warmup=0.0)))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best"]["step"] == 0
    assert not (tmp_path / "run" / BEST).exists() and (tmp_path / "run" / RESULT).exists()


def test_housekeeping_is_not_part_of_a_runs_identity(start, tmp_path):
    events = start(tmp_path / "run")
    while next(events)["type"] != "checkpoint":
        pass
    events.close()
    assert list(start(tmp_path / "run", dataclasses.replace(TEXT, keep=1, save_every=1)))[-1]["type"] == "done"


def test_many_may_look_at_once(whole):
    folder = whole["text"][0]
    with ThreadPoolExecutor(8) as pool:
        assert {str(seen) for seen in pool.map(lambda _: status(folder), range(200))} == {"finished"}


def test_the_join_report_has_every_tensor_and_every_source(whole, inputs):
    report = json.loads((whole["text"][0] / "join.json").read_text())
    names = {name for row in report["tensors"] for name in row["names"]}
    assert names == set(join(inputs.text, inputs.vision, inputs.original).state)
    assert {role: len(source["sha256"]) for role, source in report["sources"].items()} == {
        "text": 64, "vision": 64, "original": 64,
    }  # fmt: skip


def test_names_that_are_not_utf8_and_pictures_that_cannot_be_read(start, inputs, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(inputs.index.root, folder)
    odd = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(inputs.index.paths[0], folder / odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    gone = inputs.index.pictures[3].path
    pictures = (*inputs.index.pictures, Picture(odd, ("a cup",)))
    index = dataclasses.replace(inputs.index, root=folder, pictures=pictures)
    (folder / gone).unlink()
    events = list(start(tmp_path / "run", inputs=dataclasses.replace(inputs, index=index), cache=tmp_path / "cache"))
    assert [path for path, _ in of("dataset", events)[0]["broken"]] == [gone]
    assert events[-1]["type"] == "done"


def test_a_damaged_newest_checkpoint_says_what_to_delete(start, tmp_path):
    folder = tmp_path / "run"
    events = start(folder, dataclasses.replace(TEXT, save_every=1))
    for _ in range(3):
        while next(events)["type"] != "checkpoint":
            pass
    events.close()
    model = sorted((folder / "checkpoints").glob("*.model.safetensors"))[-1]
    model.write_bytes(model.read_bytes()[:-10])
    with pytest.raises(
        InputError, match=r"newest checkpoint is damaged.*Delete .*step_00000003\.\* to go on from step 2"
    ):
        list(start(folder))
    for path in (folder / "checkpoints").glob("step_00000003.*"):
        path.unlink()
    assert of("resume", events := list(start(folder)))[0]["step"] == 2 and events[-1]["type"] == "done"


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(start, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    events = list(start(tmp_path / "run", cache=tmp_path / "cache"))
    assert "features are not kept" in of("alarm", events)[0]["advice"] and events[-1]["type"] == "done"


def test_a_result_says_what_memory_was_estimated_and_taken(whole):
    memory = json.loads((whole["text"][0] / "result.json").read_text())["memory"]
    steps = [event["memory"] for event in of("step", telemetry.read(whole["text"][0]))]
    assert 1e5 < memory["estimate"] < 1e9
    assert 0 <= memory["measured"] <= max(steps)
