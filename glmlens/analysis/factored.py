"""A product of two matrices that is never multiplied out."""

from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Complex, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factored:
    """The matrix A B of low rank, kept as its factors: a vector `x` goes through it as `x @ A @ B`."""

    A: Float[Tensor, "left rank"]
    B: Float[Tensor, "_ right"]

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[1] != self.B.shape[0]:
            raise ValueError(f"factors of {tuple(self.A.shape)} and {tuple(self.B.shape)} have no product")

    @property
    def shape(self) -> tuple[int, int]:
        return self.A.shape[0], self.B.shape[1]

    @property
    def T(self) -> "Factored":
        return Factored(self.B.T, self.A.T)

    @overload
    def __matmul__(self, other: "Factored") -> "Factored": ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: "Factored | Tensor") -> "Factored | Tensor":
        """This matrix times a tensor, or times another, factored with the smaller of the two ranks."""
        if isinstance(other, Tensor):
            return self.A @ (self.B @ other)
        between = self.B @ other.A
        if between.shape[0] <= between.shape[1]:
            return Factored(self.A, between @ other.B)
        return Factored(self.A @ between, other.B)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return (other @ self.A) @ self.B

    def __mul__(self, factor: float) -> "Factored":
        return Factored(self.A * factor, self.B)

    def svd(self) -> tuple[Float[Tensor, "left rank"], Float[Tensor, "rank"], Float[Tensor, "rank right"]]:
        """U, S, Vh as of torch.linalg.svd, without the singular values that are zero by rank.

        Of rank x rank work: A = Q_A R_A and Bᵀ = Q_B R_B, so A B = Q_A (R_A R_Bᵀ) Q_Bᵀ.
        """
        (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(self.A), torch.linalg.qr(self.B.T)
        U, S, Vh = torch.linalg.svd(R_A @ R_B.T, full_matrices=False)
        return Q_A @ U, S, Vh @ Q_B.T

    def eigenvalues(self) -> Complex[Tensor, "rank"]:
        """The eigenvalues of a square A B that are not zero by rank: those of B A, largest magnitude first."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"eigenvalues are of a square matrix; this one is {self.shape}")
        found = eigenvalues(self.B @ self.A)
        return found[found.abs().argsort(descending=True)]

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm: √ sum((AᵀA) * (B Bᵀ)), with the factors made orthogonal first."""
        R_A, R_B = torch.linalg.qr(self.A).R, torch.linalg.qr(self.B.T).R
        return torch.linalg.norm(R_A @ R_B.T)

    def __repr__(self) -> str:
        return f"Factored({self.shape[0]} x {self.shape[1]}, rank {self.A.shape[1]}, {self.A.dtype}, {self.A.device})"

    def __array__(self, *_: Any) -> Any:
        raise TypeError("a factored matrix is not multiplied out: use @, .svd(), .eigenvalues() or its factors A and B")


def eigenvalues(x: Float[Tensor, "*rest rank rank"]) -> Complex[Tensor, "*rest rank"]:
    """Those of a square matrix, on the CPU; ValueError for one with nan or infinite numbers, which can crash LAPACK."""
    if not bool(x.isfinite().all()):
        raise ValueError("numbers that are nan or infinite have no eigenvalues: selfcheck(lens) says which weights")
    return torch.linalg.eigvals(x.cpu())
