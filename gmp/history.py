"""A run's record, condensed: a million steps are opened and sent as fast as a thousand. See docs/telemetry.md.

Steps are put into buckets that keep minimum, maximum and mean, so that a spike in one step is seen at any length. When
they are full, neighbours are merged. All of it can be had again from the record, the snapshot included.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from . import telemetry
from .events import Event
from .files import write_bytes

SNAPSHOT = "history.npz"
VERSION = 1  # of the answers
SNAPSHOT_VERSION = 1

BUCKETS = 1024  # at most; bucket k holds the steps k * stride + 1 … (k + 1) * stride
RECENT = 512  # steps that are kept by themselves
LISTED = 512  # measures, alarms, marks in an answer
MOVED = 10_000  # numbers in an answer that say how far layers have moved: names times measures
COLUMNS = 256  # buckets of an answer's layers
CELLS = 1 << 16  # numbers of one kind in an answer's layers: names times buckets
LAST_STEP = 10**9  # a later one is no step but a fault in the record

# As the record calls them, and as the answer does
SERIES = (
    *("loss", "lr", "logit_scale", "grad_norm", "non_finite", "text_cosine"),
    *("pairs_per_second", "tokens_per_second", "memory"),
)
NAMED_SERIES = ("losses", "lrs")
LAYERS = {"grad_norms": "grad_norm", "update_ratios": "update_ratio"}

MEASURED = ("loss", "contrastive", "recall_at_1_text_to_image", "recall_at_1_image_to_text")  # null if not known
RETRIEVAL = ("recall_at_", "mean_rank_", "median_rank_", "images", "captions")
MARKS = ("start", "resume", "checkpoint", "paused", "resumed", "out_of_memory", "stopped", "done", "failed")
_OF_MARKS = ("why", "offloaded", "batch")  # what they tell beside type, step and t

_EMPTY = {np.fmin: np.nan, np.fmax: np.nan, np.add: 0.0}
_NEVER = np.iinfo(np.int64).max
_STAYS = -(1 << 62)  # in place of a step: is not taken back
_EDGE = 512  # bytes at the beginning and at the end by which a record is known again

Named = tuple[np.ndarray, np.ndarray]  # columns, and as many numbers; NaN where there is none
Told = tuple[int | None, dict[str, object]]  # what an answer lists, and the step that it has by itself


class _Columns:
    """Names and the columns that they have, in the order in which they came."""

    def __init__(self, names: Iterable[str] = ()):
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._newest: tuple[tuple[str, ...], np.ndarray] = ((), np.zeros(0, np.intp))
        self.of(tuple(names))

    def of(self, names: tuple[str, ...]) -> np.ndarray:
        """The columns of these names. One event's names are mostly those of the event before."""
        if names != self._newest[0]:
            for name in names:
                if name not in self._numbers:
                    self._numbers[name] = len(self.names)
                    self.names.append(name)
            self._newest = names, np.array([self._numbers[name] for name in names], np.intp)
        return self._newest[1]


class _Table:
    """Named numbers by bucket, each kind folded in its own way.

    Arrays are (buckets, names): what a step changes lies in one row.
    """

    def __init__(self, folds: dict[str, np.ufunc]):
        self._folds = folds
        self._columns = _Columns()
        self.arrays = {kind: np.full((BUCKETS, 0), _EMPTY[fold]) for kind, fold in folds.items()}

    @property
    def names(self) -> list[str]:
        return self._columns.names

    def columns_of(self, names: tuple[str, ...]) -> np.ndarray:
        columns = self._columns.of(names)
        for kind, array in self.arrays.items():
            if more := len(self.names) - array.shape[1]:
                empty = np.full((len(array), more), _EMPTY[self._folds[kind]])
                self.arrays[kind] = np.concatenate([array, empty], axis=1)
        return columns

    def fold(self, bucket: int, columns: np.ndarray, **numbers: np.ndarray) -> None:
        for kind, more in numbers.items():
            row = self.arrays[kind][bucket]
            row[columns] = self._folds[kind](row[columns], more)

    def merge(self) -> None:
        for kind, fold in self._folds.items():
            self.arrays[kind] = _merged(self.arrays[kind], fold, _EMPTY[fold])

    def empty(self, first: int) -> None:
        """Of the buckets from `first` on."""
        for kind, fold in self._folds.items():
            self.arrays[kind][first:] = _EMPTY[fold]


def _merged(array: np.ndarray, fold: np.ufunc, empty: float) -> np.ndarray:
    """Neighbours folded into one another, in the first half of the result."""
    pairs = fold(array[0::2], array[1::2])
    return np.concatenate([pairs, np.full_like(pairs, empty)])


@dataclass(frozen=True)
class _TakenBack:
    """A `resume`, or `start`, at `step`: steps up to `highest` that were recorded before it no longer count."""

    behind: int  # bytes of the record up to its end
    step: int
    highest: int


class History:
    """What `telemetry.read` finds in one run's record, followed while it grows, and condensed.

    What it holds depends on the record alone, not on when it was looked at. One thread at a time.

    step, steps     the newest step, and how many there will be
    started, t      seconds since 1970 of the first and of the newest event
    recent          the newest `step` events, flat: `step`, `epoch`, `loss`, `losses.contrastive`, …
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._path = folder / telemetry.EVENTS
        self._start_over()

    def _start_over(self) -> None:
        self.step, self.steps, self.started, self.t = 0, None, None, None
        self.recent: deque[dict[str, object]] = deque(maxlen=RECENT)
        self.stride = 1
        self._position = 0  # bytes of the record that have been read
        self._fingerprint = _fingerprint(self._path, 0)
        self._series = _Table({"min": np.fmin, "max": np.fmax, "sum": np.add, "count": np.add})
        self._layers = _Table(dict.fromkeys(LAYERS, np.fmax))
        self._last = np.zeros(BUCKETS, np.int64)  # the last step that each bucket holds, 0: none
        self._start = np.full(BUCKETS, _NEVER)  # where its first event is in the record
        self._taken_back: list[_TakenBack] = []  # steps rise with offsets: what reached further forward took back less
        self._moved = _Columns()
        self._measures: list[tuple[dict[str, object], Named]] = []
        self._alarms: list[Told] = []
        self._marks: list[Told] = []
        self._form: tuple[tuple[str, ...], ...] = ()  # keys of the newest `step` event, and
        self._plain: list[str] = []  # the series that it has
        self._flat: tuple[str, ...] = ()

    @property
    def measures(self) -> list[dict[str, object]]:
        """All measurements, compact, without what moved."""
        return [measure for measure, _ in self._measures]

    @property
    def alarms(self) -> list[dict[str, object]]:
        return [alarm for _, alarm in self._alarms]

    @property
    def marks(self) -> list[dict[str, object]]:
        return [mark for _, mark in self._marks]

    # ---- reading ----------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Reads what was appended since the last call, or everything where the record is another one than it was.

        Raises InputError for a record of a newer version.
        """
        if _fingerprint(self._path, self._position) != self._fingerprint:
            self._start_over()
        with np.errstate(over="ignore"):
            for behind, event in telemetry.lines(self._path, self._position):
                self._take(event, behind)
                self._position = behind
        self._fingerprint = _fingerprint(self._path, self._position)

    def _take(self, event: Event, behind: int) -> None:
        kind, step = event["type"], telemetry.step_of(event)
        t = _number(event.get("t"))
        self.t = self.t if t is None else t
        self.started = t if self.started is None else self.started
        if kind in telemetry.TAKE_BACK and step is not None:
            self._take_back(step, behind)
        if kind in ("step", *telemetry.TAKE_BACK) and step is not None and step <= LAST_STEP:
            self.step, self.steps = max(step, 0), _whole(event.get("steps"))
        if kind == "step" and _is_step(step):
            self._condense(event, step, self._position)
        elif kind == "measure" and step is not None:
            columns, numbers = _named(event.get("moved"), self._moved.of)
            known = np.isfinite(numbers)
            self._measures.append((_measure(event), (columns[known], numbers[known])))
        elif kind == "alarm":
            self._alarms.append((step, _alarm(event, self.step)))
        elif kind in MARKS:
            self._marks.append((_STAYS if kind in telemetry.TAKE_BACK else step, _mark(event, self.step)))

    def _condense(self, event: Event, step: int, start: int, floor: int = 0) -> None:
        """Puts a `step` event, which is read from byte `start` on, into its bucket and among the recent ones.

        floor: buckets up to this step have it already.
        """
        names, values = self._flattened(event)
        numbers = _numbers(values)
        values = [None if number != number else number for number in numbers.tolist()]
        recent = {"step": step, "epoch": _whole(event.get("epoch"))} | dict(zip(names, values, strict=True))
        layers = {kind: _named(event.get(kind), self._layers.columns_of) for kind in LAYERS}
        self.recent.append(recent | layers)
        if step <= floor:
            return
        while step > BUCKETS * self.stride:
            self._merge()
        bucket = (step - 1) // self.stride
        self._last[bucket] = max(self._last[bucket], step)
        self._start[bucket] = min(self._start[bucket], start)
        columns = self._series.columns_of(names)
        known = numbers == numbers
        self._series.fold(bucket, columns, min=numbers, max=numbers, sum=np.where(known, numbers, 0.0), count=known)
        for kind, (columns, numbers) in layers.items():
            if len(columns):
                self._layers.fold(bucket, columns, **{kind: numbers})

    def _flattened(self, event: Event) -> tuple[tuple[str, ...], list[object]]:
        """Names of the series that a `step` event has values of, and the values."""
        groups = [_dict(event.get(key)) for key in NAMED_SERIES]
        form = (tuple(event), *map(tuple, groups))
        if form != self._form:  # names are put together once
            self._form, self._plain = form, [name for name in SERIES if name in event]
            dotted = [f"{key}.{name}" for key, group in zip(NAMED_SERIES, groups, strict=True) for name in group]
            self._flat = (*self._plain, *dotted)
        return self._flat, [*(event[name] for name in self._plain), *(v for group in groups for v in group.values())]

    def _merge(self) -> None:
        self._series.merge()
        self._layers.merge()
        self._last = _merged(self._last, np.maximum, 0)
        self._start = _merged(self._start, np.minimum, _NEVER)
        self.stride *= 2

    def _take_back(self, step: int, behind: int) -> None:
        """Takes back what was recorded of later steps. What was condensed with it is read again, exactly."""
        self._measures = [one for one in self._measures if one[0]["step"] <= step]
        self._alarms, self._marks = _standing(self._alarms, step), _standing(self._marks, step)
        highest = max(self.step, int(self._last.max()))
        while self._taken_back and self._taken_back[-1].step >= step:
            highest = max(highest, self._taken_back.pop().highest)
        self._taken_back.append(_TakenBack(behind, step, highest))
        if self._last.max() <= step:
            return
        full = max(step, 0) // self.stride  # buckets that stay as they are
        first = min(full, max(step - RECENT, 0) // self.stride)
        touched = self._start[first : -(-max(step, 0) // self.stride)]
        self._read_again(int(touched.min(initial=_NEVER)), behind, full)
        if self.stride > 1 and self._last.max() <= BUCKETS * self.stride // 2:
            start = int(self._start.min())
            self.stride = 1  # it grows again on the way
            self._read_again(start, behind, 0)

    def _read_again(self, start: int, until: int, full: int) -> None:
        """Condenses anew what stands between two offsets, apart from the first `full` buckets."""
        self._series.empty(full)
        self._layers.empty(full)
        self._last[full:], self._start[full:] = 0, _NEVER
        self.recent.clear()
        if start == _NEVER:  # nothing stands
            return
        floor = full * self.stride
        for behind, event in telemetry.lines(self._path, start):
            if behind >= until:
                break
            step = telemetry.step_of(event)
            if event["type"] == "step" and _is_step(step) and step <= self._limit(behind):
                self._condense(event, step, start, floor)
            start = behind

    def _limit(self, behind: int) -> int:
        """The step up to which events of this offset stand. There is one that takes back behind it."""
        return self._taken_back[bisect_right(self._taken_back, behind, key=lambda one: one.behind)].step

    # ---- answers ----------------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, object]:
        """All that was recorded, condensed: JSON values as docs/telemetry.md describes them."""
        filled = np.flatnonzero(self._last)
        arrays = {kind: array[filled] for kind, array in self._series.arrays.items()}
        counts = arrays["count"]
        means = arrays["sum"] / np.where(counts > 0, counts, np.nan)
        series = {}
        for column in np.flatnonzero(counts.any(axis=0)):
            lines = {"mean": means} | ({} if self.stride == 1 else {kind: arrays[kind] for kind in ("min", "max")})
            name = self._series.names[column]
            series[name] = {kind: _rounded(array[:, column]) for kind, array in lines.items()}
        return self._answer(None, self._last[filled].tolist(), series, self._condensed_layers())

    def since(self, step: int) -> dict[str, object]:
        """What came after `step`, every step by itself; the whole where that is too much, or `step` was taken back.

        Measures, alarms and marks of `step` itself are among it: they may have come after the step.
        """
        again = any(one.step < step <= one.highest for one in self._taken_back)
        if not 0 < step <= self.step or self.step - step > RECENT or again:
            return self.whole()
        chosen = [one for one in self.recent if one["step"] > step]
        known = self._series.arrays["count"].any(axis=0)
        names = [name for name, any_ in zip(self._series.names, known, strict=True) if any_]
        series = {name: {"mean": _rounded([one.get(name) for one in chosen])} for name in names}
        at = [one["step"] for one in chosen]
        return self._answer(step, at, series, self._recent_layers(chosen))

    def _answer(self, since: int | None, at: list[int], series: object, layers: object) -> dict[str, object]:
        measures, alarms, marks = self._measures, self.alarms, self.marks
        if since is not None:
            measures = [one for one in measures if one[0]["step"] >= since]
            alarms, marks = ([one for one in told if one["step"] >= since] for told in (alarms, marks))
        widest = max((len(columns) for _, (columns, _) in measures), default=0)
        telling = _evenly(len(measures), max(2, MOVED // max(1, widest)))
        return {
            "version": VERSION,
            "run": self.folder.resolve().name,
            "step": self.step,
            "steps": self.steps,
            "stride": self.stride if since is None else 1,
            "since": since or 0,
            "reset": since is None,
            "at": at,
            "series": series,
            "layers": layers,
            "measures": [
                measures[i][0] | {"moved": self._moved_by_name(measures[i][1]) if i in telling else {}}
                for i in sorted(_evenly(len(measures), LISTED))
            ],
            "alarms": alarms[-LISTED:],
            "marks": [marks[i] for i in sorted(_evenly(len(marks), LISTED))],
        }

    def _moved_by_name(self, moved: Named) -> dict[str, float | None]:
        columns, numbers = moved
        return dict(zip([self._moved.names[column] for column in columns], _rounded(numbers), strict=True))

    def _condensed_layers(self) -> dict[str, object]:
        """Maxima in fewer buckets, each of so many of ours that the limits do not depend on the length."""
        known = self._known_layers()
        used = int(np.flatnonzero(self._last).max(initial=-1)) + 1
        columns = min(COLUMNS, max(1, CELLS // max(1, len(known))))
        width = 1
        while -(-used // width) > columns:
            width *= 2
        last = self._last.reshape(-1, width).max(axis=1)
        filled = np.flatnonzero(last)
        kinds = {
            kind: np.fmax.reduce(array.reshape(len(last), width, array.shape[1]), axis=1)[filled].T[known]
            for kind, array in self._layers.arrays.items()
        }
        return self._layers_answer(known, last[filled].tolist(), kinds)

    def _recent_layers(self, chosen: Sequence[dict[str, object]]) -> dict[str, object]:
        known = self._known_layers()
        kinds = {}
        for kind in LAYERS:
            numbers = np.full((len(self._layers.names), len(chosen)), np.nan)
            for place, one in enumerate(chosen):
                columns, of_step = one[kind]
                numbers[columns, place] = of_step
            kinds[kind] = numbers[known]
        return self._layers_answer(known, [one["step"] for one in chosen], kinds)

    def _known_layers(self) -> np.ndarray:
        """Columns that have a number anywhere."""
        return np.flatnonzero(sum(np.isfinite(array).any(axis=0) for array in self._layers.arrays.values()))

    def _layers_answer(self, known: np.ndarray, at: list[int], kinds: dict[str, np.ndarray]) -> dict[str, object]:
        names = [self._layers.names[column] for column in known]
        return {"at": at, "names": names} | {LAYERS[kind]: [_rounded(row) for row in kinds[kind]] for kind in LAYERS}

    # ---- the snapshot -----------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes a snapshot, atomically; `folder / SNAPSHOT` is where `load` looks for it. It is a cache."""
        used = int(np.flatnonzero(self._last).max(initial=-1)) + 1
        rest = {
            "version": SNAPSHOT_VERSION,
            "position": self._position,
            "fingerprint": self._fingerprint,
            "stride": self.stride,
            "times": [self.step, self.steps, self.started, self.t],
            "series": self._series.names,
            "layers": self._layers.names,
            "moved": self._moved.names,
            "taken_back": [astuple(one) for one in self._taken_back],
            "measures": self.measures,
            "alarms": self._alarms,
            "marks": self._marks,
            "recent": [{name: value for name, value in one.items() if name not in LAYERS} for one in self.recent],
        }
        layers = len(self._layers.names)
        arrays = {
            "rest": np.frombuffer(json.dumps(rest).encode(), np.uint8),
            "last": self._last[:used],
            "start": self._start[:used],
            "moved": _dense([moved for _, moved in self._measures], len(self._moved.names)),
        }
        arrays |= {f"series.{kind}": array[:used] for kind, array in self._series.arrays.items()}
        arrays |= {f"layers.{kind}": array[:used] for kind, array in self._layers.arrays.items()}
        arrays |= {f"recent.{kind}": _dense([one[kind] for one in self.recent], layers) for kind in LAYERS}
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_bytes(content.getvalue(), path)

    @classmethod
    def load(cls, folder: Path) -> History:
        """The history of a run as its snapshot has it, empty where that is missing, damaged or of another record."""
        try:
            with np.load(io.BytesIO((folder / SNAPSHOT).read_bytes()), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            history = cls(folder)
            history._restore(arrays)
        except Exception:  # whatever is wrong with a cache, everything can be read again
            return cls(folder)
        fits = history._fingerprint == _fingerprint(history._path, history._position)
        return history if fits else cls(folder)

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        rest = json.loads(arrays["rest"].tobytes())
        if rest["version"] != SNAPSHOT_VERSION:
            raise ValueError(f"a snapshot of version {rest['version']}")
        self._position, self._fingerprint, self.stride = rest["position"], rest["fingerprint"], rest["stride"]
        self.step, self.steps, self.started, self.t = rest["times"]
        self._taken_back = [_TakenBack(*one) for one in rest["taken_back"]]
        self._moved = _Columns(rest["moved"])
        self._measures = [*zip(rest["measures"], _sparse(arrays["moved"]), strict=True)]
        self._alarms, self._marks = ([(own, one) for own, one in rest[kind]] for kind in ("alarms", "marks"))
        used = len(arrays["last"])
        self._last[:used], self._start[:used] = arrays["last"], arrays["start"]
        self._series.columns_of(tuple(rest["series"]))
        self._layers.columns_of(tuple(rest["layers"]))
        for name, table in (("series", self._series), ("layers", self._layers)):
            for kind, array in table.arrays.items():
                array[:used] = arrays[f"{name}.{kind}"]
        kinds = zip(*(_sparse(arrays[f"recent.{kind}"]) for kind in LAYERS), strict=True)
        for one, named in zip(rest["recent"], kinds, strict=True):
            self.recent.append(one | dict(zip(LAYERS, named, strict=True)))


_NOTHING: Named = (np.zeros(0, np.intp), np.zeros(0))


def _named(values: object, columns_of: Callable[[tuple[str, ...]], np.ndarray]) -> Named:
    """Numbers by name, such as `grad_norms`; none where there is no such thing."""
    if not isinstance(values, dict) or not values:
        return _NOTHING
    return columns_of(tuple(values)), _numbers(list(values.values()))


def _fingerprint(path: Path, position: int) -> str | None:
    """Of a record's first `position` bytes, by the first and the last of them; None where there are fewer."""
    head = tail = b""
    if position:
        try:
            with open(path, "rb") as file:
                head = file.read(min(position, _EDGE))
                file.seek(max(0, position - _EDGE))
                tail = file.read(min(position, _EDGE))
        except FileNotFoundError:
            return None
    return hashlib.sha256(head + tail).hexdigest() if len(tail) == min(position, _EDGE) else None


def _dense(named: Sequence[Named], columns: int) -> np.ndarray:
    """(rows, columns), NaN where a row has no number."""
    array = np.full((len(named), columns), np.nan)
    for row, (numbers, values) in zip(array, named, strict=True):
        row[numbers] = values
    return array


def _sparse(array: np.ndarray) -> list[Named]:
    """The rows of a dense array. A name without a number is as good as one that is not there."""
    return [(np.flatnonzero(known), row[known]) for row, known in zip(array, np.isfinite(array), strict=True)]


def _evenly(count: int, most: int) -> set[int]:
    """Places of at most `most` of `count` things: every 2^j-th, so that few change as more come, and the last."""
    width = 1
    while len(places := {*range(0, count, width), *range(max(0, count - 1), count)}) > most:
        width *= 2
    return places


def _standing(told: list[Told], step: int) -> list[Told]:
    """Without what was told of later steps; what has no step of its own moves back to this one."""
    return [
        (own, one if own is not None else one | {"step": min(one["step"], max(step, 0))})
        for own, one in told
        if own is None or own <= step
    ]


def _is_step(step: int | None) -> bool:
    return step is not None and 1 <= step <= LAST_STEP


def _measure(event: Event) -> dict[str, object]:
    """A measurement as plain numbers: losses of held-out pairs, recalls and ranks, cosines by read point."""
    drift = {point: _dict(values).get("cosine") for point, values in _dict(event.get("drift")).items()}
    retrieval = {name: value for name, value in event.items() if name.startswith(RETRIEVAL)}
    losses, recalls = dict.fromkeys(MEASURED[:2]), dict.fromkeys(MEASURED[2:])
    numbers = losses | _dict(event.get("held_out")) | recalls | retrieval | drift
    return {"step": event["step"]} | {name: _rounded([value])[0] for name, value in numbers.items()}


def _alarm(event: Event, step: int) -> dict[str, object]:
    """step: the newest, for an alarm that names none."""
    own = telemetry.step_of(event)
    return {
        "alarm": str(event.get("alarm")),
        "step": step if own is None else own,
        "raised": event.get("raised") is not False,
        "advice": str(event.get("advice", "")),
        "t": _number(event.get("t")),
    }


def _mark(event: Event, step: int) -> dict[str, object]:
    own = telemetry.step_of(event)
    mark = {"type": event["type"], "step": step if own is None else own, "t": _number(event.get("t"))}
    return mark | {name: event[name] for name in _OF_MARKS if isinstance(event.get(name), (str, bool, int))}


def _dict(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _whole(value: object) -> int | None:
    return value if type(value) is int else None


def _number(value: object) -> float | None:
    """A finite number, None for anything else."""
    try:
        return value if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def _numbers(values: Sequence[object]) -> np.ndarray:
    """(n,) NaN where a value is no finite number"""
    try:
        numbers = np.array(values, np.float64)
        if numbers.ndim == 1:
            numbers[np.isinf(numbers)] = np.nan
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    return np.array([_number(value) for value in values], np.float64)


def _rounded(values: Sequence[object] | np.ndarray) -> list[float | None]:
    """Five significant digits; null where a value is no finite number."""
    numbers = (float(f"{number:.5g}") for number in _numbers(values).tolist())
    return [number if math.isfinite(number) else None for number in numbers]
