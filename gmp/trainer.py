"""The training loop, written as a generator of events. It owns no thread, prints nothing and writes no file.

Between two events the training stands still at a step's boundary: the consumer may save it, measure it or walk away.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .clip import CLIP, MAX_LOGIT_SCALE, TextTower, set_checkpointing
from .config import Anchor, RepairConfig
from .data.captions import first_captions
from .data.images import PicturesAhead
from .data.sampler import Sampler
from .errors import InputError
from .geometric import is_mlp, to_geometric
from .gradients import clip_gradients, norms_by_layer, share_of_non_finite, squares
from .losses import anchor, info_nce, mean_cosine
from .measure import text_features
from .memory import is_out_of_memory, release, used
from .optim import parameter_groups, prepare, schedule, set_rates
from .tokenizer import lengths

UPDATES_EVERY = 10  # steps between two looks at the size of the updates, which takes a copy of the weights
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
    micro_batch: int  # pairs of one forward pass; less than the settings' batch where that did not fit into memory
    step: int = 0  # optimizer steps taken or skipped
    skipped: int = 0
    skipped_in_a_row: int = 0

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps beside weights and optimizer. Schedule and random order follow from it."""
        return {
            "sampler": self.sampler.state(),
            "scaler": self.scaler.state_dict(),
            "micro_batch": self.micro_batch,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def restore(self, state: dict[str, object]) -> None:
        self.step = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.micro_batch = state.get("micro_batch", self.micro_batch)
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
        clip.to("meta" if device.type == "meta" else "cpu")  # split in fp64, which some devices lack
        to_geometric(clip, lambda name: is_mlp(name) and (config.train == "both" or not name.startswith("visual.")))
    clip.to(device)
    lr = config.rate(clip.text_config.width)
    try:
        groups = parameter_groups(clip, lr, config.rates, config.weight_decay)
    except ValueError as error:
        raise InputError(str(error)) from None
    if not groups:
        raise InputError("every parameter is frozen: no rate is above 0")
    set_checkpointing(clip, config.checkpointing)
    # fused needs no memory of its own while it steps, so that a step never ends half-way for lack of it
    optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=device.type == "cuda")
    return prepare(optimizer)


def begin(
    clip: CLIP, optimizer: torch.optim.Optimizer, counts: Sequence[int], config: RepairConfig, device: torch.device
) -> Training:
    """A training at step 0; counts: captions of each picture. Raises InputError for fewer pairs than a step takes."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision_of(config.precision, device) == "fp16")
    sampler = Sampler(counts, config.step_pairs, config.seed)
    return Training(clip, optimizer, scaler, sampler, config.epochs * sampler.batches_per_epoch, config.batch)


def train(
    training: Training,
    pairs: Pairs,
    teachers: dict[str, TextTower],
    config: RepairConfig,
    device: torch.device,
    statistics: bool = True,
) -> Iterator[dict[str, object]]:
    """Takes the steps that are left; after each yields a `step` event.

    A step that does not fit into memory is taken again in smaller pieces, after an `out_of_memory` event. `statistics`:
    also say how large gradients and updates are, layer by layer. Raises InputError when the run has diverged: nothing
    but non-finite gradients for `MOST_SKIPS` steps.
    """
    clip, optimizer = training.clip, training.optimizer
    named = {n: p for n, p in clip.named_parameters() if p.requires_grad}
    warmup = round(config.warmup * training.total_steps)
    first = pairs.first()
    while training.step < training.total_steps:
        start = time.monotonic()
        epoch = training.sampler.epoch
        pictures, choice = next(training.sampler)
        ids = pairs.ids[first[pictures] + choice]
        tokens = lengths(ids).sum().item()
        more = training.step + 1 < training.total_steps
        upcoming = next(copy.copy(training.sampler))[0] if more else pictures[:0]
        batch = _Batch(pictures, upcoming, ids.to(device))
        factor = schedule(config.schedule, training.step, training.total_steps, warmup)
        set_rates(optimizer, factor)
        while (figures := _backward(training, pairs, teachers, batch, config, device)) is None:
            training.micro_batch = (training.micro_batch + 1) // 2
            optimizer.zero_grad(set_to_none=True)
            release(device)
            yield {"type": "out_of_memory", "step": training.step, "batch": training.micro_batch}
        looks = statistics and (training.step == 0 or (training.step + 1) % UPDATES_EVERY == 0)
        taken = _step(training, named, figures, config, looks)
        training.step += 1
        seconds = time.monotonic() - start
        yield {
            "type": "step",
            "step": training.step,
            "steps": training.total_steps,
            "epoch": epoch + 1,
            "loss": sum(taken.losses.values()),
            "losses": taken.losses,
            "lr": config.rate(clip.text_config.width) * factor,
            "lrs": {f"{group['factor']:g}": group["lr"] for group in optimizer.param_groups},
            "logit_scale": taken.logit_scale,
            "text_cosine": taken.text_cosine,
            "grad_norm": taken.grad_norm,
            "grad_norms": taken.grad_norms if statistics else {},
            "non_finite": taken.non_finite,
            "skipped": training.skipped,
            "pairs_per_second": len(pictures) / seconds,
            "tokens_per_second": tokens / seconds,
            "memory": figures.memory,
        } | ({"update_ratios": taken.update_ratios} if taken.update_ratios else {})
        if training.skipped_in_a_row >= MOST_SKIPS:
            raise InputError(
                f"the run has diverged: the last {MOST_SKIPS} steps had non-finite gradients and were skipped; "
                "start one with a lower learning rate or in fp32"
            )


@dataclass(frozen=True)
class _Batch:
    """The pairs of one step."""

    pictures: Tensor  # (B,)
    upcoming: Tensor  # pictures of the step after this one
    ids: Tensor  # (B, context_length), on the device


@dataclass(frozen=True)
class _Figures:
    """What a step computed, still on the device: reading a number makes the host wait for it."""

    losses: dict[str, Tensor]
    text_cosine: Tensor
    memory: int  # bytes, before the backward pass frees what it needed


@dataclass(frozen=True)
class _Taken:
    """The numbers of a step that was taken, or skipped."""

    losses: dict[str, float]
    text_cosine: float
    logit_scale: float
    grad_norm: float
    grad_norms: dict[str, float]  # by `layer_and_role`
    non_finite: float  # share of the gradients' elements
    update_ratios: dict[str, float]  # by `layer_and_role`


def _backward(
    training: Training,
    pairs: Pairs,
    teachers: dict[str, TextTower],
    batch: _Batch,
    config: RepairConfig,
    device: torch.device,
) -> _Figures | None:
    """Losses and gradients of a step, None where memory was short: the gradients are then to be thrown away."""
    training.optimizer.zero_grad(set_to_none=True)
    try:
        with autocast(device, precision_of(config.precision, device)):
            figures = _contrastive(training, pairs, batch, config, device)
            losses = _anchors(training, teachers, batch.ids[: config.anchor_captions], config)
    except RuntimeError as error:
        if training.micro_batch == 1 or not is_out_of_memory(error):
            raise
        return None
    return replace(figures, losses=figures.losses | losses)


def _step(
    training: Training, named: dict[str, nn.Parameter], figures: _Figures, config: RepairConfig, looks: bool
) -> _Taken:
    """The optimizer's step, skipped where gradients are not finite; all numbers come over in one copy.

    looks: also at the size of the updates.
    """
    clip, scaler = training.clip, training.scaler
    scaler.unscale_(training.optimizer)
    found = {name: p for name, p in named.items() if p.grad is not None}
    parameters = list(found.values())
    scalars = torch.stack([*figures.losses.values(), figures.text_cosine, clip.logit_scale.detach()]).float()
    numbers = torch.cat([squares([p.grad for p in parameters]), scalars]).tolist()
    of_grads, values = numbers[: len(found)], numbers[len(found) :]
    grad_norm, finite = math.sqrt(sum(of_grads)), math.isfinite(sum(of_grads))
    ratios, scale = {}, values[-1]
    if finite:
        clip_gradients(parameters, grad_norm, config.clip_norm)
        before = _copies(parameters) if looks else None
        scaler.step(training.optimizer)
        with torch.no_grad():
            clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if clip.logit_scale.requires_grad:
            scale = clip.logit_scale.item()
        training.skipped_in_a_row = 0
        if before is not None:
            ratios = _update_ratios(list(found), before, parameters)
    else:
        training.skipped += 1
        training.skipped_in_a_row += 1
    scaler.update()
    return _Taken(
        losses=dict(zip(figures.losses, values[:-2], strict=True)),
        text_cosine=values[-2],
        logit_scale=scale,
        grad_norm=grad_norm,
        grad_norms=norms_by_layer(list(found), of_grads),
        non_finite=0.0 if finite else share_of_non_finite([p.grad for p in parameters]),
        update_ratios=ratios,
    )


@torch.no_grad()
def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """The parameters before a step, None where there is no memory for them."""
    try:
        return [p.clone() for p in parameters]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


@torch.no_grad()
def _update_ratios(names: Sequence[str], before: list[Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """‖update‖ / ‖weight‖ by layer and role; `before` is used up."""
    weights = squares(before)
    torch._foreach_sub_(before, list(parameters))
    moved, stood = torch.stack([squares(before), weights]).tolist()
    moved, stood = norms_by_layer(names, moved), norms_by_layer(names, stood)
    return {key: moved[key] / stood[key] for key in moved if stood[key] > 0}


def _contrastive(
    training: Training, pairs: Pairs, batch: _Batch, config: RepairConfig, device: torch.device
) -> _Figures:
    """InfoNCE over all pairs of the step, backward included.

    In several pieces the gradient is still that of the whole step, every pair a negative of every other (GradCache,
    arXiv 2101.06983): all features first, without a graph; the loss's gradient for each feature; then one piece after
    the other again, with that gradient pushed through it.
    """
    clip, scaler, ids = training.clip, training.scaler, batch.ids

    def texts(rows: slice) -> Tensor:
        chunk = ids[rows]
        return clip(chunk[:, : lengths(chunk).max()]).projected.float()

    def images(rows: slice, then: Tensor) -> Tensor:
        if pairs.features is not None:
            return pairs.features[batch.pictures[rows]].to(device)
        pixels = pairs.pixels(batch.pictures[rows].tolist())
        pairs.pixels.ahead(then.tolist())
        return clip.encode_image(pixels.to(device)).float()

    size = training.micro_batch
    chunks = [slice(start, start + size) for start in range(0, len(ids), size)]
    later = [batch.pictures[rows] for rows in chunks[1:]]
    upcoming = batch.upcoming[:size]
    if len(chunks) == 1:
        features = texts(chunks[0])
        loss = info_nce(images(chunks[0], upcoming), features, clip.logit_scale, config.smoothing)
        memory = used(device)
        scaler.scale(loss).backward()
        return _Figures({"contrastive": loss.detach()}, mean_cosine(features.detach()), memory)
    with torch.no_grad():
        # pictures are decoded in both passes: a step's pixels may be more than memory holds
        ahead = zip(chunks, [*later, batch.pictures[chunks[0]]], strict=True)
        image_leaf = torch.cat([images(rows, then) for rows, then in ahead])
        text_leaf = torch.cat([texts(rows) for rows in chunks])
    image_leaf.requires_grad_(pairs.features is None)
    text_leaf.requires_grad_(True)
    loss = info_nce(image_leaf, text_leaf, clip.logit_scale, config.smoothing)
    scaler.scale(loss).backward()
    memory = 0
    for rows, then in zip(chunks, [*later, upcoming], strict=True):
        features = texts(rows)
        memory = max(memory, used(device))
        features.backward(text_leaf.grad[rows])
        if pairs.features is None:
            images(rows, then).backward(image_leaf.grad[rows])
    return _Figures({"contrastive": loss.detach()}, mean_cosine(text_leaf.detach()), memory)


def _anchors(
    training: Training,
    teachers: dict[str, TextTower],
    ids: Tensor,  # (captions, context_length): SDXL reads every row, also those behind end-of-text
    config: RepairConfig,
) -> dict[str, Tensor]:
    """The anchors' weighted losses, backward included, by name."""
    if not config.anchors:
        return {}
    values: dict[str, Tensor] = {}
    for chunk in ids.split(training.micro_batch):
        share = len(chunk) / len(ids)
        points = _read(training.clip, chunk, config.anchors)
        with torch.no_grad():
            targets = {name: _read(tower, chunk, config.anchors) for name, tower in teachers.items()}
        losses = {
            str(a): share * a.weight * anchor(points[a.read_point], targets[a.teacher][a.read_point])
            for a in config.anchors
        }
        training.scaler.scale(sum(losses.values())).backward()
        for name, loss in losses.items():
            values[name] = values.get(name, 0.0) + loss.detach()
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
