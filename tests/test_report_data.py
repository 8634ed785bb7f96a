"""The value of a report: lossless as JSON, without NaN, and clear about text that is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from resm_kernels.report import Cell, Measure, Memory, Report, ReportWarning, Spectra, Stage, from_json, to_json

SPECTRA = Spectra(
    tensor="layers.0.q_proj.weight",
    size=2,
    experts=[0, 1],
    indices=[1, 2],
    values=[[1.0, 0.5], [1.0, 0.0]],
    largest=[0.1, 0.2],
    effective_rank=[1.8, 1.0],
    stable_rank=[1.25, 1.0],
    rank_90=[2, 1],
    rank_99=[2, 1],
    decay=[1.0, math.nan],
    kept=[1, 1],
    left_overlap=[[1.0, 0.1], [0.1, 1.0]],
    right_overlap=[[1.0, 0.1], [0.1, 1.0]],
    left_expected=[[0.5, 0.5], [0.5, 0.5]],
    right_expected=[[0.5, 0.5], [0.5, 0.5]],
    interference=0.1,
    interference_expected=math.inf,
)
CELL = Cell(
    row="0",
    column="q_proj",
    tensors=["layers.0.q_proj.weight"],
    shape="2×2",
    role="matrix",
    values={"change": [0.1, math.nan], "cosine": None, "norm": -math.inf, "rank": 3.0},
    spectra=SPECTRA,
    reasons={"cosine": "the expert equals the base model", "rank": "not missing"},
)
REPORT = Report(
    title="recipe.yaml",
    version="0",
    recipe="merge_method: resm\n",
    method="resm",
    base="./base",
    experts=["./a", "./b"],
    out=None,
    rows=["0"],
    columns=["q_proj"],
    measures=[Measure("change", "Change", "", "How much an expert differs.", "logarithmic", True)],
    cells=[CELL],
    stages=[Stage("read", 0.1, 10), Stage("plan", 0.25)],
    memory=Memory(10, 20),
    machine={"cpu": "x86_64"},
    warnings=[ReportWarning("note", "equal", "Two are equal.", "Remove one.", [("0", "q_proj")])],
)


@pytest.mark.parametrize("report", [REPORT, replace(REPORT, stages=None, memory=None, out="merged", base=None)])
def test_json_is_lossless(report: Report) -> None:
    text = to_json(report)
    assert from_json(text) == report
    assert to_json(from_json(text)) == text


def test_values_that_are_not_finite_become_null_with_a_reason() -> None:
    assert CELL.values == {"change": [0.1, None], "cosine": None, "norm": None, "rank": 3.0}
    assert CELL.reasons == {
        "change": "the value is not defined (NaN)",
        "cosine": "the expert equals the base model",
        "norm": "the value is infinite",
    }
    assert (SPECTRA.decay, SPECTRA.interference_expected) == ([1.0, None], None)
    assert "NaN" not in json.dumps(json.loads(to_json(REPORT))["cells"][0]["values"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 1}, "report: unknown: Unexpected keyword argument"),
        ({"cells": [{"row": "0"}]}, "report: cells.0.column: Field required"),
        ({"warnings": [{"severity": "bad", "kind": "", "text": "", "todo": ""}]}, "report: warnings.0.severity: "),
    ],
)
def test_other_json_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        from_json(json.dumps(json.loads(to_json(REPORT)) | change))


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="report: the text: Invalid JSON"):
        from_json("<html>")
