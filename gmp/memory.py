"""Memory of a training: what it needs, what is free, what it uses, and moving it out of the way.

The estimate follows what torch keeps for the backward pass, operation by operation; tests hold it to real modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from .clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from .config import RepairConfig
from .errors import InputError
from .geometric import is_mlp, to_geometric
from .optim import parameter_groups

RESERVE = 0.05  # of what is needed: allocators round up, and their memory falls into pieces
GB = 2**30  # as drivers count, and the people who sell cards
CPU, GPU = torch.device("cpu"), torch.device("cuda")
MEASURED = 256  # captions in one pass while measuring (`measure.text_features`)
COMPARED = 64  # captions at the full context length in one pass (`measure.drift`), and pictures in one pass

_PROCESS = psutil.Process()
_OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # older torch has only the latter
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",  # from libraries that allocate for themselves
    "CUBLAS_STATUS_ALLOC_FAILED",
)


# ---- what one pass needs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """Captions or pictures on their way through a tower, `length` tokens each, and back through its last `blocks`."""

    tower: TextConfig | VisionConfig
    blocks: int
    rows: int
    length: int
    precision: str  # fp32, or autocast's: bf16, fp16
    geometric: bool
    checkpointing: bool
    fused: bool  # attention is one kernel that keeps no matrix of all pairs of tokens

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def size(self) -> int:
        """Bytes of an element where autocast rounds; LayerNorms and the residual stream stay in fp32."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return 4 * self.tokens * self.tower.width

    @property
    def hidden(self) -> int:
        """Bytes of the MLP's hidden layer."""
        return self.size * self.tokens * self.tower.mlp_width

    @property
    def activation(self) -> int:
        """How often `hidden` is there: gelu's input and output, of quick_gelu the sigmoid too."""
        return 3 if self.tower.activation == "quick_gelu" else 2

    @property
    def matrix(self) -> int:
        """Bytes of attention's matrix; attention that is not fused computes in fp32, under autocast too."""
        return 0 if self.fused else 4 * self.tokens * self.length * self.tower.heads

    @property
    def block(self) -> int:
        """Bytes that one block keeps for the backward pass, beside rounded weights."""
        width, mlp_width = self.tower.width, self.tower.mlp_width
        # both LayerNorms' input, mean and deviation; their output, and attention's
        size = 2 * self.stream + 16 * self.tokens + 3 * self.size * self.tokens * width
        if self.fused:
            size += self.tokens * (3 * self.size * width + 4 * self.tower.heads)  # q, k, v; a sum of each row
        else:
            size += 3 * self.stream + self.matrix
        built = 2 * self.size * width * mlp_width if self.geometric else 0
        return size + self.activation * self.hidden + built

    @property
    def rounded(self) -> int:
        """Bytes of one block's weights as autocast rounds them, once in a step."""
        width, mlp_width = self.tower.width, self.tower.mlp_width
        return 0 if self.size == 4 else 2 * (4 * width**2 + (0 if self.geometric else 2 * width * mlp_width))

    def saved(self) -> int:
        """Bytes that the way there keeps for the way back."""
        ends = self.stream  # what the final LayerNorm reads
        if isinstance(self.tower, VisionConfig):
            ends += self.stream + 3 * self.size * self.rows * self.tower.image_size**2  # the first one, and pixels
        return ends + self.blocks * (self.rounded + (self.stream if self.checkpointing else self.block))

    def again(self) -> int:
        """Bytes of the block that is computed again on the way back, beside its input."""
        return self.block - self.stream if self.checkpointing and self.blocks else 0

    def backward(self) -> int:
        """Bytes of gradients that come and go on the way back: of activations and, for a moment, of weights."""
        weight = 4 * self.tower.width * max(self.tower.mlp_width, 3 * self.tower.width)
        inside = max((self.activation - 1) * self.hidden, 2 * self.matrix)
        return self.stream + inside + weight * (4 if self.geometric else 1)

    def forward(self) -> int:
        """Bytes of a pass that keeps nothing."""
        weight = 4 * self.tower.width * max(self.tower.mlp_width, 3 * self.tower.width)
        inside = max(self.activation * self.hidden, 3 * self.stream + 2 * self.matrix)
        pixels = 12 * self.rows * self.tower.image_size**2 if isinstance(self.tower, VisionConfig) else 0
        return pixels + 4 * self.stream + inside + 2 * weight


# ---- what a training needs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes that a training takes on its device at the most, by what they are for."""

    weights: int  # fp32, of what does not train as well
    gradients: int
    moments: int  # AdamW's two
    activations: int  # kept for the backward pass, with the weights that are built or rounded for it
    teachers: int  # that anchors and drift are measured from
    other: int  # for a moment only: gradients of activations, logits, measuring, embedding pictures

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def sentence(self) -> str:
        """`weights 0.5 GB, gradients 0.5 GB, …`"""
        return ", ".join(f"{part.name} {_gb(getattr(self, part.name))}" for part in fields(self))


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= 0.1 * GB else f"{size / 2**20:.0f} MB"


@dataclass(frozen=True)
class _Sizes:
    """What batches do not change: numbers of elements, and how deep gradients go."""

    text: int
    vision: int
    teacher: int
    trained: int
    largest: int  # of the tensors that train
    text_depth: int  # blocks that gradients pass through
    vision_depth: int


def _sizes(config: CLIPConfig, settings: RepairConfig) -> _Sizes:
    """Read off modules that take no memory. Raises InputError for rates that match no parameter."""
    both = settings.train == "both"
    with torch.device("meta"):
        clip = CLIP(config)
    teacher = _count(clip.parameters()) - _count(clip.visual.parameters())
    clip.visual.requires_grad_(both)
    if settings.geometric:
        to_geometric(clip, lambda name: is_mlp(name) and (both or not name.startswith("visual.")))
    try:
        groups = parameter_groups(clip, 1.0, settings.rates, 0.0)
    except ValueError as error:
        raise InputError(str(error)) from None
    trained = [parameter for group in groups for parameter in group["params"]]
    vision = _count(clip.visual.parameters())
    return _Sizes(
        text=_count(clip.parameters()) - vision,
        vision=vision,
        teacher=teacher,
        trained=_count(trained),
        largest=max((parameter.numel() for parameter in trained), default=0),
        text_depth=_depth(clip),
        vision_depth=_depth(clip.visual),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _depth(tower: nn.Module) -> int:
    """Blocks that gradients pass through: from the first on that trains, or comes after something that does."""
    before = ("token_embedding", "positional_embedding", "conv1", "class_embedding", "ln_pre")
    if any(p.requires_grad for name, p in tower.named_parameters() if name.startswith(before)):
        return len(tower.transformer.resblocks)
    trains = [any(p.requires_grad for p in block.parameters()) for block in tower.transformer.resblocks]
    return len(trains) - trains.index(True) if any(trains) else 0


def estimate(
    config: CLIPConfig,
    settings: RepairConfig,
    precision: str,
    device: torch.device = GPU,
    *,
    caption_tokens: int | None = None,
    original: bool = True,
) -> Need:
    """What a repair takes on its device at the most, from embedding the pictures to the last step.

    precision: fp32, bf16 or fp16. caption_tokens: of the longest caption, with start and end of text; None is the
    context length. original: whether drift from an original is measured. AdamW is taken to be fused on CUDA, where it
    needs nothing for itself. Raises InputError for rates that match no parameter.
    """
    return _estimate(config, settings, precision, device, caption_tokens, original, _sizes(config, settings))


def _estimate(
    config: CLIPConfig,
    settings: RepairConfig,
    precision: str,
    device: torch.device,
    caption_tokens: int | None,
    original: bool,
    sizes: _Sizes,
) -> Need:
    both, on_cpu = settings.train == "both", device.type == "cpu"
    length = min(caption_tokens or config.text.context_length, config.text.context_length)
    captions = Pass(
        tower=config.text,
        blocks=sizes.text_depth,
        rows=settings.batch,
        length=length,
        precision=precision,
        geometric=settings.geometric,
        checkpointing=settings.checkpointing,
        fused=device.type in ("cpu", "cuda"),
    )
    patches = (config.vision.image_size // config.vision.patch_size) ** 2
    pictures = replace(captions, tower=config.vision, blocks=sizes.vision_depth, length=1 + patches)

    passes = [_contrastive(settings, captions, pictures if both else None, on_cpu)]
    if settings.anchors:
        passes.append(_anchors(settings, captions))
    peaks = [peak for _, peak in passes]
    wide = replace(pictures, rows=COMPARED, precision="fp32").forward()  # measuring and embedding know no autocast
    peaks += [_measuring(captions), wide if both else 0]
    peaks.append(12 * sizes.largest)  # how far the largest tensor has moved
    if device.type != "cuda":  # weights as they were before the step, and AdamW's own while it steps
        peaks.append(4 * sizes.trained + 8 * sizes.largest)
    teachers = {anchor.teacher for anchor in settings.anchors} | ({"original"} if original else set())
    need = Need(
        weights=4 * (sizes.text + (sizes.vision if both or on_cpu else 0)),
        gradients=4 * sizes.trained,
        moments=8 * sizes.trained,
        activations=max(kept for kept, _ in passes),
        teachers=4 * len(teachers) * sizes.teacher,
        other=0,
    )
    if not both:  # the vision tower is on the device until all pictures are embedded, gradients and teachers are later
        peaks.append(wide + (0 if on_cpu else 4 * sizes.vision) - need.gradients - need.teachers)
    return replace(need, other=max(peaks) - need.activations)


def _contrastive(settings: RepairConfig, captions: Pass, pictures: Pass | None, on_cpu: bool) -> tuple[int, int]:
    """Bytes kept for the backward pass, and bytes in all at the most."""
    pairs = settings.step_pairs
    # logits, softmax in both directions, a gradient; features as they are and of unit length, and their gradients
    loss = 4 * pairs * (4 * pairs + 6 * captions.tower.embed_dim)
    passes = [captions, pictures] if pictures else [captions]
    if settings.accumulate > 1:  # one pass after the other, the loss between them
        kept = max(one.saved() + one.again() for one in passes)
        peak = max(loss, *(max(one.saved() + one.again() + one.backward(), one.forward()) for one in passes))
    else:
        saved = sum(one.saved() for one in passes)
        kept = saved + max(one.again() for one in passes)
        peak = saved + max(loss, *(max(one.again() + one.backward(), one.forward() - one.saved()) for one in passes))
    if pictures and on_cpu:  # the next pictures are decoded meanwhile
        peak += 12 * settings.batch * pictures.tower.image_size**2
    return kept, peak


def _anchors(settings: RepairConfig, captions: Pass) -> tuple[int, int]:
    """Bytes kept for the backward pass, and bytes in all at the most; captions have the full context length here."""
    points = {anchor.read_point for anchor in settings.anchors}
    rows = min(settings.batch, settings.anchor_captions)
    blocks = max(0, captions.blocks - 1) if points == {"penultimate"} else captions.blocks
    one = replace(captions, rows=rows, length=captions.tower.context_length, blocks=blocks)
    saved = one.saved() + len(settings.anchors) * 3 * one.stream  # the tower's rows, the teacher's, their difference
    return saved + one.again(), saved + max(one.again() + one.backward(), one.forward())  # forward: of the teacher


def _measuring(captions: Pass) -> int:
    """Bytes of passes that measure, at the most."""
    short = replace(captions, rows=MEASURED, precision="fp32")
    full = replace(short, rows=COMPARED, length=captions.tower.context_length)
    return max(short.forward(), full.forward() + 4 * full.stream)  # two read points of two towers


def check(
    config: CLIPConfig,
    settings: RepairConfig,
    precision: str,
    device: torch.device,
    free: int | None,
    *,
    caption_tokens: int | None = None,
    original: bool = True,
) -> Need:
    """What `estimate` says, if that fits into `free` bytes with some reserve, or if `free` is not known.

    Raises InputError where it does not fit: what takes how much, and what fits and trains the same.
    """
    sizes = _sizes(config, settings)

    def need_of(changed: RepairConfig, place: torch.device = device) -> Need:
        return _estimate(config, changed, precision, place, caption_tokens, original, sizes)

    need = need_of(settings)
    if free is None or _with_reserve(need) <= free:
        return need
    problem = (
        f"Training does not fit on {device}: it needs {_gb(_with_reserve(need))}, reserve included, and {_gb(free)} "
        f"are free ({need.sentence()})"
    )
    fitting = []
    for checkpointing in sorted({settings.checkpointing, True}):
        for smaller in _pieces(replace(settings, checkpointing=checkpointing)):
            if _with_reserve(need_of(smaller)) <= free:
                fitting.append(f"{_told(smaller)} ({_gb(_with_reserve(need_of(smaller)))})")
                break
    if fitting:
        raise InputError(f"{problem}. What fits, with the same steps and the same result: {', or '.join(fitting)}.")
    smallest = list(_pieces(replace(settings, checkpointing=True)))[-1]
    raise InputError(
        f"{problem}. {_too_large(smallest, need_of(smallest), need_of(smallest, CPU), sizes, device, free)}"
    )


def _with_reserve(need: Need) -> int:
    return round(need.total * (1 + RESERVE))


def _pieces(settings: RepairConfig) -> Iterator[RepairConfig]:
    """The same steps in more and more pieces: accumulation is exact."""
    pairs = settings.step_pairs
    for batch in range(settings.batch, 1, -1):
        if pairs % batch == 0:
            yield replace(settings, batch=batch, accumulate=pairs // batch)


def _told(settings: RepairConfig) -> str:
    slower = " with checkpointing, which is a third slower" if settings.checkpointing else ""
    return f"batch {settings.batch} × accumulate {settings.accumulate}{slower}"


def _too_large(
    smallest: RepairConfig, need: Need, on_cpu: Need, sizes: _Sizes, device: torch.device, available: int
) -> str:
    """What to do where no batch fits. need, on_cpu: of the smallest pieces, on the device and on the CPU."""
    fixed = need.weights + need.gradients + need.moments
    told = f"batch {smallest.batch} with checkpointing"
    ways = [f"take a device with {_gb(_with_reserve(need))} free"]
    on_host = free(CPU)
    if device.type != "cpu" and on_host is not None and _with_reserve(on_cpu) <= on_host:
        ways.append(f"train on the CPU, which has {_gb(on_host)} free but is many times slower")
    if smallest.train == "both":
        ways.append("lock the vision tower (train text)")
    elements = sizes.text + (sizes.vision if smallest.train == "both" else 0)
    largest = elements * available / _with_reserve(need)
    if largest >= 1e7:
        ways.append(
            f"repair an encoder of {largest / 1e6:.0f} million parameters at the most (this has {elements / 1e6:.0f})"
        )
    return (
        f"Not even {told} fits: weights, gradients and moments alone take {_gb(fixed)}. "
        f"Free some memory, or {', or '.join(ways)}."
    )


# ---- what is there --------------------------------------------------------------------------------------------------

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (  # of version 2 and 1: limit, what is in use, and what of that is a cache of files, given up when needed
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free(device: torch.device) -> int | None:
    """Bytes that a training may take: what others leave, and what torch keeps for later. None where no one can tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *_container_free(_CGROUP)])
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def _container_free(root: Path) -> Iterator[int]:
    """Bytes up to the limits that a container sets, if any (kernel.org, cgroup-v2: Memory Interface Files)."""
    for limit, used_now, statistics, cache in _LIMITS:
        try:
            most = (root / limit).read_text().strip()
            if most == "max":
                continue
            known = dict(line.split() for line in (root / statistics).read_text().splitlines())
            taken = int((root / used_now).read_text()) - int(known.get(cache, 0))
            yield max(0, int(most) - taken)
        except (OSError, ValueError):  # not there, or of a kind that is not known
            continue


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on whichever device: only GPU allocators have an exception of their own."""
    if isinstance(error, _OUT_OF_MEMORY):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def used(device: torch.device) -> int:
    """Bytes that this process takes now. Waits for nothing.

    No peak is asked for: torch counts one for the whole process, and starting it anew is not ours to do.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return _PROCESS.memory_info().rss if device.type == "cpu" else 0


def release(device: torch.device) -> None:
    """Gives what torch keeps for later back to the system, so that others on the device can have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@torch.no_grad()
def move(
    modules: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    staying: nn.Module | None = None,
) -> None:
    """Moves parameters, buffers and optimizer state in place, but for those of `staying`; gradients are dropped.

    Parameters stay the objects that the optimizer and others hold. Step counters go along only where torch keeps them
    beside the parameters (`fused`, `capturable`; torch/optim/adam.py `_init_group`). A move that ended for lack of
    memory can be made again, in either direction.
    """
    stays = {id(tensor) for tensor in (*staying.parameters(), *staying.buffers())} if staying else set()
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in stays:
                tensor.data = tensor.data.to(device)
    for group in optimizer.param_groups if optimizer else ():
        beside = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if torch.is_tensor(value) and (key != "step" or beside):
                    state[key] = value.to(device)
