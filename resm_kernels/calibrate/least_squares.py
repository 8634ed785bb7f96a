"""Least squares, one linear layer after the other: each gives what the experts' layers gave on their own prompts.

For a linear layer with start weight W₀, expert t's weight W_t, its inputs X_t in expert t, and the inputs X̂_t in the
merged model as far as it is done, both on the prompts of expert t, the new weight minimises

    Σ_t Σ_p u_p·‖W·x̂_p − W_t·x_p‖² + r·‖W − W₀‖_F²,        r = ρ·mean(diag Σ_t X̂_tᵀ·U_t·X̂_t)

over all positions p of these prompts, with u_p proportional to u where the next token belongs to the answer and to 1
elsewhere, and Σ_p u_p = 1 for each expert, so that all count the same. It solves, U_t = diag(u_p),

    W·(Σ_t X̂_tᵀ·U_t·X̂_t + r·I) = Σ_t W_t·X_tᵀ·U_t·X̂_t + r·W₀.

A bias is one more column of W, whose input is 1. Layers with the same input (q, k and v; gate and up) are one stage and
share the left side. Stages are solved in the order in which they run, and blocks in theirs, so that each corrects what
those before it left; the inputs X̂_t are those of weights that are rounded already as the output stores them.

The nearest relative is RegMean (arXiv 2212.09849), which takes X_t on both sides, a layer by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resm_kernels.calibrate.activations import Batch
from resm_kernels.calibrate.blocks import LinearLayer
from resm_kernels.calibrate.errors import CalibrationError
from resm_kernels.linalg.products import matmul
from resm_kernels.linalg.spd_solve import spd_solve
from resm_kernels.ops.gram_matrix import gram_matrix

_BUFFER_BYTES = 256 << 20
_BUFFER_ROWS = 8192
"""Rows that are collected before their products are formed: adding up Gram matrices then costs little beside them."""


@dataclass(frozen=True)
class StageReport:
    """The solution of one stage.

    Attributes:
        layers: The modules that were solved for together.
        residual: ‖W·A − B‖_F / (‖W‖_F·‖A‖_F + ‖B‖_F) of the linear system in float64.
        change: ‖W − W₀‖_F / ‖W₀‖_F.
    """

    layers: tuple[str, ...]
    residual: float
    change: float


class Products:
    """X̂ᵀ·X̂ and Xᵀ·X̂ of rows that arrive batch by batch, in float64.

    Args:
        width: Columns of both.
        device: Where the rows are.
    """

    def __init__(self, width: int, device: torch.device | str) -> None:
        count = max(256, min(_BUFFER_ROWS, _BUFFER_BYTES // (8 * width)))
        self._merged = torch.empty(count, width, device=device)
        self._expert = torch.empty_like(self._merged)
        self._filled = 0
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.gram)

    def add(self, merged: Tensor, expert: Tensor) -> None:
        """Take in rows of X̂ and X, (n, width) each."""
        start = 0
        while start < len(merged):
            count = min(len(merged) - start, len(self._merged) - self._filled)
            place, rows = slice(self._filled, self._filled + count), slice(start, start + count)
            self._merged[place], self._expert[place] = merged[rows], expert[rows]
            self._filled += count
            start += count
            if self._filled == len(self._merged):
                self._flush()

    def finish(self) -> tuple[Tensor, Tensor]:
        """X̂ᵀ·X̂ and Xᵀ·X̂."""
        if self._filled:
            self._flush()
        return self.gram, self.cross

    def _flush(self) -> None:
        merged, expert = self._merged[: self._filled], self._expert[: self._filled]
        self.gram += gram_matrix(merged)
        self.cross += gram_matrix(expert, merged)
        self._filled = 0


def weighted_rows(batch: Batch, x: Tensor, *, ones: bool) -> Tensor:
    """The batch's rows of x, (n, in), times √u; with a last column for the bias if `ones`."""
    rows = batch.pack(x) if x.ndim == 3 else x
    if ones:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows * batch.weights.to(rows.device)[:, None]


def matrix_of(layer: LinearLayer, weights: Mapping[str, Tensor]) -> Tensor:
    """The layer's weight as (out, in) in float64, with its bias, if it has one, as the last column."""
    weight = weights[layer.weight]
    matrix = (weight.mT if layer.transposed else weight).double()
    return torch.cat([matrix, weights[layer.bias].double()[:, None]], 1) if layer.has_bias else matrix


def _columns(products: Tensor, layer: LinearLayer, ones: bool) -> Tensor:
    """The products of a layer's inputs: without the column of ones, if there is one and the layer has no bias."""
    return products[:-1, :-1] if ones and not layer.has_bias else products


def solve_stage(
    layers: Sequence[LinearLayer],
    start: Mapping[str, Tensor],
    experts: Iterable[tuple[Callable[[], Mapping[str, Tensor]], Products]],
    ridge: float,
    dtypes: Mapping[str, torch.dtype],
) -> tuple[dict[str, Tensor], StageReport]:
    """The stage's new weights and biases by their full names, in the output's dtypes.

    Args:
        layers: The layers of the stage.
        start: Their weights in the merged model so far.
        experts: For each expert a function that reads its weights of these layers, and the products of its rows. One
            expert's products are in memory at a time.
        ridge: ρ.
        dtypes: The dtype of each tensor in the output.

    Raises:
        CalibrationError: The normal equations cannot be solved, or the solution is beyond the range of the output's
            dtype.
    """
    ones = any(layer.has_bias for layer in layers)
    begin = {layer: matrix_of(layer, start) for layer in layers}
    right = {layer: torch.zeros_like(matrix) for layer, matrix in begin.items()}
    gram: Tensor | None = None
    for read, products in experts:
        own, cross = products.finish()
        gram = own if gram is None else gram.add_(own)
        weights = read()
        for layer, side in right.items():
            side += matmul(matrix_of(layer, weights), _columns(cross, layer, ones))
        del read, products, own, cross, weights  # before the next expert's are formed
    assert gram is not None
    pull = ridge * float(gram.diagonal().mean())
    gram.diagonal().add_(pull)
    solved: dict[str, Tensor] = {}
    residual, moved, length = 0.0, 0.0, 0.0
    last = any(layer.has_bias for layer in layers)  # whose solution may destroy the matrix
    for has_bias in (False, True):
        group = [layer for layer in layers if layer.has_bias is has_bias]
        if not group:
            continue
        sides = torch.cat([right.pop(layer).add_(begin[layer], alpha=pull) for layer in group])
        left = _columns(gram, group[0], ones).contiguous()
        try:
            solution = spd_solve(left, sides, overwrite_a=has_bias is last)
        except ValueError as error:
            listed = ", ".join(layer.name for layer in layers)
            raise CalibrationError(f"{listed}: no solution ({error}); need more prompts or a larger ridge") from error
        residual = max(residual, solution.residual)
        for layer, matrix in zip(group, solution.x.split([len(begin[layer]) for layer in group]), strict=True):
            moved += float((matrix - begin[layer]).square().sum())
            length += float(begin[layer].square().sum())
            weight = matrix[:, :-1] if has_bias else matrix
            solved[layer.weight] = (weight.mT if layer.transposed else weight).to(dtypes[layer.weight]).contiguous()
            if has_bias:
                solved[layer.bias] = matrix[:, -1].to(dtypes[layer.bias]).contiguous()
    for name, tensor in solved.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(
                f"{name}: the solution exceeds the range of {tensor.dtype}; need out_dtype: bfloat16"
            )
    names = tuple(layer.name for layer in layers)
    return solved, StageReport(names, residual, math.sqrt(moved / length) if length else math.inf)
