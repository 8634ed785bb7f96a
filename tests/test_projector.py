"""Subspaces and polar factors by matrix products alone, the route of GPUs, tested with tensors on the CPU.

Their accuracy is compared with LAPACK's in float64, over spectra and ranks. Results that miss the accuracy are computed
in float64, and the host waits only for the numbers that decide this.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import experts_with_spectra, orthonormal, power_law, randn, relative, same_bits, with_spectrum
from subspace_contract import SINGLE, distance, product, stepped
from torch.utils._python_dispatch import TorchDispatchMode

from resm_kernels import merge
from resm_kernels.linalg import polar_factors, products, projector, subspaces
from resm_kernels.linalg.projector import project_dominant
from resm_kernels.ops import NonFiniteError
from resm_kernels.spectral.low_rank import join, orthogonalized_sum

pytestmark = pytest.mark.usefixtures("one_thread")
polar_module = importlib.import_module("resm_kernels.linalg.polar")  # the package's attribute is the function

N, ACCURACY = 128, 1e-3
RANKS = (N // 64, N // 8, N // 3)
MERGED = 1e-3
"""Error allowed in M, as a share of its norm, as in its subspaces. Measured for 384 directions: up to 2e-4."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the tensors were on a GPU."""
    monkeypatch.setattr(products, "only_products", lambda device: True)
    yield


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5, 2.5])
@pytest.mark.parametrize("rank", RANKS)
def test_finds_the_dominant_subspaces(alpha: float, rank: int) -> None:
    matrix = with_spectrum(160, N, power_law(N, alpha), seed=1).float()
    projected = project_dominant(matrix, rank, seed=0)
    delta, left, core, right = (x.double() for x in (matrix, *projected[:3]))
    size = float(delta.norm())
    assert distance(left.mT @ left, torch.eye(rank)) <= SINGLE
    assert distance(right.mT @ right, torch.eye(rank)) <= SINGLE
    assert distance(delta @ right, left @ core) <= SINGLE * size
    norm, residual, lost, condition = projected.figures.tolist()
    true = float((delta.mT @ left - right @ core.mT).norm()) / size
    assert abs(norm / size - 1) <= 1e-6 and abs(residual - true) <= 2e-6
    assert abs(lost - (1 - float(core.square().sum()) / size**2)) <= 1e-6
    values = torch.linalg.svdvals(core)
    assert float(values[0] / values[-1]) <= condition * (1 + 1e-2)
    # The dominant ones, not any: no subspaces keep more than σ_1 … σ_k do (Eckart, Young).
    assert residual <= ACCURACY
    best = float(power_law(N, alpha)[:rank].square().sum()) / float(power_law(N, alpha).square().sum())
    assert -1e-6 <= best - float(core.square().sum()) / size**2 <= ACCURACY**2 + 1e-6


@given(
    m=st.integers(4, 60),  # of a smaller one the random matrix may be all zeros
    n=st.integers(4, 60),
    alpha=st.floats(0.3, 2.0),
    fill=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_any_size(m: int, n: int, alpha: float, fill: float, seed: int) -> None:
    m, n = max(m, n), min(m, n)
    rank = max(1, int(fill * n))
    matrix = with_spectrum(m, n, power_law(n, alpha), seed).float()
    projected = project_dominant(matrix, rank, seed)
    left, core, right = (x.double() for x in projected[:3])
    assert float(projected.figures[1]) <= ACCURACY
    assert distance(left.mT @ left, torch.eye(rank)) <= SINGLE
    assert distance(right.mT @ right, torch.eye(rank)) <= SINGLE
    values = power_law(n, alpha)
    difference = (core.square().sum() - values[:rank].square().sum()) / values.square().sum()
    assert abs(float(difference)) <= ACCURACY**2 + 1e-6


@pytest.mark.parametrize("rank", RANKS)
def test_a_gap_shows_in_the_subspaces(rank: int) -> None:
    values = torch.where(torch.arange(N) < rank, 1.0, 0.1).double()
    left, right = orthonormal(160, N, 3), orthonormal(N, N, 4)
    projected = project_dominant(((left * values) @ right.mT).float(), rank, seed=0)
    for basis, exact in ((projected.left, left[:, :rank]), (projected.right, right[:, :rank])):
        assert distance(basis.double() @ basis.double().mT, exact @ exact.mT) <= SINGLE


@pytest.mark.parametrize("shape", [(160, N), (N, 160)], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_auto_takes_it_where_only_products_are_fast(alone: None, shape: tuple[int, int], rank: int) -> None:
    matrices = [with_spectrum(*shape, power_law(N, 0.7), seed=10 * t).float() for t in range(2)]
    for s, matrix in zip(subspaces(matrices, [rank, 1], accuracy=ACCURACY), matrices, strict=True):
        assert s.method == "projector" and s.reason == "products alone on cpu"
        true = float((matrix.double() - product(s)).norm() / matrix.double().norm())
        assert true <= s.error <= true * 1.05 + 1e-3
    assert subspaces(matrices, [3, 3], accuracy=0.0)[0].method == "gram"
    assert subspaces(matrices, [N, N], accuracy=ACCURACY)[0].method == "gram"
    assert subspaces(matrices, [lambda values: 3, 3], accuracy=ACCURACY)[0].method == "gram"


def test_a_miss_is_computed_in_float64(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = randn(90, 60, seed=1)
    deficient = with_spectrum(90, 60, power_law(7, 0.5), seed=2).float()
    zero, repeated = torch.zeros(90, 60), stepped(90, 60)[0].float()
    s = subspaces([deficient, zero, repeated, flat], [20, 20, 6, 0], accuracy=ACCURACY)
    assert s[0].method == "gram" and s[0].core.shape == (7, 7)
    assert s[0].reason == "products alone on cpu; in float64, as there may be fewer directions"
    assert s[1].core.shape == (0, 0) and s[1].error == 0.0
    assert s[2].method == "projector" and distance(product(s[2]), stepped(90, 60)[0]) <= 0.1
    assert s[3].core.shape == (0, 0) and s[3].error == 1.0
    monkeypatch.setattr(projector, "_PART_STEPS", (1, 0))
    missed = subspaces([flat], [8], accuracy=ACCURACY)[0]
    assert missed.method == "gram" and missed.reason.endswith("is not within 0.001")
    assert same_bits(missed.left, subspaces([flat], [8], method="gram")[0].left)
    flat[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"matrices\[1\]: got 1 NaN"):
        subspaces([repeated, flat], [6, 6], accuracy=ACCURACY)


@pytest.mark.parametrize("n", [20, 60])  # 8 directions are sought in the whole space, and in a part of it
@pytest.mark.parametrize("top", [0, 3])
def test_equal_singular_values_on_both_sides_of_the_cut(alone: None, n: int, top: int) -> None:
    values = torch.where(torch.arange(n) < top, 2.0, 1.0).double()
    matrix = ((orthonormal(90, n, 1) * values) @ orthonormal(n, n, 2).mT).float()
    s = subspaces([matrix], [8], accuracy=ACCURACY)[0]
    share = float(values[:8].square().sum() / values.square().sum())
    assert s.core.shape == (8, 8)
    assert abs(float(s.core.double().square().sum() / values.square().sum()) - share) <= 1e-5


def test_scales_by_powers_of_two_change_no_digit(alone: None) -> None:
    matrix = with_spectrum(90, 60, power_law(60, 0.7), seed=1).float()
    expected = subspaces([matrix], [20], accuracy=ACCURACY)[0]
    for exponent in (-90, 90):
        s = subspaces([torch.ldexp(matrix, torch.tensor(exponent))], [20], accuracy=ACCURACY)[0]
        assert s.method == "projector" and same_bits(s.left, expected.left) and same_bits(s.right, expected.right)
        assert same_bits(torch.ldexp(s.core, torch.tensor(-exponent)), expected.core)
    # Beyond fp32's range float64 computes it.
    for size in (1e-40, 1e60):
        assert subspaces([matrix.double() * size], [20], accuracy=ACCURACY)[0].method == "gram"


def test_calls_alike_give_the_same_bits() -> None:
    matrix = with_spectrum(90, 60, power_law(60, 0.3), seed=1).float()
    for rank in (4, 20):
        first, second = (project_dominant(matrix, rank, seed=5) for _ in range(2))
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_polar_factors(alone: None) -> None:
    blocks = [orthonormal(90, 20, t).float() for t in range(3)]
    left, right = polar_factors([blocks, blocks[:2]], torch.float32, ACCURACY)
    for factors, factored in ((left, blocks), (right, blocks[:2])):
        u, _, vt = torch.linalg.svd(torch.cat(factored, 1).double(), full_matrices=False)
        assert distance(factors.basis @ factors.rotation.mT, u @ vt) <= ACCURACY
        # The route by products alone returns an identity.
        assert torch.equal(factors.rotation, torch.eye(factors.rotation.shape[0]))


def test_polar_factors_of_what_is_too_near_to_dependent(alone: None) -> None:
    blocks = [orthonormal(90, 20, 1).float()] * 2
    (factors,) = polar_factors([blocks], torch.float32, ACCURACY)
    exact = torch.cat(blocks, 1).double() / math.sqrt(2)  # no arbitrary directions
    assert distance(factors.basis.double() @ factors.rotation.double().mT, exact) <= SINGLE


@pytest.mark.parametrize("shape", [(160, N), (N, 160)], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5])
def test_merges_agree_with_float64s(alone: None, shape: tuple[int, int], alpha: float) -> None:
    base, experts = experts_with_spectra(*shape, 3, alpha, dtype=torch.bfloat16)
    cases: list[dict[str, Any]] = [{}, {"rank_rule": "fixed", "rank": N // 8}]
    for parameters in cases:
        merged = merge(base, experts, "resm", out_dtype=torch.float32, **parameters).double()
        exact = merge(base.double(), [e.double() for e in experts], "resm", decomposition="exact", **parameters)
        assert relative(merged - base.double(), exact - base.double()) <= MERGED


class NoReads(TorchDispatchMode):
    """Fails at every operation that makes a host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), func
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_figures_alone(alone: None) -> None:
    matrices = [with_spectrum(90, 60, power_law(60, 0.7), seed=t).float() for t in range(2)]
    # The host computes the coefficients once, from no tensor of the device.
    polar_module.quintics(min(polar_module._FP32_GRAM_ERROR / ACCURACY / math.sqrt(2) / (1 + 1e-4), 0.5))
    with NoReads():
        parts = subspaces(matrices, [20, 2], accuracy=ACCURACY)
        merged = orthogonalized_sum(parts, [1.0, 0.5], torch.float32, ACCURACY)
        assert join(torch.zeros(90, 60), merged, 0.7, torch.bfloat16).shape == (90, 60)
    assert [s.method for s in parts] == ["projector", "projector"]
    # Of meta tensors there is nothing to read.
    for rank in (2, 20):
        assert project_dominant(torch.empty(90, 60, device="meta"), rank, seed=0).figures.shape == (4,)
    factors, deviation = polar_module._iterated([torch.empty(90, 10, device="meta")] * 2, ACCURACY)
    assert factors.basis.shape == (90, 20) and deviation.shape == ()
