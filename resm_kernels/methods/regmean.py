"""RegMean and RegMean++: the weights whose outputs are nearest to the experts'.

Jin et al., arXiv 2212.09849, ICLR 2023; Nguyen et al., arXiv 2508.03121.
"""

from __future__ import annotations

from typing import Annotated, Final

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg.products import matmul
from resm_kernels.linalg.spd_solve import spd_solve
from resm_kernels.memory import empty
from resm_kernels.methods._aliases import NonnegativeWeight
from resm_kernels.methods._registry import merge_method
from resm_kernels.methods._signature import Option, each
from resm_kernels.methods._statistics import (
    averaged_without_statistics,
    check_statistic,
    raise_nonfinite_statistic,
    result_dtype,
)
from resm_kernels.ops.aggregate import aggregate

_ROWS: Final = 16384
"""Rows of the weight (outputs) that are solved for at a time: all rows of any layer but the output head of a large
vocabulary, whose right-hand side in float64 would take gigabytes. Every further piece factors the matrix again."""
_ASYMMETRY: Final = 1e-4
"""How far a Gram matrix may be from symmetric, relative to its largest element: the rounding of products in fp32."""


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes of three Gram matrices in float64 (the sum, its factor or one expert's, scratch) and of six panels of rows.

    `shape` is (out, in); the engine turns it for weights that are stored the other way.
    """
    if len(shape) != 2:
        return 8 << 20
    m, n = shape
    return (24 << 20) + 8 * (3 * n * n + (6 * min(m, _ROWS) + 2048) * n)


@merge_method(
    title="RegMean++",
    reference="https://arxiv.org/abs/2508.03121",
    name="regmean_plus",
    workspace=_workspace,
    statistics="gram",
    statistics_model="merged",
    off_diagonal=0.95,
)
@merge_method(title="RegMean", reference="https://arxiv.org/abs/2212.09849", workspace=_workspace, statistics="gram")
def regmean(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    statistics: list[Tensor | None],
    transposed: bool = False,
    weight: NonnegativeWeight = each(1.0),
    off_diagonal: Annotated[
        float,
        Option("factor of the Gram matrices' elements off the diagonal; 1 leaves them", minimum=0.0, maximum=1.0),
    ] = 0.9,
    ridge: Annotated[
        float,
        Option(
            "pull towards the weighted average, relative to the mean of the diagonal; inputs that never occur have no "
            "other weights",
            minimum=0.0,
        ),
    ] = 1e-6,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """W = W̄ + (Σ_t w_t·(W_t − W̄)·Ĝ_t)·(Σ_t w_t·Ĝ_t + ρI)⁻¹ with Ĝ_t = a·G_t + (1 − a)·diag(G_t).

    W_t is a linear layer's weight (out, in), G_t = (1/N_t)·Σ x·xᵀ the Gram matrix of its N_t inputs x in expert t,
    W̄ = Σ_t w_t·W_t / Σ_t w_t, a `off_diagonal`, and ρ `ridge` times the mean of the diagonal of Σ_t w_t·Ĝ_t. W is the
    minimum of Σ_t w_t·(‖W·x − W_t·x‖², averaged over expert t's inputs, + terms of a < 1) + ρ·‖W − W̄‖²_F. With ρ = 0 it
    is the authors' (Σ_t w_t·W_t·Ĝ_t)·(Σ_t w_t·Ĝ_t)⁻¹, which has a solution only where every combination of inputs
    occurs.

    RegMean takes inputs of the layer in each expert itself. RegMean++ takes inputs that it gets in the merged model, so
    that later layers are fitted to what earlier merged layers give them; the arithmetic is the same.

    Args:
        base: Changes nothing but the result's dtype: adding θ₀ to the differences from it would give the same W.
        statistics: G_1 … G_T, (in, in), fp32 or float64, symmetric; all None for a tensor that is no linear layer's
            weight (embeddings, norms, biases), which becomes the weighted average.
        transposed: True for a weight that is stored as (in, out), as GPT-2's Conv1D stores it.
        weight: w_t ≥ 0.
        off_diagonal: The authors' α, for which they recommend 0.9; fusion-bench has 0.95 for RegMean++.
        ridge: The default is far below the sampling error of any G_t, and above the rounding of G_t in fp32.

    Raises:
        ValueError: A statistic of the wrong shape, with NaN or infinite values, or not symmetric; Σ_t w_t·Ĝ_t + ρI is
            not positive definite.

    Precision: G_t may be fp32; sums, products and Cholesky's solution are float64 and rounded once.

    Memory: three matrices (in, in) in float64 and six of at most 16384 × in.

    Determinism: the same bits for any number of threads.
    """
    averaged = averaged_without_statistics(base, experts, statistics, weight, out_dtype)
    if averaged is not None:
        return averaged
    if experts[0].ndim != 2:
        raise ValueError(f"statistics: got Gram matrices for a tensor of shape {list(experts[0].shape)}, need None")
    weights = [e.mT if transposed else e for e in experts]
    m, n = weights[0].shape
    grams = [check_statistic(f"statistics[{t}]", g, (n, n), experts[0]) for t, g in enumerate(statistics)]
    total = _summed(grams, weight, off_diagonal)
    level = float(total.diagonal().mean()) if n else 0.0
    if level == 0:  # no input has ever occurred: only the pull towards the average is left
        return aggregate(None, experts, weight, normalize=True, out_dtype=result_dtype(base, experts, out_dtype))
    total.diagonal().add_(ridge * level)
    merged = empty(experts[0].shape, result_dtype(base, experts, out_dtype), experts[0].device)
    rows_out = merged.mT if transposed else merged
    for i in range(0, m, _ROWS):
        rows = [w[i : i + _ROWS] for w in weights]
        mean = aggregate(None, rows, weight, normalize=True, out_dtype=torch.float64)
        right = _right_hand_side(rows, mean, grams, weight, off_diagonal)
        mean += _solved(total, right, overwrite=m <= _ROWS)
        # torch would round float64 to half precision twice, by way of fp32.
        rows_out[i : i + _ROWS] = aggregate(None, [mean], [1.0], out_dtype=merged.dtype, check_finite=False)
    return merged


def _summed(grams: list[Tensor], weight: list[float], off_diagonal: float) -> Tensor:
    """Σ_t w_t·Ĝ_t in float64, symmetric to the bit."""
    total = torch.zeros(grams[0].shape, dtype=torch.float64, device=grams[0].device)
    for t, (gram, w) in enumerate(zip(grams, weight, strict=True)):
        _check_symmetric(f"statistics[{t}]", gram)
        total.add_(gram, alpha=w)
    diagonal = total.diagonal().clone()
    total = total.add(total.mT).mul_(off_diagonal / 2)
    total.diagonal().copy_(diagonal)
    return total


def _check_symmetric(name: str, gram: Tensor) -> None:
    if gram.numel() == 0:
        return
    asymmetry = float((gram - gram.mT).abs_().max())
    largest, smallest = float(gram.diagonal().max()), float(gram.diagonal().min())
    if not asymmetry <= _ASYMMETRY * largest or smallest < 0:
        raise_nonfinite_statistic(name, gram)
        raise ValueError(
            f"{name}: got elements that differ from their mirror images by up to {asymmetry:.1e} and a diagonal from "
            f"{smallest:.1e} to {largest:.1e}, need a Gram matrix, which is symmetric with a diagonal of at least 0"
        )


def _right_hand_side(
    rows: list[Tensor], mean: Tensor, grams: list[Tensor], weight: list[float], off_diagonal: float
) -> Tensor:
    """Σ_t w_t·(W_t − W̄)·Ĝ_t of some rows."""
    right = torch.zeros_like(mean)
    for w_rows, gram, w in zip(rows, grams, weight, strict=True):
        difference = w_rows.double() - mean
        right.add_(matmul(difference, gram), alpha=w * off_diagonal)
        right.addcmul_(difference, gram.diagonal().double(), value=w * (1 - off_diagonal))
    return right


def _solved(total: Tensor, right: Tensor, *, overwrite: bool) -> Tensor:
    try:
        return spd_solve(total, right, overwrite_a=overwrite).x
    except NonFiniteError:
        raise
    except ValueError as error:
        raise ValueError(
            "statistics: the sum of the Gram matrices is not positive definite, so that more than one solution is "
            f"nearest to the experts' outputs; need a larger ridge or a smaller off_diagonal ({error})"
        ) from error
