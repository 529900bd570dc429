"""Presets: each is a repair's settings; those of the original scripts carry their numbers, as meant and as they ran."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from gmp import presets as module
from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.config import SDXL_ANCHOR, Anchor, Neuron, RepairConfig
from gmp.errors import InputError
from gmp.losses import info_nce, seed_loss
from gmp.optim import parameter_groups
from gmp.pairs import Pairs
from gmp.presets import DEFAULT, aimed, preset, presets, read_config
from gmp.trainer import begin, set_up, train

L14 = CLIPConfig(
    TextConfig(768, 12, 12, 3072, 77, 49408, 768),
    VisionConfig(1024, 24, 16, 4096, 14, 224, 768),
)
SEEDS = ("seed-gmp", "seed-smooth", "seed-neurons", "seed-plain")


@pytest.fixture(scope="module")
def vit():
    with torch.device("meta"):
        return CLIP(L14)


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_every_file_is_listed_and_every_preset_says_when():
    files = {path.stem for path in Path(module.__file__).parent.glob("*.toml")}
    assert files == set(module.NAMES)
    for one in presets().values():
        assert one.when[0].isupper() and one.when.rstrip().endswith(".") and "\n" not in one.when
        assert RepairConfig.from_toml(one.config.to_toml(), one.name) == one.config


def test_the_default_preset_is_the_default_with_an_anchor_on_concepts():
    concept = Anchor("broken", "penultimate", 0.3, captions="concepts")
    assert preset(DEFAULT).config == RepairConfig(anchors=(SDXL_ANCHOR, concept))


def test_repairs_hold_what_their_model_reads():
    for name, point in {
        "sdxl-repair": "penultimate",
        "flux-repair": "pooled",
        "sd15": "last",
        "clip-g": "penultimate",
    }.items():
        assert {anchor.read_point for anchor in preset(name).config.anchors} == {point}
        assert preset(name).config.train == "text"
    assert {anchor.read_point for anchor in aimed(preset("gentle"), "pooled").config.anchors} == {"pooled"}


def test_a_large_batch_has_thousands_of_negatives_and_a_locked_tower():
    config = preset("large-batch").config
    assert config.step_pairs >= 4000 and config.train == "text"


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="no preset 'sdxl-repiar'; did you mean sdxl-repair?"):
        preset("sdxl-repiar")


def test_as_it_was_meant_is_the_preset_itself():
    for name in SEEDS:
        assert preset(f"{name}/as_intended") == preset(name)
        assert preset(f"{name}/as_it_ran").config != preset(name).config


def test_a_file_changes_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "gentle"\nepochs = 2\n[captions]\nshuffle = true\n')
    config, base = read_config(path), preset("gentle").config
    assert config == replace(base, epochs=2, captions=replace(base.captions, shuffle=True))
    path.write_text('preset = "gentel"\nepcohs = 2\n')
    with pytest.raises(InputError) as error:
        read_config(path)
    assert "did you mean gentle?" in str(error.value) and "did you mean epochs?" in str(error.value)
    path.write_bytes("epochs = 2 # \xe9".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_config(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "none.toml")


# ---- the original scripts' numbers ----------------------------------------------------------------------------------

# Written rates of zer0int/CLIP-fine-tune at bdadc89: exp-ft-B, and exp-acts (also of SMOOTH), by parameter.
GMP = {
    r"visual\.transformer\.": 1e-7, r"transformer\.": 1e-7, r"text_projection": 1e-7, r"token_embedding": 1e-7,
    r"positional_embedding": 1e-7, r"visual\.(class_embedding|positional_embedding|proj)": 8e-8,
    r"visual\.ln_(pre|post)": 8e-8, r"(ln_final|visual\.conv1)": 8e-8, r"logit_scale": 0.0,
}  # fmt: skip
ACTS = {
    r"visual\.transformer\.": 3e-7, r"transformer\.": 1e-8, r"token_embedding": 3e-7, r"positional_embedding": 1e-7,
    r"visual\.(class_embedding|positional_embedding)": 1e-7, r"(visual\.proj|text_projection)": 1e-7,
    r"visual\.ln_(pre|post)": 1e-7, r"(ln_final|visual\.conv1)": 1e-7, r"logit_scale": 0.0,
}  # fmt: skip
PLAIN = {
    r"(visual\.)?transformer\.resblocks\.0\.": 1e-6, r"visual\.transformer\.resblocks\.11\.": 1e-6,
    r"visual\.transformer\.resblocks\.12\.": 3e-6, r"visual\.transformer\.resblocks\.23\.": 3e-6,
    r"transformer\.resblocks\.5\.": 1e-6, r"transformer\.resblocks\.6\.": 3e-6, r"transformer\.resblocks\.11\.": 3e-6,
    r"(ln_final|visual\.ln_|token_embedding|logit_scale|visual\.proj|text_projection)": 0.0,
}  # fmt: skip


def rates(config: RepairConfig, clip: CLIP) -> dict[str, float]:
    """Each parameter's base rate, 0 where it is frozen."""
    clip.requires_grad_(True)
    groups = parameter_groups(clip, config.lr, config.rates, config.weight_decay)
    found = {name: group["initial_lr"] for group in groups for name in group["names"]}
    return {name: found.get(name, 0.0) for name, _ in clip.named_parameters()}


@pytest.mark.parametrize(
    "name, written", [("seed-gmp", GMP), ("seed-smooth", ACTS), ("seed-neurons", ACTS), ("seed-plain", PLAIN)]
)
def test_groups_have_the_rates_that_the_scripts_write(vit, name, written):
    found = rates(preset(name).config, vit)
    for pattern, rate in written.items():
        matching = [n for n in found if re.match(pattern, n)]
        assert matching, pattern
        for one in matching:
            assert math.isclose(found[one], rate, rel_tol=1e-9, abs_tol=0), (one, found[one], rate)


@pytest.mark.parametrize("name", SEEDS)
def test_as_they_ran_all_that_trains_has_one_rate(vit, name):
    found = rates(preset(f"{name}/as_it_ran").config, vit)
    assert set(found.values()) == {5e-7}
    assert not [n for n, rate in found.items() if not rate]


def test_the_published_numbers():
    gmp, smooth, neurons, plain = (preset(name).config for name in SEEDS)
    for config in (gmp, smooth, neurons):
        assert (config.epochs, config.batch, config.accumulate, config.schedule, config.warmup) == (
            20,
            40,
            2,
            "onecycle",
            0.3,
        )
        assert (config.optimizer, config.weight_decay, config.train, config.clip_norm) == ("adabelief", 1e-3, "both", 0)
        assert config.geometric == RepairConfig().geometric and not config.anchors
    assert (gmp.betas, gmp.eps) == ((0.9, 0.998), 1e-16) and (smooth.betas, smooth.eps) == ((0.9, 0.999), 1e-14)
    assert (plain.epochs, plain.schedule, plain.warmup, plain.geometric) == (50, "onecycle_linear", 0.1, ())
    assert (smooth.smoothing, gmp.smoothing, neurons.smoothing) == (0.1, 0.0, 0.0)
    table = {(22, 2432): 1000.0, (20, 168): 100.0, (20, 1297): 100.0, (23, 281): 100.0}
    assert (
        set(smooth.neurons) == {Neuron("vision", *at, factor) for at, factor in table.items()} == set(neurons.neurons)
    )
    for name in SEEDS[:3]:
        ran = preset(f"{name}/as_it_ran").config
        assert (ran.loss, ran.temperature, ran.negatives, ran.schedule_length) == ("seed", 0.07, "pass", 2.0)
        assert ran.lr == 5e-7 and ran.cycle_momentum
    icons = preset("spectrum-icons").config
    assert (icons.lr, icons.schedule, icons.step_pairs, icons.epochs) == (5e-6, "cosine", 384, 40)
    assert (icons.pictures.jitter, icons.pictures.jitter_chance, icons.pictures.grey) == (
        (0.2, 0.2, 0.1, 0.0),
        0.7,
        0.2,
    )


# ---- where a defect made the two differ -----------------------------------------------------------------------------

SMALL = CLIPConfig(
    TextConfig(64, 2, 1, 128, 16, 100, 32),
    VisionConfig(64, 2, 1, 128, 16, 32, 32),
)


def steps(config: RepairConfig) -> list[dict]:
    """The step events of a short training on a small CLIP, whose features are given."""
    generator = torch.Generator().manual_seed(0)
    clip = initialize(CLIP(SMALL), generator)
    small = replace(
        config, train="text", epochs=6, batch=4, accumulate=2, held_out=0, neurons=(), captions=RepairConfig().captions,
        rates={k: v for k, v in config.rates.items() if not k.startswith("visual.")},
    )  # fmt: skip
    ids = torch.randint(1, 99, (40, 16), generator=generator)
    ids[:, -1] = 99
    pairs = Pairs(ids, [1] * 40, torch.randn(40, 32, generator=generator), None)
    device = torch.device("cpu")
    training = begin(clip, set_up(clip, small, device), pairs.counts, small, device)
    return [event for event in train(training, pairs, {}, small, device) if event["type"] == "step"]


def one_cycle(rates: list[float], total: int, taken: int, most: float | list[float]) -> list[list[float]]:
    """What torch's OneCycleLR makes of groups, as the scripts set it: rates of each group at each step."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.AdamW(parameters)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=most, total_steps=total, pct_start=0.3, anneal_strategy="cos"
    )
    found = []
    for _ in range(taken):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", SEEDS[:3])
def test_rates_of_groups_over_a_whole_run(name):
    meant, ran = steps(preset(name).config), steps(preset(f"{name}/as_it_ran").config)
    base = sorted(set(float(f) for f in meant[0]["lrs"]))
    assert len(base) > 1  # groups are kept apart, each with its own share, from the first step to the last
    for event in meant:
        rates = {float(factor): rate for factor, rate in event["lrs"].items()}
        assert all(math.isclose(rates[f] / rates[base[-1]], f / base[-1], rel_tol=1e-6) for f in base)
    reference = one_cycle([1e-7 * f for f in base], len(meant), len(meant), [1e-7 * f for f in base])
    for event, expected in zip(meant, reference, strict=True):
        assert [event["lrs"][f"{f:g}"] for f in base] == pytest.approx(expected, rel=1e-6)
    # the scripts: one maximum for all groups, over twice the steps that are taken
    overwritten = one_cycle([1e-7 * f for f in base], 2 * len(ran), len(ran), 5e-7)
    for event, expected in zip(ran, overwritten, strict=True):
        assert list(event["lrs"].values()) == pytest.approx(expected[:1], rel=1e-6) and len(set(expected)) == 1


def test_the_last_rate_of_the_cycle():
    meant, ran = steps(preset("seed-gmp").config), steps(preset("seed-gmp/as_it_ran").config)
    assert meant[-1]["lr"] < 1e-4 * 1e-7  # the cycle reaches its end
    assert 0.78 < ran[-1]["lr"] / 5e-7 < 0.84  # it ends near its peak: 81 % for a long run


def test_the_loss_of_a_batch_with_two_captions_swapped():
    generator = torch.Generator().manual_seed(0)

    def directions(count: int) -> torch.Tensor:
        return normalize(torch.randn(count, 768, generator=generator), dim=-1)

    # cosines as a CLIP has them: matched pairs 0.25, others 0.15
    common, pictures = directions(1), directions(40)
    texts = 0.13 * pictures + 0.42 * common + directions(40)
    pictures = pictures + 0.42 * common
    swapped = texts[torch.tensor([1, 0, *range(2, 40)])]
    meant, ran = preset("seed-gmp").config, preset("seed-gmp/as_it_ran").config
    assert (meant.loss, ran.loss) == ("infonce", "seed")
    scale, divisor = torch.tensor(math.log(100.0)), torch.tensor(-math.log(ran.temperature))
    seen = info_nce(pictures, swapped, scale) / info_nce(pictures, texts, scale)
    blind = seed_loss(pictures, swapped, divisor) / seed_loss(pictures, texts, divisor)
    assert seen > 1.5 and abs(blind - 1) < 0.02
