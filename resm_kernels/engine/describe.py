"""Describes a plan in words, which `--dry-run` prints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from resm_kernels.checkpoint import format_bytes
from resm_kernels.checkpoint.writer import free_bytes
from resm_kernels.dtypes import dtype_name
from resm_kernels.engine.costs import Machine, job_work
from resm_kernels.engine.device_memory import device_need
from resm_kernels.engine.devices import Device
from resm_kernels.engine.estimate import MACHINES, duration, estimate, machine_line
from resm_kernels.options import MergeOptions
from resm_kernels.recipe import Part, Setting, Slice
from resm_kernels.roles import Role

if TYPE_CHECKING:
    from resm_kernels.engine.plan import MergePlan
    from resm_kernels.engine.tensor_jobs import TensorJob


def describe_plan(plan: MergePlan, machine: tuple[Machine, str] | None) -> str:
    """Return the lines of `MergePlan.describe`."""
    copied = sum(job.copied for job in plan.jobs)
    tied = ", output head tied to the embedding" if plan.tied else ""
    lines = [
        f"method        {plan.method.name} ({plan.method.title})",
        f"base          {plan.recipe.base_model or 'none'}",
        *(line for part in plan.recipe.parts for piece in part.slices for line in _slice_lines(part, piece)),
        *_parameter_lines(plan),
        *_statistics_lines(plan),
        *_role_lines(plan),
        f"tensors       {len(plan.jobs) - copied} merged, {copied} copied{tied}",
    ]
    lines += [f"warning       {warning}" for warning in plan.warnings]
    if plan.tokenizer is not None:
        lines.append(f"vocabulary    {len(plan.tokenizer.tokens)} tokens, {plan.tokenizer.rows} rows")
    lines += [
        f"to read       {format_bytes(plan.bytes_read)}",
        _memory_line(plan),
        *(_device_line(plan, device) for device in plan.devices),
    ]
    if plan.format is not None:
        rounded = sum(job.rounding is not None for job in plan.jobs)
        lines.append(
            f"rounded       {rounded} weights to {plan.format.name}, in the layout of {plan.format.model.folder}"
        )
    lines += [f"note          {note}" for note in plan.notes]
    dtypes = sorted({dtype_name(slot.dtype) for slot in plan.output.slots.values()})
    n_files = len(plan.output.shards)
    size = f"{format_bytes(plan.output.nbytes)} in {n_files} file{'s' if n_files > 1 else ''}, {', '.join(dtypes)}"
    if plan.options.out_format != MergeOptions.out_format:
        size += f", in the format {plan.options.out_format}"
    if plan.out is None:
        return "\n".join([*lines, f"output        {size}", *_estimate_lines(plan, machine)])
    free = free_bytes(plan.out)
    lines += [
        f"output        {plan.out}: {size}",
        f"free disk     {format_bytes(free)}{'' if free > plan.output.nbytes else ': NOT ENOUGH'}",
        *_estimate_lines(plan, machine),
    ]
    return "\n".join(lines)


def _memory_line(plan: MergePlan) -> str:
    line = f"memory bound  {format_bytes(plan.window.bound)} of tensor data in flight"
    if plan.options.engine == "ray":
        line += " in each worker"
    blocks = [job for job in plan.pieces if job.whole is not None]
    if blocks:
        line += f"; {len({job.name for job in blocks})} large tensors in {len(blocks)} blocks"
    if not plan.devices and plan.window.bound > plan.options.window_bytes:
        largest = max(plan.pieces, key=lambda job: job.input_segment + job.output_bytes + job.workspace)
        line += (
            f", MORE THAN memory_limit ({format_bytes(plan.options.window_bytes)}): {plan.method.name} merges "
            f"{largest.name} whole"
        )
    return line


def _estimate_lines(plan: MergePlan, machine: tuple[Machine, str] | None) -> list[str]:
    if machine is None:
        return []
    rates, source = machine
    works = [job_work(plan.method, job) for job in plan.jobs]
    parts = [
        f"{'1 machine' if n == 1 else f'{n} machines'} {duration(e.seconds)} ({e.limit})"
        for n, e in ((n, estimate(works, rates, n)) for n in MACHINES)
    ]
    return [f"estimate      on CPUs: {', '.join(parts)}", f"machine       {source}: {machine_line(rates)}"]


def _slice_lines(part: Part, piece: Slice) -> list[str]:
    lines = [f"module        {part.name}"] if part.name is not None and piece is part.slices[0] else []
    for source in piece.experts:
        notes = [f"{name} = {_setting(value)}" for name, value in source.parameters.items()]
        if source.statistics is not None:
            notes.append(f"statistics {source.statistics}")
        if source.layers is not None:
            first, end = source.layers
            notes.insert(0, f"layers {first} to {end - 1}" if first < end else "no layers")
        lines.append(f"expert        {source.model}" + (f"  ({', '.join(notes)})" if notes else ""))
    return lines


def _parameter_lines(plan: MergePlan) -> list[str]:
    lines = []
    for parameter in plan.method.parameters:
        if parameter.name in plan.recipe.parameters:
            lines.append(f"parameter     {parameter.name} = {_setting(plan.recipe.parameters[parameter.name])}")
        elif not any(parameter.name in source.parameters for source in plan.recipe.experts):
            has_other = parameter.vocabulary is not None
            other = f", {parameter.vocabulary} for embeddings and output heads" if has_other else ""
            lines.append(f"parameter     {parameter.name} = {parameter.default} (default{other})")
    return lines


def _statistics_lines(plan: MergePlan) -> list[str]:
    if not plan.statistics:
        return []
    about = [reader.about for reader in dict.fromkeys(plan.statistics.values())]
    jobs = [job for job in plan.jobs if job.has_statistics]
    read = sum(info.nbytes for job in jobs for _, info in job.inputs[len(job.folders) :])
    tokens = ", ".join(f"{a.tokens:,}" for a in about)
    return [
        f"statistics    {about[0].kind} of {len(jobs)} tensors, {format_bytes(read)} to read; tokens {tokens}",
        f"averaged      {sum(not job.copied for job in plan.jobs) - len(jobs)} tensors without statistics",
    ]


def _role_lines(plan: MergePlan) -> list[str]:
    """Return a line that counts the tensors of each role, where the method asks for roles."""
    counts = Counter(job.role.role for job in plan.jobs if job.role is not None)
    if not counts:
        return []
    spectral = sum(1 if job.matrices is None else job.matrices.slices for job in plan.jobs if _is_decomposed(job))
    shown = ", ".join(f"{counts[role]} {role}" for role in Role if role in counts)
    return [f"roles         {shown} ({plan.roles_from}); {spectral} matrices are decomposed"]


def _is_decomposed(job: TensorJob) -> bool:
    """Return True if the method decomposes the tensor, or the matrices that it holds."""
    if job.role is None or not job.parameters.get("spectral", True):
        return False
    shape = job.shape if job.matrices is None else (job.matrices.rows, job.matrices.columns)
    return len(shape) == 2 and min(shape) >= job.n_experts


def _device_line(plan: MergePlan, device: Device) -> str:
    line = f"device        {device.name}, {format_bytes(device.memory_limit)} for tensors"
    if not plan.jobs:
        return line
    largest = max(plan.jobs, key=device_need)
    verdict = "" if device_need(largest) <= device.memory_limit else ": NOT ENOUGH"
    return f"{line}; the largest takes {format_bytes(device_need(largest))} ({largest.name}){verdict}"


def _setting(setting: Setting) -> str:
    parts = []
    for rule in setting.rules:
        value = str(rule.values[0]) if len(rule.values) == 1 else str(list(rule.values))
        parts.append(value if rule.filter in (None, "*") else f"{rule.filter}: {value}")
    return "; ".join(parts)
