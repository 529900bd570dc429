"""From an index and settings to what a run trains on: captions, views, repeats, what is left out, and exact resumes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from gmp import telemetry
from gmp.config import Anchor, Captions, Pictures, RepairConfig
from gmp.data.captions import Index, Picture, content_key, read_index
from gmp.data.images import load_batches, load_pixels, normalize
from gmp.data.mirror import mirror
from gmp.data.policy import finish as finished
from gmp.data.sampler import Sampler
from gmp.data.tars import find_tars
from gmp.distributed import ALONE
from gmp.errors import InputError
from gmp.events import finish
from gmp.features import content_keys, embed_files
from gmp.join import join
from gmp.run import RESULT, repair
from gmp.terminal import tell
from gmp.training_data import (
    caption_tokens,
    check_source,
    dataset_identity,
    embed_together,
    training_data,
)
from tests.small import CONTEXT, PICTURES, tokenize
from tests.test_run import figures, of, until

CPU = torch.device("cpu")
COMMON = {"epochs": 2, "batch": 6, "lr": 1e-3, "held_out": 0.08, "save_every": 2}
TEXT = RepairConfig(**COMMON)
BOTH = RepairConfig(**COMMON | {"train": "both"})
VARIED = {"scale": 0.6, "flip": 0.5, "jitter": (0.2, 0.2, 0.1, 0.05), "grey": 0.2}
SIDES = ("a red circle, on the left, a small star", "turning clockwise, big", "a plain caption, of two tags")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clip(inputs):
    return join(inputs.text, inputs.vision, inputs.original).build()


@pytest.fixture(scope="module")
def sided(inputs) -> Index:
    """The small world with captions that name sides, one to three each, and pictures that are repeated."""
    pictures = []
    for n, picture in enumerate(inputs.index.pictures):
        captions = tuple(f"{caption} of number {n}" for caption in SIDES[: 1 + n % 3])
        pictures.append(Picture(picture.path, captions, (1.0, 2.5, 0.5)[n % 3]))
    return dataclasses.replace(inputs.index, pictures=tuple(pictures))


def data_of(inputs, clip, cache, config, **changes):
    inputs = dataclasses.replace(inputs, **changes)
    names = [picture.path for picture in inputs.index.pictures]
    keys = finish(content_keys(inputs.index.root, names, cache))
    return finish(training_data(inputs, clip, keys, config, cache))


def with_(config, captions=None, pictures=None, **changes):
    changes |= {"captions": Captions(**captions)} if captions else {}
    changes |= {"pictures": Pictures(**pictures)} if pictures else {}
    return dataclasses.replace(config, **changes)


# ---- settings that change nothing -----------------------------------------------------------------------------------


def test_by_default_captions_are_taken_as_they_are_and_pictures_once(inputs, clip, cache):
    data = data_of(inputs, clip, cache, TEXT)
    assert data.sampler is None and data.concept_ids is None
    assert data.pairs.more_views == () and data.pairs.mirrored is data.pairs.texts is None
    held = {picture.path for picture in data.held.index.pictures}
    captions = [c for picture in inputs.index.pictures if picture.path not in held for c in picture.captions]
    assert torch.equal(data.pairs.ids, tokenize(captions).ids)
    report = data.report
    assert report["training pictures"] == report["visits of pictures in an epoch"] == 24
    lines = ["captions cut to the context length", "training captions that a flip mirrors", "captions of concepts"]
    lines += [f"captions cut at a {at}" for at in ("sentence", "comma", "token")]
    assert [report[line] for line in lines] == [0] * 6 and report["views of each picture"] == 1


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["first", "first_two", "longest", "random", "in_turn"])
def test_captions_are_chosen_for_training_and_for_measuring(inputs, clip, cache, sided, choose):
    config = with_(TEXT, {"choose": choose, "prefix": "my"})
    data = data_of(inputs, clip, cache, config, index=sided)
    held = {picture.path for picture in data.held.index.pictures}
    for part, ids in ((True, data.pairs.ids), (False, data.held.ids)):
        texts = []
        for picture in sided.pictures:
            if (picture.path not in held) == part:
                captions = picture.captions
                shrunk = {"first": captions[:1], "first_two": captions[:2]}.get(choose, captions)
                if choose == "longest":
                    shrunk = (max(captions, key=lambda caption: len(caption.split())),)
                texts += [f"my {caption}" for caption in shrunk]
        assert torch.equal(ids, tokenize(texts).ids)
    assert len(data.held.ids) == len(data.held.index.captions()) == sum(data.held.index.caption_counts)


def test_captions_that_are_cut_are_counted_by_where_they_end(inputs, clip, cache):
    long = " ".join(f"w{n}" for n in range(12))
    texts = [f"{long}. {long}", f"{long}, {long}", f"{long} {long}", long]
    pictures = [dataclasses.replace(p, captions=(texts[n % 4],)) for n, p in enumerate(inputs.index.pictures)]
    index = dataclasses.replace(inputs.index, pictures=tuple(pictures))
    report = data_of(inputs, clip, cache, TEXT, index=index).report
    counts = [sum(n % 4 == kind for n in range(PICTURES)) for kind in range(3)]
    assert [report[f"captions cut at a {at}"] for at in ("sentence", "comma", "token")] == counts
    assert report["captions cut to the context length"] == sum(counts)
    lines = tell({"type": "dataset"} | report)
    expected = f"{counts[0]} at a sentence, {counts[1]} at a comma, {counts[2]} at a token"
    assert f"{sum(counts)} captions are too long and were cut: {expected}" in lines
    whole = data_of(inputs, clip, cache, with_(TEXT, {"cut": "tokens"}), index=index).report
    assert whole["captions cut at a token"] == whole["captions cut to the context length"] == sum(counts)


def test_prefixes_without_room_are_refused_before_a_picture_is_opened(inputs, clip, cache, embedded):
    with pytest.raises(InputError, match="leave no room"):
        data_of(inputs, clip, cache, with_(TEXT, {"prefix": "a " * CONTEXT}))
    assert not embedded


def test_memory_is_reckoned_with_captions_as_they_are_trained_on(inputs, sided):
    inputs = dataclasses.replace(inputs, index=sided)
    plain, first, longer = (
        caption_tokens(inputs, with_(TEXT, captions))
        for captions in (None, {"choose": "first"}, {"prefix": "one two three"})
    )
    assert torch.equal(plain, caption_tokens(inputs)) and len(first) == PICTURES < len(plain)
    assert torch.equal(longer, (plain + 3).clamp_max(CONTEXT))


def test_concepts_are_tokens_of_their_own_without_prefix(inputs, clip, cache):
    concepts = ("a zork", " ".join(f"w{n}" for n in range(15)) + ", beyond the end of it all")
    data = data_of(inputs, clip, cache, with_(TEXT, {"prefix": "my"}), concepts=concepts)
    assert torch.equal(data.concept_ids, finished(concepts, Captions(), tokenize).ids)
    assert data.concept_ids.shape == (2, CONTEXT) and data.report["captions of concepts"] == 2
    assert torch.equal(data.concept_ids[0], tokenize(["a zork"]).ids[0])


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_every_view_is_embedded_and_the_first_one_is_the_crop(inputs, clip, cache, sided):
    looks = {"views": 3, **VARIED}
    data = data_of(inputs, clip, cache, with_(TEXT, {}, looks), index=sided)
    plain = data_of(inputs, clip, cache, TEXT, index=sided)
    assert torch.equal(data.pairs.features[:], plain.pairs.features[:])
    assert torch.equal(data.held.features, plain.held.features)
    assert len(data.pairs.more_views) == 2 and data.report["views of each picture"] == 3
    held = {picture.path for picture in data.held.index.pictures}
    names = [picture.path for picture in sided.pictures if picture.path not in held]
    for view, features in enumerate(data.pairs.more_views, 1):
        keys = [content_key(sided.root / name) for name in names]
        work = embed_files(clip.visual, sided.root, names, keys, cache, pictures=Pictures(**looks), view=view)
        assert torch.equal(features[:], finish(work)[0][:])
        assert (features[:] != data.pairs.features[:]).any(dim=1).all()


def test_captions_of_flipped_views_are_mirrored_and_counted(inputs, clip, cache, sided):
    data = data_of(inputs, clip, cache, with_(TEXT, {}, {"views": 2, "flip": 1.0}), index=sided)
    held = {picture.path for picture in data.held.index.pictures}
    pictures = [picture for picture in sided.pictures if picture.path not in held]
    captions = [caption for picture in pictures for caption in picture.captions]
    changed = sum(mirror(caption) != caption for caption in captions)
    assert data.report["training captions that a flip mirrors"] == changed > 10
    order = torch.arange(len(pictures))
    for step in range(4):
        batch = data.pairs.batch(order, order * 0, order[:0], step)
        texts = [
            mirror(p.captions[0]) if view else p.captions[0]
            for p, view in zip(pictures, batch.views.tolist(), strict=True)
        ]
        assert torch.equal(batch.ids, tokenize(texts).ids) and 0 < batch.views.sum() < len(order)
    unchanged = data_of(inputs, clip, cache, with_(TEXT, {"mirror": False}, {"views": 2, "flip": 1.0}), index=sided)
    assert unchanged.pairs.mirrored is None and unchanged.report["training captions that a flip mirrors"] == 0


def test_pictures_of_both_towers_are_augmented_and_held_out_ones_only_cropped(inputs, clip, cache):
    looks = Pictures(crop="letterbox", **VARIED)
    data = data_of(inputs, clip, cache, dataclasses.replace(BOTH, pictures=looks))
    held = [inputs.index.root / picture.path for picture in data.held.index.pictures]
    (pixels,) = load_batches(held, 32, 8, pictures=Pictures(crop="letterbox"))
    with torch.no_grad():
        assert torch.equal(data.held.image_features(clip), clip.encode_image(normalize(pixels)).float())
    batch = data.pairs.batch(torch.tensor([3, 5]), torch.tensor([0, 0]), torch.tensor([7]), 0)
    paths = [inputs.index.root / p.path for p in inputs.index.pictures if inputs.index.root / p.path not in held]
    found = data.pairs.pixels(batch.pictures.tolist(), batch.seeds.tolist())
    seeds = batch.seeds.tolist()
    expected = [load_pixels(paths[i], 32, None, looks, None, s) for i, s in zip((3, 5), seeds, strict=True)]
    assert torch.equal(found, torch.stack(expected))
    data.pairs.pixels.close()


@pytest.mark.parametrize("config", [TEXT, BOTH], ids=["text", "both"])
def test_a_salient_crop_holds_for_training_and_held_out_pictures(inputs, clip, cache, tmp_path, config):
    """Of wide pictures with something at their end."""
    from PIL import Image

    pictures = []
    for n, picture in enumerate(inputs.index.pictures):
        with Image.open(inputs.index.root / picture.path) as image:
            wide = Image.new("RGB", (3 * image.width, image.height), "grey")
            wide.paste(image, (2 * image.width * (n % 2), 0))
        wide.save(tmp_path / f"{n:02}.png")
        pictures.append(Picture(f"{n:02}.png", picture.captions))
    index = Index(tmp_path, tuple(pictures), inputs.index.report)
    salient, centre = (
        data_of(inputs, clip, cache, with_(config, {}, {"crop": crop}), index=index) for crop in ("salient", "centre")
    )
    assert (salient.held.image_features(clip) != centre.held.image_features(clip)).any(dim=1).all()
    if config is TEXT:
        assert (salient.pairs.features[:] != centre.pairs.features[:]).any(dim=1).sum() > 20
    else:
        order = list(range(24))
        differs = (salient.pairs.pixels(order) != centre.pairs.pixels(order)).flatten(1).any(dim=1)
        assert differs.sum() > 20
        salient.pairs.pixels.close(), centre.pairs.pixels.close()


def test_processes_embed_every_view_of_their_share(inputs, clip, tmp_path, embedded):
    config = with_(TEXT, {}, {"views": 3, "flip": 0.5})
    names = [picture.path for picture in inputs.index.pictures]
    keys = finish(content_keys(inputs.index.root, names, tmp_path))
    assert finish(embed_together(inputs, clip, keys, config, tmp_path, ALONE))
    assert sum(embedded) == 3 * PICTURES
    finish(training_data(inputs, clip, keys, config, tmp_path))
    assert sum(embedded) == 3 * PICTURES


# ---- repeats --------------------------------------------------------------------------------------------------------


def test_repeats_and_turns_have_a_sampler(inputs, clip, cache, sided):
    data = data_of(inputs, clip, cache, with_(TEXT, {"choose": "in_turn"}), index=sided)
    held = {picture.path for picture in data.held.index.pictures}
    pictures = [picture for picture in sided.pictures if picture.path not in held]
    repeats = [picture.repeats for picture in pictures]
    assert data.sampler.visits == data.report["visits of pictures in an epoch"] == round(sum(repeats))
    other = Sampler([len(p.captions) for p in pictures], 6, 0, repeats, in_turn=True)
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(next(data.sampler), next(other), strict=True))


def test_repeats_make_another_data_set_and_repeats_of_one_do_not(inputs, sided):
    keys = ["0" * 64] * PICTURES
    once = dataclasses.replace(sided, pictures=tuple(dataclasses.replace(p, repeats=1.0) for p in sided.pictures))
    twice = dataclasses.replace(sided, pictures=tuple(dataclasses.replace(p, repeats=2.0) for p in sided.pictures))
    identities = {dataset_identity(index, keys) for index in (sided, once, twice)}
    assert len(identities) == 3
    plain = dataclasses.replace(sided, pictures=tuple(Picture(p.path, p.captions) for p in sided.pictures))
    assert dataset_identity(plain, keys) == dataset_identity(once, keys)


def test_too_few_visits_are_told_before_anything_is_done(sided):
    few = dataclasses.replace(sided, pictures=tuple(dataclasses.replace(p, repeats=0.2) for p in sided.pictures))
    with pytest.raises(InputError, match=r"visits pictures 5\.2 times, less than one step of 6 pairs"):
        check_source(few, TEXT)
    many = dataclasses.replace(sided, pictures=tuple(dataclasses.replace(p, repeats=9) for p in sided.pictures[:4]))
    check_source(many, TEXT)


# ---- whole runs -----------------------------------------------------------------------------------------------------

ALL = {
    "text": RepairConfig(
        **COMMON,
        anchors=(Anchor("original", "penultimate", 0.3), Anchor("broken", "pooled", 0.2, "concepts")),
        anchor_captions=2,
        captions=Captions(shuffle=True, dropout=0.3, keep_first=1, prefix="my", suffix="now"),
        pictures=Pictures(views=3, **VARIED),
    ),
    "in turn, against all": RepairConfig(
        **COMMON,
        negatives="all",
        captions=Captions(choose="in_turn"),
        pictures=Pictures(views=2, crop="letterbox", flip=0.5),
    ),
    "both": RepairConfig(
        **COMMON | {"batch": 3, "accumulate": 2, "train": "both"},
        captions=Captions(shuffle=True, dropout=0.3, choose="first_two"),
        pictures=Pictures(crop="salient", **VARIED),
    ),
}


@pytest.fixture(scope="module")
def varied(inputs, sided):
    return dataclasses.replace(inputs, index=sided, concepts=tuple(f"a zork number {n}" for n in range(5)))


@pytest.mark.parametrize("name", ALL)
def test_a_run_that_was_stopped_goes_on_bit_by_bit_with_everything_random_on(varied, cache, tmp_path, name):
    config = ALL[name]

    def start(folder):
        return repair(varied, config, folder, cache=cache, device=CPU)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    list(start(whole))
    events = start(stopped)
    until(events, 3)  # saved at 2: one step is taken again
    events.close()
    list(start(stopped))
    assert (stopped / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    assert figures(telemetry.read(stopped)) == figures(telemetry.read(whole))
    losses = [event["loss"] for event in of("step", telemetry.read(whole))]
    assert len(losses) > 8 and len(set(losses)) == len(losses)


@pytest.mark.parametrize("name", ["text", "both"])
def test_another_seed_draws_something_else(varied, clip, cache, name):
    config = dataclasses.replace(ALL[name], negatives="batch")
    batches = []
    for seed in (0, 1):
        data = data_of(varied, clip, cache, dataclasses.replace(config, seed=seed))
        order = torch.arange(12)
        batches.append(data.pairs.batch(order, order * 0, order[:0], 0))
        if data.pairs.pixels:
            data.pairs.pixels.close()
    one, other = batches
    assert not torch.equal(one.ids, other.ids)
    assert not torch.equal(one.views if name == "text" else one.seeds, other.views if name == "text" else other.seeds)


@pytest.mark.parametrize("config", [TEXT, BOTH], ids=["text", "both"])
def test_training_goes_on_without_broken_pictures_and_tells_of_all_of_them_once_at_the_start(
    inputs, pictures, cache, tmp_path, config
):
    """Eight of 34: cut short, empty, text, another format, a copy of a broken one, and a folder."""
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    captions = json.loads((root / "captions.json").read_text())
    content = (root / sorted(captions)[0]).read_bytes()
    bad = {
        "cut.png": content[: len(content) // 2], "head.png": content[:40], "empty.png": b"", "text.png": b"no picture",
        "copy.png": b"no picture", "tiff.jpg": b"II*\0" + bytes(60), "zeros.jpg": bytes(1000),
        "\u00fcml\u00e4ut.webp": b"RIFF\0\0\0\0WEBP",
    }  # fmt: skip
    for name, content in bad.items():
        (root / name).write_bytes(content)
    (root / "captions.json").write_text(json.dumps(captions | {name: [f"a {name}"] for name in bad}))
    index = read_index(root, root / "captions.json")
    assert len(index) == PICTURES + len(bad)
    folder = tmp_path / "run"
    events = list(repair(dataclasses.replace(inputs, index=index), config, folder, cache=cache, device=CPU))
    assert events[-1]["type"] == "done" and len(of("step", events)) == 8
    (report,) = of("dataset", events)
    assert sorted(path for path, _ in report["broken"]) == sorted(bad)
    assert all(reason for _, reason in report["broken"])
    assert report["training pictures"] + report["held-out pictures"] == PICTURES
    assert json.loads((folder / "dataset.json").read_text())["broken"] == [list(pair) for pair in report["broken"]]
    kinds = [event["type"] for event in telemetry.read(folder)]
    assert kinds.count("dataset") == 1 and kinds.index("dataset") < kinds.index("step")
    assert not any(name in json.dumps(event) for name in bad for event in events if event["type"] == "step")
    (line,) = [line for line in tell(report | {"type": "dataset"}).split("\n") if line.startswith("broken")]
    assert line.startswith("broken: 8: ") and line.endswith("… (all are in dataset.json)")
    assert [name in line for name, _ in report["broken"]] == [True] * 5 + [False] * 3


# ---- tars -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(sided, tmp_path_factory):
    """The small world's pictures, each beside a text of its captions, in two tars."""
    folder = tmp_path_factory.mktemp("tars")
    for number, part in enumerate((sided.pictures[:13], sided.pictures[13:])):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for picture in part:
                path = sided.root / picture.path
                archive.add(path, path.name)
                text = folder / f"{Path(picture.path).stem}.txt"
                text.write_text("\n".join(picture.captions))
                archive.add(text, text.name)
    return find_tars(str(folder / "{0..1}.tar"))


def from_tars(inputs, clip, cache, config, tars):
    return finish(training_data(dataclasses.replace(inputs, index=tars), clip, [], config, cache))


@pytest.mark.parametrize(
    "captions",
    [
        {"choose": "first"},
        {"choose": "longest", "prefix": "my"},
        {"choose": "longest", "suffix": "and so on, and so on, to the end of it, without an end"},
        {"prefix": "my", "suffix": "now"},
        {"shuffle": True, "dropout": 0.4, "keep_first": 1},
        {"cut": "tokens"},
    ],
    ids=str,
)
def test_captions_in_tars_become_what_those_of_a_folder_become(inputs, clip, cache, sided, tars, captions):
    once = tuple(dataclasses.replace(picture, repeats=1.0) for picture in sided.pictures)
    config = with_(TEXT, captions)
    folder = data_of(inputs, clip, cache, config, index=dataclasses.replace(sided, pictures=once))
    packed = from_tars(inputs, clip, cache, config, tars)
    held = {picture.path for picture in folder.held.index.pictures}
    assert len(packed.pairs) == len(folder.pairs.counts)
    order = torch.arange(24)
    counts = torch.tensor(folder.pairs.counts)
    assert captions.get("choose") == "longest" or torch.equal(packed.pairs.counts[order].long(), counts)
    for step in range(3):
        choice = step % counts
        one, other = (each.pairs.batch(order, choice, order[:0], step) for each in (folder, packed))
        assert torch.equal(one.ids, other.ids)
        same = [batch.same_picture[:, None] == batch.same_picture for batch in (one, other)]
        assert torch.equal(*same)
        images = [
            each.pairs.image_features(batch, slice(3, 9), CPU) for each, batch in ((folder, one), (packed, other))
        ]
        assert (images[0] - images[1]).abs().max() < 1e-2
    assert sorted(map(tuple, packed.held.ids.tolist())) == sorted(map(tuple, folder.held.ids.tolist())) and held


def test_long_captions_in_tars_are_cut_where_those_of_a_folder_are(inputs, clip, cache, sided, tmp_path):
    long = " ".join(f"w{n}" for n in range(12))
    texts = [f"{long}. {long}", f"{long}, {long}", f"{long} {long}", long]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for n, picture in enumerate(sided.pictures):
            path = sided.root / picture.path
            archive.add(path, path.name)
            text = tmp_path / f"{Path(picture.path).stem}.txt"
            text.write_text(texts[n % 4])
            archive.add(text, text.name)
    packed = from_tars(inputs, clip, cache, TEXT, find_tars(str(tmp_path / "0.tar")))
    order = torch.arange(24)
    found = {tuple(row) for row in packed.pairs.batch(order, order * 0, order[:0], 0).ids.tolist()}
    assert found == {tuple(row) for row in tokenize([f"{long}.", long, texts[2]]).ids.tolist()}
    counts = [sum(n % 4 == kind for n in range(PICTURES)) for kind in range(3)]
    assert [packed.report[f"captions cut at a {at}"] for at in ("sentence", "comma", "token")] == counts
    assert packed.report["captions cut to the context length"] == sum(counts)


def test_captions_in_tars_are_taken_in_turn(inputs, clip, cache, tars):
    data = from_tars(inputs, clip, cache, with_(TEXT, {"choose": "in_turn"}), tars)
    for epoch in range(4):
        for _ in range(data.sampler.batches_per_epoch):
            pictures, choice = next(data.sampler)
            assert torch.equal(choice, epoch % data.pairs.counts[pictures].long())


@pytest.mark.parametrize(
    ("looks", "reason"),
    [
        ({"views": 2}, "tars are embedded once, with one view of each picture: set pictures.views to 1"),
        ({"crop": "salient"}, "tars are read once, and a salient crop looks at a picture first"),
    ],
)
def test_what_tars_cannot_have_is_refused_in_a_sentence(tars, looks, reason):
    with pytest.raises(InputError, match=reason):
        check_source(tars, with_(TEXT, {}, looks))


def test_letterboxed_tars_have_shards_of_their_own(inputs, clip, cache, tars, tmp_path):
    config = with_(TEXT, {}, {"crop": "letterbox"})
    check_source(tars, config)
    one = from_tars(inputs, clip, tmp_path, config, tars)
    other = from_tars(inputs, clip, tmp_path, TEXT, tars)
    assert one.pairs.shards.paths != other.pairs.shards.paths
    assert torch.equal(one.pairs.features[:], from_tars(inputs, clip, tmp_path, config, tars).pairs.features[:])
