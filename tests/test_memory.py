"""What a training needs, held to what torch keeps and allocates; what fits; what is free; moving away and back."""

from __future__ import annotations

import contextlib
import gc
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmp import memory, trainer
from gmp.clip import CLIP, CLIPConfig, TextConfig, TextTower, VisionConfig, initialize, set_checkpointing
from gmp.config import Anchor, RepairConfig
from gmp.errors import InputError
from gmp.geometric import is_mlp, to_geometric
from gmp.measure import drift, text_features
from gmp.memory import GB, Need, Pass, check, estimate, free, is_out_of_memory, move, release, used

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLIP_L = CLIPConfig(
    TextConfig(768, 12, 12, 3072, 77, 49408, 768, "quick_gelu"),
    VisionConfig(1024, 24, 16, 4096, 14, 224, 768, "quick_gelu"),
)
CLIP_G = CLIPConfig(
    TextConfig(1280, 32, 20, 5120, 77, 49408, 1280, "gelu"), VisionConfig(1664, 48, 16, 8192, 14, 224, 1280, "gelu")
)
SMALL = CLIPConfig(
    TextConfig(128, 4, 2, 512, 40, 50, 64, "quick_gelu"), VisionConfig(96, 3, 3, 200, 8, 48, 64, "quick_gelu")
)
ANCHORS = (Anchor("original", "penultimate", 0.3), Anchor("broken", "last", 0.3), Anchor("broken", "pooled", 0.1))


# ---- measurements ---------------------------------------------------------------------------------------------------


class Saved:
    """Storages that autograd keeps for the backward pass, each once, without those of the given tensors."""

    def __init__(self, *known):
        self.storages = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage  # held, so that no address comes twice
        return tensor

    @contextlib.contextmanager
    def during(self):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            yield

    @property
    def total(self):
        return sum(storage.nbytes() for storage in self.storages.values())


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations have made and that live still, and the most of them at once."""

    def __init__(self, *known):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def gone(self, key, size):
        self.alive.discard(key)
        self.now -= size


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def attention(fused):
    return contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


def close(estimated, measured):
    """But for crumbs that are not worth a formula."""
    assert 0.97 * measured <= estimated <= 1.05 * measured, estimated / measured


def one_pass(tower, rows, length=None, **changes):
    length = length or 1 + (tower.image_size // tower.patch_size) ** 2
    common = {"precision": "fp32", "geometric": False, "checkpointing": False, "fused": True, "blocks": tower.layers}
    return Pass(tower=tower, rows=rows, length=length, **common | changes)


def build(one):
    """A real tower for a pass."""
    if isinstance(one.tower, TextConfig):
        tower = TextTower(one.tower)
    else:
        tower = CLIP(CLIPConfig(replace(SMALL.text, embed_dim=one.tower.embed_dim), one.tower)).visual
    if one.geometric:
        to_geometric(tower)
    set_checkpointing(tower, one.checkpointing)
    return tower


def run(tower, one):
    if isinstance(one.tower, TextConfig):
        return tower(torch.zeros(one.rows, one.length, dtype=torch.long)).projected.float()
    return tower(torch.zeros(one.rows, 3, one.tower.image_size, one.tower.image_size)).float()


def saved(one):
    """Bytes that a real pass keeps. With checkpointing: and all of one block, which is computed again; autocast holds
    the rounded weights of the other blocks until the step ends."""
    with FakeTensorMode(), autocast(one.precision), attention(one.fused):
        tower = build(one)
        whole = Saved(*tower.parameters())
        with whole.during():
            run(tower, one)
        if not one.checkpointing:
            return whole.total
        blocks, x = tower.transformer.resblocks, torch.zeros(one.rows, one.length, one.tower.width)
        block = Saved(*tower.parameters(), x)
        with block.during():
            blocks[0](x, isinstance(one.tower, TextConfig))
        weights = [p for n, p in blocks[0].named_parameters() if p.ndim == 2 and not n.endswith((".r", ".theta"))]
        rounded = 2 * sum(p.numel() for p in weights) if one.precision == "bf16" else 0
        return whole.total + block.total + (len(blocks) - 1) * rounded


TEXT = TextConfig(256, 6, 4, 1024, 77, 100, 128, "quick_gelu")
GELU = replace(TEXT, width=192, heads=6, mlp_width=640, activation="gelu")
VISION = VisionConfig(192, 4, 3, 768, 8, 64, 128, "gelu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tower", "rows", "length"),
    [(TEXT, 64, 77), (TEXT, 16, 20), (GELU, 40, 77), (VISION, 24, None), (replace(VISION, image_size=160), 5, None)],
    ids=["quick_gelu", "short", "gelu", "vision", "large pictures"],
)
def test_what_a_pass_keeps_for_its_backward_pass(tower, rows, length, precision, geometric, checkpointing):
    one = one_pass(tower, rows, length, precision=precision, geometric=geometric, checkpointing=checkpointing)
    close(one.saved() + one.again(), saved(one))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_that_is_not_fused_keeps_its_matrix(precision):
    one = one_pass(replace(VISION, image_size=96), 16, precision=precision, fused=False)
    close(one.saved() + one.again(), saved(one))
    assert one.saved() > 1.1 * replace(one, fused=True).saved()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tower", [TEXT, replace(TEXT, activation="gelu")], ids=["quick_gelu", "gelu"])
def test_a_pass_and_the_way_back(tower, precision, geometric, checkpointing, fused):
    one = one_pass(tower, 128, 77, precision=precision, geometric=geometric, checkpointing=checkpointing, fused=fused)
    with FakeTensorMode():
        model = build(one)
        allocated = Allocated(*model.parameters())
        with allocated, autocast(precision), attention(fused):
            run(model, one).sum().backward()
        gradients = sum(4 * p.numel() for p in model.parameters())
    estimated = one.saved() + one.again() + one.backward()
    assert estimated <= 1.1 * allocated.peak
    assert estimated + gradients >= 0.97 * allocated.peak


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("tower", "rows", "length"),
    [(TEXT, 64, 77), (GELU, 64, 77), (VISION, 64, None)],
    ids=["quick_gelu", "gelu", "vision"],
)
@torch.no_grad()
def test_a_pass_without_gradients(tower, rows, length, fused):
    one = one_pass(tower, rows, length, fused=fused)
    with FakeTensorMode(), attention(fused):
        model = build(one)
        allocated = Allocated(*model.parameters())
        with allocated:
            run(model, one)
    assert 0.97 * allocated.peak <= one.forward() <= 1.2 * allocated.peak


def test_full_size_text_towers():
    one = one_pass(CLIP_L.text, 16, 77)
    assert one.saved() == pytest.approx(871 * 2**20, rel=0.1)
    close(one.saved() + one.again(), saved(one))
    large = one_pass(CLIP_G.text, 32, 77, precision="bf16", geometric=True)
    close(large.saved(), saved(large))
    again = replace(large, checkpointing=True)
    close(again.saved() + again.again(), saved(again))


# ---- a whole training -----------------------------------------------------------------------------------------------


def parameters_of(config, settings):
    """Elements by what becomes of them, counted one by one in the CLIP that a training makes."""
    with torch.device("meta"):
        clip = CLIP(config)
    both = settings.train == "both"
    frozen = [pattern for pattern, factor in settings.rates.items() if factor == 0]
    assert all(pattern.endswith("*") for pattern in frozen)
    counts = {"all": 0, "text": 0, "trained": 0}
    for name, parameter in clip.named_parameters():
        size, text = parameter.numel(), not name.startswith("visual.")
        stem = name.removesuffix(".weight")
        size += parameter.shape[0] if settings.geometric and is_mlp(stem) and stem != name and (text or both) else 0
        counts["all"] += size
        counts["text"] += size if text else 0
        trained = (text or both) and not any(name.startswith(pattern[:-1]) for pattern in frozen)
        counts["trained"] += size if trained else 0
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        RepairConfig(),
        RepairConfig(geometric=False),
        RepairConfig(train="both"),
        RepairConfig(rates={"token_embedding*": 0.0, "transformer.resblocks.1*": 0.0}),
    ],
    ids=["text", "plain", "both", "frozen"],
)
@pytest.mark.parametrize("config", [CLIP_L, CLIP_G], ids=["clip_l", "clip_g"])
def test_weights_gradients_and_moments_are_counted(config, settings):
    counts = parameters_of(config, settings)
    need = estimate(config, settings, "fp32", GPU)
    assert need.weights == 4 * counts["all" if settings.train == "both" else "text"]
    assert need.gradients == 4 * counts["trained"]
    assert need.moments == 2 * need.gradients
    assert estimate(config, settings, "fp32", CPU).weights == 4 * counts["all"]


def test_a_teacher_is_a_plain_text_tower():
    with torch.device("meta"):
        tower = 4 * sum(p.numel() for p in TextTower(CLIP_L.text).parameters())

    def teachers(original, *anchors):
        return estimate(CLIP_L, RepairConfig(anchors=anchors), "fp32", original=original).teachers / tower

    assert teachers(False) == 0
    assert teachers(True) == pytest.approx(1, rel=1e-6)
    assert teachers(True, *ANCHORS[:1]) == pytest.approx(1, rel=1e-6)
    assert teachers(True, *ANCHORS) == pytest.approx(2, rel=1e-6)


def test_a_training_of_clip_l_takes_some_gigabytes():
    need = estimate(CLIP_L, RepairConfig(batch=64), "bf16", GPU)
    assert need.total == sum(getattr(need, part) for part in Need.__dataclass_fields__)
    assert 3.5 * GB < need.total < 6 * GB
    assert 0.45 * GB < need.weights < 0.48 * GB
    assert need.sentence().startswith("weights 0.5 GB, gradients 0.5 GB, moments 0.9 GB, activations ")
    assert estimate(SMALL, RepairConfig(batch=64), "fp32", GPU).sentence().startswith("weights 3 MB, ")


def test_settings_that_save_memory():
    def activations(precision="fp32", caption_tokens=None, **changes):
        changes = {"batch": 256, "anchors": ()} | changes
        return estimate(CLIP_L, RepairConfig(**changes), precision, caption_tokens=caption_tokens).activations

    assert activations("bf16") < 0.6 * activations()
    assert activations(checkpointing=True) < 0.2 * activations()
    assert activations(batch=128, accumulate=2) == pytest.approx(activations() / 2, rel=0.05)
    assert activations(caption_tokens=22) == pytest.approx(activations() * 22 / 77, rel=0.05)
    assert activations(caption_tokens=500) == activations()
    frozen = {"token_embedding*": 0.0, "positional_embedding": 0.0, "transformer.resblocks.[0-5].*": 0.0}
    assert activations(rates=frozen) == pytest.approx(activations() / 2, rel=0.05)
    assert activations(anchors=ANCHORS, anchor_captions=256) > activations()


def test_pictures_are_embedded_before_the_training():
    small = RepairConfig(batch=2, accumulate=16, checkpointing=True, anchors=())
    need = estimate(CLIP_G, small, "bf16", GPU, original=False)
    with torch.device("meta"):
        vision = 4 * sum(p.numel() for p in CLIP(CLIP_G).visual.parameters())
    assert need.total > need.weights + need.moments + vision + 0.5 * GB
    assert need.other > estimate(CLIP_G, replace(small, train="both"), "bf16", GPU, original=False).other


class Pixels:
    def ahead(self, positions):
        pass

    def __call__(self, positions):
        size = SMALL.vision.image_size
        return torch.zeros(len(positions), 3, size, size)


def peak_of_training(config, settings, longest):
    """Bytes that a real training of one step takes on the CPU at the most."""
    generator = torch.Generator().manual_seed(0)
    count, text = settings.step_pairs, config.text
    ids = torch.randint(1, text.vocab_size - 2, (count, text.context_length), generator=generator)
    ids[:, longest - 1 :] = text.vocab_size - 1
    features = None if settings.train == "both" else torch.randn(count, text.embed_dim, generator=generator)
    pairs = trainer.Pairs(ids, (1,) * count, features, Pixels() if settings.train == "both" else None)
    with Allocated() as allocated:
        clip = initialize(CLIP(config), generator)
        teachers = {}
        for name in sorted({anchor.teacher for anchor in settings.anchors}):
            teachers[name] = TextTower(text).requires_grad_(False)
            with torch.no_grad():
                for parameter in teachers[name].parameters():
                    parameter.normal_(0.0, 0.05, generator=generator)
        training = trainer.begin(clip, trainer.set_up(clip, settings, CPU), pairs.counts, settings, CPU)
        steps = [e for e in trainer.train(training, pairs, teachers, settings, CPU) if e["type"] == "step"]
    assert len(steps) == 1
    return allocated.peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 96},
        {"batch": 96, "geometric": False, "anchors": ()},
        {"batch": 96, "checkpointing": True},
        {"batch": 64, "anchors": ANCHORS},
        {"batch": 64, "anchors": ANCHORS, "anchor_captions": 64},
        {"batch": 64, "anchor_captions": 64, "checkpointing": True},
        {"batch": 64, "accumulate": 3, "anchors": ()},
        {"batch": 48, "train": "both"},
        {"batch": 48, "accumulate": 2, "train": "both", "checkpointing": True},
        {"batch": 96, "rates": {"token_embedding*": 0.0, "positional*": 0.0, "transformer.resblocks.[01].*": 0.0}},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items() if key != "anchors"),
)
def test_a_training_takes_what_was_estimated(changes, precision, monkeypatch):
    monkeypatch.setattr(memory, "MEASURED", 1)  # what is held here is the training
    monkeypatch.setattr(memory, "COMPARED", 1)
    settings = RepairConfig(**{"epochs": 1, "precision": precision, "anchor_captions": 32, **changes})
    need = estimate(SMALL, settings, precision, CPU, caption_tokens=30, original=False)
    peak = peak_of_training(SMALL, settings, longest=30)
    assert peak <= need.total <= 1.2 * peak, need.total / peak


@pytest.mark.parametrize(("batch", "accumulate"), [(1024, 1), (128, 8)])
def test_logits_of_a_large_step_are_counted(batch, accumulate, monkeypatch):
    monkeypatch.setattr(memory, "MEASURED", 1)
    monkeypatch.setattr(memory, "COMPARED", 1)
    settings = RepairConfig(epochs=1, batch=batch, accumulate=accumulate, anchors=(), checkpointing=True)
    need = estimate(SMALL, settings, "fp32", CPU, caption_tokens=3, original=False)
    assert need.other > 12 * 1024**2
    peak = peak_of_training(SMALL, settings, longest=3)
    assert peak <= need.total <= 1.2 * peak, need.total / peak


@torch.no_grad()
def test_measuring_takes_what_was_estimated():
    clip, other = CLIP(SMALL), TextTower(SMALL.text)
    ids = torch.zeros(256, SMALL.text.context_length, dtype=torch.long)
    ids[:, -1] = SMALL.text.vocab_size - 1
    known = (*clip.parameters(), *other.parameters())
    with Allocated(*known) as features:
        text_features(clip, ids)
    with Allocated(*known) as compared:
        drift(clip, other, ids)
    least = RepairConfig(batch=2, checkpointing=True, anchors=())
    need = estimate(SMALL, replace(least, geometric=False), "bf16", CPU)
    measured = max(features.peak, compared.peak)
    assert measured <= need.activations + need.other <= 1.2 * measured


def test_an_estimate_draws_no_random_numbers_and_takes_no_memory():
    state = torch.get_rng_state()
    before = used(CPU)
    estimate(CLIP_G, RepairConfig(), "fp32")  # of a CLIP of 10 GB
    assert used(CPU) - before < 0.2 * GB
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_that_match_nothing_are_refused():
    with pytest.raises(InputError, match=r"no parameter that is trained: \['visual\.\*'\]"):
        estimate(CLIP_L, RepairConfig(rates={"visual.*": 1.0}), "fp32")


# ---- what fits ------------------------------------------------------------------------------------------------------


def advice(settings, available, config=CLIP_L, device=GPU):
    with pytest.raises(InputError) as error:
        check(config, settings, "bf16", device, available)
    return str(error.value)


def proposals(message):
    """Batch, accumulate, checkpointing."""
    found = re.findall(r"batch (\d+) × accumulate (\d+)( with checkpointing)? ?[^(]*\(", message)
    return [(int(batch), int(accumulate), bool(slower)) for batch, accumulate, slower in found]


def test_what_fits_is_told_what_it_takes():
    settings = RepairConfig()
    need = estimate(CLIP_L, settings, "bf16")
    assert check(CLIP_L, settings, "bf16", GPU, round(1.05 * need.total) + 1) == need
    assert check(CLIP_L, settings, "bf16", GPU, None) == need
    assert "does not fit on cuda" in advice(settings, need.total)


def test_what_does_not_fit_is_told_by_part():
    message = advice(RepairConfig(), 8 * GB)
    need = estimate(CLIP_L, RepairConfig(), "bf16")
    assert f"it needs {1.05 * need.total / GB:.1f} GB, reserve included, and 8.0 GB are free" in message
    assert need.sentence() in message
    assert "same result" in message


@pytest.mark.parametrize("available", [4, 6, 8])
@pytest.mark.parametrize(("batch", "accumulate"), [(256, 1), (512, 2), (300, 1), (257, 2)])
def test_the_largest_batch_that_fits_is_proposed(batch, accumulate, available):
    available *= GB
    settings = RepairConfig(batch=batch, accumulate=accumulate)
    found = proposals(advice(settings, available))
    assert found and found[-1][2]
    for new_batch, new_accumulate, checkpointing in found:
        assert new_batch * new_accumulate == settings.step_pairs
        proposed = replace(settings, batch=new_batch, accumulate=new_accumulate, checkpointing=checkpointing)
        check(CLIP_L, proposed, "bf16", GPU, available)
        for larger in range(new_batch + 1, batch + 1):
            if settings.step_pairs % larger == 0:
                other = replace(proposed, batch=larger, accumulate=settings.step_pairs // larger)
                advice(other, available)


def test_checkpointing_that_is_on_stays_on():
    message = advice(RepairConfig(batch=2048, checkpointing=True), 8 * GB)
    assert [checkpointing for *_, checkpointing in proposals(message)] == [True]


def test_what_to_do_where_nothing_fits(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 64 * GB)
    settings = RepairConfig(batch=64)
    message = advice(settings, 6 * GB, CLIP_G)
    need = estimate(CLIP_G, replace(settings, batch=2, accumulate=32, checkpointing=True), "bf16")
    fixed = need.weights + need.gradients + need.moments
    assert "Not even batch 2 with checkpointing fits" in message
    assert f"weights, gradients and moments alone take {fixed / GB:.1f} GB" in message
    assert f"take a device with {1.05 * need.total / GB:.1f} GB free" in message
    assert "train on the CPU, which has 64.0 GB free" in message
    assert "lock the vision tower" not in message
    assert re.search(r"repair an encoder of 2\d\d million parameters at the most \(this has 695\)", message)
    monkeypatch.setattr(memory, "free", lambda device: 2 * GB)
    assert "on the CPU" not in advice(settings, 6 * GB, CLIP_G)
    assert "on the CPU" not in advice(settings, 6 * GB, CLIP_G, CPU)
    assert "lock the vision tower" in advice(replace(settings, train="both"), 6 * GB, CLIP_G)


# ---- what is there --------------------------------------------------------------------------------------------------


def test_free_memory_of_a_gpu_is_what_others_leave_and_what_torch_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GB)
    assert free(torch.device("cuda:1")) == 6 * GB
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * GB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4 * GB)
    assert free(torch.device("mps")) == 6 * GB
    assert used(torch.device("mps")) == 4 * GB
    assert free(torch.device("xpu")) is None
    assert used(torch.device("xpu")) == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GB),
        ({"memory.max": "max", "memory.current": f"{GB}", "memory.stat": "inactive_file 0"}, 8 * GB),
        ({"memory.max": f"{4 * GB}", "memory.current": f"{GB}", "memory.stat": "anon 7\ninactive_file 0"}, 3 * GB),
        ({"memory.max": f"{4 * GB}", "memory.current": f"{3 * GB}", "memory.stat": f"inactive_file {GB}"}, 2 * GB),
        ({"memory.max": f"{4 * GB}", "memory.current": f"{5 * GB}", "memory.stat": "inactive_file 0"}, 0),
        ({"memory.max": f"{40 * GB}", "memory.current": f"{GB}", "memory.stat": "inactive_file 0"}, 8 * GB),
        ({"memory.max": "unheard of", "memory.current": "0", "memory.stat": ""}, 8 * GB),
        (
            {
                "memory/memory.limit_in_bytes": f"{4 * GB}",
                "memory/memory.usage_in_bytes": f"{2 * GB}",
                "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}",
            },
            3 * GB,
        ),
    ],
    ids=["none", "no limit", "limit", "file cache", "over it", "more than there is", "unknown", "version 1"],
)
def test_free_memory_of_a_cpu_knows_a_containers_limit(files, expected, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GB))
    assert free(CPU) == expected


def test_free_memory_of_this_machine():
    assert 0 < free(CPU) <= psutil.virtual_memory().total


def test_a_real_lack_of_memory_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.cuda.OutOfMemoryError("HIP out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_lacks_of_memory_of_other_devices_are_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("not enough memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_out_of_memory(error)


def test_used_memory_of_a_cpu_is_the_process():
    gc.collect()
    before = used(CPU)
    block = torch.ones(2**26)
    assert block.nbytes / 2 < used(CPU) - before < 2 * block.nbytes


def test_use_and_release_ask_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: asked.append("mps"))
    for device in (GPU, CPU, torch.device("mps")):
        release(device)
    assert used(GPU) == 7
    assert asked == ["empty", "mps"]


# ---- moving ---------------------------------------------------------------------------------------------------------


def trained(fused=False):
    """A small CLIP in GmP form that has taken two steps, with its optimizer and gradients."""
    clip = initialize(CLIP(SMALL), torch.Generator().manual_seed(0))
    clip.register_buffer("seen", torch.arange(3))
    to_geometric(clip)
    optimizer = torch.optim.AdamW([{"params": list(clip.parameters()), "lr": 1e-3}], fused=fused)
    step(clip, optimizer, 0)
    step(clip, optimizer, 1)
    return clip, optimizer


def step(clip, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in clip.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    optimizer.step()


def tensors(clip, optimizer):
    found = dict(clip.state_dict())
    for name, parameter in clip.named_parameters():
        found |= {f"{name}|{key}": value for key, value in optimizer.state[parameter].items()}
    return found


@contextlib.contextmanager
def places_that_copy(monkeypatch):
    """The CPU as a device of its own: whatever goes there lies elsewhere afterwards, as on a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())
        yield


@pytest.mark.parametrize("fused", [False, True])
def test_moving_away_and_back_changes_no_bit_and_no_later_step(fused, monkeypatch):
    clip, optimizer = trained(fused)
    twin, twins = trained(fused)
    parameters = list(clip.parameters())
    places = {name: tensor.data_ptr() for name, tensor in tensors(clip, optimizer).items()}
    with places_that_copy(monkeypatch):
        move([clip], optimizer, CPU)
        for name, tensor in tensors(clip, optimizer).items():
            stays = name.endswith("|step") and not fused
            assert (tensor.data_ptr() == places[name]) == stays, name
        move([clip], optimizer, CPU)
    assert all(now is then for now, then in zip(clip.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    for name, tensor in tensors(clip, optimizer).items():
        assert torch.equal(tensor, tensors(twin, twins)[name]), name
    step(clip, optimizer, 2)
    step(twin, twins, 2)
    for name, tensor in tensors(twin, twins).items():
        assert torch.equal(tensors(clip, optimizer)[name], tensor), name


def test_modules_move_without_an_optimizer(monkeypatch):
    clip, optimizer = trained()
    places = {name: tensor.data_ptr() for name, tensor in tensors(clip, optimizer).items()}
    with places_that_copy(monkeypatch):
        move([clip], None, CPU)
    for name, tensor in tensors(clip, optimizer).items():
        assert (tensor.data_ptr() == places[name]) == ("|" in name), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_moving_off_a_gpu_and_back(fused):
    clip, optimizer = trained()
    gpu = torch.optim.AdamW(clip.parameters(), lr=1e-3, fused=fused)
    move([clip], None, GPU)
    step(clip, gpu, 0)
    expected = {name: tensor.cpu().clone() for name, tensor in tensors(clip, gpu).items()}
    before = torch.cuda.memory_allocated()
    move([clip], gpu, CPU)
    assert torch.cuda.memory_allocated() < 0.1 * before
    move([clip], gpu, GPU)
    for name, tensor in tensors(clip, gpu).items():
        assert torch.equal(tensor.cpu(), expected[name]), name
    step(clip, gpu, 1)


def test_what_stays_is_not_moved(monkeypatch):
    clip = initialize(CLIP(SMALL), torch.Generator().manual_seed(0))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor.data_ptr()) or tensor)
    move([clip], None, CPU, staying=clip.visual)
    names = {tensor.data_ptr(): name for name, tensor in clip.named_parameters()}
    assert {names[one] for one in moved} == {name for name in names.values() if not name.startswith("visual.")}
