"""One contender's turn, in a process of its own."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gmp.clip import VisionTower, load
from gmp.data.images import load_batches
from gmp.events import finish
from gmp.features import embed_files
from gmp.tokenizer import lengths

from . import arithmetic, gradients, hugging_face, openclip, ours, seed
from .task import Task, captions, picture_paths, weights

ROUND = 10  # steps; every tenth looks at the size of the updates

STEPS: dict[str, Callable[[Task], Iterator[int]]] = {
    "seed": seed.steps,
    "transformers": hugging_face.steps,
    "open_clip": openclip.steps,
    "both": ours.both,
    "cached": ours.cached,
    "cached_small": ours.cached,
    "cached_anchor": lambda task: ours.cached(task, anchored=True),
}
VISION = {"seed": "trained", "both": "trained", "transformers": "frozen", "open_clip": "frozen"}  # else cached


def take(task: Task) -> dict[str, float]:
    """The figures of this turn, by name."""
    if task.contender == "gradients":
        return gradients.check(task)
    if task.contender == "embed":
        return embed(task)
    if task.contender == "watching":
        return watching(task)
    return time_steps(task)


def time_steps(task: Task) -> dict[str, float]:
    """Steps for `task.seconds` after one that warms up; what they need, and what they take."""
    steps = STEPS[task.contender](task)
    next(steps)
    pairs, taken = 0, 0
    arithmetic.synchronize(task.device)
    start = time.perf_counter()
    while not taken or time.perf_counter() < start + task.seconds:
        pairs += next(steps)
        taken += 1
    arithmetic.synchronize(task.device)
    seconds = (time.perf_counter() - start) / taken
    memory = peak_memory(task.device)
    steps.close()
    work = arithmetic.step(
        task.shape,
        lengths(captions(task.pairs, task.tokens)),
        VISION.get(task.contender, "cached"),
        anchored=task.contender == "cached_anchor",
    )
    ideal, shape = 0.0, task.shape
    for tower, amount, tokens in (
        (shape.text, work.text, work.text_tokens),
        (shape.vision, work.vision, work.vision_tokens),
    ):
        if amount:
            ideal += amount / arithmetic.matmul_rate(tower, tokens, task.device, task.precision)
    return {
        "pairs": pairs / taken,
        "pairs_per_second": pairs / taken / seconds,
        "seconds_per_step": seconds,
        "peak_memory": memory,
        "gflop_per_step": work.total / 1e9,
        "gflops_of_matmul": work.total / ideal / 1e9,
        "share_of_matmul_rate": ideal / seconds,
    }


def embed(task: Task) -> dict[str, float]:
    """Pictures per second from JPEG files to features, as a run embeds them."""
    state = {n.removeprefix("visual."): t for n, t in weights(task).items() if n.startswith("visual.")}
    tower = load(VisionTower, task.shape.vision, state).requires_grad_(False).to(task.device)
    paths = picture_paths(task)
    names, keys = [path.name for path in paths], [f"{number:064x}" for number in range(len(paths))]
    rates = []
    for count in (min(4, len(paths)), len(paths)):  # the first few warm up
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            finish(
                embed_files(tower, paths[0].parent, names[:count], keys[:count], Path(cache), precision=task.precision)
            )
            rates.append(count / (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in load_batches(paths, task.shape.vision.image_size, 64, torch.get_num_threads()):
        pass
    decoded = len(paths) / (time.perf_counter() - start)
    return {
        "pictures_per_second": rates[-1],
        "decoded_per_second_and_core": decoded / torch.get_num_threads(),
        "peak_memory": peak_memory(task.device),
    }


def watching(task: Task) -> dict[str, float]:
    """A step in GmP form with statistics over one with plain weights and without; the two take turns."""
    plain = ours.cached(task, geometric=(), statistics=False)
    watched = ours.cached(task)
    for _ in range(2):
        next(plain), next(watched)
    ratios, start = [], time.perf_counter()
    while not ratios or time.perf_counter() < start + task.seconds:
        took = [(_seconds(plain, task.device), _seconds(watched, task.device)) for _ in range(ROUND)]
        without, with_both = (sum(column) for column in zip(*took, strict=True))
        ratios.append(with_both / without)
    return {"telemetry_and_gmp_over_plain": statistics.median(ratios)}


def _seconds(steps: Iterator[int], device: str) -> float:
    start = time.perf_counter()
    next(steps)
    arithmetic.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: str) -> float:
    """GB that this process has held at the most: of the card, or of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
