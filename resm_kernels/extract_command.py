"""The command `resm-kernels extract-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resm_kernels.arguments import ThreadsOption
from resm_kernels.command import loading


def extract_lora(
    finetuned: Annotated[
        str, typer.Argument(help="The fine-tuned model, as in a recipe; or MODEL+ADAPTER.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="The model it was fine-tuned from.")],
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of every matrix.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Or the smallest rank that keeps this share of ‖Δ‖², such as 0.9.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", help="Largest rank with --energy.")] = None,
    accuracy: Annotated[float, typer.Option("--accuracy", help="How far above the best error to accept.")] = 5e-2,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="Module to decompose, such as q_proj; repeatable. Default: all that PEFT adapts."
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Decompose embeddings and output heads too.")
    ] = False,
    save_rest: Annotated[bool, typer.Option("--save-rest", help="Store other changed tensors whole.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the factors: float32, bfloat16 or float16.")] = "float32",
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the adapter with peft, and compare with FINETUNED tensor by tensor.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is an adapter folder.")] = False,
    threads: ThreadsOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Write what FINETUNED changed in BASE as a PEFT (LoRA) adapter, and print the error of every layer."""
    with loading():
        import torch

        from resm_kernels.dtypes import ADAPTER_DTYPES, dtype_name
        from resm_kernels.engine import extract_lora as extract

    kinds = {dtype_name(kind): kind for kind in ADAPTER_DTYPES}
    if dtype not in kinds:
        raise ValueError(f"dtype: got {dtype!r}, need one of {', '.join(kinds)}")
    if threads is not None:
        torch.set_num_threads(threads)
    report = extract(
        finetuned,
        base,
        out,
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        accuracy=accuracy,
        targets=target or None,
        embeddings=embeddings,
        save_rest=save_rest,
        dtype=kinds[dtype],
        verify=verify,
        overwrite=overwrite,
        on_layer=None if quiet else lambda layer: typer.echo(str(layer)),
    )
    if not quiet:
        typer.echo(str(report))
