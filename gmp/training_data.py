"""What a run trains and measures on: captioned pictures from a folder or from tars, as tokens and features."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import events
from .clip import CLIP
from .config import Captions, Pictures, RepairConfig
from .data.captions import Index, check_pictures, dataset_key, held_out_count, split
from .data.crops import Box
from .data.images import PLAIN, PicturesAhead
from .data.mirror import mirror
from .data.policy import CUT_AT, Finished, canonical, check, chosen, finish, has_draws
from .data.sampler import Sampler
from .data.shard_sampler import ShardSampler
from .data.shards import PICTURES, ShardPairs, Shards, embed_tars, hold_out
from .data.tars import Tars
from .data.words import Words
from .distributed import Group
from .duplicates import alike, alike_keys
from .errors import InputError
from .events import Event, mapped, progress
from .features import Features, content_keys, embed_files, embed_now, salient_boxes
from .layouts import TowerFile
from .pairs import Pairs, Texts
from .tokenizer import Tokenize, lengths

PIECE = 16384  # pictures that each of several processes embeds between two looks at what the run is asked for


@dataclass(frozen=True)
class Inputs:
    """What a repair starts from. `original` is the text tower of the vision tower's CLIP, where the file has one;
    `index` are captioned pictures in a folder, or in tars; `concepts` are captions without pictures, of what the broken
    encoder was taught and is to keep."""

    text: TowerFile
    vision: TowerFile
    original: TowerFile | None
    index: Index | Tars
    tokenize: Tokenize
    concepts: tuple[str, ...] = ()  # captions of what the fine-tune taught, for anchors


@dataclass(frozen=True)
class HeldOut:
    """Pairs that are measured and never trained on: captions with nothing drawn, pictures as they are cropped."""

    index: Index
    ids: Tensor  # (captions, context_length)
    features: Tensor | None  # (pictures, embed_dim) of a locked vision tower
    pictures: Pictures = PLAIN
    boxes: Sequence[Box | None] | None = None  # where the salient crop is

    def image_features(self, clip: CLIP) -> Tensor:
        """(pictures, embed_dim): as they were cached, or by the tower as it is now"""
        if self.features is not None:
            return self.features
        seen = {"pictures": self.pictures, "boxes": self.boxes}
        return events.finish(embed_now(clip.visual, self.index.paths, "held-out pictures", **seen))


@dataclass(frozen=True)
class Data:
    """What a run trains on, what it measures, and the report of both."""

    pairs: Pairs | ShardPairs
    held: HeldOut
    report: dict[str, object]
    sampler: Sampler | ShardSampler | None = None  # None: every picture once in an epoch, with any of its captions
    concept_ids: Tensor | None = None  # (captions, context_length)


def caption_tokens(inputs: Inputs, config: RepairConfig | None = None) -> Tensor | int:
    """Tokens of every caption, (captions,), as the configuration has them; those of tars are not known yet, and may
    fill the context."""
    if isinstance(inputs.index, Tars):
        return inputs.text.config.context_length
    if config is None:
        return lengths(inputs.tokenize(inputs.index.captions()).ids)
    index = _chosen(inputs.index, config.captions, inputs.tokenize)
    return lengths(finish(index.captions(), config.captions, inputs.tokenize).ids)


def check_source(index: Index | Tars, config: RepairConfig) -> None:
    """Raises InputError where these pictures cannot be trained on so."""
    if isinstance(index, Tars):
        _check_tars(config)
    elif not _repeats(index):
        check_size(len(index), config)
    elif (visits := sum(index.repeats)) < config.step_pairs:
        raise InputError(
            f"an epoch visits pictures {visits:g} times, less than one step of {config.step_pairs} pairs (batch "
            f"{config.batch} × accumulate {config.accumulate}); raise their repeats, or make the batch smaller"
        )


def _repeats(index: Index) -> bool:
    """Whether an epoch visits some pictures more or less often than once."""
    return any(times != 1 for times in index.repeats)


def _check_tars(config: RepairConfig) -> None:
    """Raises InputError for settings that tars cannot have."""
    if config.train == "both":
        raise InputError(
            "tars are embedded once, which needs a locked vision tower: set train to text, or unpack them into a folder"
        )
    if config.pictures.views > 1:
        raise InputError(
            "tars are embedded once, with one view of each picture: set pictures.views to 1, or unpack them"
        )
    if config.pictures.crop == "salient":
        raise InputError(
            "tars are read once, and a salient crop looks at a picture first: set pictures.crop to centre or "
            "letterbox, or unpack them into a folder"
        )


def check_size(pictures: int, config: RepairConfig) -> None:
    held_out = held_out_count(pictures, config.held_out, config.held_out_most)
    if pictures - held_out < config.step_pairs:
        raise InputError(
            f"{pictures} pictures, of which {held_out} are held out, are fewer than one step of {config.step_pairs} "
            f"pairs (batch {config.batch} × accumulate {config.accumulate}); add pictures, or make batch or accumulate "
            "smaller"
        )


def dataset_identity(index: Index | Tars, keys: list[str]) -> str:
    """By content; of tars, which are read when it is their turn, by place, size and version."""
    if isinstance(index, Tars):
        return index.key
    key = dataset_key(index, _by_path(index, keys))
    return hashlib.sha256(json.dumps([key, index.repeats]).encode()).hexdigest() if _repeats(index) else key


def _by_path(index: Index, keys: list[str]) -> dict[str, str]:
    return dict(zip((picture.path for picture in index.pictures), keys, strict=True))


def picture_keys(index: Index | Tars, cache: Path) -> Generator[Event, None, list[str]]:
    """`content_keys` of a folder's pictures. Those in tars are hashed while they are embedded."""
    if isinstance(index, Tars):
        return []
    return (yield from content_keys(index.root, [picture.path for picture in index.pictures], cache))


def training_data(
    inputs: Inputs, clip: CLIP, keys: list[str], config: RepairConfig, cache: Path
) -> Generator[Event, None, Data]:
    """The pictures that decode, embedded where the vision tower is locked, and their captions as tokens.

    Raises InputError for captions that prefix and suffix leave no room for.
    """
    check(config.captions, inputs.tokenize)
    if isinstance(inputs.index, Tars):
        return (yield from _from_tars(inputs, clip, config, cache))
    contents = _by_path(inputs.index, keys)
    views: list[Features] = []
    boxes: dict[str, Box | None] = {}
    if config.train == "text":
        index, views = yield from _views(inputs.index, clip, contents, config, cache)
    else:
        index = yield from check_pictures(inputs.index)
        if config.pictures.crop == "salient":
            names, found = _named(index, contents)
            squares = yield from salient_boxes(clip.visual, index.root, names, found, cache)
            boxes = dict(zip(names, squares, strict=True))
    rows = {picture.path: row for row, picture in enumerate(index.pictures)}
    count = held_out_count(len(index), config.held_out, config.held_out_most)
    parts = split(index, contents, count)
    train_index, held_index = (_chosen(part, config.captions, inputs.tokenize) for part in parts)

    pairs, finished = _pairs(train_index, contents, inputs.tokenize, config)
    held_captions = finish(held_index.captions(), config.captions, inputs.tokenize)
    held = HeldOut(held_index, held_captions.ids, None, config.pictures)
    if views:
        mine, theirs = ([rows[one.path] for one in part.pictures] for part in (train_index, held_index))
        first, *more = (view.pick(mine) for view in views)
        pairs = replace(pairs, features=first, more_views=tuple(more))
        held = replace(held, features=views[0].pick(theirs)[:])
    else:
        mine, theirs = (
            [boxes[one.path] for one in part.pictures] if boxes else None for part in (train_index, held_index)
        )
        size = clip.visual.vision_config.image_size
        pixels = PicturesAhead(train_index.paths, size, pictures=config.pictures, boxes=mine)
        pairs, held = replace(pairs, pixels=pixels), replace(held, boxes=theirs)
    sampler, concepts = _sampler(train_index, config), _concepts(inputs, config)
    report = asdict(index.report) | {
        "training pictures": len(train_index),
        "held-out pictures": len(held_index),
        **_cut(finished, held_captions),
        "training pictures that equal another": _copies(pairs.same_picture),
        "training captions that equal another": _copies(pairs.same_caption[: len(train_index.captions())]),
        "training captions that a flip mirrors": len(pairs.same_caption) - len(train_index.captions()),
        "visits of pictures in an epoch": sampler.visits if sampler else len(train_index),
        "views of each picture": config.pictures.views,
        "captions of concepts": 0 if concepts is None else len(concepts),
    }
    return Data(pairs, held, report, sampler, concepts)


def _views(
    index: Index, clip: CLIP, contents: dict[str, str], config: RepairConfig, cache: Path
) -> Generator[Event, None, tuple[Index, list[Features]]]:
    """The pictures that decode, and features of every view of them; the first view is the plain crop."""
    views = []
    for view in range(config.pictures.views):
        names, keys = _named(index, contents)
        work = embed_files(clip.visual, index.root, names, keys, cache, pictures=config.pictures, view=view)
        features, broken = yield from work
        if broken and view:
            raise InputError(f"{len(broken)} pictures cannot be read any more: {', '.join(list(broken)[:5])}")
        index = index.without(broken)
        views.append(features)
    return index, views


def _named(index: Index, contents: dict[str, str]) -> tuple[list[str], list[str]]:
    """Paths and content keys of an index's pictures."""
    names = [picture.path for picture in index.pictures]
    return names, [contents[name] for name in names]


def _chosen(index: Index, policy: Captions, tokenize: Tokenize) -> Index:
    """The index with the captions that are taken from."""
    captions = chosen([picture.captions for picture in index.pictures], policy, tokenize)
    pictures = zip(index.pictures, captions, strict=True)
    return replace(index, pictures=tuple(replace(picture, captions=left) for picture, left in pictures))


def _pairs(index: Index, contents: dict[str, str], tokenize: Tokenize, config: RepairConfig) -> tuple[Pairs, Finished]:
    """Training pairs without features and pixels, and their captions as they are without draws and flips."""
    policy, keys = config.captions, _named(index, contents)[1]
    captions, mirrored = index.captions(), None
    rows = list(captions)
    if config.pictures.flip and policy.mirror:
        turned = [mirror(caption) for caption in captions]
        changed = [i for i, (one, other) in enumerate(zip(captions, turned, strict=True)) if one != other]
        mirrored = torch.arange(len(captions))
        mirrored[changed] = torch.arange(len(captions), len(captions) + len(changed))
        rows += [turned[i] for i in changed]
    finished, more = finish(captions, policy, tokenize), finish(rows[len(captions) :], policy, tokenize)
    ids = torch.cat([finished.ids, more.ids]) if mirrored is not None else finished.ids
    texts, same_caption = None, None
    if has_draws(policy):
        texts, same_caption = Texts(rows, policy, Words(tokenize)), alike_keys([canonical(row, policy) for row in rows])
    pairs = Pairs(
        ids,
        index.caption_counts,
        None,
        None,
        alike_keys(keys),
        alike(ids) if same_caption is None else same_caption,
        keys=keys,
        looks=config.pictures,
        mirrored=mirrored,
        texts=texts,
        seed=config.seed,
    )
    return pairs, finished


def _sampler(index: Index, config: RepairConfig) -> Sampler | None:
    """What visits pictures more or less often than once in an epoch, or takes their captions in turn."""
    in_turn = config.captions.choose == "in_turn"
    if not _repeats(index) and not in_turn:
        return None
    return Sampler(index.caption_counts, config.step_pairs, config.seed, index.repeats, in_turn)


def _concepts(inputs: Inputs, config: RepairConfig) -> Tensor | None:
    """Tokens of the concepts' captions, which nothing is put around."""
    if not inputs.concepts:
        return None
    return finish(inputs.concepts, Captions(cut=config.captions.cut), inputs.tokenize).ids


def _cut(*parts: Finished) -> dict[str, int]:
    """Lines of the report."""
    return {
        "captions cut to the context length": sum(len(part.cut) for part in parts),
        **{f"captions cut at a {at}": sum(part.count(at) for part in parts) for at in CUT_AT},
        "captions with a literal special token taken out": sum(part.specials for part in parts),
    }


def _from_tars(inputs: Inputs, clip: CLIP, config: RepairConfig, cache: Path) -> Generator[Event, None, Data]:
    """The pictures in tars, embedded tar by tar; training reads their shards as it goes."""
    policy, tokenize = config.captions, inputs.tokenize
    paths = yield from embed_tars(clip.visual, inputs.index, tokenize, cache, pictures=config.pictures)
    shards = Shards(paths)
    if not len(shards):
        left_out = "".join(f"\n  {name}: {reason}" for name, reason in shards.report().broken[:5])
        raise InputError(f"there is no picture beside its captions in {len(paths)} tars{left_out}")
    check_size(len(shards), config)
    held = hold_out(shards, held_out_count(len(shards), config.held_out, config.held_out_most))
    pairs = ShardPairs(shards, held, policy, tokenize, config.seed)
    held_index = _chosen(shards.index(held, paths[0].parent / PICTURES), policy, tokenize)
    held_ids = finish(held_index.captions(), policy, tokenize).ids
    sampler, concepts = pairs.sampler(config.step_pairs, config.seed), _concepts(inputs, config)
    report = asdict(held_index.report) | {
        "training pictures": len(pairs),
        "held-out pictures": len(held),
        "pictures left out": shards.told("left_out_count"),
        "captions cut to the context length": shards.told("truncated"),
        **_cut_in(shards, policy),
        "captions with a literal special token taken out": shards.told("specials"),
        "visits of pictures in an epoch": len(pairs),
        "views of each picture": 1,
        "captions of concepts": 0 if concepts is None else len(concepts),
    }
    features = shards.of_pictures("features", held).float()
    return Data(pairs, HeldOut(held_index, held_ids, features), report, sampler, concepts)


def _cut_in(shards: Shards, policy: Captions) -> dict[str, int]:
    """Lines of the report; none where prefix or suffix make more captions too long than the shards have counted."""
    if policy.prefix or policy.suffix:
        return {}
    if policy.cut == "tokens":
        return {f"captions cut at a {at}": shards.told("truncated") if at == "token" else 0 for at in CUT_AT}
    return {f"captions cut at a {at}": shards.told(f"cut at a {at}") for at in CUT_AT}


def _copies(groups: Tensor) -> int:
    """How many of (n,) things are like one before."""
    return len(groups) - len(groups.unique())


# ---- several processes -----------------------------------------------------------------------------------------------


def embed_together(
    inputs: Inputs, clip: CLIP, keys: list[str], config: RepairConfig, cache: Path, group: Group
) -> Generator[Event, None, bool]:
    """Every process embeds its share of the pictures into the cache; True when all are through.

    In pieces, between which the first process looks whether the run is to be stopped.
    """
    if config.train == "text":
        for start in range(0, len(inputs.index), _piece(inputs.index, group)):
            group.broadcast_json({"do": "embed", "start": start})
            yield from embed_piece(inputs, clip, keys, cache, start, group, config.pictures)
    group.broadcast_json({"do": "meet"})
    group.barrier()
    return True


def _piece(index: Index | Tars, group: Group) -> int:
    """How many pictures, or tars, the processes embed between two looks at what the run is asked for."""
    return group.size if isinstance(index, Tars) else PIECE * group.size


def embed_piece(
    inputs: Inputs, clip: CLIP, keys: list[str], cache: Path, start: int, group: Group, pictures: Pictures = PLAIN
) -> Generator[Event, None, None]:
    """This process's share of the pictures, in all their views, or of the tars, from `start` on."""
    index, total = inputs.index, len(inputs.index)
    rows = range(total)[start : start + _piece(index, group)]
    mine = rows[group.rows(len(rows))]

    def of_all(event: Event) -> Event:
        if event["type"] != "progress":
            return event
        return progress(event["stage"], start + event["done"] * len(rows) // max(event["total"], 1), total)

    if not mine:
        return
    if isinstance(index, Tars):
        with contextlib.suppress(InputError):  # a damaged tar is told of with all others, once these are done
            yield from mapped(
                embed_tars(clip.visual, index, inputs.tokenize, cache, part=(mine[0], total), pictures=pictures),
                of_all,
            )
        return
    names = [index.pictures[row].path for row in mine]
    for view in range(pictures.views):
        found = keys[mine.start : mine.stop]
        work = embed_files(clip.visual, index.root, names, found, cache, pictures=pictures, view=view)
        yield from mapped(work, of_all)
