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
    run = _run(encoder)
    return held_out_count(len(index), *run[:2]) if run and run[2] == dataset_key(index, keys) else None


def _run(encoder: TowerFile) -> tuple[float, int, str] | None:
    """Share and most of what an encoder's run held out, and its data set's key; None if the file tells of none."""
    try:
        run = json.loads(encoder.source.metadata["gmp_run"])
        return run["config"]["held_out"], run["config"]["held_out_most"], run["dataset"]
    except (KeyError, TypeError, ValueError):
        return None


def unseen(index: Index, keys: Mapping[str, str], encoders: Sequence[TowerFile]) -> tuple[Index, list[str]]:
    """The part of an index that none of the encoders was trained on, and what was left out or is not known, in words.

    All of it where that is not known, or would be nothing. The part is the one that the runs have held out:
    `gmp.data.captions.split` takes the same pictures first, however many.
    """
    counts = [(file.source.path, held_out(index, keys, file)) for file in encoders if _run(file)]
    other = " and ".join(dict.fromkeys(name for name, count in counts if count is None))
    notes = [f"the run of {other} had another data set: pictures that are in both may be known to it"] if other else []
    counts = [(name, count) for name, count in counts if count is not None]
    if not counts:
        return index, notes
    least = min(count for _, count in counts)
    trained = " and ".join(dict.fromkeys(name for name, count in counts if least or not count))
    if not least:
        return index, [*notes, f"{trained} was trained on all of these pictures: it may know them by heart"]
    part = split(index, keys, least)[1]
    left_out = f"measured on the {len(part)} of {len(index)} pictures that the run of {trained} held out"
    return part, [*notes, f"{left_out}: the rest trained it"]
