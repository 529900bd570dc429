"""GmP: a Linear whose weight is split into a radius and a direction per output row.

weight = r · theta / ‖theta‖ row by row, the parametrisation of zer0int/CLIP-fine-tune (`GeometricLinear`), the same
function and gradients as weight normalisation (Salimans and Kingma 2016, arXiv 1602.07868) with unit starting rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .clip import Linear

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


def is_mlp(name: str) -> bool:
    """True for `…mlp.c_fc` and `…mlp.c_proj`, the layers that the original recipe splits."""
    return bool(_MLP.search(name))


def _replace(model: nn.Module, kind: type, convert: Callable, where: Callable[[str], bool]) -> list[str]:
    found = [name for name, module in model.named_modules() if isinstance(module, kind) and where(name)]
    for name in found:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        before = getattr(owner, child)
        after = convert(before).requires_grad_(next(before.parameters()).requires_grad)
        setattr(owner, child, after)
    return found


def to_geometric(model: nn.Module, where: Callable[[str], bool] = is_mlp) -> list[str]:
    """Turns the Linears whose name `where` accepts into GeometricLinears, in place; returns their names."""
    return _replace(model, nn.Linear, GeometricLinear.from_linear, where)


def fold(model: nn.Module) -> list[str]:
    """Turns every GeometricLinear back into a Linear, in place; returns their names."""
    return _replace(model, GeometricLinear, GeometricLinear.to_linear, lambda name: True)


def split_mlps(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with r and theta in place of the MLPs' weights; the inverse of `fold_state`."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem != name and is_mlp(stem):
            result[f"{stem}.r"], result[f"{stem}.theta"] = split(tensor)
        else:
            result[name] = tensor
    return result


def fold_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with `.r` and `.theta` as one with `.weight`; everything else is passed on unchanged.

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
            folded[f"{stem}.weight"] = merge(state[f"{stem}.r"], tensor)
        elif stem not in stems or leaf != "r":
            folded[name] = tensor
    return folded
