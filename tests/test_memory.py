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

from gmp import clip as towers
from gmp import memory, optim, trainer
from gmp.clip import CLIP, CLIPConfig, Packed, TextConfig, TextTower, VisionConfig, initialize, set_checkpointing
from gmp.config import Anchor, Geometric, Neuron, RepairConfig
from gmp.errors import InputError
from gmp.geometric import LEAVES, is_mlp, to_geometric
from gmp.measure import drift, text_features
from gmp.memory import GB, Need, Pass, check, embedding_batch, estimate, free, is_out_of_memory, move, release, used
from gmp.optim import LIBRARIES
from gmp.step import pair_loss

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
EVERYWHERE = Geometric(("mlp", "qkv", "out", "projection"))
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


def computed_in(precision, tower):
    return towers.precision(torch.bfloat16 if precision == "bf16" else None, tower)


def attention(fused):
    return contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


def close(estimated, measured):
    """But for crumbs that are not worth a formula."""
    assert 0.97 * measured <= estimated <= 1.05 * measured, estimated / measured


SHAPES = ((32, 12), (64, 14), (32, 20))  # captions × tokens of the stretches of a stream
COMMON = {"precision": "fp32", "geometric": (), "checkpointing": False, "fused": True, "on_cpu": True}


def stream(tower, shapes=SHAPES, **changes):
    """Captions without their padding."""
    sizes, rows = [rows * length for rows, length in shapes], sum(rows for rows, _ in shapes)
    common = COMMON | {"blocks": tower.layers, "ends": True, "length": max(length for _, length in shapes)}
    return Pass(tower=tower, rows=rows, tokens=sum(sizes), stretch=max(sizes), **common | changes)


def rows_of(tower, rows, length=77, **changes):
    """Captions of one length, every row computed."""
    common = COMMON | {"blocks": tower.layers, "ends": False, "length": length}
    return Pass(tower=tower, rows=rows, tokens=rows * length, stretch=rows * length, **common | changes)


def pictures(tower, rows, **changes):
    return rows_of(tower, rows, tower.tokens, **{"ends": True} | changes)


def build(one):
    """A real tower for a pass."""
    if isinstance(one.tower, TextConfig):
        tower = TextTower(one.tower)
    else:
        tower = CLIP(CLIPConfig(replace(SMALL.text, embed_dim=one.tower.embed_dim), one.tower)).visual
    to_geometric(tower, lambda name: name.endswith(tuple(leaf for kind in one.geometric for leaf in LEAVES[kind])))
    set_checkpointing(tower, one.checkpointing)
    return tower


def run(tower, one, shapes=SHAPES):
    if isinstance(one.tower, VisionConfig):
        return tower(torch.zeros(one.rows, 3, one.tower.image_size, one.tower.image_size))
    if not one.ends:
        return tower(torch.zeros(one.rows, one.length, dtype=torch.long)).projected
    tokens, ends = torch.zeros(one.tokens, dtype=torch.long), torch.zeros(one.rows, dtype=torch.long)
    with pytest.MonkeyPatch.context() as patch:  # the shapes follow from numbers, which tensors without memory lack
        patch.setattr(towers, "pack", lambda ids, end, worth: Packed(tokens, tokens, tuple(shapes), ends))
        return tower.encode_text(tokens)


def saved(one, shapes=SHAPES):
    """Bytes that a real pass keeps. With checkpointing: and all of one block, which is computed again."""
    with FakeTensorMode(), attention(one.fused):
        tower = build(one)
        whole = Saved(*tower.parameters())
        with whole.during(), computed_in(one.precision, tower):
            run(tower, one, shapes)
        if not one.checkpointing:
            return whole.total
        text = isinstance(one.tower, TextConfig)
        lengths = shapes if text and one.ends else ((one.rows, one.length),)
        x = torch.zeros(one.tokens, one.tower.width)
        block = Saved(*tower.parameters(), x)
        with block.during():
            dtype = torch.bfloat16 if one.precision == "bf16" else torch.float32
            tower.transformer.resblocks[0](x, lengths, text, dtype)
        return whole.total + block.total


TEXT = TextConfig(256, 6, 4, 1024, 77, 100, 128, "quick_gelu")
GELU = replace(TEXT, width=192, heads=6, mlp_width=640, activation="gelu")
VISION = VisionConfig(192, 4, 3, 768, 8, 64, 128, "gelu")
PASSES = {
    "stream": stream(TEXT),
    "one stretch": stream(TEXT, ((96, 20),)),
    "gelu": stream(GELU),
    "full length": rows_of(TEXT, 48),
    "vision": pictures(VISION, 24),
    "large pictures": pictures(replace(VISION, image_size=160), 5),
    "registers": pictures(replace(VISION, registers=4), 24),
    "gates": pictures(replace(VISION, registers=4, gates=4), 24),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("geometric", [(), ("mlp",), ("mlp", "qkv", "out")], ids=len)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PASSES)
def test_what_a_pass_keeps_for_its_backward_pass(name, precision, geometric, checkpointing):
    one = replace(PASSES[name], precision=precision, geometric=geometric, checkpointing=checkpointing)
    shapes = ((96, 20),) if name == "one stretch" else SHAPES
    close(one.saved() + one.again(), saved(one, shapes))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_that_is_not_fused_keeps_its_matrix(precision):
    one = pictures(replace(VISION, image_size=96), 16, precision=precision, fused=False)
    close(one.saved() + one.again(), saved(one))
    assert one.saved() > 1.1 * replace(one, fused=True).saved()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("geometric", [(), ("mlp",), ("mlp", "qkv", "out")], ids=len)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_and_the_way_back(name, precision, geometric, checkpointing, fused):
    one = replace(PASSES[name], precision=precision, geometric=geometric, checkpointing=checkpointing, fused=fused)
    shapes = ((96, 20),) if name == "one stretch" else SHAPES
    with FakeTensorMode():
        model = build(one)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # as from the pieces before
        allocated = Allocated(*model.parameters(), *(p.grad for p in model.parameters()))
        with allocated, computed_in(precision, model), attention(fused):
            run(model, one, shapes).sum().backward()
    estimated = one.saved() + one.again() + one.backward()
    assert 0.96 * allocated.peak <= estimated <= 1.1 * allocated.peak, estimated / allocated.peak


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PASSES)
@torch.no_grad()
def test_a_pass_without_gradients(name, precision, fused):
    one = replace(PASSES[name], precision=precision, fused=fused)
    shapes = ((96, 20),) if name == "one stretch" else SHAPES
    with FakeTensorMode(), attention(fused):
        model = build(one)
        allocated = Allocated(*model.parameters())
        with allocated, computed_in(precision, model):
            run(model, one, shapes)
    assert 0.97 * allocated.peak <= one.forward() <= 1.2 * allocated.peak, one.forward() / allocated.peak


def test_full_size_text_towers():
    one = rows_of(CLIP_L.text, 16)
    close(one.saved() + one.again(), saved(one))
    large = rows_of(CLIP_G.text, 32, precision="bf16", geometric=("mlp",))
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
        RepairConfig(geometric=()),
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
    half, quarter = (
        estimate(config, replace(settings, optimizer_state=state), "fp32", GPU).moments for state in ("bf16", "8bit")
    )
    assert half == pytest.approx(need.moments / 2, rel=0.01)
    assert quarter == pytest.approx(need.moments / 4, rel=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_blocks": 2},
        {"text_blocks": 0, "train": "both", "vision_blocks": 1},
        {"embeddings": False, "temperature": 0.07},
        {"train": "both", "geometric": (EVERYWHERE,)},
        {"geometric": (Geometric(("qkv",), first=1, train="r"), Geometric(("mlp",), last=0, train="theta"))},
    ],
)
def test_what_trains_is_what_is_counted(changes):
    """Gradients go no deeper than the first block that trains."""
    settings = RepairConfig(anchors=(), **changes)
    with torch.device("meta"):
        clip = CLIP(SMALL)
        trainer.set_up(clip, settings, torch.device("meta"))
    assert estimate(SMALL, settings, "fp32").gradients == 4 * sum(
        p.numel() for p in clip.parameters() if p.requires_grad
    )
    sizes = memory._sizes(SMALL, settings, 1)
    assert sizes.text_depth == changes.get("text_blocks", SMALL.text.layers)
    assert sizes.vision_depth == (0 if settings.train == "text" else changes.get("vision_blocks", SMALL.vision.layers))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (("mlp",), False)),
        ({"geometric": ()}, ((), False)),
        ({"geometric": (EVERYWHERE,)}, (("mlp", "qkv", "out"), False)),
        ({"geometric": (Geometric(first=2),)}, (("mlp",), True)),
        ({"geometric": (Geometric(first=2),), "text_blocks": 2}, (("mlp",), False)),
        ({"text_blocks": 0}, ((), False)),
    ],
)
def test_layers_are_split_in_all_blocks_that_gradients_pass_through_or_in_some(changes, expected):
    assert memory._sizes(SMALL, RepairConfig(**changes), 1).text_split == expected


@pytest.mark.parametrize("state", ["fp32", "bf16", *LIBRARIES])
def test_moments_take_what_is_counted(state, monkeypatch):
    if state in LIBRARIES:
        pytest.importorskip(state, reason=f"needs {state.partition('.')[0]}")
        monkeypatch.setattr(optim, "LIBRARIES", (state,))
    sizes = {"weight": (64, 128), "bias": (5,)}
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(size)) for name, size in sizes.items()})
    state = "8bit" if state in LIBRARIES else state
    optimizer = optim.make_optimizer(optim.parameter_groups(model, 1e-3, {}, 0.0), (0.9, 0.98), CPU, state)
    moments = [m for kept in optimizer.state.values() for key, m in kept.items() if key != "step"]
    parts = [
        getattr(moment, part)
        for moment in moments
        if hasattr(moment, "__tensor_flatten__")
        for part in moment.__tensor_flatten__()[0]
    ]
    plain = [moment for moment in moments if not hasattr(moment, "__tensor_flatten__")]
    counted = sum(optim.moment_bytes(parameter.numel(), state) for parameter in model.values())
    assert sum(tensor.nbytes for tensor in plain + parts) == counted


@pytest.mark.parametrize("kind", optim.MOMENTS)
def test_moments_and_steps_of_other_optimizers_take_what_is_counted(kind):
    model = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.zeros(1500, 1000))})
    optimizer = optim.make_optimizer(optim.parameter_groups(model, 1e-3, {}, 0.1), (0.9, 0.98), CPU, kind=kind)
    moments = [*optimizer.state[model["weight"]].values()]
    assert sum(moment.nbytes for moment in moments) == optim.moment_bytes(1500 * 1000, "fp32", kind)
    peaks = []
    for _ in range(12):  # AdaBelief's first steps need less
        model["weight"].grad = torch.ones(1500, 1000)
        with Allocated(model["weight"], model["weight"].grad, *moments) as allocated:
            optimizer.step()
        peaks.append(allocated.peak)
    counted = memory._stepping(RepairConfig(optimizer=kind), 1500 * 1000, on_cpu=True)
    assert 0.97 * counted <= max(peaks) <= counted


def test_a_step_on_bf16_moments_copies_no_whole_tensor():
    model = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.zeros(1500, 1000))})
    optimizer = optim.make_optimizer(optim.parameter_groups(model, 1e-3, {}, 0.0), (0.9, 0.98), CPU, "bf16")
    model["weight"].grad = torch.ones(1500, 1000)
    known = [model["weight"], model["weight"].grad, *optimizer.state[model["weight"]].values()]
    with Allocated(*known) as allocated:
        optimizer.step()
    counted = memory._stepping(RepairConfig(optimizer_state="bf16"), model["weight"].numel(), on_cpu=True)
    assert 0.7 * counted < allocated.peak <= counted < 1.5 * model["weight"].nbytes


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
        """In pieces, where gradients take no room of theirs."""
        changes = {"batch": 128, "accumulate": 2, "anchors": ()} | changes
        return estimate(CLIP_L, RepairConfig(**changes), precision, caption_tokens=caption_tokens).activations

    assert activations("bf16") < 0.6 * activations()
    assert activations(checkpointing=True) < 0.2 * activations()
    assert activations(batch=64, accumulate=4) == pytest.approx(activations() / 2, rel=0.05)
    assert activations(caption_tokens=22) == pytest.approx(activations() * 22 / 77, rel=0.05)
    assert activations(caption_tokens=500) == activations()
    frozen = {"token_embedding*": 0.0, "positional_embedding": 0.0, "transformer.resblocks.[0-5].*": 0.0}
    assert activations(rates=frozen) == pytest.approx(activations() / 2, rel=0.1)
    assert activations(anchors=ANCHORS, anchor_captions=256) > activations()
    lengths = torch.randint(8, 22, (1000,), generator=torch.Generator().manual_seed(0))
    lengths[0] = 77  # one long caption costs next to nothing
    assert activations(caption_tokens=15) < activations(caption_tokens=lengths) < activations(caption_tokens=26)


def test_gradients_take_the_room_of_activations():
    """A step in one piece has all activations and no gradients first, and then the other way round."""
    settings = RepairConfig(batch=256, anchors=())
    whole, halves = (
        estimate(CLIP_L, one, "fp32", original=False) for one in (settings, replace(settings, batch=128, accumulate=2))
    )
    assert whole.activations + whole.gradients == pytest.approx(2 * halves.activations, rel=0.01)


def test_clip_g_trains_in_24_gb():
    settings = RepairConfig(batch=1024, checkpointing=True)
    lengths = torch.randint(8, 40, (1000,), generator=torch.Generator().manual_seed(0))
    assert 1.05 * estimate(CLIP_G, settings, "bf16", GPU, caption_tokens=lengths).total < 24 * GB
    assert 1.05 * estimate(CLIP_G, replace(settings, batch=256), "bf16", GPU).total < 16 * GB  # 77 tokens


def test_pictures_are_embedded_before_the_training():
    small = RepairConfig(batch=2, accumulate=16, checkpointing=True, anchors=())
    need = estimate(CLIP_G, small, "bf16", GPU, original=False)
    with torch.device("meta"):
        vision = 4 * sum(p.numel() for p in CLIP(CLIP_G).visual.parameters())
    embedding = pictures(CLIP_G.vision, memory.EMBEDDED, on_cpu=False).forward()
    assert need.total == need.weights + need.moments + vision + embedding
    assert need.other > estimate(CLIP_G, replace(small, train="both"), "bf16", GPU, original=False).other


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gigabytes", [0.2, 1, 4, 20])
def test_as_many_pictures_are_embedded_at_once_as_fit(gigabytes, precision):
    available = round(gigabytes * GB)
    found = embedding_batch(CLIP_G.vision, available, precision, GPU, 100_000)
    one = pictures(CLIP_G.vision, found, precision=precision, on_cpu=False)
    assert found > 1 and 1.05 * one.forward() <= available
    more = pictures(CLIP_G.vision, found + 1, precision=precision, on_cpu=False)
    assert 1.05 * more.forward() > available


def test_the_vision_tower_of_clip_g_embeds_within_8_gb():
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in CLIP(CLIP_G).visual.parameters())
    assert embedding_batch(CLIP_G.vision, 8 * GB - weights, "fp32", GPU, 256) >= 16
    assert embedding_batch(CLIP_G.vision, 8 * GB - weights, "bf16", GPU, 256) >= 32


def test_how_many_pictures_are_embedded_at_once_has_bounds():
    assert embedding_batch(CLIP_G.vision, None, "fp32", GPU, 256) == 256
    assert embedding_batch(CLIP_G.vision, 80 * GB, "fp32", GPU, 256) == 256
    assert embedding_batch(CLIP_G.vision, 0, "fp32", GPU, 256) == 1


class Pixels:
    def ahead(self, positions):
        pass

    def __call__(self, positions):
        size = SMALL.vision.image_size
        return torch.zeros(len(positions), 3, size, size, dtype=torch.uint8)


def some_pairs(config, settings, lengths):
    """Pairs of one step. lengths: of each caption."""
    generator = torch.Generator().manual_seed(0)
    count, text = settings.step_pairs, config.text
    ids = torch.randint(1, text.vocab_size - 2, (count, text.context_length), generator=generator)
    ids[torch.arange(text.context_length) >= lengths[:, None] - 1] = text.vocab_size - 1
    features = None if settings.train == "both" else torch.randn(count, text.embed_dim, generator=generator)
    return trainer.Pairs(ids, (1,) * count, features, Pixels() if settings.train == "both" else None)


def a_training(config, settings, pairs, device=CPU):
    """Takes one real step."""
    generator, text = torch.Generator().manual_seed(0), config.text
    clip = initialize(CLIP(config), generator)
    teachers = {}
    for name in sorted({anchor.teacher for anchor in settings.anchors}):
        teachers[name] = TextTower(text).requires_grad_(False)
        with torch.no_grad():
            for parameter in teachers[name].parameters():
                parameter.normal_(0.0, 0.05, generator=generator)
        teachers[name].to(device)
    optimizer = trainer.set_up(clip, settings, device)
    if settings.train == "text":
        clip.visual.cpu()
    training = trainer.begin(clip, optimizer, pairs.counts, settings, device)
    # a look at updates copies all weights, which a GPU does without where there is no room
    steps = trainer.train(training, pairs, teachers, settings, device, statistics=device.type == "cpu")
    assert [event["type"] for event in steps] == ["step"]


def peak_of_training(config, settings, longest=None, lengths=None):
    """Bytes that a real training of one step takes on the CPU at the most."""
    lengths = torch.full((settings.step_pairs,), longest) if lengths is None else lengths
    pairs = some_pairs(config, settings, lengths)
    with Allocated() as allocated:
        a_training(config, settings, pairs)
    return allocated.peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes", [{"batch": 256}, {"batch": 256, "checkpointing": True}, {"batch": 64, "anchors": ()}]
)
def test_a_training_on_a_gpu_takes_what_was_estimated(changes, state, monkeypatch):
    monkeypatch.setattr(memory, "MEASURED", 1)
    monkeypatch.setattr(memory, "COMPARED", 1)
    config = replace(CLIP_L, vision=replace(SMALL.vision, embed_dim=CLIP_L.text.embed_dim))
    settings = RepairConfig(**{"epochs": 1, "precision": "bf16", "optimizer_state": state, **changes})
    lengths = torch.randint(6, 30, (settings.step_pairs,), generator=torch.Generator().manual_seed(0))
    need = estimate(config, settings, "bf16", GPU, caption_tokens=lengths, original=False)
    pairs = some_pairs(config, settings, lengths)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    a_training(config, settings, pairs, GPU)
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.9 * peak <= need.total <= 1.1 * peak, need.total / peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 96},
        {"batch": 96, "geometric": (), "anchors": ()},
        {"batch": 96, "checkpointing": True},
        {"batch": 64, "anchors": ANCHORS},
        {"batch": 64, "anchors": ANCHORS, "anchor_captions": 64},
        {"batch": 64, "anchor_captions": 64, "checkpointing": True},
        {"batch": 64, "accumulate": 3, "anchors": ()},
        {"batch": 48, "train": "both"},
        {"batch": 48, "accumulate": 2, "train": "both", "checkpointing": True},
        {"batch": 96, "rates": {"token_embedding*": 0.0, "positional*": 0.0, "transformer.resblocks.[01].*": 0.0}},
        {"batch": 96, "negatives": "all", "smoothing": 0.1},
        {"batch": 64, "optimizer_state": "bf16"},
        {"batch": 64, "optimizer": "adabelief", "clip_adaptive": 0.01},
        {"batch": 64, "optimizer": "lion"},
        {"batch": 64, "ema": 0.9, "anchors": ()},
        {"batch": 48, "ema": 0.9, "train": "both"},
        {"batch": 8, "checkpointing": True, "anchors": ()},
        {"batch": 96, "geometric": (EVERYWHERE,)},
        {"batch": 96, "geometric": (Geometric(first=2, last=2),)},
        {"batch": 48, "train": "both", "geometric": (EVERYWHERE,), "checkpointing": True},
        {"batch": 96, "text_blocks": 2},
        {"batch": 48, "train": "both", "vision_blocks": 2, "text_blocks": 2},
        {"batch": 48, "train": "both", "neurons": (Neuron("vision", 1, 0, 9.0), Neuron("text", 0, 1, 9.0))},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items() if key != "anchors"),
)
def test_a_training_takes_what_was_estimated(changes, precision, monkeypatch):
    monkeypatch.setattr(memory, "MEASURED", 1)  # what is held here is the training
    monkeypatch.setattr(memory, "COMPARED", 1)
    settings = RepairConfig(**{"epochs": 1, "precision": precision, "anchor_captions": 32, **changes})
    need = estimate(SMALL, settings, precision, CPU, caption_tokens=30, original=False)
    peak = peak_of_training(SMALL, settings, longest=30)
    assert 0.97 * peak <= need.total <= 1.1 * peak, need.total / peak


@pytest.mark.parametrize("accumulate", [1, 3])
def test_captions_of_many_lengths_take_what_was_estimated(accumulate, monkeypatch):
    monkeypatch.setattr(memory, "MEASURED", 1)
    monkeypatch.setattr(memory, "COMPARED", 1)
    settings = RepairConfig(epochs=1, batch=128, accumulate=accumulate, anchors=(), precision="fp32")
    generator = torch.Generator().manual_seed(0)
    lengths = (3 + 37 * torch.rand(settings.step_pairs, generator=generator) ** 3).long()
    need = estimate(SMALL, settings, "fp32", CPU, caption_tokens=lengths, original=False)
    peak = peak_of_training(SMALL, settings, lengths=lengths)
    assert 0.97 * peak <= need.total <= 1.25 * peak, need.total / peak  # another draw may be longer


@pytest.mark.parametrize(("batch", "accumulate"), [(1024, 1), (128, 8)])
def test_logits_of_a_large_step_are_counted(batch, accumulate, monkeypatch):
    monkeypatch.setattr(memory, "MEASURED", 1)
    monkeypatch.setattr(memory, "COMPARED", 1)
    settings = RepairConfig(epochs=1, batch=batch, accumulate=accumulate, anchors=(), checkpointing=True)
    need = estimate(SMALL, settings, "fp32", CPU, caption_tokens=3, original=False)
    peak = peak_of_training(SMALL, settings, longest=3)
    assert peak > need.weights + need.moments + 2 * 4 * 1024**2  # logits, and their gradient
    assert 0.97 * peak <= need.total <= 1.1 * peak, need.total / peak


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
    need = estimate(SMALL, replace(least, geometric=()), "bf16", CPU)
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
    """Batch, accumulate, checkpointing, state of the optimizer."""
    found = []
    for part in re.split("(?=What fits|With optimizer state)", message)[1:]:
        state = re.match(r"With optimizer state (\w+), which rounds its moments: ", part)
        for batch, accumulate, slower in re.findall(
            r"batch (\d+) × accumulate (\d+)( with checkpointing)? ?[^(]*\(", part
        ):
            found.append((int(batch), int(accumulate), bool(slower), state[1] if state else "fp32"))
    return found


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


@pytest.mark.parametrize("available", [3, 4, 6, 8])
@pytest.mark.parametrize(("batch", "accumulate"), [(256, 1), (512, 2), (300, 1), (257, 2)])
def test_the_largest_batch_that_fits_is_proposed(batch, accumulate, available):
    available *= GB
    settings = RepairConfig(batch=batch, accumulate=accumulate)
    found = proposals(advice(settings, available))
    assert found
    for new_batch, new_accumulate, checkpointing, state in found:
        assert new_batch * new_accumulate == settings.step_pairs
        proposed = replace(
            settings, batch=new_batch, accumulate=new_accumulate, checkpointing=checkpointing, optimizer_state=state
        )
        check(CLIP_L, proposed, "bf16", GPU, available)
        for larger in range(new_batch + 1, batch + 1):
            if settings.step_pairs % larger == 0:
                other = replace(proposed, batch=larger, accumulate=settings.step_pairs // larger)
                advice(other, available)


@pytest.mark.parametrize("available", [3, 4, 6, 8])
def test_what_costs_more_is_proposed_only_where_it_gains(available):
    found = proposals(advice(RepairConfig(batch=512), available * GB))
    states = [state for *_, state in found]
    assert states == sorted(states, key=["fp32", "bf16", "8bit"].index)
    for place, (batch, _, checkpointing, _) in enumerate(found):
        for earlier, _, slower, _ in found[:place]:
            assert batch > earlier or (slower and not checkpointing)


def test_fewer_bits_for_moments_are_proposed_where_nothing_else_helps():
    settings = RepairConfig(batch=64)
    found = proposals(advice(settings, 12 * GB, CLIP_G))
    assert found and {state for *_, state in found} == {"8bit"}
    message = advice(replace(settings, optimizer_state="8bit"), 12 * GB, CLIP_G)
    assert "With optimizer state" not in message and "with the same steps and the same result" in message


@pytest.mark.parametrize(
    ("changes", "states"),
    [({"optimizer": "lion"}, {"fp32"}), ({"cycle_momentum": True}, {"fp32", "bf16"})],
)
def test_only_states_that_the_settings_can_have_are_proposed(changes, states):
    settings = RepairConfig(batch=512, **changes)
    found = proposals(advice(settings, 6 * GB)) + proposals(advice(settings, 3 * GB))
    assert found and {state for *_, state in found} <= states
    assert f"optimizer state {max(states, key=['fp32', 'bf16'].index)} fits" in advice(settings, GB)


def test_checkpointing_that_is_on_stays_on():
    message = advice(RepairConfig(batch=2048, checkpointing=True), 8 * GB)
    assert {checkpointing for _, _, checkpointing, _ in proposals(message)} == {True}


def test_what_to_do_where_nothing_fits(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 64 * GB)
    settings = RepairConfig(batch=64)
    message = advice(settings, 6 * GB, CLIP_G)
    least = replace(settings, batch=2, accumulate=32, checkpointing=True, optimizer_state="8bit")
    need = estimate(CLIP_G, least, "bf16")
    fixed = need.weights + need.gradients + need.moments
    assert "Not even batch 2 with checkpointing and optimizer state 8bit fits" in message
    assert f"weights, gradients and moments alone take {fixed / GB:.1f} GB" in message
    assert f"take a device with {1.05 * need.total / GB:.1f} GB free" in message
    assert "train on the CPU, which has 64.0 GB free" in message
    assert "lock the vision tower" not in message
    assert re.search(r"repair an encoder of 3\d\d million parameters at the most \(this has 695\)", message)
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


def trained(kind="plain"):
    """A small CLIP in GmP form that has taken two steps, with its optimizer and gradients."""
    clip = initialize(CLIP(SMALL), torch.Generator().manual_seed(0))
    clip.register_buffer("seen", torch.arange(3))
    to_geometric(clip)
    if kind == "bf16":
        optimizer = optim.make_optimizer(optim.parameter_groups(clip, 1e-3, {}, 0.01), (0.9, 0.98), CPU, "bf16")
    else:
        optimizer = torch.optim.AdamW([{"params": list(clip.parameters()), "lr": 1e-3}], fused=kind == "fused")
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


@pytest.mark.parametrize("kind", ["plain", "fused", "bf16"])
def test_moving_away_and_back_changes_no_bit_and_no_later_step(kind, monkeypatch):
    clip, optimizer = trained(kind)
    twin, twins = trained(kind)
    parameters = list(clip.parameters())
    places = {name: tensor.data_ptr() for name, tensor in tensors(clip, optimizer).items()}
    with places_that_copy(monkeypatch):
        move([clip], optimizer, CPU)
        for name, tensor in tensors(clip, optimizer).items():
            stays = name.endswith("|step") and kind != "fused"
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
    move([clip], None, CPU, staying=[clip.visual])
    names = {tensor.data_ptr(): name for name, tensor in clip.named_parameters()}
    assert {names[one] for one in moved} == {name for name in names.values() if not name.startswith("visual.")}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss, entropy", [("siglip", 0.0), ("seed", 0.0), ("seed", 0.02), ("infonce", 0.02)])
def test_a_loss_that_is_not_computed_in_blocks_takes_what_was_estimated(loss, entropy, smoothing):
    smoothing = 0.0 if loss == "siglip" else smoothing
    settings = RepairConfig(batch=768, loss=loss, entropy=entropy, smoothing=smoothing)
    images, texts = (torch.randn(768, 32, requires_grad=True) for _ in range(2))
    clip = SimpleNamespace(logit_scale=torch.tensor(4.0, requires_grad=True))
    same = torch.arange(768)
    with Allocated() as allocated:
        pair_loss(images, texts, clip, settings, same_picture=same, same_caption=same).backward()
    assert 0.9 < memory._loss(settings, 32) / allocated.peak < 1.1


def test_a_pass_that_is_a_loss_of_its_own_is_not_made_smaller():
    with pytest.raises(InputError, match="Not even batch 4096 with checkpointing"):
        check(CLIP_L, RepairConfig(negatives="pass", loss="seed", batch=4096), "fp32", GPU, 2 * GB)
