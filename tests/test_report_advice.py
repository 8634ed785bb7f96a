"""The warnings of a report: each finds what it is for, and nothing where all is well."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from resm_kernels.engine import Kept, TensorStats
from resm_kernels.engine.stats import tensor_spectra
from resm_kernels.report import ReportWarning, advice, remarks
from resm_kernels.report.measures import cell_values
from resm_kernels.report.sums import Sums, joined, round_mean

Cells = dict[tuple[str, str], Sums]
EXPERTS = ["a", "b"]


def sums(norms: tuple[float, float] = (1.0, 1.0), merged: float = 1.0, cosine: float = 0.0, **changes: Any) -> Sums:
    """A tensor of 100 weights whose changes have these norms."""
    gram = torch.tensor([*norms, merged], dtype=torch.float64).square().diag()
    gram[0, 1] = gram[1, 0] = cosine * norms[0] * norms[1]
    return replace(Sums(("t",), ((10, 10),), "linear", 100, 100.0, gram, changed=80), **changes)


def grid(*parts: Sums) -> Cells:
    return {(str(i), "q"): replace(part, tensors=(f"t{i}",)) for i, part in enumerate(parts)}


def one(found: list[ReportWarning], kind: str, severity: str) -> ReportWarning:
    (warning,) = found
    assert (warning.kind, warning.severity) == (kind, severity)
    assert warning.text.endswith(".") and warning.todo.endswith(".")
    return warning


def test_where_all_is_well_nothing_is_said() -> None:
    kept = Kept("t", 0.0, 1.0, 1.0, 1.0)
    cells = grid(*[sums(kept=kept, surviving=80, merged_changed=80)] * 4)
    assert not advice.nonfinite(cells) and not advice.equal_to_base(cells, EXPERTS)
    assert not advice.equal_experts(cells, EXPERTS) and not advice.dominant(cells, EXPERTS)
    assert not advice.uneven(cells, EXPERTS) and not advice.merged_norm(cells)
    assert not advice.rounding_loss(cells, "bfloat16") and not advice.rank_limit(cells, EXPERTS)
    assert not advice.interference(cells) and not remarks.said((), ()) and not remarks.missing_inputs({})


def test_without_cells_nothing_is_said() -> None:
    functions: list[Callable[..., list[ReportWarning]]] = [
        *(advice.nonfinite, advice.merged_norm, advice.interference),
        *(lambda cells: advice.uneven(cells, EXPERTS), lambda cells: advice.dominant(cells, EXPERTS)),
        *(lambda cells: advice.equal_to_base(cells, EXPERTS), lambda cells: advice.equal_experts(cells, EXPERTS)),
        lambda cells: advice.rounding_loss(cells, "bfloat16"),
    ]
    assert all(function({}) == [] for function in functions)


def test_nonfinite_names_the_first_tensors() -> None:
    damaged = [sums(problems=(f"m has 1 NaN or infinite values in t{i}",)) for i in range(5)]
    warning = one(advice.nonfinite(grid(sums(), *damaged)), "non-finite", "error")
    assert "in t0; m has" in warning.text and warning.text.endswith("; and 2 more.")
    assert warning.cells == [(str(i), "q") for i in range(1, 6)]


def test_an_expert_that_is_the_base_model() -> None:
    whole = one(advice.equal_to_base(grid(*[sums((0.0, 1.0))] * 3), EXPERTS), "equal-to-base", "warning")
    assert "The expert a has the very weights" in whole.text
    most = one(advice.equal_to_base(grid(sums((1.0, 0.0)), sums((1.0, 0.0)), sums()), EXPERTS), "equal-to-base", "note")
    assert "b has the base model's weights in 67%" in most.text and len(most.cells) == 2
    assert advice.equal_to_base(grid(sums((1.0, 0.0)), sums(), sums()), EXPERTS) == []


def test_an_expert_that_is_missing_is_no_base_model() -> None:
    assert advice.equal_to_base(grid(sums((math.nan, 1.0))), EXPERTS) == []
    assert advice.dominant(grid(sums((math.nan, math.nan))), EXPERTS) == []


def test_experts_that_are_one() -> None:
    same, other = sums(cosine=1.0), sums(cosine=0.9)
    assert "in all that they change" in one(advice.equal_experts(grid(same), EXPERTS), "equal-experts", "warning").text
    most = one(advice.equal_experts(grid(same, same, other), EXPERTS), "equal-experts", "warning")
    assert "in 67% of what they change" in most.text and most.cells == [("0", "q"), ("1", "q")]
    assert advice.equal_experts(grid(same, other, other), EXPERTS) == []
    assert advice.equal_experts(grid(sums((0.0, 0.0))), EXPERTS) == []


def test_an_expert_with_nearly_all_weight() -> None:
    light = sums((1.0, 20.0))
    warning = one(advice.dominant(grid(light, light, sums()), EXPERTS), "dominant-expert", "warning")
    assert "The expert b has more than 90%" in warning.text and "in 67% of the model" in warning.text
    assert advice.dominant(grid(light, sums(), sums()), EXPERTS) == []
    heavy = sums(weights=((1.0, 0.05), (1.0, 0.05)))
    assert "The expert a" in one(advice.dominant(grid(heavy), EXPERTS), "dominant-expert", "warning").text
    assert advice.dominant(grid(sums()), EXPERTS[:1]) == []


def test_experts_that_are_orders_of_magnitude_apart() -> None:
    warning = one(advice.uneven(grid(sums((12.0, 1.0)), sums((12.0, 1.0))), EXPERTS), "uneven-experts", "warning")
    assert "The change of a is 12 times as large as that of b" in warning.text
    layers = grid(sums((1.0, math.nan)), *[sums((math.nan, 1.0))] * 150)  # the second expert has more, not larger ones
    assert advice.uneven(layers, EXPERTS) == []
    assert advice.uneven(grid(sums((9.0, 1.0))), EXPERTS) == []
    assert advice.uneven(grid(sums((9.0, 0.0))), EXPERTS) == []


@pytest.mark.parametrize(("merged", "todo"), [(2.5, "Lower lambda"), (0.05, "Raise lambda")])
def test_a_merged_model_that_is_out_of_line(merged: float, todo: str) -> None:
    warning = one(advice.merged_norm(grid(sums(merged=merged), sums(merged=merged))), "merged-norm", "warning")
    assert f"{merged} times the median" in warning.text and warning.todo.startswith(todo)


def test_cells_of_the_merged_model_that_are_out_of_line() -> None:
    parts = [sums() for _ in range(5)]
    parts[1], parts[3] = sums((0.01, 0.01), merged=0.05), sums((0.01, 0.01), merged=0.002)
    warning = one(advice.merged_norm(grid(*parts)), "merged-norm-cells", "warning")
    assert warning.cells == [("1", "q"), ("3", "q")] and "In 2 of 5 cells" in warning.text
    assert advice.merged_norm(grid(sums(merged=math.nan))) == []
    assert advice.merged_norm(grid(*parts[:4])) == []  # too few to tell which are out of line
    lost = replace(parts[3], kept=Kept("t", 0.0, 1.0, 1.0, 0.1))
    assert one(advice.merged_norm(grid(parts[0], lost, *parts[:3])), "merged-norm-cells", "warning").cells == [
        ("3", "q")
    ]


def test_experts_of_different_layers_are_no_overshoot() -> None:
    """Each of six experts is merged in a layer of its own, so that the merged model changes √6 times as much as one."""
    layers = []
    for t in range(6):
        gram = torch.full((7, 7), math.nan, dtype=torch.float64)
        gram[t, t] = gram[6, 6] = gram[6, t] = gram[t, 6] = 1.0
        layers.append(replace(sums(), gram=gram))
    assert advice.merged_norm(grid(*layers)) == []


def test_experts_that_change_nothing_have_no_part_in_the_cosine() -> None:
    gram = torch.diag(torch.tensor([1.0, 4.0, 0.0, math.nan], dtype=torch.float64))
    gram[0, 1] = gram[1, 0] = 1.0
    values, reasons = cell_values(replace(sums(), gram=gram))
    assert values["cosine"] == 0.5 and "cosine" not in reasons
    gram[1, 1] = gram[0, 1] = gram[1, 0] = 0.0
    values, reasons = cell_values(replace(sums(), gram=gram))
    assert math.isnan(values["cosine"]) and reasons["cosine"] == "a model has the very weights of the base"


def test_changes_that_rounding_swallows() -> None:
    base = torch.linspace(1.0, 2.0, 1000).bfloat16().float()
    small, large = (round_mean("t", base, [base + d], None, torch.bfloat16) for d in (1e-3, 0.1))
    lost, whole = (sums(kept=r.kept, changed=r.changed, surviving=r.surviving) for r in (small, large))
    warning = one(advice.rounding_loss(grid(lost, lost), "bfloat16"), "rounding-loss", "warning")
    assert "keeps 0% of its change, and 0% of the changed weights" in warning.text and len(warning.cells) == 2
    assert advice.rounding_loss(grid(whole), "bfloat16") == []
    few = replace(whole, surviving=whole.changed // 4)
    assert one(advice.rounding_loss(grid(few), "bfloat16"), "rounding-loss", "note").cells == [("0", "q")]
    assert advice.rounding_loss(grid(replace(lost, kept=None)), "fp8") == []


def test_changes_that_quantisation_swallows() -> None:
    cells = grid(sums(recorded=(0.2,)), sums(recorded=(0.9, 0.8, 0.1)), sums())
    warning = one(advice.quantised_loss(cells), "quantised-loss", "warning")
    assert "In 1 of 2 quantised cells" in warning.text and warning.cells == [("0", "q")]
    assert advice.quantised_loss(grid(sums(), sums(recorded=(0.6,)))) == []


def stats(ranks: list[int], *experts: torch.Tensor) -> TensorStats:
    spectra = tensor_spectra(torch.zeros(experts[0].shape), experts, ranks)
    return TensorStats("t", tuple(experts[0].shape), True, [0.0] * 2, [0.0] * 2, [1.0] * 2, ranks, {}, None, spectra)


def test_ranks_at_their_limit() -> None:
    full = [torch.randn(10, 10, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    row = stats([5, 5], *full)
    warning = one(advice.rank_limit(grid(sums(stats=(row,)), sums()), EXPERTS), "rank-limit", "note")
    assert "In 1 of 1 decomposed cells" in warning.text and warning.cells == [("0", "q")]
    assert advice.rank_limit(grid(sums(stats=(stats([4, 4], *full),))), EXPERTS) == []
    thin = [torch.eye(10)[:, :1] @ torch.ones(1, 10), torch.eye(10)[:, 1:2] @ torch.ones(1, 10)]
    assert advice.rank_limit(grid(sums(stats=(stats([5, 5], *thin),))), EXPERTS) == []


def test_experts_in_the_same_directions() -> None:
    expert = torch.eye(30)[:, :2] @ torch.eye(30)[:2]
    other = torch.eye(30)[:, 2:4] @ torch.eye(30)[2:4]
    cells = grid(sums(stats=(stats([2, 2], expert, expert),)), sums(stats=(stats([2, 2], expert, other),)))
    warning = one(advice.interference(cells), "interference", "note")
    assert "In 1 of 2 decomposed cells" in warning.text and warning.cells == [("0", "q")]


def test_what_is_not_in_the_figures() -> None:
    assert "./x cannot be read: it is gone." in remarks.missing_inputs({"./x": "it is gone"})[0].text
    assert remarks.refused(ValueError("no"))[0].severity == "error"
    kinds = [(w.severity, w.kind, w.text) for w in remarks.said(("heads differ",), ("renamed",))]
    assert kinds == [("warning", "configuration", "heads differ."), ("note", "input", "renamed.")]
    assert "first model, ./x" in remarks.no_base("./x")[0].text
    assert "written 3 of 5 tensors" in remarks.resumed(3, 5)[0].text
    assert remarks.calibrated()[0].kind == "calibrated" and "bad" in remarks.unmeasured(ValueError("bad"))[0].text
    mixed = [*remarks.no_base("x"), *remarks.missing_inputs({"y": "z"}), *remarks.refused(ValueError("no"))]
    assert [w.severity for w in remarks.by_severity(mixed)] == ["error", "warning", "note"]


def test_vocabularies_that_differ() -> None:
    moved = one(remarks.vocabularies({"m": (3, 2, "base")}), "vocabulary", "warning")
    assert "m gives 3 rows to other tokens and differs in 2 rows" in moved.text and "that of base." in moved.text
    assert "m differs in 2 rows" in one(remarks.vocabularies({"m": (0, 2, "base")}), "vocabulary", "note").text


def test_joined_sums_are_those_of_the_tensors_as_one() -> None:
    whole = joined([sums((3.0, 1.0)), sums((4.0, math.nan), merged=math.nan)])
    assert (whole.norm(0), whole.norm(1), whole.numel, whole.squared) == (5.0, 1.0, 200, 200.0)
    assert whole.changed == 160 and whole.surviving is None and whole.kept is None
