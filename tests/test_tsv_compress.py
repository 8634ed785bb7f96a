"""tsv_compress: against fusion-bench's copy of the authors' TSV-C, and consequences of its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from inputs import MATRICES, experts_with_spectra, merged_delta, relative, same_bits, with_spectrum
from oracles import fusion_bench
from torch import Tensor

from resm_kernels import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def fusion_bench_tsvc(task_vectors: list[Tensor], share: float) -> list[Tensor]:
    """The task vectors, each compressed and multiplied out again."""
    module = fusion_bench("task_singular_vector.utils.TSVC_utils")
    named = {str(t): SimpleNamespace(vector={"w": vector}) for t, vector in enumerate(task_vectors)}
    merged = [parts["w"] for parts in module.compress_tv(named, share).values()]
    return [part["dim1"] if "dim1" in part else (part["u"] * part["s"]) @ part["v"] for part in merged]


@pytest.mark.parametrize("decomposition", ["gram", "exact"])
@pytest.mark.parametrize("n_experts", [2, 3, 5])
@pytest.mark.parametrize("shape", [*MATRICES, (7, 30)], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5])
def test_experts_equal_fusion_bench(shape: tuple[int, int], n_experts: int, alpha: float, decomposition: str) -> None:
    base, experts = experts_with_spectra(*shape, n_experts, alpha, seed=3, dtype=torch.float64)
    expected = fusion_bench_tsvc([e - base for e in experts], 1 / n_experts)
    parameters = {"decomposition": decomposition}
    for expert, one in zip(experts, expected, strict=True):
        merged = merged_delta(base, [expert], "tsv_compress", share=1 / n_experts, **parameters)
        assert relative(merged, one) <= 1e-10
        merged = merged_delta(base, [expert], "tsv_compress", rank=min(shape) // n_experts, **parameters)
        assert relative(merged, one) <= 1e-10
    weight = [1.0, -0.5, 2.0, 0.0, 1.0][:n_experts]
    total = sum((w * one for w, one in zip(weight, expected, strict=True)), torch.zeros_like(base))
    assert relative(merged_delta(base, experts, "tsv_compress", weight=weight, **parameters), total) <= 1e-10


def test_vectors_stay_whole_as_in_fusion_bench() -> None:
    base, experts = torch.zeros(9), [torch.arange(9.0)]
    assert torch.equal(merge(base, experts, "tsv_compress", share=0.1), fusion_bench_tsvc(experts, 0.1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_expert_without_a_rank_comes_back(dtype: torch.dtype) -> None:
    base, experts = experts_with_spectra(40, 31, 1, dtype=dtype)
    for parameters in ({}, {"share": 1.0}, {"rank": 31}, {"rank": 500}):
        torch.testing.assert_close(merge(base, experts, "tsv_compress", **parameters), experts[0])


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_rank_beyond_the_numerical_rank_loses_nothing(shape: tuple[int, int]) -> None:
    change = with_spectrum(*shape, torch.tensor([3.0, 2.0, 1.0]), seed=1).float()
    zero = torch.zeros_like(change)
    for k in (3, 7):
        assert relative(merge(zero, [change], "tsv_compress", rank=k), change) <= 1e-6
    assert int(torch.linalg.matrix_rank(merged_delta(zero, [change], "tsv_compress", rank=2), rtol=1e-5)) == 2


def test_is_the_best_approximation_of_its_rank() -> None:
    base, experts = experts_with_spectra(40, 31, 1, dtype=torch.float64)
    values = torch.linalg.svdvals(experts[0] - base)
    for k in (1, 5, 30):
        error = merged_delta(base, experts, "tsv_compress", rank=k) - (experts[0] - base)
        assert float(error.norm()) == pytest.approx(float(values[k:].norm()), rel=1e-9)


def test_keeps_at_least_one_direction() -> None:
    for parameters in ({"share": 0.0}, {"share": 0.01}, {"rank": 1}):
        base, experts = experts_with_spectra(20, 12, 2, dtype=torch.float64)
        merged = merged_delta(base, experts[:1], "tsv_compress", **parameters)
        assert int(torch.linalg.matrix_rank(merged, rtol=1e-9)) == 1
    base, experts = experts_with_spectra(2, 12, 5, dtype=torch.float64)  # more experts than directions
    expected = [fusion_bench_tsvc([e - base], 0.5)[0] for e in experts]
    assert relative(merged_delta(base, experts, "tsv_compress"), sum(expected, torch.zeros_like(base))) <= 1e-10


def test_shares_are_not_lost_to_rounding() -> None:
    base, experts = experts_with_spectra(100, 100, 1, dtype=torch.float64)
    assert 0.29 * 100 < 29
    merged = merge(base, experts, "tsv_compress", share=0.29)
    assert same_bits(merged, merge(base, experts, "tsv_compress", rank=29))
