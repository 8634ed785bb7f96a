"""Makes a plan of a recipe: opens the models, checks that they fit together, and lists the jobs and output files."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.checkpoint import CheckpointReader, OutputPlan, TensorInfo, check_output_folder, plan_output
from resm_kernels.checkpoint.statistics import StatisticsReader
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine.checks import check_configs, check_tied, check_weights, tied_notes
from resm_kernels.engine.config_warnings import config_warnings
from resm_kernels.engine.cuda_device import open_devices
from resm_kernels.engine.describe import describe_plan
from resm_kernels.engine.devices import Device
from resm_kernels.engine.layout import Layout, OutputTensor, and_more, plan_layout
from resm_kernels.engine.models import MergeError, Model, OpenedModels, open_models
from resm_kernels.engine.output import output_files
from resm_kernels.engine.statistics import Statistics, open_statistics, statistics_files, statistics_of
from resm_kernels.engine.tokenizer import OutputTokenizer, build_tokenizer
from resm_kernels.engine.vocabulary import AlignedReader, Vocabulary
from resm_kernels.engine.window import Job, Window
from resm_kernels.lora import AdapterReader, StoredFactors
from resm_kernels.lora.factors import factors_workspace, mergeable
from resm_kernels.methods import Method
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import Recipe, load_recipe
from resm_kernels.tensor_names import OUTPUT_HEAD, is_vocabulary, layer_position

_DEFAULT_OPTIONS: Final = MergeOptions()


@dataclass(frozen=True)
class TensorJob(Job):
    """The job of one output tensor, with all that its computation needs.

    Attributes:
        dtype: The output tensor's dtype.
        shape: Its shape.
        copied: True if the tensor is copied, because it holds no floating-point numbers, and not merged.
        parameters: The method's keyword arguments.
        folders: The folders of the models that it is merged from, the base's first if there is a base.
        n_experts: How many of these are experts.
        factors: The stored factors of each expert, None for an expert that does not change the tensor. The inputs are
            then the base's tensor, and A and B of each expert that has factors; `lora.merge_factors` merges them. None
            if the experts are merged as whole tensors.
        has_statistics: True if the inputs end with a statistic of each expert.
        transposed: True if the statistics say that the weight is stored as (in, out).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    copied: bool
    parameters: Mapping[str, Any]
    folders: tuple[Path, ...]
    n_experts: int
    factors: tuple[StoredFactors | None, ...] | None = None
    has_statistics: bool = False
    transposed: bool = False

    def folder(self, position: int | None) -> Path:
        """Return the folder of the expert at that position, or of the base for None."""
        return self.folders[0] if position is None else self.folders[len(self.folders) - self.n_experts + position]


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
        tokenizer: The output's tokenizer if vocabularies are merged; None if the reference model's files are copied.
        jobs: One per output tensor, in the order of the reference model's files.
        output: Files of the output, and where each tensor is in them.
        devices: The GPUs that compute; empty if the CPU does.
        window: How memory is divided; `window.bound` is the most bytes in flight.
        tied: True if an output head that equals the embedding is left out because the config ties the two.
        notes: What is left out of the models, renamed or added, because files spell one model in different ways.
        warnings: What the models' configurations say differently although their tensors have the same shapes.
        began: Value of `time.perf_counter()` when planning began.
    """

    recipe: Recipe
    options: MergeOptions
    out: Path | None
    models: OpenedModels
    statistics: Statistics
    layout: Layout
    tokenizer: OutputTokenizer | None
    jobs: tuple[TensorJob, ...]
    output: OutputPlan
    devices: tuple[Device, ...]
    window: Window
    tied: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    began: float

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

    def describe(self) -> str:
        """Return what would be merged, in which memory, on which devices and into which files, one line for each."""
        return describe_plan(self)

    def auxiliary_files(self) -> Mapping[str, bytes]:
        """Return file name → content of everything but the weights: config, tokenizer, and maybe a model card."""
        return output_files(self)

    def close(self) -> None:
        """Close all input files."""
        for reader in (*(model.reader for model in self.models.all()), *self.statistics.values()):
            reader.close()

    def __enter__(self) -> MergePlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_merge(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    options: MergeOptions = _DEFAULT_OPTIONS,
    *,
    dense: bool = False,
) -> MergePlan:
    """Read the recipe and the models' headers, check that they fit, and plan the merge without doing it.

    One tensor of all models, its result and the method's workspace must fit into memory at once, so that the plan's
    `window.bound` exceeds `options.memory_limit` if the largest tensor needs more.

    Args:
        recipe: Path of a YAML file, a mapping of the same structure, or a `Recipe`.
        out: The output folder, which is checked, but not created; None for a plan that is not to be carried out.
        options: How the merge is to be carried out.
        dense: Form the weights of LoRA adapters even where their factors are enough for the merge.

    Raises:
        RecipeError, CheckpointError, MergeError: The recipe, a model folder, the models together or the output folder
            cannot be used.
        ValueError: A device does not exist or has less memory than asked for.
    """
    began = time.perf_counter()
    devices = open_devices(options.device, options.device_bytes)
    recipe = load_recipe(recipe)
    with contextlib.ExitStack() as on_error:
        models = open_models(recipe, on_error)
        check_configs(models.all(), mixed=options.mixed_architectures)
        tied = check_tied(models.all())
        notes = (*models.notes, *(tied_notes(models.all()) if tied else ()))
        if options.strict and notes:
            raise MergeError(f"strict: {notes[0]}{and_more(notes)}; without --strict this is done")
        check_weights(models.all())
        statistics = open_statistics(recipe, models, on_error)
        layout = plan_layout(recipe, models, {OUTPUT_HEAD} if tied else set())
        tokenizer = vocabulary = None
        if recipe.output_tokenizer is not None:
            tokenizer = build_tokenizer(recipe, models, trust_remote_code=options.trust_remote_code)
            vocabulary = Vocabulary(recipe, models, tokenizer)
        planner = _JobPlanner(recipe, models, statistics, vocabulary, dense=dense)
        jobs = tuple(planner.job(tensor) for tensor in layout.tensors)
        form = models.reference.form
        shard_bytes = options.shard_bytes if form.config_file is not None else sys.maxsize
        if out is not None:
            out = check_output_folder(
                out,
                overwrite=options.overwrite,
                inputs=[*models.folders, *statistics_files(statistics)],
                marker=models.reference.form.marker,
            )
        plan = MergePlan(
            recipe=recipe,
            options=options,
            out=out,
            models=models,
            statistics=statistics,
            layout=layout,
            tokenizer=tokenizer,
            jobs=jobs,
            output=plan_output(((j.name, j.dtype, j.shape) for j in jobs), shard_bytes, form.stems),
            devices=devices,
            window=(Window.for_gpus if devices else Window.for_cpu)(jobs, options.window_bytes),
            tied=tied,
            notes=notes,
            warnings=config_warnings(models.all()),
            began=began,
        )
        on_error.pop_all()
    return plan


class _JobPlanner:
    """Makes the job of each output tensor.

    Args:
        statistics: The statistics of each expert.
        vocabulary: Aligns the rows of embeddings and heads; None if vocabularies are not merged.
        dense: As for `plan_merge`.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: OpenedModels,
        statistics: Statistics,
        vocabulary: Vocabulary | None,
        *,
        dense: bool,
    ) -> None:
        self._recipe, self._models, self._statistics = recipe, models, statistics
        self._vocabulary, self._dense = vocabulary, dense
        self._shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, info in models.reference.reader.tensors.items():
            if vocabulary is None or not is_vocabulary(name):
                self._shapes.setdefault(_kind(name), set()).add(info.shape)

    def job(self, tensor: OutputTensor) -> TensorJob:
        """Return the job of one output tensor.

        Raises:
            MergeError: The tensors that it reads do not fit together.
        """
        piece, method = tensor.piece, self._recipe.method
        models = [self._models.by_source[source] for source in piece.sources]
        inputs = tuple((m.reader, m.reader.tensors[name]) for m, name in zip(models, tensor.inputs, strict=True))
        copied = inputs[0][1].dtype not in FLOAT_DTYPES
        if self._vocabulary is not None and is_vocabulary(tensor.name) and not copied:
            inputs = self._vocabulary.inputs(tensor)
        infos = [info for _, info in inputs]
        self._check_shapes(tensor, models, infos)
        info = infos[0]
        if copied:
            _check_buffer(models, infos)
        dtype = self._recipe.output_dtype
        if copied or dtype is None:
            dtype = tensor.lead.reader.stored_dtype(tensor.inputs[models.index(tensor.lead)])
        expert_inputs = tensor.inputs[len(tensor.inputs) - len(piece.experts) :]
        parameters = {} if copied else self._recipe.tensor_parameters(tensor.name, tensor.depth, piece, expert_inputs)
        experts = zip(models[len(models) - len(expert_inputs) :], expert_inputs, strict=True)
        stored_names = [m.reader.stored_name(name) for m, name in experts]
        statistics, transposed = statistics_of(self._statistics, piece.experts, stored_names)
        self._check_rows(tensor, statistics)
        # Methods state the workspace of a weight (out, in).
        workspace = 0 if copied else method.workspace(info.shape[:: -1 if transposed else 1], len(piece.experts))
        if any(i.dtype == torch.float64 for i in infos):
            workspace *= 2  # methods state their workspace for task vectors in fp32
        workspace += max((reader.workspace for reader, _ in inputs if isinstance(reader, AlignedReader)), default=0)
        factors = None
        if piece.base is not None and not copied and not self._dense and mergeable(method.name, parameters):
            factors = _factors(inputs)
        if factors is not None:
            factor_inputs = [(m.reader, i) for m, f in zip(models[1:], factors, strict=True) if f for i in (f.a, f.b)]
            inputs = (inputs[0], *factor_inputs)
            workspace = factors_workspace(info.shape, [f.rank if f else 0 for f in factors])
        return TensorJob(
            name=tensor.name,
            inputs=(*inputs, *statistics),
            output_bytes=info.numel * dtype.itemsize,
            workspace=workspace,
            dtype=dtype,
            shape=info.shape,
            copied=copied,
            parameters=parameters,
            folders=tuple(m.folder for m in models),
            n_experts=len(piece.experts),
            factors=factors,
            has_statistics=bool(statistics),
            transposed=transposed,
        )

    def _check_rows(self, tensor: OutputTensor, statistics: Sequence[tuple[StatisticsReader, TensorInfo]]) -> None:
        """Refuse statistics with an entry for each row of an embedding whose rows are aligned by token."""
        if statistics and self._vocabulary is not None and is_vocabulary(tensor.name):
            reader = statistics[0][0]
            if reader.about.kind == "fisher":
                raise MergeError(
                    f"{reader.file}: has a statistic for each row of {tensor.name!r} in the expert's own vocabulary; "
                    "merge Fisher statistics without tokenizer or tokenizer_source"
                )

    def _check_shapes(self, tensor: OutputTensor, models: Sequence[Model], infos: Sequence[TensorInfo]) -> None:
        """Refuse inputs of different shapes, and stacked layers that the config cannot describe together."""
        lead = models.index(tensor.lead)
        hint = "; the vocabularies differ in size: merge them with tokenizer_source: base or union"
        for model, info in zip(models, infos, strict=True):
            if info.shape != infos[lead].shape:
                raise MergeError(
                    f"{model.folder}: tensor {info.name!r} has shape {info.shape}, need {infos[lead].shape} as in "
                    f"{models[lead].folder}{hint if is_vocabulary(tensor.name) else ''}"
                )
        reference_shapes = self._shapes.get(_kind(tensor.name), {infos[0].shape})
        if infos[0].shape not in reference_shapes:
            raise MergeError(
                f"{models[0].folder}: tensor {infos[0].name!r} has shape {infos[0].shape}, need "
                f"{' or '.join(map(str, sorted(reference_shapes)))} as in {self._models.reference.folder}, whose "
                f"config.json the output takes{hint if is_vocabulary(tensor.name) else ''}"
            )


def _kind(name: str) -> str:
    """Return the tensor's name without the number of its layer."""
    position = layer_position(name)
    return name if position is None else position.unnumbered


def _factors(inputs: Sequence[tuple[CheckpointReader, TensorInfo]]) -> tuple[StoredFactors | None, ...] | None:
    """Return the factors of all experts' changes to one matrix of the base, an entry None for an unchanged matrix.

    Returns None if an expert is no adapter of that base, changes the matrix otherwise than by factors, or if the ranks
    of all experts together exceed the matrix's.
    """
    base, info = inputs[0]
    factors: list[StoredFactors | None] = []
    for reader, expert in inputs[1:]:
        if not isinstance(reader, AdapterReader) or reader.base is not base or len(info.shape) != 2:
            return None
        stored = reader.stored_factors(info.name)
        if expert.name != info.name or (stored is None and reader.is_changed(info.name)):
            return None
        factors.append(stored)
    return tuple(factors) if sum(f.rank for f in factors if f) <= min(info.shape) else None


def _check_buffer(models: Sequence[Model], infos: Sequence[TensorInfo]) -> None:
    """Refuse tensors to copy that have different dtypes."""
    for model, info in zip(models, infos, strict=True):
        if info.dtype != infos[0].dtype:
            raise MergeError(
                f"{model.folder}: tensor {info.name!r} is {info.dtype}, need {infos[0].dtype} as in {models[0].folder}"
            )
