"""Tests that compare GPU kernels with the reference at odd sizes; a subclass runs them for one backend's kernels."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from cuda_device import DEVICE, device_group, shifted
from inputs import FLOATS, randn, values
from product_contract import same
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resm_kernels.masks import packed
from resm_kernels.reference.aggregate import CONSENSUS_METHODS, AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.deltas import SparsityOptions
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions
from resm_kernels.reference.random_mask import RandomMaskOptions
from resm_kernels.reference.variance_mask import VarianceMaskOptions

every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def implementation(package: str, op: str) -> Callable[..., Any]:
    """The op's function in resm_kernels.reference, resm_kernels.triton or resm_kernels.cuda."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"resm_kernels.{package}.{op}"), op)
    return function


def on_cpu(result: Any) -> list[Tensor]:
    return [tensor.cpu() for tensor in tree_leaves(result)]


def random_masks(experts: list[Tensor]) -> tuple[Tensor, ...]:
    """A mask for each expert, which keeps half of its elements; only the first mask is aligned."""
    masks = [packed(randn(e.numel(), seed=6 + i) > 0).to(DEVICE) for i, e in enumerate(experts)]
    return (*masks[:1], *map(shifted, masks[1:]))


class GpuContract:
    """Tests of one backend's kernels. "small" in a name marks the tests that memory checkers, which are slow, run.

    Attributes:
        backend: The package of the kernels, "triton" or "cuda".
        lengths: Numbers of elements around the sizes of blocks and chunks.
        mixed_shape: The shape of tensors of mixed dtypes.
        large: The largest number of elements in the tests of variance_mask and kept_moments.
        sparse_lengths: Numbers of elements in the tests of sparse task vectors.
        threshold_lengths: Numbers of elements in the tests of magnitude_threshold.
        ranks: The ranks that magnitude_threshold seeks among 40 000 elements.
        float64_outputs: Output dtypes for float64 inputs that have the reference's bits: the reference and Triton round
            float64 to half types twice, the CUDA kernels once.
        tolerances: rtol and atol of the moments of up to 5000 elements, then of more.
        last_bin_of_nan: The sum of the histogram's last bin if a δ is NaN, which the definition leaves open.
    """

    backend: ClassVar[str]
    lengths: ClassVar[tuple[int, ...]]
    mixed_shape: ClassVar[tuple[int, int]]
    large: ClassVar[int]
    sparse_lengths: ClassVar[tuple[int, ...]]
    threshold_lengths: ClassVar[tuple[int, ...]]
    ranks: ClassVar[tuple[int, ...]]
    float64_outputs: ClassVar[tuple[torch.dtype, ...]]
    tolerances: ClassVar[tuple[tuple[float, float], tuple[float, float]]]
    last_bin_of_nan: ClassVar[float]

    def run(self, op: str, base: Tensor | None, experts: list[Tensor], options: Any) -> Any:
        return implementation(self.backend, op)(base, experts, options)

    def check_exact(self, op: str, base: Tensor | None, experts: list[Tensor], options: Any) -> Any:
        results = self.run(op, base, experts, options)
        assert all(tensor.is_contiguous() for tensor in tree_leaves(results))
        assert same(on_cpu(results), on_cpu(implementation("reference", op)(base, experts, options)))
        return results

    def check_aggregate(self, base: Tensor | None, experts: list[Tensor], rule: str) -> None:
        weights = tuple(float(w) for w in randn(len(experts), seed=3))
        limits = randn(len(experts), seed=4, dtype=torch.float64).abs().mul(2e-3).to(DEVICE)
        wide = any(t.dtype == torch.float64 for t in (base, *experts) if t is not None)
        default = (experts[0] if base is None else base).dtype
        out_dtypes = self.float64_outputs if wide else FLOATS
        for out_dtype in (None, *(dtype for dtype in out_dtypes if dtype != default)):
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
                    self.check_exact("aggregate", base, experts, options)

    def check_threshold(self, base: Tensor, experts: list[Tensor], k: list[int]) -> None:
        self.check_exact("magnitude_threshold", base, experts, MagnitudeThresholdOptions(k=tuple(k)))

    def check_stats(self, base: Tensor, experts: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        with_histogram = DeltaStatsOptions(**options, histogram=True)
        expected = implementation("reference", "delta_stats")(base, experts, with_histogram)
        results: tuple[Tensor, ...] = self.run("delta_stats", base, experts, with_histogram)
        assert torch.equal(results[1], expected[1]) and torch.equal(results[2], expected[2])
        rtol, atol = self.tolerances[base.numel() > 5000]
        torch.testing.assert_close(results[0], expected[0], rtol=rtol, atol=atol)
        wide = any(t.dtype == torch.float64 for t in (base, *experts))
        torch.testing.assert_close(results[3], expected[3], rtol=2.0**-23 if wide else 0, atol=0)
        plain = self.run("delta_stats", base, experts, DeltaStatsOptions(**options))
        assert same(on_cpu(results[:2]), on_cpu(plain[:2]))
        if wide:  # The histograms of other dtypes were compared exactly above.
            assert same(on_cpu(results), on_cpu(self.run("delta_stats", base, experts, with_histogram)))
        return results

    def check_rows(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        base, experts = device_group(math.prod(shape), dtype, 2)
        base, experts = base.reshape(shape), [e.reshape(shape) for e in experts]
        results = self.check_stats(base, experts, eps_rel=0.3, kappa=2.0, rows=True)
        if len(shape) > 1 and base.numel():
            # A row has the bits that it has by itself, at the same address.
            options = DeltaStatsOptions(eps_rel=0.3, kappa=2.0, histogram=True, rows=True)
            row = self.run("delta_stats", base[-1:], [e[-1:] for e in experts], options)
            assert same(on_cpu([x[:, -1:].contiguous() for x in results]), on_cpu([x.contiguous() for x in row]))

    @every_dtype
    @pytest.mark.parametrize("rule", ["sum", "ties"])
    @pytest.mark.parametrize("with_base", [False, True])
    def test_aggregate_small_has_the_references_bits(self, dtype: torch.dtype, rule: str, with_base: bool) -> None:
        for n_experts, lengths in ((1, (257, 8)), (3, self.lengths)):
            for i, n in enumerate(lengths):
                base, experts = device_group(n, dtype, n_experts, seed=10 * i)
                self.check_aggregate(base if with_base else None, experts, rule)

    @every_dtype
    @pytest.mark.parametrize("rule, consensus", [("sum", "weighted"), *(("ties", c) for c in CONSENSUS_METHODS)])
    def test_aggregate_small_of_sparse_deltas(self, dtype: torch.dtype, rule: str, consensus: str) -> None:
        lower = randn(3, seed=4, dtype=torch.float64).abs().mul(4e-4).to(DEVICE)
        upper, rescale = lower + 1e-3, randn(3, seed=5, dtype=torch.float64).add(2.0).to(DEVICE)
        for i, n in enumerate(self.sparse_lengths):
            base, experts = device_group(n, dtype, 3, seed=10 * i)
            weights = (0.0, -0.0, 1.5) if i == 0 else tuple(float(w) for w in randn(3, seed=i))
            masks = random_masks(experts)
            for origin, below, above, bit_masks, factors in (
                (base, None, None, masks, None),
                (base, lower, upper, masks, rescale),
                (base, lower, None, None, rescale),
                (base, None, upper, None, None),
                (base, None, None, None, rescale),
                (None, lower, upper, masks, rescale),
            ):
                for normalize in (False, True):
                    options = AggregateOptions(
                        weights=weights,
                        scale=0.7,
                        rule=rule,
                        normalize=normalize,
                        thresholds=below,
                        upper_thresholds=above,
                        masks=bit_masks,
                        rescale=factors,
                        consensus_method=consensus,
                        min_divisor=0.4 if normalize and rule == "ties" else None,
                    )
                    self.check_exact("aggregate", origin, experts, options)

    def test_votes_of_weights_that_are_0_keep_the_sign_of_zero(self) -> None:
        zero, one = torch.tensor([-0.0], device=DEVICE), torch.tensor([-1.0], device=DEVICE)
        options = AggregateOptions(weights=(0.0,), rule="ties", consensus_method="unweighted")
        assert same(self.check_exact("aggregate", zero, [one], options)[0], zero)

    @pytest.mark.parametrize("kind", ["ties", "subnormal", "huge", "zeros"])
    @every_dtype
    def test_aggregate_small_of_unusual_values(self, kind: str, dtype: torch.dtype) -> None:
        base, experts = device_group(1027, dtype, 2, kind)
        for rule in ("sum", "ties"):
            self.check_aggregate(base, experts, rule)

    def test_mixed_dtypes_and_layouts_small(self) -> None:
        base = values(self.mixed_shape, "weights", torch.float32, 0).to(DEVICE)
        half = values(self.mixed_shape, "weights", torch.bfloat16, 5).to(DEVICE)
        for group in (
            (base.mT.contiguous().mT, [base.bfloat16(), base.double() * 1.5, (base + 1e-3).half()]),
            (half, [(half * 2).float(), half.half(), half]),
            (half, [half * 2, shifted(half), half * 0.5]),
        ):
            for rule in ("sum", "ties"):
                self.check_aggregate(*group, rule)
            self.check_threshold(*group, [base.numel() // 6, 0, base.numel()])
            self.check_stats(*group, eps_rel=0.3, kappa=1.5)

    def test_empty_tensors_small(self) -> None:
        empty = torch.zeros(0, device=DEVICE)
        assert self.run("aggregate", empty, [empty], AggregateOptions(weights=(1.0,)))[0].shape == (0,)
        stats = self.run("delta_stats", empty, [empty], DeltaStatsOptions(kappa=3.0))
        assert stats[1].tolist() == [[0, 0, 0, 0, 0]]
        thresholds = self.run("magnitude_threshold", empty, [empty], MagnitudeThresholdOptions(k=(0,)))[0]
        assert thresholds.tolist() == [math.inf]

    def test_values_that_are_not_finite_are_counted_small(self) -> None:
        for n in (1, self.lengths[-1]):
            base, experts = device_group(n, torch.bfloat16, 2)
            bad = [3, 700, 2051, -1] if n > 1 else [0]
            experts[1][bad] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])[: len(bad)].to(experts[0])
            ties = AggregateOptions(weights=(1.0, 1.0), rule="ties")
            assert self.run("aggregate", base, experts, ties)[1].tolist() == [0, 0, len(bad)]
            moments, counts, bins, sums = self.run("delta_stats", base, experts, DeltaStatsOptions(histogram=True))
            assert counts[:, 3].tolist() == [0, len(bad)]
            assert bool(moments[1, :4].isnan().all()) and bool(moments[0].isfinite().all())
            assert torch.equal(bins[:, -1], counts[:, 3])
            last_bins = torch.tensor([0.0, self.last_bin_of_nan], dtype=torch.float64, device=DEVICE)
            torch.testing.assert_close(sums[:, -1], last_bins, equal_nan=True)
            options = MagnitudeThresholdOptions(k=(min(n, 4),) * 2)
            thresholds, nonfinite = self.run("magnitude_threshold", base, experts, options)
            assert torch.equal(nonfinite, counts[:, 3])
            assert not thresholds[1].isfinite() and bool(thresholds[0].isfinite())
            base[0] = math.nan
            plain = AggregateOptions(weights=(1.0, 1.0))
            assert self.run("aggregate", base, experts, plain)[1].tolist() == [1, 0, len(bad)]

    @every_dtype
    @pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 129), (3, 40), (2, 128), (3, 1, 40), (16_385,)], ids=str)
    def test_random_mask_small_has_the_references_bits(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        base = values(shape, "ties", dtype, 1).to(DEVICE)
        experts = [base + values(shape, "weights", dtype, t).to(DEVICE) for t in range(4)]
        for epsilon, seed in (((0.0,) * 4, 2**63 - 1), ((0.0, 0.2, 0.1, 0.3), 2**32 + 1)):
            options = RandomMaskOptions(density=(0.0, 0.5, 0.25, 1.0), epsilon=epsilon, seed=seed)
            self.check_exact("random_mask", base, experts, options)

    @every_dtype
    def test_variance_mask_small_has_the_references_bits(self, dtype: torch.dtype) -> None:
        for n, n_experts, kind in ((0, 2, "weights"), (5, 1, "weights"), (1031, 3, "ties"), (self.large, 3, "weights")):
            base, experts = device_group(n, dtype, n_experts, kind)
            for density in (0.0, 0.3, 1.0):
                self.check_exact("variance_mask", base, experts, VarianceMaskOptions(density=density))

    @every_dtype
    def test_kept_moments_small(self, dtype: torch.dtype) -> None:
        low, high = (torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in ([1e-3, 0.0], [2e-3, math.inf]))
        for n in (0, 37, self.large):
            base, experts = device_group(n, dtype, 2)
            for lower, upper in ((None, None), (low, high), (None, high), (low, None)):
                for masks in (None, random_masks(experts)):
                    options = SparsityOptions(thresholds=lower, upper_thresholds=upper, masks=masks)
                    moments = self.run("kept_moments", base, experts, options)
                    expected = implementation("reference", "kept_moments")(base, experts, options)
                    torch.testing.assert_close(moments, expected, rtol=1e-13, atol=0)
                    assert same(moments, self.run("kept_moments", base, experts, options))

    @every_dtype
    @pytest.mark.parametrize("eps, eps_rel, kappa", [(0.0, 0.0, 2.0), (1e-3, 0.0, None), (1e-9, 0.5, 1.0)])
    def test_delta_stats_small(self, dtype: torch.dtype, eps: float, eps_rel: float, kappa: float | None) -> None:
        for n in (0, 1, 37, 3000):
            self.check_stats(*device_group(n, dtype, 2), eps=eps, eps_rel=eps_rel, kappa=kappa)

    @every_dtype
    @pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1, 37), (3, 37), (2, 64), (2, 2, 37)], ids=str)
    def test_delta_stats_small_of_rows(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.check_rows(shape, dtype)

    @every_dtype
    @pytest.mark.parametrize("kind", ["weights", "ties", "subnormal", "zeros"])
    def test_magnitude_threshold_small_is_exact(self, dtype: torch.dtype, kind: str) -> None:
        for n in self.threshold_lengths:
            base, experts = device_group(n, dtype, 2, kind)
            for k in {math.ceil(n / 100), math.ceil(0.6 * n)}:
                self.check_threshold(base, experts, [k] * 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_magnitude_threshold_of_every_rank(self, dtype: torch.dtype) -> None:
        n = 40_000
        base, experts = device_group(n, dtype, 2)
        for k in self.ranks:
            self.check_threshold(base, experts, [k, n - k])
