"""Similarity of two sets of vectors of the same items: linear CKA, and vectors recovered by a linear map.

Only sums over items are kept, in float64, so any number of items fits in memory.

Legend: M items, D and Z widths.
"""

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean variance of x


class Covariances:
    """Covariances of x (M, D) and y (M, Z), accumulated by `add`."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count items x (m, D) and y (m, Z)."""
        x, y = x.double(), y.double()
        terms = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y, "yy": y.T @ y}
        self.sums = {name: self.sums[name] + term for name, term in terms.items()} if self.sums else terms
        self.count += len(x)

    def __add__(self, other: "Covariances") -> "Covariances":
        both = Covariances()
        both.count = self.count + other.count
        both.sums = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return both

    def centered(self, name: str) -> Tensor:
        """The covariance xx (D, D), xy (D, Z) or yy (Z, Z), times M."""
        return self.sums[name] - torch.outer(self.sums[name[0]], self.sums[name[1]]) / self.count

    def cka(self) -> float:
        """Linear CKA (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414): 0 to 1, the same for any rotation and
        scale of x or y; 0 if one of them is constant."""
        size = self.centered("xx").norm() * self.centered("yy").norm()
        return float(self.centered("xy").square().sum() / size) if size > 0 else 0.0

    def linear_map(self) -> "LinearMap":
        """The affine map from x to y with the smallest squared error, by ridge regression."""
        xx = self.centered("xx")
        xx.diagonal().add_(RIDGE * xx.diagonal().mean() + torch.finfo(xx.dtype).tiny)
        weight = torch.linalg.solve(xx, self.centered("xy"))
        return LinearMap(weight, bias=(self.sums["y"] - self.sums["x"] @ weight) / self.count)


class LinearMap:
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """`weight` (D, Z), `bias` (Z,)."""
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., Z) float64."""
        return x.double() @ self.weight + self.bias
