"""What is compared: a seed's models as they are, and every merge method of the library at its default and tuned.

All of it is data. A `Row` of the table is one candidate, or several of which the validation split chooses one. No row
has more than `MOST_POINTS` candidates, RESM's among them: who may try more would win by that alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Final, Literal

from benchmarks.quality.prompts import Draw
from resm_kernels import methods

MOST_POINTS: Final = 8
SFT: Final = ("helpful", "honest", "harmless")
DPO: Final = ("helpful-dpo", "honest-dpo", "harmless-dpo")
LORA: Final = ("helpful-lora", "honest-lora", "harmless-lora")
MIXES: Final = ("mix-uniform", "mix-weighted", "mix-filtered")

FOLDED: Final = ("slerp", "nuslerp", "nearswap", "arcee_fusion")
"""Methods for two models, folded over the experts in the order of `SFT`: see `merging.fold`."""
LEFT_OUT: Final = {
    "passthrough": "it copies one model, and every expert has a row of its own",
    "regmean": "it needs statistics; see the calibrated rows",
    "regmean_plus": "it needs statistics; see the calibrated rows",
    "fisher": "it needs statistics; see the calibrated rows",
}


@dataclass(frozen=True)
class Calibration:
    """What a merge does with prompts, at the library's defaults.

    With neither least squares nor a polish, the prompts are for the statistics that the merge method needs.

    Attributes:
        draw: Where the prompts come from.
        prompts: How many each expert has.
        least_squares: Whether linear layers are fitted to the experts' outputs.
        polish_steps: Steps that bring the merge's predictions near the experts'.
    """

    draw: Draw
    prompts: int
    least_squares: bool = False
    polish_steps: int = 0


@dataclass(frozen=True)
class Search:
    """How a merge's parameters are searched for.

    Attributes:
        questions: How many validation questions each trial is asked.
        trials: How many merges are tried.
        best_by: "mean" takes the trial with the largest mean of the dimensions, "worst" the one whose least dimension
            is the largest.
    """

    questions: int
    trials: int
    best_by: Literal["mean", "worst"] = "mean"


@dataclass(frozen=True)
class Candidate:
    """One model to measure.

    Attributes:
        experts: Folders of the seed's models: the ones to merge, or the one to take as it is.
        method: The merge method's name in recipes; None for a model as it is.
        parameters: The method's parameters as keywords; what is not named has its default.
        rule: A rule of `rules.RULES` that sets further parameters for each tensor, from base and experts alone.
        calibration: What the merge does with the experts' prompts; None for one that sees weights alone.
        search: How the merge's weights and λ are searched for; None where they are given.
    """

    experts: tuple[str, ...]
    method: str | None = None
    parameters: tuple[tuple[str, Any], ...] = ()
    rule: str | None = None
    calibration: Calibration | None = None
    search: Search | None = None

    @property
    def key(self) -> str:
        """What records know it by: canonical JSON of all that it is."""
        parts = {"experts": self.experts, "method": self.method, "parameters": dict(self.parameters), "rule": self.rule}
        if self.calibration is not None:
            parts["calibration"] = asdict(self.calibration)
        if self.search is not None:
            parts["search"] = asdict(self.search)
        return json.dumps({k: v for k, v in parts.items() if v}, sort_keys=True, separators=(",", ":"))

    def describe(self) -> str:
        """Parameters and rule in a few words."""
        named = [f"{k.rstrip('_')} {_short(v)}" for k, v in self.parameters] + ([self.rule] if self.rule else [])
        return ", ".join(named) or "default"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        group: The table it stands in.
        name: What it is called there; unique within the group.
        candidates: One, or those among which the validation split chooses (the first of equals).
    """

    group: str
    name: str
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.candidates) <= MOST_POINTS:
            raise ValueError(f"candidates: got {len(self.candidates)} for {self.name!r}, need 1 to {MOST_POINTS}")


def merge_of(method: str, experts: Sequence[str] = SFT, rule: str | None = None, **parameters: Any) -> Candidate:
    """A merge of experts by a method of the library; parameters at their defaults are left out of what it is."""
    # Where tensors differ in a parameter's default, naming it is a choice.
    defaults = {p.keyword: p.default for p in methods.get(method).parameters if p.vocabulary is None}
    chosen = tuple(sorted((k, v) for k, v in parameters.items() if k not in defaults or v != defaults[k]))
    return Candidate(tuple(experts), method, chosen, rule)


def grid(method: str, **values: Sequence[Any]) -> tuple[Candidate, ...]:
    """Merges of the SFT experts with every combination of the parameters' values."""
    return tuple(merge_of(method, **dict(zip(values, point, strict=True))) for point in product(*values.values()))


WEIGHTS: Final = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2))
"""For methods whose one choice is how much of each model to take."""
SUMS: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""λ of methods that add the task vectors up, at whose default λ = 1 three of them go too far."""
MEANS: Final = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
"""λ of methods that average the task vectors."""
SPECTRAL: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 1.2)
"""λ of methods that orthogonalise or reweigh singular directions."""

# The default is always a point of the grid, before these, so that tuning cannot lose on validation.
GRIDS: Final[dict[str, tuple[Candidate, ...]]] = {
    "linear": grid("linear", weight=WEIGHTS),
    "task_arithmetic": grid("task_arithmetic", lambda_=SUMS),
    "ties": grid("ties", density=(0.2, 0.5), lambda_=(1.0, 1.5, 2.0)),
    "dare_linear": grid("dare_linear", density=(0.5, 0.8), lambda_=(0.4, 0.6, 0.8)),
    "dare_ties": grid("dare_ties", density=(0.5, 0.8), lambda_=(0.4, 0.6, 0.8)),
    "della_linear": grid("della_linear", density=(0.5, 0.8), lambda_=(0.4, 0.6, 0.8)),
    "della": grid("della", density=(0.5, 0.8), lambda_=(1.0, 1.5, 2.0)),
    "breadcrumbs": grid("breadcrumbs", density=(0.5, 0.9), lambda_=(0.4, 0.6, 0.8)),
    "breadcrumbs_ties": grid("breadcrumbs_ties", density=(0.5, 0.9), lambda_=(0.4, 0.6, 0.8)),
    "sce": grid("sce", select_topk=(0.2, 0.5, 1.0), min_energy=(0.0, 1e-6)),
    "slerp": grid("slerp", weight=WEIGHTS),
    "nuslerp": grid("nuslerp", weight=WEIGHTS),
    "multislerp": grid("multislerp", weight=WEIGHTS),
    "karcher": (),
    "model_stock": grid("model_stock", filter_wise=(True,)),
    "nearswap": grid("nearswap", t=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    "ram": grid("ram", epsilon=(1e-4, 1e-3, 2e-3, 4e-3)),
    "ramplus_tl": grid("ramplus_tl", r=(0.1, 0.5, 1.0), alpha=(0.2, 1.0)),
    "arcee_fusion": (),
    "tsvm": grid("tsvm", lambda_=SPECTRAL),
    "tsv_compress": grid("tsv_compress", lambda_=SUMS),
    "iso_c": grid("iso_c", lambda_=(0.7, 1.3, 1.6, 2.0, 2.5)),
    "iso_cts": grid("iso_cts", common_space_fraction=(0.6, 0.8), lambda_=(0.7, 1.3, 1.6)),
    "star": grid("star", eta=(0.2, 0.4), lambda_=(0.4, 0.6, 0.8)),
    "knots": grid("knots", density=(0.5, 1.0), lambda_=(0.6, 0.8, 1.2)),
    "wudi": grid("wudi", lambda_=(0.4, 0.6, 0.8)),
    "swudi": grid("swudi", rank_ratio=(0.65, 0.85), lambda_=(0.6, 0.8, 1.2)),
    "svc": grid("svc", lambda_=SPECTRAL),
    "resmerge": grid("resmerge", rank=(1, 8), lambda_=(1.5, 2.0, 2.5)),
    "dc_merge": grid("dc_merge", smoothing=("average", "linear"), lambda_=(0.7, 1.0, 1.3)),
    "resm": (
        *grid("resm", beta=(0.0, 0.25), lambda_=(1.0, 1.2)),
        *grid("resm", beta=(1.0,), lambda_=(0.8, 1.0, 1.2)),
        *grid("resm", granularity=("row",), beta=(0.5,)),
    ),
}  # fmt: skip


def has_default(method: str) -> bool:
    """Whether all parameters of a method have defaults; folding gives slerp's share t."""
    required = {p.name for p in methods.get(method).parameters if p.default is methods.REQUIRED}
    return not required or (method == "slerp" and required == {"t"})


def stored_rows() -> list[Row]:
    """The base, every expert, and the models trained on mixed data."""
    names = ("base", *SFT, *DPO, *LORA, *MIXES)
    return [Row("models", name, (Candidate((name,)),)) for name in names]


def default_rows() -> list[Row]:
    """Every method of the library as it comes, and RESM as the abstract of its paper reads."""
    rows = [Row("default", name, (merge_of(name),)) for name in GRIDS if has_default(name)]
    return [*rows, Row("default", "RESM, β = 1", (merge_of("resm", beta=1.0),))]


def tuned_rows() -> list[Row]:
    """Every method at the best point of its grid."""
    rows = []
    for name, points in GRIDS.items():
        first = (merge_of(name),) if has_default(name) else ()
        rows.append(Row("tuned", name, tuple(dict.fromkeys((*first, *points)))))
    return rows


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ":".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
