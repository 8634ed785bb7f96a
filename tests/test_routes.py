"""Options of subspaces are checked once, when they are made. The routes' misses are tested with each route."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from resm_kernels.linalg import DECOMPOSITIONS
from resm_kernels.linalg.routes import SubspaceOptions


def test_defaults_and_every_method() -> None:
    assert SubspaceOptions() == SubspaceOptions("auto", 0.0, None, None, 0)
    assert [SubspaceOptions(method).method for method in DECOMPOSITIONS] == ["auto", "gram", "exact", "randomized"]
    with pytest.raises(FrozenInstanceError):
        SubspaceOptions().accuracy = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("message", "values"),
    [
        ("method: got 'projector', need one of auto, gram, exact, randomized", {"method": "projector"}),
        ("accuracy: got -1.0, need a finite number of at least 0", {"accuracy": -1.0}),
        ("accuracy: got nan", {"accuracy": math.nan}),
        ("accuracy: got inf", {"accuracy": math.inf}),
        ("oversampling: got -1, need None or a number of at least 0", {"oversampling": -1}),
        ("power_iterations: got -2, need None or a number of at least 0", {"power_iterations": -2}),
    ],
)
def test_values_out_of_range_are_refused_by_name(message: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        SubspaceOptions(**values)
