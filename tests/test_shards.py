"""Feature shards against the same pictures in a folder: what is embedded, held out and trained on, in what memory."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import psutil
import pytest
import torch

from gmp.contrastive import Gallery, contrastive
from gmp.data import shards as module
from gmp.data.captions import content_key, held_out_order, read_index, split
from gmp.data.images import load_batches, normalize
from gmp.data.shard_sampler import ShardSampler
from gmp.data.shards import Row, ShardPairs, Shards, embed_tars, hold_out, picture_name, shard_paths, write_shard
from gmp.data.tars import find_tars
from gmp.duplicates import alike, alike_keys
from gmp.errors import InputError
from gmp.events import finish
from gmp.files import write_safetensors
from gmp.tokenizer import Tokenizer, Tokens
from tests.small import small_clip, tokenize

CAPTIONS = ("a red circle", "a blue square", "two green stars")


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory) -> Path:
    """The small world's 26 pictures with text files beside them: one to three captions, two pictures thrice."""
    place = tmp_path_factory.mktemp("folder")
    captions = json.loads((pictures / "captions.json").read_text())
    for n, (name, texts) in enumerate(sorted(captions.items())):
        shutil.copy(pictures / name, place / f"{n:03}{Path(name).suffix}")
        (place / f"{n:03}.txt").write_text("\n".join([*texts, *CAPTIONS][: 1 + n % 3]))
    for n, source in enumerate([4, 4, 9, 9], 26):
        suffix = next(place.glob(f"{source:03}.[!t]*")).suffix
        shutil.copy(place / f"{source:03}{suffix}", place / f"{n:03}{suffix}")
        (place / f"{n:03}.txt").write_text(CAPTIONS[n % 3])
    return place


def pack(folder: Path, into: Path, sizes: list[int], seed: int | None = None) -> str:
    """Tars of the folder's pictures, in the order of their names or shuffled."""
    stems = sorted({path.stem for path in folder.iterdir()})
    if seed is not None:
        random.Random(seed).shuffle(stems)
    into.mkdir()
    for n, size in enumerate(sizes):
        with tarfile.open(into / f"{n:02}.tar", "w") as archive:
            for stem in stems[:size]:
                for path in sorted(folder.glob(f"{stem}.*")):
                    archive.add(path, path.name)
        stems = stems[size:]
    assert not stems
    return str(into / f"{{00..{len(sizes) - 1:02}}}.tar")


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory):
    return find_tars(pack(folder, tmp_path_factory.mktemp("tars") / "t", [11, 0, 9, 10]))


@pytest.fixture(scope="module")
def shards(tars, tmp_path_factory) -> Shards:
    return Shards(finish(embed_tars(small_clip().visual, tars, tokenize, tmp_path_factory.mktemp("cache"))), opened=2)


def everything(shards: Shards) -> torch.Tensor:
    return torch.arange(len(shards))


# ---- embedding ------------------------------------------------------------------------------------------------------


def test_shards_hold_what_a_folder_of_the_same_pictures_holds(shards, folder):
    index = read_index(folder)
    found = shards.index(everything(shards), Path("nowhere"))
    assert shards.pictures == (11, 0, 9, 10)
    assert [p.captions for p in found.pictures] == [p.captions for p in index.pictures]
    assert [p.path for p in found.pictures] == [picture_name(content_key(path)) for path in index.paths]
    keys = shards.of_pictures("keys", everything(shards))
    assert [bytes(key.tolist()).hex() for key in keys] == [content_key(path) for path in index.paths]
    ids = shards.of_captions("ids", torch.arange(sum(index.caption_counts)))
    assert torch.equal(ids.long(), tokenize(index.captions()).ids)
    assert shards.of_pictures("counts", everything(shards)).tolist() == list(index.caption_counts)


def test_features_are_the_towers_to_half_precision(shards, folder):
    tower = small_clip().visual
    with torch.no_grad():
        direct = torch.cat([tower(normalize(pixels)) for pixels in load_batches(read_index(folder).paths, 32, 8)])
    mine = shards.of_pictures("features", everything(shards))
    assert mine.dtype == torch.float16
    assert (mine.float() - direct).abs().max() <= 1e-3 * direct.abs().max()


def test_groups_are_equal_for_equal_pictures_and_captions_alone(shards, folder):
    index = read_index(folder)
    keys, captions = [content_key(path) for path in index.paths], index.captions()
    groups = shards.of_pictures("picture_group", everything(shards)).tolist()
    assert [[a == b for b in groups] for a in groups] == [[a == b for b in keys] for a in keys]
    groups = shards.of_captions("caption_group", torch.arange(len(captions))).tolist()
    assert [[a == b for b in groups] for a in groups] == [[a == b for b in captions] for a in captions]
    assert len(set(keys)) == 26 and len(set(captions)) < len(captions)


def test_finished_tars_are_not_opened_again(tars, tmp_path, monkeypatch):
    tower = small_clip().visual
    events = embed_tars(tower, tars, tokenize, tmp_path)
    for event in events:
        if event["done"] == 2:
            break
    events.close()
    assert [path.exists() for path in shard_paths(tower, tars, tokenize, tmp_path)] == [True, True, False, False]
    opened = []
    real = module.read_samples
    monkeypatch.setattr(module, "read_samples", lambda tar, *rest: opened.append(tar) or real(tar, *rest))
    finish(embed_tars(tower, tars, tokenize, tmp_path))
    assert opened == list(tars.files[2:])


def test_a_shard_that_is_torn_is_made_again(tars, tmp_path):
    tower = small_clip().visual
    paths = finish(embed_tars(tower, tars, tokenize, tmp_path))
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-100])
    assert finish(embed_tars(tower, tars, tokenize, tmp_path)) == paths
    assert paths[2].read_bytes() == whole


def test_another_tower_tokenizer_precision_or_tar_has_another_shard(tars, tmp_path):
    first = shard_paths(small_clip().visual, tars, tokenize, tmp_path)

    def longer(captions):
        return Tokens(torch.nn.functional.pad(tokenize(captions).ids, (0, 1)), 0, 0)

    others = [
        shard_paths(small_clip(1).visual, tars, tokenize, tmp_path),
        shard_paths(small_clip().visual, tars, longer, tmp_path),
        shard_paths(small_clip().visual, tars, tokenize, tmp_path, "bf16"),
    ]
    assert len({path for paths in (first, *others) for path in paths}) == 16
    os.utime(tars.files[0].url, ns=(10**18, 10**18))
    anew = find_tars([tar.url for tar in tars.files])
    changed = shard_paths(small_clip().visual, anew, tokenize, tmp_path)
    assert changed[0] != first[0] and changed[1:] == first[1:]


def test_processes_share_the_tars(tars, tmp_path):
    tower, done = small_clip().visual, []
    for rank in range(3):
        paths = finish(embed_tars(tower, tars, tokenize, tmp_path, part=(rank, 3)))
        done.append([path.exists() for path in paths])
    assert done == [[True, False, False, True], [True, True, False, True], [True] * 4]


def test_progress_counts_tars_and_the_pictures_of_each(tars, tmp_path):
    events = list(embed_tars(small_clip().visual, tars, tokenize, tmp_path, batch=4))
    assert all(event["type"] == "progress" and event["total"] == 4 for event in events)
    assert [e["done"] for e in events if "pictures" not in e] == [0, 1, 2, 3, 4]
    assert [(e["done"], e["pictures"]) for e in events if "pictures" in e] == [
        *[(0, 4), (0, 8), (0, 11)],
        *[(2, 4), (2, 8), (2, 9)],
        *[(3, 4), (3, 8), (3, 10)],
    ]


def test_broken_members_are_counted_and_listed_and_the_rest_stays_in_order(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LISTED", 3)
    stems = sorted(path.stem for path in folder.glob("*.txt"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for n, stem in enumerate(stems):
            picture, text = (next(folder.glob(f"{stem}.{kind}")) for kind in ("[!t]*", "txt"))
            content = b"not a picture" if n in (3, 4, 20) else b"" if n == 7 else picture.read_bytes()
            header = tarfile.TarInfo(f"{stem}{picture.suffix}")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
            if n != 12:
                archive.add(text, text.name)
    tars = find_tars(str(tmp_path / "a.tar"))
    shards = Shards(finish(embed_tars(small_clip().visual, tars, tokenize, tmp_path / "cache", batch=4)))
    kept = [path for n, path in enumerate(read_index(folder).paths) if n not in (3, 4, 7, 12, 20)]
    keys = [bytes(key.tolist()).hex() for key in shards.of_pictures("keys", everything(shards))]
    assert keys == [content_key(path) for path in kept]
    report = shards.report()
    assert report.listed == 30 and len(report.broken) == 3
    assert shards.about[0]["left_out_count"] == 5
    assert report.broken[0] == (f"{tmp_path}/a.tar: 003{kept[0].suffix}", report.broken[0][1])
    assert "not a picture of a known format" in report.broken[0][1]


def test_names_that_a_terminal_would_obey_are_escaped(folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("\x1b[2J.jpg", "\udcff.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    shards = Shards(finish(embed_tars(small_clip().visual, find_tars(str(tmp_path / "a.tar")), tokenize, tmp_path)))
    assert [name.rpartition(": ")[2] for name, _ in shards.report().broken] == [r"'\x1b[2J.jpg'", r"'\udcff.jpg'"]


def test_a_cut_tar_is_told_when_the_others_are_done(folder, tmp_path):
    pattern = pack(folder, tmp_path / "t", [10, 10, 10])
    content = (tmp_path / "t" / "01.tar").read_bytes()
    (tmp_path / "t" / "01.tar").write_bytes(content[: len(content) // 2])
    tower, tars = small_clip().visual, find_tars(pattern)
    with pytest.raises(InputError, match="01.tar is damaged or cut"):
        finish(embed_tars(tower, tars, tokenize, tmp_path))
    assert [path.exists() for path in shard_paths(tower, tars, tokenize, tmp_path)] == [True, False, True]


def test_something_else_than_a_shard_is_told(tmp_path):
    write_safetensors({"features": torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no feature shard"):
        Shards([tmp_path / "a.safetensors"])


def test_small_pictures_of_those_held_out_first_are_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 0)  # then 32 of each tar are kept: all
    tars = find_tars(pack(folder, tmp_path / "t", [30]))
    paths = finish(embed_tars(small_clip().visual, tars, tokenize, tmp_path))
    held = hold_out(Shards(paths), 5)
    index = Shards(paths).index(held, paths[0].parent / module.PICTURES)
    pixels = torch.cat(list(load_batches(index.paths, 32, 8)))
    by_key = {picture_name(content_key(path)): path for path in read_index(folder).paths}
    direct = torch.cat(list(load_batches([by_key[picture.path] for picture in index.pictures], 32, 8)))
    assert (normalize(pixels) - normalize(direct)).abs().mean() < 0.15  # JPEG


def test_no_more_small_pictures_are_kept_than_asked_for_and_those_are_the_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_shown", lambda tars: 4)
    tars = find_tars(pack(folder, tmp_path / "t", [30]))
    paths = finish(embed_tars(small_clip().visual, tars, tokenize, tmp_path))
    kept = {path.name for path in (paths[0].parent / module.PICTURES).iterdir()}
    keys = sorted((content_key(path) for path in read_index(folder).paths), key=held_out_order)
    assert kept == {picture_name(key) for key in keys[:4]}


# ---- held out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 5, 13])
@pytest.mark.parametrize(("sizes", "seed"), [([30], None), ([10, 10, 10], 1), ([3] * 10, 2)])
def test_the_same_pictures_are_held_out_as_of_a_folder_however_they_lie_in_tars(count, sizes, seed, folder, tmp_path):
    index = read_index(folder)
    keys = {picture.path: content_key(path) for picture, path in zip(index.pictures, index.paths, strict=True)}
    expected = {picture_name(keys[picture.path]) for picture in split(index, keys, count)[1].pictures}
    rows = [Row(p.path, keys[p.path], p.captions) for p in index.pictures]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    shards, _ = written(tmp_path, rows, sizes)
    held = hold_out(shards, count)
    found = [picture.path for picture in shards.index(held, tmp_path).pictures]
    assert set(found) == expected and len(found) == len(split(index, keys, count)[1])
    by_draw = sorted(expected, key=lambda name: next(held_out_order(k) for k in keys.values() if k[:32] == name[:32]))
    assert list(dict.fromkeys(found)) == by_draw  # an order of their own


def test_held_out_pictures_are_spread_evenly_over_shards(tmp_path):
    shards, _ = written(tmp_path, made(8000), [1000] * 8)
    held = hold_out(shards, 800)
    inside = torch.bincount(held // 1000, minlength=8)
    assert len(held) == 800 and (inside - 100).abs().max() < 5 * 10


def made(count: int, captions: int = 1) -> list[Row]:
    return [
        Row(f"{n}.jpg", hashlib.sha256(str(n).encode()).hexdigest(), tuple(f"word{n} take{c}" for c in range(captions)))
        for n in range(count)
    ]


def written(folder: Path, rows: list[Row], sizes: list[int], opened: int = 2) -> tuple[Shards, torch.Tensor]:
    """Shards of made-up pictures, and their features (n, 4)."""
    features = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(0)).half()
    paths, start = [], 0
    for n, size in enumerate(sizes):
        paths.append(folder / f"{n:04}.safetensors")
        here = slice(start, start + size)
        about = {"tar": f"{n}.tar", "left_out_count": 0, "left_out": []}
        write_shard(paths[-1], rows[here], features[here], tokenize, about)
        start += size
    return Shards(paths, opened), features


# ---- trained on -----------------------------------------------------------------------------------------------------


def test_pairs_are_those_of_the_rows_that_are_not_held_out(tmp_path):
    rows = [
        Row(row.name, row.key, tuple(f"word{n} take{c}" for c in range(1 + n % 3))) for n, row in enumerate(made(50))
    ]
    rows[30] = Row("copy", rows[7].key, rows[8].captions)
    shards, features = written(tmp_path, rows, [20, 1, 0, 15, 14])
    held = torch.tensor([49, 0, 20, 21, 22])
    pairs = ShardPairs(shards, held)
    left = [n for n in range(50) if n not in held.tolist()]
    assert len(pairs) == 45 and pairs.pictures == (19, 0, 0, 13, 13)
    assert pairs.features.shape == (45, 4) and len(pairs.counts) == 45
    assert torch.equal(pairs.features[:], features[left].float())
    assert torch.equal(pairs.features[5:40:7], features[left].float()[5:40:7])
    assert pairs.counts[torch.arange(45)].tolist() == [len(rows[n].captions) for n in left]
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1))
    choice = torch.randint(6, (45,), generator=torch.Generator().manual_seed(2)) % pairs.counts[order]
    batch = pairs.batch(order, choice, order[:3])
    texts = [rows[left[n]].captions[c] for n, c in zip(order.tolist(), choice.tolist(), strict=True)]
    assert torch.equal(batch.ids, tokenize(texts).ids) and batch.ids.dtype == torch.int64
    assert torch.equal(batch.pictures, order) and torch.equal(batch.upcoming, order[:3])
    same = batch.same_picture[:, None] == batch.same_picture
    keys = [rows[left[n]].key for n in order.tolist()]
    assert same.tolist() == [[a == b for b in keys] for a in keys] and same.sum() == 47
    same = batch.same_caption[:, None] == batch.same_caption
    tokens = batch.ids.tolist()  # captions may differ and their tokens not
    assert same.tolist() == [[a == b for b in tokens] for a in tokens] and same.sum() > 45


def test_the_gallery_is_that_of_the_same_pairs_in_memory(tmp_path):
    rows = [
        Row(row.name, row.key, tuple(f"word{n % 11} take{c}" for c in range(1 + n % 3)))
        for n, row in enumerate(made(40))
    ]
    rows[30] = Row("copy", rows[7].key, rows[30].captions)
    shards, features = written(tmp_path, rows, [20, 20])
    held = torch.tensor([0, 21])
    gallery, left = ShardPairs(shards, held).gallery, [n for n in range(40) if n not in (0, 21)]
    captions = [caption for n in left for caption in rows[n].captions]
    plain = Gallery.of(
        features[left].float(),
        alike_keys([rows[n].key for n in left]),
        alike(tokenize(captions).ids),
        [len(rows[n].captions) for n in left],
    )

    def sharing(one: Gallery) -> set[frozenset[int]]:
        """The sets of pictures that share a key."""
        return {frozenset(one.pictures[one.keys == key].tolist()) for key in one.keys.unique()}

    assert torch.equal(gallery.features[:], plain.features)
    assert sharing(gallery) == sharing(plain) and len(sharing(plain)) > 5
    assert gallery.keys.min() >= 0 and (gallery.keys % 2 == 1).sum() == (plain.keys % 2 == 1).sum() == 2
    images, texts = (torch.randn(6, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    pictures, choice = torch.tensor([6, 28, 0, 3, 11, 22]), torch.zeros(6, dtype=torch.int64)
    batch = ShardPairs(shards, held).batch(pictures, choice, pictures)
    places = torch.tensor([sum(len(rows[n].captions) for n in left[:p]) for p in pictures.tolist()])
    losses = [
        contrastive(images, texts, torch.tensor(2.0), gallery=one.at(pictures), same_caption=groups)
        for one, groups in ((gallery, batch.same_caption), (plain, alike(tokenize(captions).ids)[places]))
    ]
    assert torch.equal(*losses)


def test_nothing_held_out_and_everything_of_a_shard_held_out(tmp_path):
    shards, features = written(tmp_path, made(12), [4, 4, 4])
    assert torch.equal(ShardPairs(shards, torch.empty(0, dtype=torch.int64)).features[:], features.float())
    pairs = ShardPairs(shards, torch.tensor([4, 5, 6, 7]))
    assert torch.equal(pairs.features[:], features[[0, 1, 2, 3, 8, 9, 10, 11]].float())


@pytest.mark.parametrize("positions", [[-1], [12], [0, 13]])
def test_positions_outside_are_refused(positions, tmp_path):
    shards, _ = written(tmp_path, made(12), [4, 4, 4])
    with pytest.raises(IndexError):
        shards.of_pictures("features", torch.tensor(positions))


def test_no_more_shards_are_mapped_than_asked_for(tmp_path):
    shards, features = written(tmp_path, made(40), [4] * 10, opened=3)
    assert torch.equal(shards.of_pictures("features", torch.arange(39, -1, -1)), features.flip(0))
    assert len(shards._mapped) == 3


def test_names_of_members_become_no_paths(tmp_path):
    row = Row("../../../etc/passwd.jpg", "ab" * 32, ("a \ud800 caption",))
    about = {"tar": "", "left_out_count": 0, "left_out": []}
    write_shard(tmp_path / "a.safetensors", [row], torch.zeros(1, 4), Tokenizer(20), about)
    shards = Shards([tmp_path / "a.safetensors"])
    picture = shards.index(torch.tensor([0]), tmp_path).pictures[0]
    assert picture.path == f"{'ab' * 16}.jpg" and picture.captions == ("a \\ud800 caption",)


def test_training_in_the_middle_of_an_epoch_goes_on_with_the_same_batches(shards):
    pairs = ShardPairs(shards, hold_out(shards, 4))

    def sampler() -> ShardSampler:
        return ShardSampler(pairs.pictures, pairs.counts, 4, seed=5, window=2)

    one = sampler()
    for _ in range(9):
        next(one)
    state = json.loads(json.dumps(one.state()))
    rest = [pairs.batch(*next(one), torch.empty(0)) for _ in range(20)]
    again = sampler()
    again.restore(state)
    pairs = ShardPairs(Shards(shards.paths), hold_out(Shards(shards.paths), 4))
    for batch in rest:
        other = pairs.batch(*next(again), torch.empty(0))
        assert torch.equal(batch.pictures, other.pictures) and torch.equal(batch.ids, other.ids)
        assert torch.equal(batch.same_caption, other.same_caption)


def test_a_million_pairs_are_read_in_the_memory_of_a_few_shards(tmp_path):
    """100 shards of 10,000 pictures, 190 MB: an epoch keeps what is resident below a quarter of that."""
    size, count, width = 10_000, 100, 16
    ids = torch.arange(size)[:, None] * torch.ones(8, dtype=torch.int64)
    rows, total = [], 0
    for number in range(count):
        keys = os.urandom(32 * size).hex()
        rows = [Row(f"{n:08}.jpg", keys[64 * n : 64 * n + 64], ("a caption",)) for n in range(size)]
        features = torch.full((size, width), float(number))
        path = tmp_path / f"{number:04}.safetensors"
        about = {"tar": "", "left_out_count": 0, "left_out": []}
        write_shard(path, rows, features, lambda captions: Tokens(ids[: len(captions)], 0, 0), about)
        total += path.stat().st_size
    assert total > 150e6
    shards = Shards(sorted(tmp_path.iterdir()), opened=8)
    pairs = ShardPairs(shards, hold_out(shards, 1000))
    sampler = ShardSampler(pairs.pictures, pairs.counts, 4096, seed=0, window=4)
    process, resident, seen = psutil.Process(), [], 0
    for pictures, choice in itertools.islice(sampler, sampler.batches_per_epoch):
        batch = pairs.batch(pictures, choice, pictures)
        features = pairs.features[pictures]
        places = pairs.place(pictures)
        assert torch.equal(features[:, 0], (places // size).float()) and torch.equal(batch.ids[:, 0], places % size)
        resident.append(process.memory_info().rss)
        seen += len(pictures)
    assert seen == 999_000 // 4096 * 4096
    assert max(resident) - resident[0] < total / 4
