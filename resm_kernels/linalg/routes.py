"""Routes to a dominant subspace: their options, the results and misses that they return, and the order of trying them.

A route is one algorithm for the dominant subspaces of a matrix: block Krylov iteration (`randomized`), spectral
projectors (`projector`), a Gram matrix in fp32 (`gram_fp32`), and in float64 a Gram matrix or an SVD (`decompose`).
The routes in float64 always return a result. A route in fp32 measures or estimates the error of its result, and
returns a `Miss` instead of a result that is less accurate than the caller asked for, or that fp32 cannot hold. A route
raises an exception only for input that no route accepts, such as NaN, and never calls another route. A helper within a
module that cannot complete its step returns None, and its docstring says when.

Only `subspace.subspaces_of` tries a second route: after a miss it decomposes the matrix by its Gram matrix in float64,
and the reason for the miss becomes part of `Subspace.reason`. If the caller asked for "randomized" by name, it raises
the miss as a ValueError instead. `polar.polar_factors` treats misses of its two routes in fp32 in the first way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

FullDecompositionMethod = Literal["gram", "exact"]
"""Methods that compute all singular values, or as many as are asked for, in float64."""
DecompositionMethod = Literal["auto", FullDecompositionMethod, "randomized"]
DECOMPOSITIONS: Final[tuple[str, ...]] = get_args(DecompositionMethod)
"""The values of `method`."""
SLACK: Final = 16 * torch.finfo(torch.float32).eps
"""The rounding that fp32 may add to a sum of squares, or to a difference of matrices, as a share of it."""


@dataclass(frozen=True)
class SubspaceOptions:
    """How dominant subspaces are computed; `linalg.subspaces` describes each value. The values are checked once, here.

    Raises:
        ValueError: A value is out of range.
    """

    method: str = "auto"
    accuracy: float = 0.0
    oversampling: int | None = None
    power_iterations: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in DECOMPOSITIONS:
            raise ValueError(f"method: got {self.method!r}, need one of {', '.join(DECOMPOSITIONS)}")
        if not 0 <= self.accuracy < math.inf:
            raise ValueError(f"accuracy: got {self.accuracy!r}, need a finite number of at least 0")
        for name, value in (("oversampling", self.oversampling), ("power_iterations", self.power_iterations)):
            if value is not None and value < 0:
                raise ValueError(f"{name}: got {value}, need None or a number of at least 0")


@dataclass(frozen=True)
class Pair:
    """The result of a route in fp32: Δ ≈ left · core · rightᵀ.

    Attributes:
        left: Q, (m, k), orthonormal columns.
        core: C, (k, k).
        right: P, (n, k), orthonormal columns.
        norm: ‖Δ‖_F.
        residual: ‖ΔᵀQ − PCᵀ‖_F / ‖Δ‖_F, measured or estimated: Q and P are the exact dominant singular subspaces of a
            matrix about that far from Δ.
        left_out: An upper bound on ‖Δ − QCPᵀ‖_F, where one is known that is closer than ‖Δ‖_F and C give.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    norm: float
    residual: float
    left_out: float | None = None


@dataclass(frozen=True)
class Miss:
    """The answer of a route that has no result.

    Attributes:
        reason: Why there is no result, in words.
        error: The message of the ValueError for a caller who asked for this route by name: the argument and the values
            that it may have.
        out_of_range: Whether the matrix has values, or squares of values, that fp32 may not hold.
    """

    reason: str
    error: str = ""
    out_of_range: bool = False
