"""RESM with statistics: its ingredients where direction and size mean what they do to outputs, on validation.

C_t = (1/N)·Σ x·xᵀ over the N inputs of a linear layer in expert t, on prompts that the expert was trained on and its
own greedy answers (no labels): ‖Δ_t·C_t^½‖²_F is the mean square of what the expert changed in outputs. A row takes
weights and ranks from A_t = Δ_t·S_t, S_t = (C_t + ρ·c·I)^½ with c the mean of C_t's diagonal, and merges RESM's way,
M = polar([U_1 …])·diag(w_1·Σ_1, …)·polar([V_1 …])ᵀ, with the directions of

* plain: Δ_t;
* mean: Δ_t·S̄, S̄ from the mean of all C_t; M is mapped back by S̄⁻¹;
* own: Δ_t·S_t; expert t's part of M is mapped back by S_t⁻¹;
* regmean: as own, but mapped back by S_t·(Σ_s S_s²)⁻¹, which is RegMean where no two experts' directions meet.

`python -m benchmarks.quality.whitened --json benchmarks/results/quality_whitened.json` needs the models of `make
quality`, asks validation questions alone, and prints means over the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

import resm_kernels
from benchmarks.quality.candidates import grid
from benchmarks.quality.evaluate import COLUMNS, answer, load, table
from benchmarks.quality.measure import Asker
from benchmarks.quality.merging import OUT_DTYPE, Models, StateDict, merge
from benchmarks.quality.records import Scores, rounded
from benchmarks.quality.world import KINDS_OF, World
from benchmarks.records import Recording
from resm_kernels.linalg import decompose_list
from resm_kernels.methods.resm import layer_plan
from resm_kernels.spectral.low_rank import orthogonalized_sum

SEEDS: Final = (0, 1, 2)
PROMPTS: Final = (64, 256)  # an expert


@dataclass(frozen=True)
class Whitened:
    """The directions that a row merges, ρ, β, λ, and the rank rule."""

    directions: Literal["plain", "mean", "own", "regmean"] = "plain"
    ridge: float = 0.1
    beta: float = 0.0
    scale: float = 1.0
    rank_rule: str = "sparsity"


DATA_FREE: Final = (*grid("resm", beta=(0.0, 1.0)), *grid("resm", rank_rule=("energy", "interference")))
ROWS: Final = (
    *(Whitened("plain", ridge=0.01, beta=beta) for beta in (-0.5, 0.5, 1.0)),
    *(Whitened("plain", ridge=0.01, rank_rule=rule) for rule in ("energy", "interference")),
    *(Whitened("mean", ridge=ridge) for ridge in (0.01, 0.1, 0.3, 1.0)),
    Whitened("mean", beta=1.0),
    *(Whitened("mean", rank_rule=rule) for rule in ("energy", "interference")),
    *(Whitened("own", ridge=ridge) for ridge in (0.01, 0.1)),
    *(Whitened("regmean", scale=scale) for scale in (1.0, 1.5)),
)


@torch.inference_mode()
def input_grams(folder: Path, prompts: Sequence[str]) -> StateDict:
    """C of every linear layer by its weight's name, over all tokens of the prompts and of the model's answers."""
    model, tokenizer = load(folder)
    texts = [f"{p} {text}".strip() for p, text in zip(prompts, answer(model, tokenizer, prompts), strict=True)]
    sequences = tokenizer(texts)["input_ids"]
    sums: StateDict = {}

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).double()
        sums[name] = sums.get(name, 0.0) + x.mT @ x

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            layer.register_forward_pre_hook(partial(add, f"{name}.weight"))
    for ids in sequences:
        model(input_ids=torch.tensor([ids]))
    return {name: total / sum(map(len, sequences)) for name, total in sums.items()}


def roots(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """S and S⁻¹."""
    values, vectors = torch.linalg.eigh(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram))
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT


def merged_delta(deltas: Sequence[Tensor], grams: Sequence[Tensor], row: Whitened) -> Tensor:
    """λ·M of one layer, in float64."""
    own, (s, inverse) = [roots(gram, row.ridge) for gram in grams], roots(torch.stack(list(grams)).mean(0), row.ridge)
    seen = [delta @ root for delta, (root, _) in zip(deltas, own, strict=True)]
    plan = layer_plan(torch.zeros_like(deltas[0]), seen, beta=row.beta, rank_rule=row.rank_rule)
    total = torch.stack([root @ root for root, _ in own]).sum(0)
    matrices, back = {
        "plain": (deltas, [torch.eye(len(s)).to(s)] * len(own)),
        "mean": ([delta @ s for delta in deltas], [inverse] * len(own)),
        "own": (seen, [inverse for _, inverse in own]),
        "regmean": (seen, [torch.linalg.solve(total, root).mT for root, _ in own]),
    }[row.directions]
    kept = [d.truncate(k) for d, k in zip(decompose_list(matrices, "exact"), plan.ranks, strict=True)]
    # M is linear in the weights: those of one expert alone give its part.
    alone = torch.tensor(plan.weights, dtype=torch.float64).diag().tolist()
    parts = [orthogonalized_sum(kept, w, torch.float64).dense() @ to for w, to in zip(alone, back, strict=True)]
    return row.scale * torch.stack(parts).sum(0)


def merge_whitened(
    base: StateDict, experts: Sequence[StateDict], grams: Sequence[StateDict], row: Whitened
) -> StateDict:
    """Linear layers as the row has them, all other tensors as RESM."""
    merged = {}
    for name, start in base.items():
        tensors = [expert[name] for expert in experts]
        if name in grams[0]:
            deltas = [tensor.double() - start.double() for tensor in tensors]
            merged[name] = (start.double() + merged_delta(deltas, [g[name] for g in grams], row)).to(OUT_DTYPE)
        else:
            merged[name] = resm_kernels.merge(start, tensors, "resm", name=name, out_dtype=OUT_DTYPE)
    return merged


def measure(folder: Path, seed: int) -> dict[str, Scores]:
    """Validation scores of every row, by what it is and how many prompts an expert it had."""
    world, models = World(seed), Models(folder)
    ask, experts = Asker(folder, world), [models[name] for name in KINDS_OF]
    scores = {candidate.describe(): rounded(ask(merge(models, candidate), "valid")) for candidate in DATA_FREE}
    for count in PROMPTS:
        prompts = {name: [item.prompt for item in world.expert_items(name)[:count]] for name in KINDS_OF}
        grams = [input_grams(folder / name, asked) for name, asked in prompts.items()]
        for row in ROWS:
            described = ", ".join(f"{k} {v}" for k, v in vars(row).items() if v not in (0.0, "sparsity"))
            model = merge_whitened(models["base"], experts, grams, row)
            scores[f"{described}, {count} prompts"] = rounded(ask(model, "valid"))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("build/quality/small"), help="where the seeds' models are")
    parser.add_argument("--json", type=Path, help="write the scores there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recording = Recording(options.json)
    every = {seed: measure(options.root / f"seed-{seed}", seed) for seed in SEEDS}
    results = {seed: {r: {c: v[c] for c in COLUMNS} for r, v in scores.items()} for seed, scores in every.items()}
    recording.save({str(seed): scores for seed, scores in results.items()})
    means = {r: {c: sum(s[r][c] for s in results.values()) / len(SEEDS) for c in COLUMNS} for r in results[SEEDS[0]]}
    Console(width=120).print(table(means))


if __name__ == "__main__":
    main()
