"""resmerge: against the authors' steps written out in float64 on whole matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from inputs import experts_with_spectra, merged_delta, orthonormal, randn, relative, same_bits, with_spectrum
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


def authors_resmerge(
    deltas: list[Tensor],
    rank: int = 1,
    beta_min: float = 0.7,
    beta_max: float = 1.0,
    confidence: float = 1.0,
    head_ratio: float = 0.2,
) -> Tensor:
    n_experts, heads = len(deltas), []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        heads.append((u[:, :rank] * s[:rank]) @ vh[:rank])
    residuals = [d.double() - h for d, h in zip(deltas, heads, strict=True)]
    norms = [float(r.norm()) for r in residuals]
    units = [r / n if n > 1e-12 else torch.zeros_like(r) for r, n in zip(residuals, norms, strict=True)]
    consensus = sum(units, torch.zeros_like(units[0]))
    backbone = sum(residuals, torch.zeros_like(units[0])) / n_experts
    coherence = sum(cosine(q, consensus) for q in units) / n_experts
    if coherence > 1 / math.sqrt(n_experts) + 1e-12:
        pairs = [cosine(a, b) for a, b in itertools.combinations(units, 2)]
        score = confidence * 0.5 * ((sum(pairs) / len(pairs) + 1) / 2 + (coherence + 1) / 2)
        beta = beta_max - (beta_max - beta_min) * score
        backbone = consensus / consensus.norm() * coherence**beta * sum(norms) / n_experts
    some = [h for h in heads if float(h.norm()) > 1e-12]
    agreements = [max(0.0, cosine(a, b)) for a, b in itertools.combinations(some, 2)]
    agreement = sum(agreements) / len(agreements) if agreements else float(len(some) == 1)
    mean_head = sum(heads, torch.zeros_like(backbone)) / n_experts
    correction = torch.zeros_like(backbone)
    if float(mean_head.norm()) > 1e-12:
        correction = mean_head / mean_head.norm() * head_ratio * agreement * backbone.norm()
    return backbone + correction


def related(m: int, n: int, n_experts: int, alike: float, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A float64 base and experts that share a part of their task vectors."""
    base, experts = experts_with_spectra(m, n, n_experts, 1.0, seed, torch.float64)
    shared = 0.02 * with_spectrum(m, n, torch.arange(1, min(m, n) + 1).double() ** -0.5, seed + 99)
    return base, [base + (1 - alike) * (e - base) + alike * shared for e in experts]


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("n_experts", [2, 3, 5])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (33, 50), (3, 40)], ids=str)
def test_equals_the_authors_steps(shape: tuple[int, int], n_experts: int, alike: float) -> None:
    base, experts = related(*shape, n_experts, alike, seed=3)
    deltas = [e - base for e in experts]
    for parameters in ({}, {"rank": 2, "beta_min": 0.2}, {"confidence": 0.0}, {"head_ratio": 1.5, "beta_max": 2.0}):
        expected = authors_resmerge(deltas, **parameters)
        for decomposition in ("gram", "exact"):
            assert (
                relative(merged_delta(base, experts, "resmerge", decomposition=decomposition, **parameters), expected)
                <= 1e-9
            )
        assert relative(merged_delta(base, experts, "resmerge", **parameters), expected) <= 1e-3
    single = [e.float() for e in experts]
    merged = merged_delta(base.float(), single, "resmerge", decomposition="gram")
    assert relative(merged, authors_resmerge([e - base.float() for e in single])) <= 1e-6
    weighed = [w * d for w, d in zip(range(1, n_experts + 1), deltas, strict=True)]
    weight = list(range(1, n_experts + 1))
    merged = merged_delta(base, experts, "resmerge", weight=weight, lambda_=0.5, decomposition="gram")
    assert relative(merged, 0.5 * authors_resmerge(weighed)) <= 1e-9


def test_subspace_iteration_finds_the_heads() -> None:
    base, experts = experts_with_spectra(400, 300, 2, 0.7, dtype=torch.float64)
    expected = authors_resmerge([e - base for e in experts])
    assert relative(merged_delta(base, experts, "resmerge"), expected) <= 3e-4


def test_residuals_without_anything_in_common_are_averaged() -> None:
    left, right = orthonormal(24, 24, 1), orthonormal(20, 20, 2)
    values = torch.tensor([5.0, 1.0, 0.7]).double()
    deltas = [left[:, i : i + 3] * values @ right[:, i : i + 3].mT for i in (0, 3, 6)]
    base = randn(24, 20, seed=0).double()
    mean = sum(d - 5 * torch.outer(left[:, i], right[:, i]) for i, d in zip((0, 3, 6), deltas, strict=True)) / 3
    # The heads have nothing in common either, so there is no correction.
    assert relative(merged_delta(base, [base + d for d in deltas], "resmerge", decomposition="gram"), mean) <= 1e-9


def test_copies_give_the_merge_of_one() -> None:
    base, (expert,) = experts_with_spectra(30, 20, 1, 1.0, dtype=torch.float64)
    once = merged_delta(base, [expert], "resmerge", decomposition="gram")
    assert relative(merged_delta(base, [expert] * 3, "resmerge", decomposition="gram"), once) <= 1e-9
    u, s, vh = torch.linalg.svd(expert - base)
    residual = (expert - base) - s[0] * torch.outer(u[:, 0], vh[0])
    assert relative(once, residual + 0.2 * residual.norm() * torch.outer(u[:, 0], vh[0])) <= 1e-9


def test_zero_and_low_rank_task_vectors() -> None:
    base, experts = related(30, 20, 2, 0.5)
    deltas = [torch.zeros_like(base), *(e - base for e in experts)]
    merged = merged_delta(base, [base, *experts], "resmerge", decomposition="gram")
    assert relative(merged, authors_resmerge(deltas)) <= 1e-9
    assert same_bits(merge(base, [base, base.clone()], "resmerge"), base)
    # A rank-1 task vector is all head, and the head is scaled by the norm of the backbone, here 0.
    thin = [base + torch.outer(randn(30, seed=t), randn(20, seed=t + 9)).double() for t in (1, 2)]
    assert float(merged_delta(base, thin, "resmerge").norm()) <= 1e-6 * float((thin[0] - base).norm())
