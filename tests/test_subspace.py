"""Dominant subspaces by every route: projectors, scales, reasons and errors.

Projectors are compared because the vectors themselves are not unique, and only where the gap at k is wide. The
tolerances are in subspace_contract.py; certificates are tested in test_certificate.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inputs import orthonormal, power_law, randn, same_bits, with_spectrum
from subspace_contract import ROUNDING, SINGLE, distance, product, projector, stepped, subspace
from torch import Tensor

from resm_kernels.checks import NonFiniteError
from resm_kernels.linalg import DECOMPOSITIONS, decompose, randomized, subspaces

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = ("gram", "exact")
every = pytest.mark.parametrize("method", DECOMPOSITIONS)


@pytest.mark.parametrize("shape", [(80, 80), (90, 60), (60, 90)], ids=str)
@pytest.mark.parametrize("accuracy", [1e-1, 1e-2, 1e-4])
def test_randomized_projectors_are_as_near_as_the_residual_allows(shape: tuple[int, int], accuracy: float) -> None:
    matrix, left, right = stepped(*shape)
    s = subspace(matrix, 6, method="randomized", accuracy=accuracy)
    # Wedin: the sines of the angles are at most the two residuals' norm over the gap, here of 1 − 0.1 − residual.
    residual = accuracy * float(matrix.norm())
    bound = math.sqrt(2) * residual / (0.9 - residual) + SINGLE
    assert distance(projector(s.left), projector(left)) <= bound
    assert distance(projector(s.right), projector(right)) <= bound


@every
def test_numerical_rank_bounds_the_truncation(method: str) -> None:
    matrix = with_spectrum(30, 20, power_law(7, 0.5), 0)
    s = subspace(matrix, 20, method=method, accuracy=1e-2 if method == "randomized" else 0.0)
    assert s.core.shape == (7, 7) and distance(product(s), matrix) <= SINGLE
    assert s.error <= 3 * SINGLE  # the certificate in fp32 has 32 units of slack and the rounding of the difference
    # 1e-6 of the largest is the limit.
    three = torch.diag(torch.tensor([1.0, 2e-6, 5e-7])).double()
    assert subspace(three, 3, method=method, accuracy=1e-2).core.shape == (2, 2)


@every
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("accuracy", [0.0, 1e-2])
def test_zero_and_empty_matrices_have_no_directions(method: str, shape: tuple[int, int], accuracy: float) -> None:
    s = subspace(torch.zeros(shape), 3, method=method, accuracy=accuracy)
    assert s.left.shape == (shape[0], 0) and s.right.shape == (shape[1], 0) and s.core.shape == (0, 0)
    assert s.error == 0.0
    if method in DENSE:
        d = decompose(torch.zeros(shape), method)
        assert d.rank == 0 and d.singular_values.shape == (min(shape),) and not d.singular_values.any()


@every
def test_a_zero_matrix_changes_no_other_result(method: str) -> None:
    matrices = [randn(30, 20, seed=1), torch.zeros(30, 20), randn(30, 20, seed=2)]
    together = subspaces(matrices, [4, 4, 4], method=method, accuracy=1e-1)
    assert [s.core.shape[0] for s in together] == [4, 0, 4] and together[1].error == 0.0
    alone = subspace(matrices[2], 4, method=method, accuracy=1e-1)
    assert same_bits(together[2].core, alone.core) and same_bits(together[2].left, alone.left)


@every
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_moves_cores_only(method: str, scale: float) -> None:
    matrix, left, _ = stepped(60, 40)
    scaled = (matrix.float() * scale).double()
    s = subspace(scaled, 6, method=method, accuracy=1e-3)
    values = torch.linalg.svdvals(s.core.double())
    torch.testing.assert_close(values, torch.linalg.svdvals(scaled)[:6], rtol=1e-5, atol=0)
    bound = math.sqrt(2) * 1e-3 * float(matrix.norm()) + SINGLE  # as in the test of randomized projectors
    assert distance(projector(s.left), projector(left)) <= bound
    if method in DENSE:
        assert distance(projector(s.left), projector(left)) <= SINGLE  # fp32 has rounded the matrix
        values = decompose(scaled, method).singular_values
        torch.testing.assert_close(values, torch.linalg.svdvals(scaled), rtol=1e-12, atol=0)


@every
@pytest.mark.parametrize("shape", [(70, 40), (40, 70)], ids=str)
def test_orthogonal_changes_of_basis_pass_through(method: str, shape: tuple[int, int]) -> None:
    matrix, _, _ = stepped(*shape)
    u, v = orthonormal(shape[0], shape[0], 8), orthonormal(shape[1], shape[1], 9)
    accuracy = 0.0 if method in DENSE else 1e-4
    a, b = (subspace(x, 6, method=method, accuracy=accuracy) for x in (matrix, u @ matrix @ v.mT))
    bound = 10 * ROUNDING if b.core.dtype == torch.float64 else 4 * accuracy * float(matrix.norm()) + SINGLE
    assert distance(projector(b.left), u @ projector(a.left) @ u.mT) <= bound
    assert distance(projector(b.right), v @ projector(a.right) @ v.mT) <= bound
    assert distance(product(b), u @ product(a) @ v.mT) <= 3 * bound  # ‖Δ‖ is 3


@pytest.mark.parametrize("method", ["auto", "gram", "randomized"])
@pytest.mark.parametrize("shape", [(70, 40), (40, 70)], ids=str)
def test_transposing_swaps_the_sides_bit_for_bit(method: str, shape: tuple[int, int]) -> None:
    matrix = randn(*shape, seed=3)
    a, b = (subspace(x, 5, method=method, accuracy=1e-1) for x in (matrix, matrix.mT))
    assert same_bits(a.left, b.right) and same_bits(a.right, b.left) and same_bits(a.core, b.core.mT.contiguous())


@every
def test_several_matrices_are_what_each_is_alone_bit_for_bit(method: str) -> None:
    matrices = [with_spectrum(60, 48, power_law(48, alpha), 7).float() for alpha in (0.3, 1.0, 2.0)]
    accuracy = 1e-2
    for s, matrix in zip(subspaces(matrices, [6] * 3, method=method, accuracy=accuracy), matrices, strict=True):
        alone = subspace(matrix, 6, method=method, accuracy=accuracy)
        assert all(same_bits(getattr(s, part), getattr(alone, part)) for part in ("left", "core", "right"))
        assert (s.error, s.method) == (alone.error, alone.method)


@every
def test_same_bits_twice_and_input_untouched(method: str) -> None:
    matrix = randn(40, 30, seed=0)
    before = matrix.clone()
    a, b = (subspace(matrix, 5, method=method, accuracy=1e-1) for _ in range(2))
    assert all(same_bits(getattr(a, part), getattr(b, part)) for part in ("left", "core", "right"))
    assert torch.equal(matrix, before)


def test_ranks_may_be_functions_of_the_spectrum() -> None:
    matrix = with_spectrum(30, 20, power_law(20, 1.0), 3)
    seen: list[Tensor] = []

    def rule(values: Tensor) -> int:
        seen.append(values)
        return 7

    first, second = subspaces([matrix, 2 * matrix], [rule, 3])
    assert first.core.shape == (7, 7) and second.core.shape == (3, 3)
    torch.testing.assert_close(seen[0], power_law(20, 1.0), rtol=1e-12, atol=0)
    assert first.reason == second.reason == "the rank rule needs all singular values"


def test_the_result_names_its_route_and_the_reason() -> None:
    decaying = with_spectrum(300, 256, power_law(256, 0.7), 0)

    def route(rank: int, **options: Any) -> tuple[str, str]:
        s = subspace(decaying, rank, **options)
        return s.method, s.reason

    assert route(8) == ("gram", "accuracy 0 needs float64")
    assert route(8, accuracy=1e-7) == ("gram", "accuracy 1e-07 needs float64")
    method, reason = route(8, accuracy=1e-2)
    assert method == "randomized" and reason.startswith("cost model: randomized 0.")
    s = subspace(decaying, 200, accuracy=1e-4)
    assert (s.method, s.core.dtype) == ("gram", torch.float32)
    assert s.reason.startswith("cost model: randomized ") and s.reason.endswith(" of gram; in fp32")
    steep = with_spectrum(300, 256, power_law(256, 2.5), 0)  # σ_200 is 2e-6·σ_1: fp32's Gram matrix does not show it
    s = subspace(steep, 200, accuracy=1e-2)
    assert (s.method, s.core.dtype) == ("gram", torch.float64)
    assert s.reason.endswith(" of gram; in float64, as fp32 is not within 0.01")
    for method in ("gram", "exact", "randomized"):
        assert route(8, method=method, accuracy=1e-1) == (method, "asked for")
    huge = subspace(decaying * 1e60, 8, accuracy=1e-2)
    assert (huge.method, huge.reason) == ("gram", "beyond the range of fp32") and math.isfinite(float(huge.core.sum()))


def test_falls_back_to_float64_where_the_accuracy_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomized, "MOST_ITERATIONS", 6)
    flat = randn(400, 300, seed=0)  # a random matrix: no gap anywhere
    s = subspace(flat, 4, accuracy=2e-5)
    reason = "randomized was not within 2e-05 after 6 power iterations"
    assert (s.method, s.reason) == ("gram", reason)
    expected = subspace(flat, 4, method="gram")
    assert same_bits(s.left, expected.left) and same_bits(s.core, expected.core) and s.error == expected.error
    with pytest.raises(ValueError, match="accuracy: 2e-05 is not within reach of 'randomized' in 6 power iterations"):
        subspace(flat, 4, method="randomized", accuracy=2e-5)


def test_power_iterations_and_oversampling_are_taken_as_they_are() -> None:
    flat = with_spectrum(200, 150, power_law(150, 0.3), 2)
    errors = [subspace(flat, 10, method="randomized", power_iterations=q).error for q in (0, 1, 4, 12)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    errors = [
        subspace(flat, 10, method="randomized", power_iterations=0, oversampling=p).error for p in (0, 20, 60, 140)
    ]
    assert errors == sorted(errors, reverse=True)
    # As many columns as there are directions leave nothing to chance.
    assert errors[-1] == pytest.approx(decompose(flat).truncate(10).error, rel=1e-5)


def test_seeds_change_bits_but_not_accuracy() -> None:
    matrix = with_spectrum(120, 90, power_law(90, 0.7), 4).float()
    results = [subspace(matrix, 8, method="randomized", accuracy=1e-2, seed=seed) for seed in range(6)]
    assert all(not torch.equal(s.left, results[0].left) for s in results[1:])
    best = decompose(matrix).truncate(8).error
    assert all(best <= s.error <= best * 1.005 for s in results)


def test_wrong_arguments_are_refused_by_name() -> None:
    eye = torch.eye(4)
    cases: list[tuple[str, list[Tensor], list[Any], dict[str, Any]]] = [
        (r"matrices\[1\]: got 1 dimensions", [eye, eye[0]], [1, 1], {}),
        (r"matrices\[0\]: got dtype torch.bfloat16", [eye.bfloat16()], [1], {}),
        (r"matrices\[1\]: got shape \[4, 3\], need \[4, 4\]", [eye, eye[:, :3]], [1, 1], {}),
        ("ranks: got 1, need one for each of the 2 matrices", [eye, eye], [1], {}),
        (r"ranks\[0\]: got -1", [eye], [-1], {}),
        ("ranks: a rule needs all singular values", [eye], [len], {"method": "randomized"}),
        ("method: got 'svd', need one of auto, gram", [eye], [1], {"method": "svd"}),
        ("accuracy: got -1", [eye], [1], {"accuracy": -1.0}),
        ("accuracy: got nan", [eye], [1], {"accuracy": math.nan}),
        ("accuracy: got inf", [eye], [1], {"accuracy": math.inf}),
        ("oversampling: got -1", [eye], [1], {"oversampling": -1}),
        ("power_iterations: got -2", [eye], [1], {"power_iterations": -2}),
        ("seed: got -1", [eye], [1], {"method": "randomized", "accuracy": 0.1, "seed": -1}),
        ("matrices: got norms that", [eye.double() * 1e60], [1], {"method": "randomized", "accuracy": 0.1}),
    ]
    for message, matrices, ranks, options in cases:
        with pytest.raises(ValueError, match=message):
            subspaces(matrices, ranks, **options)
    assert subspaces([], []) == []


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(method: str, bad: float) -> None:
    good, spoilt = torch.ones(5, 4), torch.ones(5, 4)
    spoilt[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"matrices\[1\]: got 1 NaN or infinite values") as caught:
        subspaces([good, spoilt], [1, 1], method=method, accuracy=1e-1)
    assert (caught.value.index, caught.value.count) == (1, 1)
    with pytest.raises(ValueError, match=r"matrices\[0\]: values so large that their squares overflow float64"):
        subspace(torch.full((3, 2), 1e200, dtype=torch.float64), 1, method=method)
