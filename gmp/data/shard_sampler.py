"""Which pictures and captions make up each batch where the data set lies in shards, with flat memory.

A permutation of a billion pictures would fill memory, and reading in its order would read every shard all the time.
So shards are permuted, and pictures within some shards at a time, the window, as WebDataset does with its shuffle
buffer; here the order follows from numbers, so that it is the same again after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from .sampler import draw_captions, position, seeded

WINDOW = 16  # shards that are mixed with each other


class Counts(Protocol):
    """Captions per picture, by position."""

    def __getitem__(self, positions: Tensor) -> Tensor: ...  # (n,) -> (n,) integers


class ShardSampler:
    """Endless batches of (picture, caption) positions, as of `Sampler`, with the memory of one window of shards.

    Every epoch visits every picture once, and draws one of its captions uniformly. It has its own order of shards, of
    which `window` at a time are mixed evenly: which shards share a window differs from epoch to epoch. A batch may
    reach from one window into the next. What is left over when no full batch remains is dropped. Order and captions
    depend on (seed, epoch, window) alone, so the state is a position.
    """

    def __init__(
        self,
        pictures: Sequence[int],
        caption_counts: Counts,
        batch: int,
        seed: int,
        window: int = WINDOW,
        in_turn: bool = False,
    ):
        """pictures: of each shard; their positions follow each other, shard after shard.

        in_turn: captions are taken one after the other from epoch to epoch. Raises InputError when no batch can be
        filled, and for a window of no shards.
        """
        total = sum(pictures)
        problems = []
        if batch < 1:
            problems.append(f"The batch size is {batch}; it must be at least 1.")
        elif total < batch:
            smaller = f"lower the batch size to at most {total} or " if total else ""
            problems.append(f"{total} pictures don't fill a batch of {batch}: {smaller}add pictures.")
        if window < 1:
            problems.append(f"The window is {window} shards; it must be at least 1.")
        if problems:
            raise InputError(" ".join(problems))
        self.batch_size, self.seed, self.window = batch, seed, window
        self.epoch = 0
        self.batches_per_epoch, self.dropped_per_epoch = divmod(total, batch)
        self._sizes = tuple(pictures)
        self._starts = tuple(accumulate(pictures, initial=0))
        self._counts, self._in_turn = caption_counts, in_turn
        self._batch = 0  # batches of this epoch that were handed out
        self._plan: tuple[int, Tensor, list[int]] | None = None  # epoch, order of shards, where its windows begin
        self._drawn: tuple[int, int, Tensor, Tensor] | None = None  # epoch, window, pictures, captions

    def __iter__(self) -> ShardSampler:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Pictures (B,) int64 and, for each, the position of its caption (B,) int64."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, *self._order(self.epoch))
        _, order, begins = self._plan
        start, end = self._batch * self.batch_size, (self._batch + 1) * self.batch_size
        pieces = []
        for number, (begin, then) in enumerate(zip(begins, begins[1:], strict=False)):
            if begin < end and start < then:
                pictures, captions = self._mixed(number, order)
                rows = slice(max(start - begin, 0), end - begin)
                pieces.append((pictures[rows], captions[rows]))
        self._batch += 1
        if self._batch == self.batches_per_epoch:
            self.epoch, self._batch = self.epoch + 1, 0
        return torch.cat([pictures for pictures, _ in pieces]), torch.cat([captions for _, captions in pieces])

    def state(self) -> dict[str, int]:
        """Where the next batch starts: finished epochs, and batches handed out since. JSON-ready."""
        return {"seed": self.seed, "epoch": self.epoch, "batch": self._batch, "window": self.window}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken.

        Raises InputError if it can't come from a sampler like this one.
        """
        own = {"seed": self.seed, "window": self.window}
        self.epoch, self._batch = position(state, own, self.batches_per_epoch)

    def _order(self, epoch: int) -> tuple[Tensor, list[int]]:
        """Order of the shards, and after how many pictures of the epoch each window begins; the last one is the end."""
        order = torch.randperm(len(self._sizes), generator=self._generator(f"{epoch}"))
        ends = list(accumulate((self._sizes[shard] for shard in order.tolist()), initial=0))
        return order, [*ends[: -1 : self.window], ends[-1]]

    def _mixed(self, number: int, order: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures of a window in their order, and a caption for each."""
        if self._drawn is None or self._drawn[:2] != (self.epoch, number):
            generator = self._generator(f"{self.epoch} {number}")
            shards = order[number * self.window : (number + 1) * self.window].tolist()
            pictures = torch.cat([torch.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards])
            counts = torch.as_tensor(self._counts[pictures])
            captions = self.epoch % counts.long() if self._in_turn else draw_captions(counts, generator)
            mixed = torch.randperm(len(pictures), generator=generator)
            self._drawn = (self.epoch, number, pictures[mixed], captions[mixed])
        return self._drawn[2:]

    def _generator(self, place: str) -> torch.Generator:
        return seeded(f"shards {self.seed} {place}")
