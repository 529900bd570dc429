"""Many dimensions drawn as two: a plane that is laid through one encoder's points, and kept for those of the others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

SEED = 0  # of UMAP's own random numbers


@dataclass(frozen=True)
class Plane:
    """The first principal components of some points. Other points are put on the same axes, so pictures compare."""

    mean: Tensor  # (D,)
    axes: Tensor  # (axes, D), of unit length
    explained: tuple[float, ...]  # share of the points' variance along each axis

    def of(self, points: Tensor) -> Tensor:  # (N, D) -> (N, axes)
        """Places on the plane."""
        return ((points.double() - self.mean) @ self.axes.T).float()


def fit_plane(points: Tensor, axes: int = 2) -> Plane:
    """Principal components by singular values of the centred points. (N, D), N and D of any size

    An axis and its opposite explain the same: the one whose largest entry is positive is taken, so that the same points
    give the same picture everywhere. Axes that the points lack are 0.
    """
    points = points.double()
    mean = points.mean(dim=0)
    _, values, rows = torch.linalg.svd(points - mean, full_matrices=False)
    found = rows[:axes]
    largest = found.gather(1, found.abs().argmax(dim=1, keepdim=True))
    found = found * torch.where(largest < 0, -1.0, 1.0)
    found = torch.cat([found, found.new_zeros(axes - len(found), points.shape[1])])
    variances = values.square()
    shares = (variances / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return Plane(mean, found, tuple([*shares, *[0.0] * axes][:axes]))


def check_umap() -> None:
    """Raises InputError where the package umap-learn is not installed."""
    if importlib.util.find_spec("umap") is None:
        raise InputError("UMAP needs the package umap-learn, which is not installed; install it, or use PCA")


def fit_umap(points: Tensor) -> Callable[[Tensor], Tensor]:
    """UMAP (McInnes et al. 2018) fitted to points (N, D); it puts others on the same map: (M, D) -> (M, 2).

    Raises InputError where the package umap-learn is not installed.
    """
    check_umap()
    from umap import UMAP

    reducer = UMAP(n_neighbors=min(15, len(points) - 1), metric="cosine", random_state=SEED, n_jobs=1)
    reducer.fit(points.float().numpy())
    return lambda more: torch.from_numpy(reducer.transform(more.float().numpy())).float()
