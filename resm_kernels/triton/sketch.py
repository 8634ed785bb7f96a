"""sketch on a GPU: Ω drawn in one launch, Δ·Ω in another that forms Δ in registers."""

from __future__ import annotations

from torch import Tensor

from resm_kernels.triton._delta_product import delta_product
from resm_kernels.triton.random_matrix import random_matrix


def sketch(base: Tensor | None, expert: Tensor, columns: int, seed: int, first_column: int) -> Tensor:
    """See `resm_kernels.ops.sketch` and its reference, whose arguments these are."""
    omega = random_matrix(expert.shape[1], columns, seed, first_column, expert.device)
    return delta_product(base, expert, omega).value
