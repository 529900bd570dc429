"""The mean of weights: held to a sum over all steps, and what of a CLIP it is and is not."""

from __future__ import annotations

import pytest
import torch

from gmp.compare import moved
from gmp.ema import Ema
from gmp.fsdp import Shards
from gmp.geometric import fold_state, to_geometric
from gmp.memory import move
from gmp.optim import make_optimizer, parameter_groups
from tests.small import small_clip, tokenize

CPU = torch.device("cpu")


def make(decay, rates=None):
    clip = small_clip()
    to_geometric(clip)
    clip.visual.requires_grad_(False)
    optimizer = make_optimizer(parameter_groups(clip, 1e-2, rates or {}, 0.01), (0.9, 0.98), CPU)
    return clip, optimizer, Ema(clip, optimizer, decay, Shards())


def go(clip, ema, steps):
    """Moves weights at random; what they were after each step, in fp64."""
    seen = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in clip.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        ema.update()
        seen.append({name: p.detach().double() for name, p in clip.named_parameters()})
    return seen


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_mean_is_the_sum_of_all_steps_by_their_weights(decay):
    clip, _, ema = make(decay)
    seen = go(clip, ema, 7)
    for name, mean in ema.means.items():
        counts = [decay ** (len(seen) - number) for number in range(1, len(seen) + 1)]
        expected = sum(count * one[name] for count, one in zip(counts, seen, strict=True)) / sum(counts)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        assert mean.dtype == torch.float32


def test_after_one_step_it_is_the_weights_and_before_it_the_start():
    clip, _, ema = make(0.9999)
    start = {name: p.detach().clone() for name, p in clip.named_parameters()}
    assert all(torch.equal(mean, start[name]) for name, mean in ema.means.items())
    go(clip, ema, 1)
    assert all(torch.equal(mean, clip.get_parameter(name)) for name, mean in ema.means.items())


def test_its_clip_has_the_means_and_all_else_in_the_trainings_own_memory():
    clip, optimizer, ema = make(0.5, {"token_embedding.weight": 0.0})
    go(clip, ema, 3)
    mean = ema.clip()
    assert mean is not clip and mean is ema.clip()
    trained = {name for group in optimizer.param_groups for name in group["names"]}
    assert ema.means.keys() == trained and "token_embedding.weight" not in trained
    for name, parameter in mean.named_parameters():
        assert parameter is (ema.means[name] if name in trained else clip.get_parameter(name))
        assert parameter.requires_grad == (name in trained) == clip.get_parameter(name).requires_grad
    assert list(mean.state_dict()) == list(clip.state_dict())


def test_means_of_r_and_theta_fold_to_the_mean_radius_and_the_direction_of_the_mean():
    clip, _, ema = make(0.5)
    go(clip, ema, 4)
    folded = fold_state(ema.clip().state_dict())
    stem = "transformer.resblocks.1.mlp.c_fc"
    r, theta = ema.means[f"{stem}.r"].double(), ema.means[f"{stem}.theta"].double()
    assert (theta.norm(dim=1) - 1).abs().max() > 0.01
    expected = r * theta / theta.norm(dim=1, keepdim=True)
    torch.testing.assert_close(folded[f"{stem}.weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_it_computes_with_the_means():
    clip, _, ema = make(0.5)
    ids = tokenize(["a cat", "two red cats"]).ids
    before = ema.clip()(ids).projected.detach()
    torch.testing.assert_close(before, clip(ids).projected.detach(), rtol=0, atol=0)
    go(clip, ema, 3)
    plain = small_clip()
    plain.load_state_dict(fold_state(ema.clip().state_dict()))
    torch.testing.assert_close(ema.clip()(ids).projected.detach(), plain(ids).projected.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ema.clip()(ids).projected.detach(), clip(ids).projected.detach(), atol=1e-3)


def test_it_can_be_measured_against_the_start_and_moved_away_and_back():
    clip, optimizer, ema = make(0.5)
    start = {name: tensor.clone() for name, tensor in fold_state(clip.state_dict()).items()}
    go(clip, ema, 3)
    mean, last = moved(ema.clip(), start), moved(clip, start)
    assert mean.keys() == last.keys() and all(0 < value < last[key] for key, value in mean.items())
    before = {name: mean.clone() for name, mean in ema.means.items()}
    move([clip, ema.clip()], optimizer, torch.device("cpu"))
    go(clip, ema, 1)
    assert ema.updates == 4 and any(not torch.equal(mean, before[name]) for name, mean in ema.means.items())
