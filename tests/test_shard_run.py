"""Whole repairs on pictures in tars, against the same repair on the same pictures in a folder."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmp import telemetry
from gmp.cli import main
from gmp.config import RepairConfig
from gmp.data import shards
from gmp.data.shard_sampler import ShardSampler
from gmp.data.tars import find_tars
from gmp.errors import InputError
from gmp.run import BEST, RESULT, describe_run, repair
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.side_by_side import Torchrun
from tests.small import PICTURES

TOWERS = ("--text", ASSETS / RUINED, "--vision", ASSETS / ORIGINAL)
CPU = torch.device("cpu")
# 26 pictures, 2 held out: 3 steps an epoch, 6 in all
TEXT = RepairConfig(epochs=2, batch=8, lr=1e-3, held_out=0.08, save_every=2)
CLOCK = ("t", "pairs_per_second", "tokens_per_second", "memory")


def pack(index, folder: Path, count: int = 3) -> str:
    """The pictures of an index and their captions in tars."""
    folder.mkdir(exist_ok=True)
    for n in range(count):
        with tarfile.open(folder / f"{n:02}.tar", "w") as archive:
            for picture, path in list(zip(index.pictures, index.paths, strict=True))[n::count]:
                name = picture.path.replace("/", "_")
                archive.add(path, name)
                text = "\n".join(picture.captions).encode()
                header = tarfile.TarInfo(str(Path(name).with_suffix(".txt")))
                header.size = len(text)
                archive.addfile(header, io.BytesIO(text))
    return str(folder / f"{{00..{count - 1:02}}}.tar")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tarred")


@pytest.fixture(scope="module")
def tarred(inputs, place):
    """The small inputs with their pictures in three tars."""
    return dataclasses.replace(inputs, index=find_tars(pack(inputs.index, place / "tars")))


@pytest.fixture(scope="module")
def whole(tarred, place):
    """An uninterrupted run: folder, events."""
    return place / "run", list(repair(tarred, TEXT, place / "run", cache=place / "cache", device=CPU))


def of(kind, events):
    return [event for event in events if event["type"] == kind]


def figures(events):
    kept = [event for event in events if event["type"] in ("step", "measure")]
    return [{key: value for key, value in event.items() if key not in CLOCK} for event in kept]


def test_a_whole_run(whole):
    folder, events = whole
    assert [event["step"] for event in of("step", events)] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in of("measure", events)] == [0, 3, 6]
    assert of("step", events)[-1]["loss"] < of("step", events)[0]["loss"]
    assert events[-1]["type"] == "done" and not of("alarm", events)
    told = of("dataset", events)[0]
    assert (told["training pictures"], told["held-out pictures"], told["listed"]) == (24, 2, PICTURES)
    assert all((folder / name).exists() for name in (RESULT, "evidence.json", "report.html"))


def test_the_same_pictures_are_measured_as_of_a_folder(whole, inputs, place):
    """Before the first step, nothing depends on the order of training."""
    other = list(repair(inputs, TEXT, place / "folder", cache=place / "cache", device=CPU))
    mine, theirs = (of("measure", events)[0] for events in (whole[1], other))
    assert mine["images"] == theirs["images"] == 2
    assert mine["held_out"] == pytest.approx(theirs["held_out"], rel=1e-5)
    assert mine["median_rank_text_to_image"] == theirs["median_rank_text_to_image"]


def test_evidence_shows_small_pictures(inputs, whole, place):
    index = shards.Shards(sorted((place / "cache" / "shards").glob("*/*.safetensors"))).index(
        torch.arange(PICTURES), next((place / "cache" / "shards").iterdir()) / shards.PICTURES
    )
    assert all(path.exists() for path in index.paths)
    assert sorted(p.captions for p in index.pictures) == sorted(p.captions for p in inputs.index.pictures)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_that_stops_in_an_epoch_goes_on_to_the_same_result(step, tarred, whole, place, tmp_path):
    stopped = False

    def go():
        return repair(tarred, TEXT, tmp_path, cache=place / "cache", device=CPU, stop=lambda: stopped)

    for event in go():
        stopped |= event["type"] == "step" and event["step"] == step
    assert event["type"] == "stopped" and event["step"] == step
    stopped = False
    assert list(go())[-1]["type"] == "done"
    for name in (RESULT, BEST):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()
    assert figures(telemetry.read(tmp_path)) == figures(telemetry.read(whole[0]))


def test_steps_are_those_of_the_shard_sampler(tarred, place, tmp_path, monkeypatch):
    """The trainer reads every picture at its place: the captions of its steps are those of the sampler's pictures."""
    taken, found = [], []
    batch, following = shards.ShardPairs.batch, ShardSampler.__next__
    monkeypatch.setattr(shards.ShardPairs, "batch", lambda *a: found.append(batch(*a)) or found[-1])
    monkeypatch.setattr(ShardSampler, "__next__", lambda self: taken.append(following(self)) or taken[-1])
    list(repair(tarred, TEXT, tmp_path / "run", cache=place / "cache", device=CPU))
    handed = taken[0::2]  # every other one is a look ahead
    assert len(found) == 6
    assert all(torch.equal(one.pictures, pictures) for one, (pictures, _) in zip(found, handed, strict=True))


def test_tars_are_read_once(tarred, whole, place, tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("a tar was opened")

    monkeypatch.setattr(shards, "read_samples", read)
    config = dataclasses.replace(TEXT, seed=1)
    assert list(repair(tarred, config, tmp_path / "run", cache=place / "cache", device=CPU))[-1]["type"] == "done"


def test_captions_are_told_from_all_pictures_in_tars(tarred, place, tmp_path):
    config = dataclasses.replace(TEXT, negatives="all")
    events = list(repair(tarred, config, tmp_path / "run", cache=place / "cache", device=CPU))
    assert of("step", events)[-1]["loss"] < of("step", events)[0]["loss"] and events[-1]["type"] == "done"


def test_other_tars_are_another_run(tarred, whole, place):
    config = TEXT
    fewer = dataclasses.replace(tarred, index=find_tars([tar.url for tar in tarred.index.files[:2]]))
    assert describe_run(fewer, [], config) != describe_run(tarred, [], config)
    with pytest.raises(InputError, match="another dataset was used"):
        list(repair(fewer, config, whole[0], cache=place / "cache", device=CPU))


def test_what_tars_cannot_do_is_said_before_anything_is_embedded(tarred, tmp_path):
    config = dataclasses.replace(TEXT, train="both")
    with pytest.raises(InputError, match="needs a locked vision tower"):
        list(repair(tarred, config, tmp_path / "run", cache=tmp_path / "cache", device=CPU))
    assert not (tmp_path / "cache").exists()


def test_fewer_pictures_than_a_step_takes(tarred, place, tmp_path):
    config = dataclasses.replace(TEXT, batch=32)
    with pytest.raises(InputError, match="26 pictures, of which 2 are held out, are fewer than one step of 32"):
        list(repair(tarred, config, tmp_path / "run", cache=place / "cache", device=CPU))


def test_tars_in_which_captions_lie_apart_from_their_pictures(tarred, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("0.jpg", "1.jpg", "0.txt", "1.txt"):
            archive.addfile(tarfile.TarInfo(name))
    apart = dataclasses.replace(tarred, index=find_tars(str(tmp_path / "a.tar")))
    with pytest.raises(InputError, match="no picture beside its captions in 1 tars") as caught:
        list(repair(apart, TEXT, tmp_path / "run", cache=tmp_path / "cache", device=CPU))
    assert "0.jpg: no caption" in str(caught.value) and "no picture beside its text" in str(caught.value)


# ---- from the command line ------------------------------------------------------------------------------------------


def complaint(capsys, *arguments) -> str:
    assert main(["repair", *map(str, (*TOWERS, *arguments))]) == 2
    return capsys.readouterr().err


def test_a_repair_on_tars_by_one_command_in_one_process_and_in_two(inputs, tmp_path, capsys):
    tars = pack(inputs.index, tmp_path / "tars")
    given = ("repair", *TOWERS, "--data", tars, "--epochs", 1, "--batch", 8, "--held-out", 0.08, "--device", "cpu")
    assert main([*map(str, given), "--json", "--out", str(tmp_path / "1"), "--cache", str(tmp_path / "cache 1")]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["state"] == "done" and answer["steps"] == 3
    with Torchrun(2, "gmp", *given, "--out", tmp_path / "2", "--cache", tmp_path / "cache 2") as started:
        code, _, err = started.wait()
    assert code == 0, err
    one, two = (load_file(tmp_path / name / RESULT) for name in "12")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if not name.endswith("k_proj.bias"):  # softmax does not see them: Adam makes steps of what is rounding
            assert (two[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


def test_what_the_command_refuses(inputs, tmp_path, capsys):
    out = ("--out", tmp_path / "run")
    assert "either a folder as --images" in complaint(capsys, *out)
    assert "either a folder as --images" in complaint(capsys, *out, "--images", tmp_path, "--data", "a.tar")
    assert "tars hold their captions" in complaint(capsys, *out, "--data", "a.tar", "--captions", "a.json")
    assert "not there" in complaint(capsys, *out, "--data", tmp_path / "{0..3}.tar")
    assert "no command is run" in complaint(capsys, *out, "--data", f"pipe:touch {tmp_path}/made")
    pack(inputs.index, tmp_path)
    cut = (tmp_path / "01.tar").read_bytes()[:5000]
    (tmp_path / "01.tar").write_bytes(cut)
    told = complaint(capsys, *out, "--data", tmp_path / "{00..02}.tar", "--cache", tmp_path / "cache", "--batch", 8)
    assert "01.tar is damaged or cut" in told and "00.tar" not in told.replace("{00..02}", "")
    assert not (tmp_path / "made").exists()
