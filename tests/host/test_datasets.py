"""Captions of every kind, several data sets as one, and tars, in real graphs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess

import pytest

from tests.host import models, sources
from tests.host.conftest import PYTHON
from tests.host.graphs import node
from tests.host.repairs import events, fresh_run, only, waiting

BESIDE = "text files beside the pictures"
COUNT = 96


@pytest.fixture(scope="module")
def pictures(host):
    """Folder `things` of the input folder: 96 pictures without captions beside them; their captions, by name."""
    return sources.drawn(host.base / "input" / "things", COUNT)


def dataset(folder: str = "things", captions: str = BESIDE, **inputs: object) -> dict:
    return {"data": node("GmPCaptionDataset", folder=folder, captions=captions, **inputs), "end": end()}


def end(source: str = "data") -> dict:
    return node("PreviewAny", source=[source, 0])


def told(result) -> list[str]:
    assert result.status == "success", result.error
    return result.outputs["data"][0].split("\n· ")


def write_all(folder, captions: dict[str, list[str]]) -> dict[str, str]:
    """One file of each kind with the same captions, in the input folder -> how its kind is told on the node."""
    sources.coco(folder / "coco.json", captions)
    (folder / "seed.json").write_text(json.dumps(captions), encoding="utf-8")
    kohya = {name: {"caption": lines[0], "tags": lines[-1]} for name, lines in captions.items()}
    (folder / "kohya.json").write_text(json.dumps(kohya), encoding="utf-8")
    rows = [(name, line) for name, lines in captions.items() for line in lines]
    lined = "\n".join(json.dumps({"file_name": name, "text": line}) for name, line in rows)
    (folder / "metadata.jsonl").write_text(lined, encoding="utf-8")
    for name, head, separator in (
        ("table.csv", ("filepath", "title"), ","),
        ("table.tsv", ("filepath", "title"), "\t"),
        ("desc.csv", ("image", "prompt"), ","),
        ("odd.csv", ("where", "what"), ","),
    ):
        with (folder / name).open("w", newline="", encoding="utf-8") as out:
            csv.writer(out, delimiter=separator).writerows([head, *rows])
    return {
        "coco.json": "COCO captions JSON: images and annotations",
        "seed.json": "one JSON file: {picture: [captions]}",
        "kohya.json": 'kohya metadata JSON: {picture: {"caption": …, "tags": …}}',
        "metadata.jsonl": "Hugging Face imagefolder: pictures with metadata.jsonl, .csv or .parquet",
        "table.csv": "CSV or TSV with a column of paths and one of captions",
        "table.tsv": "CSV or TSV with a column of paths and one of captions",
        "desc.csv": "CLIP-Interrogator's desc.csv: image,prompt",
    }


def test_every_kind_of_caption_file_is_listed_read_and_told(host, pictures):
    kinds = write_all(host.base / "input", pictures)
    listed = models.choices(host, "GmPCaptionDataset", "captions")
    assert {BESIDE, *kinds, "odd.csv"} <= set(listed)
    pairs = sum(map(len, pictures.values()))
    for name, kind in kinds.items():
        lines = told(host.run(dataset(captions=name)))
        here = 2 * COUNT if name == "kohya.json" else pairs  # it has place for a caption and for tags
        assert lines[:2] == [f"{COUNT} pictures with {here} captions", kind], name


def test_a_table_takes_columns_and_says_which_it_lacks(host, pictures):
    write_all(host.base / "input", pictures)
    lines = told(host.run(dataset(captions="odd.csv", columns="where, what")))
    assert lines[0].startswith(f"{COUNT} pictures with ")
    assert any(line.startswith("columns: pictures from 'where', captions from 'what'") for line in lines)
    unnamed = host.run(dataset(captions="odd.csv", columns="where, how"))
    assert unnamed.failed == "data" and "no column 'how'" in unnamed.error


def test_a_kind_that_it_is_not_is_refused_with_what_it_looks_like(host, pictures):
    write_all(host.base / "input", pictures)
    refused = host.run(dataset(captions="coco.json", kind="csv"))
    assert refused.failed == "data" and "looks like coco" in refused.error
    assert str(host.base) not in refused.error
    kinds = models.choices(host, "GmPCaptionDataset", "kind")
    assert kinds[0] == "auto" and "webdataset" not in kinds
    assert told(host.run(dataset(captions="coco.json", kind="coco")))[1].startswith("COCO")


def test_kohya_folders_are_read_with_their_repeats(host, pictures):
    names = list(pictures)
    for folder, part in (("10_round", names[:4]), ("2_square", names[4:8])):
        place = host.base / "input" / "kohya" / folder
        place.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(part):
            shutil.copyfile(host.base / "input" / "things" / name, place / f"{number}.png")
            (place / f"{number}.txt").write_text(pictures[name][0])
    lines = told(host.run(dataset("kohya")))
    assert lines[0] == "8 pictures with 8 captions" and lines[1].startswith("kohya folders: 10_name")
    mixed = {"more": node("GmPCaptionDataset", folder="things", captions="seed.json")}
    mixed |= {"kohya": node("GmPCaptionDataset", folder="kohya", captions=BESIDE)}
    both = {"dataset_1": ["kohya", 0], "weight_1": 1.0, "dataset_2": ["more", 0], "weight_2": 0.5}
    mixed |= {"data": node("GmPMixDatasets", **both), "end": end()}
    lines = told(host.run(mixed))
    assert lines[0].startswith(f"{8 + COUNT} pictures with ")
    assert "dataset_2: 96 pictures × 0.5" in lines
    assert f"an epoch visits {4 * 10 + 4 * 2 + COUNT / 2:g} pictures" in lines
    assert any(line.startswith("kohya folders") for line in lines) and any(
        line.startswith("one JSON") for line in lines
    )


def test_a_changed_caption_file_or_picture_is_read_again_and_an_unchanged_one_is_not(host, pictures):
    path = host.base / "input" / "changing.csv"
    names = list(pictures)

    def write(count: int) -> None:
        rows = "".join(f'{name},"{pictures[name][0]}"\n' for name in names[:count])
        path.write_text("filepath,title\n" + rows)

    write(10)
    prompt = dataset(captions="changing.csv")
    assert told(host.run(prompt))[0] == "10 pictures with 10 captions"
    assert "data" in host.run(prompt).cached
    write(11)
    again = host.run(prompt)
    assert "data" not in again.cached and told(again)[0] == "11 pictures with 11 captions"
    picture = host.base / "input" / "things" / names[0]
    os.utime(picture, ns=(1, 1))
    assert "data" not in host.run(prompt).cached


def test_what_belongs_to_one_picture_is_no_caption_file(host, pictures):
    folder = host.base / "input" / "apart"
    folder.mkdir(exist_ok=True)
    first = next(iter(pictures))
    shutil.copyfile(host.base / "input" / "things" / first, folder / "a.png")
    (folder / "a.json").write_text(json.dumps({"caption": "a thing"}))
    (folder / "all.json").write_text(json.dumps({"a.png": ["a thing"]}))
    listed = models.choices(host, "GmPCaptionDataset", "captions")
    assert "apart/all.json" in listed and "apart/a.json" not in listed
    lines = told(host.run(dataset("apart", kind="json_beside")))
    assert lines[0] == "1 pictures with 1 captions" and lines[1].startswith("a JSON file beside each picture")


def test_a_saved_prompt_without_the_later_inputs_runs(host, pictures):
    write_all(host.base / "input", pictures)
    prompt = {"data": node("GmPCaptionDataset", folder="things", captions="seed.json"), "end": end()}
    assert told(host.run(prompt))[0].startswith(f"{COUNT} pictures")


def test_a_mixed_data_set_is_trained_on_by_its_weights(host, nodes, pictures):
    write_all(host.base / "input", pictures)
    known = set(host.runs())
    prompt = only(waiting(nodes, 300, epochs=1, batch=32, held_out=0.1), "GmPRepair")
    prompt["things"] = node("GmPCaptionDataset", folder="things", captions="coco.json")
    both = {"dataset_1": ["things", 0], "weight_1": 2.0, "dataset_2": ["GmPDemoWorld", 2], "weight_2": 0.25}
    prompt["mix"] = node("GmPMixDatasets", **both)
    prompt["GmPRepair"]["inputs"]["dataset"] = ["mix", 0]
    result = host.run(prompt)
    assert result.status == "success", result.error
    run = fresh_run(host, known)
    report = next(event for event in events(host, run) if event["type"] == "dataset")
    visits = report["visits of pictures in an epoch"]
    assert report["training pictures"] + report["held-out pictures"] == COUNT + 256
    assert 0.8 * (2 * COUNT + 64) < visits < 2 * COUNT + 64  # a tenth is held out


# ---- tars -----------------------------------------------------------------------------------------------------------


def tars(files: str = "*.tar") -> dict:
    return {"data": node("GmPTarDataset", folder="tars", files=files), "end": end()}


@pytest.fixture(scope="module")
def shards(host, tmp_path_factory):
    folder = host.base / "input" / "tars"
    folder.mkdir(exist_ok=True)
    for number in range(2):
        drawn = tmp_path_factory.mktemp("drawn")
        captions = sources.drawn(drawn / "world", 64, number)
        sources.tar(folder / f"{number:05}.tar", drawn / "world", captions)
    (folder / "notes.md").write_text("not a tar")
    return folder


@pytest.fixture(scope="module")
def library():
    """What tars are read with, in ComfyUI's Python."""
    code = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {['webdataset', 'fsspec']})))"
    return subprocess.run([PYTHON, "-c", code]).returncode == 0


def test_tars_of_a_folder_are_found_by_their_names(host, shards, library):
    none = host.run(tars("*.zip"))
    assert none.failed == "data" and "*.zip" in none.error
    result = host.run(tars())
    if not library:
        assert result.failed == "data" and "pip install" in result.error
        return
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert told(result) == [f"2 tars of {size / 1e6:,.1f} MB, read when a repair begins"]
    assert told(host.run(tars("00001.*")))[0].startswith("1 tars")
    assert "data" in host.run(tars("00001.*")).cached


def test_tars_are_trained_on_with_a_locked_vision_tower_and_not_with_another(host, nodes, shards, library):
    if not library:
        pytest.skip("no webdataset in ComfyUI's Python")
    known = set(host.runs())
    prompt = only(waiting(nodes, 310, epochs=1, batch=32, held_out=0.1), "GmPRepair")
    prompt |= {"data": tars()["data"]}
    prompt["GmPRepair"]["inputs"]["dataset"] = ["data", 0]
    result = host.run(prompt)
    assert result.status == "success", result.error
    run = fresh_run(host, known)
    assert host.runs()[run]["state"] == "finished" and host.runs()[run]["step"] >= 3
    prompt["GmPRepair"]["inputs"]["train"] = "both"
    refused = host.run(prompt)
    assert refused.failed == "GmPRepair" and "set train to text" in refused.error


def test_tars_fit_no_socket_that_takes_pictures(host, shards):
    prompt = tars() | {"report": node("GmPDatasetReport", dataset=["data", 0])}
    status, answer = host.post("/prompt", {"prompt": prompt, "client_id": "tests"})
    assert "report" in str(answer) and "GMP_TARS" in str(answer), (status, answer)


def test_a_file_that_is_no_parquet_is_refused_by_name(host, pictures):
    (host.base / "input" / "none.parquet").write_bytes(b"PAR1 no table PAR1")
    result = host.run(dataset(captions="none.parquet"))
    assert result.failed == "data" and "none.parquet" in result.error and str(host.base) not in result.error
