"""Reads the models of a report, every tensor once and in the order of the files, and sums up what it measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointReader
from resm_kernels.dtypes import FLOAT_DTYPES
from resm_kernels.engine import MergeOptions, MergePlan, Window
from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.pipeline import Pipeline
from resm_kernels.engine.stats import job_stats, stats_jobs
from resm_kernels.engine.tensor_jobs import TensorJob
from resm_kernels.engine.window import Job
from resm_kernels.recipe import Source
from resm_kernels.report.sums import Sums, count_nonfinite, grams, placed, round_mean

Progress = Callable[[int, int], None]


class Experts:
    """The experts of a report, in the order of its lists: the models of all slices, as often as one slice names them.

    Args:
        slices: The sources that each slice merges.
        base: A model among them that is no expert, because differences count from it; None if there is none.
    """

    def __init__(self, slices: Iterable[Sequence[Source]], base: str | None) -> None:
        self._base = base
        self._places: dict[tuple[str, int], int] = {}
        for sources in slices:
            for key in self._keys(sources):
                self._places.setdefault(key, len(self._places))

    @property
    def names(self) -> list[str]:
        """The experts' names in the recipe."""
        return [name for name, _ in self._places]

    def places(self, sources: Sequence[Source]) -> list[int]:
        """Return the position of each of a slice's sources that is an expert."""
        return [self._places[key] for key in self._keys(sources)]

    def is_expert(self, source: Source) -> bool:
        """Return False for the base model."""
        return self._base is None or not source.is_model(self._base)

    def _keys(self, sources: Sequence[Source]) -> Iterator[tuple[str, int]]:
        """Yield the name of each expert, and how many of the sources before it have the same."""
        seen: dict[str, int] = {}
        for source in filter(self.is_expert, sources):
            seen[source.model] = seen.get(source.model, -1) + 1
            yield source.model, seen[source.model]


@dataclass(frozen=True)
class Outputs:
    """What the recipe's own plan says of each output tensor, by name; empty if there is no such plan.

    Attributes:
        dtypes: The dtype that it is rounded to; None for a weight that the output quantises.
        weights: The weight of each expert, NaN for one that is not merged there; missing for methods without weights,
            and for RESM, whose weights are among its statistics.
        is_resm: True if the method is RESM.
        kept: Which part of its change each quantised weight kept, of an output that has been merged.
    """

    dtypes: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    is_resm: bool = False
    kept: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: MergePlan, experts: Experts) -> Outputs:
        """Return what a plan says."""
        has_weights = any(p.name == "weight" and p.per_expert for p in plan.method.parameters)
        weights: dict[str, tuple[float, ...]] = {}
        for tensor, job in zip(plan.layout.tensors, plan.jobs, strict=True):
            if job.copied or not has_weights or plan.method.name == "resm":
                continue
            sources = tensor.piece.experts
            values = plan.method.resolve(len(sources), dict(job.parameters), job.name)["weight"]
            own = [float(v) for source, v in zip(sources, values, strict=True) if experts.is_expert(source)]
            weights[tensor.name] = placed(own, experts.places(sources), len(experts.names))
        dtypes = {job.name: None if job.rounding is not None else job.dtype for job in plan.jobs}
        return cls(dtypes, weights, plan.method.name == "resm")


def read_models(
    plan: MergePlan,
    experts: Experts,
    outputs: Outputs,
    merged: CheckpointReader | None,
    *,
    spectra: bool,
    progress: Progress | None,
) -> list[Sums]:
    """Return the sums over every floating-point tensor of a plan, or over each block of one.

    Args:
        plan: A plan that was made with `dense`. With RESM as its method there are RESM's statistics too; else
            differences count from the base model, or from the first model of each slice.
        experts: The experts.
        outputs: What is known of the output's tensors.
        merged: Reads the merged model, whose tensors have the names of the plan's; None if there is none.
        spectra: Compute singular values and overlaps.
        progress: As for `Pipeline`.
    """
    with_stats = plan.method.name == "resm"
    pieces = {tensor.name: tensor.piece for tensor in plan.layout.tensors}
    if with_stats:
        jobs = stats_jobs(plan, spectra=spectra)
    else:
        jobs = [replace(job, output_bytes=0, workspace=_workspace(job)) for job in plan.jobs if not job.copied]
    if merged is not None:
        jobs = [_with_merged(job, merged) for job in jobs]
    parts: list[Sums] = []

    def compute(job: TensorJob, tensors: list[Tensor]) -> None:
        piece = pieces[job.name]
        models, results = tensors[: len(job.folders)], tensors[len(job.folders) + job.has_statistics * job.n_experts :]
        result = _block(results[0], job, models[0]) if results else None
        # Without a base model, differences count from the first source, which is in the list of experts.
        places = experts.places(piece.experts)[0 if piece.base is not None else 1 :]
        whole = _whole_sums(job, [source.model for source in piece.sources], models, result, places, experts, outputs)
        if with_stats:
            rows = tuple(job_stats(job, models[0], models[1:], spectra=spectra))
            own = tuple(placed(row.weights, places, len(experts.names)) for row in rows if row.weights)
            weights = own if outputs.is_resm else whole.weights
            whole = replace(whole, stats=rows, places=tuple(places), weights=weights)
        parts.append(whole)

    Pipeline(jobs, Window.for_cpu(jobs, plan.options.window_bytes), CpuExecutor(compute), progress=progress).run()
    return parts


def read_merged(
    merged: CheckpointReader, n_experts: int, options: MergeOptions, progress: Progress | None
) -> list[Sums]:
    """Return the sums over every floating-point tensor of a merged model, whose models are not there."""
    infos = [info for info in merged.tensors.values() if info.dtype in FLOAT_DTYPES]
    jobs = [Job(info.name, ((merged, info),), 0, merged.workspace) for info in infos]
    parts: list[Sums] = []

    def compute(job: Job, tensors: list[Tensor]) -> None:
        (tensor,) = tensors
        nothing = torch.full((n_experts + 1, n_experts + 1), torch.nan, dtype=torch.float64)
        squared = float(grams(None, [tensor], [0], 1))
        problems = _problems(job.name, {"the merged model": tensor}) if math.isnan(squared) else ()
        shapes = (tuple(tensor.shape),)
        parts.append(Sums((job.name,), shapes, "", tensor.numel(), squared, nothing, problems=problems))

    Pipeline(jobs, Window.for_cpu(jobs, options.window_bytes), CpuExecutor(compute), progress=progress).run()
    return parts


def other_tensors(plan: MergePlan, merged: CheckpointReader) -> list[str]:
    """Return the floating-point tensors of a plan that the merged model does not have, or has in another shape."""
    own = merged.tensors
    return [j.name for j in plan.jobs if not j.copied and (j.name not in own or own[j.name].shape != j.shape)]


def _workspace(job: TensorJob) -> int:
    """Return the bytes that reading the inputs takes beyond them."""
    return max(reader.workspace for reader, _ in job.inputs)


def _with_merged(job: TensorJob, merged: CheckpointReader) -> TensorJob:
    """Return a job with the merged model's tensor, or the same block of it, as its last input, if it has that tensor.

    A tensor of which the merged model cannot read parts is read whole for each block.
    """
    info = merged.tensors.get(job.name)
    if info is None or info.shape != job.shape:
        return job
    if job.whole is not None and merged.has_parts(job.name):
        info = info.elements(job.start, job.inputs[0][1].shape)
    return replace(
        job, inputs=(*job.inputs, (merged, info)), workspace=max(job.workspace, _workspace(job), merged.workspace)
    )


def _block(result: Tensor, job: TensorJob, like: Tensor) -> Tensor:
    """Return the block of the merged model's tensor that belongs to a job, in the shape of another model's block."""
    if result.numel() > like.numel():
        result = result.reshape(-1)[job.start : job.start + like.numel()]
    return result.reshape(like.shape)


def _whole_sums(
    job: TensorJob,
    names: Sequence[str],
    models: Sequence[Tensor],
    result: Tensor | None,
    places: Sequence[int],
    experts: Experts,
    outputs: Outputs,
) -> Sums:
    """Return the sums over a tensor or a block of it, without RESM's statistics.

    Args:
        names: The names of `models`.
        models: The base model's tensor, or that of the first model, and the others'.
        result: The merged model's tensor.
        places: The position of each model but the first in the lists of the report.
    """
    base, *others = models
    n = len(experts.names)
    compared = [*others, *([result] if result is not None else [])]
    gram = grams(base, compared, [*places, *([n] if result is not None else [])], n + 1)
    squared = float(grams(None, [base], [0], 1))
    problems: tuple[str, ...] = ()
    if math.isnan(squared) or any(math.isnan(float(gram[t, t])) for t in places) or _is_damaged(gram, n, result):
        named = dict(zip(dict.fromkeys(names), models, strict=False))
        problems = _problems(job.name, named | ({} if result is None else {"the merged model": result}))
    weights = (outputs.weights[job.name],) if job.name in outputs.weights else ()
    sums = Sums((job.name,), (job.shape,), _role(job), base.numel(), squared, gram, weights=weights, problems=problems)
    if job.name in outputs.kept:
        sums = replace(sums, recorded=(outputs.kept[job.name],))
    if problems or not others:
        return sums
    rounded = round_mean(job.name, base, others, result, outputs.dtypes.get(job.name, job.dtype))
    return replace(
        sums,
        kept=rounded.kept,
        changed=rounded.changed,
        surviving=rounded.surviving,
        merged_changed=rounded.merged_changed,
    )


def _is_damaged(gram: Tensor, n: int, result: Tensor | None) -> bool:
    return result is not None and math.isnan(float(gram[n, n]))


def _role(job: TensorJob) -> str:
    return "" if job.role is None else str(job.role.role)


def _problems(tensor: str, models: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return a line for each model that has NaN or infinite values in a tensor."""
    counts = {name: count_nonfinite(values) for name, values in models.items()}
    return tuple(f"{name} has {count} NaN or infinite values in {tensor}" for name, count in counts.items() if count)
