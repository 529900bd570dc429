"""Which pictures and captions make up each batch: deterministic, and resumable from three numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from ..errors import InputError


class Sampler:
    """Endless batches of (picture, caption) positions.

    Every epoch visits every picture once, in its own order, with one of its captions drawn uniformly. What is
    left over when no full batch remains is dropped (`dropped_per_epoch`); the next epoch's order leaves out
    others. No batch holds a picture twice: as each other's negatives the two rows would contradict their own
    target. Order and captions of epoch e depend on (seed, e) alone, so the state is a position, not a
    generator's memory.
    """

    def __init__(self, caption_counts: Sequence[int], batch: int, seed: int):
        """`caption_counts[i]`: captions of picture i. Raises InputError when no batch can be filled."""
        pictures = len(caption_counts)
        bare = [i for i, count in enumerate(caption_counts) if count < 1]
        problems = []
        if batch < 1:
            problems.append(f"The batch size is {batch}; it must be at least 1.")
        elif pictures < batch:
            smaller = f"lower the batch size to at most {pictures} or " if pictures else ""
            problems.append(f"{pictures} pictures don't fill a batch of {batch}: {smaller}add pictures.")
        if bare:
            problems.append(f"{len(bare)} of {pictures} pictures have no caption (positions {_some(bare)}).")
        if problems:
            raise InputError(" ".join(problems))
        self.batch_size = batch
        self.seed = seed
        self.epoch = 0
        self.batches_per_epoch = pictures // batch
        self.dropped_per_epoch = pictures % batch
        self._counts = torch.tensor(caption_counts, dtype=torch.int64)  # (pictures,)
        self._batch = 0  # batches of this epoch that were handed out
        self._plan: tuple[int, torch.Tensor, torch.Tensor] | None = None  # epoch, order, captions

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B,) int64 and, for each, the position of its caption (B,) int64."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, *self._draw(self.epoch))
        _, order, captions = self._plan
        pictures = order[self._batch * self.batch_size : (self._batch + 1) * self.batch_size].clone()
        self._batch += 1
        if self._batch == self.batches_per_epoch:
            self.epoch, self._batch = self.epoch + 1, 0
        return pictures, captions[pictures]

    def state(self) -> dict[str, int]:
        """Where the next batch starts: finished epochs, and batches handed out since. JSON-ready."""
        return {"seed": self.seed, "epoch": self.epoch, "batch": self._batch}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken.

        Raises InputError if it can't come from a sampler like this one.
        """
        self.epoch, self._batch = position(state, {"seed": self.seed}, self.batches_per_epoch)

    def _draw(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Order of the pictures and a caption for each picture, both (pictures,)."""
        generator = seeded(f"{self.seed} {epoch}")
        order = torch.randperm(len(self._counts), generator=generator)
        return order, draw_captions(self._counts, generator)


def seeded(name: str) -> torch.Generator:
    """A generator for what has this name. Hashed, since those seeded with neighbouring numbers may start alike."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_captions(counts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One of each picture's captions, by its position: counts (pictures,) int -> (pictures,) int64"""
    # The remainder of 62 random bits: uneven by less than 1e-12 for any number of captions a picture has.
    return torch.randint(2**62, counts.shape, generator=generator) % counts


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
