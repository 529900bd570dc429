"""Picture features: what is computed, kept on disk and read back is the same, and read only as it is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from gmp import features
from gmp.clip import VisionTower, precision
from gmp.config import Pictures
from gmp.data.augment import seed_of
from gmp.data.captions import read_index
from gmp.data.images import load_picture, load_pixels, normalize, preprocess
from gmp.errors import InputError
from gmp.events import finish
from gmp.features import (
    Features,
    content_keys,
    embed_files,
    embed_index,
    embed_now,
    embed_pixels,
    mapped,
    remember_keys,
    salient_boxes,
)
from gmp.files import read_header, write_safetensors
from tests.small import PICTURES, small_clip

CPU = torch.device("cpu")


def rows_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def names_of(pictures):
    return sorted(json.loads((pictures / "captions.json").read_text()))


def copy_of(pictures, folder):
    """A copy to damage, and its pictures' names."""
    shutil.copytree(pictures, folder)
    return folder, names_of(folder)


def embed(root, cache, tower, names=None, **options):
    """Features and reasons by name: content_keys and embed_files to their end."""
    names = names or names_of(root)

    def both():
        keys = yield from content_keys(root, names, cache)
        return (yield from embed_files(tower, root, names, keys, cache, **options))

    found, broken = finish(both())
    return dict(zip((name for name in names if name not in broken), found[:], strict=True)), broken


def expected_of(tower, path):
    with torch.no_grad():
        return tower(preprocess(load_picture(path), 32)[None])[0]


# --- rows


def test_rows_are_those_of_one_table():
    shards = [rows_of(5, 4), rows_of(3, 4, seed=1).half(), torch.empty(0, 4), rows_of(1, 4, seed=2).half()]
    table = torch.cat([shard.half() for shard in shards]).float()
    rows = torch.tensor([8, 0, 5, 5, 2, 7, 4, 0])
    found = Features(shards, rows)
    assert found.shape == (8, 4) and len(found) == 8
    for positions in (torch.tensor([3, 0, 0, 7, 5]), torch.tensor([], dtype=torch.int64), slice(2, 7), slice(None)):
        taken = found[positions]
        assert torch.equal(taken, table[rows[positions]]) and taken.dtype == torch.float32
    assert torch.equal(found.pick([6, 1, 2])[torch.tensor([2, 0])], table[rows[torch.tensor([2, 6])]])
    assert torch.equal(found.pick(torch.tensor([6, 1])).rows, torch.tensor([4, 0]))
    found[:].zero_()
    assert torch.equal(found[:], table[rows])  # what was handed out is the caller's own
    with pytest.raises(IndexError):
        found[torch.tensor([8])]


def test_of_nothing_there_are_no_rows():
    none = Features([], torch.empty(0, dtype=torch.int64))
    assert none.shape == (0, 0) and none[:].shape == (0, 0)
    some = Features([rows_of(5, 4)], torch.arange(5))
    assert some.pick([])[:].shape == (0, 4)


def test_a_mapped_tensor_is_the_one_that_was_written(tmp_path):
    tensors = {"a": rows_of(7, 3).half(), "b": rows_of(5), "c": torch.arange(13, dtype=torch.uint8)}
    write_safetensors(tensors, tmp_path / "a.safetensors", {})
    header = read_header(tmp_path / "a.safetensors")
    found = {name: mapped(header, name) for name in tensors}
    (tmp_path / "a.safetensors").unlink()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    with pytest.raises(OSError, match="a.safetensors"):
        mapped(header, "a")


def test_a_tensor_that_lies_between_two_addresses_is_refused(tmp_path):
    header = b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    header += b" " * (1 - len(header) % 2)  # an odd length
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(InputError, match="cannot be mapped"):
        mapped(read_header(tmp_path / "a.safetensors"), "a")


# --- keys


def naive_locate(known, wanted):
    known, wanted = known.tolist(), wanted.tolist()
    return [known.index(key) if key in known else -1 for key in wanted]


def test_keys_are_found_where_they_first_stand():
    keys = np.random.default_rng(0).integers(0, 3, (400, 32), dtype=np.uint8)
    keys[:, 2:31] = 0  # 9 heads for 27 keys: most have theirs in common with others
    shards = [features._Shard(torch.empty(len(part), 1), torch.from_numpy(part)) for part in np.split(keys[:200], [70])]
    assert features._locate(shards, keys).tolist() == naive_locate(keys[:200], keys)
    few = [features._Shard(torch.empty(5, 1), torch.from_numpy(keys[:5]))]
    found = features._locate(few, keys).tolist()
    assert found == naive_locate(keys[:5], keys) and -1 in found
    assert features._locate([], keys).tolist() == [-1] * 400 and features._locate(few, keys[:0]).tolist() == []


# --- the cache


@pytest.mark.parametrize("batch", [1, 7, None])
def test_features_are_those_of_the_tower(pictures, tmp_path, batch):
    tower = small_clip().visual
    first, broken = embed(pictures, tmp_path / "cache", tower, batch=batch)
    assert not broken and len(first) == PICTURES
    for name, found in first.items():
        expected = expected_of(tower, pictures / name)
        assert torch.allclose(found, expected, rtol=2**-10) and torch.equal(found, found.half().float())
    again, _ = embed(pictures, tmp_path / "cache", tower, batch=batch)
    assert all(torch.equal(again[name], found) for name, found in first.items())


def test_what_was_just_computed_is_what_is_read_later_where_nothing_can_be_kept_too(pictures, tmp_path, monkeypatch):
    tower = small_clip().visual
    kept, _ = embed(pictures, tmp_path / "cache", tower)

    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(features, "write_safetensors", full)
    events = []
    keys = finish(content_keys(pictures, names_of(pictures), tmp_path / "other"))
    work = embed_files(tower, pictures, names_of(pictures), keys, tmp_path / "other")
    found, _ = finish(work, events.append)
    assert torch.equal(found[:], torch.stack(list(kept.values())))
    (alarm,) = [event for event in events if event["type"] == "alarm"]
    assert alarm["alarm"] == "cache" and "no space left" in alarm["advice"]


def test_shards_in_fp32_are_read_as_if_they_were_rounded(pictures, tmp_path, embedded):
    tower, names = small_clip().visual, names_of(pictures)
    expected, _ = embed(pictures, tmp_path / "cache", tower)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    keys = mapped(read_header(path), "keys").clone()
    digests = [hashlib.sha256((pictures / name).read_bytes()).digest() for name in names]
    order = [digests.index(bytes(key)) for key in keys.numpy()]
    exact = torch.stack([expected_of(tower, pictures / names[i]) for i in order])
    write_safetensors({"features": exact, "keys": keys}, path, {})
    embedded.clear()
    found, _ = embed(pictures, tmp_path / "cache", tower)
    assert embedded == [] and all(
        torch.equal(found[names[i]], row.half().float()) for i, row in zip(order, exact, strict=True)
    )


def test_another_tower_and_another_precision_have_features_of_their_own(pictures, tmp_path, embedded):
    a, _ = embed(pictures, tmp_path / "cache", small_clip(0).visual)
    b, _ = embed(pictures, tmp_path / "cache", small_clip(1).visual)
    assert sum(embedded) == 2 * PICTURES
    assert not any(torch.allclose(a[name], b[name]) for name in a)
    tower = small_clip(0).visual
    rough, _ = embed(pictures, tmp_path / "cache", tower, precision="bf16")
    assert sum(embedded) == 3 * PICTURES
    for name in a:
        assert not torch.equal(a[name], rough[name])
        assert torch.allclose(a[name], rough[name], atol=0.05 * a[name].norm().item())
    assert tower.transformer.dtype is None  # it is left as it was
    again, _ = embed(pictures, tmp_path / "cache", tower)
    assert sum(embedded) == 3 * PICTURES and all(torch.equal(again[name], a[name]) for name in a)


def test_a_changed_picture_is_embedded_again(pictures, tmp_path, embedded):
    root, names = copy_of(pictures, tmp_path / "pictures")
    tower = small_clip().visual
    before, _ = embed(root, tmp_path / "cache", tower)
    embedded.clear()
    shutil.copy(root / names[1], root / names[0])  # its content is known
    Image.new("RGB", (64, 64), "red").save(root / names[2])
    after, _ = embed(root, tmp_path / "cache", tower)
    assert sum(embedded) == 1
    assert torch.equal(after[names[0]], before[names[1]]) and not torch.equal(after[names[2]], before[names[2]])
    assert torch.equal(after[names[3]], before[names[3]])


def test_equal_pictures_are_one_row_and_others_are_not(pictures, tmp_path, embedded):
    root, names = copy_of(pictures, tmp_path / "pictures")
    shutil.copy(root / names[4], root / names[9])
    index = read_index(root, root / "captions.json")
    for _ in range(2):  # computed, then from the cache
        _, found, _ = finish(embed_index(small_clip().visual, index, tmp_path / "cache"))
        place = {picture.path: i for i, picture in enumerate(index.pictures)}
        assert found.rows[place[names[4]]] == found.rows[place[names[9]]]
        assert len(found.rows.unique()) == PICTURES - 1 == sum(embedded)


def test_features_of_an_index_stand_in_its_order_without_what_does_not_decode(pictures, tmp_path):
    root, names = copy_of(pictures, tmp_path / "pictures")
    for name in names[3:5]:
        (root / name).write_bytes(b"no picture")  # the same content twice
    index, tower = read_index(root, root / "captions.json"), small_clip().visual
    whole, found, broken = finish(embed_index(tower, index, tmp_path / "cache"))
    assert sorted(broken) == names[3:5] and all("known format" in reason for reason in broken.values())
    assert [p.path for p in whole.pictures] == [p.path for p in index.pictures if p.path not in broken]
    expected = torch.stack([expected_of(tower, path) for path in whole.paths])
    assert found.shape == expected.shape and torch.allclose(found[:], expected, rtol=2**-10)
    turned = dataclasses.replace(index, pictures=index.pictures[::-1])
    _, found, _ = finish(embed_index(tower, turned, tmp_path / "cache"))
    assert torch.allclose(found[:], expected.flip(0), rtol=2**-10)


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "without keys", "other keys"])
def test_a_damaged_shard_costs_time_only(pictures, tmp_path, embedded, damage):
    tower = small_clip().visual
    expected, _ = embed(pictures, tmp_path / "cache", tower)
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    torn = {"torn": shard.read_bytes()[:-10], "garbage": b"x" * 100, "empty": b""}
    if damage in torn:
        shard.write_bytes(torn[damage])
    else:
        keys = {} if damage == "without keys" else {"keys": torch.zeros(3, 32, dtype=torch.uint8)}
        write_safetensors({"features": rows_of(PICTURES, 16), **keys}, shard, {})
    embedded.clear()
    found, _ = embed(pictures, tmp_path / "cache", tower)
    assert sum(embedded) == PICTURES
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_damaged_hashes_cost_time_only(pictures, tmp_path, embedded):
    tower = small_clip().visual
    embed(pictures, tmp_path / "cache", tower)
    (tmp_path / "cache" / "hashes.json").write_text("{")
    embedded.clear()
    found, _ = embed(pictures, tmp_path / "cache", tower)
    assert len(found) == PICTURES and embedded == []


def test_an_interrupted_embedding_keeps_its_shards(pictures, tmp_path, embedded, monkeypatch):
    monkeypatch.setattr(features, "SHARD", 10)
    tower, names = small_clip().visual, names_of(pictures)
    keys = [f"{number:064x}" for number in range(len(names))]
    steps = embed_files(tower, pictures, names, keys, tmp_path / "cache", batch=5)
    for event in steps:
        if event["done"] == 15:
            steps.close()
    embedded.clear()
    found, _ = finish(embed_files(tower, pictures, names, keys, tmp_path / "cache", batch=5))
    assert sum(embedded) == PICTURES - 10
    expected = torch.stack([expected_of(tower, pictures / name) for name in names])
    assert torch.allclose(found[:], expected, rtol=2**-10)


def test_shards_grow_with_what_was_embedded(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD", 2)
    monkeypatch.setattr(features, "GROWTH", 1)
    monkeypatch.setattr(features, "LONGEST", 7)
    found, _ = embed(pictures, tmp_path / "cache", small_clip().visual)
    sizes = [len(mapped(read_header(path), "keys")) for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert sorted(sizes, reverse=True) == [7, 7, 4, 4, 2, 2]
    assert len(found) == PICTURES == sum(sizes)


def test_whole_batches_of_broken_pictures(pictures, tmp_path):
    root, names = copy_of(pictures, tmp_path / "pictures")
    for number, name in enumerate(names[:5]):
        (root / name).write_bytes(b"no picture %d" % number)
    found, broken = embed(root, tmp_path / "cache", small_clip().visual, batch=2)
    assert sorted(broken) == names[:5] and sorted(found) == names[5:]


def test_a_pass_that_does_not_fit_is_taken_again_in_halves(pictures, tmp_path, monkeypatch):
    tower, forward, tried = small_clip().visual, VisionTower.forward, []

    def short(tower, pixels):
        tried.append(len(pixels))
        if len(pixels) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return forward(tower, pixels)

    expected, _ = embed(pictures, tmp_path / "cache", tower)
    monkeypatch.setattr(VisionTower, "forward", short)
    found, _ = embed(pictures, tmp_path / "other", tower, batch=16)
    assert tried[:3] == [16, 8, 4] and set(tried[3:]) <= {4, 2}  # and what fitted is remembered
    assert all(torch.allclose(found[name], expected[name], rtol=2**-10) for name in expected)
    monkeypatch.setattr(VisionTower, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        embed(pictures, tmp_path / "third", tower)


def test_progress_grows_to_its_total(pictures, tmp_path):
    keys = finish(content_keys(pictures, names_of(pictures), tmp_path / "cache"))
    events = []
    finish(embed_files(small_clip().visual, pictures, names_of(pictures), keys, tmp_path, batch=10), events.append)
    assert [(event["done"], event["total"]) for event in events] == [(done, PICTURES) for done in (0, 10, 20, 26)]
    assert {event["stage"] for event in events} == {"embed pictures"}


# --- a million


def test_a_million_rows_open_in_a_second(tmp_path, monkeypatch):
    """Of the processor; four are allowed on a machine that does other things too."""
    count, width, shards = 1_000_000, 8, 32
    digests = np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)
    table = torch.arange(count * width).remainder(2039).half().view(count, width)
    tower = small_clip().visual
    folder = features._folder(tmp_path, tower, "fp32")
    folder.mkdir(parents=True)
    for number, part in enumerate(torch.arange(count).chunk(shards)):
        tensors = {"features": table[part], "keys": torch.from_numpy(digests[part.numpy()])}
        write_safetensors(tensors, folder / f"{number:03}.safetensors", {})
    order = np.random.default_rng(1).permutation(count)
    whole = digests[order].tobytes().hex()
    keys = [whole[i : i + 64] for i in range(0, len(whole), 64)]
    names = [str(number) for number in range(count)]
    start = time.process_time()
    found, broken = finish(embed_files(tower, tmp_path, names, keys, tmp_path))
    assert time.process_time() - start < 4
    assert not broken and found.shape == (count, width)
    some = torch.randint(0, count, (500,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(found[some], table[torch.from_numpy(order)[some]].float())


def test_pictures_beyond_the_range_of_fp16_are_embedded_in_fp32():
    tower = small_clip().visual
    with torch.no_grad():
        tower.transformer.resblocks[0].mlp.c_fc.bias.fill_(1e5)
        tower.transformer.resblocks[0].mlp.c_proj.weight.mul_(1e-4)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad(), precision(torch.float16, tower):
        assert not tower(normalize(pixels)).isfinite().all()
    expected, _ = embed_pixels(tower, pixels, "fp32", 2)
    found, size = embed_pixels(tower, pixels, "fp16", 2)
    assert torch.equal(found, expected) and expected.isfinite().all() and size == 2


# --- other crops, and views


def wide_pictures(folder, count=5):
    folder.mkdir()
    for i in range(count):
        array = np.random.default_rng(i).integers(0, 256, (40, 70 + i, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i}.png")
    return sorted(path.name for path in folder.iterdir())


VARIED = Pictures(scale=0.5, flip=0.5, jitter=(0.2, 0.2, 0.1, 0.0), grey=0.3)


@pytest.mark.parametrize("crop", ["centre", "letterbox", "salient"])
@pytest.mark.parametrize("view", [0, 2])
def test_features_are_those_of_the_crop_and_view(tmp_path, crop, view):
    root, tower = tmp_path / "pictures", small_clip().visual
    names = wide_pictures(root)
    pictures = dataclasses.replace(VARIED, crop=crop)
    found, broken = embed(root, tmp_path / "cache", tower, names, pictures=pictures, view=view)
    keys = finish(content_keys(root, names, tmp_path / "cache"))
    boxes = finish(salient_boxes(tower, root, names, keys, tmp_path / "cache"))
    assert not broken
    for name, key, box in zip(names, keys, boxes, strict=True):
        seed = seed_of(key, view) if view else None
        pixels = load_pixels(root / name, 32, None, pictures, box if crop == "salient" else None, seed)
        with torch.no_grad():
            expected = tower(normalize(pixels)[None])[0]
        assert torch.allclose(found[name], expected, rtol=2**-10, atol=1e-5)


def test_every_view_and_way_to_vary_has_a_cache_of_its_own(tmp_path, embedded):
    root, tower, cache = tmp_path / "pictures", small_clip().visual, tmp_path / "cache"
    names = wide_pictures(root)
    embed(root, cache, tower, names)
    looks = [
        ({"pictures": VARIED}, 0),  # view 0 does not vary
        ({"pictures": VARIED, "view": 1}, 5),
        ({"pictures": VARIED, "view": 2}, 5),
        ({"pictures": dataclasses.replace(VARIED, views=7), "view": 2}, 0),
        ({"pictures": dataclasses.replace(VARIED, flip=0.4), "view": 1}, 5),
        ({"pictures": Pictures("letterbox")}, 5),
        ({"pictures": dataclasses.replace(VARIED, crop="letterbox"), "view": 1}, 5),
    ]
    for options, fresh in looks:
        embedded.clear()
        embed(root, cache, tower, names, **options)
        assert sum(embedded) == fresh, options
        embedded.clear()
        embed(root, cache, tower, names, **options)
        assert sum(embedded) == 0


def test_views_are_of_content_whatever_its_name(tmp_path, embedded):
    root, tower = tmp_path / "pictures", small_clip().visual
    names = wide_pictures(root)
    first, _ = embed(root, tmp_path / "a", tower, names, pictures=VARIED, view=1)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in names:
        shutil.copy(root / name, moved / f"x{name}")
    second, _ = embed(moved, tmp_path / "b", tower, [f"x{name}" for name in names], pictures=VARIED, view=1)
    assert all(torch.equal(first[name], second[f"x{name}"]) for name in names)


@pytest.mark.parametrize("crop", ["centre", "salient"])
def test_pictures_that_do_not_decode_are_named_in_every_view(tmp_path, crop):
    root, tower = tmp_path / "pictures", small_clip().visual
    names = wide_pictures(root)
    (root / names[1]).write_bytes(b"")
    pictures = dataclasses.replace(VARIED, crop=crop)
    for view in (0, 1):
        found, broken = embed(root, tmp_path / "cache", tower, names, pictures=pictures, view=view)
        assert broken == {names[1]: "the file is empty."} and len(found) == 4


def test_a_tower_that_trains_sees_the_same_pictures(tmp_path):
    root, tower = tmp_path / "pictures", small_clip().visual
    names = wide_pictures(root)
    paths, boxes = [root / name for name in names], [(i, 0, i + 40, 40) for i in range(5)]
    events = []
    for pictures, squares in ((Pictures(), None), (Pictures("salient"), boxes), (Pictures("letterbox"), None)):
        found = finish(embed_now(tower, paths, "now", pictures=pictures, boxes=squares), events.append)
        given = [load_pixels(p, 32, None, pictures, squares and squares[i]) for i, p in enumerate(paths)]
        with torch.no_grad():
            expected = tower(normalize(torch.stack(given)))
        assert torch.allclose(found, expected, atol=1e-5) and found.shape == (5, 16)
    assert events[0] == {"type": "progress", "stage": "now", "done": 5, "total": 5}
    assert finish(embed_now(tower, [], "now")).shape == (0, 16)
    (root / names[2]).write_bytes(b"x")
    with pytest.raises(InputError, match="2.png"):
        finish(embed_now(tower, paths, "now"))


def test_files_that_were_hashed_elsewhere_are_not_read_again(tmp_path, monkeypatch):
    root, cache = tmp_path / "pictures", tmp_path / "cache"
    root.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (root / name).write_bytes(name.encode())
    remember_keys(root, {"a.png": "1" * 64, "b.png": "2" * 64, "gone.png": "3" * 64}, cache)
    read = []
    monkeypatch.setattr("gmp.features.content_key", lambda path: read.append(path.name) or "4" * 64)
    assert finish(content_keys(root, ["a.png", "b.png", "c.png"], cache)) == ["1" * 64, "2" * 64, "4" * 64]
    assert read == ["c.png"]
