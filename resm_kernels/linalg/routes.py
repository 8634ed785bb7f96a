"""What a route to a dominant subspace is, what it returns, and who tries the next route.

A route is one way to compute the dominant subspaces of a matrix: block Krylov iteration (`randomized`), spectral
projectors (`projector`), a Gram matrix in fp32 (`gram_fp32`), and in float64 a Gram matrix or an SVD (`decompose`).
The routes in float64 always return a result. Each of the others measures the error of its result, and returns a `Miss`
in place of a result that is less accurate than the caller asked for or that fp32 cannot hold. A route raises an
exception only for input that no route accepts, such as NaN, and no route tries another in its place. Within a module, a
helper that cannot complete its step returns None, and its docstring says when.

Only `subspace.subspaces_of` tries the next route: after a miss the matrix is decomposed by its Gram matrix in float64,
and the reason for the miss becomes part of `Subspace.reason`. If the caller asked for the route by name, there is no
next one, and the miss is raised as a ValueError. `polar.polar_factors` treats its two routes in fp32 alike.
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
"""What fp32's rounding may add to a sum of squares, and to a difference of matrices, as a share of it."""


@dataclass(frozen=True)
class SubspaceOptions:
    """How dominant subspaces are computed. The values are checked here, once; `linalg.subspaces` says what each means.

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
    """What a route returns in place of a result.

    Attributes:
        reason: Why there is no result, in words.
        error: The message of the ValueError for a caller who asked for this route by name; it names the argument and
            says what is needed.
        out_of_range: Whether the matrix has values, or squares of values, that fp32 may not hold.
    """

    reason: str
    error: str = ""
    out_of_range: bool = False
