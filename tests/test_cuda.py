"""CUDA kernels against the reference and the CPU's: every dtype, rule and form, many tensors in a launch.

Where there is no GPU the same source runs on the CPU, compiled by a C++ compiler, with threads and blocks in either
order. Nothing here has a tolerance but sums: those of delta_stats are float64, in another order than the reference's.
"""

from __future__ import annotations

import inspect
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cuda_device import DEVICE, LENGTHS, cuda_kernels, groups, guarded_memory, shifted  # noqa: F401  (a fixture)
from hypothesis import given
from hypothesis import strategies as st
from inputs import FLOATS, generator, randn, same_bits, values
from torch import Tensor

from resm_kernels import _extension, ops
from resm_kernels.cuda import _launch
from resm_kernels.cuda import aggregate as aggregate_host
from resm_kernels.cuda import magnitude_threshold as magnitude_threshold_host
from resm_kernels.cuda.aggregate import CHUNK, aggregate
from resm_kernels.cuda.delta_stats import delta_stats
from resm_kernels.cuda.magnitude_threshold import magnitude_threshold
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.reference import aggregate as reference_aggregate
from resm_kernels.reference import delta_stats as reference_delta_stats
from resm_kernels.reference import magnitude_threshold as reference_magnitude_threshold

pytestmark = [pytest.mark.usefixtures("cuda_kernels"), pytest.mark.usefixtures("one_thread")]

SAMPLE = {torch.float32: 8192, torch.float64: 4096}
"""By the dtype of arithmetic: tensors up to this size are sampled whole, larger ones as much."""


def check_aggregate(bases: list[Tensor], experts: list[Tensor], n_experts: int, rule: str) -> None:
    n_tensors = len(experts) // n_experts
    weights = [float(w) for w in randn(n_tensors * n_experts, seed=3)]
    limits = randn(n_tensors, n_experts, seed=4, dtype=torch.float64).abs().mul(2e-3).to(DEVICE)
    # torch rounds float64 to half types twice: see test_float64_is_rounded_once.
    wide = any(t.dtype == torch.float64 for t in (*bases, *experts))
    for out_dtype in (torch.float64, torch.float32) if wide else (None, torch.bfloat16, torch.float16, torch.float64):
        for thresholds in (None, limits) if rule == "ties" else (None,):
            for normalize in (False, True):
                call = (bases, experts, weights, n_experts, 0.7, rule, normalize, thresholds, out_dtype)
                found, wanted = aggregate(*call), reference_aggregate.aggregate(*call)
                assert same_bits(found[1].cpu(), wanted[1].cpu())
                for a, b in zip(found[0], wanted[0], strict=True):
                    assert a.is_contiguous() and same_bits(a.cpu(), b.cpu())


def check_threshold(bases: list[Tensor], experts: list[Tensor], k: list[int]) -> None:
    found = magnitude_threshold(bases, experts, k)
    for a, b in zip(found, reference_magnitude_threshold.magnitude_threshold(bases, experts, k), strict=True):
        assert same_bits(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", ["sum", "ties"])
@pytest.mark.parametrize("with_base", [False, True])
def test_aggregate_small_has_the_references_bits(dtype: torch.dtype, rule: str, with_base: bool) -> None:
    for n_experts in (1, 3):
        bases, experts = groups(dtype, n_experts, LENGTHS if n_experts == 3 else (257, 8))
        check_aggregate(bases if with_base else [], experts, n_experts, rule)


def test_aggregate_takes_any_number_of_experts() -> None:
    bases, experts = groups(torch.bfloat16, 70, (300, 64))
    check_aggregate(bases, experts, 70, "ties")


@pytest.mark.parametrize("kind", ["ties", "subnormal", "huge", "zeros"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_aggregate_small_of_unusual_values(kind: str, dtype: torch.dtype) -> None:
    bases, experts = groups(dtype, 2, (264, 35), kind)
    for rule in ("sum", "ties"):
        check_aggregate(bases, experts, 2, rule)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_views_off_any_alignment_small(dtype: torch.dtype) -> None:
    bases, experts = groups(dtype, 2, (CHUNK + 24, 64))
    bases, experts = [shifted(bases[0]), bases[1]], [*experts[:2], shifted(experts[2]), experts[3]]
    check_aggregate(bases, experts, 2, "sum")
    check_threshold(bases, experts, [500, 8000, 3, 60])
    check_stats(bases, experts, 1e-3, 0.0, 2.0)


def test_mixed_dtypes_and_layouts_small() -> None:
    base = values((90, 140), "weights", torch.float32, 0).to(DEVICE)
    experts = [base.bfloat16(), base.double() * 1.5, (base + 1e-3).half()]
    other = values((90, 140), "weights", torch.bfloat16, 5).to(DEVICE)
    third = [(other * 2).float(), other.half(), other]
    bases, flat = [base.mT.contiguous().mT, other, other], [*experts, *third, other * 2, other, other * 0.5]
    for rule in ("sum", "ties"):
        check_aggregate(bases, flat, 3, rule)
    check_threshold(bases, flat, [2000, 1, 6000, 12600, 0, 40, 2, 9, 77])
    check_stats(bases, flat, 0.0, 0.3, 1.5)


@pytest.mark.skipif(_extension.native is None, reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    (base,), experts = groups(torch.float64, 2, (3000,))
    found = aggregate([base], experts, [0.5, 0.7], 2, 1.0, "sum", False, None, dtype)[0][0]
    assert same_bits(found.cpu(), ops.aggregate(base.cpu(), [e.cpu() for e in experts], [0.5, 0.7], out_dtype=dtype))
    tie = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40], dtype=torch.float64, device=DEVICE)
    up = aggregate([], [tie], [1.0], 1, 1.0, "sum", False, None, dtype)[0][0]
    assert float(up[0 if dtype == torch.bfloat16 else 1]) > 1 + torch.finfo(dtype).eps / 2


@pytest.mark.skipif(_extension.native is None, reason="the native kernels are not built")
def test_results_are_those_of_the_cpu_kernels() -> None:
    bases, experts = groups(torch.bfloat16, 3, (30_000,))
    base, own = bases[0].cpu(), [e.cpu() for e in experts]
    limits = magnitude_threshold(bases, experts, [6000] * 3)[0]
    assert torch.equal(limits[0].cpu(), ops.magnitude_threshold(base, own, 6000))
    merged = aggregate(bases, experts, [1.0, 0.5, -2.0], 3, 1.5, "ties", True, limits, None)[0][0]
    wanted = ops.aggregate(base, own, [1.0, 0.5, -2.0], scale=1.5, rule="ties", normalize=True, thresholds=limits[0])
    assert same_bits(merged.cpu(), wanted)
    _, counts, bin_counts, bin_sums = delta_stats(bases, experts, 1e-4, 0.0, 3.0, True)
    stats = ops.delta_stats(base, own, eps=1e-4, histogram=True)
    assert torch.equal(counts[0, :, 2].cpu(), stats.n_outlier)
    assert torch.equal(bin_counts[0].cpu(), stats.histogram_counts)
    assert torch.equal(bin_sums[0].cpu(), stats.histogram_sum_abs)


def test_nothing_small_is_merged_to_nothing() -> None:
    assert aggregate([], [], [], 1, 1.0, "sum", False, None, None)[0] == []
    assert delta_stats([], [], 0.0, 0.0, 3.0, True)[2].shape == (0, 0, 256)
    assert magnitude_threshold([], [], [])[0].shape == (0, 0)
    empty = torch.zeros(0, device=DEVICE)
    assert aggregate([empty], [empty], [1.0], 1, 1.0, "sum", False, None, None)[0][0].shape == (0,)
    assert delta_stats([empty], [empty], 0.0, 0.0, 3.0, False)[1].tolist() == [[[0, 0, 0, 0, 0]]]
    assert magnitude_threshold([empty], [empty], [0])[0].tolist() == [[math.inf]]


def test_values_that_are_not_finite_are_counted_small() -> None:
    bases, experts = groups(torch.bfloat16, 2)
    large = len(bases) - 2  # a tensor that is not sampled whole
    experts[2 * large + 1][[3, 700, 2051, -1]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan]).to(experts[0])
    bases[1][0] = math.nan
    _, found = aggregate(bases, experts, [1.0] * len(experts), 2, 1.0, "ties", False, None, None)
    assert found[1, 0] == 1 and found[large, 2] == 4 and int(found.sum()) == 5
    moments, stats, bins, sums = delta_stats(bases, experts, 0.0, 0.0, None, True)
    assert stats[1, :, 3].tolist() == [1, 1] and stats[large, :, 3].tolist() == [0, 4] and int(stats[..., 3].sum()) == 6
    assert bool(moments[large, 1, :4].isnan().all()) and bool(moments[large, 0].isfinite().all())
    assert torch.equal(bins[..., -1], stats[..., 3]) and torch.equal(sums[..., -1].isinf(), stats[..., 3] > 0)
    thresholds, bad = magnitude_threshold(bases, experts, [min(b.numel(), 4) for b in bases for _ in range(2)])
    assert torch.equal(bad, stats[..., 3])
    assert not thresholds[large, 1].isfinite() and bool(thresholds[large, 0].isfinite())


def check_stats(bases: list[Tensor], experts: list[Tensor], eps: float, eps_rel: float, kappa: float | None) -> None:
    wanted = reference_delta_stats.delta_stats(bases, experts, eps, eps_rel, kappa, True)
    found = delta_stats(bases, experts, eps, eps_rel, kappa, True)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-13, atol=1e-14)
    wide = any(t.dtype == torch.float64 for t in (*bases, *experts))
    torch.testing.assert_close(found[3], wanted[3], rtol=2.0**-23 if wide else 0, atol=0)
    plain = delta_stats(bases, experts, eps, eps_rel, kappa, False)
    again = delta_stats(bases, experts, eps, eps_rel, kappa, True)
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(found, again, strict=True))
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(found[:2], plain[:2], strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("eps", "eps_rel", "kappa"), [(0.0, 0.0, 2.0), (1e-3, 0.0, None), (1e-9, 0.5, 1.0)])
def test_delta_stats_small(dtype: torch.dtype, eps: float, eps_rel: float, kappa: float | None) -> None:
    bases, experts = groups(dtype, 2, (0, 1, 37, 3000))
    check_stats(bases, experts, eps, eps_rel, kappa)


def test_delta_stats_of_several_chunks() -> None:
    bases, experts = groups(torch.float16, 2, (50_001, 40))
    check_stats(bases, experts, 0.0, 0.0, 3.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["weights", "ties", "subnormal", "zeros"])
def test_magnitude_threshold_small_is_exact(dtype: torch.dtype, kind: str) -> None:
    bases, experts = groups(dtype, 2, (0, 1, 1000, 8192, 8193, 12_345), kind)
    for share in (0.01, 0.6):
        check_threshold(bases, experts, [math.ceil(share * e.numel()) for e in experts])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_magnitude_threshold_of_every_rank(dtype: torch.dtype) -> None:
    n = 20_000
    bases, experts = groups(dtype, 2, (n,))
    for k in (0, 1, 2, 3, 9, n // 2, n - 2, n - 1):
        check_threshold(bases, experts, [k, n - k])


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
    threshold = float(magnitude_threshold([torch.zeros_like(d)], [d], [k])[0])
    size = d.double().abs()
    assert int((size >= threshold).sum()) >= k > int((size > threshold).sum())


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Where the answers of each call of magnitude_threshold were looked for: 0 nowhere else, 1 buffer, 2 tensor."""
    seen: list[list[int]] = []
    empty = torch.empty
    made: list[Tensor] = []

    def recorded(*args: object, **keywords: object) -> Tensor:
        tensor: Tensor = empty(*args, **keywords)  # type: ignore[arg-type]
        if tensor.shape[-1:] == (magnitude_threshold_host.SELECTION_WORDS,):
            made.append(tensor)
        return tensor

    def call(*arguments: object) -> None:
        _launch.call(*arguments)  # type: ignore[arg-type]
        seen.append(made[-1][..., 7].flatten().tolist())

    monkeypatch.setattr(torch, "empty", recorded)
    monkeypatch.setattr(magnitude_threshold_host, "call", call)
    return seen


def places(n: int, count: int) -> Tensor:
    """Where a tensor of n elements is sampled, as csrc/cuda/magnitude_threshold.cu has it."""
    mask = 2**64 - 1
    found = []
    for i in range(count):
        begin = i * (n // count) + min(i, n % count)
        x = 0x9E3779B97F4A7C15 * (i + 1) & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        found.append(begin + (x ^ x >> 31) % (n // count + (i < n % count)))
    return torch.tensor(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bracket_and_buffer_do_what_they_are_for(sources: list[list[int]], dtype: torch.dtype) -> None:
    n = 5 * SAMPLE[dtype] + 77
    base = torch.zeros(n, dtype=dtype, device=DEVICE)
    usual = randn(n, seed=1, dtype=dtype).to(DEVICE)
    for k in (n // 100, n // 5, n // 2):
        check_threshold([base], [usual], [k])
    assert sources == [[1]] * 3
    # What the sample shows is not what there is: the bracket misses, or far more lies inside than there is room for.
    at = places(n, SAMPLE[dtype])
    misleading = usual.clone()
    misleading[at] = 100 + torch.arange(len(at), dtype=dtype, device=DEVICE)
    check_threshold([base], [misleading], [n // 2])
    crowded = usual.abs().clamp(max=1) + 1
    crowded[at] = torch.arange(len(at), dtype=dtype, device=DEVICE) / len(at) * 4
    check_threshold([base], [crowded], [n // 2])
    assert sources[3:] == [[2], [2]]
    # A little too much for the buffer: a run of near neighbours of the answer, none of them sampled.
    room = n // magnitude_threshold_host.BUFFER_SHARE
    median = float(usual.abs().median())
    free = torch.ones(n, dtype=torch.bool, device=DEVICE)
    free[at] = False
    run = free.nonzero().flatten()[: int(0.8 * room)]
    full = usual.clone()
    full[run] = median * (1 + 1e-3 * (torch.arange(len(run), dtype=dtype, device=DEVICE) / len(run) - 0.5))
    check_threshold([base], [full], [n // 2])
    assert sources[5:] == [[2]]
    # Ties at the bracket's ends need no buffer.
    tied = (usual * 2).round()
    check_threshold([base], [tied], [n // 5])
    assert sources[6:] == [[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_brackets_that_just_miss_on_either_side(sources: list[list[int]], dtype: torch.dtype) -> None:
    n = 5 * SAMPLE[dtype] + 77
    base = torch.zeros(n, dtype=dtype, device=DEVICE)
    at = places(n, SAMPLE[dtype])
    for factor in (0.85, 0.9, 0.93, 0.95, 1.05, 1.07, 1.1, 1.15):
        biased = randn(n, seed=1, dtype=dtype)
        biased[at] *= factor
        check_threshold([base], [biased.to(DEVICE)], [n // 2])
    missed = [where == [2] for where in sources]
    assert missed[0] and missed[-1] and not all(missed)


def test_samples_are_drawn_where_the_tests_think(sources: list[list[int]]) -> None:
    """Of 0 everywhere but at the places, the bracket of the median of the places is all there is."""
    n, count = 3 * SAMPLE[torch.float32] + 5, SAMPLE[torch.float32]
    d = torch.zeros(n)
    d[places(n, count)] = 1.0
    check_threshold([torch.zeros(n, device=DEVICE)], [d.to(DEVICE)], [count])
    # k/N = 1/3: the sample, all 1, puts the bracket at [1, 1], where the answer is.
    assert sources == [[0]]
    check_threshold([torch.zeros(n, device=DEVICE)], [d.to(DEVICE)], [count + 1])
    assert sources[1:] == [[2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_depend_on_neither_chunks_nor_company(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    bases, experts = groups(dtype, 2, (9000, 31, 17_003))
    call = (bases, experts, [0.5, 1.0] * 3, 2, 1.0, "ties", True, None, None)
    ks = [900, 1, 3, 31, 17_000, 4000]
    merged, limits = aggregate(*call)[0], magnitude_threshold(bases, experts, ks)[0]
    for i in range(3):
        own = slice(2 * i, 2 * i + 2)
        alone = aggregate([bases[i]], experts[own], [0.5, 1.0], *call[3:])[0][0]
        assert same_bits(alone, merged[i])
        assert torch.equal(magnitude_threshold([bases[i]], experts[own], ks[own])[0][0], limits[i])
        for a, b in zip(
            delta_stats([bases[i]], experts[own], 0.0, 0.1, 3.0, True),
            delta_stats(bases, experts, 0.0, 0.1, 3.0, True),
            strict=True,
        ):
            assert same_bits(a[0], b[i])
    for chunk in (8, 1000, 65_536):
        monkeypatch.setattr(aggregate_host, "CHUNK", max(chunk, 256))
        monkeypatch.setattr(magnitude_threshold_host, "CHUNK", max(chunk, 256))
        assert all(same_bits(a, b) for a, b in zip(aggregate(*call)[0], merged, strict=True))
        assert torch.equal(magnitude_threshold(bases, experts, ks)[0], limits)


def test_outputs_stay_within_their_tensors() -> None:
    bases, experts = groups(torch.float16, 2, (9001, 5, 16_400))
    with guarded_memory():
        aggregate(bases, experts, [1.0, 2.0] * 3, 2, 1.0, "ties", True, None, torch.float32)
        delta_stats(bases, experts, 0.0, 0.1, 3.0, True)
        magnitude_threshold(bases, experts, [4000, 1, 2, 5, 9000, 30])


@pytest.mark.parametrize("op", sorted(path.stem for path in Path(aggregate_host.__file__).parent.glob("[a-z]*.py")))
def test_hosts_take_what_the_schema_says(op: str) -> None:
    host, definition = (import_module(f"resm_kernels.{where}.{op}") for where in ("cuda", "reference"))
    assert list(inspect.signature(vars(host)[op]).parameters) == list(
        inspect.signature(vars(definition)[op]).parameters
    )


def test_codes_of_dtypes_are_the_extensions() -> None:
    assert {dtype: i for i, dtype in enumerate(FLOAT_DTYPES)} == _launch.DTYPE_CODES


def test_errors_are_told() -> None:
    """A launch that cannot be made is an exception with the op's name, not a wrong result."""
    bases, experts = groups(torch.float32, 1, (64,))
    launch = aggregate_host.launch_of([[bases[0], bases[0], experts[0]]], 8)
    object.__setattr__(launch, "programs", 2**31)
    numbers = (None, None, None, None, 0, 1.0, 0, 0, 0, 0.0, None)
    with pytest.raises(RuntimeError, match="aggregate on CUDA: a launch has at most 2147483647 blocks, got 2147483648"):
        _launch.call("aggregate", launch, 1, bases[0].device, 1, 0, 0, 0, 0, *numbers)
