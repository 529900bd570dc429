"""Pictures: drawn for any number of encoders, in words that can be read, and without a trace in matplotlib's state."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

from gmp.compare import Neighbour, geometry, similarity, weight_drift
from gmp.errors import InputError
from gmp.plots import (
    COLOURS,
    new_figure,
    pixels,
    plot_distributions,
    plot_drift_lines,
    plot_drift_map,
    plot_layers,
    plot_losses,
    plot_measures,
    plot_neighbours,
    plot_pairs,
    plot_prompts,
    plot_similarity,
    png,
    save,
    smooth,
    svg,
)
from gmp.plots.figure import DIVERGING, GREY, HEAT, colour, short, words
from tests.small import disturbed, small_clip


def settings():
    return json.dumps(dict(matplotlib.rcParams), default=str)


BEFORE = settings()
ROOT = Path(__file__).resolve().parent.parent
KINDS = [kind for kind in ("object", "relation", "a kind of $5") for _ in range(4)]
LONG = "a_model_with_a_very_long_name_that_goes_on_and_on_fp16_v2.safetensors"
NAMES = ("original", LONG, "_under $1 score$.safetensors", "third", "fourth", "fifth", "sixth")


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def state(amount=0.0):
    clip = disturbed(small_clip(), amount)
    return {n: t for n, t in clip.state_dict().items() if not n.startswith("visual.") and n != "logit_scale"}


STATES = {name: state(0.02 * place) for place, name in enumerate(NAMES)}
DRIFTS = {name: weight_drift(one, STATES["original"]) for name, one in STATES.items()}
GEOMETRIES = {name: geometry(one) for name, one in STATES.items()}
POINTS = {name: torch.randn(12, 2, generator=dice(place)) for place, name in enumerate(NAMES)}
MATRICES = {name: similarity(torch.randn(12, 5, generator=dice(place))) for place, name in enumerate(NAMES)}
CHANGED = Neighbour("a $cat$ on a mat", "a dog " * 30, "a _bird", 0.9, 0.8, 11, 2)
HISTORY = {
    "at": [1, 2, 3],
    "series": {"loss": {"mean": [2.0, 1.0, 0.5]}, "losses.contrastive": {"mean": [2.0, None, 0.5]}},
    "measures": [
        {
            "step": step,
            "recall_at_1_text_to_image": 0.1 + step / 10,
            "recall_at_1_image_to_text": None,
            "penultimate": 0.5 + step / 10,
            "projected": 0.9,
            "moved": {"text.0.r": step / 100, "text.1.r": step / 50, "text.1.theta": step / 20},
        }
        for step in (0, 1, 3)
    ],
}


def first(table, count):
    return dict(list(table.items())[:count])


FAMILIES = {
    "drift map": lambda count: plot_drift_map(first(DRIFTS, count)),
    "drift lines": lambda count: plot_drift_lines(first(DRIFTS, count)),
    "distributions": lambda count: plot_distributions(first(GEOMETRIES, count)),
    "layers": lambda count: plot_layers(first(GEOMETRIES, count), first(DRIFTS, count) if count > 1 else {}),
    "prompts": lambda count: plot_prompts(first(POINTS, count), KINDS, ("PC 1", "PC 2")),
    "pairs": lambda count: plot_pairs(POINTS["third"], first(POINTS, count), range(12), ("PC 1", "PC 2")),
    "similarity": lambda count: plot_similarity(first(MATRICES, count), KINDS, "cosine"),
    "neighbours": lambda count: plot_neighbours({name: [CHANGED] * 3 for name in NAMES[:count]}, "changed"),
    "measures": lambda count: plot_measures(HISTORY, count),
}


@functools.cache
def drawn(family, count):
    return FAMILIES[family](count)


def texts(figure):
    """All words of a figure, as they are drawn."""
    figure.canvas.draw()
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_text().strip() and text.get_visible()]


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_encoders_is_drawn(family, count, recwarn):
    figure = drawn(family, count)
    shown = pixels(figure)
    assert shown.dtype == np.float32 and shown.ndim == 3 and shown.shape[2] == 3
    assert shown.shape[1] == 840 and 300 < shown.shape[0] < 2400
    assert 0 <= shown.min() < 0.5 and shown.max() == 1
    assert not [one for one in recwarn if "constrained_layout" in str(one.message) or "Glyph" in str(one.message)]


@pytest.mark.parametrize("family", ["drift map", "drift lines", "distributions", "layers", "similarity", "neighbours"])
def test_every_encoder_is_named_and_long_names_are_shortened(family):
    shown = "\n".join(texts(drawn(family, 3)))
    assert "third" not in shown
    assert "a_model_" in shown and LONG not in shown
    assert "_under" in shown


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_drawn_outside_of_the_picture(family, count):
    figure = drawn(family, count)
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(figure.canvas.get_renderer()), figure.get_size_inches()
    assert -0.02 <= box.x0 and box.x1 <= width + 0.02
    assert -0.02 <= box.y0 and box.y1 <= height + 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_large_enough_for_a_preview(family):
    """At 512 pixels' width, 8 points of a figure 7 inches wide are 8 pixels high."""
    figure = drawn(family, 3)
    sizes = [t.get_fontsize() for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip()]
    assert min(sizes) >= 7.9 and figure.get_size_inches()[0] == 7


def test_bytes_are_png_and_svg(tmp_path):
    figure = plot_similarity(first(MATRICES, 2), KINDS, "cosine")
    assert png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
    assert svg(figure).startswith(b"<?xml") and b"</svg>" in svg(figure) and b"dc:date" not in svg(figure)
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        save(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match="a.gif ends in no format"):
        save(figure, tmp_path / "a.gif")


def test_pixels_are_those_of_the_png(tmp_path):
    from PIL import Image

    save(plot_drift_lines(first(DRIFTS, 2)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        stored = np.asarray(picture.convert("RGB"), np.float32) / 255
    np.testing.assert_array_equal(pixels(plot_drift_lines(first(DRIFTS, 2))), stored)


def test_a_heat_map_shows_the_numbers_it_was_given():
    figure = plot_drift_map({"one": DRIFTS["third"]}, ("angle",))
    image = next(axes.images[0] for sub in figure.subfigs for axes in sub.axes if axes.images)
    table = image.get_array()
    assert table.shape == (5, 2) and image.get_cmap().name == HEAT
    for one in DRIFTS["third"]:
        if one.role == "mlp.out":
            assert table[4, one.block] == pytest.approx(one.angle)
        if one.role == "layer_norm" and one.block is not None:
            assert table[0, one.block] == pytest.approx(one.angle)


def test_heat_maps_side_by_side_share_one_scale():
    figure = plot_drift_map(first(DRIFTS, 3))
    rows = [[axes.images[0].get_clim() for axes in sub.axes if axes.images] for sub in figure.subfigs][0]
    assert len(rows) >= 6 and len(set(rows[:6:2])) == len(set(rows[1:6:2])) == 1
    panels = [axes.images[0] for axes in plot_similarity(first(MATRICES, 3), KINDS, "c").axes if axes.images][:3]
    assert len({panel.get_clim() for panel in panels}) == 1


def test_prompts_stand_by_kind_in_a_similarity_matrix():
    mixed = KINDS[::-1][::2] + KINDS[::-1][1::2]
    matrix = torch.arange(144.0).reshape(12, 12) / 144
    image = next(axes.images[0] for axes in plot_similarity({"one": matrix}, mixed, "c").axes if axes.images)
    order = [i for kind in dict.fromkeys(mixed) for i in range(12) if mixed[i] == kind]
    np.testing.assert_allclose(image.get_array(), matrix.numpy()[np.ix_(order, order)])


def test_lines_join_each_caption_with_its_picture():
    owners = [2, 2, 0]
    captions = torch.randn(3, 2, generator=dice())
    pictures = torch.randn(3, 2, generator=dice(1))
    (axes,) = plot_pairs(pictures, {"one": captions}, owners, ("x", "y")).axes
    lines = next(c for c in axes.collections if hasattr(c, "get_segments")).get_segments()
    for line, caption, owner in zip(lines, captions, owners, strict=True):
        np.testing.assert_allclose(line, torch.stack([caption, pictures[owner]]).numpy())


def test_histograms_hold_every_row():
    figure = plot_distributions(first(GEOMETRIES, 2))
    for axes in figure.axes:
        assert len(axes.patches) == 2
        for patch in axes.patches:
            assert patch.get_data().values.sum() == pytest.approx(1, abs=1e-5)


def test_a_table_tells_places_in_words():
    shown = texts(plot_neighbours({"broken": [CHANGED], "alike": []}, "changed"))
    assert "now its 11th" in shown and "was its 2nd" in shown
    assert "no prompt has another neighbour" in shown
    assert any("cat" in text and r"\$" in text for text in shown)


def test_dollars_and_underscores_are_letters():
    assert words("$5 and\n$6") == r"\$5 and \$6" and words("_a") == " _a"
    assert short("a" * 100, 9) == "aaaa…aaaa" and len(short(LONG)) == 30 and short(LONG).endswith("fp16_v2")
    assert short("short.pt") == "short.pt"


def test_colours_are_distinct_and_the_original_is_grey():
    assert len({to_hex(one) for one in COLOURS}) == len(COLOURS) == 7
    assert [colour(place) for place in range(7)] == [GREY, *COLOURS[:6]]
    assert {HEAT, DIVERGING} <= set(matplotlib.colormaps)
    # the darker of two heat-map colours is always the smaller value
    tones = [np.dot(to_rgb(matplotlib.colormaps[HEAT](x)), (0.2126, 0.7152, 0.0722)) for x in np.linspace(0, 1, 30)]
    assert tones == sorted(tones)


def test_a_run_is_drawn_over_its_steps(tmp_path):
    figure = plot_measures(HISTORY, best=3)
    recall, cosine, moved = figure.axes
    np.testing.assert_allclose(recall.lines[0].get_xydata(), [[0, 0.1], [1, 0.2], [3, 0.4]])
    assert [line.get_label() for line in cosine.lines[:2]] == ["penultimate (SDXL, SD3)", "projected"]
    (theta, r) = moved.lines[:2]
    np.testing.assert_allclose(r.get_ydata()[1:], [1.5, 4.5])
    np.testing.assert_allclose(theta.get_ydata()[1:], [5, 15])
    assert "dotted: the best, step 3" in texts(figure)
    save(plot_losses(HISTORY), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    save(plot_losses(HISTORY | {"measures": [], "series": {}}), tmp_path / "empty.png")
    assert "not measured" in texts(plot_measures(HISTORY | {"measures": [{"step": 0}]}))


def test_smoothing_against_the_formula():
    values, total, weight = [3.0, None, 1.0, 2.0], 0.0, 0.0
    for place, found in enumerate(smooth(values, 4)):
        if values[place] is not None:
            total, weight = 0.75 * total + 0.25 * values[place], 0.75 * weight + 0.25
        assert found == pytest.approx(total / weight)


def test_matplotlibs_state_is_left_alone():
    for family in FAMILIES:
        drawn(family, 3)
    assert settings() == BEFORE


def test_pyplot_is_not_imported_and_matplotlib_only_when_something_is_drawn():
    code = (
        "import sys, gmp.plots, gmp.comparison; assert 'matplotlib' not in sys.modules; "
        "gmp.plots.png(gmp.plots.new_figure(1, 1)); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert new_figure(2, 1).get_size_inches().tolist() == [2, 1]
