"""RAM, Reinforced Agent Merging (Yuan et al., arXiv 2601.13572): shared changes are averaged, unique ones kept."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels.methods._blocks import blocks_workspace, merge_elements
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._task_matrices import check

EPSILON = Parameter("epsilon", float, 1e-5, "an expert has changed a weight if |δ| is more than this", minimum=0.0)


def ram(base: Tensor, experts: list[Tensor], *, epsilon: float, out_dtype: torch.dtype | None) -> Tensor:
    """θ = θ₀ + (1/c)·Σ over the c experts with |δ_t| > ε of δ_t, weight by weight; θ₀ where c = 0.

    Reinforcement learning changes few weights, and different ones in different experts: what one expert alone has
    changed (c = 1) is kept in full, what several have is averaged among them.

    Element-wise, read once, by plain torch in blocks: fp32 (float64 if an input is), rounded once. Deterministic: the
    same bits for any number of threads.

    Raises:
        NonFiniteError: An input has NaN or infinite values.
    """
    check(base, experts, out_dtype)
    return merge_elements(lambda origin, own: shared_mean(origin, own, epsilon, None), base, experts, out_dtype)


def changes(origin: Tensor, own: list[Tensor], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The task vectors without what is no change, (T, n); which are changes; and how many experts have one, (n,)."""
    deltas = torch.stack([e - origin for e in own])
    changed = deltas.abs() > epsilon
    return torch.where(changed, deltas, 0.0), changed, changed.sum(0)


def shared_mean(origin: Tensor, own: list[Tensor], epsilon: float, unique_factors: Tensor | None) -> Tensor:
    """θ of a block; where only one expert has a change, that is multiplied by its factor."""
    deltas, _, counts = changes(origin, own, epsilon)
    if unique_factors is not None:
        deltas = torch.where(counts == 1, deltas * unique_factors.to(deltas.dtype)[:, None], deltas)
    total = deltas[0]
    for delta in deltas[1:]:
        total = total + delta
    return origin + total / counts.clamp(min=1)


RAM = Method(
    name="ram",
    title="RAM",
    reference="https://arxiv.org/abs/2601.13572",
    needs_base=True,
    parameters=(EPSILON,),
    function=ram,
    workspace=blocks_workspace,
)
