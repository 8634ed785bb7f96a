"""Arcee Fusion: adopt the expert's weights where the change is most important (mergekit)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resm_kernels.checks import NonFiniteError, raise_nonfinite
from resm_kernels.dtypes import compute_dtype
from resm_kernels.elementwise.blocks import blocks_workspace, map_rows, merge_elements
from resm_kernels.elementwise.inputs import check_inputs, row_blocks
from resm_kernels.methods._registry import merge_method
from resm_kernels.ops.magnitude_threshold import magnitude_threshold

_FLOOR = 1e-8
"""Added to probabilities so that their ratios are finite, as in mergekit."""


def _workspace(shape: tuple[int, ...], n_experts: int) -> int:
    """Importances, the zeros they are compared with, the selection's candidates; measured peaks lie 18 % below."""
    return blocks_workspace(shape, n_experts + 4) + 10 * math.prod(shape)


@merge_method(
    title="Arcee Fusion",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md#arcee-fusion-arcee_fusion",
    workspace=_workspace,
    blocks=row_blocks,
    max_experts=1,
)
def arcee_fusion(base: Tensor, experts: list[Tensor], *, out_dtype: torch.dtype | None) -> Tensor:
    """θ = θ_1 where the change's importance is at least its median + 1.5·(upper − lower quartile), else θ₀.

    The importance of a weight is |θ_1 − θ₀| times KL(p‖q) of its row, p and q the softmax of the row (the last
    dimension) of θ_1 and of θ₀, plus 1e-8 each. Quantiles are the ⌊q·(N−1)⌋-th smallest of N; ties are kept.

    Quantiles are exact, by `magnitude_threshold`: mergekit draws them from a random million of larger tensors.
    Divergences are float64: neighbouring distributions differ by less than fp32 resolves, so that mergekit's
    fp32 has a noise of 1e-9 in numbers of that size; its float64 agrees with ours.

    The inputs are read three times, by plain torch in blocks; importances are stored in fp32 (float64 if an input is).
    Weights are copied and rounded once.
    """
    check_inputs(base, experts, out_dtype)
    wide = compute_dtype(base, *experts)

    def importances(rows: list[Tensor]) -> Tensor:
        base_rows, expert_rows = (t.to(wide) for t in rows)
        return ((expert_rows - base_rows).abs() * _divergence(expert_rows, base_rows)).to(wide)

    importance = map_rows(importances, [base, *experts], wide)
    if base.numel() == 0:
        return torch.empty(base.shape, dtype=out_dtype or base.dtype, device=base.device)
    try:
        threshold = _threshold(importance)
    except NonFiniteError:
        raise_nonfinite(base, experts)
        raise ValueError("experts: a difference to the base exceeds the range of fp32; pass float64 tensors") from None
    return merge_elements(
        lambda theta, others: torch.where(others[1].double() >= threshold, others[0], theta),
        base,
        experts,
        out_dtype,
        importance,
    )


def _divergence(expert: Tensor, base: Tensor) -> Tensor:
    """KL(p‖q) with p and q the softmax of each row of expert and base, (rows, 1) float64."""
    p, q = (torch.softmax(t.double(), dim=-1).add_(_FLOOR) for t in (expert, base))
    return (p * torch.log(p / q)).sum(-1, keepdim=True).clamp(min=0)


def _threshold(importance: Tensor) -> float:
    n = importance.numel()
    quantiles = [n - math.floor(q * (n - 1)) for q in (0.75, 0.5, 0.25)]
    zeros = map_rows(lambda rows: torch.zeros_like(rows[0], dtype=torch.bfloat16), [importance], torch.bfloat16)
    upper, median, lower = magnitude_threshold(zeros, [importance] * 3, quantiles).tolist()
    return float(median + 1.5 * (upper - lower))
