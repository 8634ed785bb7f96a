"""Merges checkpoints tensor by tensor into a folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from resm_kernels.checkpoint import CheckpointWriter
from resm_kernels.checkpoint.record import RUN_FILE
from resm_kernels.checks import Check, NonFiniteError, check_values, collected_checks
from resm_kernels.engine.cpu_executor import CpuExecutor
from resm_kernels.engine.dcp import output_marker
from resm_kernels.engine.devices import DeviceUse
from resm_kernels.engine.gpu_executor import GpuExecutor
from resm_kernels.engine.job import merge_job, record_facts
from resm_kernels.engine.matrices import merge_matrices
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.pipeline import Executor, Pipeline, Timings
from resm_kernels.engine.plan import MergePlan, plan_merge
from resm_kernels.engine.rounding import ROUNDING_FILE, Kept, KeptLog, describe_kept, rounding_record
from resm_kernels.engine.run_record import run_record
from resm_kernels.engine.streaming import Streaming
from resm_kernels.engine.tensor_jobs import TensorJob
from resm_kernels.linalg.threads import thread_count
from resm_kernels.lora import Factors, merge_factors
from resm_kernels.options import MergeKeywords, MergeOptions
from resm_kernels.recipe import RecipeSource

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in `typing`

Progress = Callable[[int, int], None]
_SAMPLES: Final = 4


@dataclass(kw_only=True)
class MergeReport(Timings):
    """The result of a merge; it has the attributes of `Timings` too.

    Attributes:
        out: The output folder.
        method: Name of the merge method.
        tensors: Number of tensors in the output.
        tensors_resumed: How many of them an earlier run of the same merge had written before it was cut off.
        bytes_read: Bytes of tensor data read.
        bytes_written: Bytes of weight files written.
        seconds: Wall time, from reading the recipe to the final rename.
        commit: Seconds spent flushing to disk and renaming.
        memory_bound: Bytes of tensor data that may be in flight at once in the CPU's memory.
        kept: How each weight fared that the output quantises; empty for an output of full weights.
        notes: What was left out of the models, renamed or added, because files spell one model in different ways.
        warnings: What the models' configurations say differently although their tensors have the same shapes.
    """

    out: Path
    method: str
    tensors: int
    tensors_resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    commit: float
    memory_bound: int
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def busy_share(self, device: DeviceUse) -> float:
        """Return the share of the wall time in which a copy or a computation was running on that GPU."""
        return device.busy / self.seconds


def merge_checkpoints(
    recipe: RecipeSource,
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    **options: Unpack[MergeKeywords],
) -> MergeReport:
    """Merge model folders as the recipe says and write the result to the folder `out`.

    The output appears under its name only when it is complete. If the merge is interrupted or killed, or fails by an
    error of the system, the tensors that are done stay in an unfinished folder next to `out`, and the same call goes on
    from there, with the same bits; an error in the models leaves nothing behind. The result depends on the recipe, the
    models and the random seed alone: not on shard sizes, memory limit or threads.
    On a GPU it differs within the tolerances of the ops (see docs/gpu.md).

    Args:
        recipe: Path of a YAML file, a mapping of the same structure or a list of mappings, one for each document, or a
            `Recipe`.
        out: Folder to create.
        progress: Called as `progress(bytes done, bytes in total)` in the calling thread for each tensor that has been
            written.
        max_shard_size: The most bytes of tensor data in one output file, as a number or as a size such as "5GB" (the
            default) or "512MiB".
        overwrite: Replace `out` if it is a model folder already (default: False). The old folder is removed only when
            the new one is complete.
        restart: Begin anew (default: False), whatever an earlier run left unfinished. Without it, unfinished work of
            another recipe, other inputs, options or versions is an error.
        hash_inputs: Know input files again by a hash of their whole content (default: False), which reads them once
            more, instead of by header, size and the time of their last change. It must be the same when the merge goes
            on.
        memory_limit: Bytes of tensor data to hold in memory at once, as for `max_shard_size`; 512MiB by default. Larger
            tensors are merged in blocks. It is exceeded only for tensors that have to be whole, those of spectral
            methods among them (see `plan_merge(...).window.bound`). With GPUs all tensors are whole; this memory is
            pinned then, and does not include the method's workspace, which is in the GPUs' memory.
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
        out_format: "safetensors" (the default), or "dcp" for a folder that `torch.distributed.checkpoint.load` reads.
        engine: "local" (the default) merges in this process; "ray" merges with the workers of a Ray cluster, with the
            same result (see docs/ray.md). Memory limit and threads are then each worker's, and `device` is "cpu" or
            "cuda".
        address: The address of a running Ray cluster, with engine "ray"; None, the default, starts one on this
            machine and ends it after the merge.
        workers: Ray workers on each machine, with engine "ray"; None, the default, takes one, or one for each GPU.
        keep_intermediates: Folder in which the merges of a recipe's named documents are written, each under its name,
            before the output is merged from them; None, the default, merges their tensors when they are read.
        strict: Refuse models of which tensors would be left out, renamed or added, because their files spell one model
            in different ways (default: False).
        tied_embeddings: What to do with an adapter that changes one of two tied tensors, an input embedding or its
            output head: "error" (the default) refuses it; "untie" stores both, so that the other one keeps its values;
            "both" changes both, as PEFT's merge_and_unload does.

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
    if plan.options.keep_intermediates is None or not plan.recipe.documents:
        return _write(plan, plan.out, progress)
    from resm_kernels.engine.kept_documents import write_documents  # it carries out merges

    written = write_documents(plan, functools.partial(carry_out, progress=progress))
    with plan_merge(plan.recipe, plan.out, plan.options, written=written) as last:
        return _write(replace(last, began=plan.began), plan.out, progress)


def _write(plan: MergePlan, out: Path, progress: Progress | None) -> MergeReport:
    """Merge what a plan describes into the folder `out`."""
    began = time.perf_counter()
    writing = CheckpointWriter(
        out,
        plan.output,
        plan.auxiliary_files(),
        job=merge_job(plan),
        restart=plan.options.restart,
        overwrite=plan.options.overwrite,
        marker=output_marker(out, plan.models, plan.options),
        facts=record_facts(plan),
    )
    with writing as writer:
        kept = KeptLog(writer.folder.parent)
        jobs = [job for job in plan.jobs if not _is_done(job, writer, kept)]
        names = {job.name for job in jobs}
        writer.redo({name for job in jobs for name, *_ in job.stored})
        prepared = time.perf_counter()
        try:
            if plan.options.engine == "ray":
                from resm_kernels.engine.ray_engine import merge_on_ray  # ray_worker imports this module

                timings = merge_on_ray(plan, names, writer, kept, progress)
            else:
                timings = run_jobs(plan, names, writer.write, kept.add, progress)
        except MergeError as error:
            # The same models would meet it again, and others need a merge of their own; memory may be free next time.
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                writer.discard()
            raise
        computed = time.perf_counter()
        writer.flush()
        flushed = time.perf_counter()
        rounded = tuple(kept[job.name] for job in plan.jobs if job.name in kept)
        if rounded:
            writer.add_file(ROUNDING_FILE, rounding_record(rounded))
        times = {"planned": began - plan.began, "prepared": prepared - began, "flushed": flushed - computed}
        writer.add_file(RUN_FILE, run_record(plan, timings, names, **times))
        writer.commit()
    finished = time.perf_counter()
    return MergeReport(
        out=out,
        method=plan.method.name,
        tensors=len(plan.jobs),
        tensors_resumed=len(plan.jobs) - len(names),
        bytes_read=sum(job.input_bytes for job in plan.jobs if job.name in names),
        bytes_written=plan.output.nbytes,
        seconds=finished - plan.began,
        commit=finished - computed,
        memory_bound=plan.window.bound,
        kept=rounded,
        notes=plan.notes,
        warnings=plan.warnings,
        **vars(timings),
    )


def _is_done(job: TensorJob, writer: CheckpointWriter, kept: KeptLog) -> bool:
    """Return True if an earlier run has written all that a job makes, and has noted how a rounded weight fared."""
    is_written = all(name in writer.finished for name, *_ in job.stored)
    return writer.is_committed or (is_written and (job.rounding is None or job.name in kept))


def run_jobs(
    plan: MergePlan,
    names: Collection[str],
    write: Callable[[str, Tensor, int], object],
    note: Callable[[Kept], object],
    progress: Progress | None = None,
) -> Timings:
    """Merge the tensors of these names in this process, in the plan's order.

    Args:
        write: `write(name, result, start)` gets each tensor of the output, or the block of it from element `start` on.
        note: Gets how each weight fared that is rounded, before its tensors are written.
    """

    def write_result(job: TensorJob, result: Tensor) -> None:
        if job.rounding is None:
            # A block of whole rows need not have the shape of a part of the tensor.
            write(job.name, result if job.whole is None else result.reshape(-1), job.start)
            return
        with thread_count(plan.options.threads):  # each Python thread has a number of its own
            tensors, own = job.rounding.encode(result)
        note(own)
        for name, tensor in tensors.items():
            write(name, tensor, 0)

    with thread_count(plan.options.threads):
        return Pipeline(
            jobs=[job for job in plan.pieces if job.name in names],
            window=plan.window,
            executor=_executor(plan),
            write=write_result,
            progress=progress,
        ).run()


def rounding_estimate(plan: MergePlan) -> list[str]:
    """Return a line about how a few weights fare that the output quantises; none for an output of full weights."""
    if plan.format is None:
        return []
    if plan.view is not None:
        return ["estimate of what rounding keeps: needs the weights, which have not been fetched from the hub"]
    return [f"estimate from a few weights: {describe_kept(estimate_rounding(plan), plan.format.name)}"]


def estimate_rounding(plan: MergePlan) -> tuple[Kept, ...]:
    """Merge and round a few tensors of a plan without writing them, and return how they fared.

    From each quarter of the weights that the output quantises, in their order, the smallest is taken.
    """
    jobs = [job for job in plan.jobs if job.rounding is not None]
    kept = []
    with thread_count(plan.options.threads):
        for quarter in range(_SAMPLES):
            part = jobs[len(jobs) * quarter // _SAMPLES : len(jobs) * (quarter + 1) // _SAMPLES]
            if part:
                job = min(part, key=lambda j: math.prod(j.shape))
                assert job.rounding is not None
                result = compute_tensor(plan, job, [reader.read_info(info) for reader, info in job.inputs])
                kept.append(job.rounding.encode(result)[1])
    return tuple(kept)


def _executor(plan: MergePlan) -> Executor[TensorJob]:
    if not plan.devices:
        streaming = streaming_of(plan)
        return CpuExecutor(
            lambda job, tensors: compute_job(plan, streaming, job, tensors), lambda: streaming.bytes_held
        )
    return GpuExecutor(
        plan.devices, functools.partial(start_tensor, plan), is_copied=lambda job: job.copied, copy=copied_tensor
    )


def streaming_of(plan: MergePlan) -> Streaming:
    """Return what merges the plan's large tensors block by block."""
    return Streaming(plan.pieces, plan.window, functools.partial(_merged, plan))


def compute_job(plan: MergePlan, streaming: Streaming, job: TensorJob, tensors: list[Tensor]) -> Tensor:
    """Merge or copy one tensor, or one block of a tensor, on the CPU."""
    if job.whole is None or job.matrices is not None:
        return compute_tensor(plan, job, tensors)
    if job.copied:
        return copied_tensor(job, tensors)
    with _errors_named(job):
        block = streaming.compute(job, tensors)
        _check_fp16(block)
    return block


def compute_tensor(plan: MergePlan, job: TensorJob, tensors: list[Tensor]) -> Tensor:
    """Merge or copy one tensor on the CPU; errors of the method become errors that name tensor and model."""
    if job.copied:
        return copied_tensor(job, tensors)
    merged = _merged(plan, job, tensors)
    with _errors_named(job):
        _check_fp16(merged)
    return merged


def start_tensor(plan: MergePlan, job: TensorJob, tensors: list[Tensor]) -> tuple[Tensor, list[Check]]:
    """Begin to merge one tensor on a GPU. Return the result, and the checks to make when the GPU is done with it.

    Waiting for a check at once would leave the GPU without work until the next tensor is begun.
    """
    with collected_checks() as checks:
        try:
            result = _merged(plan, job, tensors).contiguous()
            with _errors_named(job):
                _check_fp16(result)
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
            return _merge_factors(plan, job, tensors)
        models, statistics = tensors[: len(job.folders)], tensors[len(job.folders) :]
        base, experts = (models[0], models[1:]) if plan.base is not None else (None, models)
        given: dict[str, Any] = {}
        if plan.method.statistics is not None:
            given["statistics"] = statistics if job.has_statistics else [None] * job.n_experts
            given["transposed"] = job.transposed

        def merge(name: str, base: Tensor | None, experts: list[Tensor]) -> Tensor:
            seed = plan.options.random_seed
            return plan.method(base, experts, out_dtype=job.dtype, name=name, seed=seed, **given, **job.parameters)

        if job.matrices is None:
            return merge(job.name, base, experts)
        assert base is not None
        return merge_matrices(
            job.matrices,
            lambda number, own, others: merge(f"{job.name}[{number}]", own, others),
            base,
            experts,
            job.dtype,
            together=job.together,
            first=job.start // (job.matrices.rows * job.matrices.columns),
        )


def _check_fp16(result: Tensor) -> None:
    if result.dtype == torch.float16:
        check_values(torch.isfinite(result).all(), _check_range)


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
