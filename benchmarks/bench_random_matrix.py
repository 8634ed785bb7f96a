"""random_matrix, against torch.randn into memory that is there already."""

from __future__ import annotations

import pytest
import torch

from resm_kernels.ops import random_matrix
from resm_kernels.reference.random_matrix import RandomMatrixOptions
from resm_kernels.reference.random_matrix import random_matrix as reference

SHAPES = [(11008, 48), (11008, 47), (1024, 400)]


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def shape(request, benchmark):
    benchmark.group = f"random_matrix {request.param[0]}x{request.param[1]}"
    return request.param


def bench_torch_randn(timed, shape):
    out = torch.empty(shape)
    timed(lambda: torch.randn(shape, out=out), yardstick=True)


def bench_random_matrix(timed, shape):
    options = RandomMatrixOptions(n=shape[0], columns=shape[1], seed=0, first_column=0, device=torch.device("cpu"))
    assert torch.equal(random_matrix(*shape), reference(options))
    numbers = shape[0] * shape[1]
    # Philox's ten rounds of six operations make four numbers; a logarithm, root, sine and cosine and two products make
    # two of them normal.
    timed(lambda: random_matrix(*shape), work=(18 * numbers, 4 * numbers))
