"""The command `resm-kernels report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from resm_kernels.arguments import MemoryOption, QuietOption, ThreadsOption
from resm_kernels.command import cut_off_named, loading
from resm_kernels.options import MergeOptions


def report(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE|OUT", help="A recipe, or a folder that a merge wrote.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="The page. Default: merge.html, or the name of OUT and .html."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON; '-' prints them.")
    ] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra/--no-spectra", help="Decompose matrices, which takes as long as a merge by RESM.")
    ] = True,
    memory_limit: MemoryOption = str(MergeOptions.memory_limit),
    threads: ThreadsOption = MergeOptions.threads,
    quiet: QuietOption = False,
) -> None:
    """Show a merge as one HTML page: warnings and what to do, heat maps of layers and modules, spectra, time, memory.

    The page needs no network. A report on a recipe shows what its models are like before they are merged, and one on
    OUT also the merged model and how the merge ran.
    """
    with loading():
        from rich.console import Console

        from resm_kernels.checkpoint import format_bytes
        from resm_kernels.checkpoint.durable import write_errors_named, write_whole
        from resm_kernels.console import progress_display
        from resm_kernels.report import ReportOptions, gather, to_json
        from resm_kernels.report.page import as_bytes, check_page, check_target, describe_warnings, write_page

    page = out or Path(f"{source.resolve().name}.html" if source.is_dir() else "merge.html")
    check_page(page)
    printed = json_file is not None and str(json_file) == "-"
    written = {"--out": page}
    if json_file is not None and not printed:
        check_target("--json", json_file)
        if os.path.realpath(json_file) == os.path.realpath(page):
            raise ValueError(f"--json: got {json_file}, which is the name of the page too; need another file")
        written["--json"] = json_file
    for option, file in written.items():
        if os.path.realpath(file) == os.path.realpath(source):
            raise ValueError(f"{option}: got {file}, which is the recipe; need another file")
    with cut_off_named("no page was written"):
        with progress_display(Console(stderr=True), "reading", quiet=quiet) as progress:
            options = ReportOptions(memory_limit=memory_limit, threads=threads, spectra=spectra, progress=progress)
            gathered = gather(source, options)
        figures = b"" if json_file is None else as_bytes(f"{to_json(gathered, indent=2)}\n")
        if json_file is not None and not printed:
            with write_errors_named(json_file):
                write_whole(json_file, figures)
        write_page(gathered, page)  # the last, so that nothing was written to the page if this is cut off
    if printed:
        typer.echo(figures, nl=False)
    if not quiet:
        found = describe_warnings(gathered) or "no warnings"
        line = f"report of {gathered.title}: {found} ({format_bytes(page.stat().st_size)}): {page}"
        typer.echo(as_bytes(line), err=printed)
