"""Measurement documents: what they hold, that they keep to their schema, and that they do not say too much."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image

from gmp import READ_POINTS
from gmp.data.captions import Index, read_index
from gmp.data.classes import Classes, read_classes, read_labels
from gmp.errors import InputError
from gmp.evaluate import SCHEMA, document, evaluate, finite
from gmp.events import finish
from gmp.features import embed_index
from gmp.join import join, text_tower
from gmp.layouts import TowerFile, read_text, read_vision
from gmp.measure import DRIFT_CAPTIONS, drift, retrieval, text_features
from gmp.measurement import lines
from gmp.tokenizer import Tokenizer
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from gmp.world.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing, render
from gmp.world.write import write_world

CPU = torch.device("cpu")
ORIGINAL_TEXT, VISION, BROKEN = (
    read_text(ASSETS / ORIGINAL),
    read_vision(ASSETS / ORIGINAL),
    read_text(ASSETS / RUINED),
)
TEMPLATES = ("a large red {} left of a large blue {}", "a large green {} above a large white {}")
PROMPTS = tuple(f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue", "green"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("evaluate") / "pictures"
    return read_index(folder, finish(write_world(folder, 120, seed=2, split="held_out")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def documents(pictures, cache):
    """Broken and original, with every part."""
    classes = folder_of_classes(cache.parent / "classes")
    parts = {"classes": read_classes(classes), "templates": TEMPLATES, "typographic": True, "relations": True}
    return run({"broken": BROKEN, "original": ORIGINAL_TEXT}, pictures, cache, **parts)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Classes:
    """20 pictures of each shape, two of the same shape on each."""
    folder = tmp_path_factory.mktemp("shapes")
    for shape in SHAPES:
        (folder / shape).mkdir()
        for number in range(20):
            dice = random.Random(f"{shape} {number}")
            a, b = dice.sample(sorted(COLOURS), 2)
            scene = Scene(Thing("large", a, shape), dice.choice(sorted(RELATIONS)), Thing("large", b, shape))
            render(scene, dice).save(folder / shape / f"{number:02d}.png")
    return read_classes(folder)


@pytest.fixture(scope="module")
def classified(shapes, cache):
    """Broken and original on pictures of classes alone."""
    return evaluations({"broken": BROKEN, "original": ORIGINAL_TEXT}, None, cache, classes=shapes, templates=TEMPLATES)


def folder_of_classes(folder):
    for colour in ("red", "green", "blue"):
        (folder / colour).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), colour).rotate(i).resize((64 + i, 64)).save(folder / colour / f"{i}.png")
    return folder


def evaluations(encoders, index, cache, original=ORIGINAL_TEXT, hear=lambda event: None, **parts):
    parts = {"prompts": PROMPTS} | parts
    found = finish(evaluate(encoders, VISION, original, index, Tokenizer(), cache=cache, device=CPU, **parts), hear)
    for one in found.values():
        check(one.document)
    return found


def run(encoders, index, cache, **parts):
    return {name: one.document for name, one in evaluations(encoders, index, cache, **parts).items()}


def one(index, cache, text=BROKEN, **parts):
    return run({"encoder": text}, index, cache, **parts)["encoder"]


def check(found):
    """As it lies on a disk, where there is neither NaN nor a tuple."""
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(
        json.loads(json.dumps(found, allow_nan=False))
    )


def part(index: Index, count: int) -> Index:
    return replace(index, pictures=index.pictures[:count])


# ---- what is in it --------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_functions(documents, pictures, cache):
    joined = join(BROKEN, VISION, ORIGINAL_TEXT)
    tower, original = text_tower(BROKEN, joined), text_tower(ORIGINAL_TEXT, joined)
    index, features, _ = finish(embed_index(joined.build().visual, pictures, cache))
    expected = retrieval(features, text_features(tower, Tokenizer()(index.captions()).ids), index.owners())
    found = documents["broken"]["retrieval"]
    for direction in ("text_to_image", "image_to_text"):
        wanted = vars(getattr(expected, direction))
        assert found[direction]["queries"] == wanted.pop("queries")
        for name, value in wanted.items():
            assert found[direction][name]["value"] == value
            assert found[direction][name]["low"] <= value <= found[direction][name]["high"]
    captions = list(dict.fromkeys(picture.captions[0] for picture in index.pictures))[:DRIFT_CAPTIONS]
    moved = drift(tower, original, Tokenizer()(captions).ids)
    for point in READ_POINTS:
        assert documents["broken"]["drift"][point] == pytest.approx(vars(moved[point]), rel=1e-5)


def test_the_original_agrees_with_itself_and_the_broken_one_does_not(documents):
    broken, original = documents["broken"], documents["original"]
    for section in ("structure", "structure_of_captions"):
        assert set(original[section]) == set(READ_POINTS)
        for point in READ_POINTS:
            assert original[section][point]["cka"] == pytest.approx(1, abs=1e-6)
            assert broken[section][point]["cka"] < 0.9
    assert original["drift"]["penultimate"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert broken["drift"]["penultimate"]["cosine"] < 0.7
    assert original["alignment"]["matched_cosine"] > broken["alignment"]["matched_cosine"] + 0.1
    assert original["calibration"]["text_to_image"]["error"] < broken["calibration"]["text_to_image"]["error"]
    told, kept = (one["relations"]["kinds"]["colour"]["accuracy"] for one in (broken, original))
    assert kept["low"] > told["high"]
    assert original["zero_shot"]["pictures"] == 12 and original["typographic"]["kind"] == "classes"


def test_a_change_is_the_difference_on_the_same_pictures(documents):
    broken, original = documents["broken"], documents["original"]
    assert "change" not in broken
    change = original["change"]
    assert change["from"] == broken["encoder"]
    for direction in ("text_to_image", "image_to_text"):
        values = change[direction]
        for name, moved in values.items():
            now, before = (one["retrieval"][direction][name] for one in (original, broken))
            assert moved["value"] == pytest.approx(now["value"] - before["value"], abs=1e-12)
            assert moved["low"] <= moved["value"] <= moved["high"]
            # paired: hardly wider than if the two were measured on different pictures
            assert moved["high"] - moved["low"] < 1.2 * math.hypot(*(one["high"] - one["low"] for one in (now, before)))
        assert values["recall_at_1"]["low"] > 0 > values["mean_rank"]["high"]


def test_an_encoder_has_not_changed_from_itself(pictures, cache):
    found = run({"first": BROKEN, "again": BROKEN}, part(pictures, 30), cache)
    for direction in ("text_to_image", "image_to_text"):
        assert {tuple(v.values()) for v in found["again"]["change"][direction].values()} == {(0, 0, 0)}


def test_the_head_names_the_files_by_their_weights(documents):
    found = documents["broken"]
    assert (found["version"], found["kind"]) == (1, "measurement") and "verdict" not in found
    assert found["encoder"] == {"path": RUINED, "sha256": BROKEN.source.sha256, "member": "clip_l"}
    assert found["original"]["sha256"] == ORIGINAL_TEXT.source.sha256
    assert found["vision"]["sha256"] == VISION.source.sha256


def test_folders_stay_out_of_the_document():
    source = replace(BROKEN.source, path="C:\\models\\clip\\clip_l.safetensors")
    found = document("measurement", source, None, replace(source, path="/models/clip/vision.safetensors"))
    assert (found["encoder"]["path"], found["vision"]["path"]) == ("clip_l.safetensors", "vision.safetensors")
    check(found)


def test_pictures_are_embedded_once_for_all_encoders(pictures, tmp_path):
    events = []
    index = part(pictures, 8)
    run({"a": BROKEN, "b": ORIGINAL_TEXT}, index, tmp_path, hear=events.append)
    drawn = [event["done"] for event in events if event["stage"] == "embed pictures"]
    assert drawn == [0, 8]
    ranked = [event for event in events if event["stage"] == "rank captions and pictures"]
    assert len(ranked) == 2 and all(event["type"] == "progress" for event in events)


def test_the_same_pictures_give_the_same_document(pictures, cache):
    index = part(pictures, 20)
    assert one(index, cache) == one(index, cache)


def test_shipped_prompts_are_taken_where_none_are_given(pictures, cache):
    found = one(part(pictures, 20), cache, prompts=None)
    own = one(part(pictures, 20), cache)
    assert found["structure"]["pooled"]["effective_rank"] > 6 > own["structure"]["pooled"]["effective_rank"]
    assert found["structure_of_captions"] == own["structure_of_captions"]


# ---- classes --------------------------------------------------------------------------------------------------------


def test_classes_are_measured_without_captions(classified):
    found = classified["original"].document
    assert set(found) == {
        "version", "kind", "encoder", "original", "vision", "zero_shot", "change", "structure", "warnings",
    }  # fmt: skip
    assert set(found["structure"]) == set(READ_POINTS)
    assert found["structure"]["pooled"]["cka"] == pytest.approx(1, abs=1e-6)
    assert classified["broken"].document["structure"]["pooled"]["cka"] < 0.9
    assert "change" not in classified["broken"].document
    assert found["warnings"] == [
        "There are no captions, so retrieval, alignment, calibration and drift were not measured."
    ]  # and not of too few pictures: there are 120


def test_without_captions_structure_is_of_the_shipped_prompts(shapes, pictures, cache):
    alone = one(None, cache, classes=shapes, prompts=None)
    assert alone["structure"] == one(part(pictures, 20), cache, prompts=None)["structure"]


def test_classes_are_told_the_same_with_captions_and_without(shapes, pictures, cache, classified):
    both = run({"encoder": BROKEN}, part(pictures, 20), cache, classes=shapes, templates=TEMPLATES)["encoder"]
    assert both["zero_shot"] == classified["broken"].document["zero_shot"]


def test_a_change_of_zero_shot_is_the_difference_on_the_same_pictures(classified):
    broken, original = (classified[name].zero_shot for name in ("broken", "original"))
    change = classified["original"].document["change"]
    assert set(change) == {"from", "zero_shot"} and change["from"] == classified["broken"].document["encoder"]
    moved = change["zero_shot"]["top_1"]
    right, before = (torch.tensor(one.right).double() for one in (original, broken))
    assert moved["value"] == pytest.approx(original.top_1.value - broken.top_1.value, abs=1e-12) and moved["value"] > 0
    wide = 2 * 1.96 * (right - before).std(correction=0).item() / math.sqrt(len(right))  # normal approximation, paired
    assert moved["high"] - moved["low"] == pytest.approx(wide, rel=0.15)


def test_all_confusions_are_handed_out_beside_the_document(classified):
    found = classified["broken"]
    told = found.zero_shot
    assert sum(one.pictures for one in told.confusions) == told.pictures - sum(told.right) > 0
    assert found.document["zero_shot"] == json.loads(json.dumps(told.as_json()))
    assert len(told.as_json(confusions=2)["confusions"]) == 2 < len(told.confusions)
    assert "right" not in found.document["zero_shot"]


def test_words_are_written_on_pictures_of_classes_where_there_are_no_captions(shapes, cache):
    small = shapes.sample(2)
    found = one(None, cache, classes=small, typographic=True)
    assert found["typographic"]["kind"] == "classes" and found["typographic"]["pictures"] == 12
    assert any("12 pictures of classes are too few to judge by" in sentence for sentence in found["warnings"])


def test_pictures_of_classes_that_are_not_counted_are_told(cache, tmp_path):
    folder = folder_of_classes(tmp_path / "classes")
    (folder / "red" / "0.png").write_bytes(b"torn")
    Image.new("RGB", (64, 64)).save(folder / "loose.png")
    found = one(None, cache, classes=read_classes(folder))
    told = "\n".join(lines(found))
    assert "on 11 pictures of 3 classes; 95 % intervals" in told
    assert "left out: red/0.png" in told and "note: 1 pictures lie beside the folders of classes" in told


def test_a_table_of_labels_is_the_same_as_folders(shapes, cache, tmp_path):
    rows = [f"{name},{shapes.names[label]}" for name, label in zip(shapes.pictures, shapes.labels, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]))
    labelled = read_labels(tmp_path / "labels.csv", shapes.root)
    assert one(None, cache, classes=labelled) == one(None, cache, classes=shapes)


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_too_few_pictures_are_warned_of(documents, pictures, cache):
    found = one(part(pictures, 40), cache, text=ORIGINAL_TEXT)
    assert "40 pictures are too few to judge by" in " ".join(found["warnings"])
    assert "verdict" not in found and found["retrieval"]["text_to_image"]["recall_at_1"]["low"] > 0
    assert found["calibration"]["candidates"] == 40
    assert "120 pictures" not in " ".join(documents["broken"]["warnings"])


def test_a_wide_interval_is_warned_of(pictures, cache, monkeypatch):
    monkeypatch.setattr("gmp.evaluate.FEWEST_PICTURES", 0)
    found = one(part(pictures, 40), cache)
    for direction in ("text to image", "image to text"):
        wide = found["retrieval"][direction.replace(" ", "_")]["recall_at_1"]
        told = any(f"recall@1 {direction} is known to" in sentence for sentence in found["warnings"])
        assert told == (wide["high"] - wide["low"] > 0.2)
    assert any("is known to" in sentence for sentence in found["warnings"])


def test_without_an_original_there_is_no_agreement(pictures, cache):
    whole = replace(BROKEN, state=BROKEN.state | {"text_projection": ORIGINAL_TEXT.state["text_projection"]})
    found = one(part(pictures, 20), cache, text=whole, original=None)
    assert found["original"] is None and "drift" not in found
    assert any("no original" in sentence for sentence in found["warnings"])
    for one_point in found["structure"].values():
        assert one_point["cka"] is None and one_point["effective_rank"] > 1


def test_captions_that_are_cut_or_stand_at_several_pictures_are_counted(pictures, cache):
    first, second, *rest = part(pictures, 12).pictures
    pair = (replace(first, captions=("word " * 90,)), replace(second, captions=(rest[0].captions[0], "another one")))
    found = one(replace(pictures, pictures=(*pair, *rest)), cache)
    assert found["data"]["captions_cut"] == 1
    assert "1 captions are longer than the context length" in " ".join(found["warnings"])
    assert "2 of 33 captions stand at more than one picture" in " ".join(found["warnings"])


def test_pictures_that_do_not_decode_are_named(pictures, cache, tmp_path):
    index = part(pictures, 6)
    for picture in index.pictures:
        (tmp_path / picture.path).parent.mkdir(exist_ok=True)
        (tmp_path / picture.path).write_bytes((index.root / picture.path).read_bytes())
    (tmp_path / index.pictures[2].path).write_bytes(b"torn")
    found = one(replace(index, root=tmp_path), cache)
    assert list(found["data"]["broken"]) == [index.pictures[2].path] and found["data"]["images"] == 5


def test_numbers_that_are_not_finite_stand_as_null(pictures, cache):
    state = {name: tensor.clone() for name, tensor in BROKEN.state.items()}
    state["ln_final.weight"][:] = math.nan
    found = one(part(pictures, 20), cache, text=TowerFile(state, BROKEN.config, BROKEN.source))
    assert found["alignment"]["matched_cosine"] is None and found["calibration"]["best_scale"] is None
    assert found["retrieval"]["text_to_image"]["recall_at_1"]["value"] == 1 / 20  # chance
    assert "60 of 60 captions have features that are not finite" in " ".join(found["warnings"])
    assert any("stand as null: in alignment, calibration" in sentence for sentence in found["warnings"])


def test_one_picture_has_no_calibration(pictures, cache):
    found = one(part(pictures, 1), cache)
    assert "calibration" not in found and "structure_of_captions" not in found
    assert found["alignment"]["uniformity_images"] is None


@pytest.mark.parametrize("kind", ["measurement", "diagnosis", "scan", "comparison", "evidence"])
def test_every_kind_of_document_has_the_same_head(kind):
    check(document(kind, BROKEN.source, None, VISION.source, warnings=["a sentence"], retrieval=None))


def test_finite_reaches_all_numbers():
    assert finite({"a": [1.0, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": 2, "e": "NaN"}}) == {
        "a": [1.0, None, [None]],
        "b": {"c": None, "d": 2, "e": "NaN"},
    }


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_towers_that_do_not_belong_together_are_refused_before_any_picture(pictures, cache):
    narrow = replace(ORIGINAL_TEXT, state=ORIGINAL_TEXT.state | {"text_projection": torch.ones(64, 3)})
    with pytest.raises(InputError, match="do not belong together"):
        next(evaluate({"a": narrow}, VISION, narrow, pictures, Tokenizer(), cache=cache, device=CPU))


def test_nothing_to_measure_on_is_said_before_anything_is_computed(shapes, cache):
    with pytest.raises(InputError, match="no pictures to measure on: give captioned pictures, pictures sorted"):
        next(evaluate({"a": BROKEN}, VISION, None, None, Tokenizer(), cache=cache, device=CPU))
    parts = {"cache": cache, "device": CPU, "classes": shapes, "relations": True}
    with pytest.raises(InputError, match="Relations are measured on captions, and there are none"):
        next(evaluate({"a": BROKEN}, VISION, None, None, Tokenizer(), **parts))


def test_the_schema_refuses_what_is_not_declared(documents):
    source = documents["broken"]["encoder"]
    half = {"from": source, "text_to_image": documents["original"]["change"]["text_to_image"]}
    for change in (
        {"new": 1},
        {"kind": "guess"},
        {"data": documents["broken"]["data"] | {"new": 1}},
        {"version": 2},
        {"change": {"from": source}},
        {"change": half},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check(documents["broken"] | change)


def test_the_schema_is_one_and_is_shipped():
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert SCHEMA.parent.name == "assets"  # which pyproject.toml ships


# ---- words ----------------------------------------------------------------------------------------------------------


def test_the_table_tells_every_section(documents):
    told = "\n".join(lines(documents["original"]))
    value = documents["original"]["retrieval"]["text_to_image"]["recall_at_1"]
    assert f"recall@1     text → image {value['value']:.3f} ({value['low']:.3f} … {value['high']:.3f})" in told
    for words in (
        "original.safetensors on 120 pictures with 360 captions and 12 pictures of 3 classes; 95 % intervals",
        "change from ruined_text_encoder.safetensors:",
        "modality gap",
        "calibration error among 100",
        "penultimate (SDXL, SD2, SD3)",
        "cosine of captions' states to the original's: penultimate 1.000",
        "zero-shot: top-1",
        "written words: accuracy",
        "relations, side:",
    ):
        assert words in told, words
    assert "null" not in told and "None" not in told


def test_the_table_without_captions_tells_classes_and_read_points(classified):
    told = lines(classified["original"].document)
    assert told[0] == "original.safetensors on 120 pictures of 6 classes; 95 % intervals"
    assert told[1] == "change from ruined_text_encoder.safetensors:" and told[2].startswith("zero-shot top-1 +0.")
    assert any(line.startswith("penultimate (SDXL, SD2, SD3)") for line in told)
    assert any(line.startswith("zero-shot: top-1 ") for line in told)
    assert not any("recall@1 " in line or "modality gap" in line or "None" in line for line in told)


def test_the_table_of_a_bare_measurement_says_what_is_not_defined(pictures, cache):
    told = "\n".join(lines(one(part(pictures, 1), cache)))
    assert "uniformity of pictures not defined" in told and "note: 1 pictures are too few" in told
