"""Which pictures and captions make up each batch: deterministic, and resumable from three numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from ..errors import InputError

_MOST = 1 << 20  # repeats of a picture
_UNIT = 1 << 30  # repeats are counted in such parts, exactly: a billion pictures' sum fits into 64 bits


class Sampler:
    """Endless batches of (picture, caption) positions.

    Every epoch visits every picture once, in its own order, with one of its captions drawn uniformly, or one after the
    other from epoch to epoch. What is left over when no full batch remains is dropped (`dropped_per_epoch`); the next
    epoch's order leaves out others. No batch holds a picture twice: as each other's negatives the two rows would
    contradict their own target. Order and captions of epoch e depend on (seed, e) alone, so the state is a position,
    not a generator's memory.

    Where pictures have `repeats`, an epoch visits each one so often: 2.5 is two times or three, and all pictures
    together have `visits`, the rounded sum (`draw_visits`). The visits of a picture lie far apart (`spread`), and where
    a batch holds it twice nevertheless, the two rows are to be masked.
    """

    def __init__(
        self,
        caption_counts: Sequence[int],
        batch: int,
        seed: int,
        repeats: Sequence[float] | None = None,
        in_turn: bool = False,
    ):
        """caption_counts: captions of each picture. repeats: visits of each picture in an epoch; None is 1 for all.

        in_turn: captions are taken one after the other. Raises InputError when no batch can be filled.
        """
        pictures = len(caption_counts)
        bare = [i for i, count in enumerate(caption_counts) if count < 1]
        wrong = [i for i, times in enumerate(repeats or ()) if not 0 <= times < _MOST]
        problems = []
        if repeats is not None and len(repeats) != pictures:
            problems.append(f"{len(repeats)} numbers of repeats were given for {pictures} pictures.")
        if wrong:
            problems.append(
                f"{len(wrong)} of {pictures} pictures have repeats that are not between 0 and {_MOST} "
                f"(positions {_some(wrong)})."
            )
        self._parts = None  # (pictures,) repeats in parts of _UNIT; None: each one is visited once
        if not problems and repeats is not None and set(repeats) != {1}:
            self._parts = torch.tensor([round(times * _UNIT) for times in repeats], dtype=torch.int64)
        self.visits = pictures if self._parts is None else count_visits(self._parts)
        if batch < 1:
            problems.append(f"The batch size is {batch}; it must be at least 1.")
        elif self.visits < batch:
            smaller = f"lower the batch size to at most {self.visits} or " if self.visits else ""
            what = "pictures" if self._parts is None else "visits of pictures"
            problems.append(f"{self.visits} {what} don't fill a batch of {batch}: {smaller}add pictures.")
        if bare:
            problems.append(f"{len(bare)} of {pictures} pictures have no caption (positions {_some(bare)}).")
        if problems:
            raise InputError(" ".join(problems))
        self.batch_size = batch
        self.seed = seed
        self.epoch = 0
        self.batches_per_epoch = self.visits // batch
        self.dropped_per_epoch = self.visits % batch
        self._counts = torch.tensor(caption_counts, dtype=torch.int64)  # (pictures,)
        self._in_turn = in_turn
        self._batch = 0  # batches of this epoch that were handed out
        self._plan: tuple[int, torch.Tensor, torch.Tensor] | None = None  # epoch, order, captions

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B,) int64 and, for each, the position of its caption (B,) int64."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, *self._draw(self.epoch))
        _, order, captions = self._plan
        rows = slice(self._batch * self.batch_size, (self._batch + 1) * self.batch_size)
        self._batch += 1
        if self._batch == self.batches_per_epoch:
            self.epoch, self._batch = self.epoch + 1, 0
        return order[rows].clone(), captions[rows].clone()

    def state(self) -> dict[str, int]:
        """Where the next batch starts: finished epochs, and batches handed out since. JSON-ready."""
        return {"seed": self.seed, "epoch": self.epoch, "batch": self._batch}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken.

        Raises InputError if it can't come from a sampler like this one.
        """
        self.epoch, self._batch = position(state, {"seed": self.seed}, self.batches_per_epoch)

    def _draw(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures in their order and a caption for each, both (visits,)."""
        generator = seeded(f"{self.seed} {epoch}")
        if self._parts is None:
            order = torch.randperm(len(self._counts), generator=generator)
            if self._in_turn:
                return order, epoch % self._counts[order]
            return order, draw_captions(self._counts, generator)[order]
        order = spread(draw_visits(self._parts, generator), generator)
        counts = self._counts[order]
        if self._in_turn:  # those of an epoch follow each other too
            passed = epoch * (self._parts[order] // _UNIT).clamp_min(1)
            return order, (passed + _occurrence(order)) % counts
        return order, draw_captions(counts, generator)


def seeded(name: str) -> torch.Generator:
    """A generator for what has this name. Hashed, since those seeded with neighbouring numbers may start alike."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_captions(counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One of each picture's captions, by its position: counts (pictures,) int -> (pictures,) int64"""
    # The remainder of 62 random bits: uneven by less than 1e-12 for any number of captions a picture has.
    return torch.randint(2**62, counts.shape, generator=generator) % counts


def count_visits(parts: torch.Tensor) -> int:
    """How many visits an epoch has: the rounded sum of repeats. (pictures,) int64, in parts of 2^30"""
    return round(Fraction(parts.sum().item(), _UNIT))


def draw_visits(parts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """How often an epoch visits each picture: its repeats rounded down or up, `count_visits` in all. (pictures,) int64

    By systematic sampling of the fractions (Madow 1949) over pictures in random order, which gives every picture its
    chance. Where fractions do not add up to a whole number, the sampling begins where it finds as many as are due.
    """
    whole, fractions = parts // _UNIT, parts % _UNIT
    total = fractions.sum().item()
    due = count_visits(parts) - whole.sum().item()  # total / _UNIT, rounded down or up
    over = total - total // _UNIT * _UNIT
    low, high = (0, _UNIT - over) if due == total // _UNIT else (_UNIT - over, _UNIT)
    start = low + torch.randint(2**62, (), generator=generator).item() % (high - low)
    order = torch.randperm(len(parts), generator=generator)
    ends = (fractions[order].cumsum(0) + start) // _UNIT
    extra = ends.diff(prepend=ends.new_zeros(1))
    visits = whole.clone()
    visits[order] += extra
    return visits


def spread(visits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures in an order that has each one so often: visits (pictures,) -> (visits.sum(),) int64

    A picture has its first place anywhere in the epoch and the others at equal distances from it, as in rounds, each
    shifted by up to half a distance, so that rounds have other orders: two visits are half a round apart at the least,
    but for how evenly chance fills the places between.
    """
    pictures = torch.repeat_interleave(visits)
    number = _occurrence(pictures)
    first = torch.rand(len(visits), generator=generator, dtype=torch.float64)[pictures]
    shifts = torch.rand(len(pictures), generator=generator, dtype=torch.float64) / 2
    places = (first + (number + shifts) / visits[pictures]) % 1
    return pictures[places.argsort(stable=True)]


def _occurrence(pictures: torch.Tensor) -> torch.Tensor:
    """How often each picture came before: (n,) -> (n,)"""
    order = pictures.argsort(stable=True)
    ordered = pictures[order]
    starts = torch.searchsorted(ordered, ordered)
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order)) - starts
    return found


def position(state: Mapping[str, int], own: Mapping[str, int], batches: int) -> tuple[int, int]:
    """Epoch and batch of a sampler's saved state.

    own: what such a sampler is made with, its seed among it. batches: of an epoch. Raises InputError for a state that
    can't come from such a sampler.
    """
    names = dict.fromkeys(("seed", "epoch", "batch", *own))
    missing = [name for name in names if not isinstance(state.get(name), int)]
    if missing:
        raise InputError(f"The sampler's saved state lacks the whole numbers {', '.join(missing)}.")
    problems = [
        f"it was made with {name} {state[name]}, this run has {name} {mine}"
        for name, mine in own.items()
        if state[name] != mine
    ]
    if state["epoch"] < 0:
        problems.append(f"its epoch is {state['epoch']}")
    if not 0 <= state["batch"] < batches:
        problems.append(f"its batch is {state['batch']}, an epoch here has {batches} batches")
    if problems:
        raise InputError(
            f"The sampler's saved state doesn't fit: {'; '.join(problems)}. "
            "Continue with the same pictures, batch size and seed, or start a run of its own."
        )
    return state["epoch"], state["batch"]


def _some(items: Sequence[int]) -> str:
    return ", ".join(map(str, items[:5])) + (", …" if len(items) > 5 else "")
