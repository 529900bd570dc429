"""What is found in a data set, and what each kind of finding means for a repair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Limits:
    """Where a picture or a caption begins to be a finding."""

    size: int = 224  # pixels of the vision tower's input; a shorter side is made larger
    aspect: float = 3.0  # long side / short side, beyond which the centre crop shows less than a third
    near: int = 6  # bits of 64 in which the hashes of near duplicates differ at the most
    contrast: int = 8  # levels of 255 between the darkest and the brightest part of a picture that shows nothing
    context: int = 77  # tokens that the text tower reads, start and end of text among them


USUAL = Limits()


@dataclass(frozen=True)
class Kind:
    """A kind of finding, in words."""

    title: str
    unit: str  # what is counted
    meaning: str  # for the repair
    action: str  # that is proposed
    # What a cleaned index does to the picture, or to the caption where one is at fault: "always" leaves it out,
    # "asked" where that is asked for, "never", and "merged": its captions go to the picture that it is a copy of
    drop: str = "never"


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "unreadable": Kind(
            "Pictures that cannot be read",
            "pictures",
            "They are not trained on: the repair lists them at its start and goes on without them.",
            "replace it by a whole copy, or delete it",
            "always",
        ),
        "not_found": Kind(
            "Pictures that are named but not there",
            "pictures",
            "A repair stops at them unless missing pictures are allowed (--allow-missing); then it goes on without.",
            "put the picture there, or take it out of the caption file",
            "always",
        ),
        "uncaptioned": Kind(
            "Pictures without a caption",
            "pictures",
            "They are not trained on: a contrastive repair learns from pairs.",
            "write a caption, or move the picture away",
            "always",
        ),
        "unlisted": Kind(
            "Pictures that the captions do not name",
            "pictures",
            "They lie beside pictures that are trained on, and are not. Where there are many, the caption file may be "
            "another data set's, or a part of it.",
            "write a caption for it, or leave it out on purpose",
        ),
        "orphans": Kind(
            "Caption files without a picture",
            "files",
            "They are not read. Where there are many, pictures were renamed, or are of a kind that is not read.",
            "put the picture beside it, or delete it",
        ),
        "linked": Kind(
            "Links that were not followed",
            "files",
            "They are not trained on: a link may lead out of the folder, to what is not yours to train on.",
            "put the file itself there",
        ),
        "small": Kind(
            "Pictures smaller than the vision tower's input",
            "pictures",
            "They are made larger before the tower sees them, and it sees blur: what their captions say of details is "
            "not there to be learnt. A few do no harm.",
            "take a larger copy",
            "asked",
        ),
        "aspect": Kind(
            "Pictures of an extreme aspect",
            "pictures",
            "CLIP sees the square in their middle, and the caption tells of what is outside of it.",
            "crop it to what the caption tells of, or choose the letterbox or the salient crop",
            "asked",
        ),
        "blank": Kind(
            "Pictures that show nothing",
            "pictures",
            "They are of one colour all over: whatever their captions say cannot be learnt from them.",
            "delete it, or replace it",
            "asked",
        ),
        "duplicates": Kind(
            "Copies of a picture, to the byte",
            "pictures",
            "A repair embeds them once and does not take them for each other's negatives, so that they do no harm but "
            "count several times. In a cleaned index the first one has the captions of all.",
            "keep one, with the captions of all",
            "merged",
        ),
        "near_duplicates": Kind(
            "Pictures that look the same",
            "pictures",
            "A repair takes them for different pictures: it pushes a caption away from a picture that it describes, "
            "and what was trained on is measured where one of them is held out.",
            "look at both, and keep the larger one",
            "asked",
        ),
        "garbled": Kind(
            "Caption files that cannot be read",
            "files",
            "They are not guessed at: their pictures are trained on only if they have another caption.",
            "open it in an editor and save it as UTF-8",
        ),
        "empty": Kind(
            "Caption files that hold nothing",
            "files",
            "Their pictures have no caption from there, and are not trained on unless they have another one.",
            "write a caption into it",
        ),
        "repeated": Kind(
            "Captions that their picture has twice",
            "captions",
            "They are taken once, and do no harm.",
            "nothing has to be done",
        ),
        "shared": Kind(
            "Captions that several different pictures have",
            "captions",
            "Such pictures are not taken for each other's negatives, so that the caption tells them apart from others "
            "only. Where many pictures share one, there is little to learn from it.",
            "say what is different about the picture",
        ),
        "truncated": Kind(
            "Captions that are longer than the text tower reads",
            "captions",
            "They are cut, at a sentence or comma unless that is switched off; what is behind teaches nothing.",
            "put what matters first, or shorten it",
        ),
        "commands": Kind(
            "Captions with <|startoftext|> or <|endoftext|> in them",
            "captions",
            "These marks are taken out before a caption is read: a tokenizer would end the text there.",
            "take the mark out",
        ),
        "language": Kind(
            "Captions that do not look English",
            "captions",
            "CLIP's text towers have learnt from English captions almost alone. Others pull the encoder towards words "
            "that it has no idea of, and the anchor holds it back: neither is learnt well.",
            "translate it",
            "asked",
        ),
        "wrong_pairs": Kind(
            "Captions that hardly fit their picture",
            "captions",
            "The original CLIP finds that most other pictures fit the caption better, and most other captions the "
            "picture. A wrong pair teaches the encoder what is not so. A caption of a random other picture is found "
            "like this about every second time: expect as many again that are not listed.",
            "look at it, and write a true caption",
            "asked",
        ),
    }
)
OPTIONAL = tuple(name for name, kind in KINDS.items() if kind.drop == "asked")


@dataclass(frozen=True)
class Case:
    """One picture, file or caption."""

    picture: str  # its path below the folder, or that of the file
    detail: str  # what exactly is found
    caption: str | None = None  # where this one is at fault, and not the picture
    copy_of: str | None = None  # the picture that is kept in its place


@dataclass(frozen=True)
class Finding:
    """All cases of a kind."""

    name: str  # one of KINDS
    cases: tuple[Case, ...]
    count: int = 0  # where cases are only counted

    def __len__(self) -> int:
        return self.count or len(self.cases)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def found(name: str, cases: Iterable[Case] = (), count: int = 0) -> Finding:
    """Of a kind that is in KINDS."""
    assert name in KINDS
    return Finding(name, tuple(cases), count)
