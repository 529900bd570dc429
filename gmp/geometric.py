"""GmP: a Linear whose weight is split into a radius and a direction per output row.

weight = r · theta / ‖theta‖ row by row, the parametrisation of zer0int/CLIP-fine-tune (`GeometricLinear`), the same
function and gradients as weight normalisation (Salimans and Kingma 2016, arXiv 1602.07868) with unit starting rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .clip import CLIP, Attention, CLIPConfig, Linear, TextTower, VisionTower
from .config import Geometric, RepairConfig
from .errors import InputError
from .layouts.gmp import stem_of, weight_of

_MLP = re.compile(r"(^|\.)mlp\.c_(fc|proj)$")


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> r (out, 1), theta (out, in) with rows of unit length.

    The norm is taken in fp64 and both parts come back in fp32 or better, whatever the weight's dtype: splitting in
    fp16 moves a ViT-L/14's logits by 5e-4. A zero row gets r = 0 and an arbitrary unit direction: the weight is zero
    still, and the gradient finite.
    """
    keep = torch.promote_types(weight.dtype, torch.float32)
    exact = weight.double()
    r = exact.norm(dim=1, keepdim=True)
    theta = torch.where(r > 0, exact / r.clamp_min(torch.finfo(exact.dtype).tiny), exact.shape[1] ** -0.5)
    return r.to(keep), theta.to(keep)


def merge(r: Tensor, theta: Tensor) -> Tensor:
    """r (out, 1), theta (out, in) -> weight (out, in) = r · theta / ‖theta‖."""
    return (r.double() * F.normalize(theta.double(), dim=1)).to(torch.promote_types(theta.dtype, torch.float32))


class _Geometric(torch.autograd.Function):
    """The product and its gradient without a graph over the weight: neither direction nor weight is kept for later.

    With M = gradᵀ x, what a plain weight's gradient would be, and a = Σ M·theta/‖theta‖ by row: d r = a and
    d theta = r/‖theta‖ (M - theta · a/‖theta‖), the part of M across theta (arXiv 1602.07868, section 2.1).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, theta: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, r, theta)
        return F.linear(x, _weight(r, theta, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, r, theta = ctx.saved_tensors
        for_x, for_r, for_theta, for_bias = ctx.needs_input_grad
        norm = torch.linalg.vector_norm(theta, dim=1, keepdim=True)
        grad_x = grad @ _weight(r, theta, grad.dtype) if for_x else None
        grad_r = grad_theta = None
        if for_r or for_theta:
            plain = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(theta.dtype)  # (out, in)
            along = (plain * theta).sum(dim=1, keepdim=True) / norm
            grad_r = along
            grad_theta = plain.addcmul_(theta, -along / norm).mul_(r / norm)
        return grad_x, grad_r, grad_theta, grad.flatten(0, -2).sum(dim=0).to(r.dtype) if for_bias else None


def _weight(r: Tensor, theta: Tensor, dtype: torch.dtype) -> Tensor:  # (out, 1), (out, in) -> (out, in)
    scale = r / torch.linalg.vector_norm(theta, dim=1, keepdim=True)
    return torch.mul(theta, scale, out=torch.empty_like(theta, dtype=dtype))


class GeometricLinear(nn.Module):
    """y = x · (r · theta/‖theta‖)ᵀ + bias, with r (out, 1) and theta (out, in) as parameters."""

    def __init__(self, r: Tensor, theta: Tensor, bias: Tensor | None):
        super().__init__()
        self.r = nn.Parameter(r)
        self.theta = nn.Parameter(theta)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.sphere = False  # see `to_sphere`

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> GeometricLinear:
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*split(linear.weight.detach()), bias)

    def to_linear(self) -> nn.Linear:
        weight = merge(self.r.detach(), self.theta.detach())
        linear = Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True))
        return linear

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return _Geometric.apply(x, self.r, self.theta, self.bias)

    def extra_repr(self) -> str:
        out_features, in_features = self.theta.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"


class GeometricMatrix(nn.Module):
    """What stands in place of a matrix that is a parameter by itself, with r (out, 1) and theta (out, in).

    It is used as the matrix is: by `clip.linear` where its rows are outputs, as `x @ matrix` where its columns are, and
    then has the matrix's shape.
    """

    def __init__(self, r: Tensor, theta: Tensor, columns: bool):
        super().__init__()
        self.r = nn.Parameter(r)
        self.theta = nn.Parameter(theta)
        self.columns = columns
        self.sphere = False  # see `to_sphere`

    @classmethod
    def from_parameter(cls, matrix: Tensor, columns: bool) -> GeometricMatrix:
        matrix = matrix.detach()
        return cls(*split(matrix.T if columns else matrix), columns)

    def to_parameter(self) -> nn.Parameter:
        return nn.Parameter(_oriented(merge(self.r.detach(), self.theta.detach()), self.columns))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # (..., in) -> (..., out)
        return _Geometric.apply(x, self.r, self.theta, bias)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self(x)

    @property
    def shape(self) -> torch.Size:
        return self.theta.shape[::-1] if self.columns else self.theta.shape

    @property
    def device(self) -> torch.device:
        return self.theta.device


SPLIT = (GeometricLinear, GeometricMatrix)


def _oriented(weight: Tensor, columns: bool) -> Tensor:
    return weight.T.contiguous() if columns else weight


def is_mlp(name: str) -> bool:
    """True for `…mlp.c_fc` and `…mlp.c_proj`, the layers that the original recipe splits."""
    return bool(_MLP.search(name))


def to_geometric(model: nn.Module, where: Callable[[str], bool] = is_mlp) -> list[str]:
    """Splits the layers whose name `where` accepts into r and theta, in place; returns their names.

    Names are those of Linears (`…attn.out_proj`), and of matrices that are parameters: `…attn.in_proj_weight`,
    `text_projection`, `visual.proj`.
    """
    found = [name for name in _layers(model) if where(name)]
    for name in found:
        owner, leaf = _place(model, name)
        before = getattr(owner, leaf)
        if isinstance(before, nn.Linear):
            after, trains = GeometricLinear.from_linear(before), before.weight.requires_grad
        else:
            after, trains = GeometricMatrix.from_parameter(before, weight_of(name)[1]), before.requires_grad
            delattr(owner, leaf)
        setattr(owner, leaf, after.requires_grad_(trains))
    return found


def _layers(model: nn.Module) -> Iterator[str]:
    """Names of all Linears and of the matrices that are parameters."""
    matrices = {Attention: "in_proj_weight", TextTower: "text_projection", VisionTower: "proj"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name
        for kind, leaf in matrices.items():
            if isinstance(module, kind) and isinstance(getattr(module, leaf), nn.Parameter):
                yield f"{name}.{leaf}".removeprefix(".")


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def geometric_names(model: nn.Module) -> list[str]:
    """Names of the layers that are split."""
    return [name for name, module in model.named_modules() if isinstance(module, SPLIT)]


def fold(model: nn.Module) -> list[str]:
    """Turns every split layer back into a Linear, or a matrix, in place; returns their names."""
    found = geometric_names(model)
    for name in found:
        owner, leaf = _place(model, name)
        before = getattr(owner, leaf)
        trains = before.r.requires_grad or before.theta.requires_grad
        if isinstance(before, GeometricLinear):
            after = before.to_linear()
        else:
            after = before.to_parameter()
            delattr(owner, leaf)
        setattr(owner, leaf, after.requires_grad_(trains))
    return found


def split_state(state: Mapping[str, Tensor], where: Callable[[str], bool]) -> dict[str, Tensor]:
    """A canonical state dict with r and theta in place of the weights of layers whose name `where` accepts."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem = stem_of(name)
        if stem is not None and where(stem):
            rows = tensor.T if weight_of(stem)[1] else tensor
            result[f"{stem}.r"], result[f"{stem}.theta"] = split(rows)
        else:
            result[name] = tensor
    return result


def split_mlps(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with r and theta in place of the MLPs' weights; the inverse of `fold_state`."""
    return split_state(state, is_mlp)


def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with `.r` and `.theta` as the canonical one; everything else is passed on unchanged.

    Raises ValueError where only one of the two is present.
    """
    stems = {name.removesuffix(".theta") for name in state if name.endswith(".theta")}
    halves = stems ^ {name.removesuffix(".r") for name in state if name.endswith(".r")}
    if halves:
        raise ValueError(f"r or theta is missing for {sorted(halves)[:5]} ({len(halves)} layers)")
    folded = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if stem in stems and leaf == "theta":
            folded[weight_of(stem)[0]] = unsplit(stem, state[f"{stem}.r"], tensor)
        elif stem not in stems or leaf != "r":
            folded[name] = tensor
    return folded


def unsplit(stem: str, r: Tensor, theta: Tensor) -> Tensor:
    """The canonical tensor of the layer of this name."""
    return _oriented(merge(r, theta), weight_of(stem)[1])


# ---- which layers, and how they train -------------------------------------------------------------------------------

LEAVES = {"mlp": ("mlp.c_fc", "mlp.c_proj"), "qkv": ("attn.in_proj_weight",), "out": ("attn.out_proj",)}


def split_layers(config: CLIPConfig, settings: RepairConfig) -> dict[str, Geometric]:
    """The layers that the settings name, each with the entry that counts for it: the last one that names it.

    A range of blocks is about a tower's blocks; its projection has none. Raises InputError for an entry that names
    blocks which no tower has that trains.
    """
    found: dict[str, Geometric] = {}
    problems = []
    for number, entry in enumerate(settings.geometric):
        towers = {"text": config.text.layers} | ({"vision": config.vision.layers} if settings.train == "both" else {})
        towers = {name: layers for name, layers in towers.items() if entry.tower in (name, "both")}
        named = list(_named(entry, towers))
        leaves = [leaf for kind in entry.layers for leaf in LEAVES.get(kind, ())]
        if not named or (leaves and not any(name.endswith(tuple(leaves)) for name in named)):
            there = " and ".join(f"the {name} tower has blocks 0 to {n - 1}" for name, n in towers.items())
            problems.append(
                f"geometric[{number}] names blocks {entry.first} to {entry.last} and layers "
                f"{', '.join(entry.layers) or 'none'}, of which there are none: {there or 'no such tower trains'}, "
                f"with layers {', '.join((*LEAVES, 'projection'))}"
            )
        found |= dict.fromkeys(named, entry)
    if problems:
        raise InputError("; ".join(problems))
    return found


def _named(entry: Geometric, towers: Mapping[str, int]) -> Iterator[str]:
    for tower, layers in towers.items():
        stem = "" if tower == "text" else "visual."
        first, last = (end + layers if end < 0 else end for end in (entry.first, entry.last))
        for kind in dict.fromkeys(entry.layers):
            if kind == "projection":
                yield f"{stem}proj" if stem else "text_projection"
            for block in range(max(first, 0), min(last, layers - 1) + 1):
                yield from (f"{stem}transformer.resblocks.{block}.{leaf}" for leaf in LEAVES.get(kind, ()))


def split_trained(clip: CLIP, settings: RepairConfig) -> list[str]:
    """Splits those of the layers that the settings name which train, in place, and freezes what shall not move of them.

    Returns their names. Raises InputError as `split_layers`.
    """
    entries = split_layers(clip.config, settings)
    trained = {stem_of(name) for name, parameter in clip.named_parameters() if parameter.requires_grad}
    found = to_geometric(clip, lambda name: name in entries and name in trained)
    for name in found:
        layer, entry = clip.get_submodule(name), entries[name]
        layer.sphere = entry.sphere
        layer.r.requires_grad_(entry.train != "theta")
        layer.theta.requires_grad_(entry.train != "r")
    return found


def to_sphere(clip: nn.Module, moved: Mapping[str, Tensor]) -> None:
    """Brings the rows of thetas that shall stay on their sphere back to length 1, in place.

    The layer computes the same: it takes theta's direction alone. But a step across theta makes it longer (its gradient
    is orthogonal to it), so that the same step turns it less and less; at length 1 a step of an optimizer is an angle.
    moved: parameters by name that a step has moved; of weights that are shared out the rows that are here.
    """
    unit_rows([theta for name, theta in moved.items() if name.endswith(".theta") and _layer(clip, name).sphere])


def _layer(clip: nn.Module, name: str) -> nn.Module:
    return clip.get_submodule(name.rpartition(".")[0])


@torch.no_grad()
def unit_rows(thetas: Sequence[Tensor]) -> None:
    """Divides rows by their lengths, in place."""
    if not thetas:
        return
    lengths = [torch.linalg.vector_norm(theta, dim=1, keepdim=True) for theta in thetas]
    torch._foreach_clamp_min_(lengths, torch.finfo(thetas[0].dtype).tiny)
    torch._foreach_div_(list(thetas), lengths)
