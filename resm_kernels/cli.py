"""The command `resm-kernels`: merge, search, report, calibrate, statistics, stats, verify, info, and two of LoRA.

Commands import what they need beyond typer when they run: help and usage errors appear at once and need no torch.
Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from resm_kernels.arguments import (
    AddressOption,
    DeviceOption,
    EngineOption,
    KeepOption,
    MachineOption,
    MemoryOption,
    MixedArchitecturesOption,
    OutFormatOption,
    QuietOption,
    RandomSeedOption,
    RecipeArgument,
    RestartOption,
    SilentOption,
    StrictOption,
    ThreadsOption,
    TiedEmbeddingsOption,
    WorkersOption,
)
from resm_kernels.command import (
    INTERRUPTED,
    cut_off_named,
    fail,
    fail_with,
    loading,
    options_of,
    say,
    set_up_process,
    show_stats,
)
from resm_kernels.extract_command import extract_lora
from resm_kernels.flags import repeated, translate
from resm_kernels.lora_commands import merge_lora
from resm_kernels.options import CalibrateKeywords, CalibrateOptions, MergeKeywords, MergeOptions
from resm_kernels.report_command import report
from resm_kernels.search_command import search

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge fine-tuned language models with RESM and other methods.",
)
app.command("merge-lora")(merge_lora)
app.command()(search)
app.command()(report)
_options = {"traceback": False}


@app.callback()
def _common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show an error's Python traceback.")] = False,
) -> None:
    _options["traceback"] = traceback


@app.command(epilog="mergekit-yaml's options are understood too (docs/recipes.md).")
def merge(
    context: typer.Context,
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(help="Folder of the merged model.", show_default=False)],
    max_shard_size: Annotated[str, typer.Option(help="Largest output file, such as 5GB or 512MiB.")] = str(
        MergeOptions.max_shard_size
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")
    ] = MergeOptions.overwrite,
    restart: RestartOption = MergeOptions.restart,
    hash_inputs: Annotated[
        bool,
        typer.Option("--hash-inputs", help="Know inputs again by all their content, not by header, size and time."),
    ] = MergeOptions.hash_inputs,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, memory and output size; write nothing.")
    ] = False,
    memory_limit: MemoryOption = str(MergeOptions.memory_limit),
    threads: ThreadsOption = MergeOptions.threads,
    device: DeviceOption = str(MergeOptions.device),
    device_memory: Annotated[
        str | None,
        typer.Option(help="Memory for tensors on each GPU, such as 20GB. Default: 0.8 of its free memory."),
    ] = None,
    copy_tokenizer: Annotated[
        bool, typer.Option(help="Copy the tokenizer's files if the recipe does not ask for a new tokenizer.")
    ] = MergeOptions.copy_tokenizer,
    model_card: Annotated[
        bool, typer.Option("--write-model-card/--no-write-model-card", help="Write README.md and the recipe into OUT.")
    ] = MergeOptions.model_card,
    mixed_architectures: MixedArchitecturesOption = MergeOptions.mixed_architectures,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that models bring along to load their tokenizers.")
    ] = MergeOptions.trust_remote_code,
    random_seed: RandomSeedOption = MergeOptions.random_seed,
    out_format: OutFormatOption = MergeOptions.out_format,
    engine: EngineOption = MergeOptions.engine,
    address: AddressOption = MergeOptions.address,
    workers: WorkersOption = MergeOptions.workers,
    machine: MachineOption = None,
    keep_intermediates: KeepOption = None,
    strict: StrictOption = MergeOptions.strict,
    tied_embeddings: TiedEmbeddingsOption = MergeOptions.tied_embeddings,
    quiet: QuietOption = False,
) -> None:
    """Merge the models of RECIPE into the new folder OUT, which appears when it is complete.

    If it is interrupted or killed, the same command goes on from there; the tensors so far are next to OUT.
    """
    with loading():
        from rich.console import Console

        from resm_kernels.console import closing_line, progress_display
        from resm_kernels.engine import carry_out, chosen_machine, describe_kept, plan_merge, rounding_estimate

    options = MergeOptions(**options_of(context.params, MergeKeywords))
    if machine is not None and not dry_run:
        raise ValueError(f"machine: got {machine!r} without --dry-run, need both: a merge itself takes no estimate")
    with cut_off_named("nothing was written"), plan_merge(recipe, out, options, fetch=not dry_run) as plan:
        estimates = [] if quiet else rounding_estimate(plan)
        if dry_run:
            typer.echo("\n".join([plan.describe(chosen_machine(machine, out, options.threads)), *estimates]))
            return
        say((*plan.said, *(f"note: {line}" for line in estimates)), quiet=quiet)
        with progress_display(Console(stderr=True), "merging", quiet=quiet) as progress:
            report = carry_out(plan, progress)
    if not quiet:
        typer.echo(closing_line(report))
        if plan.format is not None and report.kept:
            typer.echo(describe_kept(report.kept, plan.format.name))


@app.command(
    "mergekit", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def run_mergekit(
    context: typer.Context,
    replace: Annotated[bool, typer.Option("--replace", help="Run mergekit's methods on these kernels too.")] = False,
) -> None:
    """Run mergekit-yaml (RECIPE OUT and its options) with this library's merge methods registered."""
    from resm_kernels.mergekit import run

    run(context.args, replace=replace)


@app.command()
def calibrate(
    context: typer.Context,
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(help="Folder of the calibrated model.", show_default=False)],
    prompts: Annotated[
        list[Path],
        typer.Option(
            "--prompts",
            metavar="FILE...",
            help="Files of prompts, one for each expert in the recipe's order: .jsonl or .txt.",
            show_default=False,
        ),
    ],
    least_squares: Annotated[
        bool, typer.Option(help="Solve the linear layers for the experts' outputs.")
    ] = CalibrateOptions.least_squares,
    polish_steps: Annotated[
        int, typer.Option(help="Training steps after that, towards the experts' predictions; 0: none.")
    ] = CalibrateOptions.polish_steps,
    answer_weight: Annotated[
        float, typer.Option(help="Weight of positions that predict an answer; others have 1.")
    ] = CalibrateOptions.answer_weight,
    ridge: Annotated[
        float | None,
        typer.Option(
            help="Pull towards the merge, relative to mean squared inputs. Default: 0.001; 0.1 before a polish."
        ),
    ] = CalibrateOptions.ridge,
    embeddings: Annotated[
        str, typer.Option(help="merged, or token-counts: averaged by how often an expert has a token.")
    ] = CalibrateOptions.embeddings,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the polish.")
    ] = CalibrateOptions.learning_rate,
    held_out: Annotated[
        float,
        typer.Option(help="Share of the prompts that only choose the step that is kept."),
    ] = CalibrateOptions.held_out,
    max_prompts: Annotated[
        int | None, typer.Option(help="Use the first prompts of each file only.")
    ] = CalibrateOptions.max_prompts,
    max_prompt_tokens: Annotated[
        int, typer.Option(help="Most tokens of a prompt; a longer one is an error.")
    ] = CalibrateOptions.max_prompt_tokens,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = CalibrateOptions.max_new_tokens,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens that run through a block at once.")
    ] = CalibrateOptions.batch_tokens,
    answers: Annotated[
        Path | None, typer.Option(help="Folder where answers are kept for other calibrations.")
    ] = CalibrateOptions.answers,
    seed: Annotated[int, typer.Option(help="Of the prompts held out and their order.")] = CalibrateOptions.seed,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:N.")] = str(CalibrateOptions.device),
    threads: ThreadsOption = CalibrateOptions.threads,
    max_shard_size: Annotated[str, typer.Option(help="Largest output file, such as 5GB or 512MiB.")] = str(
        CalibrateOptions.max_shard_size
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")
    ] = CalibrateOptions.overwrite,
    restart: RestartOption = CalibrateOptions.restart,
    strict: StrictOption = CalibrateOptions.strict,
    quiet: QuietOption = False,
) -> None:
    """Merge as RECIPE says, calibrate on prompts that the experts answer themselves, and write the model to OUT.

    If it is interrupted or fails, the same command goes on from there; the work so far is in .OUT.calibration.
    """
    with loading():
        from rich.console import Console

        from resm_kernels.calibrate import calibrate_checkpoint
        from resm_kernels.console import phase_display

    options = options_of(context.params, CalibrateKeywords)
    resumable = cut_off_named("the same command goes on from there")
    with resumable, phase_display(Console(stderr=True), quiet=quiet) as progress:
        spoken = functools.partial(say, quiet=quiet)
        report = calibrate_checkpoint(recipe, out, prompts, progress=progress, say=spoken, **options)
    if not quiet:
        typer.echo(report.summary())


@app.command()
def stats(
    recipe: RecipeArgument,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all statistics as JSON; '-' prints the JSON.")
    ] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Also decompose: singular values, effective ranks, task interference.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw them, as .png, .svg or .pdf; implies --spectra.")
    ] = None,
    memory_limit: MemoryOption = str(MergeOptions.memory_limit),
    strict: StrictOption = MergeOptions.strict,
    quiet: QuietOption = False,
) -> None:
    """Show RESM's statistics of each tensor of RECIPE's models: sparsity, outlier mass, weights and ranks.

    With --spectra, also how the task vectors' singular values decay and how far the experts' subspaces overlap.
    """
    show_stats(
        recipe,
        json_file,
        plot,
        spectra=spectra or plot is not None,
        memory_limit=memory_limit,
        strict=strict,
        quiet=quiet,
    )


@app.command()
def statistics(
    model: Annotated[str, typer.Argument(help="Model folder, or BASE+ADAPTER.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="File to write, such as chat.statistics.safetensors.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="File of prompts, .jsonl or .txt.")],
    kind: Annotated[str, typer.Option(help="gram for RegMean and RegMean++, fisher for Fisher merging.")] = "gram",
    answers_by: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model that answers; default: MODEL. For RegMean++ the expert.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer; 1 reads prompts alone.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a prompt may have.")] = 1024,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Use the first prompts only, so many.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that run at a time.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Of the model's arithmetic: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu or cuda.")] = "cpu",
    random_seed: Annotated[int, typer.Option(help="The seed of the tokens that Fisher informations draw.")] = 0,
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    quiet: SilentOption = False,
) -> None:
    """Compute what RegMean and Fisher merging need of MODEL on prompts, which it answers, and write it to OUT."""
    with loading():
        import torch

        from resm_kernels.calibrate.statistics import compute_statistics

    if threads is not None:
        torch.set_num_threads(threads)
    report = compute_statistics(
        model,
        out,
        prompts,
        kind=kind,
        answers_by=answers_by,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_prompts=max_prompts,
        batch_tokens=batch_tokens,
        dtype=dtype,
        device=device,
        random_seed=random_seed,
        overwrite=overwrite,
    )
    if not quiet:
        typer.echo(str(report))


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a model or an adapter.", show_default=False)],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print findings alone.")] = False,
) -> None:
    """Check a model folder: index, headers, hashes and shapes of the record, no NaN or infinite values, config.json.

    What a killed run left next to OUT is put right first. The exit code is 1 if there are findings, a line for each.
    """
    with loading():
        from resm_kernels.checkpoint import verify_checkpoint

    report = verify_checkpoint(out)
    for finding in report.findings:
        typer.echo(finding)
    if not quiet:
        typer.echo(report.summary())
    if report.findings:
        raise typer.Exit(1)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show version, kernels, CPU features, threads and GPUs, for bug reports and to see which kernels run."""
    with loading():
        import platform

        import torch

        import resm_kernels
        from resm_kernels.console import describe_machine, to_json

    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    facts = {"version": resm_kernels.__version__, **resm_kernels.backends(), "cpu": cpu}
    typer.echo(to_json(facts) if as_json else describe_machine(facts))


app.command("extract-lora")(extract_lora)


def main() -> None:
    """Run the command line, and turn an exception into one line on stderr and an exit code."""
    set_up_process()
    try:
        app(_translated(sys.argv[1:]))
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", INTERRUPTED)
    except Exception as error:
        if _options["traceback"]:
            raise
        fail_with(error)


def _translated(arguments: list[str]) -> list[str]:
    """Return the command line in typer's form: with `merge`'s own options, and a repeated option for several files."""
    command = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    if arguments[command : command + 1] == ["calibrate"]:
        return repeated(arguments, "--prompts")
    if arguments[command : command + 1] != ["merge"]:
        return arguments
    try:
        translated, notes = translate(arguments[command + 1 :])
    except ValueError as error:
        fail(str(error), 2)
    for note in notes:
        print(f"no effect: {note}", file=sys.stderr)
    return [*arguments[: command + 1], *translated]
