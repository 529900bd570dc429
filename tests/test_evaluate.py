"""Measurement documents: what they hold, that they keep to their schema, and that they do not say too much."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from PIL import Image

from gmp import READ_POINTS
from gmp.data.captions import Index, read_index
from gmp.data.classes import read_classes
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
from gmp.world.write import write_world

CPU = torch.device("cpu")
ORIGINAL_TEXT, VISION, BROKEN = (
    read_text(ASSETS / ORIGINAL),
    read_vision(ASSETS / ORIGINAL),
    read_text(ASSETS / RUINED),
)
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
    return run(
        {"broken": BROKEN, "original": ORIGINAL_TEXT},
        pictures,
        cache,
        classes=read_classes(classes),
        templates=("a {} thing",),
        typographic=True,
        relations=True,
    )


def folder_of_classes(folder):
    for colour in ("red", "green", "blue"):
        (folder / colour).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), colour).rotate(i).resize((64 + i, 64)).save(folder / colour / f"{i}.png")
    return folder


def run(encoders, index, cache, original=ORIGINAL_TEXT, hear=lambda event: None, **parts):
    parts = {"prompts": PROMPTS} | parts
    found = finish(evaluate(encoders, VISION, original, index, Tokenizer(), cache=cache, device=CPU, **parts), hear)
    for one in found.values():
        check(one)
    return found


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


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_too_few_pictures_are_warned_of(documents, pictures, cache):
    found = one(part(pictures, 40), cache, text=ORIGINAL_TEXT)
    assert "40 pictures are too few to judge by" in " ".join(found["warnings"])
    assert "verdict" not in found and found["retrieval"]["text_to_image"]["recall_at_1"]["low"] > 0
    assert found["calibration"]["candidates"] == 40
    assert "too few" not in " ".join(documents["broken"]["warnings"])


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


def test_the_schema_refuses_what_is_not_declared(documents):
    for change in ({"new": 1}, {"kind": "guess"}, {"data": documents["broken"]["data"] | {"new": 1}}, {"version": 2}):
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
        "original.safetensors on 120 pictures with 360 captions",
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


def test_the_table_of_a_bare_measurement_says_what_is_not_defined(pictures, cache):
    told = "\n".join(lines(one(part(pictures, 1), cache)))
    assert "uniformity of pictures not defined" in told and "note: 1 pictures are too few" in told
