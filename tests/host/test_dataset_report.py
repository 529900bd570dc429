"""Dataset Report in a real graph: a folder with known faults, what is told, drawn and kept, and what is trained on."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmp.data.captions import read_index
from gmp.dataset_report.findings import OPTIONAL
from gmp.dataset_report.report import examine, lines
from gmp.events import finish
from tests.host import sources
from tests.host.graphs import node
from tests.host.repairs import events, fresh_run, only, waiting

BESIDE = "text files beside the pictures"
COUNT = 128


@pytest.fixture(scope="module")
def flawed(host) -> dict[str, str]:
    """Folder `flawed`: 128 pictures, of which one cannot be read, one is a copy, one has no caption and one another's.

    Gives the name of each of these four.
    """
    folder = host.base / "input" / "flawed"
    captions = sources.drawn(folder, COUNT)
    sources.texts(folder, captions)
    broken, copied, empty, wrong, *_ = captions
    (folder / broken).write_bytes((folder / broken).read_bytes()[:60])
    copy = Path(copied).with_name("copy.png")
    shutil.copyfile(folder / copied, folder / copy)
    (folder / copy).with_suffix(".txt").write_text(f"the copy: {captions[copied][0]}")
    (folder / empty).with_suffix(".txt").write_text("")
    words = set(captions[wrong][0].split())
    other = min((lines[0] for lines in captions.values()), key=lambda line: len(words & set(line.split())))
    (folder / wrong).with_suffix(".txt").write_text(other)
    return {"broken": broken, "copy": copy.as_posix(), "copied": copied, "empty": empty, "wrong": wrong}


def prompt(**inputs: object) -> dict:
    return {
        "data": node("GmPCaptionDataset", folder="flawed", captions=BESIDE),
        "world": node("GmPDemoWorld", pictures=64),
        "report": node("GmPDatasetReport", dataset=["data", 0], **inputs),
        "text": node("PreviewAny", source=["report", 0]),
        "sheet": node("SaveImage", images=["report", 1], filename_prefix="sheet"),
        "lengths": node("SaveImage", images=["report", 2], filename_prefix="lengths"),
        "again": node("GmPDatasetReport", dataset=["report", 3]),
        "rest": node("PreviewAny", source=["again", 0]),
    }


@pytest.fixture(scope="module")
def reported(host, flawed):
    result = host.run(prompt(vision_tower=["world", 1], leave_out="wrong_pairs"))
    assert result.status == "success", result.error
    return result


def shown(result, name: str = "report") -> list[str]:
    return result.outputs[name][0].split("\n· ")


def test_what_is_wrong_is_counted_on_the_node_and_told_in_full(host, flawed, reported, tmp_path):
    words = shown(reported)
    for line in (
        "Pictures that cannot be read: 1", "Copies of a picture, to the byte: 1", "Pictures without a caption: 1",
        "Caption files that hold nothing: 1",
    ):  # fmt: skip
        assert line in words, words
    assert any(line.startswith("Captions that hardly fit their picture: ") for line in words)
    text = reported.outputs["text"][0]
    for name in ("broken", "copy", "empty", "wrong"):
        assert flawed[name] in text, name
    assert "--" not in text
    alone = host.run(prompt())
    expected = lines(finish(examine(read_index(host.base / "input" / "flawed"), tmp_path)))
    told = alone.outputs["text"][0].splitlines()
    assert told[: len(expected)] == [
        line.replace(" (--vision)", "").replace(" (--allow-missing)", "").replace(" (--fix)", "") for line in expected
    ]
    assert any("not looked for" in line for line in shown(alone))


def test_the_contact_sheet_shows_the_pictures_and_the_histogram_is_drawn(host, flawed, reported):
    with Image.open(max(host.output.glob("sheet_*.png"))) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    with Image.open(host.base / "input" / "flawed" / flawed["copied"]) as picture:
        thing = np.asarray(picture.convert("RGB"))
    assert sheet.shape[1] > 900 and sheet.shape[0] > 4 * 200  # a row of the whole, and one for each of the faults
    high, wide = thing.shape[:2]
    corner = np.argwhere((sheet[: -high + 1, : -wide + 1] == thing[0, 0]).all(axis=2))
    whole = [(y, x) for y, x in corner if (sheet[y : y + high, x : x + wide] == thing).all()]
    assert len(whole) >= 2  # the copy, and the picture that is kept
    with Image.open(max(host.output.glob("lengths_*.png"))) as picture:
        drawn = np.asarray(picture.convert("RGB"))
    assert drawn.std() > 10 and drawn.shape[1] >= 600


def test_the_cleaned_data_set_lacks_what_cannot_be_trained_on_and_has_all_captions(host, flawed, reported):
    kept = next(line for line in shown(reported) if line.startswith("cleaned: "))
    left, wrong = int(kept.split()[1]), int(re.search(r"(\d+) \(Captions that hardly fit their picture\)", kept)[1])
    assert "1 (Pictures that cannot be read)" in kept and "1 (Copies of a picture, to the byte)" in kept
    assert COUNT - 2 - wrong <= left <= COUNT - 3  # a picture goes with its last caption
    told = reported.outputs["rest"][0].splitlines()
    assert f"captioned pictures that can be read: {left}" in told
    assert not [line for line in told if line.startswith(("Pictures that cannot be read", "Copies of a picture"))]


def test_the_page_and_the_list_of_fixes_lie_in_the_output_folder(host, flawed, reported):
    line = next(line for line in shown(reported) if "gmp_datasets/" in line)
    name = line.split("gmp_datasets/")[1].split(".html")[0]
    page = (host.output / "gmp_datasets" / f"{name}.html").read_text(encoding="utf-8")
    assert name.startswith("flawed_") and "<script" not in page and str(host.base) not in page
    assert "Copies of a picture, to the byte: 1" in page
    with (host.output / "gmp_datasets" / f"{name}.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    problems = {row["picture"]: row["problem"] for row in rows if row["problem"] in ("unreadable", "duplicates")}
    assert problems == {flawed["broken"]: "unreadable", flawed["copy"]: "duplicates"}


def test_it_looks_again_only_where_something_changed(host, flawed, reported):
    same = prompt(vision_tower=["world", 1], leave_out="wrong_pairs")
    host.run(same)  # ComfyUI keeps what the last prompt had
    assert "report" in host.run(same).cached
    (host.base / "input" / "flawed" / flawed["empty"]).with_suffix(".txt").write_text("a thing that is not empty")
    changed = host.run(same)
    assert "report" not in changed.cached and "Caption files that hold nothing: 1" not in shown(changed)
    (host.base / "input" / "flawed" / flawed["empty"]).with_suffix(".txt").write_text("")


@pytest.mark.parametrize(
    "leave_out, words", [("blurry", "small, aspect, blank"), ("wrong_pairs", "connect it as vision_tower")]
)
def test_what_cannot_be_left_out_is_refused_before_anything_is_looked_at(host, flawed, leave_out, words):
    result = host.run(prompt(leave_out=leave_out))
    assert result.failed == "report" and words in result.error and leave_out in result.error


def test_the_menu_of_what_can_be_left_out_is_the_engines(nodes):
    tooltip = nodes["GmPDatasetReport"]["input"]["optional"]["leave_out"][1]["tooltip"]
    assert tooltip.endswith(f"{', '.join(OPTIONAL)}.")


def test_a_report_can_be_cancelled_and_goes_on_where_it_was(host):
    folder = host.base / "input" / "many"
    captions = sources.drawn(folder, 3000, 7)
    (host.base / "input" / "many.json").write_text(json.dumps(captions))
    graph = {
        "data": node("GmPCaptionDataset", folder="many", captions="many.json"),
        "report": node("GmPDatasetReport", dataset=["data", 0]),
    }
    kept = host.base / "user" / "__gmp" / "survey"
    known = set(kept.glob("*.jsonl"))

    def looked_at() -> int:
        return sum(len(path.read_text().splitlines()) for path in set(kept.glob("*.jsonl")) - known)

    prompt_id = host.queue(graph)
    host.until(looked_at)
    host.post("/interrupt", {})
    assert host.result(prompt_id).interrupted
    before = looked_at()
    assert 0 < before < len(captions)
    result = host.run(graph)
    assert result.status == "success", result.error
    assert "3,000 pictures" in shown(result)[0] or "of 3,000 can be trained on" in shown(result)[0]
    assert looked_at() < len(captions) + before  # those that were seen are not opened again


def test_a_repair_trains_on_what_is_left(host, nodes, flawed, reported):
    known = set(host.runs())
    graph = prompt(vision_tower=["world", 1], leave_out="wrong_pairs")
    graph |= only(waiting(nodes, 320, epochs=1, batch=32, held_out=0.1), "GmPRepair")
    graph["GmPRepair"]["inputs"]["dataset"] = ["report", 3]
    result = host.run(
        {name: graph[name] for name in graph if name not in ("text", "sheet", "lengths", "again", "rest")}
    )
    assert result.status == "success", result.error
    report = next(event for event in events(host, fresh_run(host, known)) if event["type"] == "dataset")
    left = int(next(line for line in shown(reported) if line.startswith("cleaned: ")).split()[1])
    assert report["training pictures"] + report["held-out pictures"] == left and not report["broken"]
