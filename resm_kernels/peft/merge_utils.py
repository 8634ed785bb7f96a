"""Drop-in replacements of peft.utils.merge_utils: the same arguments and definitions, no sort, arithmetic in fp32.

    peft.tuners.lora.model.ties = resm_kernels.peft.ties  # add_weighted_adapter(combination_type="ties") then runs here

Differences from peft 0.21: all values of a task tensor that tie with the k-th largest are kept, where peft's top-k
keeps an arbitrary part of them; random drops come from `ops.random_mask`, whose key is drawn from torch's default
generator; arithmetic is fp32 with one rounding (float64 for float64 tensors), where peft computes in the dtype of the
tensors. A density of 1 or more keeps everything, without a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from resm_kernels.dtypes import compute_dtype
from resm_kernels.elementwise.blocks import merge_elements
from resm_kernels.ops import aggregate, magnitude_threshold, random_mask

SignMethod = Literal["total", "frequency"]


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ_t w_t·δ_t (arXiv 2212.04089).

    Args:
        task_tensors: δ_1 … δ_T, of one shape.
        weights: w_1 … w_T.
    """
    return aggregate(None, task_tensors, weights)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Σ_t w_t·trim(δ_t): trim keeps the ⌊density·N⌋ largest magnitudes, and those that tie with the smallest of them.

    Args:
        task_tensors, weights: As for `task_arithmetic`.
        density: Share of each task tensor that is kept, 0 or more.
    """
    return aggregate(None, task_tensors, weights, thresholds=_thresholds(task_tensors, density))


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """TIES (arXiv 2306.01708) as peft defines it: signs are elected before weighting, and counts divide.

    The result is, element by element, the mean of those w_t·trim(δ_t) for which trim(δ_t) has the elected sign; 0 where
    none has it.

    Args:
        task_tensors, weights, density: As for `magnitude_prune`.
        majority_sign_method: "total" elects the sign of Σ_t trim(δ_t), "frequency" that of Σ_t sign(trim(δ_t)). A sum
            of 0 elects +.
    """
    thresholds = _thresholds(task_tensors, density)
    pruned = list(task_tensors)
    if thresholds is not None:
        pruned = [
            aggregate(None, [d], [1.0], thresholds=[t]) for d, t in zip(task_tensors, thresholds.tolist(), strict=True)
        ]
    return _disjoint_merge(pruned, weights, majority_sign_method, task_tensors[0].dtype)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """Σ_t w_t·m_t∘δ_t/density, m_t drawn to keep each element with that probability (DARE, arXiv 2311.03099).

    Args:
        task_tensors, weights: As for `task_arithmetic`.
        density: The probability, above 0.
    """
    masks = _masks(task_tensors, density)
    shares = torch.as_tensor(weights, dtype=torch.float64) / min(density, 1.0)
    return aggregate(None, task_tensors, shares, masks=masks)


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """`ties` of the task tensors after DARE's random drop, m_t∘δ_t/density, of which none is trimmed.

    Args:
        task_tensors, weights, density: As for `dare_linear`.
        majority_sign_method: As for `ties`.
    """
    masks = _masks(task_tensors, density)
    pruned = list(task_tensors)
    if masks is not None:
        # They are fp32 or float64, so that only the end result is rounded.
        wide = compute_dtype(*task_tensors)
        pruned = [
            aggregate(None, [d], [1.0 / density], masks=[m], out_dtype=wide)
            for d, m in zip(task_tensors, masks, strict=True)
        ]
    return _disjoint_merge(pruned, weights, majority_sign_method, task_tensors[0].dtype)


def _thresholds(task_tensors: Sequence[Tensor], density: float) -> Tensor | None:
    if not density >= 0:
        raise ValueError(f"density: got {density!r}, need a share of at least 0")
    if density >= 1:
        return None
    return magnitude_threshold(torch.zeros_like(task_tensors[0]), task_tensors, int(density * task_tensors[0].numel()))


def _masks(task_tensors: Sequence[Tensor], density: float) -> list[Tensor] | None:
    if not density > 0:
        raise ValueError(f"density: got {density!r}, need a share above 0")
    if density >= 1:
        return None
    return random_mask(task_tensors[0], task_tensors, density, seed=int(torch.randint(2**62, ())))


def _disjoint_merge(pruned: Sequence[Tensor], weights: Tensor, method: SignMethod, dtype: torch.dtype) -> Tensor:
    if method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method: got {method!r}, need total or frequency")
    factors = [float(w) for w in weights]
    if len(factors) != len(pruned):
        raise ValueError(f"weights: got {len(factors)}, need one for each of the {len(pruned)} task tensors")

    def merged(_: Tensor, deltas: list[Tensor]) -> Tensor:
        signs = torch.stack([d.sign() for d in deltas])
        votes = signs.sum(0) if method == "frequency" else torch.stack(deltas).sum(0)
        agree = signs == torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
        total = torch.zeros_like(deltas[0])
        for delta, weight, agrees in zip(deltas, factors, agree, strict=True):
            total += torch.where(agrees, delta * weight, 0.0)
        return total / agree.sum(0).clamp(min=1)

    return merge_elements(merged, pruned[0], list(pruned), dtype)
