"""Which pictures a repaired text encoder was not trained on, as far as its file tells of the run that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from .data.captions import Index, dataset_key, held_out_count, split
from .layouts import TowerFile


def held_out(index: Index, keys: Mapping[str, str], encoder: TowerFile) -> int | None:
    """How many of an index's pictures the run of an encoder held out; 0 if it was trained on all of them.

    None where the file tells of no run, or of one on other pictures. keys: each path's `content_keys`.
    """
    try:
        run = json.loads(encoder.source.metadata["gmp_run"])
        share, most, dataset = run["config"]["held_out"], run["config"]["held_out_most"], run["dataset"]
    except (KeyError, TypeError, ValueError):
        return None
    return held_out_count(len(index), share, most) if dataset == dataset_key(index, keys) else None


def unseen(index: Index, keys: Mapping[str, str], encoders: Sequence[TowerFile]) -> tuple[Index, list[str]]:
    """The part of an index that none of the encoders was trained on, and what was left out, as sentences.

    All of it where that is not known, or would be nothing. The part is the one that the runs have held out:
    `gmp.data.captions.split` takes the same pictures first, however many.
    """
    told = {file.source.path: count for file in encoders if (count := held_out(index, keys, file)) is not None}
    if not told:
        return index, []
    trained = " and ".join(told)
    if not min(told.values()):
        return index, [f"{trained} was trained on all of these pictures: it may know them by heart"]
    part = split(index, keys, min(told.values()))[1]
    return part, [
        f"measured on the {len(part)} of {len(index)} pictures that the run of {trained} held out: the rest trained it"
    ]
