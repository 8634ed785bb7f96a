"""What people and scripts see: the dry run's plan, the table and JSON of statistics, progress, facts of the machine."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from resm_kernels.checkpoint.format import format_bytes
from resm_kernels.engine.device import device_need

if TYPE_CHECKING:
    from resm_kernels.engine import MergePlan, MergeReport, TensorStats, Window
    from resm_kernels.engine.device import Device
    from resm_kernels.recipe import Part, Setting, Slice

_LINE_EVERY: Final = 10.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""


def describe_plan(plan: MergePlan, out: str, free: int, window: Window, devices: Sequence[Device]) -> str:
    """Return the dry run's text: what would be done, what it would take, nothing of it done.

    Args:
        plan, window, devices: What would be done, in which memory, on which GPUs.
        out: The output folder.
        free: Free disk space there, in bytes.
    """
    recipe = plan.recipe
    lines = [
        f"method        {plan.method.name} ({plan.method.title})",
        f"base          {recipe.base_model or 'none'}",
    ]
    for part in recipe.parts:
        for piece in part.slices:
            lines += _describe_slice(part, piece)
    for parameter in plan.method.parameters:
        if parameter.name in recipe.parameters:
            lines.append(f"parameter     {parameter.name} = {_setting(recipe.parameters[parameter.name])}")
        elif not any(parameter.name in e.parameters for e in recipe.experts):
            other = f", {parameter.vocabulary} for embeddings and output heads"
            where = other if parameter.vocabulary is not None else ""
            lines.append(f"parameter     {parameter.name} = {parameter.default} (default{where})")
    copied = sum(job.copied for job in plan.jobs)
    tied = ", output head tied to the embedding" if plan.tied else ""
    dtypes = sorted({str(job.dtype).removeprefix("torch.") for job in plan.jobs})
    built = plan.tokenizer
    vocabulary = [] if built is None else [f"vocabulary    {len(built.tokens)} tokens, {built.rows} rows"]
    lines += [
        f"tensors       {len(plan.jobs) - copied} merged, {copied} copied{tied}",
        *vocabulary,
        f"to read       {format_bytes(plan.bytes_read)}",
        f"memory bound  {format_bytes(window.bound)} of tensor data in flight",
        *(_device_line(plan, device) for device in devices),
        f"output        {out}: {format_bytes(plan.output.nbytes)} in {len(plan.output.shards)} "
        f"file{'s' if len(plan.output.shards) > 1 else ''}, {', '.join(dtypes)}",
        f"free disk     {format_bytes(free)}{'' if free > plan.output.nbytes else ': NOT ENOUGH'}",
    ]
    return "\n".join(lines)


def _describe_slice(part: Part, piece: Slice) -> list[str]:
    lines = [f"module        {part.name}"] if part.name is not None and piece is part.slices[0] else []
    for source in piece.experts:
        own = [f"{name} = {_setting(value)}" for name, value in source.parameters.items()]
        if source.layers is not None:
            own.insert(0, f"layers {source.layers[0]} to {source.layers[1] - 1}")
        notes = ", ".join(own)
        lines.append(f"expert        {source.model}{f'  ({notes})' if notes else ''}")
    return lines


def _device_line(plan: MergePlan, device: Device) -> str:
    line = f"device        {device.name}, {format_bytes(device.memory_limit)} for tensors"
    if not plan.jobs:
        return line
    job = max(plan.jobs, key=device_need)
    enough = "" if device_need(job) <= device.memory_limit else ": NOT ENOUGH"
    return f"{line}; the largest takes {format_bytes(device_need(job))} ({job.name}){enough}"


def _setting(setting: Setting) -> str:
    parts = []
    for rule in setting.rules:
        value = str(rule.values[0]) if len(rule.values) == 1 else str(list(rule.values))
        parts.append(value if rule.filter in (None, "*") else f"{rule.filter}: {value}")
    return "; ".join(parts)


def closing_line(report: MergeReport) -> str:
    """Return the line that ends a merge: what, how long, where, and how busy GPUs were."""
    busy = ", ".join(f"{use.name} {report.busy_share(use):.0%}" for use in report.devices)
    return (
        f"merged {report.tensors} tensors with {report.method} in {report.seconds:.1f} s "
        f"({format_bytes(report.bytes_read)} read, {format_bytes(report.bytes_written)} written"
        f"{f'; busy: {busy}' if busy else ''}): {report.out}"
    )


@contextlib.contextmanager
def progress_display(console: Console, title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a `progress(done, total)` callback: a bar in bytes with the time left on a terminal, else plain lines."""
    if quiet:
        yield None
    elif console.is_terminal:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _Lines(console, title)


class _Lines:
    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._started = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY and done:
            self._last = now
            left = (now - self._started) * (total - done) / done
            text = f"{self._title}: {format_bytes(done)} of {format_bytes(total)}, {left:.0f} s left"
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def stats_table(rows: Sequence[TensorStats]) -> Table:
    """Return the table of statistics: one row per tensor, each expert's figures separated by slashes.

    Spectra, where there are any, add effective ranks, decay exponents, and the interference with what random subspaces
    would have beside it; the rest of them is in the JSON.
    """
    table = Table(title="RESM statistics (one figure per expert)", title_justify="left")
    with_spectra = any(row.spectra is not None for row in rows)
    table.add_column("tensor")
    table.add_column("shape", justify="right", no_wrap=True)
    names = ["sparsity", "outlier mass", "weight", "rank"]
    for name in names + (["effective rank", "decay", "interference (random)"] if with_spectra else []):
        table.add_column(name, justify="right")
    for row in rows:
        shape = "×".join(map(str, row.shape)) or "scalar"
        if row.problem is not None:
            table.add_row(row.name, shape, f"[red]{row.problem}[/red]")
            continue
        cells = [
            row.name,
            shape,
            _per_expert(row.sparsity, ".3f"),
            _per_expert(row.outlier_mass, ".2e"),
            _per_expert(row.weights, ".3f"),
            _per_expert(row.ranks, "d") if row.ranks else "average",
        ]
        if row.spectra is not None:
            cells += [
                _per_expert(row.spectra.effective_rank, ".1f"),
                _per_expert(row.spectra.decay, ".2f"),
                f"{row.spectra.interference:.3f} ({row.spectra.interference_expected:.3f})",
            ]
        table.add_row(*cells)
    return table


def _per_expert(values: Sequence[float | int], spec: str) -> str:
    return " / ".join(format(v, spec) for v in values)


def stats_json(rows: Sequence[TensorStats], experts: Sequence[str]) -> str:
    """Return all statistics as JSON; a value that is not finite becomes null, which every reader accepts."""
    return to_json({"experts": list(experts), "tensors": [asdict(row) for row in rows]})


def to_json(data: Any) -> str:
    """Return `data` as indented, strictly valid JSON."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def describe_machine(facts: dict[str, Any]) -> str:
    """Return the text of `info` from the facts of `resm_kernels.backends()` plus version and CPU."""
    native = facts["native"]
    live = "available" if native["available"] else f"not available: {native['reason']}"
    lines = [
        f"resm_kernels  {facts['version']}",
        f"torch         {facts['torch']}",
        f"triton        {facts['triton'] or 'not installed'}",
        f"native        {live}",
    ]
    lines += [f"  {key:<11} {_fact(value)}" for key, value in native.items() if key not in ("available", "reason")]
    lines += ["kernels"]
    for op, table in facts["ops"].items():
        lines.append(f"  {op:<20} {', '.join(f'{device}: {backend}' for device, backend in table.items())}")
    lines += [
        f"cpu           {facts['cpu']}",
        f"threads       {facts['threads']}",
        f"gpu           {', '.join(facts['gpu']) or 'none'}",
    ]
    return "\n".join(lines)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(value) if isinstance(value, list) else str(value)) or "not built in"
