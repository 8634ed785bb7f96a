"""The native functions check memory: no caller can make them read or write beyond a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import at_byte

from resm_kernels import _extension
from resm_kernels.reference.aggregate import AggregateOptions
from resm_kernels.reference.delta_stats import DeltaStatsOptions
from resm_kernels.reference.magnitude_threshold import MagnitudeThresholdOptions

native: Any = _extension.native
pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built")

BASE = torch.zeros(6)


@pytest.mark.parametrize(
    "merged, nonfinite, message",
    [
        (torch.empty(5), torch.empty(2, dtype=torch.int64), "merged: got 5 elements, need 6"),
        (torch.empty(12)[::2], torch.empty(2, dtype=torch.int64), "merged: is not contiguous"),
        (at_byte(BASE, 2), torch.empty(2, dtype=torch.int64), "merged: its memory begins at no multiple"),
        (torch.empty(6), torch.empty(2), "nonfinite: got dtype torch.float32, need torch.int64"),
        (torch.empty(6), torch.empty(3, dtype=torch.int64), "nonfinite: got 3 elements, need 2"),
        (torch.empty(6, dtype=torch.int32), torch.empty(2, dtype=torch.int64), "merged: got dtype torch.int32"),
        (torch.empty(6, device="meta"), torch.empty(2, dtype=torch.int64), "merged: need a tensor on the CPU"),
        (torch.empty(6), torch.empty(2, dtype=torch.int64, device="meta"), "nonfinite: need a tensor on the CPU"),
    ],
)
def test_outputs_of_the_wrong_kind_are_refused(merged: torch.Tensor, nonfinite: torch.Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        native.aggregate(BASE, [BASE], AggregateOptions(weights=(1.0,)), merged, nonfinite, 1)


@pytest.mark.parametrize(
    "base, experts, changed, message",
    [
        (BASE, [], {}, "experts: got none"),
        (BASE, [BASE[:5]], {}, "experts: got 5 elements, need 6"),
        (BASE, [BASE.int()], {}, "experts: got dtype torch.int32"),
        (BASE, [BASE.to("meta")], {}, "experts: need a tensor on the CPU"),
        (BASE, [BASE], {"weights": (1.0, 2.0)}, "weights: need one for each expert"),
        (BASE, [BASE], {"rule": "tie"}, "rule: got 'tie', need one of sum, ties"),
        (BASE, [BASE], {"consensus_method": "sum"}, "consensus_method: got 'sum', need one of weighted, unweighted"),
        (BASE, [BASE], {"thresholds": torch.zeros(2).double()}, "thresholds: need one number for each expert"),
        (BASE, [BASE], {"masks": (torch.zeros(1, dtype=torch.uint8),)}, "masks: got 1 elements, need 16"),
        (BASE, [BASE], {"masks": (torch.zeros(16),)}, "masks: got dtype torch.float32, need torch.uint8"),
    ],
)
def test_inputs_of_the_wrong_kind_are_refused(
    base: torch.Tensor, experts: list[torch.Tensor], changed: dict[str, Any], message: str
) -> None:
    options = AggregateOptions(**{"weights": (1.0,)} | changed)
    with pytest.raises((TypeError, ValueError), match=message):
        native.aggregate(base, experts, options, torch.empty(6), torch.empty(2, dtype=torch.int64), 1)


def test_ranks_and_missing_bases_are_refused() -> None:
    thresholds, nonfinite = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="k: need 0 to the number of elements"):
        native.magnitude_threshold(BASE, [BASE], MagnitudeThresholdOptions(k=(7,)), thresholds, nonfinite, 1)
    with pytest.raises(ValueError, match="base: got none, need a tensor"):
        native.delta_stats(None, [BASE], DeltaStatsOptions(), *[thresholds] * 4, 1)


def test_gram_matrices_of_the_wrong_size_are_refused() -> None:
    x, y = torch.empty(4, 3), torch.empty(4, 2)
    for other, g, message in [
        (y[:3], torch.empty(3, 2).double(), "y: need as many rows as x"),
        (y, torch.empty(3, 3).double(), "g: got 9 elements, need 6"),
        (None, torch.empty(3, 2).double(), "g: got 6 elements, need 9"),
        (y.double(), torch.empty(3, 2).double(), "y: got dtype torch.float64, need torch.float32"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            native.gram_matrix(x, other, g, 1)
