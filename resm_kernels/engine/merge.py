"""Merges checkpoints tensor by tensor into a folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointWriter
from resm_kernels.checks import Check, NonFiniteError, check_values, collected_checks
from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.devices import DeviceUse
from resm_kernels.engine.gpu_executor import GpuExecutor
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.pipeline import Executor, Pipeline, Timings
from resm_kernels.engine.plan import MergePlan, TensorJob, plan_merge
from resm_kernels.linalg.threads import thread_count
from resm_kernels.lora import Factors, merge_factors
from resm_kernels.options import MergeKeywords, MergeOptions
from resm_kernels.recipe import Recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in `typing`

Progress = Callable[[int, int], None]


@dataclass(kw_only=True)
class MergeReport(Timings):
    """The result of a merge; it has the attributes of `Timings` too.

    Attributes:
        out: The output folder.
        method: Name of the merge method.
        tensors: Number of tensors written.
        bytes_read: Bytes of tensor data read.
        bytes_written: Bytes of weight files written.
        seconds: Wall time, from reading the recipe to the final rename.
        commit: Seconds spent flushing to disk and renaming.
        memory_bound: Bytes of tensor data that may be in flight at once in the CPU's memory.
        notes: What was left out of the models, renamed or added, because files spell one model in different ways.
        warnings: What the models' configurations say differently although their tensors have the same shapes.
    """

    out: Path
    method: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    commit: float
    memory_bound: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def busy_share(self, device: DeviceUse) -> float:
        """Return the share of the wall time in which a copy or a computation was running on that GPU."""
        return device.busy / self.seconds


def merge_checkpoints(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    **options: Unpack[MergeKeywords],
) -> MergeReport:
    """Merge model folders as the recipe says and write the result to the folder `out`.

    The output appears under its name only when it is complete; if anything goes wrong before, nothing is left behind.
    The result depends on the recipe, the models and the random seed alone: not on shard sizes, memory limit or threads.
    On a GPU it differs within the tolerances of the ops (see docs/gpu.md).

    Args:
        recipe: Path of a YAML file, a mapping of the same structure, or a `Recipe`.
        out: Folder to create.
        progress: Called as `progress(bytes done, bytes in total)` in the calling thread for each tensor that has been
            written.
        max_shard_size: The most bytes of tensor data in one output file, as a number or as a size such as "5GB" (the
            default) or "512MiB".
        overwrite: Replace `out` if it is a model folder already (default: False). The old folder is removed only when
            the new one is complete.
        memory_limit: Bytes of tensor data to hold in memory at once, as for `max_shard_size`; 512MiB by default. It is
            exceeded only if the largest tensor alone needs more (see `plan_merge(...).window.bound`). With GPUs this
            memory is pinned, and does not include the method's workspace, which is in the GPUs' memory.
        threads: Number of threads to compute with; None, the default, leaves torch's setting.
        device: Where to compute: "cpu" (the default); "cuda", "cuda:N", or several GPUs, "cuda:0,cuda:1" or "cuda:all";
            "auto", which is a GPU if torch sees one, else the CPU. Any number of GPUs of one kind gives the same
            results.
        device_memory: Bytes that tensors may take on each GPU, as for `max_shard_size`; None, the default, takes 0.8 of
            the memory that is free there. A tensor that needs more even when it is alone is an error.
        random_seed: Whole number (default: 0) that methods which draw random numbers (DARE, DELLA) derive them from,
            together with each tensor's name: neither order nor device changes the numbers.
        copy_tokenizer: Copy the tokenizer's files if the recipe does not ask for a new tokenizer (default: True).
        model_card: Write README.md, which says what was merged and how, and the recipe as mergekit_config.yml (default:
            True).
        mixed_architectures: Merge models of different architectures if their tensors have the same names and shapes
            (default: False).
        trust_remote_code: Run Python code from the models' folders to load their tokenizers, where vocabularies are
            merged (default: False).
        strict: Refuse models of which tensors would be left out, renamed or added, because their files spell one model
            in different ways (default: False).

    Raises:
        RecipeError, CheckpointError, MergeError: The recipe, the models or the output folder cannot be used. All are
            ValueErrors whose message names the file, the tensor and the need.
        ValueError: A device does not exist or has less memory than asked for, or an option is out of its range.
    """
    with plan_merge(recipe, out, MergeOptions(**options)) as plan:
        return carry_out(plan, progress)


def carry_out(plan: MergePlan, progress: Progress | None = None) -> MergeReport:
    """Do the merge that a plan describes; see `merge_checkpoints`.

    Raises:
        ValueError: The plan was made without an output folder.
    """
    if plan.out is None:
        raise ValueError("plan: got one without an output folder, need plan_merge(recipe, out, …)")
    files = plan.auxiliary_files()
    with thread_count(plan.options.threads), CheckpointWriter(plan.out, plan.output, files) as writer:
        pipeline = Pipeline(
            jobs=plan.jobs,
            window=plan.window,
            executor=_executor(plan),
            write=lambda job, result: writer.write(job.name, result),
            progress=progress,
        )
        timings = pipeline.run()
        computed = time.perf_counter()
        writer.commit()
    finished = time.perf_counter()
    return MergeReport(
        out=plan.out,
        method=plan.method.name,
        tensors=len(plan.jobs),
        bytes_read=plan.bytes_read,
        bytes_written=plan.output.nbytes,
        seconds=finished - plan.began,
        commit=finished - computed,
        memory_bound=plan.window.bound,
        notes=plan.notes,
        warnings=plan.warnings,
        **vars(timings),
    )


def _executor(plan: MergePlan) -> Executor[TensorJob]:
    if not plan.devices:
        return CpuExecutor(functools.partial(compute_tensor, plan))
    return GpuExecutor(
        plan.devices, functools.partial(start_tensor, plan), is_copied=lambda job: job.copied, copy=copied_tensor
    )


def compute_tensor(plan: MergePlan, job: TensorJob, tensors: list[Tensor]) -> Tensor:
    """Merge or copy one tensor on the CPU; errors of the method become errors that name tensor and model."""
    return copied_tensor(job, tensors) if job.copied else _merged(plan, job, tensors)


def start_tensor(plan: MergePlan, job: TensorJob, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
    """Begin to merge one tensor on a GPU. Return the result, and the checks to make when the GPU is done with it.

    Waiting for a check at once would leave the GPU without work until the next tensor is begun.
    """
    with collected_checks() as checks:
        try:
            result = _merged(plan, job, tensors).contiguous()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            for values, check in checks:  # an error in the input is the cause of this one, and is raised instead
                _check_named(job, check, values.cpu())
            raise
    return result, [(values, functools.partial(_check_named, job, check)) for values, check in checks]


def _check_named(job: TensorJob, check: Callable[[Tensor], None], values: Tensor) -> None:
    with _errors_named(job):
        check(values)


def _merged(plan: MergePlan, job: TensorJob, tensors: list[Tensor]) -> Tensor:
    with _errors_named(job):
        if job.factors is not None:
            result = _merge_factors(plan, job, tensors)
        else:
            models, statistics = tensors[: len(job.folders)], tensors[len(job.folders) :]
            base, experts = (models[0], models[1:]) if plan.base is not None else (None, models)
            given: dict[str, Any] = {}
            if plan.method.statistics is not None:
                given["statistics"] = statistics if job.has_statistics else [None] * job.n_experts
                given["transposed"] = job.transposed
            result = plan.method(
                base,
                experts,
                out_dtype=job.dtype,
                name=job.name,
                seed=plan.options.random_seed,
                **given,
                **job.parameters,
            )
        if job.dtype == torch.float16:
            check_values(torch.isfinite(result).all(), _check_range)
    return result


def _check_range(is_finite: Tensor) -> None:
    if not bool(is_finite):
        raise ValueError("merged values exceed float16's range (65504); need out_dtype: bfloat16 or float32")


@contextlib.contextmanager
def _errors_named(job: TensorJob) -> Iterator[None]:
    """Turn errors within the context into MergeErrors that name the tensor, and the model if one is at fault."""
    try:
        yield
    except NonFiniteError as error:
        raise MergeError(
            f"{job.folder(error.index)}: tensor {job.name!r} holds {error.count} NaN or infinite values; the model is "
            "damaged"
        ) from error
    except (ValueError, TypeError) as error:
        raise MergeError(f"tensor {job.name!r}: {error}") from error


def _merge_factors(plan: MergePlan, job: TensorJob, tensors: list[Tensor]) -> Tensor:
    """Merge adapters through their factors: the tensors are the base's, then A and B of each expert that has them."""
    assert job.factors is not None
    base, factor_tensors = tensors[0], iter(tensors[1:])
    unchanged = Factors(base.new_zeros(base.shape[0], 0), base.new_zeros(0, base.shape[1]), 1.0)
    experts = [
        unchanged if stored is None else stored.factors(next(factor_tensors), next(factor_tensors))
        for stored in job.factors
    ]
    return merge_factors(base, experts, plan.method.name, out_dtype=job.dtype, **job.parameters)


def copied_tensor(job: TensorJob, tensors: list[Tensor]) -> Tensor:
    """Return the tensor of a job that copies one; it must be the same in all models."""
    for folder, tensor in zip(job.folders[1:], tensors[1:], strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise MergeError(
                f"{folder}: tensor {job.name!r} ({job.dtype}, not merged) differs from the one in {job.folders[0]}; "
                "need identical ones"
            )
    return tensors[0]
