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
from gpu_contract import GpuContract, every_dtype, random_masks
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATS, generator, randn, same_bits, values
from torch import Tensor

from resm_kernels import _extension, ops
from resm_kernels._launch import prepare_aggregate
from resm_kernels.cuda import aggregate as aggregate_launcher
from resm_kernels.cuda import launch
from resm_kernels.cuda import magnitude_threshold as magnitude_threshold_launcher
from resm_kernels.cuda import random_mask as random_mask_launcher
from resm_kernels.cuda.aggregate import CHUNK, aggregate
from resm_kernels.cuda.delta_stats import delta_stats
from resm_kernels.cuda.kept_moments import kept_moments
from resm_kernels.cuda.magnitude_threshold import magnitude_threshold
from resm_kernels.cuda.random_mask import random_mask
from resm_kernels.cuda.variance_mask import variance_mask
from resm_kernels.reference import kept_moments as reference_kept_moments
from resm_kernels.reference import random_mask as reference_random_mask
from resm_kernels.reference import variance_mask as reference_variance_mask
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions
from resm_kernels.reference.random_mask import RandomMaskOptions
from resm_kernels.reference.variance_mask import VarianceMaskOptions

pytestmark = pytest.mark.usefixtures("cuda_kernels", "one_thread")

SAMPLE = {torch.float32: 8192, torch.float64: 4096}
"""Elements that are sampled, by the dtype of the arithmetic; a tensor of at most so many is sampled whole."""


class TestKernels(GpuContract):
    backend = "cuda"
    lengths = (0, 1, 7, 8, 257, 2048, CHUNK - 1, CHUNK + 8, 2 * CHUNK + 5)
    mixed_shape = (90, 140)
    large = 16_397
    sparse_lengths = (257, 0, 5, CHUNK + 13, 64)
    threshold_lengths = (0, 1, 1000, 8192, 8193, 12_345)
    ranks = (0, 1, 2, 3, 9, 12_345, 20_000, 39_998, 39_999)
    float64_outputs = (torch.float32, torch.float64)
    tolerances = ((1e-13, 1e-14),) * 2
    last_bin_of_nan = math.inf

    def test_delta_stats_of_several_chunks(self) -> None:
        self.check_stats(*device_group(50_001, torch.float16, 2), kappa=3.0)

    @every_dtype
    def test_delta_stats_small_of_long_rows(self, dtype: torch.dtype) -> None:
        self.check_rows((2, 3, 17_000), dtype)

    def test_aggregate_takes_any_number_of_experts(self) -> None:
        self.check_aggregate(*device_group(300, torch.bfloat16, 70), "ties")

    @every_dtype
    def test_views_off_any_alignment_small(self, dtype: torch.dtype) -> None:
        base, experts = device_group(CHUNK + 24, dtype, 2)
        for group in ((shifted(base), experts), (base, [shifted(experts[0]), experts[1]])):
            self.check_aggregate(*group, "sum")
            self.check_threshold(*group, [500, 8000])
            self.check_stats(*group, eps=1e-3, kappa=2.0)


check_threshold = TestKernels().check_threshold


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
    stats_options = DeltaStatsOptions(eps=1e-4, kappa=3.0, histogram=True)
    _, counts, bin_counts, bin_sums = delta_stats(base, experts, stats_options)
    stats = ops.delta_stats(*on_cpu, eps=1e-4, histogram=True)
    assert torch.equal(counts[:, 2].cpu(), stats.n_outlier)
    assert torch.equal(bin_counts.cpu(), stats.histogram_counts)
    assert torch.equal(bin_sums.cpu(), stats.histogram_sum_abs)


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
    missed = [source == [2] for source in sources]
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


def test_elements_that_are_left_out_small_are_counted_too() -> None:
    base, experts = device_group(300, torch.bfloat16, 2)
    experts[1][[3, 299]] = torch.tensor([math.nan, math.inf]).to(experts[1])
    base[39] = math.nan
    masks = tuple(torch.zeros_like(mask) for mask in random_masks(experts))
    _, nonfinite = aggregate(base, experts, AggregateOptions(weights=(1.0, 1.0), masks=masks))
    assert nonfinite.tolist() == [1, 0, 2]


def test_random_mask_small_of_ranks_that_need_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = torch.zeros(5, 70, device=DEVICE), [randn(5, 70, seed=1).to(DEVICE)]
    options = RandomMaskOptions(density=(0.5,), epsilon=(0.3,), seed=1)
    expected = random_mask(base, experts, options)[0]
    monkeypatch.setattr(random_mask_launcher, "ranks_of", lambda *a: reference_random_mask.ranks_of(*a).long())
    assert torch.equal(random_mask(base, experts, options)[0], expected)


def test_kept_moments_of_mixed_dtypes_views_and_values_that_are_not_finite() -> None:
    base = shifted(values((300,), "weights", torch.float32, 0).to(DEVICE))
    experts = [base.bfloat16(), base.double() * 1.5, (base + 1e-3).half()]
    expected = reference_kept_moments.kept_moments(base, experts, SparsityOptions())
    torch.testing.assert_close(kept_moments(base, experts, SparsityOptions()), expected, rtol=1e-13, atol=0)
    experts[1][7] = math.inf
    infinite = kept_moments(base, experts, SparsityOptions()).isinf()
    assert infinite.tolist() == [[False] * 3, [True] * 3, [False] * 3]


def test_variance_mask_of_mixed_dtypes_and_views() -> None:
    options = VarianceMaskOptions(density=0.4)
    base = shifted(values((300,), "weights", torch.float32, 0).to(DEVICE))
    for experts in ([base.bfloat16(), base.half()], [shifted(base * 1.1), base * 0.9], [base.double() * 1.5, base]):
        expected = reference_variance_mask.variance_mask(base, experts, options)
        assert torch.equal(variance_mask(base, experts, options), expected)


def test_kernels_write_only_to_their_results() -> None:
    for n in (9001, 5, 16_400):
        base, experts = device_group(n, torch.float16, 2)
        masks = random_masks(experts)
        with guarded_memory():
            aggregate(base, experts, AggregateOptions(weights=(1.0, 2.0), rule="ties", out_dtype=torch.float32))
            aggregate(base, experts, AggregateOptions(weights=(1.0, 2.0), normalize=True, masks=masks))
            delta_stats(base, experts, DeltaStatsOptions(eps_rel=0.1, kappa=3.0, histogram=True))
            magnitude_threshold(base, experts, MagnitudeThresholdOptions(k=(n // 2, 1)))
            random_mask(base, experts, RandomMaskOptions(density=(0.5, 0.5), epsilon=(0.0, 0.2), seed=1))
            kept_moments(base, experts, SparsityOptions(masks=masks))
            variance_mask(base, experts, VarianceMaskOptions(density=0.5))


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
