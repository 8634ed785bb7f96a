"""The benchmark's merges in the whitened space, against RESM itself and RegMean's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inputs import experts_with_spectra, orthonormal, randn, relative
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.quality.whitened import Whitened, input_grams, merged_delta
from resm_kernels import merge

MODELS = Path(__file__).resolve().parents[1] / "examples" / "3h" / "models"


def deltas_and_grams() -> tuple[list[Tensor], list[Tensor]]:
    base, experts = experts_with_spectra(24, 18, 3, 0.5, seed=1, dtype=torch.float64)
    inputs = [randn(60, 18, seed=t, dtype=torch.float64) * torch.linspace(0.2, 2, 18) for t in range(3)]
    return [e - base for e in experts], [x.mT @ x / len(x) for x in inputs]


@pytest.mark.parametrize("row", [Whitened("plain"), Whitened("mean"), Whitened("own", beta=1.0)], ids=str)
def test_white_inputs_leave_resm(row: Whitened) -> None:
    deltas, _ = deltas_and_grams()
    expected = merge(torch.zeros_like(deltas[0]), deltas, "resm", beta=row.beta, gamma=0.0)
    white = [2.5 * torch.eye(18, dtype=torch.float64)] * 3
    assert relative(merged_delta(deltas, white, row), expected) <= 1e-8


def test_directions_that_do_not_meet_give_regmean() -> None:
    deltas, grams = deltas_and_grams()
    # Turned, because the blocks' zeros would count as sparsity.
    left, right = orthonormal(24, 24, 0), orthonormal(18, 18, 1)
    deltas = [left @ torch.block_diag(*(d[:8, :6] * (s == t) for s in range(3))) @ right for t, d in enumerate(deltas)]
    grams = [right.mT @ torch.block_diag(*(g[:6, :6] for _ in range(3))) @ right for g in grams]
    ridge = [0.1 * g.diagonal().mean() * torch.eye(18) for g in grams]
    total = sum(g + r for g, r in zip(grams, ridge, strict=True))
    products = sum(d @ (g + r) for d, g, r in zip(deltas, grams, ridge, strict=True))
    expected = torch.linalg.solve(total, products.mT).mT
    assert relative(merged_delta(deltas, grams, Whitened("regmean")), expected) <= 1e-8
    other = merged_delta(deltas, grams, Whitened("regmean", scale=1.5))
    assert relative(other, 1.5 * expected) <= 1e-8


def test_grams_are_means_over_all_tokens() -> None:
    prompts = ["<user> what is the age of lifa ? <bot>", "<user> how do i paint the guard ? <bot>"]
    grams = input_grams(MODELS / "base", prompts)
    model = AutoModelForCausalLM.from_pretrained(MODELS / "base")
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head.weight"}
    assert set(grams) == linear
    # RMSNorm gives the first layer's inputs a mean square of 1 before its weights, whatever the token.
    norm = model.model.layers[0].input_layernorm.weight.detach().double()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((grams[name].diagonal() / norm.square()).mean()) == pytest.approx(1, rel=1e-3)
    assert torch.equal(grams[name], grams[name.replace("q_proj", "v_proj")])
