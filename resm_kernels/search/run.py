"""The search: asks for values, merges, judges, and writes the best recipes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import xxhash

from resm_kernels.calibrate import load_model, load_tokenizer
from resm_kernels.checkpoint.format import byte_view
from resm_kernels.dtypes import ADAPTER_DTYPES, dtype_name
from resm_kernels.engine import MergeError
from resm_kernels.engine.job import merge_job
from resm_kernels.live import LiveModels
from resm_kernels.options import SearchKeywords, SearchOptions
from resm_kernels.recipe import RecipeError
from resm_kernels.search.errors import ChangedModelError, EvaluateError, NotFiniteError, SearchError, TimeIsUp
from resm_kernels.search.evaluation import TEST, VALID, Evaluate, Judge, find_evaluate
from resm_kernels.search.folder import SearchFolder
from resm_kernels.search.identity import evaluate_job
from resm_kernels.search.space import Space, load_space
from resm_kernels.search.study import Study, Trial, best, check_sampler, front, is_hopeless

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack  # Python 3.11 has it in `typing`


MOST_FAILURES: Final = 10
"""Failed trials in a row that end a search: what fails is then not the values."""


@dataclass(frozen=True)
class SearchReport:
    """The result of a search.

    Attributes:
        out: The folder.
        objectives: The scores that were maximised.
        trials: All trials that have ended, in order.
        best: The trial with the largest mean of the objectives, or what `best_by` asks for.
        front: The trials of the Pareto front, in order.
        held_out: The scores on the held-out split, by the number of the trial: of the best trial and the baselines.
        held_out_failed: Why a trial of these has none, by its number; the same call tries it again.
        tensors: The XXH3-128 hash of each tensor of the best merge, as `resm_kernels.json` of a merged folder has it.
        unfinished: The number of the trial within which the time ended; None if there is none.
    """

    out: Path
    objectives: tuple[str, ...]
    trials: tuple[Trial, ...]
    best: Trial
    front: tuple[Trial, ...]
    held_out: Mapping[int, Mapping[str, float]]
    held_out_failed: Mapping[int, str]
    tensors: Mapping[str, str]
    unfinished: int | None = None


def search_recipes(
    space: str | os.PathLike[str],
    evaluate: Evaluate | str,
    out: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    on_trial: Callable[[Trial], None] | None = None,
    **options: Unpack[SearchKeywords],
) -> SearchReport:
    """Search for the values of a recipe's ranges whose merges score best, and write the best recipes to a folder.

    Each trial merges into one model in memory (`LiveModels`), which `evaluate` then judges with split="valid". The
    first trials are the recipe's defaults, and the same weights for all experts. At the end the best trial and the
    baselines are judged once with split="test". Every trial is stored when it ends: the same call goes on from there,
    also with more `trials`.

    `out` gets `best.yaml`, whose merge by `merge_checkpoints` has the bits of the model that was judged; `front/`, with
    a recipe for each trial of the Pareto front; `report.json`; `front.png`; and `study.db`, Optuna's database.

    Args:
        space: A YAML file: a recipe with ranges (`resm_kernels.search.space`).
        evaluate: `evaluate(model, split=…)`, or `module:function`; see `Judge`. Larger scores are better.
        out: The folder, which is made if it is missing.
        model, tokenizer: What to merge into, which ends up with the best merge in evaluation mode, and what `evaluate`
            gets. By default the recipe's base model (or first model) and its tokenizer are loaded with transformers,
            which must know it as a causal language model.
        on_trial: Called with each trial that has ended.
        trials: How many trials the search has in all; None for no limit.
        time: How long to search, such as "1h", "30min" or a number of seconds; None for no limit. One of the two limits
            is needed. The trial within which the time ends is broken off, and judged again if you search on; but the
            first trial is finished, and so is every one outside of the main thread, or where SIGALRM has a handler or
            its timer is set. The held-out split at the end takes its time on top.
        sampler: "tpe" (the default), "cmaes" (one objective), "nsga2" or "random".
        objectives: The scores to maximise, all that `evaluate` returns by default.
        questions: How many questions `evaluate` may ask on the validation split (default: all).
        prefix: Judge a trial by so many questions first, and stop it there if at least half of the earlier trials are
            better in every objective (default: None, which stops none).
        held_out: Judge the best trial and the baselines with split="test" at the end (default: True).
        best_by: "mean" (the default) takes the trial with the largest mean of the objectives for the best, "worst" the
            one whose least objective is the largest, for objectives on one scale.
        random_seed: Of the sampler, and of methods that draw random numbers (default: 0).
        dtype: The dtype of the model that is judged: "float32" (default), "bfloat16" or "float16".
        device: Where models are merged and judged (default: "cpu").
        threads, memory_limit: As for `LiveModels`.
        allow_changed_evaluate: Go on with a search although the source of `evaluate`, or a file that it reads, has
            changed since it began (default: False, which refuses this). The trials of then keep their scores.

    Raises:
        SearchError: An option, the space or the function cannot be used; `out` holds another search, or its trials are
            gone or damaged; or ten trials have failed one after the other, when all results are written.
        RecipeError, CheckpointError, MergeError, CalibrationError: The models cannot be merged or loaded.
    """
    settings = SearchOptions(**options)
    checked = load_space(space)
    check_sampler(settings.sampler, settings.objectives or ())
    function = find_evaluate(evaluate) if isinstance(evaluate, str) else evaluate
    with contextlib.ExitStack() as stack:
        models = stack.enter_context(
            LiveModels(
                memory_limit=settings.memory_limit,
                device=settings.device,
                threads=settings.threads,
                random_seed=settings.random_seed,
            )
        )
        baselines = checked.baselines()
        defaults = checked.recipe(baselines["defaults"])
        with models.plan(defaults) as plan:
            job = merge_job(plan) | settings.job() | {"search space": checked.text}
            del job["recipe"]  # which follows from the space
        job |= evaluate_job(function, evaluate if isinstance(evaluate, str) else None)
        folder = SearchFolder(Path(out), job, changed_evaluate=settings.allow_changed_evaluate)
        stack.enter_context(folder)
        reference = models.reference(defaults)
        if model is None:
            kinds = {dtype_name(kind): kind for kind in ADAPTER_DTYPES}
            model = load_model(reference, dtype=kinds[settings.dtype], device=models.device)
            tokenizer = load_tokenizer(reference) if tokenizer is None else tokenizer
        judge = Judge(function, model, tokenizer, settings.questions, settings.prefix)
        return _Search(checked, settings, models, model, judge, folder, on_trial).run(baselines)


class _Search:
    """One run of a search."""

    def __init__(
        self,
        space: Space,
        settings: SearchOptions,
        models: LiveModels,
        model: nn.Module,
        judge: Judge,
        folder: SearchFolder,
        on_trial: Callable[[Trial], None] | None,
    ) -> None:
        self._space, self._settings, self._models, self._model = space, settings, models, model
        self._judge, self._folder, self._on_trial = judge, folder, on_trial
        self._objectives: tuple[str, ...] = ()

    def run(self, baselines: Mapping[str, Mapping[str, Any]]) -> SearchReport:
        seconds = self._settings.seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        study, known = self._open_study(baselines)
        with study:
            for name, values in baselines.items():
                study.enqueue_baseline(values, name)
            if known is not None:
                self._end(study, replace(known, number=study.ask().number))
            failures: list[Trial] = []
            unfinished = None
            while len(failures) < MOST_FAILURES and not self._is_over(study, deadline):
                asked, others = study.ask(), study.trials()
                # Without a trial that is complete there would be no result.
                self._judge.deadline = deadline if any(t.state == "complete" for t in others) else None
                try:
                    trial = self._judged(asked, others)
                except TimeIsUp:
                    unfinished = asked.number
                    break
                self._end(study, trial)
                failures = [*failures, trial] if trial.state == "failed" else []
            self._judge.deadline = None
            has_failed = len(failures) == MOST_FAILURES
            report = replace(self._finish(study, held_out=not has_failed), unfinished=unfinished)
            if has_failed:
                raise SearchError(
                    f"search: {MOST_FAILURES} trials have failed one after the other, the last with: "
                    f"{failures[-1].error}; the search is kept, and its results are in {report.out}: if you have "
                    "mended what fails, the same command goes on from there"
                )
            return report

    def _end(self, study: Study, trial: Trial) -> None:
        study.tell(trial)
        self._folder.note_trial()
        if self._on_trial is not None:
            self._on_trial(trial)

    def _open_study(self, baselines: Mapping[str, Mapping[str, Any]]) -> tuple[Study, Trial | None]:
        """Return the study, and for a new one the first baseline, whose scores say which objectives there are."""
        known = None
        objectives: Sequence[str] = self._folder.objectives
        if not objectives:
            began = time.perf_counter()
            self._judge.needed = self._settings.objectives or ()
            known = self._scored(Trial(0, "running", "defaults", baselines["defaults"], {}), [], began)
            objectives = self._settings.objectives or tuple(known.scores)
        settings = self._settings
        check_sampler(settings.sampler, objectives)
        self._objectives = self._folder.objectives = self._judge.needed = tuple(objectives)
        study = Study(self._folder.path, self._space.ranges, objectives, settings.sampler, settings.random_seed)
        return study, known

    def _is_over(self, study: Study, deadline: float | None) -> bool:
        ended = study.trials()
        if not any(trial.state == "complete" for trial in ended):
            return False  # there would be no result
        done = self._settings.trials is not None and len(ended) >= self._settings.trials
        return done or (deadline is not None and time.monotonic() >= deadline)

    def _judged(self, trial: Trial, others: Sequence[Trial]) -> Trial:
        began = time.perf_counter()
        try:
            return self._scored(trial, others, began)
        except (MergeError, RecipeError, NotFiniteError, EvaluateError) as error:
            if trial.baseline == "defaults":
                raise
            # Some values have no merge, such as weights that sum to zero or a result beyond float16, and others have
            # one whose logits overflow.
            return replace(
                trial,
                state="failed",
                error=str(error),
                traceback=error.traceback if isinstance(error, EvaluateError) else None,
                seconds=round(time.perf_counter() - began, 3),
            )

    def _scored(self, trial: Trial, others: Sequence[Trial], began: float) -> Trial:
        self._models.merge_into(self._model, self._space.recipe(trial.values))
        first = self._judge(VALID, self._settings.prefix) if self._settings.prefix is not None else None
        hopeless = first is not None and trial.baseline is None and is_hopeless(first, others, self._objectives)
        if first is not None and not hopeless and self._judge.has_changed_values:
            self._models.merge_into(self._model, self._space.recipe(trial.values))
        scores = first if hopeless and first is not None else self._judge(VALID)
        state = "stopped" if hopeless else "complete"
        return replace(
            trial, state=state, scores=scores, first_scores=first, seconds=round(time.perf_counter() - began, 3)
        )

    def _finish(self, study: Study, *, held_out: bool) -> SearchReport:
        trials = study.trials()
        chosen, pareto = best(trials, self._objectives, self._settings.best_by), front(trials, self._objectives)
        baselines = [t for t in trials if t.baseline is not None and t.state == "complete"]
        judged = study.held_out
        failed: dict[int, str] = {}
        is_changed = False
        due = {trial.number: trial for trial in (*baselines, chosen)} if held_out and self._settings.held_out else {}
        for trial in (t for t in due.values() if str(t.number) not in judged):
            if is_changed:
                failed[trial.number] = "the function has changed the model before"
                continue
            self._models.merge_into(self._model, self._space.recipe(trial.values))
            try:
                judged[str(trial.number)] = self._judge(TEST)
            except SearchError as error:  # the search itself has its result, and it is written
                failed[trial.number] = str(error)
                is_changed = isinstance(error, ChangedModelError)
                continue
            study.keep_held_out(judged)
        recipe = self._space.recipe(chosen.values)
        if not is_changed:
            # A model that the caller has passed ends up with the best merge.
            self._models.merge_into(self._model, recipe)
        tensors = {n: xxhash.xxh3_128(byte_view(t.cpu())).hexdigest() for n, t in self._models.tensors(recipe)}
        report = SearchReport(
            out=self._folder.path,
            objectives=self._objectives,
            trials=tuple(trials),
            best=chosen,
            front=tuple(pareto),
            held_out={int(number): scores for number, scores in judged.items()},
            held_out_failed=failed,
            tensors=tensors,
        )
        self._folder.write(report, self._space)
        return report
