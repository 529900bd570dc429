"""The training loop, written as a generator of events. It owns no thread, prints nothing and writes no file.

Between two events the training stands still at a step's boundary: the consumer may save it, measure it or walk away.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .clip import CLIP, DTYPES, MAX_LOGIT_SCALE, TextTower, precision, set_checkpointing
from .config import RepairConfig
from .data.sampler import Sampler
from .data.shard_sampler import ShardSampler
from .distributed import ALONE, Group
from .ema import Ema
from .errors import InputError
from .fsdp import Shards
from .geometric import to_sphere
from .gradients import clip_gradients, clip_rows, norms_by_layer, share_of_non_finite, squares
from .locks import choose, unfrozen
from .memory import is_out_of_memory, release
from .neurons import check_neurons, scaled
from .optim import make_optimizer, momentum, parameter_groups, schedule, set_momentum, set_rates
from .pairs import Batch, Pairs
from .step import Figures, anchor_captions, anchor_step, contrastive_step
from .tokenizer import lengths

UPDATES_EVERY = 10  # steps between two looks at the size of the updates, which takes a copy of the weights
MOST_SKIPS = 25  # steps in a row with non-finite gradients, after which a run has diverged


@dataclass
class Training:
    """Everything that changes while training."""

    clip: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sampler: Sampler | ShardSampler
    total_steps: int
    micro_batch: int  # pairs of one forward pass; less than the settings' batch where that did not fit into memory
    step: int = 0  # optimizer steps taken or skipped
    skipped: int = 0
    skipped_in_a_row: int = 0
    shards: Shards = field(default_factory=Shards)  # what of the CLIP is shared out over processes
    ema: Ema | None = None  # the mean of its weights, where that is measured and given

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps beside weights and optimizer. Schedule and random order follow from it."""
        return {
            "sampler": self.sampler.state(),
            "scaler": self.scaler.state_dict(),
            "micro_batch": self.micro_batch,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        } | ({"averaged": self.ema.updates} if self.ema else {})

    def restore(self, state: dict[str, object]) -> None:
        self.step = state["step"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.micro_batch = state.get("micro_batch", self.micro_batch)
        self.sampler.restore(state["sampler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.updates = state["averaged"]


def precision_of(name: str, device: torch.device) -> str:
    """`auto` is bf16 where a GPU computes in it, fp16 on other GPUs, fp32 on the CPU."""
    if name == "fp16" and device.type == "cpu":
        raise InputError("fp16 training needs a GPU; take fp32 or bf16 on the CPU")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def set_up(
    clip: CLIP, config: RepairConfig, device: torch.device, shards: Shards | None = None
) -> torch.optim.Optimizer:
    """Chooses what trains, splits layers into r and theta, in place, and makes the optimizer.

    shards: share the weights out before there are moments, and are about this CLIP from then on.
    Raises InputError for settings that this model or device cannot have.
    """
    precision_of(config.precision, device)
    check_neurons(clip.config, config.neurons)
    if config.geometric:
        clip.to("meta" if device.type == "meta" else "cpu")  # split in fp64, which some devices lack
    choose(clip, config)
    if not shards:
        clip.to(device)
    lr = config.rate(clip.text_config.width)
    try:
        groups = parameter_groups(
            clip,
            lr,
            config.rates,
            config.weight_decay,
            layer_decay=config.layer_decay,
            decay=config.decay,
            by_block=config.unfreeze is not None and config.optimizer == "adabelief",
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    if not groups:
        raise InputError("every parameter is frozen: no rate is above 0")
    set_checkpointing(clip, config.checkpointing)
    if shards:
        shards.share_out(clip, groups, device, config.train == "both")
    return make_optimizer(
        groups, config.betas, device, config.optimizer_state, config.seed, kind=config.optimizer, eps=config.eps
    )


def begin(
    clip: CLIP,
    optimizer: torch.optim.Optimizer,
    counts: Sequence[int],
    config: RepairConfig,
    device: torch.device,
    sampler: ShardSampler | None = None,
    shards: Shards | None = None,
) -> Training:
    """A training at step 0; counts: captions of each picture; sampler: that of shards, where the pictures lie in such.

    shards: as `set_up` was given.
    Raises InputError for fewer pairs than a step takes.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=precision_of(config.precision, device) == "fp16")
    sampler = sampler or Sampler(counts, config.step_pairs, config.seed)
    steps = config.epochs * sampler.batches_per_epoch
    training = Training(clip, optimizer, scaler, sampler, steps, config.batch, shards=shards or Shards())
    if config.ema:
        training.ema = Ema(clip, optimizer, config.ema, training.shards)
    return training


def train(
    training: Training,
    pairs: Pairs,
    teachers: dict[str, TextTower],
    config: RepairConfig,
    device: torch.device,
    statistics: bool = True,
    group: Group = ALONE,
    concepts: Tensor | None = None,
) -> Iterator[dict[str, object]]:
    """Takes the steps that are left; after each yields a `step` event.

    A step that does not fit into memory is taken again in smaller pieces, after an `out_of_memory` event. `statistics`:
    also say how large gradients and updates are, layer by layer. group: the processes that share the pairs of a step;
    all of them yield the same events, but for times and memory. concepts: (captions, context_length), what anchors on
    concepts read. Raises InputError when the run has diverged: nothing but non-finite gradients for `MOST_SKIPS` steps.
    """
    clip, optimizer = training.clip, training.optimizer
    named = {n: p for n, p in training.shards.here(clip).items() if p.requires_grad}
    while training.step < training.total_steps:
        start = time.monotonic()
        epoch = training.sampler.epoch
        pictures, choice = next(training.sampler)
        more = training.step + 1 < training.total_steps
        upcoming = next(copy.copy(training.sampler))[0] if more else pictures[:0]
        batch = pairs.batch(pictures, choice, upcoming, training.step)
        tokens = lengths(batch.ids).sum().item()
        factor = _set_pace(training, config)
        figures = None
        while figures is None:
            with unfrozen(clip, config, training.step, training.total_steps):
                figures = _backward(training, pairs, teachers, batch, config, device, group, concepts)
            if figures is None:
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
            "lrs": {f"{group['factor']:g}": float(group["lr"]) for group in optimizer.param_groups},
            "logit_scale": taken.logit_scale,
            "text_cosine": taken.text_cosine,
            "grad_norm": taken.grad_norm,
            "grad_norms": taken.grad_norms if statistics else {},
            "non_finite": taken.non_finite,
            "skipped": training.skipped,
            "masked": figures.masked,
            "pairs_per_second": len(pictures) / seconds,
            "tokens_per_second": tokens / seconds,
            "memory": figures.memory,
        } | ({"update_ratios": taken.update_ratios} if taken.update_ratios else {})
        if training.skipped_in_a_row >= MOST_SKIPS:
            raise InputError(
                f"the run has diverged: the last {MOST_SKIPS} steps had non-finite gradients and were skipped; "
                "start one with a lower learning rate or in fp32"
            )


def _set_pace(training: Training, config: RepairConfig) -> float:
    """Sets the rates of the step that comes, and its first beta where that cycles; what the rates are multiplied by."""
    total = round(config.schedule_length * training.total_steps)
    at = config.schedule, training.step, total, config.warmup * total
    if config.cycle_momentum:
        set_momentum(training.optimizer, momentum(*at))
    factor = schedule(*at)
    set_rates(training.optimizer, factor)
    return factor


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
    batch: Batch,
    config: RepairConfig,
    device: torch.device,
    group: Group,
    concepts: Tensor | None = None,
) -> Figures | None:
    """Losses and gradients of a step, None where memory was short: the gradients are then to be thrown away."""
    training.optimizer.zero_grad(set_to_none=True)
    dtype = DTYPES[precision_of(config.precision, device)]
    clip, scaler, size = training.clip, training.scaler, training.micro_batch
    progress = training.step / max(1, training.total_steps - 1)
    try:
        with precision(dtype, clip, *teachers.values()):
            with scaled(clip, config.neurons):
                figures = contrastive_step(clip, pairs, batch, config, scaler, size, device, group)
            captions = anchor_captions(batch, concepts, config, training.step)
            losses = anchor_step(clip, teachers, captions, config, progress, scaler, size, device, group)
    except RuntimeError as error:
        if size == 1 or group.size > 1 or not is_out_of_memory(error):
            raise  # processes that wait for each other cannot take a step again alone
        return None
    training.shards.take_gradients()
    shared = training.shards.parts
    summed = [p for n, p in clip.named_parameters() if p.requires_grad and n not in shared]
    group.sum_gradients(summed, whole=[clip.logit_scale])
    return replace(figures, losses=figures.losses | losses)


def _step(
    training: Training, named: dict[str, nn.Parameter], figures: Figures, config: RepairConfig, looks: bool
) -> _Taken:
    """The optimizer's step, skipped where gradients are not finite; all numbers come over in one copy.

    looks: also at the size of the updates.
    """
    clip, scaler, shards = training.clip, training.scaler, training.shards
    scaler.unscale_(training.optimizer)
    found = {name: p for name, p in named.items() if p.grad is not None}
    names, parameters = list(found), list(found.values())
    grads = [p.grad for p in parameters]
    scalars = torch.stack([*figures.losses.values(), figures.text_cosine, clip.logit_scale.detach()]).float()
    squared = shards.sum(names, squares(grads))
    numbers = torch.cat([squared, scalars]).tolist()
    of_grads, values = numbers[: len(found)], numbers[len(found) :]
    grad_norm, finite = math.sqrt(sum(of_grads)), math.isfinite(sum(of_grads))
    ratios, scale = {}, values[-1]
    if finite:
        clip_gradients(parameters, grad_norm, config.clip_norm)
        clip_rows(names, parameters, config.clip_adaptive, shards.sum)
        before = _copies(parameters) if looks else None
        scaler.step(training.optimizer)
        to_sphere(clip, found)
        with torch.no_grad():
            clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if clip.logit_scale.requires_grad:
            scale = clip.logit_scale.item()
        training.skipped_in_a_row = 0
        if training.ema:
            training.ema.update()
        if looks and not shards.group.any(before is None):  # they are summed by all processes or by none
            ratios = _update_ratios(names, before, parameters, shards)
    else:
        training.skipped += 1
        training.skipped_in_a_row += 1
    scaler.update()
    return _Taken(
        losses=dict(zip(figures.losses, values[:-2], strict=True)),
        text_cosine=values[-2],
        logit_scale=scale,
        grad_norm=grad_norm,
        grad_norms=norms_by_layer(names, of_grads),
        non_finite=0.0 if finite else share_of_non_finite(grads, lambda counts: shards.sum(names, counts)),
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
def _update_ratios(
    names: Sequence[str], before: list[Tensor], parameters: Sequence[nn.Parameter], shards: Shards
) -> dict[str, float]:
    """‖update‖ / ‖weight‖ by layer and role; `before` is used up."""
    weights = squares(before)
    torch._foreach_sub_(before, list(parameters))
    moved, stood = shards.sum(names, torch.stack([squares(before), weights])).tolist()
    moved, stood = norms_by_layer(names, moved), norms_by_layer(names, stood)
    return {key: moved[key] / stood[key] for key in moved if stood[key] > 0}
