"""delta_stats: against float64 computed independently, against its reference, and its exact promises.

Tolerances. The sums are of fp32 differences, which are exact inputs here. Where base or expert is fp32 or wider, Σδ
and Σδ² run in double: 1e-12 of Σ|δ| and of Σδ² is a hundred times the worst rounding of such sums at these sizes.
Where both are half precision they run in fp32 inside a block, as Σ|δ| and the outliers' Σ|δ| always do: a value goes
through two fp32 additions for Σδ (2·2^-24), eleven roundings for the others (11·2^-24), rounded up to 2e-7 and to the
contract's 1e-6. Counts, maxima and the histogram's counts are exact; the histogram's sums of fp32 are exact integers
rounded once (1e-15), of float64 they keep 24 bits of each value (2^-23).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import BLOCK, CHUNK, FLOATS, KINDS, SHAPES, dtype_pairs, group, randn, same_bits
from torch import Tensor

from resm_kernels import NonFiniteError
from resm_kernels.ops import DeltaStats, delta_stats
from resm_kernels.reference.delta_stats import DeltaStatsOptions, histogram_edges
from resm_kernels.reference.delta_stats import delta_stats as reference

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNED_SUM = {True: 2e-7, False: 1e-12}  # by: are both inputs half precision?
SQUARES = {True: 1e-6, False: 1e-12}
ABSOLUTE_SUM = 1e-6
BIN_SUM = {torch.float32: 1e-14, torch.float64: 2.0**-23}


def differences(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    """Δ_t by its definition: in fp32, in float64 as soon as one of the tensors is float64."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in [base, *experts]) else torch.float32
    return [(e.to(wide) - base.to(wide)).flatten() for e in experts]


def check_against_float64(base: Tensor, experts: list[Tensor], *, eps: float = 0.0, kappa: float = 3.0) -> None:
    result = delta_stats(base, experts, eps=eps, kappa=kappa, histogram=True)
    for t, delta in enumerate(differences(base, experts)):
        d = delta.double()
        both_half = base.element_size() == 2 and experts[t].element_size() == 2
        n, size = d.numel(), d.abs()
        total = math.fsum(size.tolist())
        squares = math.fsum((d * d).tolist())
        assert result.numel[t] == n
        assert abs(float(result.sum[t]) - math.fsum(d.tolist())) <= SIGNED_SUM[both_half] * total
        assert abs(float(result.sum_sq[t]) - squares) <= SQUARES[both_half] * squares
        assert abs(float(result.sum_abs[t]) - total) <= ABSOLUTE_SUM * total
        assert float(result.max_abs[t]) == (float(size.max()) if n else 0.0)
        assert result.n_zero[t] == int((d == 0).sum())
        assert result.n_small[t] == int((size <= eps).sum())
        assert result.n_nonfinite[t] == 0
        check_outliers(result, t, d, kappa)
        check_histogram(result, t, delta)


def check_outliers(result: DeltaStats, t: int, d: Tensor, kappa: float) -> None:
    """Exact for the moments of the result."""
    mean = float(result.sum[t]) / max(d.numel(), 1)
    spread = kappa * math.sqrt(max(float(result.sum_sq[t]) / max(d.numel(), 1) - mean * mean, 0.0))
    outliers = d[(d > mean + spread) | (d < mean - spread)].abs()
    assert result.n_outlier[t] == outliers.numel()
    total = math.fsum(outliers.tolist())
    assert abs(float(result.outlier_sum_abs[t]) - total) <= ABSOLUTE_SUM * total


def check_histogram(result: DeltaStats, t: int, delta: Tensor) -> None:
    assert result.histogram_counts is not None and result.histogram_sum_abs is not None
    size = delta.abs().double()
    # Python's frexp knows nothing of torch's.
    bins = [0 if v == 0 else min(max(math.frexp(v)[1] - 1 + 127, 0), 254) for v in size.tolist()]
    counts = torch.bincount(torch.tensor(bins, dtype=torch.int64), minlength=256)
    assert torch.equal(result.histogram_counts[t], counts)
    for i in set(bins):
        exact = math.fsum(v for v, b in zip(size.tolist(), bins, strict=True) if b == i)
        if delta.dtype == torch.float64 and i in (0, 254):
            continue  # beyond fp32's range only the counts are meant to be exact
        assert abs(float(result.histogram_sum_abs[t, i]) - exact) <= BIN_SUM[delta.dtype] * exact


def test_hand_computed_example() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    expert = torch.tensor([1.0, 0.5, 1.5, 3.0, 0.75])  # δ = 0, −1/2, 1/2, 2, −1/4
    s = delta_stats(base, [expert], eps=0.25, kappa=1.5, histogram=True)
    assert [float(x) for x in (s.numel, s.sum, s.sum_sq, s.sum_abs, s.max_abs)] == [5, 1.75, 4.5625, 3.25, 2.0]
    assert int(s.n_zero) == 1 and int(s.n_small) == 2
    # μ = 0.35, σ = sqrt(0.9125 − 0.1225) = 0.889; beyond 1.5σ lies only δ = 2.
    assert int(s.n_outlier) == 1 and float(s.outlier_sum_abs) == 2.0
    assert s.histogram_counts is not None and s.histogram_sum_abs is not None
    assert {i: int(c) for i, c in enumerate(s.histogram_counts[0]) if c} == {0: 1, 125: 1, 126: 2, 128: 1}
    assert float(s.histogram_sum_abs[0, 126]) == 1.0
    assert float(s.mean()) == 0.35 and float(s.sparsity()) == 0.4 and float(s.outlier_mass()) == 0.4
    assert float(s.std()) == pytest.approx(math.sqrt(0.79), rel=1e-15)
    assert float(s.rms()) == pytest.approx(math.sqrt(0.9125), rel=1e-15)


@pytest.mark.parametrize("shape", SHAPES[:-4] + SHAPES[-1:], ids=str)
def test_every_shape_against_float64(shape: tuple[int, ...]) -> None:
    check_against_float64(*group(shape, 2, seed=1))


@pytest.mark.parametrize("base_dtype, expert_dtype", dtype_pairs(), ids=str)
def test_every_pair_of_dtypes_against_float64(base_dtype: torch.dtype, expert_dtype: torch.dtype) -> None:
    check_against_float64(*group((37, 43), 2, base_dtype=base_dtype, expert_dtypes=[expert_dtype]), eps=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_kind_of_values_against_float64(kind: str, dtype: torch.dtype) -> None:
    base, experts = group((BLOCK * 2 + 5,), 3, kind, base_dtype=dtype)
    check_against_float64(base, experts, kappa=1.5)


@pytest.mark.parametrize("n_experts", [1, 2, 5])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2 * BLOCK + 1,)], ids=str)
@pytest.mark.parametrize("options", [(0.0, 0.0, None), (1e-4, 0.0, 3.0), (0.0, 0.5, None), (1e-3, 0.1, 0.0)], ids=str)
def test_op_agrees_with_its_reference(
    n_experts: int, shape: tuple[int, ...], options: tuple[float, float, float | None]
) -> None:
    # Experts of four dtypes, so that one group mixes fp32 and float64.
    base, experts = group(shape, n_experts, base_dtype=torch.bfloat16, expert_dtypes=FLOATS[::-1])
    eps, eps_rel, kappa = options
    record = DeltaStatsOptions(eps=eps, eps_rel=eps_rel, kappa=kappa, histogram=True)
    moments, counts, bin_counts, bin_sums = torch.ops.resm_kernels.delta_stats(base, experts, **vars(record))
    expected = reference(base, experts, record)
    assert torch.equal(counts, expected[1]) and torch.equal(bin_counts, expected[2])
    for t, expert in enumerate(experts):
        both_half = expert.element_size() == 2  # the base is
        total, squares, total_abs = expected[0][t, :3]
        assert abs(moments[t, 0] - total) <= SIGNED_SUM[both_half] * total_abs
        torch.testing.assert_close(moments[t, 1], squares, rtol=SQUARES[both_half], atol=0)
    torch.testing.assert_close(moments[..., 2:], expected[0][..., 2:], rtol=ABSOLUTE_SUM, atol=0)
    torch.testing.assert_close(bin_sums, expected[3], rtol=BIN_SUM[torch.float64], atol=1e-30)


@given(shift=st.floats(1.0, 2.0, width=16), n=st.sampled_from([BLOCK, 3 * BLOCK + 7, 16 * BLOCK]))
def test_sums_of_one_repeated_half_precision_value_stay_within_the_contract(shift: float, n: int) -> None:
    expert = torch.full((n,), shift, dtype=torch.float16)
    result = delta_stats(torch.zeros(n, dtype=torch.float16), [expert], kappa=None)
    value = float(expert[0].double())
    assert abs(float(result.sum) - value * n) <= SIGNED_SUM[True] * value * n
    assert abs(float(result.sum_sq) - value**2 * n) <= SQUARES[True] * value**2 * n


@given(shift=st.floats(1.0, 2.0, width=32), n=st.sampled_from([BLOCK, 3 * BLOCK + 7, 16 * BLOCK]))
def test_sum_of_magnitudes_of_one_repeated_value_stays_within_the_contract(shift: float, n: int) -> None:
    # The worst case for sums in fp32: all roundings may go the same way.
    expert = torch.full((n,), shift)
    result = delta_stats(torch.zeros(n), [expert], kappa=None).sum_abs
    exact = float(expert[0].double()) * n
    assert abs(float(result) - exact) <= ABSOLUTE_SUM * exact


def test_large_cancelling_sum() -> None:
    d = randn(CHUNK * 3 + 1, seed=5)
    both = torch.cat([d, -d])
    result = delta_stats(torch.zeros_like(both), [both], kappa=None)
    assert abs(float(result.sum)) <= SIGNED_SUM[False] * float(both.double().abs().sum())


@pytest.mark.parametrize("shape", [(), (5,), (4, 33), (3, 2, 17), (6, 1), (3, 0), (0, 4), (3, CHUNK + 9)], ids=str)
def test_rows_are_the_statistics_of_each(shape: tuple[int, ...]) -> None:
    base, experts = group(shape, 3, expert_dtypes=[torch.float32, torch.bfloat16, torch.float64])
    options: dict[str, Any] = {"eps": 1e-4, "eps_rel": 0.2, "kappa": 1.5, "histogram": True}
    result = delta_stats(base, experts, rows=True, **options)
    assert result.sum.shape == (3, *shape[:-1]) and result.sparsity().shape == (3, *shape[:-1])
    for index in itertools.product(*map(range, shape[:-1])):
        for name, value in vars(delta_stats(base[index], [e[index] for e in experts], **options)).items():
            assert same_bits(getattr(result, name)[(slice(None), *index)], value), name


def test_rows_that_are_not_finite_are_refused_by_name() -> None:
    base, experts = group((4, 3), 2)
    experts[1][2, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"experts\[1\]: got 1 NaN"):
        delta_stats(base, experts, rows=True)


def test_eps_and_eps_rel() -> None:
    expert = torch.tensor([0.0, -0.0, 1e-40, 0.25, -0.5, 1.0])
    base = torch.zeros(6)
    rms = math.sqrt(float(expert.double().square().sum()) / 6)

    def small(**options: float) -> int:
        return int(delta_stats(base, [expert], **options).n_small)

    assert small() == 2
    assert small(eps=1e-45) == 2 and small(eps=1e-39) == 3
    assert small(eps=0.25) == 4 and small(eps=math.nextafter(0.25, 0)) == 3
    assert small(eps_rel=0.25 / rms * 1.0001) == 4 and small(eps_rel=0.25 / rms * 0.9999) == 3
    # The larger of the two holds.
    assert small(eps=0.5, eps_rel=0.1) == 5 and small(eps=0.01, eps_rel=0.9 / rms) == 5
    assert small(eps_rel=1.0 / rms * 1.0001) == 6


def test_no_outlier_rule_counts_no_outliers() -> None:
    base, experts = group((1000,), 2)
    s = delta_stats(base, experts, kappa=None)
    assert not s.n_outlier.any() and not s.outlier_sum_abs.any()


def test_padding_is_no_outlier_where_the_mean_is_far_from_zero() -> None:
    # 17 values are padded to 32; the 15 zeros lie far outside μ ± κσ.
    expert = torch.full((17,), 5.0) + 0.01 * randn(17, seed=0)
    s = delta_stats(torch.zeros(17), [expert], kappa=3.0, eps=1.0)
    assert int(s.n_outlier) == 0 and int(s.n_small) == 0 and int(s.n_zero) == 0


@given(seed=st.integers(0, 1000), q=st.floats(0, 1), n=st.sampled_from([1, 2, 10, 1000]), spread=st.floats(0, 20))
def test_quantile_lies_in_the_bin_of_the_exact_one(seed: int, q: float, n: int, spread: float) -> None:
    size = torch.exp2(spread * randn(n, seed=seed)).float()
    result = float(delta_stats(torch.zeros(n), [size], histogram=True).quantile(q))
    exact = float(size.sort().values[max(math.ceil(q * n), 1) - 1])
    low = 2.0 ** math.floor(math.log2(exact))
    assert low <= result <= 2 * low or exact < 2.0**-126 > result


def test_quantiles_of_nothing_and_of_zeros_are_zero() -> None:
    for base in (torch.zeros(0), torch.zeros(5)):
        assert float(delta_stats(base, [base], histogram=True).quantile(0.5)) == 0.0


def test_histogram_edges_bound_the_bins() -> None:
    edges = histogram_edges()
    assert len(edges) == 256 and edges[0] == 0 and edges[1] == 2.0**-126 and edges[127] == 1.0
    assert edges[254] == 2.0**127 and edges[255] == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_are_not_finite_are_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    base, experts = group((BLOCK + 9,), 3, base_dtype=dtype)
    experts[1][[3, BLOCK + 8]] = bad
    with pytest.raises(NonFiniteError, match=r"experts\[1\].*2 NaN or infinite") as caught:
        delta_stats(base, experts)
    assert (caught.value.argument, caught.value.index, caught.value.count) == ("experts[1]", 1, 2)
    counted = delta_stats(base, experts, check_finite=False)
    assert counted.n_nonfinite.tolist() == [0, 2, 0]
    assert bool(torch.isfinite(counted.sum[[0, 2]]).all()) and not bool(torch.isfinite(counted.sum_abs[1]))
    base[0] = bad
    with pytest.raises(NonFiniteError, match="base") as caught:
        delta_stats(base, experts)
    assert caught.value.index is None and caught.value.count == 1


def test_difference_beyond_fp32_says_so() -> None:
    with pytest.raises(ValueError, match="exceeds the range of fp32; pass float64"):
        delta_stats(torch.full((3,), -3e38), [torch.full((3,), 3e38)])


def test_finite_values_whose_block_sum_overflows_fp32_are_no_nonfinite_values() -> None:
    expert = torch.full((BLOCK,), 3e38)
    s = delta_stats(torch.zeros(BLOCK), [expert], kappa=None)
    assert int(s.n_nonfinite) == 0
    assert float(s.sum_abs) == pytest.approx(BLOCK * float(expert[0].double()), rel=ABSOLUTE_SUM)


def test_outliers_whose_block_sum_overflows_fp32() -> None:
    expert = torch.cat([torch.full((256,), 3e38), torch.full((256,), -3e38)])
    s = delta_stats(torch.zeros(512), [expert], kappa=0.5)
    assert int(s.n_outlier) == 512
    assert float(s.outlier_sum_abs) == pytest.approx(512 * float(expert[0].double()), rel=ABSOLUTE_SUM)


def test_arguments_out_of_range_are_refused_by_name() -> None:
    base, experts = group((4,), 1)
    for name in ("eps", "eps_rel", "kappa"):
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"^{name}: got {bad}.*at least 0"):
                delta_stats(base, experts, **{name: bad})
    with pytest.raises(ValueError, match=r"q: got 1\.5.*0 to 1"):
        delta_stats(base, experts, histogram=True).quantile(1.5)
    with pytest.raises(ValueError, match="histogram=True"):
        delta_stats(base, experts).quantile(0.5)


def test_tensors_of_the_wrong_kind_are_refused_by_name() -> None:
    base, (expert,) = group((4, 3), 1)
    wrong: list[tuple[type[Exception], str, object, object]] = [
        (ValueError, r"experts\[1\]: got shape \[3, 4\], need \[4, 3\] like base", base, [expert, expert.mT]),
        (TypeError, r"base: got dtype int64, need one of float32, float64", base.long(), [expert]),
        (TypeError, r"experts\[0\]: got dtype complex64", base, [expert.to(torch.complex64)]),
        (ValueError, r"experts\[0\]: is on meta, need cpu like base", base, [expert.to("meta")]),
        (TypeError, r"experts\[0\]: got layout torch.sparse_coo", base, [expert.to_sparse()]),
        (TypeError, r"experts\[0\]: got list, need a tensor", base, [[1.0]]),
        (ValueError, r"experts\[0\]: requires grad.*experts\[0\].detach\(\)", base, [expert.clone().requires_grad_()]),
        (ValueError, r"experts: got none, need", base, []),
        (ValueError, r"experts: got a tensor, need", base, expert),
    ]
    for kind, message, b, e in wrong:
        with pytest.raises(kind, match=message):
            delta_stats(b, e)
    with torch.no_grad():
        delta_stats(base, [expert.clone().requires_grad_()])
