"""The nodes for data sets in the real page: what they tell is on them, and nothing grows over its place."""

from __future__ import annotations

import json

import pytest

from tests.browser.test_page import browse, host, one, screenshots  # noqa: F401
from tests.host import sources

BESIDE = "text files beside the pictures"


def link(number: int, source: tuple[dict, int], target: tuple[dict, str], kind: str) -> list:
    """A link of a saved workflow, noted at both ends."""
    (giver, slot), (taker, name) = source, target
    while len(giver["outputs"]) <= slot:
        giver["outputs"].append({"name": "", "type": kind, "links": []})
    giver["outputs"][slot] |= {"type": kind}
    giver["outputs"][slot]["links"].append(number)
    taker["inputs"].append({"name": name, "type": kind, "link": number})
    return [number, giver["id"], slot, taker["id"], len(taker["inputs"]) - 1, kind]


def graph(weight: float) -> dict:
    """Two folders, mixed, looked at by the original of the shipped world, and shown."""
    plain = one(1, "GmPCaptionDataset", [0, 0], [400, 320], ["flawed", BESIDE, False, "auto", ""])
    coco = one(2, "GmPCaptionDataset", [0, 400], [400, 320], ["clean", "clean.json", False, "auto", ""])
    world = one(3, "GmPDemoWorld", [0, 800], [300, 160], [64])
    mix = one(4, "GmPMixDatasets", [450, 0], [380, 420], [1.0, weight, 1.0, 1.0])
    report = one(5, "GmPDatasetReport", [880, 0], [420, 480], [""])
    sheet = one(6, "PreviewImage", [1350, 0], [420, 500], [])
    lengths = one(7, "PreviewImage", [1350, 560], [420, 320], [])
    tars = one(8, "GmPTarDataset", [450, 500], [380, 200], ["flawed", "*.tar"])
    data = "GMP_DATASET"
    links = [
        link(1, (plain, 0), (mix, "dataset_1"), data),
        link(2, (coco, 0), (mix, "dataset_2"), data),
        link(3, (mix, 0), (report, "dataset"), data),
        link(4, (world, 1), (report, "vision_tower"), "GMP_VISION_TOWER"),
        link(5, (report, 1), (sheet, "images"), "IMAGE"),
        link(6, (report, 2), (lengths, "images"), "IMAGE"),
    ]
    return {
        "nodes": [plain, coco, world, mix, report, sheet, lengths, tars],
        "links": links, "groups": [], "version": 0.4, "last_node_id": 8, "last_link_id": 6,
    }  # fmt: skip


@pytest.fixture(scope="module")
def captions(host) -> dict[str, list[str]]:  # noqa: F811
    """Two folders, one with text files and a picture that cannot be read; gives the captions of the other."""
    folder = host.base / "input"
    flawed = sources.drawn(folder / "flawed", 96)
    sources.texts(folder / "flawed", flawed)
    (folder / "flawed" / next(iter(flawed))).write_bytes(b"\x89PNG\r\n\x1a\n")
    return sources.drawn(folder / "clean", 64, 3)


@pytest.mark.parametrize("canvas, weight", [("classic", 0.5), ("nodes2", 0.25)])
def test_data_sets_tell_on_their_nodes_what_they_are(host, captions, canvas, weight, tmp_path):  # noqa: F811
    sources.coco(host.base / "input" / "clean.json", captions)  # anew, so that it is read for each canvas
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph(weight)))
    seen = browse("page.py", host.port, path, canvas, screenshots(tmp_path) / f"datasets_{canvas}")
    assert seen["queued"] and not seen["missing"]
    shown = seen["shown"]
    assert "COCO captions JSON: images and annotations" in shown["GmPCaptionDataset"]
    assert f"dataset_2: 64 pictures × {weight}" in shown["GmPMixDatasets"]
    assert f"an epoch visits {96 + 64 * weight:g} pictures" in shown["GmPMixDatasets"]
    assert "Pictures that cannot be read: 1" in shown["GmPDatasetReport"]
    assert "gmp_datasets/" in shown["GmPDatasetReport"]
