"""A product of two matrices that is never multiplied out."""

from dataclasses import dataclass
from typing import Any, overload

import torch
from jaxtyping import Complex, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factored:
    """The low-rank matrix A B, stored as its factors: `x @ F` is computed as `(x @ A) @ B`.

    Raises ValueError for factors whose shapes do not fit.
    """

    A: Float[Tensor, "left rank"]
    B: Float[Tensor, "_ right"]

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[1] != self.B.shape[0]:
            raise ValueError(f"factors of {tuple(self.A.shape)} and {tuple(self.B.shape)} have no product")

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the product."""
        return self.A.shape[0], self.B.shape[1]

    @property
    def T(self) -> "Factored":
        """Return the transpose."""
        return Factored(self.B.T, self.A.T)

    @overload
    def __matmul__(self, other: "Factored") -> "Factored": ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: "Factored | Tensor") -> "Factored | Tensor":
        """Return the product with a tensor, or with a factored matrix: factored, with the smaller of the two ranks."""
        if isinstance(other, Tensor):
            return self.A @ (self.B @ other)
        between = self.B @ other.A  # [rank, other rank]
        if between.shape[0] <= between.shape[1]:
            return Factored(self.A, between @ other.B)
        return Factored(self.A @ between, other.B)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return (other @ self.A) @ self.B

    def __mul__(self, factor: float) -> "Factored":
        return Factored(self.A * factor, self.B)

    def svd(self) -> tuple[Float[Tensor, "left rank"], Float[Tensor, "rank"], Float[Tensor, "rank right"]]:
        """Return U, S, Vh as torch.linalg.svd does, without the singular values that are zero by rank.

        The decomposition is of a [rank, rank] matrix: A = Q_A R_A and Bᵀ = Q_B R_B, so A B = Q_A (R_A R_Bᵀ) Q_Bᵀ.
        """
        (Q_A, R_A), (Q_B, R_B) = torch.linalg.qr(self.A), torch.linalg.qr(self.B.T)
        U, S, Vh = torch.linalg.svd(R_A @ R_B.T, full_matrices=False)
        return Q_A @ U, S, Vh @ Q_B.T

    def eigenvalues(self) -> Complex[Tensor, "rank"]:
        """Return the eigenvalues of a square A B that are not zero by rank: those of B A, largest magnitude first.

        Raises ValueError for a matrix that is not square, or with nan or infinite numbers.
        """
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"eigenvalues are of a square matrix; this one is {self.shape}")
        values = eigenvalues(self.B @ self.A)
        return values[values.abs().argsort(descending=True)]

    def norm(self) -> Float[Tensor, ""]:
        """Return the Frobenius norm, of R_A R_Bᵀ after QR decompositions A = Q_A R_A and Bᵀ = Q_B R_B."""
        R_A, R_B = torch.linalg.qr(self.A).R, torch.linalg.qr(self.B.T).R
        return torch.linalg.norm(R_A @ R_B.T)

    def __repr__(self) -> str:
        return f"Factored({self.shape[0]} x {self.shape[1]}, rank {self.A.shape[1]}, {self.A.dtype}, {self.A.device})"

    def __array__(self, *_: Any) -> Any:
        raise TypeError("a factored matrix is not multiplied out: use @, .svd(), .eigenvalues() or its factors A and B")


def eigenvalues(x: Float[Tensor, "*rest rank rank"]) -> Complex[Tensor, "*rest rank"]:
    """Return the eigenvalues of square matrices, computed on the CPU.

    Raises ValueError for nan or infinite numbers, which can crash LAPACK.
    """
    if not bool(x.isfinite().all()):
        raise ValueError("numbers that are nan or infinite have no eigenvalues: selfcheck(lens) names the weights")
    return torch.linalg.eigvals(x.cpu())
