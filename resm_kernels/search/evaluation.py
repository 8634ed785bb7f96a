"""The function that judges a merge: how it is found, called, and what it may return."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from resm_kernels.files import shortened
from resm_kernels.search.errors import ChangedModelError, EvaluateError, NotFiniteError, SearchError, TimeIsUp
from resm_kernels.search.leaving import ModelState, until

Evaluate = Callable[..., "float | Mapping[str, float]"]
VALID: Final = "valid"
"""The split that trials are judged on."""
TEST: Final = "test"
"""The split that is held out: it is judged once, at the end."""
_ONLY: Final = "score"
"""The name of the only score of a function that returns a number."""
_LONGEST_TRACEBACK: Final = 20_000
_OF_SIGNALS: Final = 128
"""Exit codes above it are those of processes that a signal ends."""


def find_evaluate(spec: str) -> Evaluate:
    """Return the function that `module:function` names; modules of the working directory count too.

    Raises:
        SearchError: There is no such module or function, or it cannot be imported.
    """
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise SearchError(f"evaluate: got {shortened(spec)}, need module:function, such as judge:accuracy")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module may do anything
        if _is_of_signal(error):
            raise
        raise SearchError(f"evaluate: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise SearchError(f"evaluate: {module_name} has no {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise SearchError(f"evaluate: {spec} is {type(found).__name__}, need a function")
    evaluate: Evaluate = found
    return evaluate


class Judge:
    """Calls the function that judges merges, and checks what it returns.

    Args:
        evaluate: `evaluate(model, split=…)`, with the model that the merge was written into, and "valid" or "test". It
            also gets `tokenizer` and `questions` if it has arguments of these names. It returns a number, or numbers by
            name; larger ones are better.
        model, tokenizer: What it is given.
        questions: How many questions it may ask on the validation split; None for all.
        prefix: How many questions trials are judged by at first; None if they are asked all at once.

    Raises:
        SearchError: The function lacks an argument that is needed.

    Attributes:
        needed: Scores that every answer of the function must have; set when the objectives are known.
        deadline: When a call of the function is broken off (`until`), as `time.monotonic()` counts; None for never.
        has_changed_values: True if the last call has changed values of the model's parameters.
    """

    needed: Sequence[str] = ()
    deadline: float | None = None
    has_changed_values = False

    def __init__(
        self, evaluate: Evaluate, model: Any, tokenizer: Any, questions: int | None, prefix: int | None
    ) -> None:
        try:
            arguments = inspect.signature(evaluate).parameters
        except (TypeError, ValueError) as error:  # of what is no function, and of functions written in C
            raise SearchError(f"evaluate: {error}; need a function with an argument split") from error
        takes_all = any(a.kind is inspect.Parameter.VAR_KEYWORD for a in arguments.values())
        self._takes = {name for name in ("split", "questions", "tokenizer") if takes_all or name in arguments}
        if "split" not in self._takes:
            raise SearchError(
                "evaluate: the function has no argument split, which says whether to ask the questions that recipes "
                f'are chosen by ("{VALID}") or those that are held out ("{TEST}")'
            )
        if "questions" not in self._takes and (questions is not None or prefix is not None):
            option = "questions" if questions is not None else "prefix"
            raise SearchError(f"{option}: the function has no argument questions, which says how many it may ask")
        self._evaluate, self._model, self._tokenizer, self._questions = evaluate, model, tokenizer, questions

    def __call__(self, split: str, questions: int | None = None) -> dict[str, float]:
        """Return the scores of the model, on the first questions only if a number is given.

        Raises:
            NotFiniteError: A score is infinite or not a number.
            EvaluateError: The function raised an exception, or ended the process.
            ChangedModelError: The function left the model in another state (`ModelState`).
            SearchError: The function returned something else than numbers, or not all scores that are needed; or it
                raised this error itself.
            TimeIsUp: The deadline was reached.
        """
        offered = {
            "split": split,
            "questions": questions or (self._questions if split == VALID else None),
            "tokenizer": self._tokenizer,
        }
        self._model.eval()
        state = ModelState(self._model)
        try:
            by_name = _by_name(self._called({name: offered[name] for name in self._takes}))
        except SearchError:
            state.check()
            raise
        except TimeIsUp:
            try:
                state.check()
            except ChangedModelError as error:
                raise ChangedModelError(
                    f"{error}; it was broken off when the time was over, and has to do this even then: in a `finally`"
                ) from error
            raise
        state.check()
        self.has_changed_values = state.has_other_values
        if lacking := [name for name in self.needed if name not in by_name]:
            raise SearchError(
                f"objectives: the function returned no {lacking[0]!r}, but {', '.join(by_name)}; need the same "
                "objectives each time"
            )
        return {name: _checked(name, score) for name, score in by_name.items()}

    def _called(self, arguments: Mapping[str, Any]) -> Any:
        """Return what the function returns; its exceptions become those of `__call__`."""
        process = os.getpid()
        try:
            with torch.no_grad(), until(self.deadline):
                return self._evaluate(self._model, **arguments)
        except SearchError:
            raise
        except (Exception, SystemExit) as error:
            if _is_of_signal(error):
                raise
            raise _raised(error) from error
        finally:
            if os.getpid() != process:
                # A fork of this process that went on here would search in the same folder.
                print("error: evaluate: the function returned in a process that it has forked", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)


def _by_name(scores: Any) -> dict[str, Any]:
    if not isinstance(scores, Mapping):
        return {_ONLY: scores}
    if not scores:
        raise SearchError("evaluate: the function returned no scores, need one or more")
    if wrong := [name for name in scores if not isinstance(name, str) or not name]:
        raise SearchError(f"evaluate: the function returned a score by the name {shortened(wrong[0])}, need a text")
    return dict(scores)


def _is_of_signal(error: BaseException) -> bool:
    """Return True for the exception that a signal to end the process raises, and False for a call of `sys.exit`."""
    return isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > _OF_SIGNALS


def _raised(error: BaseException) -> EvaluateError:
    """Return the error of a function that has raised another one, which says where."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None  # without this module's own
    text = "".join(traceback.format_exception(type(error), error, frames))
    place = traceback.extract_tb(frames)[-1:]
    where = f" ({Path(place[0].filename).name}, line {place[0].lineno})" if place else ""
    kind, message = type(error).__name__, str(error).strip().partition("\n")[0]
    return EvaluateError(
        f"evaluate: the function raised {kind}{f': {message}' if message else ''}{where}", text[-_LONGEST_TRACEBACK:]
    )


def _checked(name: str, score: Any) -> float:
    message = f"evaluate: the score {name!r} is {shortened(score)}, need a finite number"
    if isinstance(score, (bool, str, bytes)) or str(getattr(score, "dtype", "")).endswith("bool"):
        # Python would take these for numbers.
        raise SearchError(f"evaluate: the score {name!r} is {shortened(score)}, need a number")
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises the last for tensors of several numbers
        raise SearchError(message) from error
    except OverflowError as error:  # of whole numbers beyond float64's range
        raise NotFiniteError(message) from error
    if not math.isfinite(number):
        raise NotFiniteError(message)
    return number
