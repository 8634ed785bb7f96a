"""The trials of a search, which Optuna proposes and keeps in a SQLite file."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from resm_kernels.search.errors import SearchError
from resm_kernels.search.space import Range, Value

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`

DATABASE: Final = "study.db"
STUDY: Final = "search"
_POPULATION: Final = 20
"""Trials of a generation of NSGA-II: Optuna's 50 would leave a search of some dozen trials at random draws."""
_HELD_OUT: Final = "held_out"
_MOST_TRIES: Final = 3
"""How often values are judged anew after the process ended meanwhile: they may be why, as of memory that they need."""


@dataclass(frozen=True)
class Trial:
    """One merge that was judged.

    Attributes:
        number: Its number, from 0.
        state: "complete"; "stopped" after the first questions; or "failed", because there is no such merge.
        baseline: "defaults" or "uniform" for the first trials, None for those that the sampler proposed.
        values: The value of each range.
        scores: What the function returned, for all questions, or for the first ones if it was stopped.
        first_scores: What it returned for the first questions; None if it was asked all at once.
        seconds: Wall time of merging and judging.
        error: Why it failed, else None.
        traceback: Where the function raised the error, if it did.
    """

    number: int
    state: str
    baseline: str | None
    values: Mapping[str, Value]
    scores: Mapping[str, float]
    first_scores: Mapping[str, float] | None = None
    seconds: float = 0.0
    error: str | None = None
    traceback: str | None = None


class Study:
    """The trials of one search, as a context manager that closes the database.

    Args:
        folder: Where the database is.
        ranges: What is searched.
        objectives: The scores to maximise.
        sampler: A name of `SAMPLERS`.
        seed: Of the sampler's draws.

    Raises:
        SearchError: The database is damaged or, within the context, cannot be read or written.
    """

    def __init__(
        self, folder: Path, ranges: Sequence[Range], objectives: Sequence[str], sampler: str, seed: int
    ) -> None:
        self.objectives = tuple(objectives)
        self._optuna = _imported("optuna")
        sqlalchemy = _imported("sqlalchemy")
        self._database_error = sqlalchemy.exc.SQLAlchemyError
        self._file = (folder / DATABASE).absolute()
        self._asked: dict[int, Any] = {}
        self._distributions = {r.name: self._distribution(r) for r in ranges}
        # Python shows a warning once, and again after each `catch_warnings`, which therefore is here alone.
        with self._accessed(), warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            # An address could not hold every path: what follows a ? is not a part of it.
            connect = functools.partial(sqlite3.connect, self._file, check_same_thread=False)
            self._storage = self._optuna.storages.RDBStorage(
                f"sqlite:///{DATABASE}", engine_kwargs={"creator": connect}
            )
            self._study = self._optuna.create_study(
                storage=self._storage,
                study_name=STUDY,
                directions=["maximize"] * len(objectives),
                load_if_exists=True,
            )
            self._check_is_same()
            self._study.set_metric_names(list(objectives))
            self._retire_unfinished()
            # A sampler that began with the same draws again would repeat trials.
            self._study.sampler = self._sampler(sampler, seed + len(self._study.trials))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    def enqueue_baseline(self, values: Mapping[str, Value], name: str) -> None:
        """Let a baseline come before the trials that the sampler proposes, unless it is there already.

        But for the defaults, without which there is no search, it is left out if it was cut off too often.
        """
        with self._accessed():
            there = [t for t in self._study.get_trials(deepcopy=False) if t.user_attrs.get("baseline") == name]
            is_hopeless = name != "defaults" and len(there) >= _MOST_TRIES
            if all(map(self._was_cut_off, there)) and not is_hopeless:
                self._study.enqueue_trial(dict(values), user_attrs={"baseline": name})

    def ask(self) -> Trial:
        """Return the next trial, without scores."""
        with self._accessed():
            asked = self._study.ask(fixed_distributions=self._distributions)
        self._asked[asked.number] = asked
        return Trial(asked.number, "running", asked.user_attrs.get("baseline"), dict(asked.params), {})

    def tell(self, trial: Trial) -> None:
        """Store a trial that has ended."""
        state = self._optuna.trial.TrialState
        states = {"complete": state.COMPLETE, "stopped": state.PRUNED, "failed": state.FAIL}
        ended = self._asked.pop(trial.number)
        with self._accessed():
            for name in ("scores", "first_scores", "seconds", "error", "traceback"):
                if (value := getattr(trial, name)) not in (None, {}):
                    ended.set_user_attr(name, dict(value) if isinstance(value, Mapping) else value)
            values = [trial.scores[name] for name in self.objectives] if trial.state == "complete" else None
            self._study.tell(ended, values, state=states[trial.state])

    def trials(self) -> list[Trial]:
        """Return the trials that have ended, in order."""
        state = self._optuna.trial.TrialState
        names = {state.COMPLETE: "complete", state.PRUNED: "stopped", state.FAIL: "failed"}
        ended = []
        with self._accessed():
            stored = self._study.get_trials(deepcopy=False)
        for t in stored:
            attributes = t.user_attrs
            if t.state not in names or self._was_cut_off(t):
                continue
            ended.append(
                Trial(
                    number=t.number,
                    state=names[t.state],
                    baseline=attributes.get("baseline"),
                    values=dict(t.params),
                    scores=attributes.get("scores", {}),
                    first_scores=attributes.get("first_scores"),
                    seconds=attributes.get("seconds", 0.0),
                    error=attributes.get("error"),
                    traceback=attributes.get("traceback"),
                )
            )
        return ended

    def _was_cut_off(self, trial: Any) -> bool:
        """Return True for a trial that was running when its process was killed: it has failed without an error."""
        return bool(trial.state == self._optuna.trial.TrialState.FAIL and "error" not in trial.user_attrs)

    @property
    def held_out(self) -> dict[str, Any]:
        """What has been judged on the held-out split: scores by the number of the trial."""
        with self._accessed():
            return dict(self._study.user_attrs.get(_HELD_OUT, {}))

    def keep_held_out(self, judged: Mapping[str, Any]) -> None:
        """Store what has been judged on the held-out split."""
        with self._accessed():
            self._study.set_user_attr(_HELD_OUT, dict(judged))

    def _check_is_same(self) -> None:
        """Refuse a database that has been put into the folder of another search."""
        names = self._study.metric_names
        tried = {name for trial in self._study.get_trials(deepcopy=False) for name in trial.params}
        if names is not None and tuple(names) != self.objectives:
            found, needed = f"the objectives {', '.join(names)}", ", ".join(self.objectives)
        elif unknown := sorted(tried - self._distributions.keys()):
            found, needed = f"trials of {unknown[0]}", ", ".join(self._distributions)
        else:
            return
        raise SearchError(f"{self._file}: has {found}, need {needed}: it is of another search than the folder")

    def _retire_unfinished(self) -> None:
        """Put trials back into the queue that were running when their process was killed, unless too often.

        Baselines, which are there until they have ended, are put back by `enqueue_baseline`.
        """
        state = self._optuna.trial.TrialState
        tried = [t.params for t in self._study.get_trials(deepcopy=False) if self._was_cut_off(t)]
        for running in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self._study.tell(running.number, state=state.FAIL)
            tries = 1 + tried.count(running.params)
            if running.params and "baseline" not in running.user_attrs and tries < _MOST_TRIES:
                self._study.enqueue_trial(running.params)

    def _distribution(self, r: Range) -> Any:
        distributions = self._optuna.distributions
        if r.low is None or r.high is None:
            return distributions.CategoricalDistribution(r.choices)
        if r.whole:
            return distributions.IntDistribution(int(r.low), int(r.high), log=r.log, step=int(r.step or 1))
        return distributions.FloatDistribution(r.low, r.high, log=r.log, step=r.step)

    def _sampler(self, name: str, seed: int) -> Any:
        samplers = self._optuna.samplers
        seed %= 2**32
        if name == "cmaes":
            return samplers.CmaEsSampler(seed=seed)
        if name == "nsga2":
            return samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
        if name == "random":
            return samplers.RandomSampler(seed=seed)
        # Weights and λ act together, so that their values are drawn together.
        return samplers.TPESampler(seed=seed, multivariate=True)

    @contextlib.contextmanager
    def _accessed(self) -> Iterator[None]:
        """Name the file in errors of the database, and let Optuna log nothing: it would name each trial."""
        logging = self._optuna.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)
        try:
            yield
        except (self._optuna.exceptions.StorageInternalError, self._database_error) as error:
            of_sql = error if isinstance(error, self._database_error) else error.__cause__
            raise SearchError(
                f"{self._file}: cannot be read or written: {getattr(of_sql, 'orig', None) or error}"
            ) from error
        finally:
            logging.set_verbosity(verbosity)


def check_database(folder: Path) -> None:
    """Refuse a search whose trials were stored and are gone, or that cannot be read. Nothing is written.

    Raises:
        SearchError: The database is missing, empty, without trials, damaged or something else.
    """
    file = folder / DATABASE
    try:
        if not file.exists() or file.stat().st_size == 0:
            raise SearchError(
                f"{file}: {'is empty' if file.exists() else 'is missing'}, but trials were stored there; put it back, "
                "or name another folder: nothing was changed"
            )
        # An address could not hold every path: what follows a ? is not a part of it, but a quoted one can.
        with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as database:
            (finding,) = database.execute("PRAGMA quick_check(1)").fetchone()
            (count,) = database.execute("SELECT count(*) FROM trials").fetchone()
    except (sqlite3.Error, OSError) as error:
        raise SearchError(f"{file}: cannot be read or written: {error}") from error
    if finding != "ok" or count == 0:
        reason = (
            f"is damaged ({str(finding).splitlines()[-1]})"
            if finding != "ok"
            else "has none of the trials that were stored there"
        )
        raise SearchError(f"{file}: {reason}; put back a copy, or name another folder: nothing was changed")


def check_sampler(name: str, objectives: Sequence[str]) -> None:
    """Raise a SearchError unless a study with that sampler and these objectives can be opened."""
    _imported("optuna")
    if name == "cmaes":
        _imported("cmaes")
        if len(objectives) > 1:
            raise SearchError(
                f"sampler: cmaes has one objective, got {', '.join(objectives)}; need --objectives with one of them, "
                "or the sampler tpe or nsga2"
            )


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SearchError(
            f"search: {module} cannot be imported ({error}); pip install 'resm-kernels[search]'"
        ) from error


def dominates(a: Mapping[str, float], b: Mapping[str, float], objectives: Sequence[str]) -> bool:
    """Return True if `a` is at least as good as `b` in every objective, and better in one."""
    return all(a[o] >= b[o] for o in objectives) and any(a[o] > b[o] for o in objectives)


def front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Return the Pareto front: complete trials that no other one dominates; of equal scores the first trial alone."""
    complete = [t for t in trials if t.state == "complete"]
    chosen: list[Trial] = []
    for trial in complete:
        equal = any(all(t.scores[o] == trial.scores[o] for o in objectives) for t in chosen)
        if not equal and not any(dominates(t.scores, trial.scores, objectives) for t in complete):
            chosen.append(trial)
    return chosen


def best(trials: Sequence[Trial], objectives: Sequence[str], by: str = "mean") -> Trial:
    """Return the complete trial with the largest mean of the objectives, the first of equals.

    With `by` "worst" it is the one whose least objective is the largest; the mean decides between equals.
    """
    complete = [t for t in trials if t.state == "complete"]
    if not complete:
        raise SearchError("search: no trial was judged to its end, need one or more")

    def rank(trial: Trial) -> tuple[float, float, int]:
        scores = [trial.scores[o] for o in objectives]
        return min(scores) if by == "worst" else 0.0, sum(scores), -trial.number

    return max(complete, key=rank)


def is_hopeless(scores: Mapping[str, float], others: Sequence[Trial], objectives: Sequence[str]) -> bool:
    """Return True for scores on the first questions that half of the other trials or more dominate.

    With one objective this is the median rule. Less than five trials are too few to tell.
    """
    asked = [t.first_scores for t in others if t.first_scores is not None]
    worse_than = sum(dominates(first, scores, objectives) for first in asked)
    return len(asked) >= 5 and 2 * worse_than >= len(asked)
