"""Processes that the tests start side by side: `python -m tests.processes CASE FOLDER`."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file

from gmp import checkpoint
from gmp.config import RepairConfig
from gmp.contrastive import Gallery
from gmp.contrastive import contrastive as in_blocks
from gmp.control import send
from gmp.data.captions import read_index
from gmp.data.tars import find_tars
from gmp.distributed import ALONE, Group, Lost, from_environment
from gmp.errors import InputError
from gmp.fsdp import Shards
from gmp.geometric import to_geometric
from gmp.gradients import share_of_non_finite, squares
from gmp.layouts import read_text, read_vision
from gmp.losses import info_nce
from gmp.optim import STATES, make_optimizer, parameter_groups
from gmp.run import Inputs, repair
from gmp.sharding import shard, whole
from tests.small import small_clip, tokenize

CPU = torch.device("cpu")
PAIRS, WIDTH = 11, 6  # no number of processes divides them evenly
STEPS = 4
OPTIMIZERS = ("fp32", "bf16", "adabelief", "lion")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def share(group: Group) -> torch.Tensor:
    """Rows that say where they come from: (n, 3)"""
    return torch.arange(PAIRS * 3.0).view(PAIRS, 3)[group.rows(PAIRS)]


def pieces(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """Every operation of a group once."""
    gathered = group.gather(share(group).requires_grad_())
    assert gathered.is_leaf and not gathered.requires_grad
    parameters = [torch.nn.Parameter(torch.zeros(4, 2)) for _ in range(3)]
    parameters[0].grad = torch.full((4, 2), 1.0 + group.rank)
    parameters[1].grad = torch.full((4, 2), 7.0)
    if group.rank == 0:
        parameters[2].grad = torch.ones(4, 2)
    group.sum_gradients(parameters, whole=parameters[1:2])
    said = group.broadcast_json({"do": "go on", "numbers": [1.5, None]} if group.rank == 0 else "not heard")
    group.same({"step": 3, "config": {"b": 1, "a": 2}})
    group.barrier()
    return {
        "gathered": gathered,
        "halves": group.gather(share(group).half()),
        "pair": group.gather(torch.full((2, 1), float(group.rank))),
        "sum": group.sum(torch.tensor([1.0, float(group.rank)])),
        "gradients": torch.stack([p.grad for p in parameters]),
        "any": torch.tensor([group.any(group.rank == group.size - 1), group.any(False)]),
        "heard": torch.tensor(said == {"do": "go on", "numbers": [1.5, None]}),
    }


def contrastive(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """The gradients of a contrastive step whose pairs are shared out, as the trainer takes it."""
    tower, scale = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Parameter(torch.tensor(1.5))
    with torch.no_grad():
        tower.weight.copy_(numbers(WIDTH, WIDTH))
        tower.bias.copy_(numbers(WIDTH, seed=1))
    rows = group.rows(PAIRS)
    mine = tower(numbers(PAIRS, WIDTH, seed=2)[rows]).tanh()
    texts = group.gather(mine).requires_grad_()
    loss = info_nce(numbers(PAIRS, WIDTH, seed=3), texts, scale, 0.1)
    loss.backward()
    mine.backward(texts.grad[rows])
    parameters = [*tower.parameters(), scale]
    group.sum_gradients(parameters, whole=[scale])
    return {"loss": loss.detach()} | {str(n): p.grad for n, p in enumerate(parameters)}


def losses(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """Losses and their gradients, computed together and by this process alone."""
    found = {}
    same_picture = torch.arange(PAIRS).clamp_min(3)
    counts = [2] * 17
    same_caption = torch.arange(34) // 3
    gallery = Gallery.of(numbers(17, WIDTH, seed=5), torch.arange(17).clamp_min(4), same_caption, counts)
    rows = torch.arange(PAIRS)
    kinds = {
        "plain": {},
        "smoothed": {"smoothing": 0.1, "same_picture": same_picture},
        "gallery": {"gallery": gallery.at(rows), "same_caption": same_caption[2 * rows]},
        "smoothed gallery": {"gallery": gallery.at(rows), "same_caption": same_caption[2 * rows], "smoothing": 0.1},
    }
    for name, more in kinds.items():
        for who, one in (("together", group), ("alone", ALONE)):
            leaves = [numbers(PAIRS, WIDTH, seed=3), numbers(PAIRS, WIDTH, seed=4), torch.tensor(1.5)]
            leaves = [leaf.double().requires_grad_() for leaf in leaves]
            loss = in_blocks(*leaves, group=one, block=4, **more)
            loss.backward()
            found[f"{name}.{who}"] = torch.cat([loss.detach()[None], *[leaf.grad.flatten() for leaf in leaves]])
    return found


def steps(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """Losses and gradients of a step with every loss and its anchors, as `test_step` takes them.

    One of them with weights that are shared out.
    """
    from tests.test_step import CONFIGS, taken

    found = {f"{name}.{key}": v for name, config in CONFIGS.items() for key, v in taken(config, group).items()}
    return found | {f"sharded.{key}": v for key, v in taken(CONFIGS["infonce"], group, sharded=True).items()}


def adam(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """Steps of optimizers whose moments are shared out, and the checkpoint that the first process saves."""
    found = {}
    for state in OPTIMIZERS:
        model, optimizer = optimized(state)
        shard(optimizer, group)
        for step in range(STEPS):
            grow(model, step)
            optimizer.step()
        kept = [
            value
            for one in optimizer.state.values()
            for key, value in one.items()
            if key != "step" and not value.is_meta
        ]
        saved = whole(optimizer, group)
        if group.rank == 0:
            checkpoint.save(folder / state, STEPS, model, saved, {}, 1, {})
        group.barrier()
        again, other = optimized(state, seed=1)
        shard(other, group)
        checkpoint.restore(checkpoint.list_checkpoints(folder / state)[0], again, other)
        for step in range(STEPS, STEPS + 2):
            for one, its in ((model, optimizer), (again, other)):
                grow(one, step)
                its.step()
        found |= {f"{state}.{name}": p.detach() for name, p in model.named_parameters()}
        found |= {f"{state}.again.{name}": p.detach() for name, p in again.named_parameters()}
        found[f"{state}.kept"] = torch.tensor(sum(value.numel() for value in kept))
    return found


def optimized(state: str, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """state: of `OPTIMIZERS`, which are AdamW's states and other kinds."""
    model = torch.nn.Sequential(torch.nn.Linear(90, 70), torch.nn.Linear(70, 60), torch.nn.LayerNorm(60))
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=100 * seed + n))
    groups = parameter_groups(model, 1e-2, {"1.*": 0.5}, 0.1)
    if state in STATES:
        return model, make_optimizer(groups, (0.9, 0.98), CPU, state, 3)
    return model, make_optimizer(groups, (0.9, 0.98), CPU, kind=state)


def grow(model: torch.nn.Module, step: int) -> None:
    """Gradients that are the same in all processes."""
    for n, parameter in enumerate(model.parameters()):
        parameter.grad = numbers(*parameter.shape, seed=1000 * (step + 1) + n)


def shards(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """A CLIP whose blocks are shared out: what is here of it, what it is as a whole, and figures over all processes."""
    clip = split_clip()
    groups = parameter_groups(clip, 1e-2, {"transformer.resblocks.0.ln_*": 0.0}, 0.1)
    out = Shards(group)
    out.share_out(clip, groups, CPU, both=False)
    assert {name for one in groups for name in one["names"]} & out.parts.keys()
    here = out.here(clip)
    assert all(p is here[name] for one in groups for name, p in zip(one["names"], one["params"], strict=True))
    whole = out.whole_clip(clip)
    assert (whole is clip) == (group.rank > 0)
    found = {f"here.{name}": part.rows.detach() for name, part in out.parts.items()}
    if group.rank == 0:
        assert not {type(block).__name__ for block in whole.transformer.resblocks} - {"Block"}
        found |= {f"whole.{name}": p.detach().clone() for name, p in whole.named_parameters()}
        found |= {f"trains.{name}": torch.tensor(p.requires_grad) for name, p in whole.named_parameters()}
    names = [name for name, p in here.items() if p.requires_grad]
    grads = [here[name].detach().clone() for name in names]
    found["squares"] = out.sum(names, squares(grads))
    if group.rank == 1:
        grads[names.index("transformer.resblocks.1.mlp.c_fc.theta")][0, :2] = math.nan
    found["broken"] = out.sum(names, squares(grads))
    found["share"] = torch.tensor(share_of_non_finite(grads, lambda counts: out.sum(names, counts)))
    return found


def split_clip() -> torch.nn.Module:
    clip = small_clip()
    to_geometric(clip)
    return clip


def large(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of many sizes, so that there are buckets of several and of one."""
    sizes = [(3000, 3000), (5,), (2000, 2000), (1, 1), (2000, 2001), (7, 3)]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for n, parameter in enumerate(parameters):
        parameter.grad = numbers(*sizes[n], seed=10 * group.rank + n)
    group.sum_gradients(parameters)
    return {str(n): p.grad for n, p in enumerate(parameters)}


def unlike(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    try:
        group.same({"config": 1, "data": "a" if group.rank < 2 else "b"})
    except InputError as error:
        (folder / f"{group.rank}.txt").write_text(str(error))
    return {}


def dies(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """The last process is gone in the middle of a step."""
    if group.rank == group.size - 1:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    return survive(group, folder)


def hangs(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """The last process does not take part, and never will."""
    if group.rank == group.size - 1:
        (folder / "hanging").touch()
        time.sleep(600)
    return survive(group, folder)


def survive(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    try:
        group.sum(torch.ones(3))
    except Lost as error:
        (folder / f"{group.rank}.txt").write_text(str(error))
    return {}


def moments() -> int:
    """Elements of moments that optimizers of this process have in memory."""
    optimizers = [one for one in gc.get_objects() if isinstance(one, torch.optim.AdamW)]
    states = [state for one in optimizers for state in one.state.values()]
    return sum(v.numel() for state in states for key, v in state.items() if key != "step" and not v.is_meta)


def run(group: Group, folder: Path) -> dict[str, torch.Tensor]:
    """The repair that `order.json` names; each process writes down what it has heard.

    `at`: what the first process does in a step. `kills`: a process kills itself in a step of its first life. `sharded`:
    which processes share out their weights.
    """
    order = json.loads((folder / "order.json").read_text())
    original, pictures = Path(order["original"]), Path(order["pictures"])
    index = find_tars(order["tars"]) if "tars" in order else read_index(pictures, pictures / "captions.json")
    inputs = Inputs(read_text(Path(order["ruined"])), read_vision(original), read_text(original), index, tokenize)
    settings = order["config"] | ({"seed": 1} if str(group.rank) in order.get("other", "") else {})
    config, out = RepairConfig.from_json(settings), folder / "run"
    sharded = str(group.rank) in order.get("sharded", "")
    events, asked = [], threading.Event()
    life = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{group.rank}"

    def hear(event: dict[str, object]) -> None:
        events.append(event)
        if event["type"] != "step":
            return
        if event["step"] == 1:
            (folder / f"{group.rank}.moments").write_text(str(moments()))
        if order.get("kills", {}).get(life) == event["step"]:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        if group.rank == 0:
            for command in order.get("at", {}).get(str(event["step"]), []):
                do(command)

    def do(command: str) -> None:
        if command == "stop":
            asked.set()
            return
        if command == "hold":  # for a while
            send(out, "pause", offload=True)
            threading.Timer(0.5, send, (out, "resume")).start()
            return
        send(out, command)

    try:
        for event in repair(
            inputs, config, out, cache=Path(order["cache"]), device=CPU, stop=asked.is_set, group=group, sharded=sharded
        ):
            hear(event)
    except InputError as error:
        (folder / f"{group.rank}.txt").write_text(str(error))
        raise
    finally:
        (folder / f"{life}.json").write_text(json.dumps(events))
    return {}


CASES = {
    case.__name__: case for case in (pieces, contrastive, losses, steps, adam, shards, large, unlike, dies, hangs, run)
}


def main(case: str, folder: str) -> None:
    torch.set_num_threads(1)
    with from_environment(CPU, timeout=timedelta(seconds=3 if case == "hangs" else 60)) as group:
        found = CASES[case](group, Path(folder))
        if found:
            save_file({k: v.contiguous() for k, v in found.items()}, Path(folder) / f"{group.rank}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
