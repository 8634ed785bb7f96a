"""Merges adapters of one weight to factors of low rank, without a matrix of the weight's size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from resm_kernels.linalg import orthonormalize
from resm_kernels.linalg.products import frobenius_norm, gram, matmul
from resm_kernels.linalg.threads import run
from resm_kernels.linalg.truncated_svd import truncated_svd
from resm_kernels.lora.factors import METHODS, Factors, cores_of, joint_bases, merge_cores
from resm_kernels.lora.routes import Route
from resm_kernels.methods import Method
from resm_kernels.methods.iso_cts import merge_subspaces, subspace_sizes
from resm_kernels.methods.svc import calibrate
from resm_kernels.methods.tsv_compress import directions

_NOISE: Final = 1e-9
"""Singular values up to this times the largest are rounding of the float64 products, or of factors in fp32."""


@dataclass(frozen=True)
class Product:
    """M = left · core · rightᵀ, (m, a), (a, b) and (n, b) in float64.

    Attributes:
        core: None for the identity; only then the columns of `left` and `right` need not be orthonormal.
    """

    left: Tensor
    core: Tensor | None
    right: Tensor


@dataclass(frozen=True)
class RankLimit:
    """How many directions a module's factors keep.

    Attributes:
        rank: At most so many; None keeps all.
        energy: The fewest that hold this share of ‖M‖²; None keeps all.
    """

    rank: int | None = None
    energy: float | None = None

    def of(self, values: Tensor, total: float) -> int:
        """Return how many of the singular values, in descending order, are kept; `total` is ‖M‖²."""
        k = len(values)
        if self.energy is not None and k:
            # Without the slack, rounding of the sums could ask for one more direction.
            k = min(int((values.square().cumsum(0) < self.energy * (1 - 1e-12) * total).sum()) + 1, k)
        return k if self.rank is None else min(k, self.rank)


@dataclass(frozen=True)
class MergedFactors:
    """The merged task vector M ≈ left · right of one weight, as factors (m, k) and (k, n).

    Attributes:
        error: ‖M − left·right‖_F / ‖M‖_F is at most this, before the factors are rounded to the adapter's dtype.
        norm: ‖M‖_F.
    """

    left: Tensor
    right: Tensor
    error: float
    norm: float

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def merge_factored(
    shape: tuple[int, int], factors: Sequence[Factors], method: Method, values: Mapping[str, Any], route: Route
) -> Product:
    """Merge task vectors Δ_t = scale·left·right of one weight by a method whose result is of low rank.

    Args:
        shape: The shape (m, n) of the weight.
        factors: Each expert's factors, of rank 0 for an expert that does not change the weight.
        values: All parameters of the method, as `Method.resolve` returns them.
        route: An exact route, as `route_of` returns it.

    Returns:
        The product that equals the method's M, apart from rounding in float64.

    Determinism: the result has the same bits for any number of threads.
    """
    if route is Route.SUM:
        return _sum(factors, coefficients(method, values, len(factors)))
    left, right = joint_bases(factors)
    if route is Route.CORES:
        cores = cores_of(factors, left, right)
        if method.name in METHODS:
            core = merge_cores(shape, factors, cores, method.name, values, torch.float32) * values["lambda_"]
        else:
            core = _merged(method, values, cores, shape, factors)
        return Product(left, core, right)
    if route is Route.ROWS_SHARED:
        shared = [matmul(matmul(left.mT, f.left, torch.float64), f.right.double()) * f.scale for f in factors]
        q, r = _qr(_merged(method, values, shared, shape, factors).mT.contiguous())
        return Product(left, r.mT, q)
    shared = [matmul(f.left.double(), matmul(f.right, right, torch.float64)) * f.scale for f in factors]
    q, r = _qr(_merged(method, values, shared, shape, factors))
    return Product(q, r, right)


def coefficients(method: Method, values: Mapping[str, Any], n_experts: int) -> list[float]:
    """Return the c_t with which the method sums task vectors, which it shows on unit vectors."""
    units = list(torch.eye(n_experts, dtype=torch.float64))
    keys = {"seed": 0} if method.draws else {}
    merged = method.function(torch.zeros_like(units[0]), units, out_dtype=torch.float64, **values, **keys)
    return [float(c) for c in merged]


def _sum(factors: Sequence[Factors], coefficients: Sequence[float]) -> Product:
    """Return Σ c_t·Δ_t, whose factors are those of the Δ_t side by side, each scaled by √|c_t·s_t|."""
    lefts, rights = [], []
    for (left, right, scale), c in zip(factors, coefficients, strict=True):
        root = math.sqrt(abs(c * scale))
        lefts.append(left.double() * math.copysign(root, c * scale))
        rights.append(right.double().mT * root)
    return Product(torch.cat(lefts, 1), None, torch.cat(rights, 1))


def _merged(
    method: Method, values: Mapping[str, Any], tensors: list[Tensor], shape: tuple[int, int], factors: Sequence[Factors]
) -> Tensor:
    """Merge the task vectors in the coordinates of shared bases, which are float64 and may have rows of zeros."""
    if method.name == "svc":
        inner, inner_values = values["inner"], values["inner_values"]
        if inner.name in METHODS:
            merged = merge_cores(shape, factors, tensors, inner.name, inner_values, torch.float32)
            merged = merged * inner_values["lambda_"]
        else:
            merged = _merged(inner, inner_values, tensors, shape, factors)
        return (calibrate(merged, tensors, values["alpha"]) if values["spectral"] else merged) * values["lambda_"]
    # A method derives numbers of directions from the size of the matrix. Zeros around the coordinates leave it as many
    # as it has in the whole matrix, or more than any task vector's rank.
    room = len(tensors) * max(f.left.shape[1] for f in factors)
    rows, columns = tensors[0].shape
    more = max(min(shape[0], room) - rows, 0), max(min(shape[1], room) - columns, 0)
    padded = [torch.nn.functional.pad(x, (0, more[1], 0, more[0])) for x in tensors]
    merged = _call(method, values, padded, shape)
    return merged[:rows, :columns]


def _call(method: Method, values: Mapping[str, Any], tensors: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Call the method on coordinates, with the numbers that it would derive from the shape of the whole matrix."""
    r, n_experts, zero = min(shape), len(tensors), torch.zeros_like(tensors[0])
    values = dict(values)
    if method.name == "iso_cts":
        sizes = subspace_sizes(r, n_experts, values["common_space_fraction"])
        merged = merge_subspaces(
            zero, tensors, values["weight"], sizes, r, values["decomposition"], torch.float64
        ).dense()
        return merged * values["lambda_"]
    if method.name == "tsv_compress":
        values["rank"], values["share"] = directions(r, n_experts, values["rank"], values["share"]), None
    if method.name == "swudi":
        kept = max(1, math.ceil(values["rank_ratio"] * shape[1] - 1e-9))
        values["rank_ratio"] = min(kept / tensors[0].shape[1], 1.0)
    return method.function(zero, tensors, out_dtype=torch.float64, **values)


def truncated(product: Product, limit: RankLimit) -> MergedFactors:
    """Return the best factors of M within the limit; directions that are rounding are left out."""
    (m, columns), n = product.left.shape, product.right.shape[0]
    if product.core is None and limit == RankLimit() and columns <= min(m, n):
        energy = float((gram(product.left) * gram(product.right)).sum())
        return MergedFactors(product.left, product.right.mT, 0.0, math.sqrt(max(energy, 0.0)))
    left, core, right = product.left, product.core, product.right
    if core is None:
        (left, first), (right, second) = _qr(left), _qr(right)
        core = matmul(first, second.mT)
    if not core.numel():
        return MergedFactors(left.new_zeros(m, 0), right.new_zeros(0, n), 0.0, 0.0)
    u, values, vh = run([lambda: torch.linalg.svd(core, full_matrices=False)], core.device)[0]
    energies = values.square()
    total = float(energies.sum())
    k = limit.of(values[values > _NOISE * values[0]], total)
    error = math.sqrt(float(energies[k:].sum()) / total) if total else 0.0
    roots = values[:k].sqrt()
    left, right = matmul(left, u[:, :k] * roots), matmul(right, (vh[:k].mT * roots).contiguous())
    return MergedFactors(left, right.mT, error, math.sqrt(total))


def truncated_dense(merged: Tensor, limit: RankLimit, accuracy: float) -> MergedFactors:
    """Return factors of a dense M within the limit, of `truncated_svd` with this accuracy."""
    norm = frobenius_norm(merged)
    (m, n), most = merged.shape, min(merged.shape)
    if norm == 0:
        return MergedFactors(merged.new_zeros(m, 0), merged.new_zeros(0, n), 0.0, 0.0)
    if limit.rank is None or limit.rank >= most:
        svd = truncated_svd(merged, energy=1.0 if limit.energy is None else limit.energy, accuracy=accuracy)
    else:
        svd = truncated_svd(merged, rank=limit.rank, accuracy=accuracy)
    values = svd.singular_values.double()
    k = limit.of(values, norm**2)
    error = math.sqrt(svd.error**2 + float(values[k:].square().sum()) / norm**2)
    roots = svd.singular_values[:k].sqrt()
    return MergedFactors(svd.left[:, :k] * roots, (svd.right[:, :k] * roots).mT, error, norm)


def _qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal q, (m, min(m, c)), and r with x = q·r, in float64."""
    if x.shape[1] <= x.shape[0]:
        return orthonormalize(x)[:2]
    q, r = run([lambda: torch.linalg.qr(x)], x.device)[0]
    return q, r
