"""Alarms: what in a run's own numbers says that something is wrong, and what to do then.

Every alarm compares a run with its own past, since no number is right for all encoders, and is slow to speak: an alarm
that cries wolf is not read. It is raised once, after its condition has held for some steps in a row, and taken back
once a stricter limit has been kept for longer than that; between the two limits it stays as it is.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .errors import some
from .events import Event

CLAMP = math.log(100)  # of logit_scale, as CLIP was trained (arXiv 2103.00020, section 2.5)
ALARMS = ("non_finite", "exploding", "vanishing", "diverging", "collapsing", "overfitting", "clamped", "slow")
RECALLS = ("recall_at_1_text_to_image", "recall_at_1_image_to_text")
CLEARED = {
    "non_finite": "all gradients are finite again",
    "exploding": "gradients are no longer far above their usual size (norm {value:.3g})",
    "vanishing": "gradients no longer vanish (norm {value:.3g})",
    "diverging": "the loss has come back down ({value:.3g})",
    "collapsing": "captions are told apart again (mean cosine {value:.3g})",
    "overfitting": "held-out recall has come back up ({value:.1%})",
    "clamped": "the contrast (logit_scale) has left its limit ({value:.3f})",
    "slow": "training is about as fast as it was ({value:.3g} pairs per second)",
}
_WHOLE = "the whole encoder"
_BLOCK = re.compile(r"^((?:text|vision)\.\d+)\.")


@dataclass(frozen=True)
class Thresholds:
    """When alarms speak. Steps, and of overfitting measurements, are counted in a row."""

    clear_steps: int = 20  # that an alarm's condition must be absent before it is taken back

    exploding_norm: float = 1e3  # of all gradients; the limit of zer0int/CLIP-fine-tune
    exploding_times: float = 20.0  # the run's usual norm, where that is known
    exploding_least: float = 0.1  # of the norm at the start: below it, 20 times next to nothing is no explosion
    exploding_steps: int = 5  # single bursts are common, and clipped
    usual_steps: int = 200  # finite norms, whose median is the usual one
    usual_after: int = 50  # finite norms from which on it is known: rates warm up before

    vanishing_norm: float = 1e-5  # of all gradients, or of all roles of a block; zer0int/CLIP-fine-tune's limit too
    vanishing_share: float = 1e-3  # of the usual norm
    vanishing_steps: int = 20
    learned: float = 0.1  # of the loss at the start: below it, gradients are small because little is left to learn

    loss_steps: int = 20  # horizon of the smoothed loss
    start_steps: int = 10  # whose median is how loss and captions were at the start
    diverging_share: float = 0.5  # of the lowest smoothed loss: that much above it, and the two margins below
    diverging_noise: float = 3.0  # standard deviations of the loss from step to step
    diverging_least: float = 0.02  # of the loss at the start: a loss near 0 doubles for nothing
    diverging_after: int = 20  # steps, before which nothing diverges
    diverging_steps: int = 20
    noise_steps: int = 50  # that the noise of the loss is estimated from

    collapsing_cosine: float = 0.97  # between captions; CLIP's own lie around 0.5 to 0.7
    collapsing_share: float = 0.25  # of what 1 - cosine was at the start
    collapsing_steps: int = 10

    overfitting_fall: float = 0.02  # of the mean recall@1, or its standard error if that is more
    overfitting_least: int = 20  # held-out pictures; fewer say nothing
    overfitting_measurements: int = 2

    clamped_near: float = 1e-3  # of logit_scale, from its clamp
    clamped_from: float = 0.05  # below its clamp, where the run began
    clamped_steps: int = 20

    slow_share: float = 0.5  # of the run's best speed
    slow_window: int = 20  # steps, whose median is the speed
    slow_after: int = 40  # counted steps
    slow_uncounted: int = 3  # steps after a pause or a lack of memory
    slow_steps: int = 20


DEFAULT = Thresholds()


class Alarms:
    """The alarms of one run, fed with its events in order. No clock, no files, no random numbers.

    patience: steps in a row with non-finite gradients that are an alarm; 1 in fp32 and bf16, 3 in fp16, where a
    GradScaler skips some steps while it looks for its scale.

    A run that goes on is given the events it has recorded, without those that its `resume` takes back, through the
    same `hear`; the answers are thrown away. A number that is missing, or null, is not known: it counts for nothing
    and ends no row. Only a `grad_norm` that is there and null stands for gradients that are not finite.
    """

    def __init__(self, patience: int = 1, thresholds: Thresholds = DEFAULT):
        t = self._t = thresholds
        clear = t.clear_steps
        self._latches = {
            "non_finite": _Latch(patience, clear),
            "exploding": _Latch(t.exploding_steps, clear),
            "vanishing": _Latch(1, clear),  # counts by itself, each block on its own
            "diverging": _Latch(t.diverging_steps, clear),
            "collapsing": _Latch(t.collapsing_steps, clear),
            "overfitting": _Latch(t.overfitting_measurements, t.overfitting_measurements),
            "clamped": _Latch(t.clamped_steps, clear),
            "slow": _Latch(t.slow_steps, clear),
        }
        self._loss = _Loss(t)
        self._norms = _Median(t.usual_steps)
        self._first_norms = _Median(t.usual_after)
        self._faint: dict[str, int] = {}  # block -> steps in a row with next to no gradient
        self._first_spreads = _Median(t.start_steps)
        self._first_scale: float | None = None
        self._speeds = _Median(t.slow_window)
        self._counted = 0
        self._uncounted = 0  # steps to come whose speed says nothing
        self._best_speed = 0.0
        self._best: tuple[float, int | None, float | None] | None = None  # recall, step, smoothed loss
        self._measured: int | None = None  # step

    @property
    def standing(self) -> tuple[str, ...]:
        """Names of the alarms that stand now, in the order of `ALARMS`."""
        return tuple(name for name in ALARMS if self._latches[name].stands)

    def hear(self, event: Event) -> list[Event]:
        """The `alarm` events, raised or taken back, that an event of the run sets off."""
        match event.get("type"):
            case "step":
                return self._step(event)
            case "measure":
                return self._overfitting(event)
            case "resume" | "resumed" | "out_of_memory":
                self._uncounted = self._t.slow_uncounted
        return []

    def _step(self, event: Event) -> list[Event]:
        self._loss.hear(_number(event.get("loss")))
        norm = _number(event.get("grad_norm"))
        found = self._non_finite(event, norm)
        if norm is not None:
            found += self._exploding(event, norm) + self._vanishing(event, norm)
        return found + self._diverging(event) + self._collapsing(event) + self._clamped(event) + self._slow(event)

    def _turn(
        self, name: str, event: Event, bad: bool, good: bool, value: float | None, advice: Callable[[], str]
    ) -> list[Event]:
        """The alarm's event, if this reading raises it or takes it back; bad and good: beyond which of its limits."""
        raised = self._latches[name].turn(bad, good)
        if raised is None:
            return []
        text = advice() if raised else CLEARED[name].format(value=value)
        step = event.get("step")
        return [{"type": "alarm", "alarm": name, "step": step, "raised": raised, "advice": text, "value": value}]

    def _non_finite(self, event: Event, norm: float | None) -> list[Event]:
        share = _number(event.get("non_finite"))
        if share is None and "grad_norm" not in event:
            return []
        bad = bool(share) or ("grad_norm" in event and norm is None)

        def advice() -> str:
            much = f"{100 * share:.2g} % of the gradients are" if share else "the norm of the gradients is"
            broken = [name for name, size in _norms(event).items() if _number(size) is None]
            where = f" (in {some(broken, 3)})" if 0 < len(broken) < len(_norms(event)) else ""
            return (
                f"{much} not finite{where} and such steps are skipped: if it goes on, stop and start again with a "
                "lower learning rate or in fp32"
            )

        return self._turn("non_finite", event, bad, not bad, share, advice)

    def _usual(self) -> float | None:
        """The usual norm of the gradients: the median of the newest finite ones."""
        return self._norms.value if len(self._norms) >= self._t.usual_after else None

    def _exploding(self, event: Event, norm: float) -> list[Event]:
        t, usual = self._t, self._usual()
        limit = t.exploding_norm
        if usual:
            limit = min(limit, max(t.exploding_times * usual, t.exploding_least * self._first_norms.value))

        def advice() -> str:
            times = norm / usual if usual else 0.0
            beyond = times > t.exploding_times
            many = f"{times:.3g} times their usual size" if beyond else f"{norm:.4g} long, more than {limit:.4g}"
            sizes = {name: size for name, size in _norms(event).items() if _number(size) is not None}
            where = f" (largest in {some([max(sizes, key=sizes.get)])})" if sizes else ""
            return f"gradients are {many}{where}: if it goes on, stop and start again with a lower learning rate"

        return self._turn("exploding", event, norm > limit, norm < limit / 2, norm, advice)

    def _vanishing(self, event: Event, norm: float) -> list[Event]:
        """Of the whole encoder, or of whole blocks. Single roles do not count: a LayerNorm's gradient may be tiny.

        A block's limit shrinks with a norm below 1: what has nearly converged has small gradients everywhere. Nothing
        vanishes where the loss is a small part of what it was: there, little is left to learn.
        """
        t, usual = self._t, self._usual()
        least = max(t.vanishing_norm, t.vanishing_share * (usual or 0.0))
        blocks, faintest = _blocks(event), t.vanishing_norm * min(1.0, norm)
        faint = [_WHOLE] if norm < least else [block for block, size in blocks.items() if size < faintest]
        if norm >= least or self._loss.learned:  # what has vanished must not become what is usual
            self._norms.push(norm)
            if len(self._first_norms) < t.usual_after:
                self._first_norms.push(norm)
        unknown = {block: steps for block, steps in self._faint.items() if block not in blocks and block != _WHOLE}
        counted = unknown | {block: self._faint.get(block, 0) + 1 for block in faint}
        self._faint = {} if self._loss.learned else counted
        silent = [block for block, steps in self._faint.items() if steps >= t.vanishing_steps]
        clear = not silent and norm > 10 * least and min(blocks.values(), default=math.inf) > 10 * faintest

        def advice() -> str:
            size = f"norm {norm:.2g}, usually {usual:.2g}" if usual else f"norm {norm:.2g}"
            if silent == [_WHOLE]:
                what = f"gradients have all but vanished ({size}) and nothing is learned"
            else:
                size = f"norm below {faintest:.2g} for {t.vanishing_steps} steps"
                what = f"no gradient reaches {some(silent)} ({size}), which no longer learn"
            return f"{what}: stop and start again with a lower learning rate, or in fp32 if this is fp16"

        return self._turn("vanishing", event, bool(silent), self._loss.learned or clear, norm, advice)

    def _diverging(self, event: Event) -> list[Event]:
        loss, t = self._loss, self._t
        if _number(event.get("loss")) is None or loss.steps <= t.diverging_after:
            return []
        rise = t.diverging_share * abs(loss.lowest) + t.diverging_noise * loss.noise + t.diverging_least * loss.start
        now, lowest = loss.smoothed, loss.lowest

        def advice() -> str:
            return (
                f"the loss has risen to {now:.3g} from {lowest:.3g} at its lowest: stop and start again with a lower "
                "learning rate, or take the best encoder so far"
            )

        return self._turn("diverging", event, now > lowest + rise, now < lowest + rise / 2, _number(now), advice)

    def _collapsing(self, event: Event) -> list[Event]:
        """An encoder that begins collapsed, as a ruined one may, is only held to its own start."""
        cosine, t, first = _number(event.get("text_cosine")), self._t, self._first_spreads
        if cosine is None:
            return []
        spread = max(0.0, 1 - cosine)
        if len(first) < t.start_steps:
            first.push(spread)
        if len(first) < t.start_steps:
            return []
        absolute = 1 - t.collapsing_cosine
        limit = max(absolute if first.value > 2 * absolute else 0.0, t.collapsing_share * first.value)

        def advice() -> str:
            return (
                f"captions are hardly told apart (mean cosine {cosine:.3f}, at the start {1 - first.value:.3f}, all "
                "the same would be 1): stop and start again with a lower learning rate or larger batches"
            )

        return self._turn("collapsing", event, spread < limit, spread > 1.5 * limit, cosine, advice)

    def _overfitting(self, event: Event) -> list[Event]:
        """The loss at the best measurement is the smoothed one; before the first step, that of the first steps."""
        recalls = [_number(event.get(name)) for name in RECALLS]
        step, images, t = event.get("step"), _number(event.get("images")), self._t
        again = step is not None and step == self._measured  # the same encoder, measured twice
        if None in recalls or again or (images is not None and images < t.overfitting_least):
            return []
        self._measured, recall = step, sum(recalls) / 2
        if self._best is None or recall >= self._best[0]:
            self._best = (recall, step, self._loss.smoothed)
        best, best_step, loss_then = self._best
        loss_then = self._loss.start if loss_then is None else loss_then
        error = math.sqrt(max(0.0, best * (1 - best)) / images) if images else 0.0
        fall = max(t.overfitting_fall, error)
        bad = best - recall > fall and self._loss.steps > 0 and self._loss.smoothed < loss_then

        def advice() -> str:
            return (
                f"held-out recall has fallen to {recall:.1%} from {best:.1%} at step {best_step} while the training "
                "loss went on falling: stop and take the best encoder so far, or start again with fewer epochs, more "
                "pictures or a lower learning rate"
            )

        return self._turn("overfitting", event, bad, best - recall < fall / 2, recall, advice)

    def _clamped(self, event: Event) -> list[Event]:
        """No alarm for a run that begins at the clamp, where OpenAI's CLIPs are, even if it leaves and comes back."""
        scale, t = _number(event.get("logit_scale")), self._t
        if scale is None:
            return []
        if self._first_scale is None:
            self._first_scale = scale
        if self._first_scale > CLAMP - t.clamped_from:
            return []

        def advice() -> str:
            return (
                f"the contrast (logit_scale) has risen from {self._first_scale:.3f} to its limit of {CLAMP:.3f}: pairs "
                "have become too easy to tell apart; stop here, or start again with larger batches or more pictures"
            )

        bad, good = scale >= CLAMP - t.clamped_near, scale < CLAMP - 10 * t.clamped_near
        return self._turn("clamped", event, bad, good, scale, advice)

    def _slow(self, event: Event) -> list[Event]:
        speed, t = _number(event.get("pairs_per_second")), self._t
        if self._uncounted:
            self._uncounted -= 1
            return []
        if speed is None:
            return []
        self._counted += 1
        self._speeds.push(speed)
        if len(self._speeds) < t.slow_window:
            return []
        now = self._speeds.value
        best = self._best_speed = max(self._best_speed, now)
        if self._counted <= t.slow_after:
            return []

        def advice() -> str:
            return (
                f"training has slowed down to {now:.3g} pairs per second from {best:.3g} at its best: see whether "
                "another program uses the device, or pause until it is free"
            )

        limit = t.slow_share * best
        return self._turn("slow", event, now < limit, now > 1.4 * limit, _number(now), advice)


class _Latch:
    """Whether one alarm stands: raised by `raise_after` bad readings in a row, lowered by `clear_after` good ones."""

    def __init__(self, raise_after: int, clear_after: int):
        self.stands = False
        self._raise_after, self._clear_after = raise_after, clear_after
        self._row = 0  # bad readings in a row, or good ones while it stands

    def turn(self, bad: bool, good: bool) -> bool | None:
        """True where this reading raises the alarm, False where it is taken back, None where nothing changes."""
        self._row = self._row + 1 if (good if self.stands else bad) else 0
        if self._row < (self._clear_after if self.stands else self._raise_after):
            return None
        self._row = 0
        self.stands = not self.stands
        return self.stands


class _Median:
    """The median of the newest `window` numbers."""

    def __init__(self, window: int):
        self._newest: deque[float] = deque()
        self._sorted: list[float] = []
        self._window = window

    def __len__(self) -> int:
        return len(self._sorted)

    def push(self, number: float) -> None:
        if len(self._newest) == self._window:
            del self._sorted[bisect_left(self._sorted, self._newest.popleft())]
        self._newest.append(number)
        insort(self._sorted, number)

    @property
    def value(self) -> float:
        """Raises IndexError where there is none."""
        low, high = self._sorted[(len(self) - 1) // 2], self._sorted[len(self) // 2]
        return low / 2 + high / 2


class _Loss:
    """The training loss, smoothed, and what it was."""

    def __init__(self, thresholds: Thresholds):
        self._t = thresholds
        self.steps = 0  # with a finite loss
        self.smoothed: float | None = None  # None before the first step
        self.lowest = math.inf  # of the smoothed loss, once it averages a few steps
        self._weighted = 0.0
        self._newest: float | None = None
        self._first = _Median(thresholds.start_steps)
        self._jumps = _Median(thresholds.noise_steps)

    def hear(self, loss: float | None) -> None:
        """An exponential moving average, with Adam's correction of its start (arXiv 1412.6980, algorithm 1)."""
        if loss is None:
            return
        decay = 1 - 1 / self._t.loss_steps
        self.steps += 1
        self._weighted = decay * self._weighted + (1 - decay) * loss
        self.smoothed = self._weighted / (1 - decay**self.steps)
        if self.steps >= self._t.loss_steps // 4:
            self.lowest = min(self.lowest, self.smoothed)
        if len(self._first) < self._t.start_steps:
            self._first.push(loss)
        if self._newest is not None:
            self._jumps.push(abs(loss - self._newest))
        self._newest = loss

    @property
    def start(self) -> float:
        return self._first.value if len(self._first) else math.inf

    @property
    def noise(self) -> float:
        """Standard deviation from step to step, of normal noise: that of differences is √2 times as large.

        From the median of absolute differences: neither a trend nor a jump of the loss passes for noise.
        """
        return self._jumps.value / (0.6745 * math.sqrt(2)) if len(self._jumps) else 0.0

    @property
    def learned(self) -> bool:
        """Whether little is left of what the loss was at the start."""
        return self.smoothed is not None and self.smoothed < self._t.learned * self.start


def _number(value: object) -> float | None:
    """None for what is no finite number."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known and abs(value) <= sys.float_info.max else None


def _norms(event: Event) -> dict[str, object]:
    """Gradient norms by layer and role; empty where they are not known."""
    norms = event.get("grad_norms")
    return norms if isinstance(norms, dict) else {}


@functools.lru_cache(maxsize=4096)
def _block(name: str) -> str | None:
    """`text.3` of `text.3.theta`; None for what lies outside the blocks."""
    found = _BLOCK.match(name)
    return found[1] if found else None


def _blocks(event: Event) -> dict[str, float]:
    """The largest norm among the roles of each block."""
    sizes: dict[str, float] = {}
    for name, size in _norms(event).items():
        block = _block(name)
        if block is not None and (known := _number(size)) is not None and known >= sizes.get(block, 0.0):
            sizes[block] = known
    return sizes
