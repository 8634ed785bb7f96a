"""SVC: singular value calibration of any method's result (Li et al., arXiv 2602.05536, ICML 2026)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final

import torch
from torch import Tensor

from resm_kernels.elementwise.inputs import check_inputs
from resm_kernels.linalg.polar import RANK_TOLERANCE
from resm_kernels.linalg.products import eigen_list, gram, matmul
from resm_kernels.linalg.threads import run
from resm_kernels.methods._aliases import Lambda
from resm_kernels.methods._method import Method
from resm_kernels.methods._parameter import Parameter
from resm_kernels.methods._registry import register
from resm_kernels.methods._signature import Option, read_signature
from resm_kernels.ops.inner_products import inner_products
from resm_kernels.spectral.low_rank import join
from resm_kernels.spectral.task_matrices import is_spectral

_PREFIX: Final = "inner_"
_DIRECTIONS: Final = 256
"""How many directions' answers are computed at a time."""


def calibrate(merged: Tensor, deltas: Sequence[Tensor], alpha: float = 1.0) -> Tensor:
    """M with every singular value σ_r scaled by γ_r = T / Σ_t max(α, s_rt), so that shared directions count once.

    With M = Σ_r σ_r·u_r·v_rᵀ, expert t answers to direction r with a_rt = u_rᵀΔ_t and M with a_r = u_rᵀM = σ_r·v_rᵀ;
    s_rt = ⟨a_r, a_rt⟩ / ‖a_rt‖² is how many times M holds the expert's answer. Singular vectors stay as they are, so
    that with U = [u_1 …] the result is U·diag(γ)·Uᵀ·M: eigenvectors of the smaller Gram matrix and products.

    An answer of less than 1e-6 of ‖Δ_t‖_F counts as none and has s_rt = 0 (the authors and fusion-bench hold ‖a_rt‖²
    above 1e-12, whatever the size of the task vectors); singular values up to 1e-6 of the largest are kept. Where
    singular values of M coincide, its singular vectors and hence the result are not unique.

    Args:
        merged: M, (m, n).
        deltas: Δ_1 … Δ_T, the experts' task vectors, (m, n) each.
        alpha: α > 0, the least count of an expert's answer: 1 never amplifies a direction. The authors take 1 for
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
    nonzero = values > RANK_TOLERANCE * values[:1]
    left = vectors
    if m > n:
        left = matmul(merged, vectors).mul_(torch.where(nonzero, 1 / torch.where(nonzero, values, 1.0), 0.0))
    counts = torch.zeros_like(values)
    for delta in deltas:
        counts += _counts(left, merged, delta.double()).clamp(min=alpha)
    factors = torch.where(nonzero, len(deltas) / counts, 1.0)
    if m > n:
        return matmul(matmul(merged, vectors).mul_(factors), vectors.mT)
    return matmul(vectors * factors, matmul(vectors.mT, merged))


def _counts(left: Tensor, merged: Tensor, delta: Tensor) -> Tensor:
    """s_r of one expert for the directions that are `left`'s columns."""
    smallest = RANK_TOLERANCE**2 * float(inner_products(None, [delta])[0, 0])

    def count(start: int) -> Tensor:
        directions = left[:, start : start + _DIRECTIONS].mT
        answers = directions @ delta
        squared_norms = answers.square().sum(1)
        answered = squared_norms > smallest
        products = (answers * (directions @ merged)).sum(1)
        return torch.where(answered, products / torch.where(answered, squared_norms, 1.0), 0.0)

    starts = range(0, left.shape[1], _DIRECTIONS)
    return torch.cat(run([functools.partial(count, start) for start in starts], left.device))


def svc(
    base: Tensor,
    experts: list[Tensor],
    *,
    inner: Method,
    inner_values: Mapping[str, Any],
    alpha: Annotated[
        float, Option("least count of an expert's answer, above 0; 1/T where the inner method averages", minimum=0.0)
    ] = 1.0,
    lambda_: Lambda = 1.0,
    spectral: Annotated[bool, Option("false leaves this tensor as the inner method has it, as vectors are")] = True,
    seed: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """θ = θ₀ + λ·`calibrate`(θ_inner − θ₀, Δ_1 … Δ_T, α), θ_inner the result of the method `inner` for these tensors.

    `weight` is the inner method's; its other parameters have the prefix ``inner_`` (inner_density: 0.2), and the
    inner method's defaults for that tensor if they are left out. It draws the random numbers that it draws without SVC.
    It runs in float64, so that θ_inner − θ₀ is exact. Tensors that are no matrices are not calibrated, nor are those
    with ``spectral: false``, as the authors have embeddings: their θ_inner − θ₀ is scaled by λ.

    Raises:
        TypeError, ValueError: `alpha` is 0, or an argument is not one that `inner` takes.

    Determinism: the inner method's.
    """
    check_inputs(base, experts, out_dtype)
    if not alpha > 0:
        raise ValueError(f"alpha: got {alpha!r}, need a number above 0")
    values = dict(inner_values, seed=seed) if inner.draws else inner_values
    calibrated = is_spectral(base, 1, spectral) and base.numel() > 0
    if not calibrated and lambda_ == 1:
        return inner.function(base, experts, out_dtype=out_dtype, **values)
    base64 = base.double()
    experts64 = [expert.to(torch.float64, copy=True) for expert in experts]
    merged = inner.function(base64, experts64, out_dtype=torch.float64, **values).sub_(base64)
    if calibrated:
        merged = calibrate(merged, [expert.sub_(base64) for expert in experts64], alpha)
    return join(base, merged, lambda_, out_dtype)


@dataclass(frozen=True)
class _Calibration(Method):
    """The method `svc`, whose values are resolved by the parameters of the inner method that they name.

    Attributes:
        inners: The methods that may be calibrated, by name.
    """

    inners: Mapping[str, Method] = field(default_factory=dict)

    def resolve(self, n_experts: int, arguments: dict[str, Any], name: str = "") -> dict[str, Any]:
        """`Method.resolve`, with the inner method as `inner` and its arguments as `inner_values`."""
        inner_keys = {p.keyword for p in self.parameters if p.name == "weight" or p.name.startswith(_PREFIX)}
        inner_arguments = {key: value for key, value in arguments.items() if key in inner_keys}
        values = super().resolve(n_experts, {k: v for k, v in arguments.items() if k not in inner_keys}, name)
        inner = self.inners[values["inner"]]
        renamed = replace(inner, parameters=tuple(replace(p, name=_key(p.name)) for p in inner.parameters))
        inner_values = renamed.resolve(n_experts, _present(renamed, inner_arguments), name)
        keywords = {_key(p.name): p.keyword for p in inner.parameters}
        calibration = {key: value for key, value in values.items() if key not in inner_keys}
        return calibration | {"inner": inner, "inner_values": {keywords[k]: v for k, v in inner_values.items()}}


def _key(name: str) -> str:
    """What recipes call a parameter of the inner method."""
    return name if name == "weight" else _PREFIX + name


def _present(method: Method, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the inner method without those left out; None in a list becomes its default."""
    present = {}
    for key, value in arguments.items():
        values = value.tolist() if isinstance(value, Tensor) else value
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        if all(v is None for v in values):
            continue
        parameter = method.parameter(key)
        if parameter.ignored:
            recipe_name = key.removeprefix(_PREFIX)
            raise ValueError(f"{key}: {method.name} takes {recipe_name!r} from recipes and ignores it")
        values = [parameter.default if v is None else v for v in values]
        if not parameter.per_expert and any(v != values[0] for v in values):
            raise ValueError(f"{key}: got {values}, need one value, as {method.name} has one for all experts")
        is_list = parameter.per_expert and isinstance(value, (list, tuple, Tensor))
        present[key] = values if is_list else values[0]
    return present


def _passed_through(inners: Sequence[Method]) -> tuple[Parameter, ...]:
    """One parameter for each name that inner methods have; values are checked by the chosen method's parameter.

    A name that is a number in one method and a choice in another is left out; there is none (tests/test_svc.py).
    """
    by_name: dict[str, list[tuple[str, Parameter]]] = {}
    for method in inners:
        for parameter in (p for p in method.parameters if not p.ignored):
            by_name.setdefault(parameter.name, []).append((method.name, parameter))
    passed = []
    for name, owners in by_name.items():
        kind = _common_kind([parameter.kind for _, parameter in owners])
        if kind is not None:
            doc = f"{name} of the inner method ({', '.join(owner for owner, _ in owners)}); its default if left out"
            passed.append(Parameter(_key(name), kind, None, doc, per_expert=any(p.per_expert for _, p in owners)))
    return tuple(passed)


def _common_kind(kinds: Sequence[type | tuple[str, ...]]) -> type | tuple[str, ...] | None:
    if all(isinstance(kind, tuple) for kind in kinds):
        return tuple(dict.fromkeys(choice for kind in kinds if isinstance(kind, tuple) for choice in kind))
    distinct = set(kinds)
    if len(distinct) == 1:
        return kinds[0]
    return float if distinct == {int, float} else None


def register_svc(inners: Sequence[Method]) -> None:
    """Register the method `svc`, which calibrates the result of any of these methods."""
    by_name = {method.name: method for method in inners}

    def workspace(shape: tuple[int, ...], n_experts: int) -> int:
        """The most that an inner method takes, over float64 tensors, or else Gram matrix, basis and products."""
        inner_workspace = max(method.workspace(shape, n_experts) for method in inners)
        if len(shape) != 2:
            return inner_workspace
        m, n = shape
        float64_tensors = 8 * (n_experts + 3) * m * n
        return float64_tensors + max(inner_workspace, (32 << 20) + 24 * m * n + 56 * min(m, n) ** 2)

    inner = Parameter("inner", tuple(by_name), "task_arithmetic", "the method whose result is calibrated")
    # `resolve` passes the inner method and its values, which are no parameters of recipes.
    signature = read_signature(functools.partial(svc, inner=inners[0], inner_values={}))
    register(
        _Calibration(
            name="svc",
            title="SVC",
            reference="https://arxiv.org/abs/2602.05536",
            needs_base=True,
            parameters=(inner, *signature.parameters, *_passed_through(inners)),
            function=svc,
            workspace=workspace,
            draws=True,
            inners=by_name,
        )
    )
