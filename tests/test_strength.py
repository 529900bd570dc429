"""Strengths: the suggestion on constructed curves, and the measurements against the functions that they are made of."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jsonschema
import pytest
import torch

import gmp.features
import gmp.strength
from gmp import READ_POINTS
from gmp.blend import ALONG, blend
from gmp.cli import main
from gmp.clip import TextTower, load
from gmp.commands import strength as command
from gmp.config import RepairConfig
from gmp.data.captions import content_key, split
from gmp.errors import InputError
from gmp.evaluate import SCHEMA
from gmp.events import finish
from gmp.join import join
from gmp.layouts import read_text, write_text
from gmp.measure import Drift, Interval, drift, retrieval, row_drift, rows, text_features
from gmp.plots.figure import pixels
from gmp.plots.strength import plot_scan
from gmp.prompts import prompts
from gmp.run import describe_run
from gmp.strength import (
    FEW,
    MOST,
    Point,
    even,
    knee,
    scan,
    suggest,
)
from gmp.structure import Structure, compare_structure, prompt_vectors
from gmp.verdict import TARGETS, target_of
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.small import PICTURES, disturbed, small_clip, tokenize

STRENGTHS = tuple(i / 10 for i in range(13))
TEXTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "old") for shape in ("cat", "car", "tree")]
CPU = torch.device("cpu")


def curve(function):
    return [function(s) for s in STRENGTHS]


# ---- the suggestion -------------------------------------------------------------------------------------------------


def test_a_curve_that_rises_and_levels_off_gives_the_first_strength_with_95_percent_of_its_gain():
    values = curve(lambda s: 0.2 + 0.5 * min(1.0, s / 0.8))
    # 0.7 has 87.5 % of the gain, 0.8 all of it
    assert knee(STRENGTHS, {"recall": values}).strength == 0.8
    exponential = curve(lambda s: 1 - math.exp(-4 * s))
    enough = next(s for s, v in zip(STRENGTHS, exponential, strict=True) if v >= 0.95 * max(exponential))
    assert knee(STRENGTHS, {"recall": exponential}).strength == enough == 0.8
    assert knee(STRENGTHS, {"recall": curve(lambda s: s)}).strength == 1.2


def test_of_two_curves_the_later_one_decides():
    early, late = curve(lambda s: min(1.0, s / 0.3)), curve(lambda s: 0.5 + 0.1 * min(1.0, s / 0.9))
    found = knee(STRENGTHS, {"recall": early, "structure": late})
    assert found.strength == 0.9 and "recall and structure" in found.reason
    assert knee(STRENGTHS, {"structure": late, "recall": early}).strength == 0.9


def test_curves_that_peak_before_the_whole_repair_give_a_strength_at_or_before_the_peak():
    peaked = curve(lambda s: 0.8 - (s - 0.6) ** 2)
    found = knee(STRENGTHS, {"recall": peaked, "structure": peaked})
    assert found.strength == 0.5  # 0.35 of 0.36 is 97 %, 0.4 has 0.32: 89 %


def test_flat_curves_suggest_0_and_say_so():
    for wobble in (0.0, 0.009):
        found = knee(
            STRENGTHS, {"recall": curve(lambda s, w=wobble: 0.5 + w * math.sin(9 * s)), "structure": [0.7] * 13}
        )
        assert found.strength == 0 and "no strength improves recall and structure" in found.reason


def test_curves_that_get_worse_everywhere_suggest_0_and_say_so():
    worse = curve(lambda s: 0.9 - 0.3 * s)
    found = knee(STRENGTHS, {"recall": worse, "structure": worse})
    assert found.strength == 0 and "no strength improves recall and structure" in found.reason


def test_a_gain_in_recall_alone_is_not_taken_at_the_cost_of_structure():
    found = knee(STRENGTHS, {"recall": curve(lambda s: s), "structure": curve(lambda s: 0.9 - 0.3 * s)})
    assert found.strength == 0 and "recall improves only where structure gets worse" in found.reason
    found = knee(STRENGTHS, {"recall": curve(lambda s: 0.9 - 0.3 * s), "structure": curve(lambda s: 0.5 + 0.3 * s)})
    assert found.strength == 0 and "structure improves only where recall gets worse" in found.reason


def test_a_curve_that_stays_as_it_is_asks_for_nothing_but_may_not_get_worse():
    recall = curve(lambda s: min(1.0, s / 0.8))
    found = knee(STRENGTHS, {"recall": recall, "structure": [0.7] * 13})
    assert found.strength == 0.8 and "structure improves at none" in found.reason
    falls_late = curve(lambda s: 0.7 - max(0.0, s - 0.55))
    found = knee(STRENGTHS, {"recall": recall, "structure": falls_late})
    assert found.strength == 0.5  # 0.6 has lost 0.05 of structure
    assert "no strength has 95% of the best gain in recall without a loss in structure" in found.reason
    assert "62% of each" in found.reason  # 0.5 / 0.8


def test_curves_whose_best_strengths_exclude_each_other_give_the_best_least_share():
    falling_after = curve(lambda s: 0.5 - abs(s - 0.4))  # best at 0.4, as at the start at 0.8
    rising = curve(lambda s: s)
    found = knee(STRENGTHS, {"recall": falling_after, "structure": rising})
    shares = [min((r - 0.1) / 0.4, s / 1.2) for r, s in zip(falling_after, rising, strict=True)]
    best = max(shares)
    assert found.strength == next(s for s, share in zip(STRENGTHS, shares, strict=True) if share >= 0.95 * best)
    assert f"{best:.0%} of each" in found.reason and "no strength has 95%" in found.reason


def test_curves_that_never_gain_at_one_strength_suggest_0():
    first, second = [0, 1, *[0] * 11], [*[0] * 11, 1, 1]
    found = knee(STRENGTHS, {"recall": first, "structure": second})
    assert found.strength == 0 and "recall and structure never improve at one strength" in found.reason


def test_what_cannot_be_measured_gives_no_suggestion():
    values = curve(lambda s: s)
    found = knee(STRENGTHS, {"recall": values, "structure": [*values[:4], math.nan, *values[5:]]})
    assert found.strength is None and "structure cannot be measured" in found.reason


def structure_of(value):
    return Structure(value, min(1.0, value + 0.1), 0.3, 20.0, 1.0)


def point(strength, recall, structure, half=0.02, at="penultimate"):
    recall_ = gain = None
    if recall is not None:
        recall_ = Interval(recall, recall - half, recall + half)
        gain = Interval(recall - 0.1, recall - 0.1 - half * (strength > 0), recall - 0.1 + half * (strength > 0))
    moved = {at: Drift(1.0, 0.0, 1.0)}
    return Point(strength, recall_, gain, {at: structure_of(structure)}, moved, moved)


def points(recall, structure, half=0.02):
    return [point(s, recall and recall(s), structure(s), half) for s in STRENGTHS]


def test_the_suggestion_is_that_of_recall_and_of_structure_where_the_model_reads():
    made = points(lambda s: 0.1 + 0.8 * min(1.0, s / 0.4), lambda s: 0.4 + 0.4 * min(1.0, s / 0.7))
    assert suggest(made, ("penultimate",), 500).strength == 0.7
    fast = points(lambda s: 0.1 + 0.8 * min(1.0, s / 0.4), lambda s: 0.4 + 0.4 * min(1.0, s / 0.2))
    assert suggest(fast, ("penultimate",), 500).strength == 0.4
    assert suggest(points(None, lambda s: 0.4 + 0.4 * min(1.0, s / 0.2)), ("penultimate",), 0).strength == 0.2
    two = [replace(p, structure=p.structure | {"projected": structure_of(0.1 + 0.5 * p.strength)}) for p in fast]
    assert suggest(two, ("penultimate", "projected"), 500).strength == 1.2


def test_agreement_is_the_lower_one_of_its_two_numbers():
    assert Structure(0.4, 0.9, 0.0, 1.0, 1.0).agreement == Structure(0.9, 0.4, 0.0, 1.0, 1.0).agreement == 0.4


def test_too_few_pictures_give_no_suggestion():
    made = points(lambda s: 0.1 + 0.8 * s / 1.2, lambda s: 0.4 + 0.4 * s)
    assert suggest(made, ("penultimate",), FEW).strength is not None
    found = suggest(made, ("penultimate",), FEW - 1)
    assert found.strength is None and f"{FEW - 1} pictures are too few" in found.reason


def test_an_interval_wider_than_the_gain_gives_no_suggestion():
    def small(half):
        return points(lambda s: 0.1 + 0.1 * min(1.0, s), lambda s: 0.4 + 0.4 * s, half)

    found = suggest(small(0.08), ("penultimate",), 500)
    assert found.strength is None and "0.16 wide" in found.reason
    assert suggest(small(0.04), ("penultimate",), 500).strength is not None
    large = points(lambda s: 0.1 + 0.8 * min(1.0, s), lambda s: 0.4 + 0.4 * s, 0.08)
    assert suggest(large, ("penultimate",), 500).strength is not None  # a gain of 0.8 is certain enough


def test_strengths_lie_evenly_and_hold_the_repair_itself():
    assert even(13) == tuple(round(0.1 * i, 4) for i in range(13))
    assert even(5) == (0, 0.3, 0.6, 0.9, 1.0, 1.2)
    with pytest.raises(InputError, match="2 strengths make no curve"):
        even(2)


def test_each_target_has_its_read_points():
    assert target_of("sdxl", "clip_l").read_points == target_of("sdxl", None).read_points == ("penultimate",)
    assert target_of("sdxl", "clip_g").read_points == ("penultimate", "projected")
    assert target_of("sd1", "clip_l").read_points == ("last",)
    assert target_of("flux", "clip_l").read_points == ("pooled",)
    with pytest.raises(InputError, match="target 'sd9' is not one of sdxl, sd1, flux"):
        target_of("sd9", None)


# ---- the measurement ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repaired(tmp_path_factory, small_files):
    """An encoder nearer to the original than the ruined one, in a file that tells of no run."""
    path = tmp_path_factory.mktemp("repaired") / "repaired.safetensors"
    state = disturbed(small_clip(), 0.01, 3).state_dict()
    state = {name: t for name, t in state.items() if not name.startswith("visual.") and name != "logit_scale"}
    write_text(state, path, config=read_text(small_files[0]).config)
    return read_text(path)


def measured(inputs, repaired, index=None, hear=lambda event: None, **settings):
    settings = {"texts": TEXTS, "cache": settings.pop("cache", None), "device": CPU} | settings
    return finish(scan(inputs.text, repaired, inputs.original, inputs.vision, inputs.tokenize, index, **settings), hear)


@pytest.fixture(scope="module")
def found(inputs, repaired, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return measured(inputs, repaired, inputs.index, cache=cache, along=("weights", "r_and_theta"), strengths=even(4))


@pytest.mark.parametrize("way", [0, 1])
@pytest.mark.parametrize("at", [0, 2, 3])  # 3 is the repair, whose recall is not that of 0
def test_a_point_holds_what_the_blended_tower_measures(inputs, repaired, found, way, at):
    one = found.curves[way].points[at]
    assert one.strength == even(4)[at] and len(found.curves[way].points) == 5
    joined = {name: join(file, inputs.vision, inputs.original) for name, file in (("b", inputs.text), ("r", repaired))}
    states = {
        name: {n: t for n, t in one.state.items() if not n.startswith("visual.") and n != "logit_scale"}
        for name, one in joined.items()
    }
    towers = {
        name: load(TextTower, joined["b"].config.text, state)
        for name, state in (
            ("blend", blend(states["b"], states["r"], one.strength, ALONG[way])),
            ("broken", states["b"]),
            ("original", {n: t for n, t in inputs.original.state.items() if n != "logit_scale"}),
        )
    }
    ids = tokenize(TEXTS).ids
    expected = compare_structure(*(prompt_vectors(towers[name], ids) for name in ("blend", "original")))
    for point_ in READ_POINTS:
        assert vars(one.structure[point_]) == pytest.approx(vars(expected[point_]), abs=1e-5)
    for moved, other in ((one.from_original, "original"), (one.from_broken, "broken")):
        wanted = drift(towers["blend"], towers[other], ids)
        for point_ in READ_POINTS:
            assert moved[point_].cosine == pytest.approx(wanted[point_].cosine, abs=1e-5)
            assert moved[point_].relative_norm == pytest.approx(wanted[point_].relative_norm, abs=1e-5)
    clip = joined["b"].build()
    from gmp.data.images import load_picture, preprocess

    with torch.no_grad():
        pictures = clip.visual(torch.stack([preprocess(load_picture(p), 32) for p in inputs.index.paths]))
    features = text_features(towers["blend"], inputs.tokenize(inputs.index.captions()).ids)
    hits = retrieval(pictures, features, inputs.index.owners())
    recall = (hits.text_to_image.recall_at_1 + hits.image_to_text.recall_at_1) / 2
    assert one.recall.value == pytest.approx(recall, abs=1e-12)
    assert one.recall.low <= one.recall.value <= one.recall.high
    start = found.curves[0].points[0].recall.value
    assert one.recall_gain.value == pytest.approx(recall - start, abs=1e-12)
    assert (one.recall_gain.value != 0) == (at == 3)


def test_the_ends_are_the_broken_encoder_and_the_repair(inputs, found):
    first, last = found.curves[0].points[0], found.curves[0].points[3]
    assert last.strength == 1.0 and found.curves[1].points[0] == first
    assert all(abs(moved.cosine - 1) < 1e-6 for moved in first.from_broken.values())
    assert first.recall_gain == Interval(0, 0, 0)
    assert last.structure["penultimate"].agreement > first.structure["penultimate"].agreement
    assert found.curves[1].points[3].structure == last.structure


def test_drift_of_rows_is_the_drift_of_their_towers():
    one, other = small_clip(0), small_clip(1)
    ids = tokenize(TEXTS).ids
    mine, wanted = row_drift(rows(one, ids, 5), rows(other, ids, 7)), drift(one, other, ids)
    for point_ in READ_POINTS:
        assert vars(mine[point_]) == pytest.approx(vars(wanted[point_]), abs=1e-6)


def test_few_pictures_are_measured_but_not_trusted(found):
    assert found.pictures == PICTURES and found.suggested.strength is None
    words = found.as_json()["warnings"]
    assert sum("too few" in one for one in words) == 2 and any("trained on" in one for one in words)


def test_without_pictures_structure_alone_suggests(inputs, repaired):
    alone = measured(inputs, repaired, strengths=even(4), target="flux")
    assert alone.pictures == 0 and alone.vision is None and alone.curves[0].points[0].recall is None
    values = [p.structure["pooled"].agreement for p in alone.curves[0].points]
    assert alone.suggested == knee(even(4), {"structure at pooled": values}) and alone.suggested.strength > 0


def with_run(repaired, inputs, index, **config):
    """The repaired encoder as a run over this data set writes it."""
    keys = [content_key(path) for path in index.paths]
    run = describe_run(replace(inputs, index=index), keys, RepairConfig(**config))
    source = replace(repaired.source, metadata={"gmp_run": json.dumps(run)})
    return replace(repaired, source=source), dict(zip((p.path for p in index.pictures), keys, strict=True))


def test_of_the_pictures_that_a_run_was_trained_on_only_those_held_out_are_measured(
    inputs, repaired, tmp_path, monkeypatch
):
    known, keys = with_run(repaired, inputs, inputs.index, held_out=0.3)
    embedded = []
    embed = gmp.features.embed_files

    def listen(tower, root, names, *rest, **options):
        embedded.extend(names)
        return embed(tower, root, names, *rest, **options)

    monkeypatch.setattr(gmp.features, "embed_files", listen)
    one = measured(inputs, known, inputs.index, cache=tmp_path, strengths=even(3))
    _, held = split(inputs.index, keys, 8)  # 0.3 of 26
    assert embedded == [picture.path for picture in held.pictures] and one.pictures == len(held)
    (words,) = one.warnings[:1]
    assert words.startswith(f"measured on the 8 of 26 pictures that the run of {known.source.path} held out")


def test_nor_those_that_the_broken_encoder_was_trained_on(inputs, repaired, tmp_path):
    known, _ = with_run(inputs.text, inputs, inputs.index, held_out=0.3)  # it was repaired once before
    one = measured(replace(inputs, text=known), repaired, inputs.index, cache=tmp_path, strengths=even(3))
    assert one.pictures == 8 and any(known.source.path in words for words in one.warnings)


def test_of_other_pictures_all_are_measured_up_to_a_limit(inputs, repaired, tmp_path, monkeypatch):
    others = replace(inputs.index, pictures=inputs.index.pictures[:-2])
    known, _ = with_run(repaired, inputs, others, held_out=0.3)
    one = measured(inputs, known, inputs.index, cache=tmp_path, strengths=even(3))
    assert one.pictures == PICTURES and "had another data set" in one.warnings[0] and MOST > PICTURES
    monkeypatch.setattr(gmp.strength, "MOST", 10)
    assert measured(inputs, known, inputs.index, cache=tmp_path, strengths=even(3)).pictures == 10


def test_progress_grows_to_its_total(inputs, repaired, tmp_path):
    heard = []
    measured(inputs, repaired, inputs.index, heard.append, cache=tmp_path, along=("weights", "r"), strengths=even(3))
    steps = [event for event in heard if event["stage"] == "measure strengths"]
    done = [event["done"] for event in steps]
    assert {event["type"] for event in heard} == {"progress"} and {event["total"] for event in steps} == {8}
    assert done == sorted(done) and done[0] == 0 and done[-1] == 8


def test_the_document_fits_the_schema(found, inputs, repaired):
    check = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for one in (found, measured(inputs, repaired, strengths=even(3))):
        text = json.dumps(one.as_json(), allow_nan=False)
        check.validate(json.loads(text))
    document = found.as_json()
    assert document["kind"] == "scan" and [w["along"] for w in document["curve"]["ways"]] == ["weights", "r_and_theta"]
    assert document["encoder"]["sha256"] == repaired.source.sha256
    assert document["curve"]["broken"]["sha256"] == inputs.text.source.sha256
    assert document["suggested"]["strength"] == found.suggested.strength
    broken = json.loads(json.dumps(document))
    broken["curve"]["ways"][0]["points"][0]["recall"] = 0.5
    assert not check.is_valid(broken)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strengths": (0.1, 0.5, 1.0)}, "rising from 0"),
        ({"strengths": (0.0, 1.0, 0.5)}, "rising from 0"),
        ({"strengths": (0.0, 1.0, 1.5)}, "rising from 0"),
        ({"along": ()}, "along is empty"),
        ({"along": ("weights", "weights")}, "each once"),
        ({"along": ("phi",)}, "along is phi"),
        ({"target": "sd9"}, "target 'sd9'"),
    ],
)
def test_settings_that_cannot_be_are_refused(inputs, repaired, settings, words):
    with pytest.raises(InputError, match=words):
        measured(inputs, repaired, **settings)


def test_an_original_of_another_shape_is_refused(inputs, repaired):
    other = replace(inputs.original, config=replace(inputs.original.config, width=48))
    with pytest.raises(InputError, match="width 32 against 48"):
        finish(scan(inputs.text, repaired, other, inputs.vision, tokenize, texts=TEXTS, cache=None, device=CPU))


def test_the_picture_shows_every_curve_and_the_suggestion(found, inputs, repaired):
    figure = plot_scan(found)
    recall, structure, moved = figure.axes
    lines = {line.get_label(): line for line in recall.lines}
    assert list(lines["recall@1"].get_ydata()) == [p.recall.value for p in found.curves[0].points]
    labels = [text.get_text() for text in structure.get_legend().get_texts() + moved.get_legend().get_texts()]
    assert labels == ["CKA", "rank correlation", "told apart", "to the original", "to the broken"]
    assert "none along weights" in figure.get_suptitle()
    alone = measured(inputs, repaired, strengths=even(4))
    figure = plot_scan(alone)
    assert len(figure.axes) == 2 and pixels(figure).max() <= 1
    at = alone.suggested.strength
    assert f"suggested: {at:g} along weights" in figure.get_suptitle()
    assert any(set(line.get_xdata()) == {at} for line in figure.axes[0].lines)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_the_commands_know_the_choices_of_the_engine():
    assert command.WAYS == ALONG and command.TARGETS == TARGETS


def test_scan_prints_a_table_and_writes_picture_and_document(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gmp.strength, "prompts", lambda: prompts()[::30])
    given = [
        "--broken",
        str(ASSETS / RUINED),
        "--repaired",
        str(ASSETS / ORIGINAL),
        "--original",
        str(ASSETS / ORIGINAL),
    ]
    out = tmp_path / "scan"
    assert (
        main(["scan", *given, "--points", "3", "--device", "cpu", "--target", "sd1", "--out", str(out), "--json"]) == 0
    )
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    jsonschema.validate(document, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert document == json.loads((out / "scan.json").read_text(encoding="utf-8"))
    assert (out / "scan.png").read_bytes().startswith(b"\x89PNG")
    suggested = document["suggested"]["strength"]
    marked = [line for line in printed if line.startswith("→")]
    assert len(marked) == 1 and float(marked[0].split()[1]) == suggested > 0
    assert document["suggested"]["read_points"] == ["last"] and "last" in printed[0]
    assert main(["scan", *given, "--out", str(out)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err


def test_scan_says_what_is_missing(tmp_path, capsys):
    given = ["--broken", str(ASSETS / RUINED), "--repaired", str(ASSETS / RUINED), "--original"]
    assert main(["scan", *given, str(ASSETS / ORIGINAL), "--captions", "captions.json"]) == 2
    assert "--captions needs --images" in capsys.readouterr().err
    assert main(["scan", *given, str(ASSETS / RUINED)]) == 2
    assert RUINED in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["huggingface", "gmp"])
def test_blend_writes_the_blended_encoder(tmp_path, capsys, small_files, repaired, layout):
    original, ruined = small_files
    write_text(repaired.state, tmp_path / "repaired.safetensors", config=repaired.config)
    ends = ["--broken", str(ruined), "--repaired", str(tmp_path / "repaired.safetensors"), "--original", str(original)]
    out = tmp_path / "blend.safetensors"
    about = ["--strength", "0.8", "--along", "r_and_theta", "--toward-original", "0.2", "--layout", layout]
    assert main(["blend", *ends, *about, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["strength"] == 0.8 and set(told["of"]) == {"broken", "repaired", "original"}
    found = read_text(out)
    states = [read_text(path).state for path in (ruined, tmp_path / "repaired.safetensors", original)]
    expected = blend(states[0], states[1], 0.8, "r_and_theta", states[2], 0.2)
    assert found.state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-6, atol=1e-8)
    assert json.loads(found.source.metadata["gmp_blend"])["along"] == "r_and_theta"


def test_blend_refuses_what_cannot_be(tmp_path, capsys, small_files):
    original, ruined = map(str, small_files)
    out = ["--out", str(tmp_path / "b.safetensors")]
    assert main(["blend", "--broken", ruined, "--repaired", str(ASSETS / RUINED), "--strength", "0.5", *out]) == 2
    assert "layers 2 against 4" in capsys.readouterr().err
    assert main(["blend", "--broken", ruined, "--repaired", original, "--strength", "1.5", *out]) == 2
    assert "strength 1.5 is not within 0 and 1.2" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
