"""CUDA kernels against the reference and the CPU's kernels: every dtype, rule and option.

Where there is no GPU, the same source runs on the CPU, compiled by a C++ compiler, with threads and blocks in either
order. Only sums have a tolerance: those of delta_stats are float64, in another order than the reference's.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_device import DEVICE, cuda_kernels, device_group, guarded_memory, shifted  # noqa: F401  (a fixture)
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATS, generator, randn, same_bits, values
from torch import Tensor

from resm_kernels import _extension, ops
from resm_kernels._launch import prepare_aggregate
from resm_kernels.cuda import aggregate as aggregate_launcher
from resm_kernels.cuda import launch
from resm_kernels.cuda import magnitude_threshold as magnitude_threshold_launcher
from resm_kernels.cuda.aggregate import CHUNK, aggregate
from resm_kernels.cuda.delta_stats import delta_stats
from resm_kernels.cuda.magnitude_threshold import magnitude_threshold
from resm_kernels.reference import aggregate as reference_aggregate
from resm_kernels.reference import delta_stats as reference_delta_stats
from resm_kernels.reference import magnitude_threshold as reference_magnitude_threshold
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions

pytestmark = [pytest.mark.usefixtures("cuda_kernels"), pytest.mark.usefixtures("one_thread")]

LENGTHS = (0, 1, 7, 8, 257, 2048, CHUNK - 1, CHUNK + 8, 2 * CHUNK + 5)
SAMPLE = {torch.float32: 8192, torch.float64: 4096}
"""Elements that are sampled, by the dtype of the arithmetic; a tensor of at most so many is sampled whole."""


def check_aggregate(base: Tensor | None, experts: list[Tensor], rule: str) -> None:
    n_experts = len(experts)
    weights = tuple(float(w) for w in randn(n_experts, seed=3))
    limits = randn(n_experts, seed=4, dtype=torch.float64).abs().mul(2e-3).to(DEVICE)
    # torch rounds float64 to half types twice: see test_float64_is_rounded_once.
    wide = any(t.dtype == torch.float64 for t in (base, *experts) if t is not None)
    for out_dtype in (torch.float64, torch.float32) if wide else (None, torch.bfloat16, torch.float16, torch.float64):
        for thresholds in (None, limits) if rule == "ties" else (None,):
            for normalize in (False, True):
                options = AggregateOptions(
                    weights=weights,
                    scale=0.7,
                    rule=rule,
                    normalize=normalize,
                    thresholds=thresholds,
                    out_dtype=out_dtype,
                )
                merged, nonfinite = aggregate(base, experts, options)
                expected = reference_aggregate.aggregate(base, experts, options)
                assert same_bits(nonfinite.cpu(), expected[1].cpu())
                assert merged.is_contiguous() and same_bits(merged.cpu(), expected[0].cpu())


def check_threshold(base: Tensor, experts: list[Tensor], k: list[int]) -> None:
    options = MagnitudeThresholdOptions(k=tuple(k))
    expected = reference_magnitude_threshold.magnitude_threshold(base, experts, options)
    for a, b in zip(magnitude_threshold(base, experts, options), expected, strict=True):
        assert same_bits(a.cpu(), b.cpu())


def check_stats(base: Tensor, experts: list[Tensor], **options: Any) -> None:
    with_histogram = DeltaStatsOptions(**options, histogram=True)
    expected = reference_delta_stats.delta_stats(base, experts, with_histogram)
    results = delta_stats(base, experts, with_histogram)
    assert torch.equal(results[1], expected[1]) and torch.equal(results[2], expected[2])
    torch.testing.assert_close(results[0], expected[0], rtol=1e-13, atol=1e-14)
    wide = any(t.dtype == torch.float64 for t in (base, *experts))
    torch.testing.assert_close(results[3], expected[3], rtol=2.0**-23 if wide else 0, atol=0)
    plain = delta_stats(base, experts, DeltaStatsOptions(**options))
    again = delta_stats(base, experts, with_histogram)
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(results, again, strict=True))
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(results[:2], plain[:2], strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("with_base", [False, True])
def test_aggregate_small_has_the_references_bits(dtype: torch.dtype, rule: str, with_base: bool) -> None:
    for n_experts, lengths in ((1, (257, 8)), (3, LENGTHS)):
        for i, n in enumerate(lengths):
            base, experts = device_group(n, dtype, n_experts, seed=10 * i)
            check_aggregate(base if with_base else None, experts, rule)


def test_aggregate_takes_any_number_of_experts() -> None:
    check_aggregate(*device_group(300, torch.bfloat16, 70), "ties")


@pytest.mark.parametrize("kind", ["ties", "subnormal", "huge", "zeros"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_aggregate_small_of_unusual_values(kind: str, dtype: torch.dtype) -> None:
    base, experts = device_group(299, dtype, 2, kind)
    for rule in ("sum", "ties"):
        check_aggregate(base, experts, rule)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_views_off_any_alignment_small(dtype: torch.dtype) -> None:
    base, experts = device_group(CHUNK + 24, dtype, 2)
    for group in ((shifted(base), experts), (base, [shifted(experts[0]), experts[1]])):
        check_aggregate(*group, "sum")
        check_threshold(*group, [500, 8000])
        check_stats(*group, eps=1e-3, kappa=2.0)


def test_mixed_dtypes_and_layouts_small() -> None:
    base = values((90, 140), "weights", torch.float32, 0).to(DEVICE)
    half = values((90, 140), "weights", torch.bfloat16, 5).to(DEVICE)
    for group in (
        (base.mT.contiguous().mT, [base.bfloat16(), base.double() * 1.5, (base + 1e-3).half()]),
        (half, [(half * 2).float(), half.half(), half]),
        (half, [half * 2, half, half * 0.5]),
    ):
        for rule in ("sum", "ties"):
            check_aggregate(*group, rule)
        check_threshold(*group, [2000, 0, 12600])
        check_stats(*group, eps_rel=0.3, kappa=1.5)


@pytest.mark.skipif(_extension.native is None, reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    base, experts = device_group(3000, torch.float64, 2)
    merged, _ = aggregate(base, experts, AggregateOptions(weights=(0.5, 0.7), out_dtype=dtype))
    assert same_bits(merged.cpu(), ops.aggregate(base.cpu(), [e.cpu() for e in experts], [0.5, 0.7], out_dtype=dtype))
    tie = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40], dtype=torch.float64, device=DEVICE)
    up, _ = aggregate(None, [tie], AggregateOptions(weights=(1.0,), out_dtype=dtype))
    assert float(up[0 if dtype == torch.bfloat16 else 1]) > 1 + torch.finfo(dtype).eps / 2


@pytest.mark.skipif(_extension.native is None, reason="the native kernels are not built")
def test_results_are_those_of_the_cpu_kernels() -> None:
    base, experts = device_group(30_000, torch.bfloat16, 3)
    on_cpu = base.cpu(), [e.cpu() for e in experts]
    limits = magnitude_threshold(base, experts, MagnitudeThresholdOptions(k=(6000,) * 3))[0]
    assert torch.equal(limits.cpu(), ops.magnitude_threshold(*on_cpu, 6000))
    weights = (1.0, 0.5, -2.0)
    options = AggregateOptions(weights=weights, scale=1.5, rule="ties", normalize=True, thresholds=limits)
    expected = ops.aggregate(*on_cpu, weights, scale=1.5, rule="ties", normalize=True, thresholds=limits.cpu())
    assert same_bits(aggregate(base, experts, options)[0].cpu(), expected)
    options = DeltaStatsOptions(eps=1e-4, kappa=3.0, histogram=True)
    _, counts, bin_counts, bin_sums = delta_stats(base, experts, options)
    stats = ops.delta_stats(*on_cpu, eps=1e-4, histogram=True)
    assert torch.equal(counts[:, 2].cpu(), stats.n_outlier)
    assert torch.equal(bin_counts.cpu(), stats.histogram_counts)
    assert torch.equal(bin_sums.cpu(), stats.histogram_sum_abs)


def test_nothing_small_is_merged_to_nothing() -> None:
    empty = torch.zeros(0, device=DEVICE)
    assert aggregate(empty, [empty], AggregateOptions(weights=(1.0,)))[0].shape == (0,)
    assert delta_stats(empty, [empty], DeltaStatsOptions(kappa=3.0))[1].tolist() == [[0, 0, 0, 0, 0]]
    assert magnitude_threshold(empty, [empty], MagnitudeThresholdOptions(k=(0,)))[0].tolist() == [math.inf]


@pytest.mark.parametrize("n", [1, 2 * CHUNK + 5])
def test_values_that_are_not_finite_are_counted_small(n: int) -> None:
    base, experts = device_group(n, torch.bfloat16, 2)
    bad = [3, 700, 2051, -1] if n > 1 else [0]
    special = torch.tensor([math.nan, math.inf, -math.inf, math.nan])[: len(bad)]
    experts[1][bad] = special.to(experts[0])
    _, nonfinite = aggregate(base, experts, AggregateOptions(weights=(1.0, 1.0), rule="ties"))
    assert nonfinite.tolist() == [0, 0, len(bad)]
    moments, counts, bins, sums = delta_stats(base, experts, DeltaStatsOptions(histogram=True))
    assert counts[:, 3].tolist() == [0, len(bad)]
    assert bool(moments[1, :4].isnan().all()) and bool(moments[0].isfinite().all())
    assert torch.equal(bins[:, -1], counts[:, 3]) and torch.equal(sums[:, -1].isinf(), counts[:, 3] > 0)
    options = MagnitudeThresholdOptions(k=(min(n, 4),) * 2)
    thresholds, nonfinite = magnitude_threshold(base, experts, options)
    assert torch.equal(nonfinite, counts[:, 3])
    assert not thresholds[1].isfinite() and bool(thresholds[0].isfinite())
    base[0] = math.nan
    assert aggregate(base, experts, AggregateOptions(weights=(1.0, 1.0)))[1].tolist() == [1, 0, len(bad)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("eps", "eps_rel", "kappa"), [(0.0, 0.0, 2.0), (1e-3, 0.0, None), (1e-9, 0.5, 1.0)])
def test_delta_stats_small(dtype: torch.dtype, eps: float, eps_rel: float, kappa: float | None) -> None:
    for n in (0, 1, 37, 3000):
        check_stats(*device_group(n, dtype, 2), eps=eps, eps_rel=eps_rel, kappa=kappa)


def test_delta_stats_of_several_chunks() -> None:
    check_stats(*device_group(50_001, torch.float16, 2), kappa=3.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1, 37), (5, 37), (4, 64), (2, 3, 17_000)], ids=str)
def test_delta_stats_small_of_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, experts = device_group(math.prod(shape), dtype, 2)
    base, experts = base.reshape(shape), [e.reshape(shape) for e in experts]
    check_stats(base, experts, eps_rel=0.3, kappa=2.0, rows=True)
    if len(shape) < 2 or not base.numel():
        return
    # A row has the bits that it has by itself, at the same address.
    options = DeltaStatsOptions(kappa=2.0, histogram=True, rows=True)
    row = delta_stats(base[-1:], [e[-1:] for e in experts], options)
    for all_rows, last in zip(delta_stats(base, experts, options), row, strict=True):
        assert same_bits(all_rows[:, -1:].contiguous().cpu(), last.contiguous().cpu())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["weights", "ties", "subnormal", "zeros"])
def test_magnitude_threshold_small_is_exact(dtype: torch.dtype, kind: str) -> None:
    for n in (0, 1, 1000, 8192, 8193, 12_345):
        base, experts = device_group(n, dtype, 2, kind)
        for share in (0.01, 0.6):
            check_threshold(base, experts, [math.ceil(share * n)] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_magnitude_threshold_of_every_rank(dtype: torch.dtype) -> None:
    n = 20_000
    base, experts = device_group(n, dtype, 2)
    for k in (0, 1, 2, 3, 9, n // 2, n - 2, n - 1):
        check_threshold(base, experts, [k, n - k])


@given(
    data=st.data(),
    n=st.sampled_from([1, 2, 100, 8192, 8193, 9001]),
    levels=st.sampled_from([1, 2, 5, 1000, 2**30]),
    dtype=st.sampled_from(FLOATS),
)
def test_magnitude_threshold_splits_the_tensor_at_k(
    data: st.DataObject, n: int, levels: int, dtype: torch.dtype
) -> None:
    k = data.draw(st.integers(1, n))
    g = generator(data.draw(st.integers(0, 99)))
    d = (torch.randint(-levels, levels + 1, (n,), generator=g).double() / levels).to(DEVICE, dtype)
    threshold = float(magnitude_threshold(torch.zeros_like(d), [d], MagnitudeThresholdOptions(k=(k,)))[0])
    size = d.double().abs()
    assert int((size >= threshold).sum()) >= k > int((size > threshold).sum())


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """For each call of magnitude_threshold, the `Source` of every expert: 0 none, 1 the buffer, 2 the tensor."""
    recorded: list[list[int]] = []

    def call(op: str, device: torch.device, **arguments: Any) -> None:
        launch.call(op, device, **arguments)
        recorded.append(arguments["selections"][:, 7].tolist())

    monkeypatch.setattr(magnitude_threshold_launcher, "call", call)
    return recorded


def sample_positions(n: int, count: int) -> Tensor:
    """The elements of a tensor of n elements that csrc/cuda/magnitude_threshold.cu samples."""
    mask = 2**64 - 1
    positions = []
    for i in range(count):
        begin = i * (n // count) + min(i, n % count)
        x = 0x9E3779B97F4A7C15 * (i + 1) & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        positions.append(begin + (x ^ x >> 31) % (n // count + (i < n % count)))
    return torch.tensor(positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bracket_and_buffer_serve_their_purpose(sources: list[list[int]], dtype: torch.dtype) -> None:
    n = 5 * SAMPLE[dtype] + 77
    base = torch.zeros(n, dtype=dtype, device=DEVICE)
    usual = randn(n, seed=1, dtype=dtype).to(DEVICE)
    for k in (n // 100, n // 5, n // 2):
        check_threshold(base, [usual], [k])
    assert sources == [[1]] * 3
    # The sample misleads: the bracket misses the answer, or far more keys lie inside than the buffer has room for.
    sampled = sample_positions(n, SAMPLE[dtype])
    misleading = usual.clone()
    misleading[sampled] = 100 + torch.arange(len(sampled), dtype=dtype, device=DEVICE)
    check_threshold(base, [misleading], [n // 2])
    crowded = usual.abs().clamp(max=1) + 1
    crowded[sampled] = torch.arange(len(sampled), dtype=dtype, device=DEVICE) / len(sampled) * 4
    check_threshold(base, [crowded], [n // 2])
    assert sources[3:] == [[2], [2]]
    # Slightly more keys than the buffer has room for: a run of neighbours of the answer, none of them sampled.
    room = n // magnitude_threshold_launcher.BUFFER_SHARE
    median = float(usual.abs().median())
    free = torch.ones(n, dtype=torch.bool, device=DEVICE)
    free[sampled] = False
    run = free.nonzero().flatten()[: int(0.8 * room)]
    full = usual.clone()
    full[run] = median * (1 + 1e-3 * (torch.arange(len(run), dtype=dtype, device=DEVICE) / len(run) - 0.5))
    check_threshold(base, [full], [n // 2])
    assert sources[5:] == [[2]]
    # Ties at the bracket's ends need no buffer.
    tied = (usual * 2).round()
    check_threshold(base, [tied], [n // 5])
    assert sources[6:] == [[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_brackets_that_just_miss_on_either_side(sources: list[list[int]], dtype: torch.dtype) -> None:
    n = 5 * SAMPLE[dtype] + 77
    base = torch.zeros(n, dtype=dtype, device=DEVICE)
    sampled = sample_positions(n, SAMPLE[dtype])
    for factor in (0.85, 0.9, 0.93, 0.95, 1.05, 1.07, 1.1, 1.15):
        biased = randn(n, seed=1, dtype=dtype)
        biased[sampled] *= factor
        check_threshold(base, [biased.to(DEVICE)], [n // 2])
    missed = [where == [2] for where in sources]
    assert missed[0] and missed[-1] and not all(missed)


def test_sampled_elements_are_those_that_the_tests_assume(sources: list[list[int]]) -> None:
    """Only sampled elements are not 0, so that the bracket is one key and the answer for k = count is that key."""
    n, count = 3 * SAMPLE[torch.float32] + 5, SAMPLE[torch.float32]
    d = torch.zeros(n)
    d[sample_positions(n, count)] = 1.0
    check_threshold(torch.zeros(n, device=DEVICE), [d.to(DEVICE)], [count])
    # k/N = 1/3: the sample, all 1, puts the bracket at [1, 1], where the answer is.
    assert sources == [[0]]
    check_threshold(torch.zeros(n, device=DEVICE), [d.to(DEVICE)], [count + 1])
    assert sources[1:] == [[2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_do_not_depend_on_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = device_group(17_003, dtype, 2)
    options = AggregateOptions(weights=(0.5, 1.0), rule="ties", normalize=True)
    ranks = MagnitudeThresholdOptions(k=(17_000, 4000))
    merged, limits = aggregate(base, experts, options)[0], magnitude_threshold(base, experts, ranks)[0]
    for chunk in (256, 1000, 65_536):
        monkeypatch.setattr(aggregate_launcher, "CHUNK", chunk)
        monkeypatch.setattr(magnitude_threshold_launcher, "CHUNK", chunk)
        assert same_bits(aggregate(base, experts, options)[0], merged)
        assert torch.equal(magnitude_threshold(base, experts, ranks)[0], limits)


def test_kernels_write_only_to_their_results() -> None:
    for n in (9001, 5, 16_400):
        base, experts = device_group(n, torch.float16, 2)
        with guarded_memory():
            aggregate(base, experts, AggregateOptions(weights=(1.0, 2.0), rule="ties", out_dtype=torch.float32))
            delta_stats(base, experts, DeltaStatsOptions(eps_rel=0.1, kappa=3.0, histogram=True))
            magnitude_threshold(base, experts, MagnitudeThresholdOptions(k=(n // 2, 1)))


def aggregate_arguments(**changes: Any) -> dict[str, Any]:
    base, experts = device_group(64, torch.float32, 1)
    options = AggregateOptions(weights=(1.0,))
    prepared = prepare_aggregate(base, experts, options)
    arguments = {name: value for name, value in vars(prepared).items() if name != "scalars"}
    return arguments | {"options": options, "chunk": 8} | changes


def test_errors_name_the_argument() -> None:
    """A launch that cannot be made, or would write to a wrong address, is an exception."""
    device = torch.device(DEVICE)
    launch.call("aggregate", device, **aggregate_arguments())
    with pytest.raises(ValueError, match="merged: got 63 elements, need 64"):
        launch.call("aggregate", device, **aggregate_arguments(merged=torch.empty(63, device=DEVICE)))
    with pytest.raises(TypeError, match=r"nonfinite: got dtype torch.int32, need torch.int64"):
        nonfinite = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        launch.call("aggregate", device, **aggregate_arguments(nonfinite=nonfinite))
    with pytest.raises(TypeError):
        launch.call("aggregate", device, **aggregate_arguments(result=nonfinite))
    huge, mask = torch.empty(2**45, device="meta"), torch.empty(2**42, dtype=torch.uint8, device="meta")
    threshold = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"variance_mask on CUDA: .* at most 2147483647 blocks, got 2147483648"):
        launch.call("variance_mask", device, variances=huge, threshold=threshold, mask=mask)
