"""The command `resm-kernels search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resm_kernels.arguments import (
    BestByOption,
    EvaluateOption,
    KeptMemoryOption,
    ModelDeviceOption,
    ModelDtypeOption,
    ObjectivesOption,
    PrefixOption,
    QuestionsOption,
    QuietOption,
    SamplerOption,
    SpaceArgument,
    ThreadsOption,
    TimeOption,
    TrialsOption,
)
from resm_kernels.command import cut_off_named, fail, loading, options_of
from resm_kernels.options import SearchKeywords, SearchOptions


def search(
    context: typer.Context,
    space: SpaceArgument,
    evaluate: EvaluateOption,
    out: Annotated[Path, typer.Option("--out", help="Folder of the search.", show_default=False)],
    trials: TrialsOption = SearchOptions.trials,
    time: TimeOption = None,
    sampler: SamplerOption = SearchOptions.sampler,
    objectives: ObjectivesOption = None,
    questions: QuestionsOption = SearchOptions.questions,
    prefix: PrefixOption = SearchOptions.prefix,
    best_by: BestByOption = SearchOptions.best_by,
    held_out: Annotated[
        bool, typer.Option("--held-out/--no-held-out", help="Judge the best trial on the test split at the end.")
    ] = SearchOptions.held_out,
    random_seed: Annotated[
        int, typer.Option("--random-seed", help="Of the sampler, and of methods that draw random numbers.")
    ] = SearchOptions.random_seed,
    dtype: ModelDtypeOption = SearchOptions.dtype,
    device: ModelDeviceOption = str(SearchOptions.device),
    threads: ThreadsOption = SearchOptions.threads,
    memory_limit: KeptMemoryOption = str(SearchOptions.memory_limit),
    allow_changed_evaluate: Annotated[
        bool,
        typer.Option("--allow-changed-evaluate", help="Go on although FUNCTION, or a file that it reads, has changed."),
    ] = SearchOptions.allow_changed_evaluate,
    quiet: QuietOption = False,
) -> None:
    """Search the ranges of SPACE, a recipe, for the merges that MODULE:FUNCTION scores best.

    OUT gets best.yaml, the Pareto front's recipes, a report, a picture, and study.db for optuna-dashboard. If it is
    interrupted or killed, the same command goes on from there, also with more trials.
    """
    with loading():
        from resm_kernels.search import Trial, search_recipes
        from resm_kernels.search.report import result_lines, trial_line

    options = options_of(context.params, SearchKeywords)
    options["objectives"] = None if objectives is None else [name.strip() for name in objectives.split(",")]

    def show(trial: Trial) -> None:
        typer.echo(trial_line(trial), err=True)

    with cut_off_named("the same command goes on from there"):
        report = search_recipes(space, evaluate, out, on_trial=None if quiet else show, **options)
    if not quiet:
        typer.echo("\n".join(result_lines(report)))
    if report.held_out_failed:
        number, error = next(iter(report.held_out_failed.items()))
        fail(f"held out: trial {number} has no score: {error}; all results but this are in {report.out}", 1)
