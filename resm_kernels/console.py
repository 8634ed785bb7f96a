"""What the command line prints: progress, the closing line, tables and JSON of statistics, facts of the machine."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resm_kernels.checkpoint import format_bytes

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from resm_kernels.engine import MergeReport, TensorStats

_LINE_EVERY: Final = 10.0
"""Seconds between progress lines where the output is no terminal, so that no bar can be drawn."""


def closing_line(report: MergeReport) -> str:
    """Return the end of a merge: number of tensors, method, seconds, bytes, how busy GPUs were, output folder.

    A line before says how many tensors an earlier run had done.
    """
    busy = ", ".join(f"{use.name} {report.busy_share(use):.0%}" for use in report.devices)
    resumed = (
        f"resumed: {report.tensors_resumed} of {report.tensors} tensors were done\n" if report.tensors_resumed else ""
    )
    return (
        f"{resumed}merged {report.tensors} tensors with {report.method} in {report.seconds:.1f} s "
        f"({format_bytes(report.bytes_read)} read, {format_bytes(report.bytes_written)} written"
        f"{f'; busy: {busy}' if busy else ''}): {report.out}"
    )


@contextlib.contextmanager
def progress_display(console: Console, title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a `progress(done, total)` callback, or None if `quiet`.

    On a terminal it draws a bar with bytes and the time left, elsewhere it prints plain lines.
    """
    if quiet:
        yield None
    elif console.is_terminal:
        from rich.progress import DownloadColumn, TransferSpeedColumn

        with _bars(console, DownloadColumn(), TransferSpeedColumn()) as show:
            show(title, 0, None)
            yield functools.partial(show, title)
    else:
        yield _Lines(console, title)


@contextlib.contextmanager
def phase_display(console: Console, *, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield a `progress(phase, done, total)` callback, or None if `quiet`; see `progress_display`."""
    if quiet:
        yield None
    elif console.is_terminal:
        from rich.progress import MofNCompleteColumn

        with _bars(console, MofNCompleteColumn()) as show:
            yield show
    else:
        last = time.monotonic()

        def print_line(phase: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY:
                last = time.monotonic()
                console.print(f"{phase}: {done} of {total}", markup=False, highlight=False, soft_wrap=True)

        yield print_line


@contextlib.contextmanager
def _bars(console: Console, *amounts: ProgressColumn) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function that draws a bar for each title; without a total, a bar that only shows that work is done."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *amounts,
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, progress.TaskID] = {}

        def show(title: str, done: int, total: int | None) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=None)
            bar.update(tasks[title], completed=done, total=total)

        yield show


class _Lines:
    """Prints a line of progress every `_LINE_EVERY` seconds."""

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
    """Return the table of statistics: one row per tensor, the experts' figures separated by slashes.

    The row of a tensor that holds several matrices has the means over these; the JSON has the figures of each.
    If there are spectra, the table also has effective ranks, decay exponents and the interference, with the expected
    interference of random subspaces in parentheses. The JSON has all figures of the spectra.
    """
    table = Table(title="RESM statistics (one figure per expert)", title_justify="left")
    with_spectra = any(row.spectra is not None for row in rows)
    table.add_column("tensor")
    table.add_column("role", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    names = ["sparsity", "outlier mass", "weight", "rank"]
    for name in names + (["effective rank", "decay", "interference (random)"] if with_spectra else []):
        table.add_column(name, justify="right")
    for name, group in itertools.groupby(rows, key=lambda row: row.name):
        matrices = list(group)
        first, shown = matrices[0], Text(name)  # in which rich would take brackets for markup
        shape = "×".join(map(str, first.shape)) or "scalar"
        if first.slice is not None:
            shape = f"{len(matrices)}×({shape})"
        problem = next((row.problem for row in matrices if row.problem is not None), None)
        if problem is not None:
            table.add_row(shown, first.role, shape, Text(problem, style="red"))
            continue
        has_ranks = any(row.ranks for row in matrices)
        cells: list[Text | str] = [
            shown,
            first.role,
            shape,
            _per_expert([row.sparsity for row in matrices], ".3f"),
            _per_expert([row.outlier_mass for row in matrices], ".2e"),
            _per_expert([row.weights for row in matrices], ".3f"),
            _per_expert([row.ranks for row in matrices], "d" if len(matrices) == 1 else ".1f")
            if has_ranks
            else "average",
        ]
        spectra = [row.spectra for row in matrices if row.spectra is not None]
        if spectra:
            interference = _mean([s.interference for s in spectra])
            expected = _mean([s.interference_expected for s in spectra])
            cells += [
                _per_expert([s.effective_rank for s in spectra], ".1f"),
                _per_expert([s.decay for s in spectra], ".2f"),
                f"{interference:.3f} ({expected:.3f})",
            ]
        table.add_row(*cells)
    return table


def _per_expert(matrices: Sequence[Sequence[float | int]], spec: str) -> str:
    """Return each expert's figure, the mean over the matrices."""
    means = matrices[0] if len(matrices) == 1 else [_mean(values) for values in zip(*matrices, strict=True)]
    return " / ".join(format(value, spec) for value in means)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def stats_json(rows: Sequence[TensorStats], experts: Sequence[str]) -> str:
    """Return all statistics as JSON. A value that is not finite becomes null, because JSON has no NaN or infinity."""
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
