"""Blocks of changes in the stored tensors that hold the changed parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.lora.changes import LowRank, Tile
from resm_kernels.lora.factors import Factors
from resm_kernels.lora.loaded import Axis, Placement, taken
from resm_kernels.lora.targets import Target


@dataclass(frozen=True)
class StoredFactors:
    """Where the factors A and B of an adapted matrix are stored, and how they give its task vector.

    Attributes:
        change: The change of the parameter that the matrix is, or is a block of.
        place: Which block.
    """

    change: LowRank
    place: Placement

    @property
    def a(self) -> TensorInfo:
        """Where A is stored."""
        return self.change.a

    @property
    def b(self) -> TensorInfo:
        """Where B is stored."""
        return self.change.b

    @property
    def rank(self) -> int:
        return self.change.rank

    def factors(self, a: Tensor, b: Tensor) -> Factors:
        """Return the factors as `merge_factors` takes them; `a` and `b` are the tensors that were read."""
        expert = self.place.fixed.get(0, 0)
        left, right, scale = self.change.factors(a, b, expert)
        if self.place.axes[0].dim > self.place.axes[1].dim:
            left, right = right.mT, left.mT
        rows, columns = self.place.axes
        return Factors(taken(left, 0, rows.loaded), taken(right, 1, columns.loaded), scale)


@dataclass(frozen=True)
class Patch:
    """What a target changes of one stored tensor.

    Attributes:
        target: The target.
        place: The block of its parameter that the stored tensor holds, or of the values that replace some rows of it.
    """

    target: Target
    place: Placement

    @property
    def needs_all_outputs(self) -> bool:
        """True if the norms of the changed weight are set (DoRA)."""
        return self.target.magnitude is not None

    def apply(self, tile: Tile, rows: Tensor, first: int, last: int) -> None:
        """Change the rows `first` to `last` of the stored tensor, which are in `rows`; `tile` forms the change."""
        axes = (_between(self.place.axes[0], first, last), *self.place.axes[1:])
        if not len(axes[0].stored):
            return
        loaded = {axis.dim: axis.loaded for axis in axes}
        loaded |= {dim: range(at, at + 1) for dim, at in self.place.fixed.items()}
        values = tile([loaded[dim] for dim in sorted(loaded)])
        values = values.permute([axis.dim for axis in axes] + sorted(self.place.fixed))
        _update(rows, axes, values.reshape([len(axis.stored) for axis in axes]), 0, replaces=self.target.replaces)

    def scale_outputs(self, magnitude: Tensor, weight: Tensor) -> None:
        """Give each output of the stored tensor, which is in `weight` with its change, the norm in `magnitude`."""
        axes = self.place.axes
        at = next(i for i, axis in enumerate(axes) if axis.dim == self.target.output_dim)
        outputs = taken(weight, at, axes[at].stored)
        norm = torch.linalg.vector_norm(outputs, dim=[i for i in range(weight.ndim) if i != at])
        factor = taken(magnitude.view(-1), 0, axes[at].loaded) / norm
        outputs *= factor.view([-1 if i == at else 1 for i in range(weight.ndim)])
        if not isinstance(axes[at].stored, range):
            weight.index_copy_(at, torch.tensor(axes[at].stored), outputs)


def rows_of(place: Placement, rows: Sequence[int]) -> Placement:
    """Return the placement of values for these rows of a parameter, in this order, within that of the parameter."""
    axes = []
    for axis in place.axes:
        if axis.dim == 0:
            stored = dict(zip(axis.loaded, axis.stored, strict=True))
            found = [(stored[row], number) for number, row in enumerate(rows) if row in stored]
            axis = Axis(0, tuple(at for at, _ in found), tuple(number for _, number in found))
        axes.append(axis)
    return replace(place, axes=tuple(axes))


def _between(axis: Axis, first: int, last: int) -> Axis:
    """Return the part of a dimension whose stored indices are in [first, last), counted from `first`."""
    if isinstance(axis.stored, range):
        start, stop = max(axis.stored.start, first), max(min(axis.stored.stop, last), max(axis.stored.start, first))
        chosen = slice(start - axis.stored.start, stop - axis.stored.start)
        return Axis(axis.dim, range(start - first, stop - first), axis.loaded[chosen])
    pairs = [(s, k) for s, k in zip(axis.stored, axis.loaded, strict=True) if first <= s < last]
    return Axis(axis.dim, tuple(s - first for s, _ in pairs), tuple(k for _, k in pairs))


def _update(view: Tensor, axes: Sequence[Axis], values: Tensor, dim: int, *, replaces: bool) -> None:
    """Add values to the elements of a tensor at the stored indices of each dimension from `dim` on, or set them."""
    if dim == len(axes):
        if replaces:
            view.copy_(values)
        else:
            view += values
        return
    stored = axes[dim].stored
    part = taken(view, dim, stored)
    _update(part, axes, values, dim + 1, replaces=replaces)
    if not isinstance(stored, range):
        view.index_copy_(dim, torch.tensor(stored), part)
