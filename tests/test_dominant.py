"""Dominant eigenpairs of Gram matrices and their images, of one matrix and of several side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import power_law, same_bits, with_spectrum
from subspace_contract import ROUNDING, SINGLE, distance

from resm_kernels.linalg.dominant import dominant_list

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eigenpairs_and_images(threads: int, dtype: torch.dtype, use_threads: Callable[[int], None]) -> None:
    use_threads(threads)
    shapes, ranks = [(70, 50), (60, 40), (33, 33)], [5, 40, 1]
    matrices = [with_spectrum(m, n, power_law(n, 0.5), seed=m).to(dtype) for m, n in shapes]
    bound = ROUNDING if dtype == torch.float64 else SINGLE
    together = dominant_list(matrices, ranks, dtype)
    for a, k, d in zip(matrices, ranks, together, strict=True):
        wide = a.double()
        assert {d.values.dtype, d.vectors.dtype, d.image.dtype} == {dtype}
        assert distance(d.values, torch.linalg.svdvals(wide)[:k].square()) <= bound
        assert distance(wide.mT @ (wide @ d.vectors.double()), d.vectors.double() * d.values.double()) <= bound
        assert distance(d.image, wide @ d.vectors.double()) <= bound
        assert d.energy == pytest.approx(float(wide.square().sum()), rel=1e-6)
        (alone,) = dominant_list([a], [k], dtype)
        assert same_bits(d.vectors, alone.vectors) and same_bits(d.image, alone.image) and d.energy == alone.energy
    assert dominant_list([], [], dtype) == []
