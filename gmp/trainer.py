"""The training loop, written as a generator of events. It owns no thread, prints nothing and writes no file.

Between two events the training stands still at a step's boundary: the consumer may save it, measure it or walk away.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .clip import CLIP, MAX_LOGIT_SCALE, TextTower
from .config import Anchor, RepairConfig
from .data.captions import first_captions
from .data.images import PicturesAhead
from .data.sampler import Sampler
from .errors import InputError
from .geometric import is_mlp, to_geometric
from .gradients import clip_gradients, gradient_norms
from .losses import anchor, info_nce
from .measure import text_features
from .optim import parameter_groups, schedule, set_rates
from .tokenizer import lengths

SCALER_SKIPS = 3  # in a row, from which on they are an alarm in fp16: fewer are how a GradScaler finds its scale
MOST_SKIPS = 25  # steps in a row with non-finite gradients, after which a run has diverged


@dataclass(frozen=True)
class Pairs:
    """The training pairs. Captions of picture i are rows first[i] … first[i] + counts[i] - 1 of `ids`."""

    ids: Tensor  # (captions, context_length)
    counts: tuple[int, ...]  # captions per picture
    features: Tensor | None  # (pictures, embed_dim) of the locked vision tower
    pixels: PicturesAhead | None  # where the vision tower is trained

    def first(self) -> Tensor:
        return torch.tensor(first_captions(self.counts))


@dataclass
class Training:
    """Everything that changes while training."""

    clip: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sampler: Sampler
    total_steps: int
    step: int = 0  # optimizer steps taken or skipped
    skipped: int = 0
    skipped_in_a_row: int = 0

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps beside weights and optimizer. Schedule and random order follow from it."""
        return {
            "sampler": self.sampler.state(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: dict[str, object]) -> None:
        self.step = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.sampler.restore(state["sampler"])
        self.scaler.load_state_dict(state["scaler"])


def precision_of(name: str, device: torch.device) -> str:
    """`auto` is bf16 where a GPU computes in it, fp16 on other GPUs, fp32 on the CPU."""
    if name == "fp16" and device.type == "cpu":
        raise InputError("fp16 training needs a GPU; take fp32 or bf16 on the CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def set_up(clip: CLIP, config: RepairConfig, device: torch.device) -> torch.optim.Optimizer:
    """Chooses what trains, splits the MLPs into r and theta, in place, and makes the optimizer.

    Raises InputError for settings that this model or device cannot have.
    """
    precision_of(config.precision, device)
    clip.requires_grad_(True)
    if config.train == "text":
        clip.visual.requires_grad_(False)
    if config.geometric:
        clip.cpu()  # split in fp64, which some devices lack
        to_geometric(clip, lambda name: is_mlp(name) and (config.train == "both" or not name.startswith("visual.")))
    clip.to(device)
    lr = config.rate(clip.text_config.width)
    try:
        groups = parameter_groups(clip, lr, config.rates, config.weight_decay)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not groups:
        raise InputError("every parameter is frozen: no rate is above 0")
    return torch.optim.AdamW(groups, betas=config.betas)


def begin(
    clip: CLIP, optimizer: torch.optim.Optimizer, counts: Sequence[int], config: RepairConfig, device: torch.device
) -> Training:
    """A training at step 0; counts: captions of each picture. Raises InputError for fewer pairs than a step takes."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision_of(config.precision, device) == "fp16")
    sampler = Sampler(counts, config.step_pairs, config.seed)
    return Training(clip, optimizer, scaler, sampler, config.epochs * sampler.batches_per_epoch)


def train(
    training: Training,
    pairs: Pairs,
    teachers: dict[str, TextTower],
    config: RepairConfig,
    device: torch.device,
) -> Iterator[dict[str, object]]:
    """Takes the steps that are left; after each yields a `step` event, and an `alarm` event where one is due.

    Raises InputError when the run has diverged: nothing but non-finite gradients for `MOST_SKIPS` steps.
    """
    clip, optimizer, scaler = training.clip, training.optimizer, training.scaler
    named = {n: p for n, p in clip.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    precision = precision_of(config.precision, device)
    warmup = round(config.warmup * training.total_steps)
    first = pairs.first()
    while training.step < training.total_steps:
        start = time.monotonic()
        epoch = training.sampler.epoch
        pictures, choice = next(training.sampler)
        ids = pairs.ids[first[pictures] + choice].to(device)
        more = training.step + 1 < training.total_steps
        upcoming = next(copy.copy(training.sampler))[0] if more else pictures[:0]
        factor = schedule(config.schedule, training.step, training.total_steps, warmup)
        set_rates(optimizer, factor)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            losses = {"contrastive": _contrastive(clip, pairs, pictures, upcoming, ids, scaler, config, device)}
            losses |= _anchors(clip, teachers, ids[: config.anchor_captions], scaler, config)
        scaler.unscale_(optimizer)
        norms = gradient_norms(list(named), parameters)
        if norms.finite:
            clip_gradients(parameters, norms.total, config.clip_norm)
            scaler.step(optimizer)
            with torch.no_grad():
                clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            training.skipped_in_a_row = 0
        else:
            training.skipped += 1
            training.skipped_in_a_row += 1
        scaler.update()
        training.step += 1
        if training.skipped_in_a_row >= (SCALER_SKIPS if scaler.is_enabled() else 1):
            yield {
                "type": "alarm",
                "alarm": "non_finite",
                "step": training.step,
                "advice": f"gradients are not finite; the step was skipped ({training.skipped} so far). "
                "If it goes on, lower the learning rate or train in fp32.",
            }
        seconds = time.monotonic() - start
        yield {
            "type": "step",
            "step": training.step,
            "steps": training.total_steps,
            "epoch": epoch + 1,
            "loss": sum(losses.values()),
            "losses": losses,
            "lr": config.rate(clip.text_config.width) * factor,
            "logit_scale": clip.logit_scale.item(),
            "grad_norm": norms.total,
            "grad_norms": norms.layers,
            "skipped": training.skipped,
            "pairs_per_second": len(pictures) / seconds,
        }
        if training.skipped_in_a_row >= MOST_SKIPS:
            raise InputError(
                f"the run has diverged: the last {MOST_SKIPS} steps had non-finite gradients and were skipped; "
                "start one with a lower learning rate or in fp32"
            )


def _contrastive(
    clip: CLIP,
    pairs: Pairs,
    pictures: Tensor,
    upcoming: Tensor,  # pictures of the step after this one
    ids: Tensor,
    scaler: torch.amp.GradScaler,
    config: RepairConfig,
    device: torch.device,
) -> float:
    """InfoNCE over all pairs of the step, backward included; returns the loss.

    With accumulation the gradient is still that of the whole step, every pair a negative of every other (GradCache,
    arXiv 2101.06983): all features first, without a graph; the loss's gradient for each feature; then one batch after
    the other again, with that gradient pushed through it.
    """

    def texts(rows: slice) -> Tensor:
        chunk = ids[rows]
        return clip(chunk[:, : lengths(chunk).max()]).projected.float()

    def images(rows: slice, then: Tensor) -> Tensor:
        if pairs.features is not None:
            return pairs.features[pictures[rows]].to(device)
        pixels = pairs.pixels(pictures[rows].tolist())
        pairs.pixels.ahead(then.tolist())
        return clip.encode_image(pixels.to(device)).float()

    chunks = [slice(start, start + config.batch) for start in range(0, len(ids), config.batch)]
    later = [pictures[rows] for rows in chunks[1:]]
    upcoming = upcoming[: config.batch]
    if len(chunks) == 1:
        loss = info_nce(images(chunks[0], upcoming), texts(chunks[0]), clip.logit_scale, config.smoothing)
        scaler.scale(loss).backward()
        return loss.item()
    with torch.no_grad():
        # pictures are decoded in both passes: a step's pixels may be more than memory holds
        ahead = zip(chunks, [*later, pictures[chunks[0]]], strict=True)
        image_leaf = torch.cat([images(rows, then) for rows, then in ahead])
        text_leaf = torch.cat([texts(rows) for rows in chunks])
    image_leaf.requires_grad_(pairs.features is None)
    text_leaf.requires_grad_(True)
    loss = info_nce(image_leaf, text_leaf, clip.logit_scale, config.smoothing)
    scaler.scale(loss).backward()
    for rows, then in zip(chunks, [*later, upcoming], strict=True):
        texts(rows).backward(text_leaf.grad[rows])
        if pairs.features is None:
            images(rows, then).backward(image_leaf.grad[rows])
    return loss.item()


def _anchors(
    clip: CLIP,
    teachers: dict[str, TextTower],
    ids: Tensor,  # (captions, context_length): SDXL reads every row, also those behind end-of-text
    scaler: torch.amp.GradScaler,
    config: RepairConfig,
) -> dict[str, float]:
    """The anchors' weighted losses, backward included, by name."""
    if not config.anchors:
        return {}
    values: dict[str, float] = {}
    chunks = ids.split(config.batch)
    for chunk in chunks:
        share = len(chunk) / len(ids)
        points = _read(clip, chunk, config.anchors)
        with torch.no_grad():
            targets = {name: _read(tower, chunk, config.anchors) for name, tower in teachers.items()}
        losses = {
            str(a): share * a.weight * anchor(points[a.read_point], targets[a.teacher][a.read_point])
            for a in config.anchors
        }
        scaler.scale(sum(losses.values())).backward()
        for name, loss in losses.items():
            values[name] = values.get(name, 0.0) + loss.item()
    return values


def _read(tower: TextTower, ids: Tensor, anchors: Sequence[Anchor]) -> dict[str, Tensor]:
    """The read points that anchors name; without the last block where `penultimate` is all they need."""
    wanted = {anchor.read_point for anchor in anchors}
    if wanted == {"penultimate"}:
        return {"penultimate": tower.penultimate(ids)}
    points = tower(ids)
    return {name: getattr(points, name) for name in wanted}


@torch.no_grad()
def held_out_loss(
    clip: CLIP,
    image_features: Tensor,
    ids: Tensor,
    teachers: dict[str, TextTower],
    config: RepairConfig,
    batch: int = 256,
) -> dict[str, float]:
    """The trained objective on pairs that are not trained on: (N, embed_dim) pictures and (N, L) captions.

    It weighs alignment and anchors against each other as training does; the best checkpoint is chosen by it, since
    neither recall nor closeness to the original sees what the other does.
    """
    device = clip.logit_scale.device
    losses = {
        "contrastive": info_nce(image_features.to(device), text_features(clip, ids).to(device), clip.logit_scale).item()
    }
    for one in config.anchors:
        total = 0.0
        for chunk in ids[:batch].split(64):
            chunk = chunk.to(device)
            mine, theirs = (_read(tower, chunk, (one,)) for tower in (clip, teachers[one.teacher]))
            total += len(chunk) * anchor(mine[one.read_point], theirs[one.read_point]).item()
        losses[str(one)] = one.weight * total / min(batch, len(ids))
    if not all(math.isfinite(value) for value in losses.values()):
        losses = {name: math.inf for name in losses}
    return losses | {"loss": sum(losses.values())}
