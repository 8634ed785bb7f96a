"""`merge_checkpoints`: carries a plan out, tensor by tensor, into a folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resm_kernels.checkpoint import CheckpointWriter, check_output_folder, parse_size
from resm_kernels.checks import Check, check_values, collected_checks
from resm_kernels.engine.cuda import open_devices
from resm_kernels.engine.device import Device, DeviceUse
from resm_kernels.engine.models import MergeError
from resm_kernels.engine.overlap import DevicePipeline, DeviceTimings
from resm_kernels.engine.plan import DEFAULT_SHARD_SIZE, MergePlan, TensorJob, plan_merge
from resm_kernels.engine.window import DEFAULT_WINDOW, Job, Pipeline, Window
from resm_kernels.lora import Factors, merge_factors
from resm_kernels.ops import NonFiniteError
from resm_kernels.recipe import Recipe

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: The output folder.
        method: Name of the merge method.
        tensors: Number of tensors written.
        bytes_read: Bytes of tensor data read.
        bytes_written: Bytes of weight files written.
        seconds: Wall time, from reading the recipe to the final rename.
        read_wait: Seconds of it that computation waited for data.
        compute: Seconds spent computing; with GPUs, the longest that one's thread was in the method.
        write_wait: Seconds that computation waited for earlier results to be written; with GPUs, also those from the
            last copy there to the last result written.
        commit: Seconds spent flushing to disk and renaming.
        memory_bound: Bytes of tensor data that may be in flight at once in the CPU's memory.
        memory_peak: The most that were.
        device_wait: Seconds that data waited for room on a GPU.
        devices: What each GPU did; none if the CPU did.
    """

    out: Path
    method: str
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    read_wait: float
    compute: float
    write_wait: float
    commit: float
    memory_bound: int
    memory_peak: int
    device_wait: float = 0.0
    devices: tuple[DeviceUse, ...] = ()

    def busy_share(self, device: DeviceUse) -> float:
        """Of the wall time, the share in which a copy or a computation was under way on that GPU."""
        return device.busy / self.seconds


def merge_checkpoints(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    memory_limit: str | int = DEFAULT_WINDOW,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    device_memory: str | int | None = None,
    random_seed: int = 0,
    progress: Progress | None = None,
    copy_tokenizer: bool = True,
    model_card: bool = True,
    mixed_architectures: bool = False,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge model folders as the recipe says and write the result to the folder `out`.

    The output appears under its name only when it is complete; whatever goes wrong before, nothing is left. The result
    depends on the recipe and the models alone: not on shard sizes, memory limit or threads. On a GPU it differs within
    the tolerances of the ops (see docs/gpu.md).

    Args:
        recipe: Path of a YAML file, a mapping of the same structure, or a `Recipe`.
        out: Folder to create.
        max_shard_size: Most bytes of tensor data in one output file ("5GB", "512MiB", or a number of bytes).
        overwrite: Replace `out` if it is a model folder already; the old one goes only when the new one is complete.
        memory_limit: Bytes of tensor data to keep in flight; more only if the largest tensor alone needs more (see
            `plan_merge(...).window.bound`). With GPUs this memory is pinned, and does not count the method's workspace,
            which is theirs.
        threads: Threads to compute with; None leaves torch's setting.
        device: Where to compute: "cpu"; "cuda", "cuda:N", or several GPUs, "cuda:0,cuda:1" or "cuda:all"; "auto", a GPU
            if torch sees one, else the CPU. GPUs of one kind give the same results however many there are.
        device_memory: Bytes that tensors under way may take on each GPU, by default 0.8 of what is free there; a tensor
            that needs more when it is alone is an error.
        random_seed: Whole number that methods which draw random numbers (DARE, DELLA) derive them from, together with
            each tensor's name: neither order nor device changes what is drawn.
        progress: Called as `progress(bytes done, bytes in all)` after each tensor, in the calling thread; with GPUs,
            when tensors were written.
        copy_tokenizer: Copy the tokenizer's files if the recipe does not ask for a tokenizer of its own.
        model_card: Write README.md, which says what was merged and how, and the recipe as mergekit_config.yml.
        mixed_architectures: Merge models of different architectures if their tensors have the same names and shapes.
        trust_remote_code: Run code that models bring along to load their tokenizers, where vocabularies are merged.

    Raises:
        RecipeError, CheckpointError, MergeError: All are ValueErrors; the message names file, tensor and need.
        ValueError: A device that there is not, or more memory than it has.
    """
    started, devices = time.perf_counter(), open_devices(device, device_memory)
    with plan_merge(
        recipe,
        max_shard_size=max_shard_size,
        memory_limit=memory_limit,
        mixed_architectures=mixed_architectures,
        trust_remote_code=trust_remote_code,
    ) as plan:
        folder = check_output_folder(out, overwrite=overwrite, inputs=plan.folders)
        files = plan.auxiliary_files(copy_tokenizer=copy_tokenizer, model_card=folder.name if model_card else None)
        with _threads(threads), CheckpointWriter(folder, plan.output, files) as writer:
            window = window_of(plan, devices, memory_limit)
            pipeline = _pipeline(plan, random_seed, writer, devices, window, progress)
            timings = pipeline.run()
            computed = time.perf_counter()
            writer.commit()
    finished = time.perf_counter()
    return MergeReport(
        out=folder,
        method=plan.method.name,
        tensors=len(plan.jobs),
        bytes_read=plan.bytes_read,
        bytes_written=plan.output.nbytes,
        seconds=finished - started,
        read_wait=timings.read_wait,
        compute=timings.compute,
        write_wait=timings.write_wait,
        commit=finished - computed,
        memory_bound=pipeline.window.bound,
        memory_peak=timings.peak_bytes,
        device_wait=timings.device_wait if isinstance(timings, DeviceTimings) else 0.0,
        devices=timings.devices if isinstance(timings, DeviceTimings) else (),
    )


def window_of(plan: MergePlan, devices: Sequence[Device], memory_limit: str | int) -> Window:
    """How a merge on these devices, or with none on the CPU, shares out the CPU's memory."""
    return Window.staging(plan.jobs, parse_size(memory_limit, "memory_limit")) if devices else plan.window


def _pipeline(
    plan: MergePlan,
    seed: int,
    writer: CheckpointWriter,
    devices: Sequence[Device],
    window: Window,
    progress: Progress | None,
) -> Pipeline:
    def write(job: Job, result: torch.Tensor) -> None:
        writer.write(job.name, result)

    if not devices:
        compute = functools.partial(compute_tensor, plan, seed)
        return Pipeline(jobs=plan.jobs, window=window, compute=compute, write=write, progress=progress)
    return DevicePipeline(
        jobs=plan.jobs,
        window=window,
        compute=functools.partial(start_tensor, plan, seed),
        stays=_is_copied,
        copy=copied_tensor,
        write=write,
        progress=progress,
        devices=devices,
    )


def compute_tensor(plan: MergePlan, seed: int, job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Merge one tensor on the CPU, turning what the method objects to into an error that names tensor and model."""
    return copied_tensor(job, tensors) if _is_copied(job) else _merged(plan, seed, job, tensors)


def start_tensor(plan: MergePlan, seed: int, job: Job, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[Check]]:
    """Merge one tensor on a GPU, which need not be done yet; return the result, and what is to be checked when it is.

    Waiting for a check would leave the GPU without work until the next tensor is begun.
    """
    with collected_checks() as checks:
        try:
            result = _merged(plan, seed, job, tensors).contiguous()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            for values, check in checks:  # what is wrong with the input comes before what came of it
                _judge(job, check, values.cpu())
            raise
    return result, [(values, functools.partial(_judge, job, check)) for values, check in checks]


def _judge(job: Job, check: Callable[[torch.Tensor], None], values: torch.Tensor) -> None:
    with _problems_named(job):
        check(values)


def _merged(plan: MergePlan, seed: int, job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
    assert isinstance(job, TensorJob)
    base, experts = (tensors[0], tensors[1:]) if plan.base is not None else (None, tensors)
    with _problems_named(job):
        if job.factors is not None:
            result = _merge_factors(plan, job, tensors)
        else:
            result = plan.method(base, experts, out_dtype=job.dtype, name=job.name, seed=seed, **job.parameters)
        if job.dtype == torch.float16:
            check_values(torch.isfinite(result).all(), _check_range)
    return result


def _check_range(is_finite: torch.Tensor) -> None:
    if not bool(is_finite):
        raise ValueError("merged values exceed float16's range (65504); need out_dtype: bfloat16 or float32")


@contextlib.contextmanager
def _problems_named(job: Job) -> Iterator[None]:
    assert isinstance(job, TensorJob)
    try:
        yield
    except NonFiniteError as error:
        raise MergeError(
            f"{job.folder(error.index)}: tensor {job.name!r} holds {error.count} NaN or infinite values; the model is "
            "damaged"
        ) from error
    except (ValueError, TypeError) as error:
        raise MergeError(f"tensor {job.name!r}: {error}") from error


def _merge_factors(plan: MergePlan, job: TensorJob, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Merge adapters through their factors: tensors are the base's, and A and B of each expert that has any."""
    assert job.factors is not None
    base, rest = tensors[0], iter(tensors[1:])
    nothing = Factors(base.new_zeros(base.shape[0], 0), base.new_zeros(0, base.shape[1]), 1.0)
    experts = [nothing if f is None else f.factors(next(rest), next(rest)) for f in job.factors]
    return merge_factors(base, experts, plan.method.name, out_dtype=job.dtype, **job.parameters)


def _is_copied(job: Job) -> bool:
    assert isinstance(job, TensorJob)
    return job.copied


def copied_tensor(job: Job, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensor of a job that copies one, which all models must have alike."""
    assert isinstance(job, TensorJob)
    for folder, tensor in zip(job.folders[1:], tensors[1:], strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise MergeError(
                f"{folder}: tensor {job.name!r} ({job.dtype}, not merged) differs from the one in {job.folders[0]}; "
                "need identical ones"
            )
    return tensors[0]


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    if count < 1:
        raise ValueError(f"threads: got {count}, need at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
