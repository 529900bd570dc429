"""Checkpoints: weights, optimizer and JSON state as three files under one step number, and weights' means as a fourth.

The JSON is written last and marks the checkpoint as whole. Every file goes to a temporary name, is synced and then
renamed, so that a full disk or a crash leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .errors import InputError
from .files import Header, dtype_and_shape, read_header, read_json, read_tensors, write_json, write_safetensors
from .fsdp import Part
from .optim import counter, optimized, set_counter

CHECKPOINTS = "checkpoints"  # in a run's folder
_STATE = re.compile(r"^step_(\d{8})\.state\.json$")
_FILE = re.compile(r"^\.?step_(\d{8})\.")  # of any step, whole or torn


@dataclass(frozen=True)
class Checkpoint:
    """One saved step. `state` holds the sampler, the scaler and the loop's counters."""

    folder: Path
    step: int

    def path(self, kind: str) -> Path:
        return self.folder / f"step_{self.step:08d}.{kind}"

    def state(self) -> dict[str, object]:
        return json.loads(self.path("state.json").read_text(encoding="utf-8"))

    def given(self) -> Path:
        """The weights that are measured and given, the text tower whole: the means, where there are such."""
        means = self.path("ema.safetensors")
        return means if means.exists() else self.path("model.safetensors")

    def weights(self) -> dict[str, Tensor]:
        header = read_header(self.path("model.safetensors"))
        return read_tensors(header, list(header.tensors))


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    steps = sorted(int(match[1]) for name in folder.iterdir() if (match := _STATE.match(name.name)))
    return [Checkpoint(folder, step) for step in steps]


def best_of(run: Path) -> dict[str, object] | None:
    """What a run's folder says of its best step: `result.json`, or else its newest checkpoint. None if it does not."""
    saved = list_checkpoints(run / CHECKPOINTS)
    known = read_json(run / "result.json") or (read_json(saved[-1].path("state.json")) if saved else {})
    best = known.get("best")
    return best if isinstance(best, dict) else None


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, object],
    keep: int,
    metadata: dict[str, str],
    mean: nn.Module | None = None,
) -> Checkpoint:
    """Writes a checkpoint, then removes all but the newest `keep`, and what a killed save left behind.

    mean: a model of the same form with the weights' means (`ema`), if there are such. A locked vision tower is not in
    it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(folder, step)
    saved = _saved(model, optimizer)
    moments, counters = _flatten(optimizer)
    for kind, one in {"model": model, "ema": mean}.items():
        if one is not None:
            weights = {name: one.get_parameter(name).detach() for name in saved}
            write_safetensors(weights, checkpoint.path(f"{kind}.safetensors"), metadata | {"step": str(step)})
    write_safetensors(moments, checkpoint.path("optimizer.safetensors"), {"step": str(step)})
    write_json(state | {"step": step, "optimizer": counters}, checkpoint.path("state.json"))
    kept = {one.step for one in list_checkpoints(folder)[-keep:]}
    # sorted backwards, "state.json" comes first: a checkpoint is no longer whole once its first file is gone
    for path in sorted(folder.iterdir(), reverse=True):
        if (match := _FILE.match(path.name)) and int(match[1]) not in kept:
            path.unlink()
    return checkpoint


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, Part] = MappingProxyType({}),
    means: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> dict[str, object]:
    """Loads a checkpoint into a model and an optimizer of the same form, in place; returns its JSON state.

    parts: of parameters that are shared out over processes, by name, what is here of them and of their moments. means:
    `ema.Ema.means`, to be loaded too. Raises InputError, and changes nothing, when the checkpoint belongs to other
    parameters or another kind of optimizer.
    """
    state = checkpoint.state()
    parameters = {
        name: (parts[name].rows if name in parts else parameter).detach()
        for name, parameter in _saved(model, optimizer).items()
    }
    moments, counters = _flatten(optimizer)
    files = [("model", parameters, "parameters"), ("optimizer", moments, "optimizer state")]
    if means:
        files.append(("ema", parameters | {n: mean.detach() for n, mean in means.items()}, "means of parameters"))
    found = [
        (_fitting(checkpoint.path(f"{kind}.safetensors"), places, what, parts), places) for kind, places, what in files
    ]
    if odd := sorted(counters.keys() ^ state["optimizer"].keys()):
        raise InputError(_misfit(checkpoint.path("state.json"), "step counters", odd))
    for header, places in found:
        for name, place in places.items():
            value = read_tensors(header, [name])[name]
            if part := parts.get(_parameter(name)):
                value = value[part.start :][: len(place)]
            place.copy_(value)
    for name, parameter, group in optimized(optimizer):
        if name in counters:
            set_counter(optimizer, group, parameter, state["optimizer"][name])
    return state


def _fitting(path: Path, places: dict[str, Tensor], what: str, parts: Mapping[str, Part]) -> Header:
    """A file's header. Raises InputError unless its tensors have the names, dtypes and whole shapes of the places."""
    header = read_header(path)
    found = {name: (info.dtype, tuple(info.shape)) for name, info in header.tensors.items()}
    expected = {name: dtype_and_shape(place) for name, place in places.items()}
    for name in expected.keys():
        if part := parts.get(_parameter(name)):
            expected[name] = expected[name][0], tuple(part.weight.shape)
    odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if odd:
        raise InputError(_misfit(path, what, odd))
    return header


def _parameter(name: str) -> str:
    """Whose a tensor of a checkpoint is, by its name (`_flatten`)."""
    return name.partition("|")[0]


def _misfit(path: Path, what: str, odd: list[str]) -> str:
    return (
        f"{path} does not fit this run: {len(odd)} of its {what} are others or of another kind, such as "
        f"{', '.join(odd[:5])}; go on with the settings that it was made with, or start anew"
    )


def _saved(model: nn.Module, optimizer: object) -> dict[str, nn.Parameter]:
    """The text tower whole, so that a checkpoint is usable alone; of the rest what the optimizer moves."""
    moved = {name for name, _, _ in optimized(optimizer)}
    return {n: p for n, p in model.named_parameters() if n in moved or not n.startswith("visual.")}


def _flatten(optimizer: object) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Optimizer state as `name|key` tensors, and the step counters, which are kept as scalars, or by group.

    Quantised state is tensors that consist of tensors (codes, scale, qmap): `name|key|part`. All are the state's own
    memory, no copies.
    """
    moments: dict[str, Tensor] = {}
    counters: dict[str, float] = {}
    for name, parameter, group in optimized(optimizer):
        steps = counter(optimizer, group, parameter)
        if steps is not None:
            counters[name] = steps
        for key, value in optimizer.state.get(parameter, {}).items():
            if hasattr(value, "__tensor_flatten__"):
                parts, _ = value.__tensor_flatten__()
                moments |= {f"{name}|{key}|{part}": getattr(value, part) for part in parts}
            elif key != "step":
                moments[f"{name}|{key}"] = value.detach()
    return moments, counters
