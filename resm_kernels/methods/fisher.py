"""Fisher merging: each weight counts by its Fisher information (Matena and Raffel, arXiv 2111.09832, NeurIPS 2022)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from resm_kernels.checks import raise_nonfinite
from resm_kernels.elementwise.blocks import blocks_workspace, map_rows
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


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Bytes of the blocks that are merged at a time; statistics are as many inputs as there are experts."""
    return blocks_workspace(shape, 2 * n_experts)


@merge_method(
    title="Fisher merging", reference="https://arxiv.org/abs/2111.09832", workspace=_workspace, statistics="fisher"
)
def fisher(
    base: Tensor | None,
    experts: list[Tensor],
    *,
    statistics: list[Tensor | None],
    weight: NonnegativeWeight = each(1.0),
    minimum: Annotated[
        float,
        Option("added to every Fisher information, so that weights which no sample needs are averaged", minimum=0.0),
    ] = 1e-6,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = Σ_t w_t·(F_t + ε)·θ_t / Σ_t w_t·(F_t + ε), element by element.

    F_t is the diagonal of expert t's Fisher information. Where the divisor is 0, θ is the weighted average
    Σ_t w_t·θ_t / Σ_t w_t.

    Args:
        base: Changes nothing but the result's dtype: merging the differences from it would give the same θ.
        statistics: F_1 … F_T of the experts' shape, fp32 or float64, at least 0, in a common unit; all None for a
            tensor without, which becomes the weighted average.
        weight: w_t ≥ 0.
        minimum: ε, in the unit of F_t. `resm-kernels statistics` stores F_t with a root mean square of 1 over the whole
            model, which is the normalisation that fusion-bench makes by default (to a norm of 1; the number of weights
            is the same in all experts). fusion-bench adds ε = 1e-6 before it normalises, so that there it means more
            for a model whose gradients are small.

    Raises:
        ValueError: A statistic of another shape, with NaN or infinite values, or below 0.

    Precision: float64, rounded once.

    Determinism: the same bits for any number of threads.
    """
    averaged = averaged_without_statistics(base, experts, statistics, weight, out_dtype)
    if averaged is not None:
        return averaged
    shape = tuple(experts[0].shape)
    fishers = [check_statistic(f"statistics[{t}]", f, shape, experts[0]) for t, f in enumerate(statistics)]
    for t, information in enumerate(fishers):
        _check_information(f"statistics[{t}]", information)
    dtype, total_weight, n_experts = result_dtype(base, experts, out_dtype), sum(weight), len(experts)
    if total_weight == 0:
        raise ValueError("weight: sums to 0, so that nothing can be divided by it; need one above 0")

    def merge_block(blocks: list[Tensor]) -> Tensor:
        thetas = [block.double() for block in blocks[:n_experts]]
        mean = sum((theta * (w / total_weight) for theta, w in zip(thetas, weight, strict=True)), torch.zeros(()))
        pull, divisor = torch.zeros_like(thetas[0]), torch.zeros_like(thetas[0])
        for theta, information, w in zip(thetas, blocks[n_experts:], weight, strict=True):
            share = (information.double() + minimum) * w
            divisor += share
            pull.addcmul_(share, theta - mean)
        merged = mean + torch.where(divisor > 0, pull / torch.where(divisor > 0, divisor, 1.0), 0.0)
        # torch would round float64 to half precision twice, by way of fp32.
        return aggregate(None, [merged], [1.0], out_dtype=dtype, check_finite=False)

    merged = map_rows(merge_block, [*experts, *fishers], dtype)
    if not bool(torch.isfinite(merged).all()):
        raise_nonfinite(base, experts)
    return merged


def _check_information(name: str, information: Tensor) -> None:
    if information.numel() == 0:
        return
    low, high = (float(bound) for bound in information.aminmax())
    if not (low >= 0 and high < float("inf")):
        raise_nonfinite_statistic(name, information)
        raise ValueError(f"{name}: got values down to {low:.1e}, need squared gradients, which are at least 0")
