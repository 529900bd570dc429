"""Several processes at one repair, on gloo: they compute what one computes, and end when one of them does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmp import checkpoint
from gmp.distributed import ALONE, Group, from_environment, local_device, meet
from gmp.errors import InputError
from gmp.sharding import owners
from tests import processes
from tests.processes import PAIRS
from tests.side_by_side import Started

CPU = torch.device("cpu")


def results(case: str, size: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    with Started(case, size, folder) as started:
        assert started.wait() == [0] * size
    return [load_file(folder / f"{rank}.safetensors") for rank in range(size)]


# --- the pieces


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("n", [0, 1, 5, 16, 257])
def test_shares_follow_each_other_and_are_even(n, size):
    shares = [range(n)[Group(rank, size).rows(n)] for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_process_exchanges_nothing():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    features = torch.ones(3, 2, requires_grad=True) * 2
    ALONE.sum_gradients([parameter])
    ALONE.same({"step": 1})
    ALONE.barrier()
    assert torch.equal(parameter.grad, torch.ones(2))
    assert torch.equal(ALONE.gather(features), features) and not ALONE.gather(features).requires_grad
    assert ALONE.rows(5) == slice(0, 5) and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.broadcast_json({"a": 1}) == {"a": 1}


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_gets_what_all_have(size, tmp_path):
    rows = torch.arange(PAIRS * 3.0).view(PAIRS, 3)
    for found in results("pieces", size, tmp_path):
        assert torch.equal(found["gathered"], rows)
        assert torch.equal(found["halves"], rows.half())
        assert found["pair"].flatten().tolist() == [rank for rank in range(size) for _ in range(2)]
        assert found["sum"].tolist() == [size, sum(range(size))]
        ranks = sum(range(1, size + 1))
        assert found["gradients"].flatten(1).unique(dim=1).tolist() == [[ranks], [7], [1]]  # the second is whole
        assert found["any"].tolist() == [True, False]
        assert found["heard"]


@pytest.mark.parametrize("size", [2, 4])
def test_a_shared_step_has_the_gradients_of_a_whole_one(size, tmp_path):
    tower, scale = torch.nn.Linear(processes.WIDTH, processes.WIDTH), torch.nn.Parameter(torch.tensor(1.5))
    with torch.no_grad():
        tower.weight.copy_(processes.numbers(processes.WIDTH, processes.WIDTH))
        tower.bias.copy_(processes.numbers(processes.WIDTH, seed=1))
    texts = tower(processes.numbers(PAIRS, processes.WIDTH, seed=2)).tanh()
    texts = texts / texts.norm(dim=1, keepdim=True)
    images = processes.numbers(PAIRS, processes.WIDTH, seed=3)
    logits = scale.exp() * texts @ (images / images.norm(dim=1, keepdim=True)).T
    target = 0.9 * torch.eye(PAIRS) + 0.1 / PAIRS
    loss = -(target * (logits.log_softmax(0) + logits.log_softmax(1))).sum() / (2 * PAIRS)
    loss.backward()
    expected = [loss.detach(), *(p.grad for p in (*tower.parameters(), scale))]
    found = results("contrastive", size, tmp_path)
    for mine in found:
        for value, wanted in zip((mine[name] for name in ("loss", "0", "1", "2")), expected, strict=True):
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)
            assert wanted.abs().max() > 1e-3
    assert all(torch.equal(mine[name], found[0][name]) for mine in found for name in mine)


@pytest.mark.parametrize("size", [2, 3])
def test_a_loss_whose_blocks_are_shared_is_that_of_one_process(size, tmp_path):
    found = results("losses", size, tmp_path)
    for kind in ("plain", "smoothed", "gallery", "smoothed gallery"):
        alone = found[0][f"{kind}.alone"]
        assert alone.abs().max() > 0.1
        for mine in found:
            assert torch.allclose(mine[f"{kind}.together"], alone, rtol=1e-10, atol=1e-12)
            assert torch.equal(mine[f"{kind}.together"], found[0][f"{kind}.together"])


def test_gradients_of_any_size_are_summed_alike_in_all_processes_and_each_time(tmp_path):
    first, again = (results("large", 3, tmp_path / name) for name in "ab")
    for name, total in first[0].items():
        shape = total.shape
        parts = [processes.numbers(*shape, seed=10 * rank + int(name)) for rank in range(3)]
        assert torch.allclose(total, sum(part.double() for part in parts).float(), atol=1e-5)
        assert all(torch.equal(total, other[name]) for other in (*first, *again))


def meeting(store, ranks, size, seconds=5.0):
    """What each of these processes gets that come in this order: the name of the part of the store, or the error."""

    def come(rank):
        try:
            return meet(store, rank, size, timedelta(seconds=seconds)).get("name")
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        found = []
        for rank in ranks:
            found.append(pool.submit(come, rank))
            time.sleep(0.15)  # longer than a process looks for the others
        if 0 in ranks and len(ranks) == size:
            life = store.get("gmp/life").decode()
            store.set(f"gmp/{life}/name", f"life {life}")
        return [one.result() for one in found]


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_restarted_processes_meet_where_no_dead_one_has_been(ranks):
    store = torch.distributed.HashStore()
    assert meeting(store, ranks, 3) == [b"life 1"] * 3
    assert meeting(store, ranks, 3) == [b"life 2"] * 3
    assert all(isinstance(one, RuntimeError) for one in meeting(store, (0, 1), 3, 0.5))  # one died on its way
    assert all(isinstance(one, RuntimeError) for one in meeting(store, (1, 2), 3, 0.5))
    assert meeting(store, ranks, 3) == [b"life 4"] * 3


# --- moments that are shared out


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [7, 7, 3, 3, 3, 1], [100, 1, 1, 1], list(range(1, 60))])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_moments_are_shared_out_evenly(sizes, size):
    found = owners(sizes, size)
    loads = [sum(n for n, rank in zip(sizes, found, strict=True) if rank == one) for one in range(size)]
    assert sum(loads) == sum(sizes)
    assert max(loads) <= 4 / 3 * max(max(sizes), -(-sum(sizes) // size))


@pytest.mark.parametrize("size", [2, 3])
def test_steps_with_shared_moments_are_those_of_one_process_to_the_bit(size, tmp_path):
    found = results("adam", size, tmp_path)
    for state in processes.OPTIMIZERS:
        model, optimizer = processes.optimized(state)
        for step in range(processes.STEPS + 2):
            processes.grow(model, step)
            optimizer.step()
            if step == processes.STEPS - 1:
                checkpoint.save(tmp_path / f"one.{state}", processes.STEPS, model, optimizer, {}, 1, {})
        for name, parameter in model.named_parameters():
            for mine in found:
                assert torch.equal(mine[f"{state}.{name}"], parameter.detach())
                assert torch.equal(mine[f"{state}.again.{name}"], parameter.detach())  # from the checkpoint on
        files = [path.name for path in (tmp_path / f"one.{state}").iterdir()]
        assert len(files) == 3
        for file in files:
            assert (tmp_path / state / file).read_bytes() == (tmp_path / f"one.{state}" / file).read_bytes(), file
        kept = [int(mine[f"{state}.kept"]) for mine in found]
        everything = (1 if state == "lion" else 2) * sum(p.numel() for p in model.parameters())
        assert sum(kept) == everything and max(kept) < 0.65 * everything  # the largest parameter has 0.6


# --- what goes wrong


def test_processes_with_other_inputs_are_refused(tmp_path):
    with Started("unlike", 3, tmp_path) as started:
        assert started.wait() == [0, 0, 0]
    assert "process 2 has another data than process 0" in (tmp_path / "2.txt").read_text()
    assert all("same command" in (tmp_path / f"{rank}.txt").read_text() for rank in range(3))


def test_a_process_that_dies_ends_the_others(tmp_path):
    with Started("dies", 3, tmp_path) as started:
        assert started.wait(slice(0, 2)) == [0, 0]
    assert all((tmp_path / f"{rank}.txt").exists() for rank in (0, 1))


def test_a_process_that_hangs_is_given_up(tmp_path):
    with Started("hangs", 2, tmp_path) as started:
        assert started.wait(slice(0, 1)) == [0]
        assert (tmp_path / "hanging").exists() and started.processes[1].poll() is None
    assert (tmp_path / "0.txt").exists()


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="RANK is not set.*torchrun"), from_environment(CPU):
        pass


def test_a_process_by_itself_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with from_environment(CPU) as group:
        assert group is ALONE
    assert not torch.distributed.is_initialized()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several = {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert local_device(torch.device("cuda"), several) == torch.device("cuda", 1)
    assert local_device(CPU, several) == CPU
    assert local_device(torch.device("cuda", 1), {}) == torch.device("cuda", 1)
    with pytest.raises(InputError, match="process 3 of this machine has no GPU: there are 2"):
        local_device(torch.device("cuda"), several | {"LOCAL_RANK": "3"})
