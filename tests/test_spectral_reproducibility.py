"""Every result of linear algebra and of spectral merges has the same bits for any number of threads.

Most matrices are small. The large ones have more than 600 rows and columns: several panels of a product, several strips
of a Gram matrix, and sums of more elements than torch adds on one thread. Small matrices take other paths; a merge of
up to 2¹⁷ elements runs on one thread as a whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SameOnThreads
from inputs import experts_with_spectra, power_law, randn, with_spectrum
from subspace_contract import subspace
from torch import Tensor

from resm_kernels import merge
from resm_kernels.linalg import (
    Subspace,
    decompose,
    orthonormalize,
    polar,
    polar_factors,
    subspaces,
    svd_lowrank,
    truncated_svd,
)
from resm_kernels.linalg.products import frobenius_norm, gram, matmul
from resm_kernels.spectral.ranks import RANK_RULES

pytestmark = pytest.mark.usefixtures("one_thread")  # every test makes its input on one thread


def parts(results: list[Subspace]) -> list[Tensor]:
    errors = [torch.tensor(s.error, dtype=torch.float64) for s in results]
    return [getattr(s, name) for s in results for name in ("left", "core", "right")] + errors


@pytest.fixture(scope="module")
def large() -> Tensor:
    return with_spectrum(640, 610, power_law(610, 0.7), seed=1).float()


@pytest.fixture(scope="module")
def medium() -> Tensor:
    """A matrix of several panels, whose Gram matrix, and cores from rank 182, have more than 32768 elements."""
    return with_spectrum(330, 310, power_law(310, 0.7), seed=1).float()


def test_products(same_on_threads: SameOnThreads, large: Tensor) -> None:
    def work() -> list[Tensor]:
        norm = torch.tensor(frobenius_norm(large), dtype=torch.float64)
        return [matmul(large.mT, large), matmul(large, large.mT, torch.float64), gram(large), gram(large, None), norm]

    same_on_threads(work)


@pytest.mark.parametrize(("method", "accuracy", "rank"), [("randomized", 1e-2, 20), ("auto", 5e-2, 60)])
def test_subspaces_of_large_matrices(
    same_on_threads: SameOnThreads, large: Tensor, method: str, accuracy: float, rank: int
) -> None:
    both = [large, randn(640, 610, seed=3)]
    same_on_threads(lambda: parts(subspaces(both, [rank] * 2, method=method, accuracy=accuracy)))


@pytest.mark.parametrize("shape", [(640, 610), (610, 640)], ids=str)
def test_subspaces_of_steep_matrices(same_on_threads: SameOnThreads, shape: tuple[int, int]) -> None:
    both = [with_spectrum(*shape, power_law(610, 1.5), seed).float() for seed in (1, 2)]
    same_on_threads(lambda: parts(subspaces(both, [200] * 2, accuracy=1e-2)))
    same_on_threads(lambda: parts([subspace(both[0], 200, accuracy=1e-2)]))


@pytest.mark.parametrize(("method", "accuracy"), [("gram", 0.0), ("exact", 0.0), ("randomized", 1e-1)])
@pytest.mark.parametrize("rank", [20, 200])
def test_subspaces_of_several_panels(
    same_on_threads: SameOnThreads, medium: Tensor, method: str, accuracy: float, rank: int
) -> None:
    for matrix in (medium, medium.mT.contiguous()):

        def work(matrix: Tensor = matrix) -> list[Tensor]:
            return parts([subspace(matrix, rank, method=method, accuracy=accuracy)])

        same_on_threads(work)


def test_truncated_svd_of_large_matrices(same_on_threads: SameOnThreads, large: Tensor) -> None:
    base = randn(640, 610, seed=5, dtype=torch.bfloat16)

    def work() -> list[Tensor]:
        results = [
            truncated_svd(large, rank=40),
            truncated_svd(large, energy=0.7),
            truncated_svd(base, base.float() + large, rank=12, accuracy=1e-1),
        ]
        return [part for f in results for part in f[:3]] + list(svd_lowrank(large, 20))

    same_on_threads(work)


@pytest.mark.parametrize("method", ["gram", "polar_express"])
def test_polar_factor_of_several_panels(same_on_threads: SameOnThreads, medium: Tensor, method: str) -> None:
    same_on_threads(lambda: [polar(medium[:, :200], method)])


def test_orthonormal_bases_of_several_panels(same_on_threads: SameOnThreads, medium: Tensor) -> None:
    cases = [medium, medium.double(), torch.cat([medium[:, :100]] * 2, 1)]  # the last one takes Householder QR
    same_on_threads(lambda: [part for x in cases for part in orthonormalize(x)[:2]])


@pytest.mark.parametrize("method", ["gram", "exact"])
def test_decompositions_of_several_panels(same_on_threads: SameOnThreads, medium: Tensor, method: str) -> None:
    same_on_threads(lambda: [decompose(medium, method).singular_values])


@pytest.mark.parametrize("method", ["auto", "gram", "exact", "randomized"])
def test_decompositions_of_small_matrices(same_on_threads: SameOnThreads, method: str) -> None:
    matrices = [with_spectrum(90, 70, power_law(70, alpha), seed=4).float() for alpha in (0.3, 1.0, 2.0)]
    accuracy = 1e-2

    def work() -> list[Tensor]:
        results = subspaces(matrices, [5, 9, 20], method=method, accuracy=accuracy)
        rules: list[dict[str, Any]] = [{"rank": 7}, {"energy": 0.8}, {"tol": 0.4}]
        single = [truncated_svd(matrices[0], method=method, accuracy=accuracy, **rule) for rule in rules]
        batch = truncated_svd(torch.stack(matrices), rank=6, method=method, accuracy=accuracy)
        return parts(results) + [part for f in (*single, batch) for part in f[:3]]

    same_on_threads(work)


def test_factors_and_bases_of_small_matrices(same_on_threads: SameOnThreads) -> None:
    matrices = [randn(90, 25, seed=s) for s in range(3)]

    def work() -> list[Tensor]:
        blocks = [[orthonormalize(x).q for x in matrices]]
        factors = polar_factors(blocks, torch.float32) + polar_factors(blocks)
        bases = [part for x in matrices for part in orthonormalize(x)[:2]]
        polars = [polar(x, method) for x in matrices for method in ("gram", "polar_express")]
        return [part for f in factors for part in f] + bases + polars + list(svd_lowrank(torch.stack(matrices), 5))

    same_on_threads(work)


@pytest.mark.parametrize("rule", RANK_RULES)
@pytest.mark.parametrize("decomposition", ["auto", "gram", "exact", "randomized"])
def test_merges_of_small_matrices(same_on_threads: SameOnThreads, rule: str, decomposition: str) -> None:
    base, experts = experts_with_spectra(72, 64, 3, seed=1)
    parameters: dict[str, Any] = {"rank_rule": rule, "decomposition": decomposition, "rank": 6, "gamma": 0.5}
    accuracies = [1e-1, 1e-2] if decomposition == "randomized" else [0.0, 1e-2]

    def work() -> list[Tensor]:
        merged = [merge(base, experts, "resm", accuracy=a, **parameters) for a in accuracies]
        half = [e.bfloat16() for e in experts]
        row = {"beta": 1.0, "granularity": "row", "accuracy": accuracies[0]}
        by_row = merge(base.bfloat16(), half, "resm", **row, **parameters)
        return [*merged, by_row]

    same_on_threads(work)


@pytest.mark.parametrize("rule", ["sparsity", "energy", "interference"])
def test_merges_of_several_panels(same_on_threads: SameOnThreads, rule: str) -> None:
    # More than 2¹⁷ elements, so that the merge shares out its parts.
    base, experts = experts_with_spectra(380, 350, 3, seed=1)
    parameters: dict[str, Any] = {"beta": 1.0, "rank_rule": rule, "energy": 0.7}
    same_on_threads(lambda: [merge(base, experts, "resm", accuracy=1e-2, **parameters)])


@pytest.mark.parametrize(("shape", "accuracy"), [((640, 610), 0.0), ((380, 350), 1e-1)], ids=str)
def test_tsvm_of_large_matrices(same_on_threads: SameOnThreads, shape: tuple[int, int], accuracy: float) -> None:
    base, experts = experts_with_spectra(*shape, 2, seed=2)
    same_on_threads(lambda: [merge(base, experts, "tsvm", accuracy=accuracy)])


@pytest.mark.parametrize("shape", [(640, 610), (380, 700)], ids=str)
def test_resm_of_half_precision(same_on_threads: SameOnThreads, shape: tuple[int, int]) -> None:
    # In fp32 the Gram matrices, eigenproblems and products of three experts overlap in time.
    base, experts = experts_with_spectra(*shape, 3, seed=4, dtype=torch.bfloat16)
    same_on_threads(lambda: [merge(base, experts, "resm", out_dtype=torch.float32)])


@pytest.mark.parametrize("decomposition", ["auto", "gram", "exact", "randomized"])
def test_tsvm_of_small_matrices(same_on_threads: SameOnThreads, decomposition: str) -> None:
    base, experts = experts_with_spectra(72, 64, 2, seed=1)

    def work() -> list[Tensor]:
        return [
            merge(base, experts, "tsvm", decomposition=decomposition, accuracy=1e-1),
            merge(base.double(), [e.double() for e in experts], "tsvm", decomposition=decomposition, accuracy=1e-1),
        ]

    same_on_threads(work)
