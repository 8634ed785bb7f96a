"""tsvm: against fusion-bench's TSV-M, and as a special case of RESM.

fusion-bench takes fp32 SVDs of task vectors and of concatenated bases; their errors grow with the condition number.
`PEER` is the largest accepted difference, relative to the merged task vector's norm.
"""

from __future__ import annotations

import pytest
import torch
from inputs import experts_with_spectra, randn, relative, same_bits
from oracles import fusion_bench

from resm_kernels import merge
from resm_kernels.methods.resm import layer_plan

pytestmark = pytest.mark.usefixtures("one_thread")

PEER = 1e-3


def fusion_bench_tsvm(task_vectors: list[torch.Tensor]) -> torch.Tensor:
    module = fusion_bench("task_singular_vector.utils.TSVM_utils")
    named = [{"w": vector} for vector in task_vectors]
    merged: torch.Tensor = module.compute_and_sum_svd_mem_reduction(named, accelerator="cpu")["w"]
    return merged


@pytest.mark.parametrize("n_experts", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 48), (64, 40), (33, 50), (128, 96)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
def test_equals_fusion_bench(shape: tuple[int, int], n_experts: int, alpha: float) -> None:
    if alpha == 0.0:  # a random matrix: singular values as noise has them
        base = torch.zeros(shape)
        experts = [randn(*shape, seed=10 * t) for t in range(n_experts)]
    else:
        base, experts = experts_with_spectra(*shape, n_experts, alpha, seed=3)
    expected = fusion_bench_tsvm([e - base for e in experts])
    for decomposition in ("gram", "exact"):
        merged = merge(base, experts, "tsvm", decomposition=decomposition, out_dtype=torch.float64) - base.double()
        assert relative(merged, expected) <= PEER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vectors_are_averaged_as_in_fusion_bench(dtype: torch.dtype) -> None:
    base, experts = randn(30, seed=0, dtype=dtype), [randn(30, seed=t, dtype=dtype) for t in (1, 2, 3)]
    expected = base.float() + fusion_bench_tsvm([e.float() - base.float() for e in experts])
    torch.testing.assert_close(merge(base, experts, "tsvm", out_dtype=torch.float32), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(40, 28), (28, 40), (2, 9), (17,), ()], ids=str)
def test_is_resm_without_its_additions_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = randn(*shape, seed=0, dtype=dtype)
    experts = [base + 0.1 * randn(*shape, seed=t, dtype=dtype) for t in (1, 2, 3)]
    shared = {"weight": [1.0, 0.5, 2.0], "lambda_": 0.7}
    expected = merge(base, experts, "resm", beta=0.0, gamma=0.0, accuracy=0.0, **shared)
    assert same_bits(merge(base, experts, "tsvm", **shared), expected)


def test_half_precision_does_not_loosen_its_accuracy() -> None:
    base, experts = experts_with_spectra(256, 240, 2, dtype=torch.bfloat16)
    merged = merge(base, experts, "tsvm", out_dtype=torch.float32)
    assert same_bits(merged, merge(base, experts, "tsvm", accuracy=0.0, out_dtype=torch.float32))
    assert not torch.equal(merged, merge(base, experts, "tsvm", accuracy=1e-3, out_dtype=torch.float32))


def test_keeps_an_equal_share_of_directions() -> None:
    base, experts = experts_with_spectra(40, 31, 3)
    assert layer_plan(base, experts, beta=0.0, gamma=0.0).ranks == [10, 10, 10]
    merged = merge(base.double(), [e.double() for e in experts], "tsvm") - base.double()
    assert int(torch.linalg.matrix_rank(merged, rtol=1e-9)) == 30
