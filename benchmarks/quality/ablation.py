"""RESM taken apart: one ingredient at a time, at λ = 1 unless the row says otherwise, as rows of the same kind.

The default has equal weights (β = 0). The rows of `ablation:ranks` change its rank rule alone, those of
`ablation:weights` the weights alone, or one choice of RESM with β = 1, whose subspaces `ablation:decompositions`
approximates. `ablation:vocabulary` asks every spectral method whether to average embeddings; `ablation:scale` where λ
may come from; `ablation:experts` merges other numbers and kinds of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from benchmarks.quality.candidates import DPO, GRIDS, LORA, SFT, Row, merge_of
from resm_kernels import methods

SCALES: Final = (0.5, 0.7, 0.85, 1.0, 1.2)
SCALE_RULES: Final = ("preserve-norm", "least-squares", "interference")
OUTLIERS: Final[dict[str, Any]] = {"beta": 1.0}
"""The abstract's outlier weighting, as this library reads it."""
KINDS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "RESM": ("resm", {}),
    "RESM, β = 0.25": ("resm", {"beta": 0.25}),
    "RESM, β = 1": ("resm", OUTLIERS),
    "TSV-M": ("tsvm", {}),
}


def _row(group: str, name: str, method: str = "resm", **choices: Any) -> Row:
    return Row(f"ablation:{group}", name, (merge_of(method, **choices),))


def ingredients() -> list[Row]:
    """Outlier weighting and rank rule, each alone, both, neither; and TSV-M."""
    return [
        _row("ingredients", "TSV-M", "tsvm"),
        _row("ingredients", "neither", gamma=0.0),
        _row("ingredients", "outlier weights only", gamma=0.0, **OUTLIERS),
        _row("ingredients", "sparsity ranks only (the default)"),
        _row("ingredients", "both (the abstract)", **OUTLIERS),
    ]


def vocabulary() -> list[Row]:
    """Every spectral method that can average instead: the embeddings merged as any matrix, and averaged."""
    rows = []
    for name in GRIDS:
        method = methods.get(name)
        if any(p.name == "spectral" for p in method.parameters):
            rows.append(_row("vocabulary", f"{method.title}, spectral", name, spectral=True))
            rows.append(_row("vocabulary", f"{method.title}, averaged", name, rule="vocabulary-averaged"))
    rows.append(_row("vocabulary", "RESM, β = 1, spectral", spectral=True, **OUTLIERS))
    rows.append(_row("vocabulary", "RESM, β = 1, averaged", rule="vocabulary-averaged", **OUTLIERS))
    return rows


def weights() -> list[Row]:
    """β, κ, granularity, clipping, and five rules that set the user's weights instead of each layer's outlier mass."""
    return [
        *(_row("weights", f"layer, β = {b:g}", beta=b) for b in (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0)),
        *(_row("weights", f"row, β = {b:g}", beta=b, granularity="row") for b in (-0.5, 0.5, 1.0)),
        *(_row("weights", f"layer, β = 1, κ = {k:g}", kappa=k, **OUTLIERS) for k in (2.0, 4.0)),
        *(_row("weights", f"layer, β = {b:g}, outliers clipped", beta=b, outlier_clip=True) for b in (1.0, 0.0)),
        _row("weights", "whole model's outliers", rule="model-outliers"),
        _row("weights", "half the outlier weights", rule="half-outliers"),
        _row("weights", "share of outliers", rule="outlier-share"),
        _row("weights", "equal norms", rule="equal-norms"),
        _row("weights", "equal retention", rule="equal-retention"),
    ]


def ranks() -> list[Row]:
    """How many directions are kept, with the default's equal weights, so that ranks alone differ."""
    choices_of: dict[str, dict[str, Any]] = {
        "γ = 0: r/T": {"gamma": 0.0},
        "γ = 0.5": {"gamma": 0.5},
        "γ = 1": {},
        "γ = 1, ε = 0.1 rms": {"eps_rel": 0.1},
        "γ = 1, ε = 0.5 rms": {"eps_rel": 0.5},
        "per task": {"rank_rule": "per_task"},
        "per task, ε = 0.5 rms": {"rank_rule": "per_task", "eps_rel": 0.5},
        "fixed, k = 8": {"rank_rule": "fixed", "rank": 8},
        "energy 0.9": {"rank_rule": "energy"},
        "energy 0.99": {"rank_rule": "energy", "energy": 0.99},
        "effective rank": {"rank_rule": "effective_rank"},
        "interference": {"rank_rule": "interference"},
    }
    return [_row("ranks", name, **choices) for name, choices in choices_of.items()]


def decompositions() -> list[Row]:
    """Exact against approximate subspaces, with outlier weights."""
    choices_of: dict[str, dict[str, Any]] = {
        "exact (LAPACK)": {"decomposition": "exact", "accuracy": 0.0},
        "gram, float64": {"decomposition": "gram", "accuracy": 0.0},
        "default (1e-3)": {},
        "randomized, 1e-2": {"decomposition": "randomized", "accuracy": 1e-2},
        "randomized, 1e-1": {"decomposition": "randomized", "accuracy": 1e-1},
    }
    return [_row("decompositions", name, **OUTLIERS, **choices) for name, choices in choices_of.items()]


def scales() -> list[Row]:
    """λ = 1, chosen on validation, or by a rule that needs no data."""
    rows = []
    for name, (method, choices) in KINDS.items():
        rows.append(_row("scale", f"{name}, λ = 1", method, **choices))
        points = tuple(merge_of(method, lambda_=scale, **choices) for scale in SCALES)
        rows.append(Row("ablation:scale", f"{name}, λ tuned", points))
        rows += [_row("scale", f"{name}, {rule}", method, rule=rule, **choices) for rule in SCALE_RULES]
    return rows


def experts() -> list[Row]:
    """Two, three and six experts; those trained by DPO, and as LoRA adapters, on their own."""
    groups: dict[str, Sequence[str]] = {
        "helpful + honest": SFT[:2],
        "helpful + harmless": (SFT[0], SFT[2]),
        "honest + harmless": SFT[1:],
        "3 SFT": SFT,
        "3 DPO": DPO,
        "3 LoRA": LORA,
        "6: SFT + DPO": (*SFT, *DPO),
    }
    kinds = {"task arithmetic": ("task_arithmetic", {}), "TIES": ("ties", {}), **KINDS}
    rows = []
    for group, names in groups.items():
        for name, (method, choices) in kinds.items():
            rows.append(_row("experts", f"{group}, {name}", method, experts=names, **choices))
        if len(names) > 3 or names in (DPO, LORA):
            points = tuple(merge_of("resm", names, lambda_=scale, **OUTLIERS) for scale in SCALES)
            rows.append(Row("ablation:experts", f"{group}, RESM, β = 1, λ tuned", points))
    return rows


def ablation_rows() -> list[Row]:
    """All of them; a candidate that stands in several rows is measured once."""
    return [
        *ingredients(),
        *vocabulary(),
        *weights(),
        *ranks(),
        *decompositions(),
        *scales(),
        *experts(),
    ]
