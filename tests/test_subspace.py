"""Decompositions and subspaces: singular values, projectors (the vectors themselves are not unique), cores, errors.

Tolerances. `ROUNDING` is a hundred times what float64 products of this size round, `SINGLE` 32 units of fp32. The Gram
way gets σ_i to about 1e-16·σ_1²/σ_i: `GRAM` times that, for size; its left vectors deviate from orthogonality by
`GRAM`·(σ_1/σ_k)² until, beyond `REPAIRED`, they are orthonormalised. A certificate is a square root of a difference
of squares, so that in float64 it is right to sqrt(ROUNDING) where the error is small, which `CERTIFICATE` bounds.
Certificates themselves are in test_certificate.py. Projectors are compared where the gap at k is wide.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import orthonormal, power_law, randn, same_bits, with_spectrum
from torch import Tensor

from resm_kernels.linalg import DECOMPOSITIONS, Subspace, decompose, decompose_list, subspace, subspaces
from resm_kernels.linalg._randomized import MOST_ITERATIONS
from resm_kernels.ops._library import NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-13
SINGLE = 32 * 2.0**-24
GRAM = 1e-14
REPAIRED = 1e-10 / 2.0**-52
CERTIFICATE = 1e-6

SHAPES = [(30, 30), (50, 20), (20, 50), (1, 17), (17, 1), (1, 1)]

DENSE = ("gram", "exact")
dense = pytest.mark.parametrize("method", DENSE)
every = pytest.mark.parametrize("method", DECOMPOSITIONS)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def product(s: Subspace) -> Tensor:
    return s.left.double() @ s.core.double() @ s.right.double().mT


def projector(q: Tensor) -> Tensor:
    return q.double() @ q.double().mT


def check(matrix: Tensor, s: Subspace, k: int) -> None:
    """What holds for every truncation to k directions in float64, whatever the spectrum."""
    matrix = matrix.double()
    size = float(matrix.norm())
    values = torch.linalg.svdvals(matrix)
    assert s.left.shape == (matrix.shape[0], k) and s.right.shape == (matrix.shape[1], k) and s.core.shape == (k, k)
    condition = float(values[0] / values[k - 1]) if k else 1.0
    skew = GRAM * condition if s.method == "gram" and condition**2 <= REPAIRED else 0.0
    assert distance(s.left.mT @ s.left, torch.eye(k)) <= ROUNDING + skew * condition
    assert distance(s.right.mT @ s.right, torch.eye(k)) <= ROUNDING + skew * condition
    assert distance(s.core, s.left.mT @ matrix @ s.right) <= (ROUNDING + skew) * size
    true_error = float((matrix - product(s)).norm())
    assert abs(s.error * size - true_error) <= CERTIFICATE * size
    # No rank-k matrix is nearer (Eckart, Young).
    assert true_error <= float(values[k:].norm()) * (1 + 1e-9) + CERTIFICATE * size


@dense
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.0])
def test_singular_values_and_every_truncation(method: str, shape: tuple[int, int], alpha: float) -> None:
    r = min(shape)
    matrix = with_spectrum(*shape, power_law(r, alpha), seed=1)  # alpha 0: all singular values equal
    found = decompose(matrix, method)
    wanted = torch.linalg.svdvals(matrix)
    assert found.singular_values.dtype == torch.float64 and found.rank == r
    assert bool(((found.singular_values - wanted).abs() <= ROUNDING + GRAM * wanted[0] ** 2 / wanted).all())
    for k in sorted({0, 1, r // 3, r - 1, r}):
        check(matrix, found.truncate(k), k)
    assert distance(product(found.truncate(r)), matrix) <= ROUNDING


def stepped(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix with repeated singular values and a gap from 1 to 0.1 after the sixth, and its first six vectors."""
    k, r = 6, min(m, n)
    spectrum = torch.cat([torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0]), torch.full((r - k,), 0.1)]).double()
    left, right = orthonormal(m, r, 5), orthonormal(n, r, 6)
    return (left * spectrum) @ right.mT, left[:, :k], right[:, :k]


@dense
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_projectors_of_dominant_subspaces(method: str, shape: tuple[int, int]) -> None:
    matrix, left, right = stepped(*shape)
    s = decompose(matrix, method).truncate(6)
    assert distance(projector(s.left), projector(left)) <= ROUNDING
    assert distance(projector(s.right), projector(right)) <= ROUNDING


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


@given(
    m=st.integers(1, 24), n=st.integers(1, 24), alpha=st.floats(0, 2), seed=st.integers(0, 1000), share=st.floats(0, 1)
)
def test_gram_truncations_are_as_good_as_the_exact_ones(m: int, n: int, alpha: float, seed: int, share: float) -> None:
    matrix = with_spectrum(m, n, power_law(min(m, n), alpha), seed)
    k = round(share * min(m, n))
    gram, exact = (decompose(matrix, method).truncate(k) for method in DENSE)
    check(matrix, gram, k)
    assert abs(gram.error - exact.error) <= CERTIFICATE


@every
def test_numerical_rank_bounds_the_truncation(method: str) -> None:
    matrix = with_spectrum(30, 20, power_law(7, 0.5), 0)
    s = subspace(matrix, 20, method=method, accuracy=1e-2 if method == "randomized" else 0.0)
    assert s.core.shape == (7, 7) and distance(product(s), matrix) <= SINGLE
    assert s.error <= 3 * SINGLE  # the certificate in fp32 has 32 units of slack and the difference's own rounding
    # 1e-6 of the largest is the limit.
    three = torch.diag(torch.tensor([1.0, 2e-6, 5e-7])).double()
    assert subspace(three, 3, method=method, accuracy=1e-2).core.shape == (2, 2)


@dense
def test_numerical_rank_in_float64(method: str) -> None:
    matrix = with_spectrum(30, 20, power_law(7, 0.5), 0)
    found = decompose(matrix, method)
    assert found.rank == 7
    check(matrix, found.truncate(20), 7)
    assert found.truncate(20).error <= CERTIFICATE


@every
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("accuracy", [0.0, 1e-2])
def test_nothing_has_no_directions(method: str, shape: tuple[int, int], accuracy: float) -> None:
    s = subspace(torch.zeros(shape), 3, method=method, accuracy=accuracy)
    assert s.left.shape == (shape[0], 0) and s.right.shape == (shape[1], 0) and s.core.shape == (0, 0)
    assert s.error == 0.0
    if method in DENSE:
        found = decompose(torch.zeros(shape), method)
        assert found.rank == 0 and found.singular_values.shape == (min(shape),) and not found.singular_values.any()


@every
def test_zero_beside_others_changes_none(method: str) -> None:
    matrices = [randn(30, 20, seed=1), torch.zeros(30, 20), randn(30, 20, seed=2)]
    found = subspaces(matrices, [4, 4, 4], method=method, accuracy=1e-1)
    assert [s.core.shape[0] for s in found] == [4, 0, 4] and found[1].error == 0.0
    alone = subspace(matrices[2], 4, method=method, accuracy=1e-1)
    assert same_bits(found[2].core, alone.core) and same_bits(found[2].left, alone.left)


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


@dense
def test_one_large_direction_does_not_hide_small_ones(method: str) -> None:
    spectrum = torch.tensor([1.0, 1e-3, 5e-4, 1e-4, 1e-5]).double()
    matrix = with_spectrum(40, 30, spectrum, 9)
    left = torch.linalg.svd(matrix).U
    s = decompose(matrix, method).truncate(4)
    # The Gram's directions are wrong by 1e-16·σ_1²/(σ_4² − σ_5²) = 1e-8.
    assert distance(projector(s.left), projector(left[:, :4])) <= 1e-7
    check(matrix, s, 4)


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
    if method in DENSE:
        listed = [d.singular_values for d in decompose_list(matrices, method)]
        assert all(same_bits(a, decompose(m, method).singular_values) for a, m in zip(listed, matrices, strict=True))


@every
def test_same_bits_twice_and_input_untouched(method: str) -> None:
    matrix = randn(40, 30, seed=0)
    before = matrix.clone()
    a, b = (subspace(matrix, 5, method=method, accuracy=1e-1) for _ in range(2))
    assert all(same_bits(getattr(a, part), getattr(b, part)) for part in ("left", "core", "right"))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_read_exactly(dtype: torch.dtype) -> None:
    matrix = randn(12, 9, seed=2, dtype=dtype)
    assert torch.equal(decompose(matrix).singular_values, decompose(matrix.double()).singular_values)


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


def test_says_which_way_it_took_and_why() -> None:
    decaying = with_spectrum(300, 256, power_law(256, 0.7), 0)

    def way(rank: int, **choices: float | str) -> tuple[str, str]:
        s = subspace(decaying, rank, **choices)  # type: ignore[arg-type]
        return s.method, s.reason

    assert way(8) == ("gram", "accuracy 0 needs float64")
    assert way(8, accuracy=1e-7) == ("gram", "accuracy 1e-07 needs float64")
    found = way(8, accuracy=1e-2)
    assert found[0] == "randomized" and found[1].startswith("cost model: randomized 0.")
    s = subspace(decaying, 200, accuracy=1e-4)
    assert (s.method, s.core.dtype) == ("gram", torch.float32)
    assert s.reason.startswith("cost model: randomized ") and s.reason.endswith(" of gram; in fp32")
    steep = with_spectrum(300, 256, power_law(256, 2.5), 0)  # σ_200 is 2e-6·σ_1: fp32's Gram matrix does not show it
    s = subspace(steep, 200, accuracy=1e-2)
    assert (s.method, s.core.dtype) == ("gram", torch.float64)
    assert s.reason.endswith(" of gram; in float64, as fp32 is not within 0.01")
    for method in ("gram", "exact", "randomized"):
        assert way(8, method=method, accuracy=1e-1) == (method, "asked for")
    huge = subspace(decaying * 1e60, 8, accuracy=1e-2)
    assert (huge.method, huge.reason) == ("gram", "beyond the range of fp32") and math.isfinite(float(huge.core.sum()))


def test_falls_back_to_float64_where_the_accuracy_is_out_of_reach() -> None:
    flat = randn(400, 300, seed=0)  # a random matrix: no gap anywhere
    s = subspace(flat, 4, accuracy=2e-5)
    reason = f"randomized was not within 2e-05 after {MOST_ITERATIONS} power iterations"
    assert (s.method, s.reason) == ("gram", reason)
    wanted = subspace(flat, 4, method="gram")
    assert same_bits(s.left, wanted.left) and same_bits(s.core, wanted.core) and s.error == wanted.error
    with pytest.raises(ValueError, match="accuracy: 2e-05 is not within reach of 'randomized' in 16 power iterations"):
        subspace(flat, 4, method="randomized", accuracy=2e-5)


def test_power_iterations_and_oversampling_are_taken_as_given() -> None:
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
    found = [subspace(matrix, 8, method="randomized", accuracy=1e-2, seed=seed) for seed in range(6)]
    assert all(not torch.equal(s.left, found[0].left) for s in found[1:])
    best = decompose(matrix).truncate(8).error
    assert all(best <= s.error <= best * 1.005 for s in found)


def test_wrong_arguments_are_refused_by_name() -> None:
    eye = torch.eye(4)
    with pytest.raises(ValueError, match="matrix: got 3 dimensions, need 2"):
        decompose(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="method: got 'svd', need one of gram, exact"):
        decompose(torch.zeros(2, 2), "svd")
    for message, matrices, ranks, choices in (
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
    ):
        with pytest.raises(ValueError, match=message):
            subspaces(matrices, ranks, **choices)  # type: ignore[arg-type]
    assert subspaces([], []) == [] and decompose_list([]) == []


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(method: str, bad: float) -> None:
    good, spoilt = torch.ones(5, 4), torch.ones(5, 4)
    spoilt[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"matrices\[1\]: got 1 NaN or infinite values") as caught:
        subspaces([good, spoilt], [1, 1], method=method, accuracy=1e-1)
    assert (caught.value.index, caught.value.count) == (1, 1)
    if method in DENSE:
        with pytest.raises(NonFiniteError, match="matrix: got 1 NaN or infinite values"):
            decompose(spoilt, method)
        with pytest.raises(NonFiniteError, match=r"matrices\[1\]: got 1 NaN"):
            decompose_list([good, spoilt], method)
    with pytest.raises(ValueError, match=r"matrices\[0\]: values so large that their squares overflow float64"):
        subspace(torch.full((3, 2), 1e200, dtype=torch.float64), 1, method=method)
