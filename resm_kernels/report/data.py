"""The value of a report, which is plain data: it can be written as JSON, read again, and drawn as a page.

No number in it is NaN or infinite, because JSON has neither: such a value is None, and `Cell.reasons` says why.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

Value = float | list[float | None] | None
"""A number, one for each expert, or None where there is none."""

Scale = Literal["sequential", "diverging", "logarithmic"]
Severity = Literal["error", "warning", "note"]

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_STRICT: Final = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Measure:
    """One of the quantities that every cell may have a value of.

    Attributes:
        key: Its name in `Cell.values`.
        title: What a heading calls it.
        unit: What the numbers count, such as "share of weights"; empty for a plain number.
        help: A sentence that says what it is and what is good.
        scale: How values become colours: from low to high, away from `centre` on both sides, or by their logarithms.
        per_expert: True if a value is a list with one number for each expert.
        centre: The middle of a diverging scale; None for the other scales.
    """

    __pydantic_config__ = _STRICT

    key: str
    title: str
    unit: str
    help: str
    scale: Scale
    per_expert: bool
    centre: float | None = None


@dataclass(frozen=True)
class Spectra:
    """Singular values of the task vectors of one matrix, and how much the experts' dominant directions overlap.

    Lists have one entry for each expert in `experts`, lists of lists one for each pair of them;
    `resm_kernels.engine.Spectra` defines the quantities.

    Attributes:
        tensor: The matrix. If a cell joins several, it is the one whose task vectors are the largest.
        size: r, the number of singular values.
        experts: The positions, in `Report.experts`, of the experts that are merged here: mostly all.
        indices: The i, from 1 to r, of the singular values in `values`.
        values: σ_i/σ_1 at these indices, a list for each expert.
        largest: σ_1.
        effective_rank, stable_rank, rank_90, rank_99, decay: Figures of the whole spectrum.
        kept: The number of directions that are compared.
        left_overlap, right_overlap: Overlaps of every two experts' left and right subspaces, from 0 to 1.
        left_expected, right_expected: The overlaps of random subspaces.
        interference, interference_expected: The mean share of an expert within the subspaces of another, and that of
            random subspaces; None where these are not defined, as for one expert.
    """

    __pydantic_config__ = _STRICT

    tensor: str
    size: int
    experts: list[int]
    indices: list[int]
    values: list[list[float | None]]
    largest: list[float | None]
    effective_rank: list[float | None]
    stable_rank: list[float | None]
    rank_90: list[int]
    rank_99: list[int]
    decay: list[float | None]
    kept: list[int]
    left_overlap: list[list[float | None]]
    right_overlap: list[list[float | None]]
    left_expected: list[list[float | None]]
    right_expected: list[list[float | None]]
    interference: float | None
    interference_expected: float | None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, finite(value))


@dataclass(frozen=True)
class Cell:
    """One kind of module in one layer: a tensor, or the tensors of several modules of this kind.

    Attributes:
        row: Its layer, one of `Report.rows`.
        column: Its kind, one of `Report.columns`.
        tensors: The names of its tensors, in the spelling of the output.
        shape: The shape of its tensors, such as "4096×4096"; of different ones, the first and how many there are.
        role: The role of its tensors, one of `resm_kernels.roles.Role`, or empty where no role is asked for.
        values: The values by `Measure.key`. A measure that does not apply to the cell is missing.
        spectra: Singular values; None if they were not asked for, or the tensor is not decomposed.
        problem: Why values are missing, such as NaN in a model, else None.
        reasons: Why a value of `values` is None, by `Measure.key`.
    """

    __pydantic_config__ = _STRICT

    row: str
    column: str
    tensors: list[str]
    shape: str
    role: str
    values: dict[str, Value]
    spectra: Spectra | None = None
    problem: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = {key: finite(value) for key, value in self.values.items()}
        missing = {key for key, value in values.items() if value is None or (isinstance(value, list) and None in value)}
        reasons = {key: self.reasons.get(key) or _reason(self.values[key]) for key in values if key in missing}
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "reasons", reasons)


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: What was done.
        seconds: How long it took. Stages that ran at the same time each count in full.
        bytes: How many bytes it read or wrote; None if it did neither.
    """

    __pydantic_config__ = _STRICT

    name: str
    seconds: float
    bytes: int | None = None


@dataclass(frozen=True)
class Memory:
    """The memory of a run, in bytes.

    Attributes:
        peak: The most that was resident; None if the system does not say.
        limit: What tensors in flight were allowed to take.
    """

    __pydantic_config__ = _STRICT

    peak: int | None
    limit: int


@dataclass(frozen=True)
class ReportWarning:
    """Something that a reader should know, and what to do about it.

    Attributes:
        severity: "error" if the merge fails or its result is unusable, "warning" if the result is probably not what was
            meant, "note" for what is good to know.
        kind: What sort of finding it is, the same word in all reports, such as "non-finite".
        text: What was found, in full sentences.
        todo: What to do about it, in full sentences.
        cells: Where it was found, as (row, column); empty if it concerns the whole model.
    """

    __pydantic_config__ = _STRICT

    severity: Severity
    kind: str
    text: str
    todo: str
    cells: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All that a report on a recipe or on a merged model says.

    Attributes:
        title: The name of the recipe's file or of the output folder.
        version: The version of this library that made the report.
        recipe: The text of the recipe.
        method: The merge method.
        base: The base model; None if there is none.
        experts: The experts, in the order of all lists with one entry for each expert.
        out: The folder of the merged model; None for a report on a recipe.
        rows: Labels of the rows, in the order of depth: "embeddings", the layers' numbers, "final".
        columns: The kinds of modules, as `tensor_names.module_kind` names them, in the order of the first layer.
        measures: What cells may have values of.
        cells: The cells; a place of the grid without a tensor has none.
        stages: What the merge's time was spent on; None if no merge was recorded.
        memory: The memory of the merge; None if no merge was recorded.
        machine: Facts about the machine that merged, by name; empty if no merge was recorded.
        warnings: What was found, the most severe first.
    """

    __pydantic_config__ = _STRICT

    title: str
    version: str
    recipe: str
    method: str
    base: str | None
    experts: list[str]
    out: str | None
    rows: list[str]
    columns: list[str]
    measures: list[Measure]
    cells: list[Cell]
    stages: list[Stage] | None = None
    memory: Memory | None = None
    machine: dict[str, str] = field(default_factory=dict)
    warnings: list[ReportWarning] = field(default_factory=list)


def to_json(report: Report, *, indent: int | None = None) -> str:
    """Return a report as strictly valid JSON; `from_json` gives an equal report back.

    Bytes of a file's name that are no UTF-8, which Python holds as lone surrogates and JSON must not hold, are spelled
    out, such as `\\udcff`.
    """
    text = json.dumps(asdict(report), indent=indent, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)


def from_json(text: str) -> Report:
    """Return the report that `to_json` wrote.

    Raises:
        ValueError: The text is no JSON of a report; the message names the entry.
    """
    try:
        return _adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the text"
        need = "need JSON that `resm-kernels report --json` wrote"
        raise ValueError(f"report: {place}: {first['msg']}; {need}") from error


@functools.cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def finite(value: Any) -> Any:
    """Return a number or lists of numbers with None in the place of NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [finite(item) for item in value] if isinstance(value, list) else value


def _reason(value: Value) -> str:
    """Return why a value is None when nothing else is known."""
    values = value if isinstance(value, list) else [value]
    if any(v is not None and math.isnan(v) for v in values):
        return "the value is not defined (NaN)"
    if any(v is not None and math.isinf(v) for v in values):
        return "the value is infinite"
    return "there is no value"
