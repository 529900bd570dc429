"""Several processes at one repair: what each computes of a step, and how the parts become a whole.

Data parallel. Every process holds all weights and computes the features of its own pairs of a step. The features of all
are gathered, and every process takes the loss over them and pushes the gradient for its own pairs back (GradCache,
arXiv 2101.06983). Gradients of weights are then summed, so that all take the same step. What is decided, the first
process decides: the others hear it between two steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import InputError

TIMEOUT = timedelta(minutes=10)  # for what all do at the same time: a process that hangs is given up after it
PATIENCE = timedelta(days=365)  # for what the first process does alone, such as embedding pictures or holding
POLL = 0.05  # seconds between two looks for the others
BUCKET = 1 << 23  # elements that are summed in one go: 32 MiB

Kind = TypeVar("Kind", bound=Tensor)


class Lost(InputError):
    """Another process has died, or did not take part in time."""


@dataclass(eq=False)
class Group:
    """The processes at one repair as one of them sees it. `Group()` is a single process: nothing is exchanged.

    All methods that exchange anything are called by all processes, in the same order. They raise Lost when another
    process has died; those of a step also when one does not take part within `TIMEOUT`.
    """

    rank: int = 0
    size: int = 1
    host: dist.ProcessGroup | None = None  # for what lies in the CPU's memory
    orders: dist.ProcessGroup | None = None  # the same; waits for the others as long as it takes (`PATIENCE`)

    def rows(self, n: int) -> slice:
        """This process's share of n rows; shares follow each other by rank and differ by one row at the most."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    @torch.no_grad()
    def gather(self, features: Tensor) -> Tensor:
        """The rows of all processes in the order of ranks, as a leaf without gradient: (n, E) -> (N, E).

        n is as `rows` gives it, or the same everywhere.
        """
        features = features.detach()
        if self.size == 1:
            return features
        mine = torch.tensor([len(features)])
        counts = [torch.empty_like(mine) for _ in range(self.size)]
        with self._together():
            dist.all_gather(counts, mine, group=self.host)
        counts = [count.item() for count in counts]
        most = max(counts)  # all send as much: not every backend takes pieces of unequal size
        padded = features.new_zeros(most, *features.shape[1:])
        padded[: len(features)] = features
        every = features.new_empty(self.size * most, *features.shape[1:])
        with self._together():
            dist.all_gather(list(every.split(most)), padded)
        if min(counts) == most:
            return every
        return torch.cat([piece[:count] for piece, count in zip(every.split(most), counts, strict=True)])

    @torch.no_grad()
    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same to the bit in each."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        with self._together():
            dist.all_reduce(total)
        return total

    @torch.no_grad()
    def most(self, value: Tensor) -> Tensor:
        """The largest over all processes, element by element."""
        if self.size == 1:
            return value
        found = value.detach().clone()
        with self._together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter], whole: Iterable[nn.Parameter] = ()) -> None:
        """Replaces every gradient by its sum over all processes, in fp32; the same to the bit in each.

        A gradient that is missing counts as zero. `whole`: those of `parameters` whose gradient every process has in
        full already, such as the temperature's of a loss over gathered features; the first process's counts.
        """
        if self.size == 1:
            return
        once = {id(parameter) for parameter in whole}
        for bucket in _buckets(parameters):
            parts = [
                torch.zeros_like(p, dtype=torch.float32)
                if p.grad is None or (self.rank and id(p) in once)
                else p.grad.float()
                for p in bucket
            ]
            flat = parts[0].contiguous() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
            with self._together():
                dist.all_reduce(flat)
            sums = flat.view(-1).split([p.numel() for p in bucket])
            for parameter, total in zip(bucket, sums, strict=True):
                total = total.view_as(parameter).to(parameter.dtype)
                parameter.grad = total if parameter.grad is None else parameter.grad.copy_(total)

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor], rank: int) -> None:
        """Fills tensors of one dtype with the values that they have in one of the processes, in place."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
            with self._together():
                dist.broadcast(flat, rank)
            if rank != self.rank:
                for tensor, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(values.view_as(tensor))

    @torch.no_grad()
    def send(self, tensor: Tensor, rank: int) -> Tensor:
        """Sends a tensor of the process `rank` to the first one, which gets it in place of its own, and returns it.

        These two processes call it; shapes and dtypes are the same.
        """
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)  # not every backend knows every dtype
        with self._together():
            if self.rank == rank:
                dist.send(flat, 0)
                return tensor
            dist.recv(flat, rank)
        return flat.view(tensor.dtype).view(tensor.shape)

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any of the processes. Waits patiently."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)])
        with self._together():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.orders)
        return bool(found.item())

    def broadcast_json(self, value: object = None) -> object:
        """What the first process says, in JSON; the others' `value` counts for nothing. Waits for it patiently."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == 0 else b""
        length = torch.tensor([len(text)])
        with self._together():
            dist.broadcast(length, 0, group=self.orders)
        data = torch.zeros(length.item(), dtype=torch.uint8)
        if self.rank == 0:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        with self._together():
            dist.broadcast(data, 0, group=self.orders)
        return json.loads(bytes(data.tolist()))

    def same(self, values: Mapping[str, object]) -> None:
        """Raises InputError, in all processes, unless all give the same values (in JSON); names those that differ."""
        if self.size == 1:
            return
        mine = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
        first = self.broadcast_json(mine)
        differing = sorted(name for name in mine.keys() | first.keys() if mine.get(name) != first.get(name))
        if self.any(bool(differing)):
            what = f"process {self.rank} has another {', '.join(differing)}" if differing else "another process differs"
            raise InputError(
                f"The {self.size} processes do not work at the same run: {what} than process 0; start all of them with "
                "the same command and the same files"
            )

    def barrier(self) -> None:
        """Waits patiently until all processes are here."""
        self.any(False)

    def close(self) -> None:
        """Ends what this process has with the others; nothing can be exchanged any more."""
        # what refers to gloo's groups keeps its threads, which abort a process that ends before them
        self.host = self.orders = None
        dist.destroy_process_group()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = str(error).strip().partition("\n")[0]
            raise Lost(
                f"process {self.rank} of {self.size} has lost another one, which has ended or hangs ({why}); what that "
                "says is why. The same command goes on from the last checkpoint"
            ) from error


ALONE = Group()


def started_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started by itself, and not by torchrun beside others."""
    return environment.get("WORLD_SIZE", "1") == "1"


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started by itself, or is the first of those that torchrun started."""
    return started_alone(environment) or environment.get("RANK", "0") == "0"


def local_device(device: torch.device, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of this process: of several GPUs the one with its number on this machine (LOCAL_RANK).

    Raises InputError where torchrun started more processes than there are GPUs.
    """
    if started_alone(environment) or device.type != "cuda":
        return device
    number = _number("LOCAL_RANK", environment)
    if number >= torch.cuda.device_count():
        raise InputError(
            f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many "
            "processes as there are GPUs (torchrun --nproc_per_node), or pass --device cpu"
        )
    return torch.device("cuda", number)


@contextlib.contextmanager
def from_environment(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Group]:
    """The group that torchrun started this process in, `ALONE` where it was started by itself.

    torchrun says so by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. GPUs talk by nccl, the rest by gloo.
    Raises InputError where they are not whole, and where the processes do not find each other.
    """
    if started_alone():
        yield ALONE
        return
    if not dist.is_available():
        raise InputError("this torch cannot train in several processes; start the command without torchrun")
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    device = local_device(device)
    cuda = device.type == "cuda"
    place = torch.cuda.device(device) if cuda else contextlib.nullcontext()  # nobody has memory on another's GPU
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=meet(store, rank, size, timeout),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if cuda else None,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"process {rank} of {size} does not find the others: {error}") from error
    group = Group(rank, size)
    try:
        group.host = dist.new_group(backend="gloo", timeout=timeout)
        group.orders = dist.new_group(backend="gloo", timeout=PATIENCE)
        with place:
            yield group
    finally:
        group.close()


def meet(store: dist.Store, rank: int, size: int, timeout: timedelta = TIMEOUT) -> dist.Store:
    """A part of a store that all processes have together, and that none has written to before it was restarted.

    torchrun keeps one store over all restarts where it is given an address (`static_tcp_rendezvous.py`), with the
    addresses of processes that are dead. Each life of the first process is a number. Another process takes part in the
    newest one, if it has not yet, and goes on once the first process has seen all of them there. Raises RuntimeError
    when they do not come in time.
    """
    if rank == 0:
        life = str(store.add("gmp/lives", 1))
        store.set("gmp/life", life)
        if size > 1:
            store.wait([f"gmp/{life}/{other}" for other in range(1, size)], timeout)
        store.set(f"gmp/{life}/whole", "")
        return dist.PrefixStore(f"gmp/{life}", store)
    until = time.monotonic() + timeout.total_seconds()
    tried = None
    while time.monotonic() < until:
        if store.check(["gmp/life"]) and (life := store.get("gmp/life").decode()) != tried:
            tried, fresh = life, store.add(f"gmp/{life}/{rank}", 1) == 1
        if tried and fresh and store.check([f"gmp/{tried}/whole"]):
            return dist.PrefixStore(f"gmp/{tried}", store)
        time.sleep(POLL)
    raise RuntimeError(f"the first process did not come, or not all of {size}, within {timeout}")


def _number(name: str, environment: Mapping[str, str] = os.environ) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise InputError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} and {name} is {environment.get(name, 'not set')}: start "
            "several processes by torchrun, which sets both, or unset WORLD_SIZE"
        ) from None


def _buckets(tensors: Iterable[Kind]) -> Iterator[list[Kind]]:
    """Neighbours that have `BUCKET` elements together at the most, or are one tensor that is larger."""
    bucket: list[Kind] = []
    elements = 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > BUCKET:
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
