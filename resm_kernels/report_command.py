"""The command `resm-kernels report`."""

from __future__ import annotations

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
        from resm_kernels.checkpoint.durable import write_whole
        from resm_kernels.console import progress_display
        from resm_kernels.report import ReportOptions, gather, to_json
        from resm_kernels.report.page import check_page, check_target, describe_warnings, write_page

    page = out or Path(f"{source.resolve().name}.html" if source.is_dir() else "merge.html")
    check_page(page)
    printed = json_file is not None and str(json_file) == "-"
    if json_file is not None and not printed:
        check_target("--json", json_file)
        if json_file.absolute() == page.absolute():
            raise ValueError(f"--json: got {json_file}, which is the name of the page too; need another file")
    with cut_off_named("no page was written"):
        with progress_display(Console(stderr=True), "reading", quiet=quiet) as progress:
            options = ReportOptions(memory_limit=memory_limit, threads=threads, spectra=spectra, progress=progress)
            gathered = gather(source, options)
        write_page(gathered, page)
        if printed:
            typer.echo(to_json(gathered, indent=2))
        elif json_file is not None:
            write_whole(json_file, f"{to_json(gathered, indent=2)}\n".encode("utf-8", "backslashreplace"))
    if not quiet:
        found = describe_warnings(gathered) or "no warnings"
        typer.echo(f"report of {gathered.title}: {found} ({format_bytes(page.stat().st_size)}): {page}", err=printed)
