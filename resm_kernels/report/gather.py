"""Gathers a report: plans the merge, reads every model once, tensor by tensor, and says what is out of the ordinary."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from resm_kernels._version import __version__
from resm_kernels.checkpoint import CheckpointError
from resm_kernels.checkpoint.dcp import is_dcp_folder
from resm_kernels.dtypes import dtype_name
from resm_kernels.engine import MergeOptions, MergePlan, plan_merge, rounding_estimate
from resm_kernels.engine.stats import as_resm
from resm_kernels.linalg.threads import thread_count
from resm_kernels.recipe import Recipe
from resm_kernels.report import advice, remarks
from resm_kernels.report.data import Cell, Report, ReportWarning
from resm_kernels.report.grid import Grid, make_grid
from resm_kernels.report.measures import MEASURES, cell_values, spectra_of
from resm_kernels.report.reading import Experts, Outputs, other_tensors, read_merged, read_models
from resm_kernels.report.runs import read_kept, read_run
from resm_kernels.report.source import ReportSource, find_source, missing_models, newer_folders, open_merged
from resm_kernels.report.sums import Sums, joined
from resm_kernels.report.vocabularies import differing_vocabularies


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How a report is gathered.

    Attributes:
        memory_limit: As for `merge_checkpoints`.
        threads: As for `merge_checkpoints`.
        spectra: Compute singular values and overlaps too (the default), which takes as long as a merge by RESM.
        progress: Called as `progress(bytes done, bytes in total)` for each tensor that has been measured.
    """

    memory_limit: str | int = MergeOptions.memory_limit
    threads: int | None = None
    spectra: bool = True
    progress: Callable[[int, int], None] | None = None


_DEFAULTS: Final = ReportOptions()


def gather(source: str | os.PathLike[str] | Recipe, options: ReportOptions = _DEFAULTS) -> Report:
    """Return the report on a recipe, or on a folder that a merge wrote.

    For a recipe these are figures of the experts before a merge; for a folder, the same of its recipe's models, and
    figures of the merged model. If models of the recipe are no longer there, the report has what the others allow, and
    a warning for each. A recipe that cannot be merged makes a report too, with the error as its first warning.

    RESM's figures are with the recipe's parameters if RESM is its method, else with RESM's defaults. Differences count
    from the recipe's base model, else from its first model; in slices without a base model from each slice's first one,
    and without RESM's figures. Of a recipe of several documents, the report is on the output's.

    Every model is read once. Within the memory limit, inputs are read ahead as in a merge; a tensor that alone needs
    more, with its counterparts in all models, exceeds it.

    Args:
        source: The path of a recipe, a recipe, or the path of a merged folder.
        options: How the report is gathered.

    Raises:
        ReportError: A folder was not written by a merge, or holds no recipe.
        RecipeError: The recipe is wrong.
        CheckpointError: The merged model's files are damaged.
    """
    found = find_source(source)
    recipe, run = found.recipe, None if found.out is None else read_run(found.out)
    merging = _merge_options(found, options)
    warnings: list[ReportWarning] = []
    with contextlib.ExitStack() as opened, thread_count(options.threads):
        merged = None if found.out is None else opened.enter_context(open_merged(found.out))
        missing = missing_models(recipe)
        warnings += remarks.missing_inputs(missing)
        base = _base(recipe)
        slices = [piece for part in recipe.parts for piece in part.slices]
        experts = Experts([piece.experts for piece in slices], base if slices[0].base is None else None)
        plan = None if missing else _planned(found, merging, opened, warnings)
        measured = _measured(recipe, base, missing, plan, merging, opened, warnings)
        outputs = Outputs() if plan is None else Outputs.of(plan, experts)
        if found.out is not None:
            outputs = replace(outputs, kept=read_kept(found.out))
            warnings += remarks.newer_inputs([] if plan is None else newer_folders(plan, found.out))
        if merged is not None and measured is not None:
            warnings += remarks.other_tensors(other_tensors(measured, merged))
        parts: list[Sums] = []
        if measured is not None:
            spectra, progress = options.spectra, options.progress
            parts = read_models(measured, experts, outputs, merged, spectra=spectra, progress=progress)
        elif merged is not None:
            parts = read_merged(merged, len(experts.names), merging, options.progress)
    grid = make_grid(dict.fromkeys(name for part in parts for name in part.tensors))
    cells = _cells(grid, parts)
    if base is not None and recipe.base_model is None:
        warnings += remarks.no_base(base)
    if found.calibrated:
        warnings += remarks.calibrated()
    if run is not None and run.tensors_resumed:
        warnings += remarks.resumed(run.tensors_resumed, run.tensors)
    warnings += _findings(cells, experts.names, outputs, recipe)
    shown = [_cell(place, sums) for place, sums in cells.items()]
    used = {key for cell in shown for key in cell.values}
    return Report(
        title=found.title,
        version=__version__,
        recipe=recipe.text,
        method=recipe.merge_method,
        base=base,
        experts=experts.names,
        out=None if found.out is None else str(found.out),
        rows=grid.rows,
        columns=grid.columns,
        measures=[measure for measure in MEASURES if measure.key in used],
        cells=shown,
        stages=None if run is None else run.stages,
        memory=None if run is None else run.memory,
        machine={} if run is None else run.machine,
        warnings=remarks.by_severity(warnings),
    )


def _merge_options(found: ReportSource, options: ReportOptions) -> MergeOptions:
    """Return the options of the plans. A folder may be of a merge with options that a recipe alone does not have."""
    own = MergeOptions(memory_limit=options.memory_limit, threads=options.threads)
    if found.out is None:
        return own
    out_format = "dcp" if is_dcp_folder(found.out) else own.out_format
    return replace(own, mixed_architectures=True, tied_embeddings="both", out_format=out_format)


def _base(recipe: Recipe) -> str | None:
    """Return the model that differences count from; None if each slice has one of its own."""
    if recipe.base_model is not None:
        return recipe.base_model
    return recipe.models[0].model if recipe.models is not None and len(recipe.models) > 1 else None


def _planned(
    found: ReportSource, options: MergeOptions, opened: contextlib.ExitStack, warnings: list[ReportWarning]
) -> MergePlan | None:
    """Return the plan of the recipe; None if it cannot be merged, which is added to the warnings then."""
    try:
        plan = opened.enter_context(plan_merge(found.recipe, options=options, dense=True))
        estimates = rounding_estimate(plan) if found.out is None else []
        warnings += remarks.said(plan.warnings, [*plan.notes, *estimates])
    except ValueError as error:
        warnings += remarks.refused(error)
        return None
    try:
        warnings += remarks.vocabularies(differing_vocabularies(plan))
    except CheckpointError as error:
        warnings += remarks.unread_vocabulary(error)
    return plan


def _measured(
    recipe: Recipe,
    base: str | None,
    missing: Collection[str],
    plan: MergePlan | None,
    options: MergeOptions,
    opened: contextlib.ExitStack,
    warnings: list[ReportWarning],
) -> MergePlan | None:
    """Return the plan whose tensors are measured: one by RESM where that is possible, else the recipe's own.

    It is None if the models that have to be there are not, or do not fit together.
    """
    if recipe.merge_method == "resm" and plan is not None:
        return plan
    left = [entry for entry in recipe.models or () if entry.model not in missing and entry.model != base]
    if base is None or base in missing or (missing and not left):
        return plan
    first = base if recipe.base_model is None else None
    try:
        resm = as_resm(recipe, base=first, without=missing)
        return opened.enter_context(plan_merge(resm, options=options, dense=True))
    except ValueError as error:
        if plan is not None:
            warnings += remarks.unmeasured(error)
        return plan


def _cells(grid: Grid, parts: Iterable[Sums]) -> dict[tuple[str, str], Sums]:
    """Return the sums of each cell by its place, in the order of rows and columns."""
    found: dict[tuple[str, str], list[Sums]] = {}
    for part in parts:
        found.setdefault(grid.places[part.tensors[0]], []).append(part)
    places = sorted(found, key=lambda place: (grid.rows.index(place[0]), grid.columns.index(place[1])))
    return {place: joined(found[place]) for place in places}


def _cell(place: tuple[str, str], sums: Sums) -> Cell:
    values, reasons = cell_values(sums)
    shape = "×".join(map(str, sums.shapes[0])) or "scalar"
    several = len(sums.tensors) > 1
    return Cell(
        row=place[0],
        column=place[1],
        tensors=list(sums.tensors),
        shape=f"{shape}, {len(sums.tensors)} tensors" if several else shape,
        role=sums.role,
        values=values,
        spectra=spectra_of(sums),
        problem="; ".join(sums.problems) or None,
        reasons=reasons,
    )


def _findings(cells: advice.Cells, experts: Sequence[str], outputs: Outputs, recipe: Recipe) -> list[ReportWarning]:
    """Return what is out of the ordinary in the figures.

    Ranks are of interest where RESM merges. Without a base model differences count from the first model, whose own
    change all have in common, so that they share directions.
    """
    dtypes = sorted({dtype_name(dtype) for dtype in outputs.dtypes.values() if dtype is not None})
    return [
        *advice.nonfinite(cells),
        *advice.equal_to_base(cells, experts),
        *advice.equal_experts(cells, experts),
        *advice.dominant(cells, experts),
        *advice.uneven(cells, experts),
        *advice.merged_norm(cells),
        *advice.rounding_loss(cells, " and ".join(dtypes) or "the models' dtype"),
        *advice.quantised_loss(cells),
        *(advice.rank_limit(cells, experts) if recipe.merge_method == "resm" else ()),
        *(advice.interference(cells) if recipe.base_model is not None else ()),
    ]
