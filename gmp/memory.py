"""Memory of a training: what it needs, what is free, what it uses, and moving it out of the way.

The estimate follows what torch keeps for the backward pass, operation by operation; tests hold it to real modules.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from .clip import CLIP, WORTH, WORTH_ON_GPU, CLIPConfig, TextConfig, VisionConfig, pack
from .config import RepairConfig
from .errors import InputError
from .geometric import LEAVES, geometric_names
from .locks import choose
from .optim import MOMENTS, STATES, moment_bytes, parameter_groups

RESERVE = 0.05  # of what is needed: allocators round up, and their memory falls into pieces
GB = 2**30  # as drivers count, and the people who sell cards
CPU, GPU = torch.device("cpu"), torch.device("cuda")
MEASURED = 256  # captions in one pass while measuring (`measure.text_features`)
COMPARED = 64  # captions at the full context length in one pass (`measure.drift`), and pictures in one pass
EMBEDDED = 16  # pictures in one pass that a device should have room for; with more room there are more
SAMPLE = 4096  # captions whose lengths stand for all
GATHERED = 4  # copies of a shared-out block while it computes: weights and gradients, each whole and as they are sent
# matrices of all pairs that a loss holds which is not computed in blocks; entropy takes three more
MATRICES = {"infonce": 6.4, "siglip": 6.4, "seed": 9.6}
LOSS_BLOCK = 1024  # rows and columns of the logits that are there at once (`contrastive.contrastive`)

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
    """Captions or pictures on their way through a tower, and back through its last `blocks`.

    Captions are a stream without most of their padding (`clip.pack`), or rows of one length; pictures always are.
    """

    tower: TextConfig | VisionConfig
    blocks: int
    rows: int
    length: int  # of the longest row
    precision: str  # fp32, or what the blocks compute in: bf16, fp16
    geometric: tuple[str, ...]  # layers of blocks that are split into r and theta: of `geometric.LEAVES`
    checkpointing: bool
    fused: bool  # attention is one kernel that keeps no matrix of all pairs of tokens
    on_cpu: bool  # where attention is computed in fp32
    ends: bool  # of the last block only one row of each caption or picture is computed
    tokens: int  # of all rows
    stretch: int  # tokens that attention takes at once; those of a whole stream fall into several such stretches
    partly: bool = False  # some blocks have such layers unsplit

    @property
    def size(self) -> int:
        """Bytes of an element in the blocks' precision; LayerNorms and the residual stream stay in fp32."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return 4 * self.tokens * self.tower.width

    @property
    def hidden(self) -> int:
        """Bytes of the MLP's hidden layer; it is there before and after the activation."""
        return self.size * self.tokens * self.tower.mlp_width

    @property
    def wide(self) -> int:
        """Bytes of an element in attention."""
        return 4 if self.on_cpu else self.size

    @property
    def matrix(self) -> int:
        """Bytes of attention's matrix, which is in fp32 where attention is not fused."""
        return 0 if self.fused else 4 * self.tokens * self.length * self.tower.heads

    @property
    def attended(self) -> int:
        """Bytes that attention keeps: q, k and v; what came out and a sum of each row, or the matrix."""
        elements = self.tokens * self.tower.width
        if self.fused:
            return 4 * self.wide * elements + 4 * self.tokens * self.tower.heads
        return 3 * self.stream + self.matrix

    @property
    def rounded(self) -> int:
        """Bytes of one block's weights as they are rounded; split ones are built anew on the way back."""
        kept = (elements for kind, elements in self._matrices.items() if self.partly or kind not in self.geometric)
        return 0 if self.size == 4 else 2 * sum(kept)

    @property
    def _matrices(self) -> dict[str, int]:
        """Elements of the weights of a block, by layer."""
        width = self.tower.width
        return {"mlp": 2 * width * self.tower.mlp_width, "qkv": 3 * width**2, "out": width**2}

    @property
    def block(self) -> int:
        """Bytes that one block keeps for the backward pass."""
        copied = not self.fused or self.stretch < self.tokens or self.wide != self.size
        mixed = self.size * self.tokens * self.tower.width if copied else 0  # what `out_proj` reads
        return self._before + self.attended + mixed + self._behind(self.tokens)

    @property
    def last(self) -> int:
        """Bytes that the last block keeps."""
        return self._before + self.attended + self._of_ends if self.ends else self.block

    @property
    def _before(self) -> int:
        """Bytes that are kept before attention, and rounded weights."""
        return self.tokens * ((4 + self.size) * self.tower.width + 8) + self.rounded

    def _behind(self, tokens: int) -> int:
        """Bytes that LayerNorm and MLP behind attention keep of so many tokens."""
        return tokens * ((4 + self.size) * self.tower.width + 8 + 2 * self.size * self.tower.mlp_width)

    @property
    def _of_ends(self) -> int:
        """Bytes that the last block keeps of the rows that it computes to the end: places, `out_proj`, MLP."""
        return self._ended * (8 + self.size * self.tower.width) + self._behind(self._ended)

    @property
    def _ended(self) -> int:
        """Rows that the last block computes to the end: the registers' too where gates read them."""
        gated = isinstance(self.tower, VisionConfig) and self.tower.gates
        return self.rows * (1 + self.tower.registers if gated else 1)

    def saved(self) -> int:
        """Bytes that the way there keeps for the way back."""
        kept = self._ended * (8 * self.tower.width + 8) if self.ends else self.stream  # of the final LayerNorm
        if isinstance(self.tower, VisionConfig):
            # a gate's tokens, their mean, both in one row, and its hidden layer before and after ReLU
            kept += self.tower.gates * 4 * self.rows * self.tower.width * (self.tower.registers + 6)
            kept += self.stream + 3 * self.size * self.rows * self.tower.image_size**2  # the first one, and pixels
        if not self.blocks:
            return kept
        if self.checkpointing:
            return kept + self.blocks * self.stream
        return kept + (self.blocks - 1) * self.block + self.last

    def again(self) -> int:
        """Bytes of the block that is computed again on the way back, beside its input."""
        if not (self.checkpointing and self.blocks):
            return 0
        return (self.block if self.blocks > 1 else self.last) - self.stream

    def backward(self) -> int:
        """Bytes, beside `saved` and `again`, of gradients that come and go, of activations and of weights."""
        if not self.blocks:
            return 0
        width, mlp_width = self.tower.width, self.tower.mlp_width
        # a weight's gradient, and of GmP its product with theta
        widths = {"mlp": mlp_width, "qkv": 3 * width, "out": width}
        weight = 4 * width * max(size * (2 if kind in self.geometric else 1) for kind, size in widths.items())
        # the hidden layer's gradient before and after the activation, and of quick_gelu 1.702 x, less what is let go of
        inner = self.hidden * (2 if self.tower.activation == "quick_gelu" else 1)
        rounded = (4 - self.size) * self.tokens * width
        mlp = self.stream + max(inner + rounded, self.hidden + weight)
        attention = 2 * self.stream + self._of_attention
        if not self.ends:
            return max(mlp, attention - self._behind(self.tokens))
        # the last block has the whole of the others kept beside it, and they have none of it
        only = self.blocks == 1
        at_last = attention - self._of_ends + (self.last - self.block if self.checkpointing and not only else 0)
        done = self.stream if self.checkpointing else self.last
        before = 0 if only else max(mlp, attention - self._behind(self.tokens)) - done
        return max(weight, at_last, before)

    @property
    def _of_attention(self) -> int:
        """Bytes of gradients of q, k and v: of one stretch apart and put together, of those before together."""
        whole = self.wide * self.tokens * self.tower.width
        if self.stretch < self.tokens:
            return max(3 * whole, 2 * whole + 3 * self.wide * self.stretch * self.tower.width, 2 * self.matrix)
        return max(3 * whole, 2 * self.matrix)

    def forward(self) -> int:
        """Bytes of a pass that keeps nothing."""
        width, mlp_width = self.tower.width, self.tower.mlp_width
        built = bool(self.geometric) or self.size < 4
        weight = self.size * width * max(mlp_width, 3 * width) if built else 0
        rounded = self.size * self.tokens * width
        held = 0 if self.ends else self.stream  # the penultimate read point
        if isinstance(self.tower, VisionConfig):
            held += 12 * self.rows * self.tower.image_size**2 + rounded  # pixels, and patches of them
        mlp = 2 * rounded + max(2 * self.hidden, self.hidden + weight)
        attention = rounded + 3 * (self.wide + self.size) * self.tokens * width
        if not self.fused:
            attention = rounded + 3 * self.stream + (3 * self.stream + 2 * self.matrix) * self.stretch // self.tokens
        return held + 2 * self.stream + max(mlp, attention)


# ---- what a training needs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes that a training takes on its device at the most, by what they are for."""

    weights: int  # fp32, of what does not train as well, and the mean of those that do (`ema`), if there is one
    gradients: int
    moments: int  # the optimizer's
    activations: int  # kept for the backward pass, but for the room that gradients take once they are let go of
    teachers: int  # that anchors and drift are measured from
    other: int  # for a moment only: gradients of activations, logits, measuring, embedding pictures

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def sentence(self) -> str:
        """`weights 0.5 GB, gradients 0.5 GB, …`"""
        return ", ".join(f"{part.name} {_gb(getattr(self, part.name))}" for part in fields(self))


@dataclass
class Taken:
    """What a sitting of a run takes of its device, beside what was estimated; bytes."""

    estimate: int
    before: int  # that the process took already
    most: int = 0

    def see(self, used: int) -> None:
        self.most = max(self.most, used - self.before)

    def as_json(self) -> dict[str, int]:
        return {"estimate": self.estimate, "measured": self.most}


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= 0.1 * GB else f"{size / 2**20:.0f} MB"


@dataclass(frozen=True)
class _Sizes:
    """What batches do not change: numbers of elements, and how deep gradients go."""

    text: int
    vision: int
    teacher: int
    trained: tuple[int, ...]  # of each tensor that trains, what is on one device
    elsewhere: int  # of weights that are shared out over processes, what is not on this device
    shared: int  # of such weights all
    block: int  # of the largest block of such weights
    embedding: int  # of the tokens' embedding, if it trains: its gradient is the last to come
    text_depth: int  # blocks that gradients pass through
    vision_depth: int
    text_split: tuple[tuple[str, ...], bool]  # layers that are split, and whether only in some of these blocks
    vision_split: tuple[tuple[str, ...], bool]


def _sizes(config: CLIPConfig, settings: RepairConfig, processes: int) -> _Sizes:
    """Read off modules that take no memory. Raises InputError for rates that match no parameter, and as `locks.choose`.

    processes: that the blocks' weights are shared out over (`fsdp`).
    """
    both = settings.train == "both"
    with torch.device("meta"):
        clip = CLIP(config)
    teacher = _count(clip.parameters()) - _count(clip.visual.parameters())
    choose(clip, settings)
    try:
        groups = parameter_groups(clip, 1.0, settings.rates, 0.0)
    except ValueError as error:
        raise InputError(str(error)) from None
    blocks = [*clip.transformer.resblocks, *(clip.visual.transformer.resblocks if both else ())]
    shared = {parameter for block in blocks for parameter in block.parameters()} if processes > 1 else set()
    trained = tuple(
        _share(parameter, processes) if parameter in shared else parameter.numel()
        for group in groups
        for parameter in group["params"]
    )
    vision, embedding = _count(clip.visual.parameters()), clip.token_embedding.weight
    return _Sizes(
        text=_count(clip.parameters()) - vision,
        vision=vision,
        teacher=teacher,
        trained=trained,
        elsewhere=_count(shared) - sum(_share(parameter, processes) for parameter in shared),
        shared=_count(shared),
        block=max(_count(block.parameters()) for block in blocks) if shared else 0,
        embedding=embedding.numel() if embedding.requires_grad else 0,
        text_depth=_depth(clip),
        vision_depth=_depth(clip.visual),
        text_split=_split(clip.transformer, _depth(clip)),
        vision_split=_split(clip.visual.transformer, _depth(clip.visual)),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _share(parameter: nn.Parameter, processes: int) -> int:
    """Elements of the largest share, which is of whole rows."""
    return -(-len(parameter) // processes) * parameter[0].numel()


def _depth(tower: nn.Module) -> int:
    """Blocks that gradients pass through: from the first on that trains, or comes after something that does."""
    before = ("token_embedding", "positional_embedding", "conv1", "class_embedding", "register_tokens", "ln_pre")
    if any(p.requires_grad for name, p in tower.named_parameters() if name.startswith(before)):
        return len(tower.transformer.resblocks)
    trains = [any(p.requires_grad for p in block.parameters()) for block in tower.transformer.resblocks]
    return len(trains) - trains.index(True) if any(trains) else 0


def _split(stack: nn.Module, depth: int) -> tuple[tuple[str, ...], bool]:
    """Layers that are split in the last blocks, as many as `depth`, and whether some of these have them unsplit."""
    found = [set(geometric_names(block)) for block in list(stack.resblocks)[len(stack.resblocks) - depth :]]
    kinds = tuple(kind for kind, leaves in LEAVES.items() if any(leaf in names for names in found for leaf in leaves))
    return kinds, any(leaf not in names for names in found for kind in kinds for leaf in LEAVES[kind])


def estimate(
    config: CLIPConfig,
    settings: RepairConfig,
    precision: str,
    device: torch.device = GPU,
    *,
    caption_tokens: Tensor | int | None = None,
    original: bool = True,
    processes: int = 1,
) -> Need:
    """What a repair takes on its device at the most, from embedding the pictures to the last step.

    precision: fp32, bf16 or fp16. caption_tokens: of every caption, (n,), or of the longest one, with start and end of
    text; None is the context length. original: whether drift from an original is measured. processes: that weights are
    shared out over; it is the first one that is asked about, which measures. AdamW in fp32 or bf16 is taken to need
    nothing for itself on a CPU and on CUDA (`optim.make_optimizer`). Raises InputError for rates that match no
    parameter.
    """
    sizes = _sizes(config, settings, processes)
    return _estimate(config, settings, precision, device, _sample(caption_tokens), original, sizes)


def _estimate(
    config: CLIPConfig,
    settings: RepairConfig,
    precision: str,
    device: torch.device,
    caption_tokens: Tensor | int | None,
    original: bool,
    sizes: _Sizes,
) -> Need:
    both, on_cpu = settings.train == "both", device.type == "cpu"
    context = config.text.context_length
    captions = Pass(
        tower=config.text,
        blocks=sizes.text_depth,
        rows=settings.batch,
        length=context,
        precision=precision,
        geometric=sizes.text_split[0],
        checkpointing=settings.checkpointing,
        fused=device.type in ("cpu", "cuda"),
        on_cpu=on_cpu,
        ends=True,
        tokens=settings.batch * context,
        stretch=settings.batch * context,
        partly=sizes.text_split[1],
    )
    captions = _packed(captions, caption_tokens)
    pictures = _of_pictures(config.vision, settings.batch, precision, device)
    pictures = replace(
        pictures,
        blocks=sizes.vision_depth,
        geometric=sizes.vision_split[0],
        checkpointing=settings.checkpointing,
        partly=sizes.vision_split[1],
    )

    teachers = {anchor.teacher for anchor in settings.anchors} | ({"original"} if original else set())
    mean = sum(sizes.trained) if settings.ema else 0
    need = Need(
        weights=4 * (mean + sizes.text - sizes.elsewhere + (sizes.vision if both or on_cpu else 0)),
        gradients=4 * sum(sizes.trained),
        moments=sum(moment_bytes(elements, settings.optimizer_state, settings.optimizer) for elements in sizes.trained),
        activations=0,
        teachers=4 * len(teachers) * sizes.teacher,
        other=0,
    )
    passes = [_contrastive(settings, captions, pictures if both else None, need.gradients, sizes)]
    if settings.anchors:
        passes.append(_anchors(settings, captions, sizes))
    activations = max(kept for kept, _ in passes)
    scaled = {neuron.tower for neuron in settings.neurons}  # of the hidden layer's gradient there is another copy
    passes[0] = (
        passes[0][0],
        passes[0][1]
        + max((one.hidden for one, tower in ((captions, "text"), (pictures, "vision")) if tower in scaled), default=0),
    )
    open_block = GATHERED * 4 * sizes.block
    peaks = [peak + open_block for _, peak in passes]
    peaks.append(_measuring(captions) + 4 * sizes.shared)
    peaks += [_of_pictures(config.vision, COMPARED, "fp32", device).forward() + 4 * sizes.shared] if both else []
    peaks.append(8 * sizes.shared if settings.ema else 0)  # to be saved, weights and means are there whole
    largest = max(sizes.trained, default=0)
    peaks.append(12 * largest)  # how far the largest tensor has moved
    if device.type != "cuda":  # weights as they were before the step; where there is no room for them they are left out
        peaks.append(4 * sum(sizes.trained))
    peaks.append(_stepping(settings, largest, on_cpu))
    if not both:  # the vision tower is on the device until all pictures are embedded, gradients and teachers are later
        embedding = _of_pictures(config.vision, EMBEDDED, "fp32", device).forward()
        peaks.append(embedding + (0 if on_cpu else 4 * sizes.vision) - need.gradients - need.teachers)
    return replace(need, activations=activations, other=max(0, max(peaks) - activations))


def _sample(caption_tokens: Tensor | int | None) -> Tensor | int | None:
    """The lengths of many captions as those of a few thousand, ascending, with the longest one."""
    if not isinstance(caption_tokens, Tensor):
        return caption_tokens
    ordered = caption_tokens.sort().values
    count = min(len(ordered), SAMPLE)
    return ordered[torch.arange(count) * (len(ordered) - 1) // max(1, count - 1)]


def _packed(captions: Pass, caption_tokens: Tensor | int | None) -> Pass:
    """Captions as a stream: as many as `rows`, as long as those that are known, and a little longer.

    The sum of n lengths drawn from them is n times their mean, give or take √n deviations; three of those are added.
    """
    context, worth = captions.tower.context_length, WORTH["cpu"] if captions.on_cpu else WORTH_ON_GPU
    if not isinstance(caption_tokens, Tensor):
        length = min(caption_tokens or context, context)
        return replace(captions, length=length, tokens=captions.rows * length, stretch=captions.rows * length)
    known = caption_tokens.clamp(max=context)  # ascending
    drawn = known[(torch.arange(captions.rows) + 0.5).mul(len(known) / captions.rows).long().clamp(max=len(known) - 1)]
    longest = int(known[-1])
    ids = torch.zeros(captions.rows, longest, dtype=torch.uint8)
    ids[torch.arange(captions.rows), drawn - 1] = 1
    shapes = pack(ids, 1, worth).shapes
    sizes = [rows * length for rows, length in shapes]
    margin = 1 + 3 * known.double().std(correction=0).item() * captions.rows**0.5 / sum(sizes)
    most = captions.rows * longest
    return replace(
        captions,
        length=longest,
        tokens=min(round(margin * sum(sizes)), most),
        stretch=min(round(margin * max(sizes)), most),
    )


def _of_pictures(tower: VisionConfig, rows: int, precision: str, device: torch.device) -> Pass:
    """Pictures through a tower that nothing is kept of."""
    length = tower.tokens
    return Pass(
        tower=tower,
        blocks=0,
        rows=rows,
        length=length,
        precision=precision,
        geometric=(),
        checkpointing=False,
        fused=device.type in ("cpu", "cuda"),
        on_cpu=device.type == "cpu",
        ends=True,
        tokens=rows * length,
        stretch=rows * length,
    )


def embedding_batch(tower: VisionConfig, free: int | None, precision: str, device: torch.device, most: int) -> int:
    """Pictures in one pass without gradients for which `free` bytes, beside the tower's weights, suffice: 1 … most.

    free: None is unknown, and `most` is taken. 1 also where even that does not fit: it is found out by trying.
    """
    if free is None:
        return most

    def needed(rows: int) -> float:
        return _of_pictures(tower, rows, precision, device).forward() * (1 + RESERVE)

    return max(1, bisect.bisect_right(range(1, most + 1), free, key=needed))


def _contrastive(
    settings: RepairConfig, captions: Pass, pictures: Pass | None, gradients: int, sizes: _Sizes
) -> tuple[int, int]:
    """Bytes kept for the backward pass, and bytes in all at the most, both beside the gradients."""
    pairs, width = settings.step_pairs, captions.tower.embed_dim
    loss = _loss(settings, width)
    ahead = 0
    if pictures and captions.on_cpu:  # the next pictures are decoded meanwhile
        ahead = 3 * settings.batch * pictures.tower.image_size**2
    passes = [captions, pictures] if pictures else [captions]
    if settings.accumulate > 1:  # one pass after the other, the loss before; gradients of the first are there then
        kept = max(one.saved() + one.again() for one in passes)
        peak = max(one.saved() + one.again() + one.backward() for one in passes)
        leaves = 4 * pairs * 3 * width
        before = loss - gradients, max(one.forward() for one in passes) + leaves - gradients
        return kept, ahead + max(peak + leaves, 4 * sizes.embedding, *before)
    saved = sum(one.saved() for one in passes)
    kept = saved + max(one.again() for one in passes)
    # gradients come as activations go: all that is kept and none of them, or all of them and one block, is the most
    first = sum(4 * (one.tower.width * (4 * one.tower.width + 2 * one.tower.mlp_width)) for one in passes if one.blocks)
    start = max(loss + saved, *(saved + one.again() + one.backward() for one in passes)) + min(first, gradients)
    there = saved + max(one.forward() - one.saved() for one in passes)
    end = max((one.block + one.backward() for one in passes if one.blocks), default=0) - 4 * sizes.embedding
    return max(0, kept - gradients), ahead + max(max(start, there) - gradients, end)


def _loss(settings: RepairConfig, width: int) -> int:
    """Bytes of a loss: features as they are and of unit length, gradients, and logits, in blocks where they can be."""
    pairs = settings.step_pairs
    if settings.loss != "infonce" or settings.entropy:
        side = settings.batch if settings.negatives == "pass" else pairs
        matrices = MATRICES[settings.loss] + (3 if settings.entropy else 0)
        return round(4 * pairs * 7 * width + 4 * matrices * side**2)
    side = min(pairs, LOSS_BLOCK)
    blocks = (2 if pairs <= LOSS_BLOCK else 3) + (1.25 if settings.smoothing else 0)
    size = 4 * pairs * 7 * width + 4 * blocks * side**2
    if settings.negatives == "all":  # blocks of the pictures' features, and of the logits for them
        size += 4 * LOSS_BLOCK * (4 * width + 2 * side)
    return round(size)


def _anchors(settings: RepairConfig, captions: Pass, sizes: _Sizes) -> tuple[int, int]:
    """Bytes kept for the backward pass, and bytes in all at the most, both beside the gradients.

    Captions have the full context length here.
    """
    points = {anchor.read_point for anchor in settings.anchors}
    rows = min(settings.batch, settings.anchor_captions)
    blocks = max(0, captions.blocks - 1) if points == {"penultimate"} else captions.blocks
    one = _full(captions, rows, blocks)
    saved = one.saved() + len(settings.anchors) * 3 * one.stream  # the tower's rows, the teacher's, their difference
    peak = saved + max(one.again() + one.backward(), one.forward())  # forward: of the teacher
    return saved + one.again(), max(peak, 4 * sizes.embedding)


def _full(captions: Pass, rows: int, blocks: int) -> Pass:
    """Captions at the full context length, every row of theirs computed."""
    length = captions.tower.context_length
    tokens = rows * length
    return replace(captions, rows=rows, blocks=blocks, length=length, tokens=tokens, stretch=tokens, ends=False)


def _measuring(captions: Pass) -> int:
    """Bytes of passes that measure, at the most."""
    full = _full(replace(captions, precision="fp32"), COMPARED, captions.blocks)
    short = replace(
        full,
        rows=MEASURED,
        length=captions.length,
        tokens=MEASURED * captions.length,
        stretch=MEASURED * captions.length,
    )
    return max(short.forward(), full.forward() + 4 * full.stream)  # two read points of two towers


def _stepping(settings: RepairConfig, largest: int, on_cpu: bool) -> int:
    """Bytes that an optimizer takes for itself while it steps.

    AdamW with bf16 a block in fp32 and its noise, with 8 bits a tensor; others copies of one tensor: AdaBelief of the
    gradient's surprise and of the denominator, Lion of the update.
    """
    if settings.optimizer != "adamw":
        return 4 * largest * len(MOMENTS[settings.optimizer])
    if settings.optimizer_state == "bf16":
        return 32 * min(largest, 1 << 18 if on_cpu else 1 << 22)
    return 12 * largest if settings.optimizer_state == "8bit" else 0


def check(
    config: CLIPConfig,
    settings: RepairConfig,
    precision: str,
    device: torch.device,
    free: int | None,
    *,
    caption_tokens: Tensor | int | None = None,
    original: bool = True,
    processes: int = 1,
) -> Need:
    """What `estimate` says, if that fits into `free` bytes with some reserve, or if `free` is not known.

    Raises InputError where it does not fit: what takes how much, and what fits: in smaller pieces and with
    checkpointing, which give the same result, and with fewer bits for the moments, which does not to the last digit.
    """
    sizes, known = _sizes(config, settings, processes), _sample(caption_tokens)

    def need_of(changed: RepairConfig, place: torch.device = device) -> Need:
        return _estimate(config, changed, precision, place, known, original, sizes)

    need = need_of(settings)
    if free is None or _with_reserve(need) <= free:
        return need
    problem = (
        f"Training does not fit on {device}: it needs {_gb(_with_reserve(need))}, reserve included, and {_gb(free)} "
        f"are free ({need.sentence()})"
    )
    ways, largest = [], {False: 1, True: 1}  # by checkpointing: the largest batch so far
    for state in _states(settings):
        fitting = []
        for checkpointing in sorted({settings.checkpointing, True}):
            changed = replace(settings, optimizer_state=state, checkpointing=checkpointing)
            found = next((one for one in _pieces(changed) if _with_reserve(need_of(one)) <= free), None)
            if found and found.batch > (max(largest.values()) if checkpointing else largest[False]):
                fitting.append(f"{_told(found)} ({_gb(_with_reserve(need_of(found)))})")
                largest[checkpointing] = found.batch
        if fitting and state == settings.optimizer_state:
            ways.append(f"What fits, with the same steps and the same result: {', or '.join(fitting)}.")
        elif fitting:
            ways.append(f"With optimizer state {state}, which rounds its moments: {', or '.join(fitting)}.")
    if ways:
        raise InputError(f"{problem}. {' '.join(ways)}")
    smallest = list(_pieces(replace(settings, checkpointing=True, optimizer_state=_states(settings)[-1])))[-1]
    raise InputError(
        f"{problem}. {_too_large(smallest, need_of(smallest), need_of(smallest, CPU), sizes, device, free)}"
    )


def _with_reserve(need: Need) -> int:
    return round(need.total * (1 + RESERVE))


def _pieces(settings: RepairConfig) -> Iterator[RepairConfig]:
    """The same steps in more and more pieces: accumulation is exact, but where each pass is a loss of its own."""
    pairs = settings.step_pairs
    if settings.negatives == "pass":
        yield settings
        return
    for batch in range(settings.batch, 1, -1):
        if pairs % batch == 0:
            yield replace(settings, batch=batch, accumulate=pairs // batch)


def _states(settings: RepairConfig) -> tuple[str, ...]:
    """What moments could be kept in, from what is set on to fewer bits."""
    if settings.optimizer != "adamw":
        return (settings.optimizer_state,)
    return STATES[STATES.index(settings.optimizer_state) : -1 if settings.cycle_momentum else None]


def _told(settings: RepairConfig) -> str:
    slower = " with checkpointing, which is a third slower" if settings.checkpointing else ""
    return f"batch {settings.batch} × accumulate {settings.accumulate}{slower}"


def _too_large(
    smallest: RepairConfig, need: Need, on_cpu: Need, sizes: _Sizes, device: torch.device, available: int
) -> str:
    """What to do where no batch fits. need, on_cpu: of the smallest pieces, on the device and on the CPU."""
    fixed = need.weights + need.gradients + need.moments
    told = f"batch {smallest.batch} with checkpointing and optimizer state {smallest.optimizer_state}"
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
    staying: Iterable[nn.Module] = (),
) -> None:
    """Moves parameters, buffers and optimizer state in place, but for those of `staying`; gradients are dropped.

    Parameters stay the objects that the optimizer and others hold. Step counters go along only where torch keeps them
    beside the parameters (`fused`, `capturable`; torch/optim/adam.py `_init_group`). A move that ended for lack of
    memory can be made again, in either direction.
    """
    stays = {id(tensor) for module in staying for tensor in (*module.parameters(), *module.buffers())}
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in stays:
                tensor.data = tensor.data.to(device)
    for group in optimizer.param_groups if optimizer else ():
        beside = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            parameter.grad = None
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if torch.is_tensor(value) and (key != "step" or beside):
                    state[key] = value.to(device)
