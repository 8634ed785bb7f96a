"""Writes the models that other documents of a recipe merge to folders that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from resm_kernels.checkpoint import check_output_folder, verify_checkpoint
from resm_kernels.checkpoint.record import read_record
from resm_kernels.engine.documents import document_named
from resm_kernels.engine.job import JOB, record_facts
from resm_kernels.engine.plan import MergePlan, plan_merge
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import kept_folders


def write_documents(plan: MergePlan, carry_out: Callable[[MergePlan], object]) -> Mapping[str, Path]:
    """Merge the other documents of a plan's recipe into folders, and return these by the documents' names.

    A folder that an earlier run has written is used again if it is what this one would write: of the same recipe,
    inputs and options, with the tensors that it had.

    Args:
        plan: The plan of the output, with the option `keep_intermediates`.
        carry_out: Does a planned merge.

    Raises:
        CheckpointError: A folder holds something else, and `overwrite` is not set.
    """
    places = kept_folders(plan.recipe, plan.options.keep_intermediates)
    options = replace(plan.options, keep_intermediates=None, out_format=MergeOptions.out_format, copy_tokenizer=True)
    for name, place in places.items():
        with document_named(name):
            may_replace = options.overwrite or _job_of(place) is not None
            check_output_folder(place, overwrite=may_replace, inputs=plan.models.folders)
    written: dict[str, Path] = {}
    for name, recipe in plan.recipe.documents.items():
        place = places[name]
        with document_named(name):
            with plan_merge(recipe, None, options, written=written) as own:
                form = own.models.reference.form
                is_done = _job_of(place) == record_facts(own)[JOB] and not verify_checkpoint(place).findings
            if not is_done:
                with plan_merge(recipe, place, options, written=written) as own:
                    carry_out(own)
        written[name] = place if form.config_file is not None else place / form.marker
    return written


def _job_of(folder: Path) -> str | None:
    """Return the hash of what the model in a folder was made from; None if it is not known."""
    record = read_record(folder)
    return None if record is None else record.facts.get(JOB)
