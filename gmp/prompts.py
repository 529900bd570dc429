"""Prompts that a text encoder is looked at with where there is no data set: what people write, of every kind.

Objects, attributes, relations, counts, styles, lists of tags, negations, next to nothing, long ones of up to and over
77 tokens; many differ from another in one word, so that telling them apart means something. Written for this and free
of names of living people.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).parent / "assets" / "prompts.tsv"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what it is there for."""

    kind: str  # object, attribute, relation, counting, style, tags, negation, short, pair or long
    text: str


@functools.cache
def prompts() -> tuple[Prompt, ...]:
    """All of them, each text once, in the order of the file."""
    with open(_FILE, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return tuple(Prompt(row["kind"], row["prompt"]) for row in rows)
