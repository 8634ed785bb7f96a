"""dc_merge: against the authors' steps for LoRA and for full fine-tuning, written out in float64."""

from __future__ import annotations

import pytest
import torch
from inputs import experts_with_spectra, merged_delta, orthonormal, randn, relative, same_bits
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def nearest_orthonormal(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def authors_dc_merge(
    deltas: list[Tensor], rank: int | None = None, smoothing: str = "none", rho: float = 5.0, density: float = 1e-3
) -> Tensor:
    k = min(deltas[0].shape) // len(deltas) if rank is None else rank
    lefts, rights, smoothed = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        u, s, vh = u[:, :k], s[:k], vh[:k]
        if smoothing == "average":
            s = torch.full_like(s, float(s.sum()) / k)
        if smoothing == "linear":
            shape = torch.linspace(min(rho, float(s[0] / s[-1])), 1.0, k, dtype=torch.float64)
            s = s.sum() * shape / shape.sum()
        lefts.append(u)
        rights.append(vh.mT)
        smoothed.append((u * s) @ vh)
    cover_left, cover_right = (nearest_orthonormal(torch.cat(sides, 1)) for sides in (lefts, rights))
    inside = []
    for matrix in smoothed:
        m = cover_left.mT @ matrix @ cover_right
        least = m.abs().flatten().topk(max(1, int(density * m.numel()))).values.min()
        inside.append(m * (m.abs() >= least))
    stacked = torch.stack(inside)
    summed = stacked.sum(0)
    agrees = stacked.sign() == summed.sign()
    merged = (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    merged[summed == 0] = 0
    blocks = torch.block_diag(*[torch.ones(k, k, dtype=torch.float64)] * len(deltas))
    return cover_left @ (merged * blocks) @ cover_right.mT


@pytest.mark.parametrize("smoothing", ["none", "average", "linear"])
@pytest.mark.parametrize("n_experts", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (33, 50)], ids=str)
def test_equals_the_authors_steps(shape: tuple[int, int], n_experts: int, smoothing: str) -> None:
    base, experts = experts_with_spectra(*shape, n_experts, 0.7, seed=3, dtype=torch.float64)
    deltas = [e - base for e in experts]
    rank, rho = {"rank": 4, "density": 0.1}, {"rho": 2.0, "density": 0.02}
    for parameters in ({}, {"density": 0.05}, {"density": 1.0}, rank, rho):
        expected = authors_dc_merge(deltas, smoothing=smoothing, **parameters)
        assert float(expected.norm()) > 0
        for decomposition in ("gram", "exact"):
            options = {"smoothing": smoothing, "decomposition": decomposition, **parameters}
            merged = merged_delta(base, experts, "dc_merge", **options)
            assert relative(merged, expected) <= 1e-8
    weighed = [w * d for w, d in zip(range(1, n_experts + 1), deltas, strict=True)]
    merged = merged_delta(
        base, experts, "dc_merge", smoothing=smoothing, weight=list(range(1, n_experts + 1)), lambda_=0.5, density=1
    )
    assert relative(merged, 0.5 * authors_dc_merge(weighed, smoothing=smoothing, density=1.0)) <= 1e-8


@pytest.mark.parametrize("shape", [(48, 48), (33, 50)], ids=str)
def test_single_precision(shape: tuple[int, int]) -> None:
    base, experts = experts_with_spectra(*shape, 3, 0.7, seed=3)
    expected = authors_dc_merge([e - base for e in experts], density=1.0)
    assert relative(merged_delta(base, experts, "dc_merge", density=1.0), expected) <= 1e-6


def test_orthogonal_experts_keep_all_they_have() -> None:
    left, right = orthonormal(40, 40, 1), orthonormal(30, 30, 2)
    base = randn(40, 30, seed=0).double()
    values = torch.linspace(2, 1, 8).double()
    deltas = [(left[:, i : i + 8] * values * w) @ right[:, i : i + 8].mT for i, w in ((0, 1.0), (8, 0.7))]
    experts = [base + d for d in deltas]
    # 16 of 256 entries are not 0, 8 of each expert.
    assert relative(merged_delta(base, experts, "dc_merge", rank=8, density=8 / 256), deltas[0] + deltas[1]) <= 1e-9
    part = merged_delta(base, experts, "dc_merge", rank=8, density=3 / 256)
    top = [(left[:, i : i + 3] * values[:3] * w) @ right[:, i : i + 3].mT for i, w in ((0, 1.0), (8, 0.7))]
    assert relative(part, top[0] + top[1]) <= 1e-9


def test_one_expert_gives_its_largest_directions() -> None:
    base, (expert,) = experts_with_spectra(30, 20, 1, dtype=torch.float64)
    assert relative(merged_delta(base, [expert], "dc_merge", density=1.0), expert - base) <= 1e-9
    u, s, vh = torch.linalg.svd(expert - base, full_matrices=False)
    assert relative(merged_delta(base, [expert], "dc_merge", density=5 / 400), (u[:, :5] * s[:5]) @ vh[:5]) <= 1e-9
    assert relative(merged_delta(base, [expert], "dc_merge", density=0.0), s[0] * torch.outer(u[:, 0], vh[0])) <= 1e-9


def test_copies_share_one_basis() -> None:
    # Each of T copies gets a T-th of what they share: polar([Q … Q]) is [Q … Q]/√T.
    base, (expert,) = experts_with_spectra(30, 24, 1, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(expert - base, full_matrices=False)
    expected = (u[:, :8] * s[:8]) @ vh[:8] / 3
    assert relative(merged_delta(base, [expert] * 3, "dc_merge", density=1.0), expected) <= 1e-9


def test_zero_task_vectors_take_no_part() -> None:
    base, experts = experts_with_spectra(30, 24, 2, dtype=torch.float64)
    for parameters in ({"rank": 8, "density": 1.0}, {"rank": 6, "smoothing": "linear"}):
        merged = merged_delta(base, [base, *experts], "dc_merge", **parameters)
        assert relative(merged, merged_delta(base, experts, "dc_merge", **parameters)) <= 1e-9
    assert same_bits(merge(base, [base, base.clone()], "dc_merge", smoothing="average"), base)


@pytest.mark.parametrize("shape", [(30,), (), (0, 4), (2, 9), (2, 3, 5)], ids=str)
def test_tensors_without_room_for_all_experts_are_averaged(shape: tuple[int, ...]) -> None:
    base, experts = randn(*shape, seed=0), [randn(*shape, seed=t) for t in (1, 2, 3)]
    expected = base + torch.stack([e - base for e in experts]).mean(0)
    torch.testing.assert_close(merge(base, experts, "dc_merge"), expected)
    matrix, others = experts_with_spectra(12, 9, 2)
    torch.testing.assert_close(merge(matrix, others, "dc_merge", spectral=False), (others[0] + others[1]) / 2)
