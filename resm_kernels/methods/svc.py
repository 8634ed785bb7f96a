"""SVC: singular value calibration of any method's result (Li et al., arXiv 2602.05536, ICML 2026)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import eigen_list, gram, matmul
from resm_kernels.linalg.threads import run
from resm_kernels.methods._common import LAMBDA, WEIGHT
from resm_kernels.methods._registry import Method, Parameter
from resm_kernels.methods._spectral import is_spectral, join
from resm_kernels.methods._task_matrices import check
from resm_kernels.ops.inner_products import inner_products

_PREFIX = "inner_"
_DIRECTIONS = 256
"""Directions whose responses are formed at a time."""


def calibrate(merged: Tensor, deltas: Sequence[Tensor], alpha: float = 1.0) -> Tensor:
    """M with every singular value σ_r scaled by γ_r = T / Σ_t max(α, s_rt): what experts share is counted once.

    With M = Σ_r σ_r·u_r·v_rᵀ, expert t answers to direction r with a_rt = u_rᵀΔ_t and M with a_r = u_rᵀM = σ_r·v_rᵀ;
    s_rt = ⟨a_r, a_rt⟩ / ‖a_rt‖² is how many times M holds the expert's answer. Singular vectors stay as they are, so
    that with U = [u_1 …] the result is U·diag(γ)·Uᵀ·M: eigenvectors of the smaller Gram matrix and products.

    An answer of less than 1e-6 of ‖Δ_t‖_F is none and has s_rt = 0 (the authors and fusion-bench hold ‖a_rt‖² above
    1e-12, whatever the size of the task vectors); singular values up to 1e-6 of the largest stay as they are. Where
    singular values of M coincide, its singular vectors and hence the result are not unique.

    Args:
        merged: M, (m, n).
        deltas: Δ_1 … Δ_T, the experts' task vectors, (m, n) each.
        alpha: α > 0, what M counts an expert's answer at least: 1 never amplifies a direction. The authors take 1 for
            task vectors that were summed or for TSV-M, 1/T for those that were averaged.

    Returns:
        (m, n) in float64.

    Raises:
        ValueError: `alpha` is not positive, or shapes differ.

    Determinism: the same bits for any number of threads.
    """
    if not alpha > 0:
        raise ValueError(f"alpha: got {alpha!r}, need a number above 0")
    if merged.ndim != 2 or not deltas or any(d.shape != merged.shape for d in deltas):
        shapes = [list(d.shape) for d in deltas]
        raise ValueError(
            f"deltas: got shapes {shapes}, need one or more matrices of merged's shape {list(merged.shape)}"
        )
    merged = merged.double()
    m, n = merged.shape
    values, vectors = eigen_list([gram(merged if m > n else merged.mT)])[0]
    values = values.clamp(min=0).sqrt()
    kept = values > RANK_TOLERANCE * values[:1]
    left = vectors
    if m > n:
        left = matmul(merged, vectors).mul_(torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0))
    counted = torch.zeros_like(values)
    for delta in deltas:
        counted += _counts(left, merged, delta.double()).clamp(min=alpha)
    factors = torch.where(kept, len(deltas) / counted, 1.0)
    if m > n:
        return matmul(matmul(merged, vectors).mul_(factors), vectors.mT)
    return matmul(vectors * factors, matmul(vectors.mT, merged))


def _counts(left: Tensor, merged: Tensor, delta: Tensor) -> Tensor:
    """s_r of one expert for the directions that are `left`'s columns."""
    least = RANK_TOLERANCE**2 * float(inner_products(None, [delta])[0, 0])

    def of(start: int) -> Tensor:
        directions = left[:, start : start + _DIRECTIONS].mT
        own = directions @ delta
        size = own.square().sum(1)
        some = size > least
        return torch.where(some, (own * (directions @ merged)).sum(1) / torch.where(some, size, 1.0), 0.0)

    starts = range(0, left.shape[1], _DIRECTIONS)
    return torch.cat(run([functools.partial(of, start) for start in starts], left.device))


def svc(
    base: Tensor,
    experts: list[Tensor],
    *,
    inners: Mapping[str, Method],
    inner: str,
    alpha: float,
    lambda_: float,
    spectral: bool,
    name: str,
    seed: int,
    out_dtype: torch.dtype | None,
    **given: Any,
) -> Tensor:
    """θ = θ₀ + λ·`calibrate`(θ_inner − θ₀, Δ_1 … Δ_T, α), θ_inner what the method `inner` makes of the same tensors.

    The inner method's parameters but for weight are set with the prefix ``inner_`` (inner_density: 0.2) and have its
    defaults for that tensor otherwise; it draws what it draws alone. It runs in float64, so that θ_inner − θ₀ is exact.
    Tensors that are no matrices, and those with ``spectral: false``, as the authors have embeddings, are the inner
    method's, scaled by λ.

    Raises:
        TypeError, ValueError: An argument of the wrong type, dtype, shape, device or range, or unknown to `inner`.
        NonFiniteError: An input has NaN or infinite values.

    Determinism: the inner method's.
    """
    check(base, experts, out_dtype)
    if not alpha > 0:
        raise ValueError(f"alpha: got {alpha!r}, need a number above 0")
    method = inners[inner]
    passed = _inner_parameters(method, given)
    calibrated = is_spectral(base, 1, spectral) and base.numel() > 0
    if not calibrated and lambda_ == 1:
        return method(base, experts, out_dtype=out_dtype, name=name, seed=seed, **passed)
    base64 = base.double()
    own = [expert.to(torch.float64, copy=True) for expert in experts]
    merged = method(base64, own, out_dtype=torch.float64, name=name, seed=seed, **passed).sub_(base64)
    if calibrated:
        merged = calibrate(merged, [expert.sub_(base64) for expert in own], alpha)
    return join(base, merged, lambda_, out_dtype)


def _inner_parameters(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were given, as the inner method's keyword arguments; lists filled up with its default."""
    passed = {}
    for key, value in given.items():
        if value is None or (isinstance(value, list) and all(v is None for v in value)):
            continue
        parameter = method.parameter(key.removeprefix(_PREFIX))
        if parameter.ignored:
            raise ValueError(f"{key}: {method.name} takes {parameter.name!r} from recipes and ignores it")
        if isinstance(value, list):
            value = [parameter.default if v is None else v for v in value]
            if not parameter.per_expert:
                if len(set(value)) > 1:
                    raise ValueError(f"{key}: got {value}, need one value, as {method.name} has one for all experts")
                value = value[0]
        passed[parameter.keyword] = value
    return passed


def _passed_through(inners: Sequence[Method]) -> tuple[Parameter, ...]:
    """One parameter for each name that inner methods have; what values it takes is for the inner method to check.

    Left out are names that some have as a number and others as a choice; there is none (tests/test_svc.py).
    """
    found: dict[str, list[tuple[str, Parameter]]] = {}
    for method in inners:
        for parameter in (p for p in method.parameters if not p.ignored):
            found.setdefault(parameter.name, []).append((method.name, parameter))
    passed = []
    for name, owners in found.items():
        kind = _common_kind([parameter.kind for _, parameter in owners])
        if kind is not None:
            doc = f"{name} of the inner method ({', '.join(owner for owner, _ in owners)}); its default if left out"
            key = name if name == WEIGHT.name else _PREFIX + name
            passed.append(Parameter(key, kind, None, doc, per_expert=any(p.per_expert for _, p in owners)))
    return tuple(passed)


def _common_kind(kinds: Sequence[type | tuple[str, ...]]) -> type | tuple[str, ...] | None:
    if all(isinstance(kind, tuple) for kind in kinds):
        return tuple(dict.fromkeys(choice for kind in kinds if isinstance(kind, tuple) for choice in kind))
    distinct = set(kinds)
    if len(distinct) == 1:
        return kinds[0]
    return float if distinct == {int, float} else None


def post_processor(inners: Sequence[Method]) -> Method:
    """The method `svc`, over these methods."""
    by_name = {method.name: method for method in inners}

    def workspace(shape: tuple[int, ...], n_experts: int) -> int:
        """The inner method's, of whichever needs most, over float64 tensors; or Gram matrix, basis and products."""
        own = max(method.workspace(shape, n_experts) for method in inners)
        if len(shape) != 2:
            return own
        m, n = shape
        held = 8 * (n_experts + 3) * m * n
        return held + max(own, (32 << 20) + 24 * m * n + 56 * min(m, n) ** 2)

    return Method(
        name="svc",
        title="SVC",
        reference="https://arxiv.org/abs/2602.05536",
        needs_base=True,
        parameters=(
            Parameter("inner", tuple(by_name), "task_arithmetic", "the method whose result is calibrated"),
            Parameter(
                "alpha",
                float,
                1.0,
                "least count of an expert's answer, above 0; 1/T where the inner method averages",
                minimum=0.0,
            ),
            LAMBDA,
            Parameter("spectral", bool, True, "false leaves this tensor as the inner method has it, as vectors are"),
            *_passed_through(inners),
        ),
        function=functools.partial(svc, inners=by_name),
        workspace=workspace,
        wraps=True,
    )
