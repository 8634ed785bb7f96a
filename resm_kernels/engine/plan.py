"""Makes a plan of a recipe: opens the models, checks that they fit together, and lists the jobs and output files."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch

from resm_kernels.checkpoint import (
    OutputPlan,
    check_output_folder,
    format_bytes,
    plan_dcp_output,
    plan_output,
)
from resm_kernels.engine.blocks import divide
from resm_kernels.engine.checks import check_configs, check_tied, check_weights, tied_notes
from resm_kernels.engine.config_warnings import config_warnings
from resm_kernels.engine.cuda_device import open_devices
from resm_kernels.engine.dcp import check_config_source, check_full_weights, dcp_notes, output_marker, output_paths
from resm_kernels.engine.describe import describe_plan
from resm_kernels.engine.devices import Device
from resm_kernels.engine.documents import Documents, check_documents, document_notes
from resm_kernels.engine.layout import Layout, and_more, plan_layout
from resm_kernels.engine.models import MergeError, Model, OpenedModels, open_models
from resm_kernels.engine.output import output_files
from resm_kernels.engine.roles import Roles
from resm_kernels.engine.rounding import OutputFormat
from resm_kernels.engine.stacked_config import stacked_config
from resm_kernels.engine.statistics import Statistics, open_statistics, statistics_files
from resm_kernels.engine.tensor_jobs import JobPlanner, TensorJob
from resm_kernels.engine.token_tables import TokenTables, find_token_tables
from resm_kernels.engine.tokenizer import OutputTokenizer, build_tokenizer
from resm_kernels.engine.vocabulary import Vocabulary
from resm_kernels.engine.window import Window
from resm_kernels.hub import UnseenWeights, View, begin, headers_alone
from resm_kernels.lora import AdapterReader
from resm_kernels.methods import Method
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import Recipe, RecipeSource, kept_folders, load_recipe
from resm_kernels.tensor_names import OUTPUT_HEAD

if TYPE_CHECKING:
    from resm_kernels.engine.costs import Machine

_DEFAULT_OPTIONS: Final = MergeOptions()


@dataclass(frozen=True)
class MergePlan:
    """A merge that has been checked as far as possible without reading tensors.

    Attributes:
        recipe: The recipe.
        options: How the merge is carried out.
        out: The output folder; None for a plan that is not to be carried out.
        models: Every model that is read.
        statistics: The statistics of each expert, for methods that need them.
        layout: Which tensors the output has, and what each is merged from.
        config: The output's config.json, but for its dtype, vocabulary and quantisation.
        tokenizer: The output's tokenizer if vocabularies are merged; None if the reference model's files are copied.
        tables: The tensors that follow the tokenizer, if vocabularies are merged or the reference model is an adapter
            with another vocabulary than its base model's.
        jobs: One per output tensor, in the order of the reference model's files.
        pieces: The jobs that are carried out: the same, but for large tensors a job for each block.
        format: The format of quantised weights that the output has; None if it has full weights.
        output: Files of the output, and where each tensor is in them.
        devices: The GPUs that compute; empty if the CPU does.
        window: How memory is divided; `window.bound` is the most bytes in flight.
        tied: True if an output head that equals the embedding is left out because the config ties the two.
        notes: What the user should know, a line each: what is left out of the models, renamed or added because files
            spell one model in different ways; how quantised weights are read; what torch DCP folders hold beside.
        roles_from: Where the roles of the tensors are from, in words; empty for a method that asks for none.
        warnings: What the models' configurations say differently although their tensors have the same shapes.
        documents: The plans of the recipe's other documents that are read, by name, each after those that it reads.
        written: The folders of those that have been merged already.
        began: Value of `time.perf_counter()` when planning began.
        owned: True if `close` closes the models.
        view: The models on the hub whose weights are not here, of a plan that was made from their headers; None if all
            weights are here.
    """

    recipe: Recipe
    options: MergeOptions
    out: Path | None
    models: OpenedModels
    statistics: Statistics
    layout: Layout
    config: Mapping[str, Any]
    tokenizer: OutputTokenizer | None
    tables: TokenTables | None
    jobs: tuple[TensorJob, ...]
    pieces: tuple[TensorJob, ...]
    format: OutputFormat | None
    output: OutputPlan
    devices: tuple[Device, ...]
    window: Window
    tied: bool
    notes: tuple[str, ...]
    roles_from: str
    warnings: tuple[str, ...]
    documents: Mapping[str, MergePlan]
    written: Mapping[str, Path]
    began: float
    view: View | None = None
    owned: bool = True

    @property
    def method(self) -> Method:
        """The merge method."""
        return self.recipe.method

    @property
    def reference(self) -> Model:
        """The model whose config and dtypes the output takes: the recipe's base model, or the first model."""
        return self.models.reference

    @property
    def base(self) -> Model | None:
        """The base model (of the first slice) if the method works on task vectors; then every job has a base."""
        base = self.recipe.parts[0].slices[0].base
        return None if base is None else self.models.by_source[base]

    @property
    def experts(self) -> tuple[Model, ...]:
        """The models that are merged, in the recipe's order, as often as it names them."""
        return tuple(self.models.by_source[source] for source in self.recipe.experts)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that the merge reads."""
        return sum(j.input_bytes for j in self.jobs)

    @property
    def said(self) -> tuple[str, ...]:
        """The warnings and notes as lines to print."""
        return (*(f"warning: {line}" for line in self.warnings), *(f"note: {line}" for line in self.notes))

    def describe(self, machine: tuple[Machine, str] | None = None) -> str:
        """Return what would be merged, in which memory, on which devices and into which files, one line for each.

        The recipe's other documents come first.

        With a machine, and words for where its rates are from (`chosen_machine`), also estimate how long it takes.
        """
        text = describe_plan(self, machine)
        if self.view is None:
            return text
        names = ", ".join(listing.name for listing, _ in self.view.missing.values())
        return (
            f"{self.view.shown(text)}\nto fetch      {format_bytes(self.view.nbytes)} of weights from the hub: {names}"
        )

    def auxiliary_files(self) -> Mapping[str, bytes]:
        """Return file name → content of everything but the weights: config, tokenizer, and maybe a model card."""
        return output_files(self)

    def close(self) -> None:
        """Close all input files that were opened for this plan."""
        models = self.models.all() if self.owned else ()
        for reader in (*(model.reader for model in models), *self.statistics.values()):
            reader.close()
        if self.view is not None:
            self.view.close()

    def __enter__(self) -> MergePlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_merge(
    recipe: RecipeSource,
    out: str | os.PathLike[str] | None = None,
    options: MergeOptions = _DEFAULT_OPTIONS,
    *,
    dense: bool = False,
    fetch: bool = True,
    written: Mapping[str, Path] = MappingProxyType({}),
    models: OpenedModels | None = None,
) -> MergePlan:
    """Read the recipe and the models' headers, check that they fit, and plan the merge without doing it.

    Tensors that do not fit into `options.memory_limit` with their inputs, result and workspace are merged in blocks,
    where the method allows it. Other tensors must fit into memory at once, so that the plan's `window.bound` exceeds
    the limit if the largest of them needs more.

    Models on the hub whose weights are not here are planned from their files' headers first, so that models that do not
    fit together are refused before the weights are fetched. Weights that have no header to be read (pickled files,
    GGUF) are fetched before, and all of them for experts' statistics, which need the weights.

    Args:
        recipe: Path of a YAML file, a mapping of the same structure, or a `Recipe`.
        out: The output folder, which is checked, but not created; None for a plan that is not to be carried out.
        options: How the merge is to be carried out.
        dense: Form the weights of LoRA adapters even where their factors are enough for the merge.
        fetch: Fetch weights from the hub (default). Without it, the plan is for showing alone: its tensors can be read
            only from the hub, and tensors count as equal if samples of them are equal.
        written: Folders of the recipe's other documents that have been merged already, by name.
        models: The recipe's models, if they are open already; then the plan does not close them.

    Raises:
        RecipeError, CheckpointError, MergeError: The recipe, a model folder, the models together or the output folder
            cannot be used.
        ValueError: A device does not exist or has less memory than asked for.
    """
    recipe = load_recipe(recipe)
    check_documents(recipe, options)
    began = time.perf_counter()
    begin()
    plan = functools.partial(_plan_documents, recipe, out, options, written, began, dense=dense, models=models)
    recipes = (recipe, *recipe.documents.values())
    if fetch and any(source.statistics is not None for r in recipes for source in r.sources):
        return plan()
    while (planned := _plan_from_headers(plan, fetch)) is None:
        pass
    if planned.view is None or not fetch:
        return planned
    with planned:
        planned.view.fetch()
    return plan()


def _plan_from_headers(plan: Callable[[], MergePlan], fetch: bool) -> MergePlan | None:
    """Return a plan for which no weights were fetched, with a view if some are on the hub.

    The result is None if weights had to be fetched of which no headers can be read; then it can be tried again.
    """
    with headers_alone() as view:
        try:
            planned = plan()
            view.check_space()
        except UnseenWeights as unseen:
            if not fetch:
                raise
            unseen.fetch()
            view.close()
            return None
        except ValueError as error:
            error.args = tuple(view.shown(part) if isinstance(part, str) else part for part in error.args)
            raise
    if not view.missing:
        return planned
    notes, warned = tuple(map(view.shown, planned.notes)), tuple(map(view.shown, planned.warnings))
    return replace(planned, view=view, notes=notes, warnings=warned)


def _plan_documents(
    recipe: Recipe,
    out: str | os.PathLike[str] | None,
    options: MergeOptions,
    written: Mapping[str, Path],
    began: float,
    *,
    dense: bool,
    models: OpenedModels | None,
) -> MergePlan:
    """Plan the merges of all documents of a recipe."""

    def plan_document(document: Recipe, document_options: MergeOptions, documents: Documents) -> MergePlan:
        return _plan(document, None, document_options, documents)

    documents = Documents(recipe, options, plan_document, written)
    plan = _plan(recipe, out, options, documents, dense=dense, models=models)
    notes = [f"document {name!r}: {note}" for name, own in documents.plans.items() for note in own.notes]
    warnings = [f"document {name!r}: {line}" for name, own in documents.plans.items() for line in own.warnings]
    return replace(
        plan,
        notes=(*notes, *document_notes(recipe, options), *plan.notes),
        warnings=(*warnings, *plan.warnings),
        documents=documents.plans,
        written=dict(written),
        began=began,
    )


def _plan(
    recipe: Recipe,
    out: str | os.PathLike[str] | None,
    options: MergeOptions,
    documents: Documents,
    *,
    dense: bool = False,
    models: OpenedModels | None = None,
) -> MergePlan:
    """Plan the merge of one document; see `plan_merge`."""
    # Workers of a cluster open their own GPUs; here there may be none.
    devices = open_devices("cpu" if options.engine == "ray" else options.device, options.device_bytes)
    check_full_weights(recipe, options)
    with contextlib.ExitStack() as on_error:
        is_dcp = options.out_format == "dcp"
        # A training script expects every tensor that it has saved when it loads, buffers and tied heads too.
        owned = models is None
        if models is None:
            models = open_models(recipe, on_error, documents, as_stored=is_dcp, tied_embeddings=options.tied_embeddings)
        check_configs(models.all(), mixed=options.mixed_architectures)
        tied = not is_dcp and check_tied(models.all())
        spelling_notes = (*models.notes, *(tied_notes(models.all()) if tied else ()))
        if options.strict and spelling_notes:
            raise MergeError(f"strict: {spelling_notes[0]}{and_more(spelling_notes)}; without --strict this is done")
        check_weights(models.all())
        statistics = open_statistics(recipe, models, on_error)
        layout = plan_layout(recipe, models, {OUTPUT_HEAD} if tied else set())
        tokenizer = vocabulary = tables = None
        if recipe.output_tokenizer is not None:
            tables = find_token_tables(models.reference)
            tokenizer = build_tokenizer(recipe, models, tables, trust_remote_code=options.trust_remote_code)
            vocabulary = Vocabulary(recipe, models, tokenizer, tables)
        elif isinstance(models.reference.reader, AdapterReader) and models.reference.reader.is_resized:
            tables = find_token_tables(models.reference)
        output_format = None if recipe.output_format is None else OutputFormat(recipe.output_format, models)
        if output_format is not None and layout.origins:
            output_format.check_stacked()
        roles = Roles() if any(p.name == "spectral" for p in recipe.method.parameters) else None
        planner = JobPlanner(
            recipe,
            models,
            statistics,
            vocabulary,
            output_format,
            roles,
            threads=1 if devices else options.threads or torch.get_num_threads(),
            memory=options.window_bytes,
            dense=dense,
        )
        jobs = tuple(planner.job(tensor) for tensor in layout.tensors)
        if devices:
            pieces, window = jobs, Window.for_gpus(jobs, options.window_bytes)
        else:
            pieces, window = divide(jobs, options.window_bytes, planner.block_unit, planner.workspace)
        check_config_source(recipe, models, layout, options)
        weights = [stored for job in jobs for stored in job.stored]
        if is_dcp:
            output: OutputPlan = plan_dcp_output(weights, options.shard_bytes, output_paths(models, layout))
        else:
            form = models.reference.form
            shard_bytes = options.shard_bytes if form.config_file is not None else sys.maxsize
            output = plan_output(weights, shard_bytes, form.stems)
        if out is not None:
            kept = kept_folders(recipe, options.keep_intermediates).values()
            out = check_output_folder(
                out,
                overwrite=options.overwrite,
                inputs=[*models.folders, *statistics_files(statistics), *kept],
                marker=output_marker(out, models, options),
            )
        plan = MergePlan(
            recipe=recipe,
            options=options,
            out=out,
            models=models,
            statistics=statistics,
            layout=layout,
            config=stacked_config(layout, models),
            tokenizer=tokenizer,
            tables=tables,
            jobs=jobs,
            pieces=pieces,
            format=output_format,
            output=output,
            devices=devices,
            window=window,
            tied=tied,
            notes=(
                *spelling_notes,
                *models.remarks,
                *_reader_notes(models),
                *dcp_notes(models),
                *(tables.notes if tables else ()),
            ),
            roles_from="" if roles is None else roles.source,
            warnings=config_warnings(models.all()),
            documents={},
            written={},
            began=time.perf_counter(),
            owned=owned,
        )
        on_error.pop_all()
    return plan


def _reader_notes(models: OpenedModels) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for model in models.all() for note in model.reader.notes))
