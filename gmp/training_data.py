"""What a run trains and measures on: captioned pictures from a folder or from tars, as tokens and features."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .clip import CLIP
from .config import RepairConfig
from .data.captions import Index, check_pictures, dataset_key, held_out_count, split
from .data.images import PicturesAhead, load_batches, normalize
from .data.shard_sampler import ShardSampler
from .data.shards import PICTURES, ShardPairs, Shards, embed_tars, hold_out
from .data.tars import Tars
from .distributed import Group
from .duplicates import alike, alike_keys
from .errors import InputError
from .events import Event, mapped, progress
from .features import content_keys, embed_files
from .layouts import TowerFile
from .step import Pairs
from .tokenizer import Tokenize, lengths

PIECE = 16384  # pictures that each of several processes embeds between two looks at what the run is asked for


@dataclass(frozen=True)
class Inputs:
    """What a repair starts from. `original` is the text tower of the vision tower's CLIP, where the file has one;
    `index` are captioned pictures in a folder, or in tars."""

    text: TowerFile
    vision: TowerFile
    original: TowerFile | None
    index: Index | Tars
    tokenize: Tokenize


@dataclass(frozen=True)
class HeldOut:
    """Pairs that are measured and never trained on."""

    index: Index
    ids: Tensor  # (captions, context_length)
    features: Tensor | None  # (pictures, embed_dim) of a locked vision tower

    @torch.no_grad()
    def image_features(self, clip: CLIP) -> Tensor:
        """(pictures, embed_dim): as they were cached, or by the tower as it is now"""
        if self.features is not None:
            return self.features
        batches = load_batches(self.index.paths, clip.visual.vision_config.image_size, batch=64)
        device = clip.logit_scale.device
        return torch.cat([clip.encode_image(normalize(pixels.to(device))).float().cpu() for pixels in batches])


@dataclass(frozen=True)
class Data:
    """What a run trains on, what it measures, and the report of both."""

    pairs: Pairs | ShardPairs
    held: HeldOut
    report: dict[str, object]
    sampler: ShardSampler | None = None


def caption_tokens(inputs: Inputs) -> Tensor | int:
    """Tokens of every caption, (captions,); those of tars are not known yet, and may fill the context."""
    if isinstance(inputs.index, Tars):
        return inputs.text.config.context_length
    return lengths(inputs.tokenize(inputs.index.captions()).ids)


def check_source(index: Index | Tars, config: RepairConfig) -> None:
    """Raises InputError where these pictures cannot be trained on so."""
    if not isinstance(index, Tars):
        check_size(len(index), config)
    elif config.train == "both":
        raise InputError(
            "tars are embedded once, which needs a locked vision tower: set train to text, or unpack them into a folder"
        )


def check_size(pictures: int, config: RepairConfig) -> None:
    held_out = held_out_count(pictures, config.held_out, config.held_out_most)
    if pictures - held_out < config.step_pairs:
        raise InputError(
            f"{pictures} pictures, of which {held_out} are held out, are fewer than one step of {config.step_pairs} "
            f"pairs (batch {config.batch} × accumulate {config.accumulate}); add pictures, or make the batch smaller"
        )


def dataset_identity(index: Index | Tars, keys: list[str]) -> str:
    """By content; of tars, which are read when it is their turn, by place, size and version."""
    return index.key if isinstance(index, Tars) else dataset_key(index, _by_path(index, keys))


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
    """The pictures that decode, embedded where the vision tower is locked, and their captions as tokens."""
    if isinstance(inputs.index, Tars):
        return (yield from _from_tars(inputs, clip, config, cache))
    index, features = inputs.index, None
    if config.train == "text":
        names = [picture.path for picture in index.pictures]
        features, broken = yield from embed_files(clip.visual, index.root, names, keys, cache)
        index = index.without(broken)
    else:
        index = yield from check_pictures(index)
    count = held_out_count(len(index), config.held_out, config.held_out_most)
    contents = _by_path(inputs.index, keys)
    train_index, held_index = split(index, contents, count)
    train_tokens = inputs.tokenize(train_index.captions())
    held_tokens = inputs.tokenize(held_index.captions())
    same_picture = alike_keys([contents[picture.path] for picture in train_index.pictures])
    same_caption = alike(train_tokens.ids)
    report = asdict(index.report) | {
        "training pictures": len(train_index),
        "held-out pictures": len(held_index),
        "captions cut to the context length": train_tokens.truncated + held_tokens.truncated,
        "captions with a literal special token taken out": train_tokens.specials + held_tokens.specials,
        "training pictures that equal another": _copies(same_picture),
        "training captions that equal another": _copies(same_caption),
    }
    held = HeldOut(held_index, held_tokens.ids, None)
    if features is None:
        pixels = PicturesAhead(train_index.paths, clip.visual.vision_config.image_size)
        pairs = Pairs(train_tokens.ids, train_index.caption_counts, None, pixels, same_picture, same_caption)
        return Data(pairs, held, report)
    rows = {picture.path: row for row, picture in enumerate(index.pictures)}
    mine, theirs = (features.pick([rows[one.path] for one in part.pictures]) for part in (train_index, held_index))
    pairs = Pairs(train_tokens.ids, train_index.caption_counts, mine, None, same_picture, same_caption)
    return Data(pairs, replace(held, features=theirs[:]), report)


def _from_tars(inputs: Inputs, clip: CLIP, config: RepairConfig, cache: Path) -> Generator[Event, None, Data]:
    """The pictures in tars, embedded tar by tar; training reads their shards as it goes."""
    paths = yield from embed_tars(clip.visual, inputs.index, inputs.tokenize, cache)
    shards = Shards(paths)
    if not len(shards):
        left_out = "".join(f"\n  {name}: {reason}" for name, reason in shards.report().broken[:5])
        raise InputError(f"there is no picture beside its captions in {len(paths)} tars{left_out}")
    check_size(len(shards), config)
    held = hold_out(shards, held_out_count(len(shards), config.held_out, config.held_out_most))
    pairs = ShardPairs(shards, held)
    held_index = shards.index(held, paths[0].parent / PICTURES)
    held_ids = inputs.tokenize(held_index.captions()).ids
    report = asdict(held_index.report) | {
        "training pictures": len(pairs),
        "held-out pictures": len(held),
        "pictures left out": shards.told("left_out_count"),
        "captions cut to the context length": shards.told("truncated"),
        "captions with a literal special token taken out": shards.told("specials"),
    }
    features = shards.of_pictures("features", held).float()
    sampler = pairs.sampler(config.step_pairs, config.seed)
    return Data(pairs, HeldOut(held_index, held_ids, features), report, sampler)


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
            yield from embed_piece(inputs, clip, keys, cache, start, group)
    group.broadcast_json({"do": "meet"})
    group.barrier()
    return True


def _piece(index: Index | Tars, group: Group) -> int:
    """How many pictures, or tars, the processes embed between two looks at what the run is asked for."""
    return group.size if isinstance(index, Tars) else PIECE * group.size


def embed_piece(
    inputs: Inputs, clip: CLIP, keys: list[str], cache: Path, start: int, group: Group
) -> Generator[Event, None, None]:
    """This process's share of the pictures, or tars, from `start` on."""
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
                embed_tars(clip.visual, index, inputs.tokenize, cache, part=(mine[0], total)),
                of_all,
            )
        return
    names = [index.pictures[row].path for row in mine]
    yield from mapped(embed_files(clip.visual, index.root, names, keys[mine.start : mine.stop], cache), of_all)
