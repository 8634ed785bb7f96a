"""RESM's definition, independent of the package: statistics and SVDs in float64 straight from the formulas."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from resm_kernels.methods import get

DEFAULTS = {p.keyword: p.default for p in get("resm").parameters}


def masses(d: Tensor, kappa: float) -> Tensor:
    """a = (1/N)·Σ of |δ| over |δ − μ| > κσ, along the last dimension."""
    mean, sigma = d.mean(-1, keepdim=True), d.std(-1, correction=0, keepdim=True)
    return torch.where((d - mean).abs() > kappa * sigma, d.abs(), 0.0).mean(-1)


def formula_weights(a: Tensor, beta: float) -> Tensor:
    """w_t = T·a_t^β / Σ a_s^β along the first dimension; 1 where all a_t = 0."""
    powers = a**beta
    return torch.where((a == 0).all(0), 1.0, a.shape[0] * powers / powers.sum(0))


def formula_rank(rule: str, r: int, sparsity: list[Fraction], t: int, spectrum: Tensor, c: dict[str, Any]) -> int:
    n_experts = len(sparsity)
    if rule == "sparsity":
        k = math.floor(Fraction(r, n_experts) * (1 - Fraction(c["gamma"]) * sum(sparsity) / n_experts))
    elif rule == "per_task":
        k = math.floor(Fraction(r, n_experts) * (1 - Fraction(c["gamma"]) * sparsity[t]))
    elif rule == "fixed":
        k = c["rank"]
    elif rule == "energy":
        share = spectrum.square().cumsum(0) / spectrum.square().sum()
        k = next(i + 1 for i, s in enumerate(share.tolist()) if s >= c["energy"])
    else:
        p = spectrum / spectrum.sum()
        k = math.ceil(math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0)))
    return min(max(k, c["k_min"]), r // n_experts)


def polar_by_svd(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    significant = s > 1e-6 * s[0]
    return u[:, significant] @ vh[significant]


def formula(base: Tensor, experts: list[Tensor], **parameters: Any) -> tuple[Tensor, list[int]]:
    """M of RESM's definition (without λ and θ₀) and the ranks."""
    c = DEFAULTS | {"weight": [1.0] * len(experts)} | parameters
    deltas = [e.double() - base.double() for e in experts]
    r = min(base.shape)
    a = torch.stack([masses(d if c["granularity"] == "row" else d.flatten(), c["kappa"]) for d in deltas])
    w = formula_weights(a, c["beta"])
    eps = [c["eps_rel"] * float(d.square().mean().sqrt()) for d in deltas]
    sparsity = [Fraction(int((d.abs() <= e).sum()), d.numel()) for d, e in zip(deltas, eps, strict=True)]
    us, ss, vs, ks = [], [], [], []
    for t, delta in enumerate(deltas):
        d = delta
        if c["outlier_clip"]:
            mean, sigma = d.mean(), d.std(correction=0)
            d = d.clamp(mean - c["kappa"] * sigma, mean + c["kappa"] * sigma)
        user = c["weight"][t]
        d = d * (w[t][:, None] * user) if c["granularity"] == "row" else d
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        k = formula_rank(c["rank_rule"], r, sparsity, t, s, c)
        us.append(u[:, :k])
        ss.append(s[:k] if c["granularity"] == "row" else s[:k] * w[t] * user)
        vs.append(vh[:k].mT)
        ks.append(k)
    return polar_by_svd(torch.cat(us, 1)) @ torch.cat(ss).diag() @ polar_by_svd(torch.cat(vs, 1)).mT, ks
