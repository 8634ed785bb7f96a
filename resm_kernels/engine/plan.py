"""From a recipe to a list of tensor jobs: opens the models, checks that they fit together, plans the output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.checkpoint import CheckpointReader, OutputPlan, TensorInfo, parse_size, plan_output
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine.checks import check_configs, check_tied, check_weights
from resm_kernels.engine.layout import Layout, OutputTensor, plan_layout
from resm_kernels.engine.models import MergeError, Model, OpenedModels, open_models
from resm_kernels.engine.output import output_files
from resm_kernels.engine.tokenizer import OutputTokenizer, build_tokenizer
from resm_kernels.engine.vocabulary import AlignedReader, Vocabulary
from resm_kernels.engine.window import DEFAULT_WINDOW, Job, Window
from resm_kernels.lora import AdapterReader, StoredFactors
from resm_kernels.lora.factors import factors_workspace, mergeable
from resm_kernels.methods import Method
from resm_kernels.recipe import Recipe, load_recipe
from resm_kernels.tensor_names import OUTPUT_HEAD, is_vocabulary, layer_position

DEFAULT_SHARD_SIZE: Final = "5GB"


@dataclass(frozen=True)
class TensorJob(Job):
    """A tensor to merge (or, if it is no floating-point one, to copy) with all that its computation needs.

    `folders` are the models that it is merged from, the base first if there is one. `factors`, if not None, says that
    the inputs are the base's tensor and A and B of each expert that changes it (None for one that does not), to be
    merged as `lora.merge_factors` does.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    copied: bool
    parameters: Mapping[str, Any]
    folders: tuple[Path, ...]
    n_experts: int
    factors: tuple[StoredFactors | None, ...] | None = None

    def folder(self, position: int | None) -> Path:
        """Folder of the expert at that position, or of the base for None."""
        return self.folders[0] if position is None else self.folders[len(self.folders) - self.n_experts + position]


@dataclass(frozen=True)
class MergePlan:
    """A merge that has been checked as far as it can be without reading tensors.

    Attributes:
        recipe: The recipe.
        models: Every model that is read.
        layout: Which tensors the output has, and what each is merged from.
        tokenizer: The output's tokenizer if vocabularies are merged; None if the reference model's files are copied.
        jobs: One per output tensor, in the order they lie in the reference model's files.
        output: Files and places of the output.
        window: How memory is shared out; `window.bound` is the most bytes in flight.
        tied: True if an output head that equals the embedding is left out because the config ties the two.
    """

    recipe: Recipe
    models: OpenedModels
    layout: Layout
    tokenizer: OutputTokenizer | None
    jobs: tuple[TensorJob, ...]
    output: OutputPlan
    window: Window
    tied: bool

    @property
    def method(self) -> Method:
        return self.recipe.method

    @property
    def reference(self) -> Model:
        """The model whose config and dtypes the output takes: the recipe's base model, or the first model."""
        return self.models.reference

    @property
    def base(self) -> Model | None:
        """The base model (of the first slice) if the method works on differences from one; then every job has one."""
        base = self.recipe.parts[0].slices[0].base
        return None if base is None else self.models.of[base]

    @property
    def experts(self) -> tuple[Model, ...]:
        """The models that are merged, in the recipe's order, as often as it names them."""
        return tuple(self.models.of[source] for source in self.recipe.experts)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that the merge reads."""
        return sum(j.input_bytes for j in self.jobs)

    @property
    def folders(self) -> list[Path]:
        """Every input folder, each once."""
        return list(dict.fromkeys(f for m in self.models.all() for f in (m.folder, m.base_folder)))

    def auxiliary_files(self, *, copy_tokenizer: bool = True, model_card: str | None = None) -> Mapping[str, bytes]:
        """Configuration, tokenizer and, under the title `model_card`, the model card of the output."""
        sizes: dict[torch.dtype, int] = {}
        for job in self.jobs:
            if not job.copied:
                sizes[job.dtype] = sizes.get(job.dtype, 0) + job.output_bytes
        main = max(sizes, key=lambda d: sizes[d], default=torch.float32)
        return output_files(
            self.recipe,
            self.models,
            self.layout,
            self.tokenizer,
            main,
            copy_tokenizer=copy_tokenizer,
            model_card=model_card,
        )

    def close(self) -> None:
        """Close all input files."""
        for model in self.models.all():
            model.reader.close()

    def __enter__(self) -> MergePlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_merge(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    *,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    memory_limit: str | int = DEFAULT_WINDOW,
    dense: bool = False,
    mixed_architectures: bool = False,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Read the recipe and the models' headers, check that they fit, and plan the merge without doing it.

    Args:
        recipe: Path of a YAML file, a mapping of the same structure, or a `Recipe`.
        max_shard_size: Most bytes of tensor data in one output file.
        memory_limit: Bytes of tensor data to keep in flight. One tensor of all models, its result and the method's
            workspace must fit at once, so the plan's `window.bound` is larger if the largest tensor needs it.
        dense: Form the weights of LoRA adapters even where their factors are enough for the merge.
        mixed_architectures: Merge models of different architectures if their tensors have the same names and shapes.
        trust_remote_code: Run code that models bring along to load their tokenizers, where vocabularies are merged.

    Raises:
        RecipeError, CheckpointError, MergeError: The recipe, a model folder, or the models together cannot be used.
    """
    recipe = load_recipe(recipe)
    shard_size = parse_size(max_shard_size, "max_shard_size")
    limit = parse_size(memory_limit, "memory_limit")
    with contextlib.ExitStack() as on_error:
        models = open_models(recipe, on_error)
        check_configs(models.all(), mixed=mixed_architectures)
        tied = check_tied(models.all())
        check_weights(models.all())
        layout = plan_layout(recipe, models, {OUTPUT_HEAD} if tied else set())
        tokenizer = vocabulary = None
        if recipe.output_tokenizer is not None:
            tokenizer = build_tokenizer(recipe, models, trust_remote_code=trust_remote_code)
            vocabulary = Vocabulary(recipe, models, tokenizer)
        planner = _JobPlanner(recipe, models, vocabulary, dense=dense)
        jobs = tuple(planner.job(tensor) for tensor in layout.tensors)
        output = plan_output(((j.name, j.dtype, j.shape) for j in jobs), shard_size)
        plan = MergePlan(recipe, models, layout, tokenizer, jobs, output, Window.fit(jobs, limit), tied)
        on_error.pop_all()
    return plan


class _JobPlanner:
    """Makes the job of each output tensor."""

    def __init__(self, recipe: Recipe, models: OpenedModels, vocabulary: Vocabulary | None, *, dense: bool) -> None:
        self._recipe, self._models, self._vocabulary, self._dense = recipe, models, vocabulary, dense
        self._shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, info in models.reference.reader.tensors.items():
            if vocabulary is None or not is_vocabulary(name):
                self._shapes.setdefault(_kind(name), set()).add(info.shape)

    def job(self, tensor: OutputTensor) -> TensorJob:
        """Return the job, with the tensors it reads checked to fit."""
        piece, method = tensor.piece, self._recipe.method
        models = [self._models.of[source] for source in piece.sources]
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
        own = tensor.inputs[len(tensor.inputs) - len(piece.experts) :]
        parameters = {} if copied else self._recipe.tensor_parameters(tensor.name, tensor.depth, piece, own)
        workspace = 0 if copied else method.workspace(info.shape, len(piece.experts))
        if any(i.dtype == torch.float64 for i in infos):
            workspace *= 2  # what methods state is for task vectors in fp32
        workspace += max((reader.workspace for reader, _ in inputs if isinstance(reader, AlignedReader)), default=0)
        factors = None
        if piece.base is not None and not copied and not self._dense and mergeable(method.name, parameters):
            factors = _factors(inputs)
        if factors is not None:
            stored = [(m.reader, i) for m, f in zip(models[1:], factors, strict=True) if f for i in (f.a, f.b)]
            inputs = (inputs[0], *stored)
            workspace = factors_workspace(info.shape, [f.rank if f else 0 for f in factors])
        return TensorJob(
            name=tensor.name,
            inputs=inputs,
            output_bytes=info.numel * dtype.itemsize,
            workspace=workspace,
            dtype=dtype,
            shape=info.shape,
            copied=copied,
            parameters=parameters,
            folders=tuple(m.folder for m in models),
            n_experts=len(piece.experts),
            factors=factors,
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
        wanted = self._shapes.get(_kind(tensor.name), {infos[0].shape})
        if infos[0].shape not in wanted:
            raise MergeError(
                f"{models[0].folder}: tensor {infos[0].name!r} has shape {infos[0].shape}, need "
                f"{' or '.join(map(str, sorted(wanted)))} as in {self._models.reference.folder}, whose config.json the "
                f"output takes{hint if is_vocabulary(tensor.name) else ''}"
            )


def _kind(name: str) -> str:
    """The tensor's name without the number of its layer."""
    place = layer_position(name)
    return name if place is None else place.stack + place.rest


def _factors(
    inputs: Sequence[tuple[CheckpointReader, TensorInfo]],
) -> tuple[StoredFactors | None, ...] | None:
    """The factors of all experts' changes to one matrix of the base; None if one has none or they are too many."""
    base, info = inputs[0]
    found: list[StoredFactors | None] = []
    for reader, expert in inputs[1:]:
        if not isinstance(reader, AdapterReader) or reader.base is not base or len(info.shape) != 2:
            return None
        own = reader.stored_factors(info.name)
        if expert.name != info.name or (own is None and reader.is_changed(info.name)):
            return None
        found.append(own)
    return tuple(found) if sum(f.rank for f in found if f) <= min(info.shape) else None


def _check_buffer(models: Sequence[Model], infos: Sequence[TensorInfo]) -> None:
    for model, info in zip(models, infos, strict=True):
        if info.dtype != infos[0].dtype:
            raise MergeError(
                f"{model.folder}: tensor {info.name!r} is {info.dtype}, need {infos[0].dtype} as in {models[0].folder}"
            )
