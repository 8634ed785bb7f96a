"""The jobs of a merge: what each output tensor is computed from, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resm_kernels.checkpoint import (
    CheckpointReader,
    TensorInfo,
)
from resm_kernels.checkpoint.statistics import StatisticsReader
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine.layout import OutputTensor
from resm_kernels.engine.models import MergeError, Model, OpenedModels
from resm_kernels.engine.roles import Roles
from resm_kernels.engine.rounding import OutputFormat, Rounding, StoredTensor
from resm_kernels.engine.statistics import Statistics, statistics_of
from resm_kernels.engine.vocabulary import AlignedReader, Vocabulary
from resm_kernels.engine.window import Job
from resm_kernels.lora import AdapterReader, StoredFactors
from resm_kernels.lora.factors import factors_workspace, mergeable
from resm_kernels.recipe import Recipe
from resm_kernels.roles import Role, TensorRole
from resm_kernels.tensor_names import is_vocabulary, unnumbered


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
        role: The tensor's role, where the method asks for it.
        matrices: The role again if the tensor is merged matrix by matrix (`engine.matrices`); None if it is merged as
            it is stored.
        together: How many of its matrices are merged at the same time.
        rounding: How the merged weight, which is fp32 then, is quantised; None if it is written as it is.
        start: The index of the first element, for the job of a block of a tensor.
        whole: The job of the tensor that this job does a block of; None for the job of a whole tensor.
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
    role: TensorRole | None = None
    matrices: TensorRole | None = None
    together: int = 1
    rounding: Rounding | None = None
    start: int = 0
    whole: TensorJob | None = None

    @property
    def numel(self) -> int:
        """The number of elements of the output tensor."""
        return math.prod(self.shape)

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors of the output's files that the job makes."""
        return ((self.name, self.dtype, self.shape),) if self.rounding is None else self.rounding.stored

    @property
    def is_streamed(self) -> bool:
        """True for the job of a block that is not computed from its own inputs alone (`engine.streaming`)."""
        return self.whole is not None and not self.copied and self.matrices is None

    def folder(self, position: int | None) -> Path:
        """Return the folder of the expert at that position, or of the base for None."""
        return self.folders[0] if position is None else self.folders[len(self.folders) - self.n_experts + position]


class JobPlanner:
    """Makes the job of each output tensor.

    Args:
        statistics: The statistics of each expert.
        vocabulary: Aligns the rows of embeddings and heads; None if vocabularies are not merged.
        output_format: Says how weights are quantised; None for full weights.
        roles: The roles of the models' tensors; None for a method that asks for none.
        threads: How many matrices of a tensor may be merged at the same time.
        memory: Bytes that these may take together.
        dense: As for `plan_merge`.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: OpenedModels,
        statistics: Statistics,
        vocabulary: Vocabulary | None,
        output_format: OutputFormat | None,
        roles: Roles | None,
        *,
        threads: int,
        memory: int,
        dense: bool,
    ) -> None:
        self._recipe, self._models, self._statistics = recipe, models, statistics
        self._vocabulary, self._format, self._dense = vocabulary, output_format, dense
        self._roles, self._threads, self._memory = roles, threads, memory
        self._shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, info in models.reference.reader.tensors.items():
            if vocabulary is None or not vocabulary.covers(name):
                self._shapes.setdefault(unnumbered(name), set()).add(info.shape)

    def job(self, tensor: OutputTensor) -> TensorJob:
        """Return the job of one output tensor.

        Raises:
            MergeError: The tensors that it reads do not fit together.
        """
        piece, method = tensor.piece, self._recipe.method
        models = [self._models.by_source[source] for source in piece.sources]
        inputs = tuple((m.reader, m.reader.tensors[name]) for m, name in zip(models, tensor.inputs, strict=True))
        copied = inputs[0][1].dtype not in FLOAT_DTYPES
        aligned = self._vocabulary is not None and self._vocabulary.covers(tensor.name)
        if aligned:
            assert self._vocabulary is not None
            inputs = self._vocabulary.inputs(tensor)
        if copied and any(isinstance(reader, AlignedReader) for reader, _ in inputs):
            raise MergeError(
                f"{models[0].folder}: tensor {tensor.name!r} has whole numbers for each token, which cannot be aligned "
                "to another vocabulary; need models with one vocabulary, and no tokenizer or tokenizer_source"
            )
        infos = [info for _, info in inputs]
        self._check_shapes(tensor, models, infos)
        info = infos[0]
        if copied:
            _check_buffer(models, infos)
        dtype = self._recipe.output_dtype
        if copied or dtype is None:
            dtype = tensor.lead.reader.stored_dtype(tensor.inputs[models.index(tensor.lead)])
        rounding = None
        if self._format is not None and not copied:
            rounding = self._format.rounding(tensor, inputs, info.shape, aligned=aligned)
            dtype = dtype if rounding is None else torch.float32
        expert_inputs = tensor.inputs[len(tensor.inputs) - len(piece.experts) :]
        parameters = {} if copied else self._recipe.tensor_parameters(tensor.name, tensor.depth, piece, expert_inputs)
        role = matrices = None
        if self._roles is not None and not copied:
            role = self._roles.of(tensor.lead, tensor.inputs[models.index(tensor.lead)])
            parameters |= self._spectral(tensor, role, len(info.shape), parameters)
            if role.role.is_linear_map and parameters["spectral"] and not aligned:
                is_as_stored = (role.rows, role.columns) == info.shape and not role.transposed
                matrices = None if is_as_stored else role
        experts = zip(models[len(models) - len(expert_inputs) :], expert_inputs, strict=True)
        stored_names = [m.reader.stored_name(name) for m, name in experts]
        statistics, transposed = statistics_of(self._statistics, piece.experts, stored_names)
        self._check_rows(tensor, statistics)
        factors = None
        if piece.base is not None and not copied and not self._dense and mergeable(method.name, parameters):
            factors = _factors(inputs)
        if factors is not None:
            factor_inputs = [(m.reader, i) for m, f in zip(models[1:], factors, strict=True) if f for i in (f.a, f.b)]
            inputs = (inputs[0], *factor_inputs)
        job = TensorJob(
            name=tensor.name,
            inputs=(*inputs, *statistics),
            output_bytes=info.numel * dtype.itemsize,
            workspace=0,
            dtype=dtype,
            shape=info.shape,
            copied=copied,
            parameters=parameters,
            folders=tuple(m.folder for m in models),
            n_experts=len(piece.experts),
            factors=factors,
            has_statistics=bool(statistics),
            transposed=transposed,
            role=role,
            matrices=matrices if factors is None else None,
            rounding=rounding,
        )
        if job.matrices is not None:
            job = replace(job, together=self._together(job, job.matrices))
        return replace(job, workspace=self.workspace(job, info.shape))

    def _spectral(
        self, tensor: OutputTensor, role: TensorRole, rank: int, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return whether the method decomposes a tensor of that role, as the values of its parameters for that.

        Linear maps are decomposed, and vocabulary as the method says. Tables are averaged like vectors unless the
        recipe says otherwise. Averaged whatever it says is what is neither a table nor a linear map, and what holds a
        vector for each of many channels, as depthwise convolutions do.
        """
        method, piece = self._recipe.method, tensor.piece
        holds_vectors = role.slices > 1 and min(role.rows, role.columns) == 1
        stated = piece.states(method, "spectral", tensor.name, tensor.depth)
        if stated:
            spectral = parameters["spectral"] and role.role not in (Role.NORM, Role.BIAS, Role.STATE)
            spectral = spectral and not holds_vectors
        elif role.role.is_vocabulary:
            parameter = method.parameter("spectral")
            spectral = parameter.default if parameter.vocabulary is None else parameter.vocabulary
        else:
            spectral = role.role.is_linear_map and not holds_vectors
        values: dict[str, Any] = {"spectral": spectral}
        if not spectral and rank > 1 and self._inner_is_spectral(parameters):
            values["inner_spectral"] = False
        return values

    def _inner_is_spectral(self, parameters: Mapping[str, Any]) -> bool:
        """Return True if the method calibrates another one's result that decomposes matrices itself."""
        method = self._recipe.method
        inners: Mapping[str, Any] = getattr(method, "inners", {})
        inner = inners.get(parameters.get("inner", ""))
        return inner is not None and any(p.name == "spectral" for p in inner.parameters)

    def _together(self, job: TensorJob, role: TensorRole) -> int:
        """Return how many of a job's matrices to merge at the same time, within memory; one if most would not fit."""
        matrix = role.rows * role.columns
        inputs = sum(info.dtype.itemsize for _, info in job.inputs) * matrix
        each = self._matrix_workspace(job, role) + inputs + 2 * matrix * job.dtype.itemsize
        fitting = min(self._threads, role.slices, self._memory // each)
        return fitting if 2 * fitting >= min(self._threads, role.slices) else 1

    def _matrix_workspace(self, job: TensorJob, role: TensorRole) -> int:
        """Return the bytes that merging one of a job's matrices allocates beyond inputs and result."""
        rows, columns = (role.columns, role.rows) if role.transposed else (role.rows, role.columns)
        workspace = self._recipe.method.workspace((rows, columns), job.n_experts)
        if any(info.dtype == torch.float64 for _, info in job.inputs):
            workspace *= 2
        items = sum(info.dtype.itemsize for _, info in job.inputs) + job.dtype.itemsize
        # The result is copied to its place, and turned matrices are copies.
        return workspace + rows * columns * (job.dtype.itemsize + (items if role.transposed else 0))

    def workspace(self, job: TensorJob, shape: tuple[int, ...]) -> int:
        """Return the bytes that merging a tensor or a block of that shape allocates beyond inputs and result."""
        others = max(reader.workspace for reader, _ in job.inputs)
        if job.rounding is not None:
            others += job.rounding.workspace
        if job.factors is not None:
            return factors_workspace(shape, [f.rank if f else 0 for f in job.factors]) + others
        if job.matrices is not None:
            return job.together * self._matrix_workspace(job, job.matrices) + others
        # Methods state the workspace of a weight (out, in).
        turned = shape[:: -1 if job.transposed else 1]
        if not job.copied and self._resolved(job).get("spectral") is False:
            turned = (math.prod(shape),)  # a matrix that is averaged takes the memory of a vector
        workspace = 0 if job.copied else self._recipe.method.workspace(turned, job.n_experts)
        if any(info.dtype == torch.float64 for _, info in job.inputs[: len(job.folders)]):
            workspace *= 2  # methods state their workspace for task vectors in fp32
        return workspace + others

    def block_unit(self, job: TensorJob) -> int | None:
        """Return the number of elements of which the job's blocks have to be multiples; None for a job to do whole."""
        if (
            job.factors is not None
            or job.rounding is not None
            or not all(reader.has_parts(info.name) for reader, info in job.inputs)
        ):
            return None
        if job.copied:
            return 1
        if job.matrices is not None:
            return job.matrices.rows * job.matrices.columns if job.matrices.slices > 1 else None
        rule = self._recipe.method.blocks
        return None if rule is None else rule(job.shape, self._resolved(job))

    def _resolved(self, job: TensorJob) -> dict[str, Any]:
        """Return every parameter of the method, by keyword, as it merges the tensor."""
        return self._recipe.method.resolve(job.n_experts, dict(job.parameters), job.name)

    def _check_rows(self, tensor: OutputTensor, statistics: Sequence[tuple[StatisticsReader, TensorInfo]]) -> None:
        """Refuse statistics with an entry for each row of an embedding whose rows are aligned by token."""
        if statistics and self._vocabulary is not None and self._vocabulary.covers(tensor.name):
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
        reference_shapes = self._shapes.get(unnumbered(tensor.name), {infos[0].shape})
        if infos[0].shape not in reference_shapes:
            raise MergeError(
                f"{models[0].folder}: tensor {infos[0].name!r} has shape {infos[0].shape}, need "
                f"{' or '.join(map(str, sorted(reference_shapes)))} as in {self._models.reference.folder}, whose "
                f"config.json the output takes{hint if is_vocabulary(tensor.name) else ''}"
            )


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
