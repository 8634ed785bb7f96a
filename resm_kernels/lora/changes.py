"""The changes that adapters store in factors: LoRA, LoHa and LoKr, formed tile by tile.

Each kind gives the elements of its change Δ at chosen indices along each dimension of the parameter, so that Δ is never
formed whole. A linear or convolutional weight counts as a matrix (out, in·k), fused experts as one matrix each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.loaded import Indices, taken

Tile: TypeAlias = "Callable[[Sequence[Indices]], Tensor]"
"""Returns the elements at these indices along each dimension of the parameter, in its shape."""


class Change(ABC):
    """The change of one parameter.

    Attributes:
        shape: The parameter's shape.
        infos: Where the stored tensors are that it is formed from.
    """

    shape: tuple[int, ...]
    infos: tuple[TensorInfo, ...]

    @abstractmethod
    def tile(self, tensors: Sequence[Tensor]) -> Tile:
        """Return what forms tiles of the change; `tensors` are those of `infos`, in the dtype to compute in."""


@dataclass(frozen=True)
class LowRank(Change):
    """LoRA: Δ = s·B·A, with A (r, in) and B (out, r), or for E fused experts A (E·r, in) and B (out, r·E).

    PEFT's rows of A are grouped by expert, its columns of B by rank: Δ_e = s·B[:, e::E]·A[e·r : (e+1)·r]. In
    convolutions A has the shape (r, in, k, …) and B (out, r, 1, …); Δ is their product as matrices.

    Attributes:
        a, b: Where A and B are stored.
        scale: The scale s.
        transposed: True if the parameter is stored as (in, out), so that Δ = s·(B·A)ᵀ.
        experts: E; 0 for a parameter that is one matrix.
    """

    shape: tuple[int, ...]
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False
    experts: int = 0

    @property
    def infos(self) -> tuple[TensorInfo, ...]:  # type: ignore[override]
        return self.a, self.b

    @property
    def rank(self) -> int:
        """The rank of the change of one matrix."""
        return self.a.shape[0] // max(self.experts, 1)

    def factors(self, a: Tensor, b: Tensor, expert: int = 0) -> Factors:
        """Return the factors of the matrix, or of one expert's, as `merge_factors` takes them."""
        a, b = a.flatten(1), b.flatten(1)
        if self.experts:
            a, b = a[expert * self.rank : (expert + 1) * self.rank], b[:, expert :: self.experts]
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        return Factors(left, right, self.scale)

    def tile(self, tensors: Sequence[Tensor]) -> Tile:
        a, b = tensors

        def matrix(expert: int, rows: Indices, others: Sequence[Indices], sizes: Sequence[int]) -> Tensor:
            left, right, scale = self.factors(a, b, expert)
            right = right.reshape(right.shape[0], *sizes)
            for dim, indices in enumerate(others, 1):
                right = taken(right, dim, indices)
            product = torch.mm(taken(left, 0, rows), right.flatten(1)).mul_(scale)
            return product.view(len(rows), *map(len, others))

        def tile(indices: Sequence[Indices]) -> Tensor:
            if not self.experts:
                return matrix(0, indices[0], indices[1:], self.shape[1:])
            return torch.stack([matrix(e, indices[1], indices[2:], self.shape[2:]) for e in indices[0]])

        return tile


@dataclass(frozen=True)
class Hadamard(Change):
    """LoHa (arXiv 2108.06098): Δ = s·(W1a·W1b) ∘ (W2a·W2b), element by element.

    In the form for convolutions each of the two matrices comes from a core T (r, r, k, …):
    W1[p, q, k] = Σ_ij T1[i, j, k]·W1a[i, p]·W1b[j, q].

    Attributes:
        parts: The stored tensors by their names in PEFT.
        scale: The scale s.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    scale: float

    @property
    def infos(self) -> tuple[TensorInfo, ...]:  # type: ignore[override]
        return tuple(self.parts.values())

    def tile(self, tensors: Sequence[Tensor]) -> Tile:
        stored = dict(zip(self.parts, tensors, strict=True))
        pairs = [_pair(stored[f"hada_w{n}_a"], stored[f"hada_w{n}_b"], stored.get(f"hada_t{n}")) for n in (1, 2)]

        def tile(indices: Sequence[Indices]) -> Tensor:
            products = []
            for left, right in pairs:
                right = right.reshape(right.shape[0], *self.shape[1:])
                for dim, chosen in enumerate(indices[1:], 1):
                    right = taken(right, dim, chosen)
                products.append(torch.mm(taken(left, 0, indices[0]), right.flatten(1)))
            return (products[0] * products[1]).mul_(self.scale).view(*map(len, indices))

        return tile


def _pair(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return two matrices (out, r) and (r, in·k) whose product is the matrix that these factors stand for."""
    return (a, b) if core is None else (a.mT, torch.einsum("ijkl,jq->iqkl", core, b).flatten(1))


@dataclass(frozen=True)
class Kronecker(Change):
    """LoKr (arXiv 2309.14859): Δ = s·W1 ⊗ W2, with W1 (a, c) and W2 (b, d·k), each perhaps a product of two factors.

    Attributes:
        parts: The stored tensors by their names in PEFT.
        scale: The scale s.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    scale: float

    @property
    def infos(self) -> tuple[TensorInfo, ...]:  # type: ignore[override]
        return tuple(self.parts.values())

    def tile(self, tensors: Sequence[Tensor]) -> Tile:
        stored = dict(zip(self.parts, tensors, strict=True))
        first = stored["lokr_w1"] if "lokr_w1" in stored else stored["lokr_w1_a"] @ stored["lokr_w1_b"]
        second = stored.get("lokr_w2")
        if second is None:
            left, right = _pair(stored["lokr_w2_a"], stored["lokr_w2_b"], stored.get("lokr_t2"))
            second = left @ right
        # PEFT takes the Kronecker product of W2 (b, d, k) of a one-dimensional convolution with W1 as (1, a, c).
        folded = second.shape if second.ndim == 3 else None
        matrix = second.flatten(1)

        def tile(indices: Sequence[Indices]) -> Tensor:
            rows = torch.tensor(list(indices[0]))
            columns = torch.zeros(1, dtype=torch.int64)
            for size, chosen in zip(self.shape[1:], indices[1:], strict=True):
                columns = (columns[:, None] * size + torch.tensor(list(chosen))).flatten()
            if folded is None:
                w1 = first[rows // matrix.shape[0]][:, columns // matrix.shape[1]]
                w2 = matrix[rows % matrix.shape[0]][:, columns % matrix.shape[1]]
            else:
                _, d, k = folded
                at = rows[:, None] * math.prod(self.shape[1:]) + columns
                high, low = at // (first.shape[1] * k), at % (first.shape[1] * k)
                block = high % (first.shape[0] * d)
                w1 = first[block // d, low // k]
                w2 = second[high // (first.shape[0] * d), block % d, low % k]
            return (w1 * w2).mul_(self.scale).view(*map(len, indices))

        return tile


@dataclass(frozen=True)
class Whole(Change):
    """Values that are stored as they are.

    Attributes:
        info: Where they are stored.
        scale: What they are multiplied by.
    """

    info: TensorInfo
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.info.shape

    @property
    def infos(self) -> tuple[TensorInfo, ...]:  # type: ignore[override]
        return (self.info,)

    def tile(self, tensors: Sequence[Tensor]) -> Tile:
        (values,) = tensors

        def tile(indices: Sequence[Indices]) -> Tensor:
            chosen = values
            for dim, along in enumerate(indices):
                chosen = taken(chosen, dim, along)
            return chosen if self.scale == 1 else chosen * self.scale

        return tile
