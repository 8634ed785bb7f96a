"""RESM taken apart: one ingredient at a time, at λ = 1 unless the row says otherwise, as rows of the same kind.

The rows of `ablation:weights` and `ablation:ranks` change one choice of the default; `ablation:scale` asks where λ may
come from; `ablation:experts` merges other numbers and kinds of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from candidates import DPO, LORA, SFT, Row, merge_of

SCALES = (0.5, 0.7, 0.85, 1.0, 1.2)
BY_ROWS: dict[str, Any] = {"granularity": "row", "beta": 0.5}
EQUAL: dict[str, Any] = {"beta": 0.0}
SCALE_RULES = ("preserve-norm", "least-squares")


def _row(group: str, name: str, method: str = "resm", **choices: Any) -> Row:
    return Row(f"ablation:{group}", name, (merge_of(method, **choices),))


def ingredients() -> list[Row]:
    """Outlier weighting and rank rule, each alone, both (the default), neither (TSV-M)."""
    return [
        _row("ingredients", "neither (TSV-M)", "tsvm"),
        _row("ingredients", "outlier weights only", gamma=0.0),
        _row("ingredients", "sparsity ranks only", beta=0.0),
        _row("ingredients", "both (RESM)"),
    ]


def weights() -> list[Row]:
    """β, κ, granularity, clipping, and five rules in place of each layer's outlier mass."""
    return [
        *(_row("weights", f"layer, β = {b:g}", beta=b) for b in (-1.0, -0.5, 0.5, 1.0, 2.0)),
        *(_row("weights", f"row, β = {b:g}", beta=b, granularity="row") for b in (-0.5, 0.5, 1.0)),
        *(_row("weights", f"layer, κ = {k:g}", kappa=k) for k in (2.0, 4.0)),
        _row("weights", "layer, outliers clipped", outlier_clip=True),
        _row("weights", "clipped, equal weights", outlier_clip=True, beta=0.0),
        _row("weights", "whole model's outliers", beta=0.0, rule="model-outliers"),
        _row("weights", "half the outlier weights", beta=0.0, rule="half-outliers"),
        _row("weights", "share of outliers", beta=0.0, rule="outlier-share"),
        _row("weights", "equal norms", beta=0.0, rule="equal-norms"),
        _row("weights", "equal retention", beta=0.0, rule="equal-retention"),
    ]


def ranks() -> list[Row]:
    """How many directions are kept, with equal weights so that ranks alone differ."""
    own: dict[str, dict[str, Any]] = {
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
    return [_row("ranks", name, beta=0.0, **choices) for name, choices in own.items()]


def decompositions() -> list[Row]:
    """Exact against approximate subspaces."""
    own: dict[str, dict[str, Any]] = {
        "exact (LAPACK)": {"decomposition": "exact", "accuracy": 0.0},
        "gram, float64": {"decomposition": "gram", "accuracy": 0.0},
        "default (1e-3)": {},
        "randomized, 1e-2": {"decomposition": "randomized", "accuracy": 1e-2},
        "randomized, 1e-1": {"decomposition": "randomized", "accuracy": 1e-1},
    }
    return [_row("decompositions", name, **choices) for name, choices in own.items()]


def scales() -> list[Row]:
    """λ = 1, chosen on validation, or by a rule that needs no data; for RESM, by rows, with equal weights, TSV-M."""
    found = []
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "RESM": ("resm", {}),
        "RESM by rows, β = 0.5": ("resm", BY_ROWS),
        "RESM, equal weights": ("resm", EQUAL),
        "TSV-M": ("tsvm", {}),
    }
    for name, (method, choices) in kinds.items():
        found.append(_row("scale", f"{name}, λ = 1", method, **choices))
        points = tuple(merge_of(method, lambda_=scale, **choices) for scale in SCALES)
        found.append(Row("ablation:scale", f"{name}, λ tuned", points))
        found += [_row("scale", f"{name}, {rule}", method, rule=rule, **choices) for rule in SCALE_RULES]
        found.append(_row("scale", f"{name}, interference", method, scale_rule="interference", **choices))
    return found


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
    by_name: dict[str, tuple[str, dict[str, Any]]] = {
        "task arithmetic": ("task_arithmetic", {}),
        "TIES": ("ties", {}),
        "TSV-M": ("tsvm", {}),
        "RESM": ("resm", {}),
        "RESM by rows, β = 0.5": ("resm", BY_ROWS),
    }
    found = []
    for group, names in groups.items():
        for name, (method, choices) in by_name.items():
            found.append(_row("experts", f"{group}, {name}", method, experts=names, **choices))
        if len(names) > 3 or names in (DPO, LORA):
            points = tuple(merge_of("resm", names, lambda_=scale) for scale in SCALES)
            found.append(Row("ablation:experts", f"{group}, RESM, λ tuned", points))
    return found


def ablation_rows() -> list[Row]:
    """All of them; a candidate that stands in several rows is measured once."""
    return [*ingredients(), *weights(), *ranks(), *decompositions(), *scales(), *experts()]
