"""The page about a run on screens and on paper, in a real browser: nothing is cut, nothing is scrolled sideways.

Screenshots and the PDF are kept in GMP_SCREENSHOTS, if that names a folder.
"""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from gmp.config import RepairConfig
from gmp.evidence import THUMBNAILS, thumbnail
from gmp.history import History
from gmp.report import REPORT, write_report
from gmp.run import repair
from tests.browser.test_page import browse, need_browser, screenshots

CONFIG = RepairConfig(epochs=3, batch=8, lr=3e-3, held_out=0.4)
LONG = "https://" + "unbroken" * 30
HEIGHT = 1001  # of a page's inside, in pixels


def wide(tmp_path_factory):
    """A picture that is no square."""
    path = tmp_path_factory.mktemp("wide") / "wide.png"
    Image.new("RGB", (300, 60), "teal").save(path)
    return path


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A finished run with long captions, names and settings, and a graph of many nodes."""
    need_browser()
    folder = tmp_path_factory.mktemp("page") / "run"
    list(repair(inputs, CONFIG, folder, cache=tmp_path_factory.mktemp("cache"), device=torch.device("cpu")))
    document = json.loads((folder / "evidence.json").read_text())
    small = [thumbnail(path, folder / THUMBNAILS) for path in (inputs.index.paths[0], wide(tmp_path_factory))]
    first, second = ({"picture": f"{'deep/' * 30}1.png", "thumbnail": name} for name in small)
    document["evidence"]["changes"]["shown"] = [
        {"caption": caption, "became": became, "before": first, "after": second}
        for became in ("right", "wrong")
        for caption in (LONG, "a small red circle", "many words " * 60, "", "a cat", "a dog", "a bird")
    ]
    (folder / "evidence.json").write_text(json.dumps(document))
    node = {"class_type": "GmPCaptionDataset", "inputs": {"folder": "/data/" + "x" * 300, "text": LONG}}
    (folder / "prompt.json").write_text(json.dumps({str(i): node for i in range(12)}))
    history = History.load(folder)
    history.follow()
    write_report(folder, history.whole())
    return folder


@pytest.fixture(scope="module")
def seen(run, tmp_path_factory):
    return browse("report.py", run / REPORT, screenshots(tmp_path_factory.mktemp("pictures")) / "report")


def test_no_screen_is_scrolled_sideways(seen):
    assert len(seen["screens"]) == 4
    for name, screen in seen["screens"].items():
        assert screen["scrolls"] <= 0 and not screen["beyond"], (name, screen["beyond"])


def test_all_pictures_are_shown_and_nothing_is_asked_for(seen):
    assert not seen["errors"]
    for screen in (*seen["screens"].values(), seen["paper"]):
        assert len(screen["pictures"]) >= 3 and all(screen["pictures"])


def luminance(colour):
    """Relative luminance of `rgb(r, g, b)` (WCAG 2.1)."""
    values = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_read_in_light_and_dark(seen, scheme):
    screen = seen["screens"][f"1200 {scheme}"]
    ink, back = luminance(screen["ink"]), luminance(screen["back"])
    assert (back > ink) == (scheme == "light")
    assert (max(ink, back) + 0.05) / (min(ink, back) + 0.05) >= 7


def test_paper_is_white_whatever_the_screen(seen):
    assert seen["paper"]["back"] == "rgb(255, 255, 255)" and luminance(seen["paper"]["ink"]) < 0.1


def test_no_row_and_no_picture_is_cut_by_a_pages_edge(seen):
    paper = seen["paper"]
    assert not paper["beyond"] and len(paper["whole"]) > 60
    for one in paper["whole"]:
        assert one["kept"] and one["height"] <= HEIGHT, one
