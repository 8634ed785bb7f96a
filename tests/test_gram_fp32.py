"""Dominant pairs from Gram matrices in fp32: their estimated residuals and bases, and misses."""

from __future__ import annotations

import pytest
import torch
from inputs import power_law, same_bits, with_spectrum

from resm_kernels.linalg.gram_fp32 import gram_pairs
from resm_kernels.linalg.routes import Miss, Pair

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("shape", [(256, 256), (400, 256), (512, 512)], ids=str)
def test_estimated_residuals_of_gram_matrices_in_fp32_are_not_too_low(shape: tuple[int, int], alpha: float) -> None:
    matrix = with_spectrum(*shape, power_law(min(shape), alpha), seed=3).float()
    size = float(matrix.double().norm())
    for k in (3, shape[1] // 12, shape[1] // 4, shape[1] // 3):
        pair = gram_pairs([matrix], [k], [size], 1.0)[0]
        assert isinstance(pair, Pair)
        wide, left, core, right = (x.double() for x in (matrix, pair.left, pair.core, pair.right))
        true = float((wide.mT @ left - right @ core.mT).norm()) / size
        # 2⁻²² is the rounding of the products that form left and right.
        assert true <= pair.residual + 2.0**-22 and pair.residual <= 8 * true + 2.0**-22
        assert isinstance(gram_pairs([matrix], [k], [size], pair.residual / 2)[0], Miss)
        for basis in (left, right):
            assert float((basis.mT @ basis - torch.eye(k)).norm()) <= k * 2.0**-23 + 3e-6


def test_several_matrices_give_what_each_gives_alone_and_misses_are_named() -> None:
    flat = with_spectrum(90, 64, power_law(64, 0.5), seed=1).float()
    vanishing = with_spectrum(90, 64, 0.5 ** torch.arange(64).double(), seed=2).float()  # σ_30 is 2e-9·σ_1
    norms = [float(flat.norm()), float(vanishing.norm())]
    pair, miss = gram_pairs([flat, vanishing], [8, 30], norms, 1e-3)
    alone = gram_pairs([flat], [8], norms[:1], 1e-3)[0]
    assert isinstance(pair, Pair) and isinstance(alone, Pair)
    assert same_bits(pair.left, alone.left) and same_bits(pair.core, alone.core) and pair.norm == norms[0]
    assert miss == Miss("fp32 is not within 0.001")
