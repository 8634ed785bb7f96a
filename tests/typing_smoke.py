"""A user's script, which scripts/build_wheels.py checks with `mypy --strict` against the installed wheel.

`assert_type` fails where a result is `Any`, for example because a lazily loaded attribute has no annotation. The script
also runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import resm_kernels
from resm_kernels import linalg, ops


def merge_tensors(base: Tensor, experts: list[Tensor]) -> Tensor:
    merged = resm_kernels.merge(base, experts, method="ties", density=0.2, out_dtype=torch.bfloat16)
    assert_type(merged, Tensor)
    state = resm_kernels.merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], "resm", lambda_=0.7)
    assert_type(state, dict[str, Tensor])
    return state["w"]


def decompose(base: Tensor, expert: Tensor) -> float:
    result = resm_kernels.truncated_svd(base, expert, rank=2)
    assert_type(result.singular_values, Tensor)
    assert_type(resm_kernels.svd_lowrank(expert, q=2), tuple[Tensor, Tensor, Tensor])
    assert_type(linalg.truncated_svd(base, expert, rank=2).error, float)
    return float(result.singular_values.max())


def call_ops(base: Tensor, experts: list[Tensor]) -> Tensor:
    thresholds = ops.magnitude_threshold(base, experts, k=10)
    assert_type(thresholds, Tensor)
    stats = ops.delta_stats(base, experts, histogram=True)
    assert_type(stats.n_small, Tensor)
    merged = ops.aggregate(base, experts, [1.0] * len(experts), thresholds=thresholds)
    assert_type(merged, Tensor)
    return merged


def main() -> None:
    base = torch.zeros(16, 8)
    experts = [torch.randn(16, 8) for _ in range(3)]
    assert merge_tensors(base, experts).shape == call_ops(base, experts).shape == base.shape
    assert decompose(base, experts[0]) > 0
    try:
        resm_kernels.merge(base, [base * float("nan")], "linear")
    except resm_kernels.NonFiniteError as error:
        assert_type(error.count, int)
    print(resm_kernels.__version__, resm_kernels.methods.names())


if __name__ == "__main__":
    main()
