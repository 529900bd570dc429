"""What a repair has changed, held to what the run itself has measured, to naive counts, and to the schema."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import jsonschema
import pytest
import torch
from PIL import Image

from gmp import READ_POINTS, evidence, session
from gmp.clip import VisionTower
from gmp.config import Anchor, RepairConfig
from gmp.control import send
from gmp.data.captions import first_captions, read_index
from gmp.evaluate import SCHEMA
from gmp.events import finish
from gmp.evidence import EVIDENCE, LONGEST, SHOWN, THUMBNAILS, Encoder, as_json, gather, thumbnail
from gmp.layouts import read_text
from gmp.measure import Drift, Interval, drift, retrieval, text_features
from gmp.outcome import judge
from gmp.prompts import prompts
from gmp.run import RESULT, delete, repair, status
from gmp.structure import Structure, compare_structure, prompt_vectors
from tests.small import disturbed, small_clip, tokenize

CPU = torch.device("cpu")
COMMON = {"epochs": 1, "batch": 8, "lr": 1e-3, "held_out": 0.4}
TEXT = RepairConfig(**COMMON, anchors=(Anchor("original", "last", 0.3), Anchor("broken", "pooled", 0.1)))
BOTH = RepairConfig(**COMMON, train="both", rates={"visual.*": 30.0})


@pytest.fixture(scope="module")
def schema():
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def towers():
    original = small_clip()
    return {"broken": disturbed(original, 0.05), "repaired": disturbed(original, 0.005, seed=3), "original": original}


@pytest.fixture(scope="module")
def held(pictures, towers):
    """Index, ids, and features of all pictures of the small world, as if the original fitted them."""
    index = read_index(pictures, pictures / "captions.json")
    ids = tokenize(index.captions()).ids
    # a vision tower that the original is aligned with
    return index, ids, text_features(towers["original"], ids[first_captions(index.caption_counts)])


@pytest.fixture(scope="module")
def prompt_ids():
    return tokenize([prompt.text for prompt in prompts()][:60]).ids


@pytest.fixture(scope="module")
def gathered(towers, held, prompt_ids, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    index, ids, features = held
    images = dict.fromkeys(towers, features)
    events = []
    found = finish(
        gather(towers, prompt_ids, index, ids, images, target=("last",), folder=folder),
        events.append,
    )
    return found, folder, events


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run of each mode, to its end: folder, events."""
    runs, cache = {}, tmp_path_factory.mktemp("cache")
    for name, config in {"text": TEXT, "both": BOTH}.items():
        folder = tmp_path_factory.mktemp("whole") / name
        runs[name] = folder, list(repair(inputs, config, folder, cache=cache, device=CPU))
    return runs


def document(folder):
    return json.loads((folder / EVIDENCE).read_text())


# --- what is measured


def test_every_read_point_of_every_encoder_is_measured_as_the_modules_do(gathered, towers, held, prompt_ids):
    found, index, ids, features = gathered[0], *held
    vectors = {name: prompt_vectors(tower, prompt_ids) for name, tower in towers.items()}
    for name, tower in towers.items():
        one = found.encoders[name]
        assert one.retrieval == retrieval(features, text_features(tower, ids), index.owners())
        assert one.structure == compare_structure(vectors[name], vectors["original"])
        for mine, other in ((one.to_original, "original"), (one.to_broken, "broken")):
            for point, theirs in drift(tower, towers[other], ids[: len(ids)]).items():
                assert dataclasses.astuple(mine[point]) == pytest.approx(dataclasses.astuple(theirs), abs=1e-6), point


def test_intervals_hold_their_values_and_the_gain_is_their_difference(gathered):
    found = gathered[0]
    for one in found.encoders.values():
        for direction, names in one.intervals.items():
            for name, interval in names.items():
                assert interval.value == getattr(getattr(one.retrieval, direction), name)
                assert interval.low <= interval.value <= interval.high
        both = (one.retrieval.text_to_image.recall_at_1 + one.retrieval.image_to_text.recall_at_1) / 2
        assert one.recall.value == pytest.approx(both)
    before, after = (found.encoders[name].recall.value for name in ("broken", "repaired"))
    assert found.gain.value == pytest.approx(after - before)
    assert found.gain.low <= found.gain.value <= found.gain.high


def test_captions_that_changed_are_counted_and_shown_with_what_each_encoder_finds(gathered, towers, held):
    found, (index, ids, features) = gathered[0], held
    owners, captions = torch.tensor(index.owners()), index.captions()
    unit = torch.nn.functional.normalize
    first = {
        name: (unit(text_features(towers[name], ids), dim=1) @ unit(features, dim=1).T).argmax(dim=1)
        for name in ("broken", "repaired")
    }
    before, after = (first[name] == owners for name in ("broken", "repaired"))
    changes = found.changes
    assert changes.became_right == (~before & after).sum() and changes.became_wrong == (before & ~after).sum()
    assert changes.stayed_right == (before & after).sum() and changes.stayed_wrong == (~before & ~after).sum()
    assert changes.became_right > SHOWN and len(changes.shown) <= 2 * SHOWN
    assert sum(one.became == "right" for one in changes.shown) == SHOWN
    for one in changes.shown:
        rows = [row for row, caption in enumerate(captions) if caption == one.caption]
        pairs = [[index.pictures[first[name][row]].path for name in first] for row in rows]
        assert [one.before.picture, one.after.picture] in pairs
        right = one.after if one.became == "right" else one.before
        assert right.picture in [index.pictures[owners[row]].path for row in rows]


def test_no_two_shown_captions_of_a_kind_are_of_one_picture(gathered):
    right = [one.after.picture for one in gathered[0].changes.shown if one.became == "right"]
    assert len(set(right)) == len(right)


def test_pictures_that_are_shown_are_kept_small_and_named_by_their_content(gathered):
    found, folder, _ = gathered
    names = {one.thumbnail for shown in found.changes.shown for one in (shown.before, shown.after)}
    assert names == {path.name for path in (folder / THUMBNAILS).iterdir()} and None not in names
    for name in names:
        with Image.open(folder / THUMBNAILS / name) as picture:
            assert picture.format == "JPEG" and max(picture.size) <= LONGEST


def test_a_large_picture_is_made_small_and_one_that_is_gone_has_no_thumbnail(tmp_path):
    Image.new("RGB", (640, 400), "red").save(tmp_path / "large.png")
    name = thumbnail(tmp_path / "large.png", tmp_path / "small")
    with Image.open(tmp_path / "small" / name) as picture:
        assert picture.size == (160, 100)
    assert thumbnail(tmp_path / "gone.png", tmp_path / "small") is None


def test_progress_is_told_in_words_and_ends_at_its_total(gathered):
    events = gathered[2]
    assert {event["type"] for event in events} == {"progress"}
    assert all(event["stage"].startswith("evidence: ") and event["done"] <= event["total"] for event in events)
    last = {event["stage"]: event for event in events}
    assert all(event["done"] == event["total"] for event in last.values()) and len(last) > 10


def test_without_an_original_nothing_is_compared_with_one(towers, held, prompt_ids, tmp_path, schema):
    index, ids, features = held
    two = {name: towers[name] for name in ("broken", "repaired")}
    images = dict.fromkeys(two, features)
    found = finish(gather(two, prompt_ids, index, ids, images, target=(), folder=tmp_path))
    for one in found.encoders.values():
        assert one.to_original is None and math.isnan(one.structure["last"].cka)
        assert one.structure["last"].told_apart > 0 and one.retrieval is not None
    assert "no original" in " ".join(found.outcome.text)
    source = read_source()
    sources = {"broken": source, "repaired": source, "original": None, "vision": source}
    written = json.loads(json.dumps(as_json(found, sources, RUN, CPU), allow_nan=False))
    schema.validate(written)
    assert written["original"] is None and written["evidence"]["encoders"]["broken"]["structure"]["last"]["cka"] is None


def test_without_held_out_pairs_there_are_structure_and_drift_and_the_verdict_says_so(
    towers, held, prompt_ids, tmp_path
):
    index = dataclasses.replace(held[0], pictures=())
    found = finish(
        gather(towers, prompt_ids, index, held[1][:0], dict.fromkeys(towers), target=("last",), folder=tmp_path)
    )
    assert found.gain is None and found.changes is None and found.pictures == found.captions == 0
    assert all(one.retrieval is None and one.to_original and one.structure for one in found.encoders.values())
    assert found.outcome.alignment == "not_measured" and "No pairs were held out" in found.outcome.text[0]
    assert found.drift_captions >= 1 and not (tmp_path / THUMBNAILS).exists()


def test_an_encoder_that_is_not_finite_is_told_and_written_as_null(towers, held, prompt_ids, tmp_path, schema):
    ruined = copy.deepcopy(towers["broken"])
    with torch.no_grad():
        ruined.ln_final.bias[0] = float("nan")
    index, ids, features = held
    three = towers | {"broken": ruined}
    images = dict.fromkeys(three, features)
    found = finish(gather(three, prompt_ids, index, ids, images, target=("last",), folder=tmp_path))
    assert any("not all finite" in warning for warning in found.warnings)
    assert "in no order that can be computed" in found.outcome.text[1]
    assert math.isfinite(found.encoders["broken"].structure["penultimate"].cka)
    source = read_source()
    sources = {"broken": source, "repaired": source, "original": source, "vision": source}
    schema.validate(json.loads(json.dumps(as_json(found, sources, RUN, CPU), allow_nan=False)))


RUN = {"step": 3, "steps": 3, "early": False, "train": "text"}


def read_source():
    from gmp.layouts import Source

    return Source("encoder.safetensors", "0" * 64, "openai", None, {}, (), (), (), ())


# --- the verdict


def encoder(recall, cka, cosine, told=1.0, kept=0.6):
    structure = Structure(cka, cka, 0.5, 20.0, told)
    return Encoder(
        retrieval=None,
        intervals=None,
        recall=recall,
        structure=dict.fromkeys(READ_POINTS, structure),
        to_original=dict.fromkeys(READ_POINTS, Drift(cosine, 1 - cosine, 1.0)),
        to_broken=dict.fromkeys(READ_POINTS, Drift(kept, 1 - kept, 1.0)),
    )


def outcome(before, after, gain, pictures=400, target=("penultimate",), original=0.95):
    encoders = {
        "broken": encoder(before, 0.3, 0.5),
        "repaired": encoder(after, 0.97, 0.98),
        "original": encoder(Interval(original, original - 0.02, original + 0.02), 1.0, 1.0),
    }
    return judge(encoders, gain, target, pictures)


LOW, HIGH = Interval(0.2, 0.15, 0.25), Interval(0.9, 0.85, 0.95)


@pytest.mark.parametrize(
    ("gain", "finding"),
    [
        (Interval(0.08, 0.03, 0.13), "risen"),  # though each of the two recalls may be 0.05 more or less
        (Interval(-0.08, -0.13, -0.03), "fallen"),
        (Interval(0.08, -0.03, 0.19), "unclear"),
        (Interval(0.01, 0.003, 0.02), "unclear"),  # 4 of 400 pictures
    ],
)
def test_alignment_has_moved_only_where_the_same_pictures_say_so(gain, finding):
    before, after = (Interval(value, value - 0.05, value + 0.05) for value in (0.5, 0.5 + gain.value))
    found = outcome(before, after, gain)
    assert found.alignment == finding and f"{100 * gain.value:+.1f}" in found.text[0]


def test_few_pairs_give_numbers_and_a_warning_and_no_verdict_on_alignment():
    found = outcome(LOW, HIGH, Interval(0.7, 0.6, 0.8), pictures=40)
    assert found.alignment == "too_few" and "20.0 % (15.0–25.0)" in found.text[0]
    assert any("40 held-out pictures are too few" in warning for warning in found.warnings)


def test_pictures_that_the_original_does_not_find_tell_nothing():
    found = outcome(LOW, HIGH, Interval(0.7, 0.6, 0.8), original=0.01)
    assert found.alignment == "unclear" and "do not tell" in found.text[0]


def test_alignment_agreement_and_coherence_are_sentences_of_their_own():
    found = outcome(LOW, HIGH, Interval(0.7, 0.6, 0.8), target=("penultimate", "pooled"))
    alignment, penultimate, pooled, coherence = found.text
    assert "recall" in alignment and "CKA" not in alignment
    assert penultimate.startswith("At penultimate, which SDXL, SD2 and SD3 read") and "Flux" in pooled
    assert "unlike the original's" in penultimate and "now arranged like the original's" in penultimate
    assert (
        "cosine 0.50" in penultimate and "cosine 0.98" in penultimate and "0.60 to the encoder as it was" in penultimate
    )
    assert "told apart" in coherence and "not run together" in coherence
    assert "what the diffusion model draws" in found.unknown


def test_prompts_that_run_together_are_told():
    encoders = {
        "broken": encoder(LOW, 0.3, 0.5),
        "repaired": encoder(HIGH, 0.97, 0.98, told=0.4),
        "original": encoder(HIGH, 1.0, 1.0),
    }
    text = judge(encoders, Interval(0.7, 0.6, 0.8), ("last",), 400).text
    assert "run together at last" in text[-1] and "after 40.0 %" in text[-1]


def test_nothing_is_called_better():
    for target in ((), ("penultimate",)):
        for before, after in ((LOW, HIGH), (HIGH, LOW)):
            found = outcome(before, after, Interval(0.7, 0.6, 0.8), target=target)
            assert "better" not in " ".join(found.text) and "improve" not in " ".join(found.text)


def test_a_run_without_anchors_has_no_target():
    text = outcome(LOW, HIGH, Interval(0.7, 0.6, 0.8), target=()).text
    assert "No anchor names a read point" in text[1] and "pooled 0.50 → 0.98" in text[1]


# --- at a run's end


@pytest.mark.parametrize("mode", ["text", "both"])
def test_before_and_after_are_what_the_run_has_measured_first_and_last(whole, mode):
    folder, events = whole[mode]
    measures = [event for event in events if event["type"] == "measure"]
    encoders = document(folder)["evidence"]["encoders"]
    for name, measure in (("broken", measures[0]), ("repaired", measures[-1])):
        for direction in ("text_to_image", "image_to_text"):
            value = encoders[name]["retrieval"][direction]["recall_at_1"]["value"]
            assert value == pytest.approx(measure[f"recall_at_1_{direction}"])
            rank = encoders[name]["retrieval"][direction]["mean_rank"]["value"]
            assert rank == pytest.approx(measure[f"mean_rank_{direction}"])
        for point in READ_POINTS:
            mine, theirs = encoders[name]["to_original"][point], measure["drift"][point]
            assert mine["cosine"] == pytest.approx(theirs["cosine"], abs=1e-6)
    assert measures[0]["mean_rank_text_to_image"] != measures[-1]["mean_rank_text_to_image"]


@pytest.mark.parametrize("mode", ["text", "both"])
def test_a_run_writes_a_document_that_the_schema_knows(whole, inputs, schema, mode):
    folder = whole[mode][0]
    written = document(folder)
    schema.validate(written)
    assert written["kind"] == "evidence" and written["evidence"]["run"]["train"] == mode
    assert written["encoder"]["sha256"] == read_text(folder / RESULT).source.sha256
    assert written["evidence"]["broken"]["sha256"] == inputs.text.source.sha256
    assert written["original"]["sha256"] == inputs.original.source.sha256
    assert written["evidence"]["versions"]["torch"] == torch.__version__
    assert "/" not in json.dumps([written[role] for role in ("encoder", "original", "vision")])


def test_the_target_is_where_the_anchors_hold(whole):
    assert document(whole["text"][0])["evidence"]["target"] == ["last", "pooled"]


def test_a_document_with_an_unknown_number_is_refused_by_the_schema(whole, schema):
    written = document(whole["text"][0])
    written["evidence"]["encoders"]["broken"]["structure"]["last"]["beauty"] = 1.0
    assert not schema.is_valid(written)


def test_what_an_evidence_costs_does_not_change_the_result(whole, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(session.Session, "_gather", lambda self: iter(()))
    list(repair(inputs, TEXT, tmp_path / "run", cache=tmp_path, device=CPU))
    assert (tmp_path / "run" / RESULT).read_bytes() == (whole["text"][0] / RESULT).read_bytes()
    assert not (tmp_path / "run" / EVIDENCE).exists()


def test_a_stop_while_it_is_gathered_is_obeyed_and_the_run_finishes_later(whole, inputs, tmp_path):
    folder, seen = tmp_path / "run", []
    for event in repair(inputs, TEXT, folder, cache=tmp_path, device=CPU):
        seen.append(event)
        if event.get("stage") == "evidence: prompts" and "stop" not in seen:
            seen.append("stop")
            send(folder, "stop")
    assert seen[-1]["type"] == "stopped" and seen[-2] == "stop" and seen[-3]["stage"] == "evidence: prompts"
    assert status(folder).state == "interrupted" and not (folder / EVIDENCE).exists()
    again = list(repair(inputs, TEXT, folder, cache=tmp_path, device=CPU))
    assert [event["type"] for event in again if event["type"] in ("step", "done")] == ["done"]
    assert document(folder)["evidence"]["encoders"] == document(whole["text"][0])["evidence"]["encoders"]
    assert (folder / RESULT).read_bytes() == (whole["text"][0] / RESULT).read_bytes()


def test_a_discard_while_it_is_gathered_leaves_nothing(inputs, tmp_path):
    folder = tmp_path / "run"
    for event in repair(inputs, TEXT, folder, cache=tmp_path / "cache", device=CPU):
        if event.get("stage") == "evidence: structure":
            send(folder, "discard")
    assert event["type"] == "discarded" and not folder.exists()


@pytest.mark.parametrize(("what", "alarm"), [("gather", "no_evidence"), ("write_report", "no_report")])
def test_what_fails_at_the_end_is_an_alarm_and_the_run_has_its_result(inputs, tmp_path, monkeypatch, what, alarm):
    def fail(*given, **named):
        raise RuntimeError("the disk is made of cheese")

    monkeypatch.setattr(evidence if what == "gather" else session, what, fail)
    events = list(repair(inputs, TEXT, tmp_path / "run", cache=tmp_path, device=CPU))
    told = [event for event in events if event["type"] == "alarm"]
    assert [event["alarm"] for event in told] == [alarm] and "made of cheese" in told[0]["advice"]
    assert events[-1]["type"] == "done" and status(tmp_path / "run").state == "finished"
    assert (tmp_path / "run" / EVIDENCE).exists() == (what != "gather")


def test_a_deleted_run_takes_its_evidence_along(inputs, tmp_path):
    list(repair(inputs, TEXT, tmp_path / "run", cache=tmp_path / "cache", device=CPU))
    assert (tmp_path / "run" / THUMBNAILS).is_dir() and (tmp_path / "run" / "report.html").exists()
    assert delete(tmp_path / "run") == [] and not (tmp_path / "run").exists()


def test_an_early_end_is_told(inputs, tmp_path):
    config = dataclasses.replace(TEXT, epochs=6, lr=1e-9, patience=1, best_by="recall")
    list(repair(inputs, config, tmp_path / "run", cache=tmp_path, device=CPU))
    run = document(tmp_path / "run")["evidence"]["run"]
    assert run["early"] and run["step"] < run["steps"]


def test_pictures_are_embedded_as_the_vision_tower_sees_them(towers, held):
    vision: VisionTower = towers["original"].visual
    from gmp.data.images import load_picture, preprocess

    index, features = held[0], finish(evidence.embed(vision, held[0], "pictures"))
    pixels = torch.stack([preprocess(load_picture(path), 32) for path in index.paths])
    with torch.no_grad():
        assert torch.allclose(vision(pixels), features, atol=1e-5)
