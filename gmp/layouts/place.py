"""Where a family of files keeps one tower: the naming of its tensors and what stands before the names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .canonical import STACK, Piece

# The form of a projection's name tells its orientation, in every family: a bare parameter is used as x @ P, a
# Linear's `.weight` is its transpose. Shapes do not tell: L/14's and bigG's text projections are square.
TEXT_PROJECTIONS = (Piece(("text_projection",)), Piece(("text_projection.weight",), transposed=True))


@dataclass(frozen=True)
class Place:
    """One tower in one family of files.

    layout: what to call it in reports.
    piece: canonical name -> names in the family's naming.
    prefix: before the text tower's names. root: before `logit_scale` and the vision tower's names.
    level: a level of the naming that this file leaves out, such as "text_model.".
    member: which of several text encoders this is; None where only the size can tell.
    activation: where the family implies it.
    """

    layout: str
    tower: str
    piece: Callable[[str], Piece]
    prefix: str = ""
    root: str = ""
    level: str = ""
    member: str | None = None
    activation: str | None = None

    def key(self, name: str) -> str:
        """The name in the file of a tensor in the family's naming."""
        root = self.tower == "vision" or name == "logit_scale"
        return (self.root if root else self.prefix) + name.removeprefix(self.level)

    def keys(self, piece: Piece) -> Piece:
        return Piece(tuple(self.key(name) for name in piece.keys), piece.transposed)

    @property
    def stack(self) -> str:
        """What stands before the block number in this file."""
        first = self.piece(f"{STACK[self.tower]}.0.ln_1.weight").keys[0]
        return self.key(first).rpartition(".0.")[0]

    def owns(self, key: str) -> bool:
        """True if a tensor of the file belongs to this tower, by its name alone."""
        if self.level or not key.startswith(self.root):  # where a level is left out there is one tower only
            return key.startswith(self.root)
        seen = key[len(self.root) :].startswith(("visual.", "vision_model.", "visual_projection"))
        return seen == (self.tower == "vision")
