"""Y = Δ·Ω with a random matrix Ω that is drawn where it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from resm_kernels import _extension
from resm_kernels.checks import check_group, check_whole
from resm_kernels.memory import NativeTensors
from resm_kernels.ops._library import register
from resm_kernels.ops.random_matrix import MAX_COLUMNS, MAX_SEED
from resm_kernels.reference.sketch import sketch as _reference


def sketch(base: Tensor | None, expert: Tensor, columns: int, *, seed: int = 0, first_column: int = 0) -> Tensor:
    """Y = Δ·Ω, Δ = θ_t − θ₀: the random range sample of randomized SVDs (arXiv 0909.4061, algorithm 4.1).

    Ω is `random_matrix(n, columns, seed=…, first_column=…)`, whose entries are a sum of 64 fair coins, standardised.

    Args:
        base: θ₀, (m, n), bf16, fp16, fp32 or float64; None for Δ = θ_t. A tensor that is not contiguous is copied.
        expert: θ_t, of base's shape and device, of any of these dtypes. Δ is formed in fp32 (if either is float64, in
            float64, then rounded) a tile at a time and never stored.
        columns: How many columns of Ω to multiply by, from 0.
        seed: Which Ω, from 0 to 2⁶³ − 1.
        first_column: The first of these columns: `sketch(…, k)` and `sketch(…, l, first_column=k)` side by side are
            `sketch(…, k + l)`, bit for bit. first_column + columns is at most 2³³.

    Returns:
        Y, (m, columns) fp32, contiguous. Values that are not finite are not looked for: a row of Δ that has one gives
        a row of Y without a finite value.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range.

    Precision: products are added up in fp32 over blocks of 256 columns of Δ in order, by fused multiply-adds, and the
    blocks' sums in their order: |error| ≤ (min(n, 256) + ⌈n/256⌉ + 1)·2⁻²⁴·(|Δ|·|Ω|) to first order.
    On a GPU sums run over parts of neighbours, three TF32 products for each fp32 one: 2⁻²¹ of the same sum more.

    Memory: besides the inputs and Y, at most 8 MiB of Ω (of a wide one 256 rows) and 64 KiB a thread on a CPU. Where
    no native kernel is live, the reference forms Δ and Ω whole, in float64.

    Determinism: Ω is the same on every device. Y has the same bits for any number of threads and for AVX2 and
    AVX-512; the baseline instruction set has no fused multiply-add and differs within that bound, as do other
    devices.
    """
    check_matrices(base, expert)
    first = check_whole("first_column", first_column, MAX_COLUMNS)
    count = check_whole("columns", columns, MAX_COLUMNS - first)
    y: Tensor = torch.ops.resm_kernels.sketch(base, expert, count, check_whole("seed", seed, MAX_SEED), first)
    return y


def check_factor(name: str, factor: Tensor, expert: Tensor, side: int, operation: str) -> None:
    """Raise unless `factor` is an fp32 matrix with as many rows as `expert` has rows (side 0) or columns (side 1)."""
    shape, like = (("(m, l) with m", "rows"), ("(n, c) with n", "columns"))[side]
    need = f"{shape} = {expert.shape[side]} like expert's {like}"
    check_matrix(name, factor, operation, need)
    if factor.shape[0] != expert.shape[side]:
        raise ValueError(f"{name}: got shape {list(factor.shape)}, need {need}")
    if factor.device != expert.device:
        raise ValueError(f"{name}: is on {factor.device}, need {expert.device} like expert")


def check_matrix(name: str, x: Tensor, operation: str, need: str = "(n, c)") -> None:
    """Raise unless x is a dense fp32 matrix without a gradient to record; `need` says its shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, need a tensor")
    if x.dtype != torch.float32 or x.layout != torch.strided:
        got = f"a {x.layout} tensor of {x.dtype}"
        raise TypeError(f"{name}: got {got}, need a dense (strided) one of torch.float32")
    if x.ndim != 2:
        raise ValueError(f"{name}: got shape {list(x.shape)}, need {need}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad, but {operation} records no gradient; pass {name}.detach()")


def check_matrices(base: Tensor | None, expert: Tensor) -> None:
    """`check_group` of one expert by the name `expert`; raise also unless it is a matrix."""
    check_group(base, [expert], names=["expert"])
    if expert.ndim != 2:
        raise ValueError(f"expert: got shape {list(expert.shape)}, need a matrix (m, n)")


def _native(base: Tensor | None, expert: Tensor, columns: int, seed: int, first_column: int) -> Tensor:
    assert _extension.native is not None
    m, n = expert.shape
    y = torch.empty((m, columns), dtype=torch.float32)
    b, e = NativeTensors([] if base is None else [base]), NativeTensors([expert])
    _extension.native.sketch(
        b.pointers,
        b.dtypes,
        e.pointers,
        e.dtypes,
        e.lengths,
        m,
        n,
        columns,
        seed,
        first_column,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


register(
    "sketch",
    "(Tensor? base, Tensor expert, int columns, int seed, int first_column) -> Tensor",
    reference=_reference,
    cpu=_native,
    gpu=("triton",),
)
