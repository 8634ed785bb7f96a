"""Commands of `resm-kernels` on adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resm_kernels.arguments import QuietOption, RandomSeedOption, RecipeArgument, ThreadsOption
from resm_kernels.command import cut_off_named, loading, options_of
from resm_kernels.options import MergeLoraKeywords, MergeLoraOptions


def merge_lora(
    context: typer.Context,
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(help="Folder of the merged adapter.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Most directions of a module. Default: all, or the sum of the adapters' ranks."),
    ] = MergeLoraOptions.rank,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Or the smallest rank that keeps this share of ‖M‖², such as 0.9.")
    ] = MergeLoraOptions.energy,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", help="Largest rank with --energy.")
    ] = MergeLoraOptions.max_rank,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad all modules with zeros to one rank, instead of a rank_pattern.")
    ] = MergeLoraOptions.uniform_rank,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Of the factors: float32, bfloat16 or float16. Default: the recipe's, or the adapters'."
        ),
    ] = None,
    accuracy: Annotated[
        float, typer.Option("--accuracy", help="How far above the best error to accept, where factors are truncated.")
    ] = MergeLoraOptions.accuracy,
    random_seed: RandomSeedOption = MergeLoraOptions.random_seed,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is an adapter folder.")
    ] = MergeLoraOptions.overwrite,
    threads: ThreadsOption = MergeLoraOptions.threads,
    quiet: QuietOption = False,
) -> None:
    """Merge the PEFT adapters of RECIPE, which belong to one base model, to one adapter in the new folder OUT.

    The base model itself is needed for DoRA, for tensors that adapters store whole, and for SLERP, Karcher mean and
    Arcee Fusion (base_model in RECIPE). Each line shows a module's rank and the share of the change that it lost.
    """
    with loading():
        from resm_kernels.dtypes import ADAPTER_DTYPES, dtype_name
        from resm_kernels.engine import merge_lora as merge

    kinds = {dtype_name(kind): kind for kind in ADAPTER_DTYPES}
    if dtype is not None and dtype not in kinds:
        raise ValueError(f"dtype: got {dtype!r}, need one of {', '.join(kinds)}")
    options = options_of(context.params, MergeLoraKeywords)
    options["dtype"] = None if dtype is None else kinds[dtype]
    with cut_off_named("nothing was written"):
        report = merge(recipe, out, on_module=None if quiet else lambda module: typer.echo(str(module)), **options)
    if not quiet:
        typer.echo(str(report))
